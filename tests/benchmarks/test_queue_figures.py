"""The queue's benchmark measures what it says: figures that cannot be otherwise are as they must be."""

import json
from pathlib import Path

import pytest

from benchmarks.queue import MEMORY_SIDE, REQUEST_IMAGES, SIDE, main

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.redis]

PIXELS, WAITING_PIXELS = 3 * SIDE * SIDE, 3 * MEMORY_SIDE * MEMORY_SIDE
"""Bytes of an image."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict[str, float]]]]:
    """What a short run keeps."""
    file: Path = tmp_path_factory.mktemp("queue") / "figures.json"
    few = ["--rounds", "1", "--seconds", "1", "--workers", "1,2", "--images", str(8 * REQUEST_IMAGES)]
    assert main([*few, "--json", str(file)]) == 0
    kept = json.loads(file.read_text())
    assert kept["about"]["rounds"] == 1
    results: dict[str, dict[str, list[dict[str, float]]]] = kept["results"]
    return results


def test_two_workers_do_the_work_of_two(figures: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """And nobody does more than the sleep allows, but for what was in hand when the counting began."""
    (one,), (two,) = figures["workers"]["1"], figures["workers"]["2"]
    assert two["images_s"] > 1.5 * one["images_s"]
    for row in (one, two):
        assert 0.5 < row["of_ideal"] < 1.1
        assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_the_log_holds_pixels_only_where_they_go_through_redis(
    figures: dict[str, dict[str, list[dict[str, float]]]],
) -> None:
    """Without a log nothing is written; with one each image once, or a reference in its place."""
    rows = {name: row for name, (row,) in figures["aof"].items()}
    assert rows["shared memory, no AOF"]["aof_bytes"] == rows["through Redis, no AOF"]["aof_bytes"] == 0
    assert 0 < rows["shared memory, AOF"]["aof_bytes"] < PIXELS / 10
    assert PIXELS < rows["through Redis, AOF"]["aof_bytes"] < 1.5 * PIXELS
    assert all(row["idle_p50_ms"] < row["p50_ms"] for row in rows.values())


def test_a_waiting_image_is_held_by_its_api_and_at_most_once_more(
    figures: dict[str, dict[str, list[dict[str, float]]]],
) -> None:
    """The API keeps it until it is answered; Redis has it, too, unless the memory is shared.

    A tenth more or less is what comes and goes besides: some MB over 128 images.
    """
    (shared,), (plain,) = figures["memory"]["shared memory"], figures["memory"]["through Redis"]
    assert 0.9 * WAITING_PIXELS < shared["api"] < 1.3 * WAITING_PIXELS
    assert shared["redis"] < WAITING_PIXELS / 100
    assert 0.9 * WAITING_PIXELS < plain["redis"] < 1.5 * WAITING_PIXELS
    assert plain["api"] > 0.8 * WAITING_PIXELS
