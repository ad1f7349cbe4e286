"""What a block does between its matrix products, with gradients of their own that keep and move less than autograd's.

Each has a plain twin, which its docstring names and its test holds it to. Under autocast the plain ones make copies in
float32, to be rounded once more for the next matrix product; here each result is rounded as it is written.

Shapes: B batch, L tokens, C model width, H attention heads, l tokens, c channels of a head.
"""

from collections.abc import Callable
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
        (B, L, C) in the dtype that a matrix product would bring it to: autocast's, or that of `x_BLC` without it.
    """
    return cast(Tensor, _Modulate.apply(x_BLC, scale_B1C, shift_B1C))


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BLC, mean_BL1, rstd_BL1 = torch.native_layer_norm(x_BLC, x_BLC.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x_BLC, mean_BL1, rstd_BL1, scale_B1C)
        gain_B1C = 1 + scale_B1C.to(x_BLC.dtype)
        return _rounded(torch.addcmul, shift_B1C, normed_BLC, gain_B1C, like=normed_BLC, dtype=_product_dtype(x_BLC))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With n the norm of x: d/dscale = Σ g·n and d/dshift = Σ g over tokens, d/dx that of n by g·(1 + scale)."""
        x_BLC, mean_BL1, rstd_BL1, scale_B1C = ctx.saved_tensors
        (gradient_BLC,) = gradients
        sides, narrow = x_BLC.shape[-1:], scale_B1C.dtype
        normed_BLC = torch.native_layer_norm(x_BLC, sides, None, None, EPS)[0]
        gradient_scale_B1C = (gradient_BLC * normed_BLC).sum(dim=1, keepdim=True)
        gradient_shift_B1C = gradient_BLC.sum(dim=1, keepdim=True, dtype=x_BLC.dtype)
        gradient_x_BLC, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient_BLC * (1 + scale_B1C.to(x_BLC.dtype)),
            *(x_BLC, sides, mean_BL1, rstd_BL1, None, None, [True, False, False]),
        )
        return gradient_x_BLC, gradient_scale_B1C.to(narrow), gradient_shift_B1C.to(narrow)


def gated(x_BLC: Tensor, branch_BLC: Tensor, gain_B1C: Tensor) -> Tensor:
    """A residual branch by its gain, added to the stream: `x + branch * gain`.

    Args:
        x_BLC: floating point (B, L, C).
        branch_BLC: (B, L, C), of the same or a narrower dtype.
        gain_B1C: (B, 1, C), likewise.

    Returns:
        (B, L, C) in the dtype of `x_BLC`; the product is not rounded to a narrower one.
    """
    return cast(Tensor, _Gate.apply(x_BLC, branch_BLC, gain_B1C))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, branch_BLC: Tensor, gain_B1C: Tensor) -> Tensor:
        ctx.save_for_backward(branch_BLC if ctx.needs_input_grad[2] else None, gain_B1C)  # with adapters it does not
        ctx.branch_dtype = branch_BLC.dtype
        return _rounded(torch.addcmul, x_BLC, branch_BLC, gain_B1C, like=x_BLC, dtype=x_BLC.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream's is g; d/dbranch = g·gain, and d/dgain = Σ g·branch over tokens, which is summed in float32.

        The products g·branch are rounded to the dtype of the branch, as in `_Normalise`.
        """
        branch_BLC, gain_B1C = ctx.saved_tensors
        (gradient_BLC,) = gradients
        gradient_branch_BLC = _rounded(torch.mul, gradient_BLC, gain_B1C, like=gradient_BLC, dtype=ctx.branch_dtype)
        if branch_BLC is None:
            return gradient_BLC, gradient_branch_BLC, None
        products_BLC = _rounded(torch.mul, gradient_BLC, branch_BLC, like=branch_BLC, dtype=branch_BLC.dtype)
        gradient_gain_B1C = products_BLC.sum(dim=1, keepdim=True, dtype=gradient_BLC.dtype)
        return gradient_BLC, gradient_branch_BLC, gradient_gain_B1C.to(gain_B1C.dtype)


def normalised(x_BHlc: Tensor, length_1H11: Tensor | None = None) -> Tensor:
    """Vectors brought to length 1, or to one for each head, in the dtype that they have.

    Norms and factors are in float32 or wider on every device, where autocast would have it so on some. `F.normalize`
    of a float32 copy is the plain twin, of which an update keeps such copies: a sixth of all that it keeps.

    Args:
        x_BHlc: floating point (B, H, l, c); a vector shorter than `LEAST_LENGTH` is divided by that.
        length_1H11: float32 (1, H, 1, 1).
    """
    return cast(Tensor, _Normalise.apply(x_BHlc, length_1H11))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHlc: Tensor, length_1H11: Tensor | None) -> Tensor:
        wide = torch.promote_types(x_BHlc.dtype, torch.float32)
        norm_BHl1 = torch.linalg.vector_norm(x_BHlc, dim=-1, keepdim=True, dtype=wide).clamp_min_(LEAST_LENGTH)
        ctx.save_for_backward(x_BHlc, norm_BHl1, length_1H11)
        return _rounded(torch.mul, x_BHlc, _factor(norm_BHl1, length_1H11), like=x_BHlc, dtype=x_BHlc.dtype)

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
        whole_BHlc = gradient_BHlc * factor_BHl1
        gradient_x_BHlc = _rounded(
            torch.addcmul, whole_BHlc, x_BHlc, radial_BHl1, value=-1, like=x_BHlc, dtype=x_BHlc.dtype
        )
        return gradient_x_BHlc, None if length_1H11 is None else along_BHl1.sum_to_size(length_1H11.shape)


def _factor(norm_BHl1: Tensor, length_1H11: Tensor | None) -> Tensor:
    return norm_BHl1.reciprocal() if length_1H11 is None else length_1H11 / norm_BHl1


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product would bring a tensor to."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rounded(
    operation: Callable[..., Tensor], *tensors: Tensor, like: Tensor, dtype: torch.dtype, **more: Any
) -> Tensor:
    """An elementwise operation in the widest of its dtypes, rounded to another as it is written, on a GPU at once.

    Args:
        operation: with an `out`, which autocast leaves alone.
        tensors: its arguments, which broadcast.
        like: what its result is like, but for the dtype.
        dtype: of the result.
        more: the operation's options.
    """
    if torch.compiler.is_compiling():  # which joins the two, and refuses an `out` that is not contiguous
        return operation(*tensors, **more).to(dtype)
    return operation(*tensors, out=torch.empty_like(like, dtype=dtype), **more)
