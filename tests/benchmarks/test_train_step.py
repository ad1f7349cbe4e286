"""The benchmark of a training step, rehearsed on the CPU at small sizes: the code that a GPU runs."""

import json
from pathlib import Path

import pytest

from benchmarks.flops import decode_flop, forward_flop, step_flop
from benchmarks.train_step import PHASES, main
from trainer.models.var import VARConfig
from trainer.models.vqvae import VQVAEConfig


def test_operations_are_those_of_the_published_models() -> None:
    """TFLOP: d16 0.30 a forward, d30 1.88; 0.39 a decode; together what one image of a step costs."""
    d16, d30, tokenizer = VARConfig.for_depth(16), VARConfig.for_depth(30), VQVAEConfig()
    assert forward_flop(d16) / 1e12 == pytest.approx(0.30, abs=0.005)
    assert forward_flop(d30) / 1e12 == pytest.approx(1.88, abs=0.005)
    assert decode_flop(tokenizer) / 1e12 == pytest.approx(0.39, abs=0.005)
    assert step_flop(d16, tokenizer, reference=True) == 5 * forward_flop(d16) + decode_flop(tokenizer)
    assert step_flop(d16, tokenizer, reference=False, epochs=2) == 7 * forward_flop(d16) + decode_flop(tokenizer)


def test_both_readings_of_the_minibatch_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every phase has its seconds, and together they are the step's."""
    path = tmp_path / "steps.json"
    assert (
        main(["--images", "16", "--minibatch", "4", "16", "--steps", "2", "--warm-up", "0", "--json", str(path)]) == 0
    )
    assert "Not in it: all-reduce" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [row["updates"] for row in found["rows"]] == [4, 1]
    for row in found["rows"]:
        assert set(row["seconds"]) == {*PHASES, "step"}
        assert 0 < sum(row["seconds"][phase] for phase in PHASES) < 1.5 * row["seconds"]["step"]
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"]["step"])
        assert row["peak_bytes"] > 1e6


@pytest.mark.parametrize("wrong", [("--images", "10"), ("--images", "16", "--minibatch", "3"), ("--steps", "0")])
def test_sizes_that_do_not_fit_are_refused(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """By value and rule."""
    with pytest.raises(SystemExit):
        main(list(wrong))
    assert wrong[-2].removeprefix("--") in capsys.readouterr().err
