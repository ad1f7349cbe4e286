"""Scores become rewards, or an error; never a number that nobody gave."""

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.client import RewardAnswerInvalid, RewardDeadlineExceeded, RewardError, RewardRefused, RewardUnavailable
from services.protocol import MEDIA_JSON, Info, Limits
from services.rewards.brightness import Brightness
from tests.services.conftest import random_images
from trainer.config import RewardConfig
from trainer.local_rewards import LocalRewards
from trainer.scoring import ScoreError, Scorer, collect, combine
from trainer.shaping import Affine, AtLeast, Below


def reward(name: str, **values: Any) -> RewardConfig:
    return RewardConfig(name=name, **values)


def test_the_reward_is_the_weighted_sum_of_shaped_scores() -> None:
    """Raw and shaped scores are kept for each model."""
    raw = {"a": np.array([0.1, 0.9]), "b": np.array([2.0, 4.0])}
    rewards = [reward("a", weight=3.0, shape=AtLeast(at_least=0.5)), reward("b", weight=-0.5, shape=Affine(offset=1))]
    scored = combine(raw, rewards, 2)
    assert scored.reward.tolist() == [3 * 0 - 0.5 * 3, 3 * 1 - 0.5 * 5]
    assert scored.shaped["a"].tolist() == [0, 1]
    assert scored.shaped["b"].tolist() == [3, 5]
    assert scored.raw["b"].tolist() == [2, 4]


def test_success_is_to_pass_every_threshold() -> None:
    """Rewards without one do not count; where none has one there is no success to speak of."""
    raw = {"a": np.array([0.1, 0.6, 0.9]), "b": np.array([0.1, 0.1, 0.9]), "c": np.array([5.0, 5.0, 5.0])}
    bright, dark, free = reward("a", shape=AtLeast(at_least=0.5)), reward("b", shape=Below(below=0.5)), reward("c")
    for rewards, expected in (
        ([bright, free], [False, True, True]),
        ([bright, dark, free], [False, True, False]),
        ([free, dark, bright], [False, True, False]),
    ):
        success = combine(raw, rewards, 3).success
        assert success is not None
        assert success.tolist() == expected
    assert combine(raw, [free], 3).success is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error(bad: float) -> None:
    """Also where a threshold would have hidden it; the message says whose and where."""
    for shape in (Affine(), AtLeast(at_least=0.5), Below(below=0.5)):
        with pytest.raises(ScoreError, match=f"'a' answered {bad} for image 1"):
            combine({"a": np.array([0.0, bad, 1.0])}, [reward("a", shape=shape)], 3)


def test_a_score_too_many_too_few_or_none_is_an_error() -> None:
    """One score for each image, from each reward."""
    for scores in ([0.5], [0.5, 0.5, 0.5], []):
        with pytest.raises(ScoreError, match=f"'a' answered {len(scores)} scores for 2 images"):
            combine({"a": np.array(scores)}, [reward("a")], 2)
    with pytest.raises(ScoreError, match="no score from 'b'; answered: a"):
        combine({"a": np.array([0.5, 0.5])}, [reward("a"), reward("b")], 2)


def test_a_sum_that_overflows_is_an_error() -> None:
    """Finite scores and weights may still have no finite sum, or one that no statistics can be made of."""
    for weight, shown in ((1e300, "inf"), (-1e10, r"-1e\+109")):
        with pytest.raises(ScoreError, match=rf"the reward of image 0 is {shown}, beyond ±1e\+100; choose smaller"):
            combine({"a": np.array([1e99])}, [reward("a", weight=weight)], 1)


@pytest.mark.parametrize("shape", [Affine(), Affine(scale=1e-200), AtLeast(at_least=0.5), Below(below=0.5)])
def test_a_score_that_is_too_large_is_an_error(shape: Affine | AtLeast | Below) -> None:
    """Its statistics would overflow, also where a threshold makes an ordinary reward of it."""
    for bad, shown in ((1e200, r"1e\+200"), (-1.5e308, r"-1.5e\+308")):
        with pytest.raises(ScoreError, match=rf"'a' answered {shown} for image 1, beyond ±1e\+100; let it answer sm"):
            combine({"a": np.array([0.0, bad])}, [reward("a", shape=shape)], 2)
    largest = combine({"a": np.array([-1e100, 1e100])}, [reward("a", shape=shape)], 2)
    assert np.isfinite(largest.raw["a"].std())


def test_parts_are_joined_in_the_order_they_were_sent() -> None:
    """Whichever was answered first."""
    rewards = [reward("a", shape=AtLeast(at_least=2))]
    parts = [combine({"a": np.array(scores)}, rewards, len(scores)) for scores in ([1.0, 2.0], [3.0], [0.0, 4.0])]
    futures: list[Future[Any]] = [Future() for _ in parts]
    for index in (2, 0, 1):
        futures[index].set_result(parts[index])
    joined = collect(futures)
    assert joined.raw["a"].tolist() == [1, 2, 3, 0, 4]
    assert joined.reward.tolist() == joined.shaped["a"].tolist() == [0, 1, 1, 0, 1]
    assert joined.success is not None
    assert joined.success.tolist() == [False, True, True, False, True]


def test_the_first_failure_cancels_the_rest() -> None:
    """Nobody waits for scores that no one will use; the cause comes out bare, not in a group."""
    failed: Future[Any] = Future()
    failed.set_exception(ExceptionGroup("tasks", [RewardUnavailable("gone"), RewardUnavailable("too")]))
    waiting: Future[Any] = Future()
    with pytest.raises(RewardUnavailable, match="gone"):
        collect([failed, waiting])
    assert waiting.cancelled()


@pytest.mark.redis
def test_scores_of_the_real_service(tmp_path: Path) -> None:
    """Through HTTP, Redis and worker: the very numbers, in order, for many batches in flight at once."""
    batches = [random_images(count, 8, 8, 3, seed=count) for count in (5, 1, 16, 7)]
    rewards = [reward("brightness", weight=2.0, shape=AtLeast(at_least=0.5))]
    with (
        LocalRewards(["brightness"], tmp_path / "services.log") as services,
        Scorer(rewards, services.urls, timeout_s=60) as scorer,
    ):
        scored = collect([scorer.submit(images_BHW3) for images_BHW3 in batches])
    expected_B = np.concatenate([Brightness().score(images_BHW3, None) for images_BHW3 in batches])
    assert np.array_equal(scored.raw["brightness"], expected_B)
    assert np.array_equal(scored.reward, 2.0 * (expected_B >= 0.5))
    assert scored.success is not None


WRONG_SCORES: dict[str, Any] = {
    "nan": [0.5, math.nan],
    "infinite": [0.5, math.inf],
    "null": [0.5, None],
    "text": [0.5, "0.5"],
    "too few": [0.5],
    "too many": [0.5, 0.5, 0.5],
    "none": None,
}


class Misbehaving(BaseHTTPRequestHandler):
    """A reward service that is ready, says what it is, and answers as its server's `manner` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        info = Info(name="odd", version="1", uses_prompts=True, bodies=[MEDIA_JSON], limits=Limits())
        self._answer(200, info.model_dump_json() if self.path == "/info" else '{"status": "ok"}')

    def do_POST(self) -> None:
        self.server.received = self.rfile.read(int(self.headers["Content-Length"]))  # type: ignore[attr-defined]
        manner = self.server.manner  # type: ignore[attr-defined]
        if manner == "500":
            self._answer(500, '{"title": "broken"}')
        elif manner == "not JSON":
            self._answer(200, "<html>")
        elif manner == "well":
            self._answer_scores([0.25, 0.75])
        elif manner == "upgraded":
            self._answer_scores([0.25, 0.75], version="2")
        elif manner == "silent":
            self.server.over.wait(60)  # type: ignore[attr-defined]
            self.close_connection = True
        elif manner == "hangs up":
            self.close_connection = True
        else:
            self._answer_scores(WRONG_SCORES[manner])

    def _answer_scores(self, scores: Any, *, version: str = "1") -> None:
        answer = {"scores": scores, "reward": "odd", "version": version, "timing_ms": {"queue": 0, "score": 0}}
        self._answer(200, json.dumps({name: value for name, value in answer.items() if value is not None}))

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", MEDIA_JSON)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def odd_service() -> Iterator[ThreadingHTTPServer]:
    """A real HTTP server in a thread; set its `manner`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        server.over = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("manner", "error"),
    [
        *((manner, RewardAnswerInvalid) for manner in WRONG_SCORES),
        ("not JSON", RewardAnswerInvalid),
        ("500", RewardRefused),
        ("silent", (RewardDeadlineExceeded, RewardUnavailable)),
        ("hangs up", (RewardDeadlineExceeded, RewardUnavailable)),
    ],
)
def test_a_service_that_misbehaves_gives_an_error_and_never_a_number(
    odd_service: ThreadingHTTPServer, manner: str, error: type[RewardError]
) -> None:
    """Whatever a stranger's service answers in place of one finite score an image."""
    odd_service.manner = manner  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{odd_service.server_port}"
    with Scorer([reward("odd")], {"odd": url}, timeout_s=2) as scorer, pytest.raises(error):
        collect([scorer.submit(random_images(2, 4, 4, 3))])


@pytest.mark.redis
def test_a_prompt_that_is_missing_or_of_no_use_is_found_at_once(tmp_path: Path) -> None:
    """Before the first image: a reward that compares with one, and one that reads none."""
    with LocalRewards(["brightness", "mini-clip"], tmp_path / "services.log") as services:
        for one, words in (
            (reward("mini-clip"), "give it a `prompt`"),
            (reward("brightness", prompt="a"), "leave it out"),
        ):
            with pytest.raises(ScoreError, match=words):
                Scorer([one], services.urls, timeout_s=10)
        Scorer([reward("mini-clip", prompt="a painting")], services.urls, timeout_s=10).close()


@pytest.mark.parametrize("prompt", [None, "an old picture"])
def test_a_rewards_prompt_goes_with_every_image(odd_service: ThreadingHTTPServer, prompt: str | None) -> None:
    """One copy an image; none where the recipe names none."""
    odd_service.manner = "well"  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{odd_service.server_port}"
    with Scorer([reward("odd", prompt=prompt)], {"odd": url}, timeout_s=10) as scorer:
        scored = collect([scorer.submit(random_images(2, 4, 4, 3))])
    assert scored.reward.tolist() == [0.25, 0.75]
    sent = json.loads(odd_service.received)  # type: ignore[attr-defined]
    assert sent.get("prompts") == (None if prompt is None else [prompt, prompt])


@pytest.mark.redis
def test_one_bad_reward_of_two_fails_the_batch(tmp_path: Path, odd_service: ThreadingHTTPServer) -> None:
    """The other's scores are not taken for the sum."""
    odd_service.manner = "nan"  # type: ignore[attr-defined]
    with LocalRewards(["brightness"], tmp_path / "services.log") as services:
        urls = services.urls | {"odd": f"http://127.0.0.1:{odd_service.server_port}"}
        with (
            Scorer([reward("brightness"), reward("odd")], urls, timeout_s=60) as scorer,
            pytest.raises(RewardAnswerInvalid),
        ):
            collect([scorer.submit(random_images(2, 4, 4, 3))])


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_service_that_is_down_is_an_error_within_the_timeout() -> None:
    """It names the address and the remedy, and leaves no thread."""
    threads = threading.active_count()
    url = f"http://127.0.0.1:{closed_port()}"
    began = time.monotonic()
    with pytest.raises(RewardUnavailable, match=f"{url} is not ready after 0.5 s.*start the service"):
        Scorer([reward("gone")], {"gone": url}, timeout_s=5, ready_timeout_s=0.5)
    assert time.monotonic() - began < 15
    assert threading.active_count() == threads


def test_a_service_that_dies_is_an_error_within_the_timeout(odd_service: ThreadingHTTPServer) -> None:
    """Also when it had been ready before."""
    url = f"http://127.0.0.1:{odd_service.server_port}"
    with Scorer([reward("odd")], {"odd": url}, timeout_s=1) as scorer:
        odd_service.shutdown()
        odd_service.server_close()
        began = time.monotonic()
        with pytest.raises((RewardUnavailable, RewardDeadlineExceeded)):
            collect([scorer.submit(random_images(2, 4, 4, 3))])
        assert time.monotonic() - began < 15


def test_closing_drops_what_is_in_flight(odd_service: ThreadingHTTPServer) -> None:
    """A run that ends does not wait for scores; the thread is gone, and a second close does nothing."""
    odd_service.manner = "silent"  # type: ignore[attr-defined]
    scorer = Scorer([reward("odd")], {"odd": f"http://127.0.0.1:{odd_service.server_port}"}, timeout_s=60)
    pending = scorer.submit(random_images(2, 4, 4, 3))
    scorer.close()
    scorer.close()
    assert pending.done()
    assert not any(thread.name == "rewards" for thread in threading.enumerate())


def test_a_service_that_is_upgraded_under_a_run_stops_it(odd_service: ThreadingHTTPServer) -> None:
    """Scores of two models cannot be compared, and a policy must not be trained on a mixture."""
    odd_service.manner = "well"  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{odd_service.server_port}"
    with Scorer([reward("odd")], {"odd": url}, timeout_s=10) as scorer:
        collect([scorer.submit(random_images(2, 4, 4, 3))])
        odd_service.manner = "upgraded"  # type: ignore[attr-defined]
        with pytest.raises(ScoreError, match="'odd' was scored by odd 1 and now is by odd 2: bring the first back"):
            collect([scorer.submit(random_images(2, 4, 4, 3))])
