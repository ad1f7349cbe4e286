"""`python -m trainer.report`, as people run it: what the page says of real runs, and how it fails."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.trainer.conftest import Outcome
from tests.trainer.report_folders import STEPS, Folders, make_folders
from tests.trainer.test_run import assert_failed
from trainer.config import Config
from trainer.pictures import save_grid
from trainer.report.__main__ import main
from trainer.report.runs import Run, read_run
from trainer.report.text import show

HOSTILE = "<script>alert('&\"')</script>"
SECTIONS = (
    "Results",
    "Settings",
    "Training curves",
    "Scores and accuracy",
    "Samples during training",
    "Samples before and after",
    "Reward against KL",
    "Scores that were not optimised",
    "Ablations",
)
Report = Callable[..., Outcome]


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Folders:
    """See `make_folders`; nobody may change them."""
    return make_folders(tmp_path_factory.getbasetemp() / "report", json.dumps(models))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Report:
    """Runs the command in this process; the page is `report.html` of the test's folder."""

    def runner(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([*map(str, arguments), "--out", str(tmp_path / "report.html")])
        return Outcome(code, *capsys.readouterr())

    return runner


class Page(HTMLParser):
    """What a reader finds in a page: text by section, tables, pictures, charts, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[dict[str, str | None]] = []
        self.charts: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self._section, self._label = "", ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what has a name."""
        named = dict(attrs)
        self.tags[tag] += 1
        self._open.append(tag)
        self.ids.update([str(named["id"])] if "id" in named else [])
        self.addresses += [str(named[name]) for name in ("src", "href", "xlink:href") if name in named]
        if tag == "img":
            self.pictures.append(named)
        elif tag == "svg":
            self.charts.append(str(named["aria-label"]))
        elif named.get("role") == "region":
            self._label = str(named["aria-label"])
            self.tables[self._label] = []
        elif tag == "tr":
            self.tables[self._label].append([])
        elif tag in {"th", "td"}:
            self.tables[self._label][-1].append("")

    def handle_data(self, data: str) -> None:
        """Text belongs to the section of the last heading, and to a cell where one is open."""
        words = " ".join(data.split())
        if self._open and self._open[-1] == "h2":
            self._section = words
        if words:
            self.texts[self._section] = self.texts.get(self._section, "") + f"{words} "
        if words and {"th", "td"} & set(self._open):
            self.tables[self._label][-1][-1] = f"{self.tables[self._label][-1][-1]} {words}".strip()

    def handle_endtag(self, tag: str) -> None:
        """Closes the element."""
        while self._open and self._open.pop() != tag:
            pass


def page_of(folder: Path) -> Page:
    """The page that the test has written."""
    return Page((folder / "report.html").read_text("utf-8"))


def made_run(folder: Path, lines: str, *, summary: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Run:
    """A run's folder written by hand, read back; it has 2 steps to take."""
    content: dict[str, Any] = {"rewards": [{"name": "brightness"}], "run": {"name": "made", "steps": 2}}
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(Config.model_validate(content).to_dict()))
    (folder / "metrics.jsonl").write_text(lines)
    if summary is not None:
        whole = {"recipe": "made", "seed": 0, "steps": 2, "seconds": 1.0, "before": {}, "after": {}} | summary
        (folder / "summary.json").write_text(json.dumps(whole))
    return read_run(folder)


def test_a_page_of_everything(report: Report, folders: Folders, tmp_path: Path) -> None:
    """All sections, with the numbers of the folders; one file that needs nothing else; the same bytes each time."""
    arguments = (*folders.seeds, folders.killed, "--evaluation", folders.evaluation, "--sweep", folders.sweep)
    outcome = report(*arguments)
    assert outcome.code == 0, outcome.err
    first = (tmp_path / "report.html").read_bytes()
    page = page_of(tmp_path)
    assert [name for name in page.texts if name] == list(SECTIONS)
    assert "Left out" not in "".join(page.texts.values())

    summaries = [json.loads((run / "summary.json").read_text()) for run in folders.seeds]
    means = [np.mean([each[when]["reward"] for each in summaries]) for when in ("before", "after")]
    results = page.tables["Results"]
    assert results[1][2].startswith(f"{show(means[0])} → {show(means[1])}")
    assert [row[1] for row in results[1:]] == ["2", "0 of 1 finished"]
    watched = "raw_score/mini-aesthetic"
    after = np.mean([each["after"][watched] for each in summaries])
    unoptimised = page.tables["Scores that were not optimised, before and after"]
    assert unoptimised[1][1] == "mini-aesthetic"
    assert unoptimised[1][3].startswith(show(after))
    assert any("mini-aesthetic by step" in chart for chart in page.charts)  # evaluated in between as well

    table = [line.strip("| ").split(" | ") for line in (folders.evaluation / "table.md").read_text().splitlines()[:5]]
    assert page.tables["Evaluation evaluation"] == [table[0], *table[2:]]
    assert "brightness" in table[0]  # which the runs optimise
    assert "brightness" not in page.tables["Columns of evaluation that were not optimised"][0]

    strips = page.tables["Samples of tiny by step"]
    assert strips[0] == ["step", *map(str, range(STEPS + 1))]
    assert [row[0] for row in strips[1:]] == [f"column {column}" for column in range(1, 5)]
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in page.pictures)
    sweep = page.tables["Sweep tiny-groups"]
    assert [row[:2] for row in sweep] == [["G", "runs"], ["4", "2 of 2"], ["2", "0 of 2"]]
    assert "Unfinished: 2: 0 of 2 runs" in page.texts["Ablations"]
    assert any("reward by images" in chart for chart in page.charts)  # for the sizes of the steps differ

    assert not {"script", "iframe", "object"} & set(page.tags)
    assert page.tags["html"] == page.tags["body"] == 1
    assert [name for name, count in page.ids.items() if count > 1] == []
    outside = {address for address in page.addresses if not address.startswith(("#", "data:"))}
    assert outside == {"https://arxiv.org/abs/2505.23331"}
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert report(*arguments).code == 0
    assert (tmp_path / "report.html").read_bytes() == first


def test_an_unfinished_run_is_shown_as_far_as_it_is(report: Report, folders: Folders, tmp_path: Path) -> None:
    """A line and a grid that a kill cut short are left out; the page names the run as unfinished."""
    assert report(folders.killed).code == 0
    page = page_of(tmp_path)
    assert f"unfinished, {STEPS - 1} of {STEPS} steps" in page.texts["Training curves"]
    assert any(f"at step {STEPS - 1}." in chart for chart in page.charts)
    assert page.tables["Samples of killed by step"][0] == ["step", *map(str, range(STEPS))]
    assert "–" in page.tables["Results"][1]


def test_a_section_without_its_input_says_what_it_needs(report: Report, folders: Folders, tmp_path: Path) -> None:
    """Each in a line."""
    assert report(folders.seeds[0]).code == 0
    page = page_of(tmp_path)
    left_out = {name for name, text in page.texts.items() if "Left out" in text}
    assert left_out == {"Scores and accuracy", "Scores that were not optimised", "Ablations"}
    assert "--evaluation FOLDER" in page.texts["Scores and accuracy"]
    assert "--sweep FOLDER" in page.texts["Ablations"]
    assert report("--evaluation", folders.evaluation).code == 0
    page = page_of(tmp_path)
    left_out = {name for name, text in page.texts.items() if "Left out" in text}
    assert left_out == set(SECTIONS) - {"Scores and accuracy"}
    assert all("RUN…" in page.texts[name] for name in left_out - {"Ablations"})


def test_what_a_file_says_is_text(report: Report, folders: Folders, tmp_path: Path) -> None:
    """Names, prompts and titles that look like HTML are shown as they are."""
    for name in ("run", "evaluation", "sweep"):
        shutil.copytree({"run": folders.killed}.get(name) or getattr(folders, name), tmp_path / name)
    for path in (tmp_path / "run", tmp_path / "sweep" / "4" / "tiny-seed-0"):
        config = yaml.safe_load((path / "config.yaml").read_text())
        config |= {"summary": HOSTILE, "rewards": [config["rewards"][0] | {"prompt": HOSTILE}]}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    for path, change in (
        (tmp_path / "run" / "versions.json", {"device": HOSTILE}),
        (tmp_path / "sweep" / "sweep.json", {"name": HOSTILE, "summary": HOSTILE, "axis": HOSTILE}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    evaluation["rows"][0]["name"] = evaluation["command"] = f"{HOSTILE} | \ud800"
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    given = (tmp_path / "run", "--evaluation", tmp_path / "evaluation", "--sweep", tmp_path / "sweep")
    outcome = report(*given, "--title", HOSTILE)
    assert outcome.code == 0, outcome.err
    page = page_of(tmp_path)
    assert "script" not in page.tags
    for section in ("", "Settings", "Scores and accuracy", "Reward against KL", "Ablations"):
        assert HOSTILE in page.texts[section], section
    assert page.tables["Evaluation evaluation"][1][0].startswith(f"{HOSTILE} | ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("nothing to report", "--sweep FOLDER")),
        (("runs/tinny",), ("runs/tinny: no such folder", "the nearest is 'runs/tiny'")),
        (("runs",), ("runs: not a run's folder", "it has no config.yaml", "it holds such folders")),
        (("runs/tiny", "runs/../runs/tiny"), ("given twice",)),
        (("runs/tiny", "--evaluation", "runs/tiny"), ("not an evaluation's folder", "evaluation.json")),
        (("runs/tiny", "--sweep", "away"), ("away: no such folder; give a sweep's folder",)),
        (("runs/tiny", "--titel", "x"), ("unknown option --titel: the nearest is '--title'",)),
        (("runs/tiny", "--out", "runs"), ("--out runs is a folder", "runs/report.html")),
        (("runs/tiny", "--out", "/dev/null"), ("--out /dev/null is no regular file",)),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """In a line, with exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    made_run(Path("runs/tiny"), "")
    code = main(list(arguments))
    assert_failed(Outcome(code, *capsys.readouterr()), *words, code=2)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 2}\n', ("metrics.jsonl: line 2 is no step's metrics",)),
        ("metrics.jsonl", b'{"step": 1}\n{"reward": 2}\n{"step": 2}\n', ("metrics.jsonl: line 2",)),
        ("metrics.jsonl", b"\xff\n", ("byte 0 is not UTF-8",)),
        ("summary.json", b"{", ("summary.json: not JSON",)),
        ("summary.json", b'{"recipe": "x"}', ("summary.json: seed: Field required",)),
        ("versions.json", b"[" * 100_000, ("versions.json: not JSON",)),
        ("config.yaml", b"rewards: 3", ("config.yaml: not the settings of a run",)),
        ("grids/step_000000.png", b"no picture", ("step_000000.png: no picture",)),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    report: Report, tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    """In a line, with exit code 1."""
    run = made_run(tmp_path / "run", "", summary={})
    for step in (0, 2):
        save_grid(run.folder / "grids" / f"step_{step:06d}.png", np.zeros((8, 4, 4, 3), np.uint8), columns=2)
    assert report(run.folder).code == 0
    before = (tmp_path / "report.html").read_bytes()
    (run.folder / name).write_bytes(content)
    assert_failed(report(run.folder), *words)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the room that it takes."""
    run = made_run(tmp_path / "run", "")
    (tmp_path / "file").write_text("")
    code = main([str(run.folder), "--out", str(tmp_path / "file" / "report.html")])
    assert_failed(Outcome(code, *capsys.readouterr()), "cannot be written", "make room or name another folder")


def test_a_sweep_whose_run_is_gone_is_refused(report: Report, folders: Folders, tmp_path: Path) -> None:
    """A run that is said to be done must be there."""
    shutil.copytree(folders.sweep, tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "4" / "tiny-seed-1")
    assert_failed(report("--sweep", tmp_path / "sweep"), "4/tiny-seed-1 is done and not there")
