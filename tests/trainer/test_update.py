"""The pieces of an update that can be told by hand: rates, partitions, combined advantages, what a step starts from."""

import math

import numpy as np
import pytest
import torch

from tests.trainer.conftest import Submit, make_config, make_learner, same_weights, weights
from trainer.config import OptimConfig, RewardConfig
from trainer.grpo import group_advantages
from trainer.loop import advantages, train_step
from trainer.run_state import Snapshot, generators, restore, tensors_of
from trainer.scoring import Scored
from trainer.update import learning_rate, minibatches


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_the_rate_rises_and_then_stays_or_falls(schedule: str, expected: list[float]) -> None:
    """Linear over the warm-up; what falls would be 0 after the last step."""
    optim = OptimConfig(lr=0.1, warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(optim, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.1 * share for share in expected])
    if schedule != "constant":
        assert learning_rate(optim, 6, 6) == pytest.approx(0, abs=1e-12)


def test_minibatches_are_a_partition_of_their_own_each_epoch() -> None:
    """Every image once; set by seed, step and epoch, and by nothing else."""
    first = minibatches(24, 8, seed=1, step=2)
    assert sorted(torch.cat(first).tolist()) == list(range(24))
    assert [len(rows) for rows in first] == [8, 8, 8]
    assert torch.equal(torch.cat(minibatches(24, 8, 1, 2)), torch.cat(first))
    for other in (minibatches(24, 8, 2, 2), minibatches(24, 8, 1, 3), minibatches(24, 8, 1, 2, epoch=1)):
        assert not torch.equal(torch.cat(other), torch.cat(first))


def scored() -> Scored:
    """Two groups of four, two rewards: the second is a hundred times the first in scale, and another order."""
    small, large = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 0.0, 0.0, 0.0]), np.array([90.0, 30, 60, 0, 0, 0, 0, 0])
    named = {"small": small, "large": large}
    return Scored(named, named, None, 2.0 * small + 1.0 * large)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_rewards_are_combined_before_or_after_they_are_normalised(combine: str) -> None:
    """Summed first, the reward of the larger scale decides; normalised first, each counts by its weight."""
    config = make_config(grpo={"combine": combine}).model_copy(
        update={"rewards": (RewardConfig(name="small", weight=2.0), RewardConfig(name="large"))}
    )
    given = scored()
    small, large = (torch.from_numpy(given.shaped[name]).view(2, 4) for name in ("small", "large"))
    expected = (
        group_advantages(2 * small + large)
        if combine == "sum_then_normalize"
        else 2 * group_advantages(small) + group_advantages(large)
    )
    found = advantages(given, config)
    assert torch.allclose(found, expected.flatten())
    assert (found[3] < found[0]) == (combine == "sum_then_normalize")


def test_a_snapshot_is_what_the_step_began_with() -> None:
    """Weights and optimizer before the updates, though both have moved on; restored, the step repeats bit for bit."""
    config = make_config()
    learner = make_learner(config)
    train_step(learner, Submit(), config, 0)
    snapshot = Snapshot(learner)
    snapshot.take(0)
    before = weights(learner.policy.var)
    first = train_step(learner, Submit(), config, 1)
    after = weights(learner.policy.var)
    assert not same_weights(before, after)
    restore(learner, snapshot.tensors())
    assert same_weights(weights(learner.policy.var), before)
    again = train_step(learner, Submit(), config, 1)
    assert same_weights(weights(learner.policy.var), after)
    timed = ("seconds/", "images_per_second")
    assert {k: v for k, v in again.items() if not k.startswith(timed)} == {
        k: v for k, v in first.items() if not k.startswith(timed)
    }


def test_every_generator_is_restored() -> None:
    """torch's, numpy's and Python's draw again what they drew."""
    import random

    config = make_config()
    learner = make_learner(config)
    state = tensors_of(learner) | generators()

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    first = draw()
    restore(learner, state)
    assert draw() == first


def test_without_a_reference_no_second_policy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """β = 0: no copy is made, unless its KL shall be measured; with β it is there and frozen."""
    from tests.trainer.conftest import alone
    from trainer.build import make_learner as build
    from trainer.options import load_config

    def reference(**grpo: object) -> object:
        config = load_config("mini-bright", {f"grpo.{name}": value for name, value in grpo.items()})
        return build(config, alone(), torch.device("cpu")).reference

    assert reference(beta=0.0) is None
    for policy in (reference(beta=0.0, measure_kl=True), reference(beta=0.1)):
        assert policy is not None
        assert not any(parameter.requires_grad for parameter in policy.var.parameters())  # type: ignore[attr-defined]
