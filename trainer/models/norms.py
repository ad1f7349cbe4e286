"""The two normalisations of a block, with gradients of their own that keep and move less than autograd's would.

Each has a plain twin, which its docstring names and its test holds it to.

Shapes: B batch, L tokens, C model width, H attention heads, l tokens, c channels of a head.
"""

from typing import Any, cast

import torch
from torch import Tensor

EPS = 1e-6  # added to the variance
LEAST_LENGTH = 1e-12  # that a vector is divided by


def modulated(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """AdaLN: a layer norm without parameters, then a scale and a shift: `F.layer_norm(x) * (1 + scale) + shift`.

    What the norm gives is made again in the backward pass, and not kept.

    Args:
        x_BLC: floating point (B, L, C).
        scale_B1C, shift_B1C: (B, 1, C), of the same or a narrower dtype.

    Returns:
        (B, L, C) in the dtype of `x_BLC`.
    """
    return cast(Tensor, _Modulate.apply(x_BLC, scale_B1C, shift_B1C))


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BLC, mean_BL1, rstd_BL1 = torch.native_layer_norm(x_BLC, x_BLC.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x_BLC, mean_BL1, rstd_BL1, scale_B1C)
        return torch.addcmul(shift_B1C, normed_BLC, 1 + scale_B1C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With n the norm of x: d/dscale = Σ g·n and d/dshift = Σ g over tokens, d/dx that of n by g·(1 + scale)."""
        x_BLC, mean_BL1, rstd_BL1, scale_B1C = ctx.saved_tensors
        (gradient_BLC,) = gradients
        sides = x_BLC.shape[-1:]
        normed_BLC = torch.native_layer_norm(x_BLC, sides, None, None, EPS)[0]
        gradient_scale_B1C = (gradient_BLC * normed_BLC).sum(dim=1, keepdim=True)
        gradient_shift_B1C = gradient_BLC.sum(dim=1, keepdim=True)
        gradient_x_BLC, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient_BLC * (1 + scale_B1C), x_BLC, sides, mean_BL1, rstd_BL1, None, None, [True, False, False]
        )
        return gradient_x_BLC, gradient_scale_B1C.to(scale_B1C.dtype), gradient_shift_B1C.to(scale_B1C.dtype)


def normalised(x_BHlc: Tensor, length_1H11: Tensor | None = None) -> Tensor:
    """Vectors brought to length 1, or to one for each head, in the dtype that they have.

    Norms and factors are in float32 or wider on every device, where autocast would have it so on some. `F.normalize`
    of a float32 copy is the plain twin, of which an update keeps such copies: a sixth of all that it keeps.

    Args:
        x_BHlc: (B, H, l, c); a vector shorter than `LEAST_LENGTH` is divided by that.
        length_1H11: float32 (1, H, 1, 1).
    """
    return cast(Tensor, _Normalise.apply(x_BHlc, length_1H11))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHlc: Tensor, length_1H11: Tensor | None) -> Tensor:
        wide = torch.promote_types(x_BHlc.dtype, torch.float32)
        norm_BHl1 = torch.linalg.vector_norm(x_BHlc, dim=-1, keepdim=True, dtype=wide).clamp_min_(LEAST_LENGTH)
        ctx.save_for_backward(x_BHlc, norm_BHl1, length_1H11)
        scaled_BHlc: Tensor = x_BHlc * _factor(norm_BHl1, length_1H11)
        return scaled_BHlc.to(x_BHlc.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """With u = x / ‖x‖ and a length s, d/dx = s / ‖x‖ · (g - u (u·g)) and d/ds = u·g, which is summed in float32.

        The products g·x are in the dtype of g: a float32 copy of either would cost more than this rounding.
        """
        x_BHlc, norm_BHl1, length_1H11 = ctx.saved_tensors
        gradient_BHlc = gradients[0]
        along_BHl1 = (gradient_BHlc * x_BHlc).sum(dim=-1, keepdim=True, dtype=norm_BHl1.dtype) / norm_BHl1
        factor_BHl1 = _factor(norm_BHl1, length_1H11)
        radial_BHl1 = along_BHl1 * factor_BHl1 / norm_BHl1
        gradient_x_BHlc = torch.addcmul(gradient_BHlc * factor_BHl1, x_BHlc, radial_BHl1, value=-1).to(x_BHlc.dtype)
        return gradient_x_BHlc, None if length_1H11 is None else along_BHl1.sum_to_size(length_1H11.shape)


def _factor(norm_BHl1: Tensor, length_1H11: Tensor | None) -> Tensor:
    return norm_BHl1.reciprocal() if length_1H11 is None else length_1H11 / norm_BHl1
