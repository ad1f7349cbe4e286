"""Adapters: they start as nothing, learn alone, can be put aside, and end up in a plain checkpoint."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import TINY, make_vqvae, same_weights, weights
from trainer.lora import (
    LoraError,
    add_lora,
    has_lora,
    merge_lora,
    merged_state,
    without_lora,
)
from trainer.models.checkpoints import load_var, save_var
from trainer.models.var import VAR, VARConfig
from trainer.policy import Rollout, keyed_uniforms, log_probs, sample

BATCH, TEMPERATURE, RANK = 6, 0.7, 2
AUTOCASTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


def make_policy(config: VARConfig = TINY) -> VAR:
    """A tiny policy all of whose layers matter: a new one's blocks hardly act."""
    torch.manual_seed(0)
    var = VAR(config)
    with torch.no_grad():
        for parameter in var.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return var.eval()


def score(var: VAR) -> Tensor:
    """Log-probabilities of fixed tokens."""
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.arange(BATCH) % TINY.num_classes
    input_BLmC = torch.randn(BATCH, TINY.length - 1, TINY.latent_channels, generator=generator)
    tokens_BL = torch.randint(TINY.vocab_size, (BATCH, TINY.length), generator=generator)
    return log_probs(var, labels_B, input_BLmC, tokens_BL, temperature=TEMPERATURE)[0]


def draw(var: VAR) -> Rollout:
    """Samples from fixed random numbers."""
    uniforms_BL = keyed_uniforms(0, 0, range(BATCH), 1, TINY.length)
    labels_B = torch.arange(BATCH) % TINY.num_classes
    return sample(var, make_vqvae(), labels_B, temperature=TEMPERATURE, uniforms_BL=uniforms_BL)


def train(var: VAR, steps: int = 3) -> None:
    """A few updates of whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in var.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-score(var).mean()).backward()
        optimizer.step()


@pytest.fixture
def base() -> VAR:
    """The policy before adapters."""
    return make_policy()


@pytest.fixture
def adapted() -> VAR:
    """The same policy with new adapters."""
    pytest.importorskip("peft")
    var = make_policy()
    add_lora(var, rank=RANK, alpha=4.0)
    return var


@pytest.mark.parametrize("autocast", AUTOCASTS.values(), ids=AUTOCASTS)
@torch.no_grad()
def test_new_adapters_change_nothing(
    base: VAR, adapted: VAR, autocast: Callable[[], AbstractContextManager[object]]
) -> None:
    """Scores, samples and the model's mode are those of the policy without, to the last bit."""
    with autocast():
        assert torch.equal(score(adapted), score(base))
        drawn, expected = draw(adapted), draw(base)
    assert torch.equal(drawn.tokens_BL, expected.tokens_BL)
    assert torch.equal(drawn.log_probs_BL, expected.log_probs_BL)
    assert isinstance(adapted, VAR)
    assert not any(module.training for module in adapted.modules())


def test_only_the_adapters_learn(base: VAR) -> None:
    """Gradients reach A and B of each of the four layers of every block, and no other parameter."""
    pytest.importorskip("peft")
    var = make_policy()
    names = add_lora(var, rank=RANK, alpha=4.0)
    assert len(names) == TINY.depth * 4 * 2
    train(var, steps=1)  # from here on B is not 0, so that A has a gradient too
    score(var).mean().backward()
    learned = [name for name, parameter in var.named_parameters() if parameter.grad is not None]
    assert tuple(learned) == names
    assert all(parameter.grad.abs().sum() > 0 for parameter in var.parameters() if parameter.grad is not None)
    ins_and_outs = 4 * TINY.width + 2 * TINY.width + 2 * (1 + TINY.mlp_ratio) * TINY.width
    trainable = sum(parameter.numel() for parameter in var.parameters() if parameter.requires_grad)
    assert trainable == TINY.depth * RANK * ins_and_outs < sum(p.numel() for p in base.parameters()) / 10


@pytest.mark.parametrize("autocast", AUTOCASTS.values(), ids=AUTOCASTS)
@torch.no_grad()
def test_the_reference_is_the_policy_without_its_adapters(
    base: VAR, adapted: VAR, autocast: Callable[[], AbstractContextManager[object]]
) -> None:
    """A trained policy scores and samples without its adapters exactly as before; with them again, as trained."""
    with torch.enable_grad():
        train(adapted)
    with autocast():
        moved_BL = score(adapted)
        assert (moved_BL - score(base)).abs().max() > 0.01
        with without_lora(adapted) as reference:
            assert torch.equal(score(reference), score(base))
            assert torch.equal(draw(reference).log_probs_BL, draw(base).log_probs_BL)
        assert torch.equal(score(adapted), moved_BL)


def test_the_adapters_return_after_the_reference(adapted: VAR) -> None:
    """Nested and with an error within, they are on again and as trainable as before; a frozen copy stays frozen."""
    train(adapted)
    expected_BL = score(adapted).detach()
    with pytest.raises(KeyError), without_lora(adapted):  # noqa: PT012 - the state after each level is the point
        with without_lora(adapted):
            pass
        assert not torch.equal(score(adapted), expected_BL)
        raise KeyError
    assert torch.equal(score(adapted), expected_BL)
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == TINY.depth * 4 * 2
    frozen = deepcopy(adapted).requires_grad_(False)
    with without_lora(frozen):
        pass
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_gradients_pass_by_the_reference(adapted: VAR) -> None:
    """A score of the reference between forward and backward leaves the gradient alone, with recomputation too."""
    train(adapted)
    gradients = []
    for recompute, between in ((False, False), (False, True), (True, False)):
        adapted.checkpoint_activations = recompute
        adapted.zero_grad()
        loss = score(adapted).mean()
        if between:
            with torch.no_grad(), without_lora(adapted):
                score(adapted)
        loss.backward()
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_the_saved_checkpoint_is_a_plain_one(shared_adaln: bool, tmp_path: Path) -> None:
    """Merged weights have the names and shapes of a VAR, load as one, and score as the policy does with adapters."""
    pytest.importorskip("peft")
    config = replace(TINY, shared_adaln=shared_adaln)
    var = make_policy(config)
    add_lora(var, rank=RANK, alpha=4.0)
    with torch.enable_grad():
        train(var)
    before = weights(var)
    with torch.autocast("cpu", torch.bfloat16):  # of no influence: weights are merged in their own precision
        save_var(tmp_path / "var.safetensors", merge_lora(var), {"steps": "3"})
    assert same_weights(weights(var), before)
    loaded = load_var(tmp_path / "var.safetensors")
    assert loaded.config == config
    assert list(merged_state(var)) == list(VAR(config).state_dict())
    torch.testing.assert_close(score(loaded), score(var), atol=1e-5, rtol=0)
    assert (score(loaded) - score(make_policy(config))).abs().max() > 0.01


def test_a_merged_model_shares_what_has_no_adapter(adapted: VAR) -> None:
    """Merging takes memory for the adapted layers alone."""
    train(adapted)
    merged = merge_lora(adapted)
    assert merged.head.weight.data_ptr() == adapted.head.weight.data_ptr()
    assert not has_lora(merged)
    assert has_lora(adapted)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@torch.no_grad()
def test_the_start_is_set_by_the_seed_alone() -> None:
    """Two models with one seed have the same adapters, whatever was drawn before; with two seeds they differ."""
    pytest.importorskip("peft")
    states = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        var = make_policy()
        torch.manual_seed(noise)
        add_lora(var, rank=RANK, alpha=1.0, seed=seed)
        states.append(weights(var))
    assert same_weights(states[0], states[1])
    assert not same_weights(states[0], states[2])


def test_alpha_over_rank_is_the_scale(adapted: VAR) -> None:
    """A merged weight is W + (alpha / rank) · B A."""
    train(adapted)
    state, plain = dict(adapted.named_parameters()), make_policy().state_dict()
    name = "blocks.1.attn.mat_qkv"
    product_FF = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    expected_FF = plain[f"{name}.weight"] + 4.0 / RANK * product_FF
    torch.testing.assert_close(merged_state(adapted)[f"{name}.weight"], expected_FF)


def test_the_layers_can_be_chosen() -> None:
    """Only the named layers of a block are adapted."""
    pytest.importorskip("peft")
    names = add_lora(make_policy(), rank=1, alpha=1.0, targets=("attn.proj", "ada_lin.1"))
    assert {name.split(".lora_")[0].split(".", 2)[2] for name in names} == {"attn.proj", "ada_lin.1"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"targets": ("attn.query",)}, "no linear layer blocks.0.attn.query; name layers"),
        ({"targets": ("attn",)}, "no linear layer blocks.0.attn;"),
        ({"targets": ()}, "no target is named"),
    ],
)
def test_impossible_adapters_are_refused(base: VAR, change: dict[str, Any], said: str) -> None:
    """One line names the value and the remedy, and the model is as it was."""
    before = weights(base)
    with pytest.raises(LoraError, match=said) as refusal:
        add_lora(base, **({"rank": 1, "alpha": 1.0} | change))
    assert "\n" not in str(refusal.value)
    assert same_weights(weights(base), before)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_without_peft_the_remedy_is_named(base: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoraError, match=r"^LoRA needs peft: pip install 'var-grpo\[lora\]'$"):
        add_lora(base, rank=1, alpha=1.0)
    assert not has_lora(base)


def test_adapters_are_needed_and_added_once(base: VAR, adapted: VAR) -> None:
    """A model without adapters has no reference, merged weights or state of them; one with them gets no others."""
    with pytest.raises(LoraError, match="no adapters"), without_lora(base):
        pass
    for call in (merged_state, merge_lora):
        with pytest.raises(LoraError, match="no adapters"):
            call(base)
    with pytest.raises(LoraError, match="adapters already"):
        add_lora(adapted, rank=1, alpha=1.0)
