"""The forecast of a training step, held to real steps, and to operations counted another way."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_forecast, train_step
from benchmarks.flops import step_flop
from benchmarks.formula import fill
from trainer.grpo import LossTerms, grpo_loss
from trainer.update import Batch, Updates, minibatches

SIZES = ("--model", "mini", "--images", "32", "--minibatch", "16", "--dtype", "float32")


def test_operations_are_those_of_the_formula() -> None:
    """All matrix products, attention and convolutions of a step, to 2 %: the leading scales are counted with what is
    masked of them.
    """
    options = step_forecast.parse(["--model", "mini", "--images", "16", "--minibatch", "16"])
    phases = step_forecast.forecast(options, 16)
    assert list(phases) == ["sample", "decode", "reference", "optimise"]
    counted = sum(each.flop for each in phases.values())
    assert counted == pytest.approx(16 * step_flop(*train_step.model_configs("mini"), reference=True), rel=0.02)
    for each in phases.values():
        bounds = each.moved_bytes / 4.8e12, each.flop / 989e12
        assert 0.999 * max(bounds) <= each.least_s <= 1.001 * sum(bounds)


@pytest.mark.parametrize("extra", [(), ("--micro-batch", "4"), ("--recompute",)])
def test_memory_is_that_of_real_updates(extra: tuple[str, ...]) -> None:
    """What the updates of a second step hold at most above what was there, by the allocator's own events."""
    options = step_forecast.parse([*SIZES, *extra])
    device, config = torch.device("cpu"), train_step.make_config(options, 16)
    models = train_step.make_models("mini", device)
    for model in models:
        fill(model)
    learner = train_step.make_learner(*models, options, config, device, train_step.Clock(device))
    length = learner.policy.length
    conditions_B, tokens_BL = torch.zeros(32, dtype=torch.long), torch.zeros(32, length, dtype=torch.long)
    batch = Batch(conditions_B, tokens_BL, torch.zeros(32, length), torch.zeros(32, length), torch.zeros(32))

    def update() -> None:
        updates = Updates(learner.policy, learner.optimizer, learner.group, config)
        for rows_B in minibatches(32, 16, 0, 0):
            updates.make(batch, rows_B, 0)
        learner.optimizer.zero_grad(set_to_none=True)

    update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = profiler.profiler.kineto_results.events()
    real = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    foretold = step_forecast.forecast(options, 16)["optimise"]
    assert foretold.peak_bytes - foretold.began_bytes == pytest.approx(real, rel=0.01)


@pytest.mark.slow
def test_d30_with_its_reference_fits_into_75_gb() -> None:
    """All of it trained, in either reading of the minibatch, 16 images forward at once."""
    options = step_forecast.parse(["--model", "d30", "--minibatch", "32", "--micro-batch", "16"])
    phases = step_forecast.forecast(options, 32)
    assert max(phases, key=lambda name: phases[name].peak_bytes) == "optimise"
    assert 70e9 < phases["optimise"].peak_bytes < 75e9
    assert 46e9 < phases["sample"].peak_bytes < 49e9


def test_a_step_that_waits_for_a_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of an update is looked at: on a GPU it would wait, here it fails."""

    def looks(*args: torch.Tensor, **settings: float) -> LossTerms:
        terms = grpo_loss(*args, **settings)
        assert float(terms.loss) == 0.0
        return terms

    monkeypatch.setattr("trainer.update.grpo_loss", looks)
    with pytest.raises(DataDependentOutputException):
        step_forecast.forecast(step_forecast.parse([*SIZES]), 16)


def test_what_a_person_and_a_program_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each phase and for the step."""
    path = tmp_path / "forecast.json"
    assert step_forecast.main([*SIZES, "--json", str(path)]) == 0
    told = capsys.readouterr()
    for word in ("sample", "decode", "reference", "optimise", "step", "images/s, with nothing compiled"):
        assert word in told.out
    assert told.err == ""
    assert set(json.loads(path.read_text())["rows"]["16"]) == {"sample", "decode", "reference", "optimise"}


def test_bytes_are_those_that_are_read_and_written() -> None:
    """Of an optimizer, which returns nothing; of what is made, copied, and changed in place."""
    ledger = step_forecast.Ledger(1e12, 1e12)
    with FakeTensorMode(), ledger:
        weight = torch.nn.Parameter(torch.empty(1000, 1000))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = torch.empty(1000, 1000)
        optimizer.step()

        def scaled_step() -> None:
            optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
            optimizer.step()

        for name, work, expected in (
            ("AdamW: four are read, three written", optimizer.step, 28e6),
            ("… whose gradients are scaled, and kept so", scaled_step, 32e6),
            ("a list in place", lambda: torch._foreach_mul_([weight.grad], 2.0), 8e6),
            ("in place", lambda: weight.grad.mul_(2.0), 8e6),
            ("a sum", lambda: weight.grad + weight.grad, 12e6),
            ("zeros like it", lambda: torch.zeros_like(weight.grad), 4e6),
            ("one number", lambda: weight.grad.new_ones(1), 4),
            ("a copy", lambda: weight.grad.copy_(weight.detach()), 8e6),
            ("a view", weight.grad.t, 0),
        ):
            with ledger.phase(name):
                work()
            assert ledger.phases[name].moved_bytes == pytest.approx(expected, abs=20), name


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (("--images", "10"), "--images is 10"),
        (("--images", "1600000000000"), "--images is 16000"),
        (("--chunk", "8"), "--chunk is 8"),
        (("--micro-batch", "0"), "--micro-batch is 0"),
        (("--micro-batch", "12"), "--micro-batch is 12"),
        (("--terabytes", "0"), "--terabytes 0"),
        (("--tflops", "inf"), "--tflops is inf"),
        (("--json", "/no/such/folder/file"), "--json is /no"),
    ],
)
def test_what_cannot_be_is_refused(wrong: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By value and rule, before anything is counted."""
    with pytest.raises(SystemExit):
        step_forecast.main([*wrong])
    assert word in capsys.readouterr().err.partition("error: ")[2]
