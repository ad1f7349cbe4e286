"""Sweeps: real runs of tiny models, interrupted and gone on with; what is refused before any of them starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.services.conftest import descendants, is_alive, wait_until
from tests.trainer.conftest import ROOT
from trainer.config import ConfigError
from trainer.local_rewards import LocalRewards
from trainer.options import load_config, parse_overrides
from trainer.sweep.__main__ import main
from trainer.sweep.found import find, latest
from trainer.sweep.jobs import WITH_THREADS
from trainer.sweep.plan import Plan, parse_seeds, read_sweep, sweep_names
from trainer.sweep.table import markdown, rows

SWEEPS = ROOT / "trainer" / "sweeps"
pytestmark = pytest.mark.redis


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Bench:
    """A folder with a tiny recipe, whose reward is served for all runs, and with sweeps."""

    def __init__(self, folder: Path, models: dict[str, str], url: str) -> None:
        self.folder = folder
        self.recipe = {
            "model": models,
            "rollout": {"labels": 2, "group_size": 4, "chunk": 8},
            "grpo": {"beta": 0.1},
            "optim": {"lr": 1.0e-3, "minibatch": 4},
            "rewards": [{"name": "brightness", "url": url}],
            "eval": {"samples": 4},
            "run": {"steps": 2, "device": "cpu", "loggers": []},
        }
        self.write("tiny.yaml", self.recipe)

    def write(self, name: str, content: Any) -> Path:
        """A YAML file."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def sweep(self, *points: dict[str, Any], name: str = "betas", **more: Any) -> Path:
        """A sweep's file, of the tiny recipe."""
        content = {"summary": "Tiny [runs].", "axis": "β", "recipe": str(self.folder / "tiny.yaml"), **more}
        return self.write(f"{name}.yaml", {**content, "points": list(points)})

    def results(self, folder: Path, name: str = "betas") -> dict[str, Any]:
        """What `sweep.json` says."""
        content: dict[str, Any] = json.loads((folder / name / "sweep.json").read_text())
        return content


POINTS = (
    {"name": "0.1", "value": 0.1},
    {"name": "none", "value": 0, "settings": {"grpo.beta": 0}},
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Iterator[Bench]:
    """The workplace of all sweeps here, and one reward service for their runs."""
    folder = tmp_path_factory.mktemp("sweeps")
    with LocalRewards(["brightness"], folder / "services.log") as services:
        yield Bench(folder, models, services.urls["brightness"])


@pytest.fixture(scope="module")
def done(bench: Bench) -> Path:
    """A folder with a sweep of two points and two seeds that is done."""
    folder = bench.folder / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main([str(bench.sweep(*POINTS)), "--seeds", "0-1", "--dir", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


@pytest.fixture
def sweep_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command in this process."""

    def runner(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return runner


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command as a process; it and its runs are ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def starter(*arguments: object) -> subprocess.Popen[str]:
        with (tmp_path / "stderr").open("w") as err:
            command = [sys.executable, "-m", "trainer.sweep", *map(str, arguments)]
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err, text=True))
        return started[-1]

    yield starter
    for process in started:
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def mtimes(folder: Path) -> dict[str, int]:
    """When each of the runs' files was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*/**/*") if path.is_file()}


@pytest.mark.slow
def test_every_point_and_seed_is_run_and_summed_up(bench: Bench, done: Path) -> None:
    """The numbers are those of the runs' own files; the settings are the points' own."""
    results = bench.results(done)
    assert (results["name"], results["axis"], results["summary"]) == ("betas", "β", "Tiny [runs].")
    assert [(point["name"], point["value"]) for point in results["points"]] == [("0.1", 0.1), ("none", 0.0)]
    for point in results["points"]:
        assert [run["seed"] for run in point["runs"]] == [0, 1]
        for run in point["runs"]:
            folder = done / "betas" / run["folder"]
            summary = json.loads((folder / "summary.json").read_text())
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert folder == done / "betas" / point["name"] / f"tiny-seed-{run['seed']}"
            assert (run["done"], run["steps"], run["images"]) == (True, 2, 2 * 4 * 2)
            assert (run["before"], run["after"], run["seconds"]) == tuple(
                summary[k] for k in ("before", "after", "seconds")
            )
            assert (run["reward"], run["kl"], run["raw_score"]) == tuple(
                last[k] for k in ("reward", "kl", "raw_score/brightness")
            )
            assert run["label_accuracy"] is None  # there is no classifier
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert (config["run"]["seed"], config["grpo"]["beta"]) == (run["seed"], point["value"])
            assert json.loads((folder / "versions.json").read_text())["threads"] == "1"  # as the user has said
            assert (folder.parent / f"{folder.name}.log").read_text().startswith("$ python -m trainer.run ")
    assert results["points"][0]["runs"][0]["kl"] is not None
    assert results["points"][1]["runs"][0]["kl"] is None  # at β = 0 there is no reference


def test_all_points_of_the_first_seed_come_first(bench: Bench, sweep_here: Callable[..., Outcome]) -> None:
    """So that a sweep that is stopped early can be compared."""
    outcome = sweep_here(bench.sweep(*POINTS), "--seeds", "0,2", "--dir", "x", "--dry-run", "--run.steps", 5)
    lines = outcome.out.splitlines()
    assert [(f"/{p}" in line, f"--run.seed {s}" in line) for line, (s, p) in zip(
        lines, [(0, "0.1"), (0, "none"), (2, "0.1"), (2, "none")], strict=True
    )] == [(True, True)] * 4  # fmt: skip
    assert all("--run.steps 5" in line and "--run.resume auto" in line for line in lines)
    assert not Path("x").exists()


@pytest.mark.parametrize("folder", ["my runs #1", "kl: mine", "'a'", "[a]", "[a", "a\nb"])
def test_each_point_has_its_folder_whatever_dir_is_called(bench: Bench, folder: str) -> None:
    """Also where YAML, as which an option's value is read, would make a comment or a mapping of it."""
    name, file = read_sweep(str(bench.sweep(*POINTS)))
    for run in Plan(name, file, Path(folder) / name).runs([0, 1]):
        config = load_config(run.recipe, parse_overrides(run.options))
        assert config == run.config
        assert config.run.dir == Path(folder) / name / run.point


def test_a_folder_of_another_runs_name_is_not_gone_on_in(bench: Bench, tmp_path: Path) -> None:
    """`x-2` is the second run named x, unless its settings say that x-2 is its name; what cannot be read is told."""
    name, file = read_sweep(str(bench.sweep(*POINTS)))
    (run,) = Plan(name, file, tmp_path).runs([0], ["none"])
    folders = [tmp_path / "none" / f"tiny-seed-0{ending}" for ending in ("", "-2", "-3")]
    for folder, own in zip(folders, ("tiny-seed-0", "tiny-seed-0", "tiny-seed-0-3"), strict=True):
        (folder / "states" / "step_00000000").mkdir(parents=True)
        settings = run.config.model_copy(update={"run": run.config.run.model_copy(update={"name": own})})
        (folder / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    (folders[1] / "states" / "step_00000000 (copy)").mkdir()
    assert latest(run) == find(run) == folders[1]
    (folders[2] / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"tiny-seed-0-3/config\.yaml: not the settings of a run"):
        find(run)


@pytest.mark.slow
def test_what_is_done_is_left_alone(bench: Bench, copy: Path, sweep_here: Callable[..., Outcome]) -> None:
    """The same command again starts nothing and says so."""
    before = mtimes(copy)
    outcome = sweep_here(bench.sweep(*POINTS), "--seeds", "0-1", "--dir", copy)
    assert outcome.code == 0, outcome.err
    assert "4 runs, 4 of them done already" in outcome.err
    assert mtimes(copy) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--grpo.clip", "0.3"), "grpo.clip was 0.2 and is 0.3"),
        (("--eval.samples", "5"), "eval.samples was 4 and is 5"),
        (("--run.steps", "1"), "2 steps are done, and run.steps is 1"),
    ],
)
def test_what_was_run_with_other_settings_is_named(
    bench: Bench, copy: Path, sweep_here: Callable[..., Outcome], options: tuple[str, ...], said: str
) -> None:
    """The folder, what differs, and the remedy; nothing is touched, nothing is started."""
    before = mtimes(copy)
    outcome = sweep_here(bench.sweep(*POINTS), "--seeds", "1", "--dir", copy, *options)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {copy / 'betas' / '0.1' / 'tiny-seed-1'}: ")
    assert said in outcome.err
    assert "another --dir" in outcome.err
    assert mtimes(copy) == before


@pytest.mark.slow
def test_the_summary_can_be_written_again(bench: Bench, copy: Path, sweep_here: Callable[..., Outcome]) -> None:
    """From the folders alone; a seed that is missing is named, one that was not asked for is kept."""
    shutil.rmtree(copy / "betas" / "none" / "tiny-seed-1")
    for name in ("sweep.json", "summary.md"):
        (copy / "betas" / name).unlink()
    outcome = sweep_here(bench.sweep(*POINTS), "--dir", copy, "--summary")
    assert outcome.code == 0, outcome.err
    assert "missing: none (seed 1)" in outcome.err
    assert "Missing: none (seed 1)." in (copy / "betas" / "summary.md").read_text()
    lost = bench.results(copy)["points"][1]["runs"][1]
    assert lost["done"] is False
    assert {lost[name] for name in ("folder", "seconds", "reward", "before", "after")} == {None}


@pytest.mark.slow
def test_two_jobs_give_the_same_numbers(bench: Bench, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings aside, those of one at a time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = bench.folder / "two"
    assert main([str(bench.sweep(*POINTS)), "--dir", str(folder), "--jobs", "2"]) == 0

    def numbers(where: Path) -> list[Any]:
        points = bench.results(where)["points"]
        return [{**point["runs"][0], "seconds": None} for point in points]

    assert numbers(folder) == numbers(done)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(
    bench: Bench, start: Callable[..., subprocess.Popen[str]], sweep_here: Callable[..., Outcome], tmp_path: Path
) -> None:
    """SIGTERM: the run at work saves and ends, exit 75; the same command does the rest and leaves the done alone."""
    path = bench.sweep({"name": "short", "settings": {"run.steps": 1}}, {"name": "long", "settings": {"run.steps": 40}})
    folder = tmp_path / "runs" / "betas"
    process = start(path, "--dir", folder.parent)
    metrics = folder / "long" / "tiny-seed-0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, 100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    said = (tmp_path / "stderr").read_text()
    assert "1 of 2 runs are done" in said.splitlines()[-1]
    assert f"python -m trainer.sweep {path} --dir {folder.parent}" in said
    steps = metrics.read_text().count("\n")
    results = bench.results(folder.parent)["points"]
    assert [point["runs"][0]["done"] for point in results] == [True, False]
    assert results[1]["runs"][0]["steps"] == steps < 40
    before = mtimes(folder)
    outcome = sweep_here(path, "--dir", folder.parent)
    assert outcome.code == 0, outcome.err
    assert f"goes on after step {steps}" in outcome.err
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))
    after = mtimes(folder)
    short = {name for name in before if "/short/" in name}
    assert short
    assert {name: after[name] for name in short} == {name: before[name] for name in short}


@pytest.mark.slow
def test_a_folder_is_one_sweeps_at_a_time(
    bench: Bench, start: Callable[..., subprocess.Popen[str]], sweep_here: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Nor can another begin while a run of a sweep that was killed is still at work."""
    path = bench.sweep({"name": "long", "settings": {"run.steps": 100_000}})
    process = start(path, "--dir", tmp_path / "runs")
    metrics = tmp_path / "runs" / "betas" / "long" / "tiny-seed-0" / "metrics.jsonl"
    wait_until(metrics.exists, 100)
    (run,) = (pid for pid in descendants(process.pid) if b"trainer.run" in Path(f"/proc/{pid}/cmdline").read_bytes())
    try:
        for _ in range(2):
            outcome = sweep_here(path, "--dir", tmp_path / "runs")
            assert outcome.code == 2
            assert "another sweep, or a run that it started, is at work there" in outcome.err
            process.kill()
            process.wait()
    finally:
        os.kill(run, signal.SIGTERM)
        wait_until(lambda: not is_alive(run), 60)


def test_a_failing_run_is_reported_and_the_others_finish(
    bench: Bench, sweep_here: Callable[..., Outcome], tmp_path: Path
) -> None:
    """By name, exit code, last line and log; the command then fails as well."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    path = bench.sweep({"name": "bad", "settings": {"model.var": str(broken)}}, {"name": "good"}, axis=None)
    outcome = sweep_here(path, "--dir", tmp_path / "runs", "--run.steps", 1)
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    log = tmp_path / "runs" / "betas" / "bad" / "tiny-seed-0.log"
    assert last.startswith("bad/tiny-seed-0 failed (exit code 1): error: ")
    assert "broken.safetensors" in last
    assert last.endswith(str(log))
    assert log.is_file()
    bad, good = bench.results(tmp_path / "runs")["points"]
    assert (bad["runs"][0]["done"], good["runs"][0]["done"]) == (False, True)
    assert "missing: bad (seed 0)" in outcome.err


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"name": "bad", "settings": {"grpo.bata": 1}}, ("point bad", "grpo.bata: unknown key", "'beta'")),
        ({"name": "bad", "settings": {"rollout.chunk": 6}}, ("point bad", "multiple of rollout.group_size")),
        ({"name": "bad", "recipe": "mini-brigth"}, ("point bad", "unknown recipe", "'mini-bright'")),
        ({"name": "bad", "settings": {"run.seed": 3}}, ("run.seed", "--seeds")),
        ({"name": "bad", "settings": {"grpo": {"beta": 1}}}, ("grpo is a section", "grpo.beta")),
        ({"name": "../bad"}, ("points.2.name", "pattern")),
        ({"name": "none"}, ("two points are named none",)),
        ({"name": "summary.md"}, ("no point can be named summary.md",)),
        ({"name": "bad", "setings": {}}, ("points.2.setings: unknown key", "'settings'")),
    ],
)
def test_a_mistake_in_the_last_point_is_found_before_any_run(
    bench: Bench, sweep_here: Callable[..., Outcome], tmp_path: Path, point: dict[str, Any], said: tuple[str, ...]
) -> None:
    """One line that names it, exit 2, and not so much as a folder."""
    outcome = sweep_here(bench.sweep(*POINTS, point), "--dir", tmp_path / "runs")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert all(words in outcome.err for words in said), outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mini-kel",), ("unknown sweep 'mini-kel'", "'mini-kl'")),
        ((), ("name a sweep",)),
        (("mini-kl", "--points", "0.3"), ("no point '0.3'", "known: 0, 0.02")),
        (("mini-kl", "--seeds", "3-1"), ("--seeds 3-1", "0-2")),
        (("mini-kl", "--seeds", "1,1"), ("1 is there twice",)),
        (("mini-kl", "--seeds", "0-99999999999"), ("1,000 seeds at most",)),
        (("mini-kl", "--jobs", "0"), ("'0' is not a whole number from 1",)),
        (("mini-kl", "--run.dir", "x"), ("run.dir is the sweep's", "--dir")),
        (("mini-kl", "--sedes", "1"), ("unknown option --sedes", "'--seeds'")),
        (("mini-kl", "--run.stepps", "1"), ("run.stepps: unknown key", "'steps'")),
    ],
)
def test_a_wrong_option_is_one_line(
    sweep_here: Callable[..., Outcome], arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    """That names the value and what would do."""
    outcome = sweep_here(*arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert all(words in outcome.err for words in said), outcome.err


def test_seeds_are_ranges_and_lists() -> None:
    """In the order in which they are given."""
    assert parse_seeds("0-2") == (0, 1, 2)
    assert parse_seeds("7, 2-3") == (7, 2, 3)
    with pytest.raises(ConfigError):
        parse_seeds("-1")


@pytest.mark.parametrize(("users", "threads"), [(None, "3"), ("", "3"), ("5", "5")])
def test_a_run_has_its_share_of_the_processors(users: str | None, threads: str) -> None:
    """Unless the user has said how many threads it shall have."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if users is None else {"OMP_NUM_THREADS": users}
    command = ["/bin/sh", "-c", WITH_THREADS, "3", "/usr/bin/env"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"OMP_NUM_THREADS={threads}" in said.splitlines()


def made(seed: int, **values: Any) -> dict[str, Any]:
    """A run of `sweep.json` that is done."""
    run = {"seed": seed, "done": True, "steps": 60, "images": 7680, "seconds": 100.0, "kl": None}
    return run | {"before": {"reward": 6.0, "label_accuracy": None}, "after": None} | values


def test_the_table_gives_means_and_extremes() -> None:
    """Of the seeds that are done, and a dash for what is not known; worked out by hand."""
    runs = [
        made(0, kl=0.1, after={"reward": 7.0, "label_accuracy": None}),
        made(1, kl=0.3, after={"reward": 7.5, "label_accuracy": None}),
        made(2, done=False, kl=9.0),
    ]
    points = [{"name": "0|1", "value": 0.1, "recipe": "r", "runs": runs}]
    content = {"name": "s", "summary": "Some.", "axis": "β", "points": points}
    head, ((*cells,),) = rows(content)
    assert dict(zip(head, cells, strict=True)) == {
        "β": "0|1",
        "seeds": "2 of 3",
        "reward": "6.000 → 7.250 [7.000, 7.500]",
        "label accuracy": "–",
        "KL": "0.200 [0.100, 0.300]",
        "steps": "60",
        "images": "7,680",
        "seconds": "100",
    }
    text = markdown(content)
    assert "| 0\\|1 | 2 of 3 | 6.000 → 7.250 [7.000, 7.500] | – | 0.200 [0.100, 0.300] | 60 | 7,680 | 100 |" in text
    assert "Missing: 0|1 (seed 2)." in text


@pytest.mark.parametrize("name", sweep_names())
def test_every_sweep_loads_and_says_what_it_takes(name: str) -> None:
    """Its head comment holds command, hardware, time and result; the settings of all its points are valid."""
    head = (SWEEPS / f"{name}.yaml").read_text().partition("summary:")[0]
    for words in (f"Command:  python -m trainer.sweep {name}", "Hardware:", "Time:", "Result:"):
        assert words in head, words
    _, file = read_sweep(name)
    assert "\n" not in file.summary
    runs = Plan(name, file, Path("runs") / name).runs([0])
    assert [run.point for run in runs] == [point.name for point in file.points]


@pytest.mark.parametrize("name", [name for name in sweep_names() if "groups" in name])
def test_group_sizes_are_compared_at_equal_images_and_updates(name: str) -> None:
    """And each run writes four or five states, and as many grids."""
    _, file = read_sweep(name)
    configs = [run.config for run in Plan(name, file, Path("runs") / name).runs([0])]
    assert [config.rollout.group_size for config in configs] == [2, 4, 8, 16, 32]
    assert [point.value for point in file.points] == [2, 4, 8, 16, 32]
    images = {c.rollout.labels * c.rollout.group_size * c.run.steps for c in configs}
    assert len(images) == len({c.optim.minibatch for c in configs}) == len({c.optim.lr for c in configs}) == 1
    assert {c.run.steps // every for c in configs for every in (c.checkpoint.every, c.run.grid_every)} <= {4, 5}
