"""Attention by scale is attention under the mask."""

import pytest
import torch
from torch import Tensor

from trainer.models.attention import attend_by_scale, attend_masked, part_ends
from trainer.models.var import PATCH_NUMS_256, PATCH_NUMS_512, VAR, VARConfig


def offsets(patch_nums: tuple[int, ...]) -> tuple[int, ...]:
    """Where each scale starts."""
    return VARConfig(depth=1, width=8, heads=1, patch_nums=patch_nums).offsets


def test_parts_begin_together_and_end_with_the_scales() -> None:
    """The leading quarter at once, then scale by scale."""
    assert part_ends(offsets(PATCH_NUMS_256)) == (155, 255, 424, 680)
    assert part_ends(offsets((1, 2, 3, 4, 6, 8))) == (30, 66, 130)
    assert part_ends(offsets(PATCH_NUMS_512))[-1] == 2240
    assert part_ends(offsets((1, 2))) == (1, 5)
    assert part_ends(offsets((3, 4))) == (9, 25)


@pytest.mark.parametrize("patch_nums", [PATCH_NUMS_256, (1, 2, 3), (3, 4)])
def test_both_ways_agree_in_values_and_gradients(patch_nums: tuple[int, ...]) -> None:
    """To float32's rounding, on rows whose scores differ widely."""
    var = VAR(VARConfig(depth=1, width=8, heads=2, patch_nums=patch_nums))
    ends, length = part_ends(var.config.offsets), var.config.length
    generator = torch.Generator().manual_seed(0)
    inputs = [3 * torch.randn(2, 2, length, 4, generator=generator) for _ in range(3)]
    weight_BHLc = torch.randn(2, 2, length, 4, generator=generator)
    found: list[tuple[Tensor, ...]] = []
    for by_scale in (True, False):
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
        bias = var.attn_bias_for_masking
        out = attend_by_scale(q, k, v, bias, ends, 0.5) if by_scale else attend_masked(q, k, v, bias, 0.5)
        (out * weight_BHLc).sum().backward()
        assert q.grad is not None
        assert k.grad is not None
        assert v.grad is not None
        found.append((out.detach(), q.grad, k.grad, v.grad))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)


def test_the_transformer_gives_the_same_logits() -> None:
    """With what is masked left out, and without."""
    torch.manual_seed(0)
    var = VAR(VARConfig(depth=3, width=32, heads=4, patch_nums=(1, 2, 4, 6), vocab_size=64, latent_channels=4))
    torch.nn.init.normal_(var.head.weight)
    labels_B, input_BLmC = torch.tensor([0, 7]), torch.randn(2, var.config.length - 1, 4)
    with torch.no_grad():
        fast_BLV = var(labels_B, input_BLmC)
        var.skip_masked = False
        torch.testing.assert_close(fast_BLV, var(labels_B, input_BLmC), atol=1e-5, rtol=1e-5)
