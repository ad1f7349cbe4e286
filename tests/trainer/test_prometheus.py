"""What Prometheus may read of a run."""

import socket
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.trainer.conftest import make_config
from tests.trainer.test_run import RunHere, assert_failed
from trainer.config import ConfigError
from trainer.prometheus import Prometheus
from trainer.settings import load_settings

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, which the run is told to listen on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    monkeypatch.setenv("TRAINER_METRICS_PORT", str(free))
    return free


def read(port: int) -> Samples:
    """Every sample that is told, by its name and labels but for `run`, which must be the same for all."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "mine"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_a_steps_numbers_are_served(port: int) -> None:
    """Each by its name; parts of one metric differ in a label; the steps done and planned are there from the start."""
    with closing(Prometheus(Path("runs/mine"), make_config(run={"steps": 9}).to_dict(), 3)) as logger:
        before = read(port)
        assert before["trainer_step", ()] == 3
        assert before["trainer_steps_planned", ()] == 9
        numbers = {"reward": 0.25, "kl": 0.5, "raw_score/brightness": 0.75, "seconds/sample": 2.0, "seconds/step": 3.0}
        logger.log(4, numbers | {"inference/odd": 1.0})
        after = read(port)
    assert after["trainer_step", ()] == 4
    assert after["trainer_reward", ()] == 0.25
    assert after["trainer_kl", ()] == 0.5
    assert after["trainer_raw_score", (("reward", "brightness"),)] == 0.75
    assert after["trainer_phase_seconds", (("phase", "sample"),)] == 2
    assert after["trainer_phase_seconds", (("phase", "step"),)] == 3
    assert after["trainer_inference_odd", ()] == 1
    stamp = "trainer_last_step_timestamp_seconds", ()
    assert after[stamp] >= before[stamp]


def test_a_logger_that_is_closed_answers_no_more(port: int) -> None:
    """Its port is free again."""
    Prometheus(Path("runs/mine"), make_config().to_dict(), 0).close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_one_line(run_here: RunHere, recipe: Path, port: int) -> None:
    """Variable and remedy, before anything is loaded or made."""
    with socket.create_server(("127.0.0.1", port)):
        outcome = run_here(recipe, "--run.loggers", "[prometheus]")
    assert_failed(outcome, f"TRAINER_METRICS_PORT {port}", "choose another", code=2)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TRAINER_METRIC_PORT", "9400", ("TRAINER_METRIC_PORT is no setting", "did you mean TRAINER_METRICS_PORT?")),
        ("TRAINER_COLOUR", "red", ("TRAINER_COLOUR is no setting", "unset it; there are TRAINER_METRICS_HOST")),
        ("TRAINER_METRICS_PORT", "94000", ("TRAINER_METRICS_PORT", "less than or equal to 65535")),
        ("TRAINER_METRICS_PORT", "http", ("TRAINER_METRICS_PORT", "valid integer")),
    ],
)
def test_a_wrong_variable_is_one_line(
    run_here: RunHere, recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: tuple[str, ...]
) -> None:
    """Its name and the remedy, before anything is loaded or made, whichever loggers there are."""
    monkeypatch.setenv(name, value)
    outcome = run_here(recipe)
    assert_failed(outcome, *words, code=2)
    assert len(outcome.err.splitlines()) == 1
    assert not (recipe.parent / "runs").exists()


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it is right nor beside a variable that is wrong."""
    monkeypatch.setenv("REWARD_TOKEN", "hunter2")
    assert "hunter2" not in repr(load_settings())
    monkeypatch.setenv("TRAINER_METRICS_PORT", "none")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
