"""Log-probabilities in blocks of rows are those that one would write down."""

import pytest
import torch
from torch import Tensor

from trainer import token_log_probs as module
from trainer.token_log_probs import plain, token_log_probs

B, L, V = 3, 7, 50


def results(way: object, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the logits' gradient."""
    generator = torch.Generator().manual_seed(1)
    logits_BLV = (4 * torch.randn(B, L, V, generator=generator)).to(dtype).requires_grad_()
    tokens_BL = torch.randint(V, (B, L), generator=generator)
    log_probs_BL, entropy_BL = way(logits_BLV, tokens_BL, 0.7)  # type: ignore[operator]
    assert not entropy_BL.requires_grad
    (log_probs_BL * torch.randn(B, L, generator=generator)).sum().backward()
    assert logits_BLV.grad is not None
    return log_probs_BL.detach(), entropy_BL, logits_BLV.grad


@pytest.mark.parametrize("block_rows", [1, 4, 1000])
def test_blocks_agree_with_the_plain_twin(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    """Values, entropies and gradients, whatever the size of a block, the last one being smaller."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * V * block_rows)
    for found, expected in zip(results(token_log_probs, torch.float32), results(plain, torch.float32), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_low_precision_logits_lose_no_more_than_their_own_rounding() -> None:
    """bfloat16 logits are read in float32; their gradient comes back in bfloat16."""
    *found, gradient = results(token_log_probs, torch.bfloat16)
    *expected, plain_gradient = results(plain, torch.bfloat16)
    assert gradient.dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, plain_gradient, atol=1e-6, rtol=1e-2)


def test_a_logit_that_is_not_finite_shows() -> None:
    """As NaN, in its own row alone."""
    logits_BLV = torch.zeros(1, 2, 4)
    logits_BLV[0, 1, 2] = torch.nan
    log_probs_BL, _ = token_log_probs(logits_BLV, torch.zeros(1, 2, dtype=torch.int64), 1.0)
    assert log_probs_BL.isnan().tolist() == [[False, True]]


def test_memory_does_not_grow_by_float32_copies_of_the_logits() -> None:
    """Of what autograd keeps, the logits are the one large tensor, in their own dtype."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits_BLV = torch.randn(B, L, V).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_log_probs(logits_BLV, torch.zeros(B, L, dtype=torch.int64), 0.7)
    assert [tensor.dtype for tensor in kept if tensor.numel() >= B * L * V] == [torch.bfloat16]
