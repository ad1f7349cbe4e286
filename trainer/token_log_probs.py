"""Log-probabilities of tokens from logits, without a second tensor of the logits' size in float32.

Autograd would keep the scaled logits in float32 and make their softmax once more for the entropy: three times the
logits of all positions, the largest tensor of an update (at d30 356 MB each for 32 images). Here a block of
rows at a time is scaled, normalised and dropped; the backward pass makes it again, and writes the gradient in the
logits' own dtype. `plain` is the twin that says what is computed.

Shapes: B batch, L tokens, V vocabulary, N = B·L rows, n those of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2**24
"""Of float32 in a block of rows: it stays in a CPU's cache, and is enough work for a GPU."""


def scaled(logits_BlV: Tensor, temperature: float) -> Tensor:
    """The policy's distribution as logits: every probability is the softmax of this, in float32."""
    return logits_BlV.float() / temperature


def gather(scaled_BlV: Tensor, tokens_Bl: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, l) of tokens, and the log of the normalising sums (B, l)."""
    log_norm_Bl = scaled_BlV.logsumexp(dim=-1)
    return scaled_BlV.gather(-1, tokens_Bl[..., None])[..., 0] - log_norm_Bl, log_norm_Bl


def plain(logits_BLV: Tensor, tokens_BL: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_log_probs` as one would write it down."""
    scaled_BLV = scaled(logits_BLV, temperature)
    log_probs_BL, log_norm_BL = gather(scaled_BLV, tokens_BL)
    with torch.no_grad():
        each_BLV = scaled_BLV - log_norm_BL[..., None]
        entropy_BL = -(each_BLV.exp() * each_BLV).sum(dim=-1)
    return log_probs_BL, entropy_BL


def token_log_probs(logits_BLV: Tensor, tokens_BL: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, through which gradients flow, and entropies in nats, through which none do.

    Args:
        logits_BLV: floating point (B, L, V), of any dtype.
        tokens_BL: int64 (B, L), below V.
        temperature: above 0.

    Returns:
        Two float32 tensors (B, L).
    """
    log_probs_N, entropy_N = _TokenLogProbs.apply(logits_BLV.flatten(0, -2), tokens_BL.flatten(), temperature)
    return log_probs_N.view(tokens_BL.shape), entropy_N.view(tokens_BL.shape)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_probs_N, entropy_N, log_norm_N = (
            torch.empty(len(tokens_N), dtype=torch.float32, device=logits_NV.device) for _ in range(3)
        )
        for rows in _blocks(logits_NV):
            scaled_nV = scaled(logits_NV[rows], temperature)
            log_probs_N[rows], log_norm_N[rows] = gather(scaled_nV, tokens_N[rows])
            each_nV = scaled_nV.sub_(log_norm_N[rows, None])
            entropy_N[rows] = -(each_nV.exp().mul_(each_nV)).sum(dim=-1)
        ctx.save_for_backward(logits_NV, tokens_N, log_norm_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d log p / d logit = (1 at the token − p) / temperature."""
        logits_NV, tokens_N, log_norm_N = ctx.saved_tensors
        gradient_N = gradients[0] / ctx.temperature
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _blocks(logits_NV):
            block_nV = (scaled(logits_NV[rows], ctx.temperature) - log_norm_N[rows, None]).exp_()
            block_nV.mul_(-gradient_N[rows, None])
            block_nV.scatter_add_(1, tokens_N[rows, None], gradient_N[rows, None])
            gradient_NV[rows] = block_nV
        return gradient_NV, None, None


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // (4 * logits_NV.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits_NV), rows))
