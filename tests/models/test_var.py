"""The transformer's layout, causality, incremental form and randomness."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.conftest import GOLDEN, TINY
from tests.models.fill import fill
from trainer.models.attention import Scales, SelfAttention
from trainer.models.var import OFFICIAL_DEPTHS, VAR, VARConfig
from trainer.models.vqvae import VQVAE

VARIANTS = {
    "normalised attention": TINY,
    "plain attention": replace(TINY, l2_norm_attention=False),
    "shared AdaLN": replace(TINY, shared_adaln=True),
    "first scale of four tokens": replace(TINY, patch_nums=(2, 3, 4)),
}

SEES_ALL = Scales(torch.zeros(1, 1, 3, 3), None)


def build(config: VARConfig, **options: float) -> VAR:
    model = VAR(config, **options)
    fill(model)
    return model.eval()


def random_inputs(config: VARConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.randint(config.num_classes, (batch,), generator=generator)
    later = config.length - config.patch_nums[0] ** 2
    return labels_B, torch.randn(batch, later, config.latent_channels, generator=generator)


@pytest.mark.parametrize("depth", OFFICIAL_DEPTHS)
def test_layout_is_that_of_the_published_transformer(depth: int) -> None:
    """Names, shapes and the number of trainable parameters are those of the official checkpoint."""
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())[f"var_d{depth}"]
    parameters = expected.pop("__num_parameters__")
    with torch.device("meta"):
        model = VAR(VARConfig.for_depth(depth))
    assert {name: list(entry.shape) for name, entry in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_layout_is_that_of_the_published_tokenizer() -> None:
    """Names and shapes are those of the official VQVAE checkpoint, trainable parameters as many."""
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())["vae_ch160v4096z32"]
    parameters = expected.pop("__num_parameters__", None)
    with torch.device("meta"):
        model = VQVAE()
    assert {name: list(entry.shape) for name, entry in model.state_dict().items()} == expected
    assert parameters in (None, sum(p.numel() for p in model.parameters()))


def test_plain_attention_has_no_learned_scale() -> None:
    """The variant without normalisation lacks the entry, and computes softmax(q·k / (4·sqrt(c)))·v."""
    attention = SelfAttention(width=8, heads=2, l2_norm=False)
    assert not [name for name in attention.state_dict() if "scale_mul" in name]
    x_BlC = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.mat_qkv(x_BlC).view(1, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * 0.25 / math.sqrt(4)).softmax(dim=-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(1, 3, 8))
    torch.testing.assert_close(attention(x_BlC, SEES_ALL), expected)


def test_learned_scale_is_bounded() -> None:
    """The inverse temperature of normalised attention never exceeds 100, whatever is learned."""
    attention = SelfAttention(width=8, heads=2, l2_norm=True)
    x_BlC = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    for value in (100.0, 1e6):
        nn.init.constant_(attention.scale_mul_1H11, math.log(value))
        outputs.append(attention(x_BlC, SEES_ALL))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_step_by_step_equals_teacher_forcing(config: VARConfig) -> None:
    """Logits from the key-value cache are those of one pass over all scales."""
    model = build(config)
    labels_B, input_BLmC = random_inputs(config)
    cache, first = model.start(labels_B), config.offsets[1]
    logits = [model.step(0, None, cache)]
    for scale in range(1, len(config.patch_nums)):
        begin, end = config.offsets[scale : scale + 2]
        logits.append(model.step(scale, input_BLmC[:, begin - first : end - first], cache))
    torch.testing.assert_close(torch.cat(logits, 1), model(labels_B, input_BLmC), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_scale_sees_only_itself_and_coarser_scales(var: VAR) -> None:
    """Changing one position's input changes its whole scale and no coarser one."""
    labels_B, input_BLmC = random_inputs(TINY)
    before_BLV = var(labels_B, input_BLmC)
    begin, end = TINY.offsets[2:4]
    changed_BLmC = input_BLmC.clone()
    changed_BLmC[:, end - 2] += 1.0  # the last position of scale 2; the input starts at position 1
    moved_L = (var(labels_B, changed_BLmC) - before_BLV).abs().amax(dim=(0, 2)) > 1e-5
    assert not moved_L[:begin].any()
    assert moved_L[begin:].all()


@torch.no_grad()
def test_train_mode_changes_nothing_by_default(var: VAR) -> None:
    """No label is dropped and no path skipped unless asked for: the same logits in train and eval mode."""
    labels_B, input_BLmC = random_inputs(TINY)
    expected = var(labels_B, input_BLmC)
    try:
        assert all(torch.equal(var.train()(labels_B, input_BLmC), expected) for _ in range(8))
    finally:
        var.eval()


@torch.no_grad()
def test_drop_path_acts_in_train_mode_only() -> None:
    """With DropPath the passes of train mode differ, and those of eval mode agree with a model without it."""
    labels_B, input_BLmC = random_inputs(TINY)
    model, plain = build(TINY, drop_path=0.5), build(TINY)
    assert torch.equal(model(labels_B, input_BLmC), plain(labels_B, input_BLmC))
    model.train()
    torch.manual_seed(0)
    passes = [model(labels_B, input_BLmC) for _ in range(8)]
    assert any(not torch.equal(passes[0], other) for other in passes[1:])


def test_drop_labels(var: VAR) -> None:
    """About the asked share of labels becomes the unconditional one, the same for the same generator state."""
    labels_B = torch.arange(10_000) % 10
    first, again = (var.drop_labels(labels_B, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    dropped_B = first == 10
    assert 0.085 < dropped_B.float().mean() < 0.115
    assert torch.equal(first[~dropped_B], labels_B[~dropped_B])
    assert torch.equal(var.drop_labels(labels_B, 0.0, torch.Generator()), labels_B)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_learns(config: VARConfig) -> None:
    """A loss on the logits reaches every trainable parameter, the rows of unseen classes excepted."""
    model = build(config)
    labels_B, input_BLmC = random_inputs(config)
    logits_BLV = model(labels_B, input_BLmC)
    F.cross_entropy(logits_BLV.flatten(0, 1), torch.zeros(logits_BLV.shape[:2], dtype=torch.long).flatten()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


@torch.no_grad()
def test_fresh_model_starts_near_uniform() -> None:
    """A new model's blocks hardly act and its distribution is nearly uniform."""
    torch.manual_seed(0)
    labels_B, input_BLmC = random_inputs(TINY)
    log_probs_BLV = VAR(TINY).eval()(labels_B, input_BLmC).log_softmax(-1)
    assert (log_probs_BLV + math.log(TINY.vocab_size)).abs().max() < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"heads": 3}, "multiple of heads"),
        ({"patch_nums": (1,)}, "patch_nums"),
        ({"patch_nums": (1, 3, 3)}, "increasing"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], said: str) -> None:
    """A value out of range is named."""
    with pytest.raises(ValueError, match=said):
        replace(TINY, **change)


def test_misuse_is_refused(var: VAR) -> None:
    """Unpublished depths, DropPath of 1, scales and inputs that do not fit are named."""
    with pytest.raises(ValueError, match="depth is 17"):
        VARConfig.for_depth(17)
    with pytest.raises(ValueError, match="drop_path is 1"):
        VAR(TINY, drop_path=1.0)
    cache = var.start(torch.tensor([0]))
    with pytest.raises(ValueError, match="scale is 4"):
        var.step(4, None, cache)
    with pytest.raises(ValueError, match="0 positions; it must have 4"):
        var.step(1, None, cache)
