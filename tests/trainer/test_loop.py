"""The training step: what it changes, what it leaves alone, and that it learns."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.trainer.conftest import TINY, Submit, TinyLearner, answered, make_config, make_learner, same_weights, weights
from trainer.config import Config, RewardConfig
from trainer.grpo import group_advantages, k3_kl
from trainer.loop import train_step
from trainer.metrics import Metrics
from trainer.rollout import roll_out
from trainer.scoring import Scored, ScoreError
from trainer.shaping import AtLeast
from trainer.update import Batch, NotFinite, Updates

METRICS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_a_step_gives_the_documented_metrics() -> None:
    """Every name stands in docs/metrics.md; every value is a finite number, or None where nothing applies."""
    config = make_config()
    metrics = train_step(make_learner(config), Submit(), config, 0)
    page = METRICS_PAGE.read_text()
    for name, value in metrics.items():
        assert f"`{name.replace('/brightness', '/<reward>')}`" in page, name
        assert value is None or math.isfinite(value), name
    assert {name for name, value in metrics.items() if value is None} == {"success_rate", "label_accuracy"}


def test_metrics_mean_what_they_say() -> None:
    """Success, accuracy and the share of equal groups, against numbers known beforehand."""
    config = make_config(rollout={"labels": 2, "group_size": 4}, optim={"minibatch": 8})
    scores_B = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    rewards = [RewardConfig(name="brightness", shape=AtLeast(at_least=0.5))]
    seen: list[NDArray[np.int64]] = []

    def judge(images_BHW3: NDArray[np.uint8], labels_B: NDArray[np.int64]) -> float:
        seen.append(labels_B)
        return 0.25

    metrics = train_step(make_learner(config, judge=judge), lambda _: given(scores_B, rewards), config, 0)
    assert metrics["success_rate"] == metrics["reward"] == metrics["shaped/brightness"] == 5 / 8
    assert metrics["reward_std"] == pytest.approx(math.sqrt(15) / 8)
    assert metrics["zero_variance_groups"] == 0.5
    assert metrics["advantage_abs_mean"] == pytest.approx((3 / math.sqrt(3) + math.sqrt(3)) / 8)
    assert metrics["label_accuracy"] == 0.25
    labels_N = make_learner(config).policy.draw_conditions(config.run.seed, 0, 2)
    assert seen[0].tolist() == labels_N.repeat_interleave(4).tolist()
    seconds = [value for name, value in metrics.items() if name.startswith("seconds/") and name != "seconds/step"]
    total = sum(filter(None, seconds))
    assert metrics["seconds/step"] is not None
    assert total < metrics["seconds/step"] < 1.5 * total + 0.1


def given(scores_B: NDArray[np.float64], rewards: list[RewardConfig] | None = None) -> Future[Scored]:
    """An answer with these scores."""
    from trainer.scoring import combine

    return answered(combine({"brightness": scores_B}, rewards or [RewardConfig(name="brightness")], len(scores_B)))


def test_the_first_minibatch_has_ratio_one() -> None:
    """What was recorded while sampling is what the update recomputes; later minibatches have moved on."""
    config = make_config(optim={"lr": 1e-2})
    metrics = train_step(make_learner(config), Submit(), config, 0)
    assert 0 <= number(metrics, "ratio_error_first") < 1e-4
    assert number(metrics, "ratio_max") > 1.001


def number(metrics: Metrics, name: str) -> float:
    value = metrics[name]
    assert value is not None
    return value


def gradients(micro_batch: int | None) -> tuple[dict[str, torch.Tensor], Metrics]:
    """What one whole-step update hands to the optimizer."""
    config = make_config(optim={"minibatch": 16, "micro_batch": micro_batch, "grad_clip": None})
    learner = make_learner(config)
    found: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in learner.policy.var.named_parameters() if p.grad is not None})

    learner.optimizer.register_step_pre_hook(note)
    return found, train_step(learner, Submit(), config, 0)


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_micro_batches_add_up_to_the_minibatch(micro_batch: int) -> None:
    """Accumulated gradients and metrics equal those of the whole minibatch."""
    whole, whole_metrics = gradients(None)
    parts, parts_metrics = gradients(micro_batch)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
    for name in ("loss", "kl", "ratio_mean", "ratio_max", "clip_fraction", "entropy", "grad_norm"):
        assert number(parts_metrics, name) == pytest.approx(number(whole_metrics, name), abs=1e-5), name
    assert abs(number(whole_metrics, "kl")) < 1e-6
    assert number(whole_metrics, "clip_fraction") == 0
    assert number(whole_metrics, "ratio_mean") == pytest.approx(1, abs=1e-4)


def test_the_gradient_norm_is_clipped_and_reported_before() -> None:
    """The optimizer uses at most `grad_clip`, and leaves the gradients as it used them."""
    config = make_config(optim={"minibatch": 16, "grad_clip": 1e-3})
    learner = make_learner(config)
    norms: list[float] = []

    def note(*_: Any) -> None:
        norms.append(
            float(torch.cat([p.grad.flatten() for p in learner.policy.var.parameters() if p.grad is not None]).norm())
        )

    learner.optimizer.register_step_post_hook(note)
    metrics = train_step(learner, Submit(), config, 0)
    assert norms == [pytest.approx(1e-3, rel=1e-2)]
    assert number(metrics, "grad_norm") > 2e-3


def test_the_learning_rate_warms_up_and_stays() -> None:
    """Linear over `warmup_steps`, then constant."""
    config = make_config(optim={"lr": 0.01, "warmup_steps": 4, "minibatch": 16})
    learner, rates = make_learner(config), []
    for step in range(6):
        train_step(learner, Submit(), config, step)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    "fails",
    [
        lambda _: answered(ScoreError("'brightness' answered nan for image 3")),
        lambda images: given(np.full(len(images), math.nan)),
    ],
)
def test_a_score_error_leaves_the_weights_unchanged(fails: Callable[[NDArray[np.uint8]], Future[Scored]]) -> None:
    """Nothing is learnt from a step whose scores are not all there, even if only the last chunk lacks them."""
    config, submit = make_config(), Submit()
    learner = make_learner(config)
    before = weights(learner.policy.var)

    def last_fails(images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
        answer = submit(images_BHW3)
        return fails(images_BHW3) if len(submit.batches) == 2 else answer

    with pytest.raises(ScoreError):
        train_step(learner, last_fails, config, 0)
    assert same_weights(weights(learner.policy.var), before)
    assert not learner.optimizer.state


def test_a_loss_that_is_not_finite_stops_before_the_weights() -> None:
    """Neither the weights nor the optimizer have seen it; the message names step and remedy."""
    config = make_config()
    learner = make_learner(config)
    with torch.no_grad():
        learner.reference.var.head.bias.fill_(math.nan)
    before = weights(learner.policy.var)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*lower optim.lr"):
        train_step(learner, Submit(), config, 0)
    assert same_weights(weights(learner.policy.var), before)
    assert not any(entry.any() for state in learner.optimizer.state.values() for entry in state.values())
    assert all(p.grad is None for p in learner.policy.var.parameters())


def test_no_update_follows_one_that_is_not_finite() -> None:
    """Weights stay as they were before the second minibatch, whose images the error holds; the third is fine."""
    config = make_config(optim={"minibatch": 4})
    learner, twin = make_learner(config), make_learner(config)
    batch = Batch(
        conditions_B=torch.zeros(12, dtype=torch.int64),
        tokens_BL=torch.randint(TINY.vocab_size, (12, TINY.length), generator=torch.Generator().manual_seed(0)),
        log_probs_BL=torch.full((12, TINY.length), -3.0),
        reference_BL=torch.full((12, TINY.length), -3.0),
        advantages_B=torch.arange(12.0) - 5.5,
    )
    batch.reference_BL[5] = torch.nan
    updates, first = (Updates(each.policy, each.optimizer, each.group, config) for each in (learner, twin))
    for rows_M in torch.arange(12).split(4):
        updates.make(batch, rows_M, 0)
    first.make(batch, torch.arange(4), 0)
    with pytest.raises(NotFinite, match="step 1: loss nan") as raised:
        updates.finish(batch, 0)
    assert raised.value.minibatch["advantages"].tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert same_weights(weights(learner.policy.var), weights(twin.policy.var))
    assert {float(state["step"]) for state in learner.optimizer.state.values()} == {1.0}


def test_only_the_policy_is_trained() -> None:
    """Reference and tokenizer stay as they were; so does the mode of the policy, in which nothing is dropped."""
    config = make_config()
    learner = make_learner(config)
    frozen = weights(learner.reference.var), weights(learner.policy.vqvae)
    before = weights(learner.policy.var)
    train_step(learner, Submit(), config, 0)
    assert same_weights(weights(learner.reference.var), frozen[0])
    assert same_weights(weights(learner.policy.vqvae), frozen[1])
    assert not same_weights(weights(learner.policy.var), before)
    assert not learner.policy.var.training


def test_the_kl_is_to_the_reference_and_not_to_the_sampling_policy() -> None:
    """A policy that has left the reference before the step has a KL at its first update: k3 of the two."""
    config = make_config(optim={"minibatch": 16})
    learner = make_learner(config)
    with torch.no_grad():
        learner.policy.var.head.bias.add_(
            torch.randn(learner.policy.var.head.bias.shape, generator=torch.manual_seed(1))
        )
    settings = config.rollout
    experience, _, _ = roll_out(
        learner.policy,
        learner.policy.draw_conditions(config.run.seed, 0, 4),
        range(4),
        Submit(),
        group_size=settings.group_size,
        temperature=settings.temperature,
        chunk=settings.chunk,
        seed=config.run.seed,
        step=0,
    )
    seen = (experience.conditions_B, experience.tokens_BL)
    with torch.no_grad():
        policy_BL, reference_BL = (
            policy.log_probs(*seen, temperature=settings.temperature)[0]
            for policy in (learner.policy, learner.reference)
        )
    expected = float(k3_kl(policy_BL, reference_BL).mean())
    assert expected > 0.05
    metrics = train_step(learner, Submit(), config, 0)
    assert number(metrics, "kl") == pytest.approx(expected, rel=1e-3)


def make_low_precision(device: str) -> tuple[Config, TinyLearner]:
    """A small learner under bfloat16 autocast, on a device."""
    config = make_config(optim={"minibatch": 8, "micro_batch": 4})
    learner = make_learner(config, autocast=lambda: torch.autocast(device, torch.bfloat16))
    for model in (learner.policy.var, learner.reference.var, learner.policy.vqvae):
        model.to(device)
    return config, learner


def check_low_precision(device: str) -> None:
    """One step in bfloat16: all numbers finite, the weights float32 and moved, the decoder in float32."""
    config, learner = make_low_precision(device)
    before, decoded = weights(learner.policy.var), []
    learner.policy.vqvae.decoder.conv_out.register_forward_hook(lambda _, __, out: decoded.append(out.dtype))
    metrics = train_step(learner, Submit(), config, 0)
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert number(metrics, "ratio_error_first") < 0.1
    assert not same_weights(weights(learner.policy.var), before)
    assert {entry.dtype for entry in learner.policy.var.parameters()} == {torch.float32}
    assert set(decoded) == {torch.float32}


def test_a_step_in_bfloat16() -> None:
    """As the recipes for published weights run it."""
    check_low_precision("cpu")


@pytest.mark.gpu
def test_a_step_in_bfloat16_on_a_gpu() -> None:
    """The same on a CUDA device, whose phases are waited for."""
    check_low_precision("cuda")


def test_equal_rewards_change_nothing() -> None:
    """No advantage, and at the reference no KL either: the gradient is 0 and plain descent moves no weight."""
    config = make_config(optim={"lr": 0.5, "minibatch": 16})
    learner = make_learner(config)
    learner.optimizer = torch.optim.SGD(learner.policy.var.parameters(), lr=config.optim.lr, fused=True)
    before = weights(learner.policy.var)
    metrics = train_step(learner, lambda images: given(np.full(len(images), 0.1 + 0.2)), config, 0)
    assert metrics["zero_variance_groups"] == 1.0
    assert number(metrics, "grad_norm") < 1e-6
    for name, entry in weights(learner.policy.var).items():
        torch.testing.assert_close(entry, before[name], atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_step() -> None:
    """Bit by bit, timings aside; another seed gives another."""

    def run(seed: int) -> tuple[dict[str, torch.Tensor], Metrics]:
        config = make_config(run={"seed": seed})
        learner = make_learner(config)
        metrics = train_step(learner, Submit(), config, 0)
        kept = {k: v for k, v in metrics.items() if not k.startswith("seconds/") and k != "images_per_second"}
        return weights(learner.policy.var), kept

    first, again, other = run(0), run(0), run(1)
    assert same_weights(first[0], again[0])
    assert first[1] == again[1]
    assert not same_weights(first[0], other[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_training_raises_the_reward(sign: float) -> None:
    """In a few steps on a tiny model: brighter where brightness pays, darker where it costs."""
    config = make_config(
        rollout={"labels": 8, "group_size": 8, "chunk": 64}, optim={"lr": 1e-2, "minibatch": 32}, grpo={"beta": 0.01}
    )
    rewards = [RewardConfig(name="brightness", weight=sign)]
    learner = make_learner(config)
    history = [train_step(learner, Submit(rewards), config, step) for step in range(12)]
    reward = [number(metrics, "reward") for metrics in history]
    assert np.mean(reward[-3:]) > reward[0] + 0.5 * number(history[0], "reward_std")
    assert history[-1]["kl"] != pytest.approx(0, abs=1e-3)


def test_a_greater_beta_stays_closer_to_the_reference() -> None:
    """The KL after the same number of steps falls with β."""

    def last_kl(beta: float) -> float:
        config = make_config(grpo={"beta": beta, "measure_kl": True}, optim={"lr": 1e-2})
        learner = make_learner(config)
        return number([train_step(learner, Submit(), config, step) for step in range(6)][-1], "kl")

    assert last_kl(5.0) < 0.5 * last_kl(0.0)


def test_each_image_learns_from_its_own_group() -> None:
    """The update is that of advantages within groups: a shift of one group's rewards changes nothing."""
    config = make_config(optim={"minibatch": 16})
    states = []
    for shift in (0.0, 1.0):
        learner = make_learner(config)
        batches = 0

        def shifted(images_BHW3: NDArray[np.uint8], by: float = shift) -> Future[Scored]:
            nonlocal batches
            scores_B = np.arange(len(images_BHW3)) % 4 / 4
            scores_B[:4] += by * (batches == 0)
            batches += 1
            return given(scores_B)

        metrics = train_step(learner, shifted, config, 0)
        states.append(weights(learner.policy.var))
        expected = group_advantages(torch.tensor([[0.0, 0.25, 0.5, 0.75]])).abs().mean()
        assert number(metrics, "advantage_abs_mean") == pytest.approx(float(expected), abs=1e-5)
    assert same_weights(*states)
