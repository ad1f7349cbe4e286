"""What a block does between its matrix products, beside plain twins in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from trainer.models.elementwise import EPS, gated, modulated, normalised


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of each tensor, the norm of its error beside its own."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], weight_BLC: Tensor) -> list[Tensor]:
    """What a function gives, and the gradients of all its inputs by a weighted sum of that."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y_BLC = function(*leaves)
    y_BLC.backward(weight_BLC.to(y_BLC.dtype))
    return [y_BLC.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def doubled(*tensors: Tensor) -> list[Tensor]:
    """The same numbers in float64."""
    return [tensor.double() for tensor in tensors]


def plainly_modulated(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """The plain twin of `modulated`."""
    return layer_norm(x_BLC, x_BLC.shape[-1:], eps=EPS) * (1 + scale_B1C) + shift_B1C


@pytest.mark.parametrize(
    ("dtype", "narrow", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),  # as under autocast; the gradients of what is narrow are rounded
    ],
)
def test_adaln_is_a_layer_norm_scaled_and_shifted(dtype: torch.dtype, narrow: torch.dtype, bound: float) -> None:
    """Values and gradients, by the norm of their error."""
    generator = torch.Generator().manual_seed(0)
    x_BLC, weight_BLC = (torch.randn(3, 50, 64, generator=generator).to(dtype) for _ in range(2))
    scale_B1C, shift_B1C = (torch.randn(3, 1, 64, generator=generator).to(narrow) for _ in range(2))
    results = [
        with_gradients(modulated, [x_BLC, scale_B1C, shift_B1C], weight_BLC),
        with_gradients(plainly_modulated, doubled(x_BLC, scale_B1C, shift_B1C), weight_BLC),
    ]
    assert [tensor.dtype for tensor in results[0]] == [dtype, dtype, narrow, narrow]
    value, of_x, *of_narrow = errors(*results)
    assert max(value, of_x) < bound
    assert max(of_narrow) < (bound if narrow == dtype else 0.002)


def test_under_autocast_adaln_gives_what_a_matrix_product_takes() -> None:
    """In bfloat16 at once, rounded from float32; its gradients are those of the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    x_BLC, weight_BLC = (torch.randn(3, 50, 64, generator=generator) for _ in range(2))
    scale_B1C, shift_B1C = (torch.randn(3, 1, 64, generator=generator).bfloat16() for _ in range(2))
    weight_BLC = weight_BLC.bfloat16()

    def under_autocast(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return modulated(*leaves)

    y_BLC, *found = with_gradients(under_autocast, [x_BLC, scale_B1C, shift_B1C], weight_BLC)
    _, *exact = with_gradients(plainly_modulated, doubled(x_BLC, scale_B1C, shift_B1C), weight_BLC)
    assert y_BLC.dtype == torch.bfloat16
    assert y_BLC.equal(modulated(x_BLC, scale_B1C, shift_B1C).bfloat16())
    of_x, of_scale, of_shift = errors(found, exact)
    assert of_x < 1e-6
    assert max(of_scale, of_shift) < 0.002


@pytest.mark.parametrize(
    ("dtype", "narrow", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),  # the gradients of what is narrow are rounded
    ],
)
def test_a_branch_is_added_by_its_gain(dtype: torch.dtype, narrow: torch.dtype, bound: float) -> None:
    """Values and gradients, by the norm of their error; the product is not rounded before it is added."""
    generator = torch.Generator().manual_seed(0)
    x_BLC, weight_BLC = (torch.randn(3, 50, 64, generator=generator).to(dtype) for _ in range(2))
    branch_BLC = torch.randn(3, 50, 64, generator=generator).to(narrow)
    gain_B1C = torch.randn(3, 1, 64, generator=generator).to(narrow)
    results = [
        with_gradients(gated, [x_BLC, branch_BLC, gain_B1C], weight_BLC),
        with_gradients(lambda x, branch, gain: x + branch * gain, doubled(x_BLC, branch_BLC, gain_B1C), weight_BLC),
    ]
    assert [tensor.dtype for tensor in results[0]] == [dtype, dtype, narrow, narrow]
    value, of_x, *of_narrow = errors(*results)
    assert max(value, of_x) < bound
    assert max(of_narrow) < (bound if narrow == dtype else 0.003)  # a gain's terms are rounded, and their sum


def test_a_gain_that_is_not_trained_keeps_no_branch() -> None:
    """As with adapters, which train neither it nor what it comes from."""
    kept: list[tuple[int, ...]] = []
    x_BLC, branch_BLC = (torch.randn(3, 50, 64, requires_grad=True) for _ in range(2))
    gain_B1C = torch.randn(3, 1, 64)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        y_BLC = gated(x_BLC, branch_BLC, gain_B1C)
    y_BLC.sum().backward()
    assert kept == [gain_B1C.shape]
    assert branch_BLC.grad is not None
    assert torch.equal(branch_BLC.grad, gain_B1C.expand_as(branch_BLC))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.002)])
@pytest.mark.parametrize("has_length", [True, False])
def test_vectors_are_normalised_as_a_copy_in_float32_would_be(
    dtype: torch.dtype, bound: float, has_length: bool
) -> None:
    """Values and gradients, by the norm of their error, against the plain way in float64; bfloat16 rounds to 2^-9."""
    generator = torch.Generator().manual_seed(0)
    inputs_BHlc = torch.randn(2, 3, 50, 64, generator=generator).to(dtype)
    # With a part along the vectors, so that a length's gradient is no sum in which everything cancels.
    weight_BHlc = (torch.randn(2, 3, 50, 64, generator=generator) + inputs_BHlc).to(dtype)
    rates_1H11 = torch.rand(1, 3, 1, 1, generator=generator).to(torch.promote_types(dtype, torch.float32))
    lengths_1H11 = 1 + 4 * rates_1H11 if has_length else None
    found: list[list[Tensor]] = []
    for wide in (False, True):
        x_BHlc = (inputs_BHlc.double() if wide else inputs_BHlc.clone()).requires_grad_()
        length_1H11 = None if lengths_1H11 is None else lengths_1H11.double() if wide else lengths_1H11.clone()
        leaves = [x_BHlc] if length_1H11 is None else [x_BHlc, length_1H11.requires_grad_()]
        if wide:
            y_BHlc = normalize(x_BHlc, dim=-1) * (1 if length_1H11 is None else length_1H11)
        else:
            y_BHlc = normalised(x_BHlc, length_1H11)
            assert y_BHlc.dtype == dtype
        y_BHlc.backward(weight_BHlc.to(y_BHlc.dtype))
        found.append([y_BHlc.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + has_length
    for narrow, exact in zip(*found, strict=True):
        assert float((narrow.double() - exact).norm() / exact.norm()) < bound


def test_vectors_of_zeros_stay_zeros() -> None:
    """And their gradients are numbers."""
    x_BHlc = torch.zeros(1, 1, 2, 4, requires_grad=True)
    y_BHlc = normalised(x_BHlc, torch.full((1, 1, 1, 1), 4.0))
    y_BHlc.sum().backward()
    assert not y_BHlc.any()
    assert x_BHlc.grad is not None
    assert torch.isfinite(x_BHlc.grad).all()
