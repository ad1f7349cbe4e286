"""The programme: its commands, what it makes of the numbers, the page that it fills."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError
from trainer.evaluate.__main__ import _parser as evaluate_parser
from trainer.reproduce import document
from trainer.reproduce.__main__ import main
from trainer.reproduce.claims import Claim, claims, rank_correlation
from trainer.reproduce.numbers import Programme, read
from trainer.reproduce.stages import (
    GROUPS,
    KL,
    PAPER,
    SWEEPS,
    evaluation,
    expected_minutes,
    folder_of,
    plan_of,
    programme,
)
from trainer.run_folder import hold
from trainer.sweep.found import next_folder

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
WHOLE = RESULTS.read_bytes()
SEEDS = (0, 1)
MEASURES = {
    "score/mini-aesthetic": (6.0, 7.5),
    "score/mini-clip: a painting": (0.2, 0.5),
    "score/mini-clip: an old picture": (0.2, 0.5),
    "accuracy/top1": (0.96, 0.95),
    "style/photo": (0.95, 0.2),
    "style/old picture": (0.05, 0.0),
    "style/painting": (0.0, 0.8),
    "style/sketch": (0.0, 0.0),
    "painted": (0.0, 0.7),
    "colourfulness": (50.0, 100.0),
    "diversity": (0.3, 0.2),
}


def run_of(sweep: str, point: str, seed: int) -> dict[str, Any]:
    """A run that meets every bar."""
    before = {"reward": 6.0, "raw_score": 6.0, "raw_score/it": 6.0, "success_rate": 0.08, "label_accuracy": 0.96}
    after = {"reward": 7.5, "raw_score": 7.5, "raw_score/it": 7.5, "success_rate": 0.99, "label_accuracy": 0.95}
    if sweep == KL and point == "0":
        after["label_accuracy"] = 0.3
    if sweep == GROUPS:
        after["reward"] = 6 + 0.01 * int(point)
    folder, done = f"{point}/x-seed-{seed}", {"steps": 40, "seconds": 100.0, "images": 5120, "kl": 0.2}
    same = {"reward": 7.0, "raw_score": 7.0, "success_rate": None, "label_accuracy": 0.9}
    return {"seed": seed, "folder": folder, "done": True, **done, **same, "before": before, "after": after}


def numbers(folder: Path) -> Path:
    """What a programme of two seeds has written."""
    for sweep in SWEEPS:
        points = plan_of(folder, sweep).file.points
        content = {
            "name": sweep,
            "summary": "",
            "axis": None,
            "points": [
                {"name": each.name, "value": each.value, "runs": [run_of(sweep, each.name, s) for s in SEEDS]}
                for each in points
            ],
        }
        write(folder / sweep / "sweep.json", content)
    names = ["pretrained", *(p.name for p in plan_of(folder, PAPER).file.points)]
    names += [f"β {p.name}" for p in plan_of(folder, KL).file.points]
    for seed in SEEDS:
        rows = []
        for name in names:
            measures = {
                key: {"mean": values[name != "pretrained"], "low": 0.0, "high": 1.0, "std": 0.1}
                for key, values in MEASURES.items()
            }
            if name == "painting-aesthetic":
                measures["colourfulness"] = measures["colourfulness"] | {"mean": 120.0}
            split = {"images": 512, "classes": 16, "measures": measures}
            rows.append({"name": name, "splits": {"all": split, "seen": split, "unseen": split}})
        for plain in (True, False):
            content = {"torch": "2", "device": "cpu", "threads": 1, "rows": rows}
            write(evaluation(folder, seed, plain=plain) / "evaluation.json", content)
    return folder


def write(path: Path, content: object) -> None:
    """JSON, with the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def found(programme: Programme) -> dict[str, Claim]:
    """The claims by their text."""
    return {claim.text: claim for claim in claims(programme)}


def measured(programme: Programme, row: str, name: str, value: float, split: str = "all") -> None:
    """Says another number of a policy, for all seeds."""
    for seed in SEEDS:
        content = next(each for each in programme.plain[seed]["rows"] if each["name"] == row)["splits"]
        # the splits of a row were one object before they were written
        content[split]["measures"][name]["mean"] = value


def ran(programme: Programme, sweep: str, point: str, name: str, value: float) -> None:
    """Says another number of what a run came to, for all seeds."""
    for seed in SEEDS:
        programme.run(sweep, point, seed)["after"][name] = value


def test_every_claim_holds_where_every_bar_is_met(tmp_path: Path) -> None:
    """And each has what every seed says."""
    every = claims(read(numbers(tmp_path), SEEDS))
    assert [claim.text for claim in every if not claim.holds] == []
    assert all(len(claim.seeds) == len(SEEDS) for claim in every)


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (lambda p: ran(p, PAPER, "bright", "success_rate", 0.94), "bright reaches its target"),
        (lambda p: ran(p, PAPER, "dark", "success_rate", 0.5), "dark reaches its target"),
        (lambda p: ran(p, PAPER, "aesthetic", "raw_score", 6.9), "aesthetic rises by about a point"),
        (lambda p: ran(p, PAPER, "aesthetic", "label_accuracy", 0.9), "… and the label survives"),
        (
            lambda p: measured(p, "aesthetic-half", "score/mini-aesthetic", 6.8, "unseen"),
            "trained on half of the labels, the unseen rise as well",
        ),
        (
            lambda p: measured(p, "old-picture", "score/mini-clip: an old picture", 0.39),
            '"an old picture" comes quickly',
        ),
        (
            lambda p: measured(p, "painting", "score/mini-clip: a painting", 0.39),
            '"a painting" rises without demonstrations',
        ),
        (
            lambda p: measured(p, "painting", "style/painting", 0.49),
            "paintings are discovered, by the judge of style, which no reward has seen",
        ),
        (lambda p: measured(p, "pretrained", "painted", 0.02), "paintings are discovered, by their pixels"),
        (
            lambda p: measured(p, "painting-aesthetic", "score/mini-aesthetic", 5.9),
            "painting with aesthetic: both scores rise",
        ),
        (
            lambda p: measured(p, "painting-aesthetic", "colourfulness", 99.0),
            "… and the pictures stay colourful",
        ),
        (lambda p: ran(p, KL, "0", "label_accuracy", 0.8), "without KL the policy hacks the reward"),
        (lambda p: ran(p, GROUPS, "2", "reward", 6.05), None),
        (
            lambda p: [ran(p, GROUPS, size, "reward", 9 - int(size) / 9) for size in ("2", "4", "8", "16")],
            "more samples a group help at fixed compute",
        ),
    ],
)
def test_a_claim_that_misses_its_bar_does_not_hold(
    tmp_path: Path, spoil: Callable[[Programme], object], broken: str | None
) -> None:
    """And no other is touched by it; an exception to the rise with G is named."""
    programme = read(numbers(tmp_path), SEEDS)
    spoil(programme)
    every = found(programme)
    assert [text for text, claim in every.items() if not claim.holds] == ([broken] if broken else [])
    if broken is None:
        assert "falls: G 2 → 4" in every["more samples a group help at fixed compute"].together


def test_half_the_diversity_is_hacking_too(tmp_path: Path) -> None:
    """The claim is met by the labels or by the variety."""
    programme = read(numbers(tmp_path), SEEDS)
    ran(programme, KL, "0", "label_accuracy", 0.9)
    measured(programme, "β 0", "diversity", 0.1)
    assert found(programme)["without KL the policy hacks the reward"].holds


def test_rank_correlation_is_spearmans() -> None:
    """By hand: 1 − 6 Σd² / (n (n² − 1)) without ties; ties share their rank; a constant has none."""
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / 60)
    assert rank_correlation([1, 2, 3], [5, 5, 6]) == pytest.approx(0.8660254)
    assert rank_correlation([1, 2], [3, 3]) == 0


def test_what_is_not_done_is_not_written_down(tmp_path: Path) -> None:
    """A run that is missing is named."""
    folder = numbers(tmp_path)
    path = folder / PAPER / "sweep.json"
    content = json.loads(path.read_text())
    content["points"][2]["runs"][1]["done"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="aesthetic: seed 1 is not done; run the programme first"):
        read(folder, SEEDS)
    assert read(folder, (0,)).seeds == (0,)


def test_the_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    """The page of the documents has all marks; what stands outside them stays, and filling twice is filling once."""
    page = tmp_path / "results.md"
    shutil.copy(RESULTS, page)
    programme = read(numbers(tmp_path / "programme"), SEEDS)
    document.write(page, programme)
    first = page.read_text()
    document.write(page, programme)
    assert page.read_text() == first
    assert "| bright reaches its target | success ≥ 95 % | 99.0 % | 99.0 % | 99.0 % | yes |" in first
    outside = [line for line in RESULTS.read_text().splitlines() if line.startswith("#")]
    assert [line for line in first.splitlines() if line.startswith("#")] == outside


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (b"# Results\n", "<!-- begin: provenance -->"),
        (WHOLE.replace(b"<!-- begin: kl -->", b"<!-- begin: kl -->\nprose\n<!-- begin: kl -->"), "begin: kl --> and"),
        (WHOLE.replace(b"<!-- end: kl -->", b"<!-- end: kl -->\nprose\n<!-- end: kl -->"), "begin: kl --> and"),
        (WHOLE.replace(b": kl -->", b": k -->").replace(b"begin: k ", b"end: kl ").replace(b"end: k ", b"begin: kl "),
         "begin: kl --> and"),
        (WHOLE + b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_filled_is_refused(tmp_path: Path, page: bytes | None, words: str) -> None:
    """Before any work, and it stays as it was."""
    path = tmp_path / "results.md"
    if page is not None:
        path.write_bytes(page)
    with pytest.raises(ConfigError, match=re.escape(words)):
        document.write(path, read(numbers(tmp_path / "programme"), SEEDS))
    assert main(["--dir", str(tmp_path / "none"), "--results", str(path)]) == 2
    assert not (tmp_path / "none").exists()
    assert (path.read_bytes() if page is not None else None) == page


def test_a_run_that_left_a_folder_without_a_state_is_where_it_began_anew(tmp_path: Path) -> None:
    """As the sweep finds it, which lets go of the first folder."""
    run = plan_of(tmp_path, PAPER).runs([0])[0]
    first = folder_of(run)
    first.mkdir(parents=True)
    (first / "config.yaml").write_text("")
    assert folder_of(run) == first
    again = next_folder(run)
    assert again != first
    (again / "states" / "step_000001").mkdir(parents=True)
    assert folder_of(run) == again
    later = [stage for stage in programme(tmp_path, [0], 1, ()) if stage.arguments[0] != "trainer.sweep"]
    assert all(any(str(again) in argument for argument in stage.arguments) for stage in later)
    assert not any(argument.endswith(str(first)) for stage in later for argument in stage.arguments)


def test_a_folder_is_one_reproductions_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second stops before it does anything, exit 2; it is not a stage that has failed."""
    with hold(tmp_path):
        assert main(["--dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {tmp_path}: another reproduction is at work there; wait for it, or give another --dir"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_programme_is_commands_that_exist_and_fits_its_time(tmp_path: Path) -> None:
    """Every stage's options are known to its command; a seed takes under two hours, three under six."""
    stages = list(programme(tmp_path, [0, 1], 2, ()))
    assert [stage.arguments[:2] for stage in stages[:3]] == [("trainer.sweep", name) for name in SWEEPS]
    assert stages[-1].arguments[0] == "trainer.report"
    for stage in stages[3:-1]:
        module, *arguments = stage.arguments
        assert module == "trainer.evaluate"
        options = evaluate_parser().parse(arguments)
        assert options.models[0] == "pretrained=miniature"
    assert 10 < expected_minutes(tmp_path, [0]) < 120
    assert expected_minutes(tmp_path, [0, 1, 2]) < 360
