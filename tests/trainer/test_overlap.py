"""Scores are on their way while the reference is computed: what benchmarks/overlap.py measures, on tiny models.

Also what docs/scaling.md counts of the published models.
"""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.overlap import BLOCKING, NO_REFERENCE, OVERLAPPED, LateReward, main
from tests.trainer.conftest import Submit, TinyLearner, make_config, make_learner, same_weights, weights
from trainer.config import Config
from trainer.loop import train_step
from trainer.metrics import Metrics
from trainer.models.var import VAR, VARConfig
from trainer.scoring import Scored
from trainer.var_policy import VarPolicy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text("utf-8")
LATENCY_S, REFERENCE_S = 0.2, 0.3
"""Of a chunk's scores, and of a chunk's pass through the reference; a step has two chunks."""


@dataclass(frozen=True)
class Reference(VarPolicy):
    """A reference that does something else first."""

    first: Callable[[], object] = lambda: None

    def log_probs(self, conditions_B: Tensor, tokens_BL: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Those of the policy it is a copy of."""
        self.first()
        return super().log_probs(conditions_B, tokens_BL, temperature=temperature)


def learner_with(config: Config, first: Callable[[], object]) -> TinyLearner:
    """A learner whose reference calls `first` for each chunk."""
    learner = make_learner(config)
    was = learner.reference
    return TinyLearner(
        learner.policy, Reference(was.var, was.vqvae, was.classes, first=first), learner.optimizer, None, learner.group
    )


def test_the_reference_is_computed_while_scores_are_on_their_way() -> None:
    """All chunks are sent, and none has been waited for, when the reference is asked first."""
    config, submit = make_config(), Submit()
    waited: list[int] = []
    sent: list[Future[Scored]] = []
    scores: list[Scored] = []
    seen: list[tuple[int, list[int]]] = []

    class Unscored(Future[Scored]):
        """Scores that the reference pass brings; who waits for them before would wait for ever."""

        def result(self, timeout: float | None = None) -> Scored:
            waited.append(len(waited))
            return super().result(timeout=0)

    def later(images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
        scores.append(submit(images_BHW3).result())
        sent.append(Unscored())
        return sent[-1]

    def arrive() -> None:
        seen.append((len(sent), list(waited)))
        for future, scored in zip(sent, scores, strict=True):
            if not future.done():
                future.set_result(scored)

    train_step(learner_with(config, arrive), later, config, 0)
    assert seen == [(2, []), (2, [])]
    assert waited == [0, 1]


def step_with_latency(
    blocking: bool = False, beta: float = 0.2, latency_s: float = LATENCY_S
) -> tuple[Metrics, float, TinyLearner]:
    """A step whose scores are late and whose reference is slow: its metrics, and the seconds that it waited."""
    config = make_config(rollout={"blocking": blocking}, grpo={"beta": beta})
    learner = learner_with(config, lambda: time.sleep(REFERENCE_S))
    if not beta:
        learner = replace(learner, reference=None)
    reward = LateReward(config)
    reward.latency_s = latency_s
    metrics = train_step(learner, reward, config, 0)
    return metrics, reward.take_waited_s(), learner


def test_scores_that_come_before_the_reference_ends_cost_no_waiting() -> None:
    """The pass takes 0.6 s, the scores 0.2 s: nothing is left to wait for."""
    metrics, waited_s, _ = step_with_latency()
    assert metrics["seconds/reference"] >= 2 * REFERENCE_S
    assert metrics["seconds/score"] < 0.1
    assert waited_s < 0.1


def test_blocking_waits_for_each_chunk() -> None:
    """Two chunks, two latencies, within the time of sampling; what is learnt is the same."""
    metrics, waited_s, learner = step_with_latency(blocking=True)
    assert 0 < waited_s < metrics["seconds/sample"]
    assert metrics["seconds/sample"] > 1.9 * LATENCY_S
    assert metrics["seconds/score"] < 0.1
    assert same_weights(weights(learner.policy.var), weights(step_with_latency()[2].policy.var))


def test_without_a_reference_there_is_nothing_to_hide_the_latency() -> None:
    """At β = 0 the step waits for its last chunk."""
    metrics, waited_s, _ = step_with_latency(beta=0.0, latency_s=1.0)
    assert waited_s > 0.3
    assert metrics["seconds/score"] == pytest.approx(waited_s, abs=0.1)


@pytest.mark.slow
@pytest.mark.alone
def test_the_benchmark_measures_every_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends by itself, with a row for each order and latency; with a reference all learn the same."""
    path = tmp_path / "overlap.json"
    sizes = ["--steps", "1", "--labels", "2", "--chunk", "16", "--minibatch", "32", "--latency", "0.5"]
    assert main([*sizes, "--json", str(path)]) == 0
    assert "0.5 × reference" in capsys.readouterr().out
    rows = {(row["order"], row["latency"]): row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {(OVERLAPPED, 0), (OVERLAPPED, 0.5), (BLOCKING, 0.5), (NO_REFERENCE, 0), (NO_REFERENCE, 0.5)}
    assert len({tuple(rows[key]["steps"]["loss"]) for key in rows if key[0] != NO_REFERENCE}) == 1
    assert rows[BLOCKING, 0.5]["waited_s"] > rows[BLOCKING, 0.5]["latency_s"]
    assert rows[OVERLAPPED, 0]["waited_s"] < rows[BLOCKING, 0.5]["waited_s"]


@pytest.mark.parametrize("depth", [16, 30])
def test_the_page_tells_the_number_of_parameters(depth: int) -> None:
    """By the model itself, and by the page's formula."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in VAR(VARConfig.for_depth(depth)).parameters())
    width = 64 * depth
    assert count == depth * (18 * width**2 + 14 * width + depth) + 2 * width**2 + 5823 * width + 4096
    assert f"{count:,} for d{depth}" in PAGE


def kept_gb(depth: int, images: int, recompute: bool) -> float:
    """Bytes that autograd keeps of a forward pass besides the weights, in GB; nothing is computed."""
    config = VARConfig.for_depth(depth)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        var = VAR(config).eval()
        var.checkpoint_activations = recompute
        own = {tensor.untyped_storage()._cdata for tensor in (*var.parameters(), *var.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            labels_B = torch.zeros(images, dtype=torch.long)
            logits_BLV = var(labels_B, torch.zeros(images, config.length - 1, config.latent_channels))
            log_probs_BLV = (logits_BLV.float() / 0.7).log_softmax(-1)
        del log_probs_BLV
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own) / 1e9


@pytest.mark.slow
@pytest.mark.alone
def test_the_page_tells_the_memory_of_activations() -> None:
    """That of an image, and that of the weights' copies, with and without recomputing."""
    for words, recompute in (("activations of an update", False), ("… with `model.recompute`", True)):
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {words}"))
        found = [float(number) for number in re.findall(r"\d+\.\d+", row)]
        expected = []
        for depth in (16, 30):
            one, four = kept_gb(depth, 1, recompute), kept_gb(depth, 4, recompute)
            expected += [(four - one) / 3, one - (four - one) / 3]
        assert found == pytest.approx(expected, abs=0.0051)
