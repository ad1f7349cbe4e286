"""VAR as a policy: transformer, tokenizer and the precision they run in. B images, L tokens, N labels."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainer.lora import has_lora, merge_lora
from trainer.models.checkpoints import save_var
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import Rollout, decode_uint8, generate, log_probs, sample

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class VarPolicy:
    """A `trainer.interface.Policy` over the class labels of a VAR.

    Args:
        var: the transformer, in eval mode, for label dropout and DropPath are off in RL.
        vqvae: its tokenizer, frozen.
        classes: labels to draw from.
        autocast: makes the context that the transformer runs in; the quantizer runs in float32.
        adapted: makes a context around each use of the transformer, as one that switches an adapter off.
        decode_dtype: of the decoder's convolutions.
    """

    var: VAR
    vqvae: VQVAE
    classes: Sequence[int]
    autocast: Context = nullcontext
    adapted: Context = nullcontext
    decode_dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.var.pos_start.device

    @property
    def length(self) -> int:
        """L, the tokens of an image."""
        return self.var.config.length

    def draw_conditions(self, seed: int, step: int, count: int) -> Tensor:
        """The labels of a step: int64 (count,), uniform with repetition, keyed by (seed, step)."""
        generator = np.random.default_rng((seed, step, 1))
        return torch.from_numpy(
            np.asarray(self.classes, dtype=np.int64)[generator.integers(len(self.classes), size=count)]
        )

    def sample(self, conditions_B: Tensor, *, temperature: float, uniforms_BL: Tensor) -> Rollout:
        """Plain multinomial sampling; see `trainer.policy.sample`."""
        with self.autocast(), self.adapted():
            return sample(self.var, self.vqvae, conditions_B, temperature=temperature, uniforms_BL=uniforms_BL)

    def generate(
        self, conditions_B: Tensor, *, uniforms_BL: Tensor, guidance: float, top_k: int, top_p: float
    ) -> Rollout:
        """Sampling as at inference; see `trainer.policy.generate`."""
        with self.autocast(), self.adapted():
            return generate(
                self.var,
                self.vqvae,
                conditions_B,
                uniforms_BL=uniforms_BL,
                guidance=guidance,
                top_k=top_k,
                top_p=top_p,
            )

    def decode(self, rollout: Rollout) -> Tensor:
        """The images of a rollout, uint8 (B, H, W, 3)."""
        return decode_uint8(self.vqvae, rollout.f_hat_BCHW, dtype=self.decode_dtype)

    def log_probs(self, conditions_B: Tensor, tokens_BL: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities with gradient, and entropies, float32 (B, L); see `trainer.policy.log_probs`."""
        with torch.no_grad():
            _, var_input_BLmC = self.vqvae.quantize.embed_scales(tokens_BL)
        with self.autocast(), self.adapted():
            return log_probs(self.var, conditions_B, var_input_BLmC, tokens_BL, temperature=temperature)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the transformer in the published layout, with its adapters, if any, merged into it."""
        save_var(path, merge_lora(self.var) if has_lora(self.var) else self.var, metadata)

    def digest(self) -> str:
        """SHA-256 of the weights of transformer and tokenizer, in hexadecimal."""
        digest = hashlib.sha256()
        for module in (self.var, self.vqvae):
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the transformer that are trained."""
        return (parameter for parameter in self.var.parameters() if parameter.requires_grad)
