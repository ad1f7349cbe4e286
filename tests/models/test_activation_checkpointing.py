"""Recomputed activations: the same numbers for less memory, and nothing changed where no gradient is wanted."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.models.conftest import TINY
from tests.models.fill import fill
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE
from trainer.policy import keyed_uniforms, log_probs, sample

CONFIGS = {"own AdaLN": TINY, "shared AdaLN": replace(TINY, shared_adaln=True)}
AUTOCASTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


class Pass(NamedTuple):
    """What one forward and backward pass gave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    saved_bytes: int
    block_calls: int


def build(config: VARConfig = TINY, *, recompute: bool, drop_path: float = 0.0) -> VAR:
    """The golden weights, with or without recomputation."""
    model = VAR(config, drop_path=drop_path)
    fill(model)
    model.checkpoint_activations = recompute
    return model.eval()


def inputs(config: VARConfig = TINY, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, later inputs and tokens."""
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.randint(config.num_classes, (batch,), generator=generator)
    input_BLmC = torch.randn(batch, config.length - 1, config.latent_channels, generator=generator)
    return labels_B, input_BLmC, torch.randint(config.vocab_size, (batch, config.length), generator=generator)


def count_block_calls(model: VAR) -> list[None]:
    """A list that grows by one with every call of a block."""
    calls: list[None] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def learn(model: VAR, autocast: Callable[[], AbstractContextManager[object]] = nullcontext) -> Pass:
    """One pass of the policy's loss, and the bytes that it keeps between forward and backward, weights excepted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    calls, (labels_B, input_BLmC, tokens_BL) = count_block_calls(model), inputs(model.config)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast():
            log_probs_BL, _ = log_probs(model, labels_B, input_BLmC, tokens_BL, temperature=0.7)
        loss = -log_probs_BL.mean()
    loss.backward()  # as in training, outside autocast
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Pass(loss.detach(), gradients, sum(kept.values()), len(calls))


@pytest.mark.parametrize("autocast", AUTOCASTS.values(), ids=AUTOCASTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_gradients_in_less_memory(
    config: VARConfig, autocast: Callable[[], AbstractContextManager[object]]
) -> None:
    """Loss and gradients are those of the plain pass; each block is computed twice, and less than half is kept."""
    plain, recomputed = (learn(build(config, recompute=recompute), autocast) for recompute in (False, True))
    assert torch.equal(recomputed.loss, plain.loss)
    assert recomputed.gradients.keys() == plain.gradients.keys() == dict(VAR(config).named_parameters()).keys()
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(recomputed.gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert (plain.block_calls, recomputed.block_calls) == (config.depth, 2 * config.depth)
    assert 0 < recomputed.saved_bytes < plain.saved_bytes / 2


def test_a_recomputed_block_skips_the_same_branches() -> None:
    """DropPath draws for the backward pass what it drew for the forward pass."""
    passes = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = build(recompute=recompute, drop_path=0.5).train()
        labels_B, input_BLmC, _ = inputs(batch=8)
        model(labels_B, input_BLmC).square().mean().backward()
        passes.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in passes[0].items():
        torch.testing.assert_close(passes[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_is_recomputed_without_gradients() -> None:
    """Scoring under `no_grad` computes each block once, and gives the same logits."""
    plain, model = build(recompute=False), build(recompute=True)
    calls, (labels_B, input_BLmC, _) = count_block_calls(model), inputs()
    with torch.no_grad():
        assert torch.equal(model(labels_B, input_BLmC), plain(labels_B, input_BLmC))
    assert len(calls) == TINY.depth


def test_sampling_is_untouched(vqvae: VQVAE) -> None:
    """The same tokens and log-probs are drawn, each block computed once a scale."""
    uniforms_BL = keyed_uniforms(0, 0, range(4), 1, TINY.length)
    plain, model = build(recompute=False), build(recompute=True)
    calls = count_block_calls(model)
    drawn, expected = (
        sample(each, vqvae, torch.arange(4), temperature=0.7, uniforms_BL=uniforms_BL) for each in (model, plain)
    )
    assert torch.equal(drawn.tokens_BL, expected.tokens_BL)
    assert torch.equal(drawn.log_probs_BL, expected.log_probs_BL)
    assert len(calls) == TINY.depth * len(TINY.patch_nums)


def test_it_is_off_at_first_and_leaves_no_trace_in_the_weights() -> None:
    """The switch is no part of a checkpoint."""
    assert VAR(TINY).checkpoint_activations is False
    assert build(recompute=True).state_dict().keys() == build(recompute=False).state_dict().keys()
