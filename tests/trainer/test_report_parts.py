"""What the report is put together from: groups of runs, series, grids, charts, sweeps."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer.test_report import Page, made_run
from trainer.evaluation import GRID_ROWS
from trainer.options import load_config, parse_overrides
from trainer.pictures import save_grid
from trainer.report.charts import COLOURS, Chart, Dots, Line, draw
from trainer.report.files import FileError
from trainer.report.grids import column_names, make_gallery, make_strips, read_grids
from trainer.report.page import Report, render
from trainer.report.runs import Run, Summary, group_runs, read_metrics
from trainer.report.series import POINTS, block_of, group_series
from trainer.report.settings_table import command_of, settings_of
from trainer.report.sweeps import final_charts, read_sweep


def metrics_line(step: int, **values: float | None) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, **values}) + "\n"


def test_runs_are_grouped_by_their_settings(tmp_path: Path) -> None:
    """Seeds stand together; another setting makes another group, named by it; places and names make none."""
    runs = [
        made_run(tmp_path / name, "", summary={}, grpo={"beta": beta}, run={"seed": seed, "name": name, "dir": name})
        for name, beta, seed in (("a", 0.1, 1), ("b", 0.1, 0), ("c", 0.2, 0), ("d", 0.1, 0))
    ]
    groups = group_runs(runs)
    assert [group.name for group in groups] == ["made (beta 0.1)", "made (beta 0.2)"]
    assert [run.name for run in groups[0].runs] == ["b", "d", "a"]
    assert [groups[0].label(run) for run in groups[0].runs] == ["seed 0 (b)", "seed 0 (d)", "seed 1"]
    assert (groups[0].seeds, groups[1].seeds) == (2, 1)
    assert render(Report("runs", runs, [], [])).count("<br><small>of 2 seeds</small></td>") == 1
    (alone,) = group_runs(runs[2:3])
    assert alone.name == "made"
    begun = [made_run(tmp_path / f"e-{seed}", "", run={"seed": seed, "name": f"e-seed-{seed}"}) for seed in (0, 1)]
    assert [group.name for group in group_runs(begun)] == ["e"]
    settings = settings_of(groups[0])
    differing = {setting.key: setting.value for setting in settings if setting.differs}
    assert settings[: len(differing)] == [setting for setting in settings if setting.differs]
    assert differing["grpo.beta"] == "0.1"
    assert differing["run.seed"] == "0, 1"
    assert "rewards.0.weight" not in differing


def test_a_command_takes_the_run_again(tmp_path: Path) -> None:
    """The recipe that comes along with what was changed; else the run's own settings."""
    options = ["--grpo.beta", "0.02", "--rewards.0.prompt", "'on'", "--rollout.classes", "[1, 2]", "--optim.lr", "1e-5"]
    config = load_config("mini-painting", parse_overrides(options))
    run = Run(tmp_path, config, {}, [], Summary(**summary_of("mini-painting")), {})
    words = command_of(run)
    assert words.startswith("python -m trainer.run mini-painting --")
    assert load_config("mini-painting", parse_overrides(shlex.split(words)[4:])) == config
    other = Run(tmp_path, config, {}, [], Summary(**summary_of("mine.yaml")), {})
    assert command_of(other) == f"python -m trainer.run {tmp_path / 'config.yaml'}"


def summary_of(recipe: str) -> dict[str, Any]:
    """A summary without numbers."""
    return {"recipe": recipe, "seed": 0, "steps": 40, "seconds": 1.0, "before": None, "after": None}


def test_the_spread_is_over_the_steps_that_all_runs_have(tmp_path: Path) -> None:
    """Mean, smallest and largest by hand; null values and cut lines do not count; unfinished ones stand beside."""
    first = "".join(metrics_line(step, reward=step * 1.0, kl=None) for step in (1, 2, 3))
    second = (
        metrics_line(1, reward=3.0) + metrics_line(2, reward=None) + metrics_line(3, reward=5.0) + '{"step": 4, "re'
    )
    third = metrics_line(1, reward=100.0) + '{"step": 2, "reward": NaN}\n'
    finished = {"summary": {}}
    runs = [
        made_run(tmp_path / "a", first, run={"seed": 0}, **finished),
        made_run(tmp_path / "b", second, run={"seed": 1}, **finished),
        made_run(tmp_path / "c", third, run={"seed": 2}),
    ]
    (group,) = group_runs(runs)
    assert group.averaged == (runs[0], runs[1])
    assert read_metrics(tmp_path / "c")[1]["reward"] is None
    spread, averaged, cut = group_series(group, "reward", 1)
    assert spread is not None
    assert len(averaged) == 2
    assert spread.steps_C.tolist() == [1, 3]
    assert spread.mean_C.tolist() == [2, 4]
    assert (spread.low_C.tolist(), spread.high_C.tolist()) == ([1, 3], [3, 5])
    assert [each.values_N.tolist() for each in cut] == [[100.0]]
    assert group_series(group, "kl", 1) == (None, [], [])


def test_a_long_curve_is_a_mean_of_blocks(tmp_path: Path) -> None:
    """No more points than a chart can show, and the mean stays."""
    steps = 2 * POINTS + 1
    run = made_run(tmp_path / "run", "".join(metrics_line(step, reward=step % 7) for step in range(1, steps + 1)))
    assert block_of([run]) == 3
    (group,) = group_runs([run])
    spread, _, _ = group_series(group, "reward", 3)
    assert spread is not None
    assert len(spread.steps_C) == -(-steps // 3)
    assert spread.steps_C[:2].tolist() == [2, 5]
    assert spread.mean_C[0] == pytest.approx((1 + 2 + 3) / 3)
    assert spread.steps_C[-1] == steps


def test_grids_are_cut_where_they_were_put_together(tmp_path: Path) -> None:
    """A cell is the sample that was saved; rows are seeds, columns labels."""
    run = made_run(tmp_path / "run", "", summary={})
    images = np.random.default_rng(0).integers(0, 256, (GRID_ROWS * 3, 5, 5, 3), dtype=np.uint8)
    for step in range(20):
        save_grid(run.folder / "grids" / f"step_{step:06d}.png", images + np.uint8(step), columns=3)
    drawn = read_grids(run, 12)
    assert drawn is not None
    assert (drawn.saved, drawn.side, len(drawn.grids)) == (20, 5, 12)
    assert [drawn.grids[at].step for at in (0, -1)] == [0, 19]
    assert np.array_equal(drawn.grids[0].cells_SLHW3, images.reshape(GRID_ROWS, 3, 5, 5, 3))
    Image.new("RGB", (30, 27)).save(run.folder / "grids" / "step_000020.png")
    with pytest.raises(FileError, match="30×27 pixels are no grid of 4 rows of square samples"):
        read_grids(run, 12)


def test_a_grid_is_replaced_by_a_whole_one_alone(tmp_path: Path) -> None:
    """What a kill leaves is the grid from before, not a part of a new one: who has it open reads all of it."""
    path, images = tmp_path / "step_000000.png", np.zeros((2, 64, 64, 3), dtype=np.uint8)
    save_grid(path, images, columns=2)
    whole = path.read_bytes()
    with path.open("rb") as before:
        save_grid(path, images + np.uint8(1), columns=2)
        assert before.read() == whole
    assert path.read_bytes() != whole
    assert list(tmp_path.iterdir()) == [path]


def test_columns_are_the_labels_that_a_grid_shows(tmp_path: Path) -> None:
    """By name; every so-many-th where there are many; numbered where nobody knows them."""
    miniature = made_run(tmp_path / "a", "")
    assert column_names(miniature, 16)[:3] == ["ball", "star", "heart"]
    some = made_run(tmp_path / "b", "", rollout={"classes": [1, 5]})
    assert column_names(some, 2) == ["star", "mushroom"]
    many = made_run(tmp_path / "c", "", rollout={"classes": "0-99"}, model={"classifier": "none"})
    assert column_names(many, 16)[:2] == ["label 0", "label 6"]
    assert column_names(many, 3) == ["column 1", "column 2", "column 3"]


def test_pictures_keep_to_their_share(tmp_path: Path) -> None:
    """Fewer labels, seeds and steps where they take too much room; large samples are made smaller; the page says so."""
    run = made_run(tmp_path / "run", "", summary={}, model={"classifier": "none"})
    images = np.random.default_rng(0).integers(0, 256, (GRID_ROWS * 8, 130, 130, 3), dtype=np.uint8)
    for step in (0, 1, 2):
        save_grid(run.folder / "grids" / f"step_{step:06d}.png", images, columns=8)
    drawn = read_grids(run, 12)
    assert drawn is not None
    (group,) = group_runs([run])
    for most in (2_000_000, 700_000):
        gallery, strips = make_gallery(group, {run: drawn}, most), make_strips(group, drawn, most)
        assert sum(len(picture.uri) for _, picture in gallery.pictures) <= most
        assert sum(len(picture.uri) for _, row in strips.rows for picture in row) <= most
        assert {picture.width % 128 for _, row in strips.rows for picture in row} == {0}
    assert gallery.left_out.endswith("1 of 4 seeds, 128 of 130 pixels a side")
    assert "of 8 labels" in gallery.left_out
    assert [name for name, _ in gallery.pictures] == ["before training", "after 2 steps, seed 0"]
    smallest = make_strips(group, drawn, 0)
    assert (smallest.steps, len(smallest.rows)) == ([0, 2], 1)
    assert smallest.left_out == "1 of 8 labels, 2 of 3 saved steps, 128 of 130 pixels a side"


def test_a_chart_takes_its_colours_from_the_page() -> None:
    """No colour of its own, no size, no name that another chart has; the same chart is the same text."""
    x_N = np.arange(4.0)
    parts = tuple(part(x_N, x_N + at, colour=at) for at in range(COLOURS + 1) for part in (Line, Dots))
    chart = Chart("alt <&>", "step", "reward $a$", parts, ticks={0.0: "<b> $x$ 模", 1.0: "&"})
    svg = draw(chart)
    assert svg == draw(chart)
    assert "#0" not in svg.replace('href="#', "").replace("url(#", "")
    assert "<style" not in svg
    assert "width=" not in svg.partition(">")[0]
    assert 'aria-label="alt &lt;&amp;&gt;"' in svg
    assert "&lt;b&gt; $x$ 模" in svg
    names, others = (set(Page(draw(each)).ids) for each in (chart, Chart("other", "step", "reward", parts)))
    assert names
    assert not names & others


def write_sweep(folder: Path, values: list[float | None]) -> Path:
    """A sweep of one finished run at each value, whose reward is its place."""
    points = []
    for place, value in enumerate(values):
        after = {"reward": float(place), "label_accuracy": None}
        made_run(folder / str(place) / "run", metrics_line(2, kl=place / 10), summary={"after": after})
        runs = [{"seed": 0, "folder": f"{place}/run", "done": True}]
        points.append({"name": f"p{place}", "value": value, "runs": runs})
    content = {"name": "made", "summary": "", "axis": None, "points": points}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("values", "scale", "places"),
    [
        ([0.1, 0.2, 0.4], "linear", [0.1, 0.2, 0.4]),
        ([0.01, 0.1, 1.0], "log", [0.01, 0.1, 1.0]),
        ([0.0, 0.01, 1.0], "symlog", [0.0, 0.01, 1.0]),
        ([0.1, None, 0.4], "linear", [0, 1, 2]),
        ([0.1, 0.1, 0.4], "linear", [0, 1, 2]),
    ],
)
def test_the_points_of_a_sweep_stand_by_value(
    tmp_path: Path, values: list[float | None], scale: str, places: list[float]
) -> None:
    """On an axis that tells them apart; side by side where they have none of their own."""
    charts = final_charts(read_sweep(write_sweep(tmp_path / "sweep", values)))
    assert [chart.y for chart in charts] == ["final reward", "final KL", "seconds"]
    assert {chart.scale for chart in charts} == {scale}
    assert list(charts[0].ticks or {}) == places
    line, dots = charts[0].parts
    assert line.x_N.tolist() == dots.x_N.tolist() == places
    assert line.y_N.tolist() == [0, 1, 2]
    for chart in charts:
        draw(chart)
