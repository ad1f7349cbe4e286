"""The benchmark of a model behind the service, and the one call for a GPU, go their way on a processor."""

import json
from pathlib import Path

import pytest

from benchmarks import behind, on_gpu

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.mark.redis
def test_a_model_behind_the_service_is_set_beside_itself(tmp_path: Path) -> None:
    """At every load, with and without a log; each answer was held to the reward's own scores."""
    file = tmp_path / "behind.json"
    few = ["--reward", "mini-clip", "--rounds", "1", "--seconds", "1", "--max-batch", "16", "--in-flight", "48"]
    assert behind.main([*few, "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert set(results) == {
        "in process",
        *(f"{count} in flight, {log}" for count in (48,) for log in ("AOF", "no AOF")),
    }
    for name, rows in results.items():
        for row in rows:
            assert row["images_s"] > 0
            assert 0.1 < row["of_in_process"] < 1.5
            assert (row["p50_ms"] > 0) == (name != "in process")


def test_a_rehearsal_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is done has its file; one for which no time is left is not begun, and that is not success."""
    assert on_gpu.main([str(tmp_path / "done"), "--rehearse", "--steps", "d16"]) == 0
    assert json.loads((tmp_path / "done" / "outcomes.json").read_text())["d16"].startswith("done")
    assert json.loads((tmp_path / "done" / "d16.json").read_text())["rows"][0]["minibatch"] == 4
    assert on_gpu.main([str(tmp_path / "late"), "--rehearse", "--steps", "d16", "--minutes", "0"]) == 1
    assert "d16: left out: no time" in capsys.readouterr().out
