"""What is compared before and after training, and the outside judges."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import TINY, Submit, make_config, make_learner
from trainer.config import Config
from trainer.evaluation import Evaluator, Samples, draw_samples, spread_labels
from trainer.judges import make_judge
from trainer.miniature.quality import held_out
from trainer.miniature.render import POLICY_WORLD
from trainer.policy import Rollout
from trainer.scoring import Scored, Scorer


@pytest.mark.parametrize(
    ("count", "classes", "expected"),
    [
        (6, (3, 5, 8, 9), [3, 5, 8, 9, 3, 5]),
        (4, (3, 5, 8, 9), [3, 5, 8, 9]),
        (2, (3, 5, 8, 9), [3, 8]),
        (3, tuple(range(10)), [0, 3, 6]),
    ],
)
def test_labels_are_spread_over_the_classes(count: int, classes: tuple[int, ...], expected: list[int]) -> None:
    """They take turns; where there are fewer images than classes, they stand evenly among them."""
    assert spread_labels(count, classes).tolist() == expected


def test_five_hundred_images_reach_both_ends_of_imagenet() -> None:
    """Each of 500 labels once, the highest class but one among them."""
    labels = spread_labels(500, tuple(range(1000)))
    assert len(set(labels.tolist())) == 500
    assert labels.max() == 998


EVALUATED = ((1, 4), (2, 4), (1, 5))


class Sent(Scorer):
    """Scores in this process, and keeps what it was sent."""

    def __init__(self) -> None:
        self.here = Submit()

    def submit(self, images_BHW3: np.ndarray) -> Future[Scored]:
        return self.here(images_BHW3)


def measured(config: Config) -> np.ndarray:
    """The images that a run is measured by."""
    scorer = Sent()
    Evaluator(config, make_learner(config), scorer, None).measure()
    return np.concatenate(scorer.here.batches)


def test_inference_and_watched_rewards_are_measured_besides() -> None:
    """Guided images have numbers of their own; a reward that is only looked at has no part in the reward."""
    config = make_config(eval={"samples": 6, "inference": True, "top_k": 8})
    scorer, watcher = Sent(), Sent()
    found = Evaluator(config, make_learner(config), scorer, watcher).measure()
    assert {"reward", "inference/reward", "raw_score/brightness", "inference/raw_score/brightness"} <= found.keys()
    plain, guided = np.split(np.concatenate(scorer.here.batches), 2)
    assert not np.array_equal(plain, guided)
    assert np.array_equal(np.concatenate(watcher.here.batches), np.concatenate([plain, guided]))


def test_the_evaluation_does_not_depend_on_the_runs_seed() -> None:
    """Two runs of other seeds are compared on the same samples; another `eval.seed` draws others."""
    first, other, reseeded = (
        make_config(run={"seed": seed}, eval={"samples": 6, "seed": eval_seed}) for seed, eval_seed in EVALUATED
    )
    images, same, others = (measured(config) for config in (first, other, reseeded))
    assert np.array_equal(same, images)
    assert not np.array_equal(others, images)


def test_a_sample_depends_on_its_own_number_alone() -> None:
    """Whatever the chunk."""
    learner, labels_B = make_learner(make_config()), spread_labels(7, tuple(range(TINY.num_classes)))

    def drawn(chunk: int) -> Samples:
        def plain(labels: Tensor, uniforms: Tensor) -> Rollout:
            return learner.policy.sample(labels, temperature=0.7, uniforms_BL=uniforms)

        return draw_samples(learner.policy, labels_B, plain, seed=1, chunk=chunk)

    assert np.array_equal(drawn(2).images_BHW3, drawn(7).images_BHW3)


def test_the_miniatures_judge_knows_its_renders() -> None:
    """The share of pictures that are their label; a third of the labels moved by one are wrong."""
    judge = make_judge("miniature", torch.device("cpu"))
    assert judge is not None
    renders = held_out(96, POLICY_WORLD)
    assert judge(renders.images, renders.labels) >= 0.97
    moved = renders.labels + (np.arange(96) % 3 == 0)
    assert judge(renders.images, moved) == pytest.approx(2 / 3, abs=0.03)
    assert make_judge("none", torch.device("cpu")) is None


def test_a_judge_that_is_not_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated ResNet-50 in the cache: the address and the remedy."""
    from torchvision.models import ResNet50_Weights

    from trainer.judges import JudgeError

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]).write_bytes(b"truncated")
    with pytest.raises(JudgeError, match=r"ResNet-50 .*--model.classifier none"):
        make_judge("imagenet", torch.device("cpu"))
