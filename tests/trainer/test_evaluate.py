"""`python -m trainer.evaluate`, as people run it: what it measures, and how it fails."""

import json
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from services.rewards.brightness import Brightness
from tests.services.conftest import descendants, wait_until
from tests.trainer.conftest import Outcome
from tests.trainer.test_run import FailsAtLast, assert_failed
from trainer.config import Config
from trainer.evaluate.__main__ import main
from trainer.inference.drawing import draw
from trainer.inference.loading import load_policy
from trainer.inference.sampling import Sampling
from trainer.inference.sources import PolicySource
from trainer.judges import make_judge
from trainer.local_rewards import LocalRewards
from trainer.miniature.objects import CLASSES
from trainer.miniature.quality import held_out
from trainer.miniature.rating import colourfulness
from trainer.miniature.render import POLICY_WORLD

Evaluate = Callable[..., Outcome]
CPU = torch.device("cpu")
MINIATURE = PolicySource("miniature", "miniature", "miniature", "miniature")


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Real services of two rewards, for all tests here."""
    with LocalRewards(["brightness", "mini-clip"], tmp_path_factory.mktemp("services") / "log") as services:
        yield services.urls


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Evaluate:
    """Runs the command in this process, its results in a folder of the test."""

    def runner(*arguments: object, out: Path = tmp_path / "out") -> Outcome:
        capsys.readouterr()
        code = main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
        return Outcome(code, *capsys.readouterr())

    return runner


def result(folder: Path) -> dict[str, Any]:
    """What an evaluation has written."""
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def mean(row: dict[str, Any], name: str, split: str = "all") -> Any:
    """The mean of a measure."""
    return row["splits"][split]["measures"][name]["mean"]


def chunk_files(folder: Path) -> dict[str, int]:
    """The chunks that are kept, and when each was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("chunk_*.safetensors")}


def samples(labels: list[int], per_class: int, sampling: Sampling) -> NDArray[np.uint8]:
    """The images that are evaluated, drawn apart from the command."""
    keys = [(label, index) for label in labels for index in range(per_class)]
    policy = load_policy(MINIATURE, CPU, "float32")
    return draw(policy, [k[0] for k in keys], [k[1] for k in keys], sampling, seeds=[5] * len(keys))


@pytest.mark.redis
def test_the_miniature_is_measured(evaluate: Evaluate, urls: dict[str, str], tmp_path: Path) -> None:
    """Every number is that of the samples, computed apart; the table shows it; images of a label are its own."""
    scores = ("--reward", f"brightness={urls['brightness']}", "--reward", f"mini-clip={urls['mini-clip']}")
    prompts = ("--prompt", "a painting", "--prompt", "an old picture")
    settings = (
        "--top-k",
        112,
        "--seed",
        5,
        "--per-class",
        3,
        "--labels",
        "ball,3-4,cup",
        "--seen",
        "0-3",
        "--chunk",
        12,
    )
    outcome = evaluate("miniature", *scores, *prompts, *settings)
    assert outcome.code == 0, outcome.err
    content, images = result(tmp_path / "out"), samples([0, 3, 4, 9], 3, Sampling(False, 1.5, 112, 0.96, 1.0))
    (row,) = content["rows"]
    luma = Brightness().score(images, None)
    labels = np.repeat([0, 3, 4, 9], 3)
    judge = make_judge("miniature", CPU)
    assert judge is not None
    assert mean(row, "score/brightness") == pytest.approx(luma.mean(), abs=1e-12)
    assert mean(row, "score/brightness", "seen") == pytest.approx(luma[:6].mean(), abs=1e-12)
    assert mean(row, "score/brightness", "unseen") == pytest.approx(luma[6:].mean(), abs=1e-12)
    assert mean(row, "colourfulness") == pytest.approx(colourfulness(images).mean(), abs=1e-12)
    assert row["splits"]["all"]["measures"]["score/brightness"]["std"] == pytest.approx(luma.std(), abs=1e-12)
    assert mean(row, "accuracy/top1") == judge(images, labels) <= mean(row, "accuracy/top5")
    assert sum(mean(row, f"style/{style}") for style in ("photo", "old picture", "painting", "sketch")) == 1
    assert mean(row, "score/mini-clip: a painting") != mean(row, "score/mini-clip: an old picture")
    assert content["scores"][2]["model"].startswith("mini-clip ")
    assert [row["splits"][split]["images"] for split in ("all", "seen", "unseen")] == [12, 6, 6]
    table = (tmp_path / "out" / "table.md").read_text()
    assert outcome.out.strip() in table
    assert re.search(r"\| miniature, unseen labels \| 6 \| 0\.\d{3} ± 0\.\d{3} \|", table)
    assert "guidance 1.5, top-k 112, top-p 0.96, seed 5" in table


def test_a_label_has_the_same_samples_in_any_company(evaluate: Evaluate, tmp_path: Path) -> None:
    """Random numbers belong to (seed, label, index): neither other labels nor more images change a sample."""
    alone, others = tmp_path / "alone", tmp_path / "others"
    plain = ("miniature", "--plain", "--chunk", 4)
    assert evaluate(*plain, "--labels", "tree", "--per-class", 2, out=alone).code == 0
    assert evaluate(*plain, "--labels", "ball,tree", "--per-class", 3, out=others).code == 0
    (few,) = (load_file(path)["thumbnails"] for path in alone.rglob("chunk_*.safetensors"))
    many = np.concatenate([load_file(path)["thumbnails"] for path in sorted(others.rglob("chunk_*.safetensors"))])
    assert np.allclose(few, many[3:5], atol=1 / 255)  # the batch may move a level
    assert not np.allclose(few[0], few[1], atol=0.05)
    assert mean(result(alone)["rows"][0], "accuracy/top1") == 1.0


def test_a_model_is_added_without_repeating_another(evaluate: Evaluate, models: dict[str, str], tmp_path: Path) -> None:
    """Chunks are kept by what they are of; another setting makes others, and the same command does nothing twice."""
    tiny = f"tiny={models['var']}"
    few = ("--vqvae", models["vqvae"], "--per-class", 2, "--chunk", 4)
    out = tmp_path / "out"
    assert evaluate(tiny, *few).code == 0
    (first,) = result(out)["rows"]
    kept = chunk_files(out)
    assert len(kept) == 2
    assert evaluate(f"again={models['var']}", tiny, *few).code == 0
    assert chunk_files(out) == kept
    rows = result(out)["rows"]
    assert rows[0]["splits"] == rows[1]["splits"] == first["splits"]
    for other in (("--seed", 1), ("--plain",), ("--guidance", 2), ("--top-k", 5), ("--dtype", "bfloat16")):
        before = len(chunk_files(out))
        assert evaluate(tiny, *few, *other).code == 0
        assert len(chunk_files(out)) == before + 2, other
    assert mean(first, "colourfulness") > 0
    assert first["splits"]["all"]["measures"]["accuracy/top1"] is None


def test_unseen_labels_are_those_of_the_run_that_had_some(
    evaluate: Evaluate, models: dict[str, str], tmp_path: Path
) -> None:
    """And of what it began with; a run that was trained on all labels has none."""
    for name, classes in (("half", [0, 1]), ("whole", [])):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        shutil.copy(models["var"], tmp_path / name / "checkpoint" / "var.safetensors")
        content = {"rewards": [{"name": "brightness"}], "rollout": {"classes": classes}}
        settings = Config.model_validate(content | {"model": {**models, "classifier": "none"}}).to_dict()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
    files = [tmp_path / name / "checkpoint" / "var.safetensors" for name in ("half", "whole")]
    outcome = evaluate("pretrained", *files, "--per-class", 1)
    assert outcome.code == 0, outcome.err
    splits = {row["name"]: list(row["splits"]) for row in result(tmp_path / "out")["rows"]}
    apart = ["all", "seen", "unseen"]
    assert splits == {"pretrained": apart, "half": apart, "whole": ["all"]}


@pytest.mark.redis
def test_a_service_is_started_where_none_is_named(evaluate: Evaluate, models: dict[str, str], tmp_path: Path) -> None:
    """And is gone afterwards, its log beside the results."""
    import os

    before = set(descendants(os.getpid()))
    outcome = evaluate(models["var"], "--vqvae", models["vqvae"], "--per-class", 1, "--reward", "brightness")
    assert outcome.code == 0, outcome.err
    assert "started for this evaluation" in outcome.err
    wait_until(lambda: set(descendants(os.getpid())) <= before)
    assert (tmp_path / "out" / "services.log").is_file()
    row = result(tmp_path / "out")["rows"][0]
    assert row["splits"]["all"]["measures"]["score/brightness"].keys() == {"mean", "low", "high", "std"}


def write_pictures(folder: Path, images: NDArray[np.uint8], names: list[str]) -> None:
    """PNGs in sub-folders of these names."""
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{index:03d}.png")


def test_a_folder_of_pictures_is_a_row(evaluate: Evaluate, tmp_path: Path) -> None:
    """Labels come from the sub-folders' names; unlabelled pictures have scores and no accuracy."""
    renders = held_out(48, POLICY_WORLD)
    write_pictures(tmp_path / "named", renders.images, [CLASSES[label] for label in renders.labels])
    write_pictures(tmp_path / "numbered", renders.images, [f"{label:03d}" for label in renders.labels])
    write_pictures(tmp_path / "flat", renders.images, ["."] * 48)
    folders = [option for name in ("named", "numbered", "flat") for option in ("--images", tmp_path / name)]
    outcome = evaluate(*folders, "--classifier", "miniature")
    assert outcome.code == 0, outcome.err
    named, numbered, flat = result(tmp_path / "out")["rows"]
    assert named["splits"]["all"]["images"] == 48
    assert mean(named, "accuracy/top1") >= 0.97
    # The order of the pictures differs, and so do the last digits of a mean.
    for measure in ("accuracy/top1", "colourfulness", "style/photo", "diversity"):
        assert mean(numbered, measure) == pytest.approx(mean(named, measure))
    assert mean(flat, "colourfulness") == pytest.approx(colourfulness(renders.images).mean())
    assert flat["splits"]["all"]["measures"]["accuracy/top1"] is None
    assert flat["splits"]["all"]["measures"]["diversity"] is None


def test_folders_of_any_name_are_compared_within(evaluate: Evaluate, tmp_path: Path) -> None:
    """Where neither a model nor a classifier knows the labels, the sub-folders tell them apart."""
    images = held_out(32).images
    for kind, names in (("named", ("a", "b c")), ("numbered", ("7", "30"))):
        write_pictures(tmp_path / kind, images, [names[index % 2] for index in range(32)])
        assert evaluate("--images", tmp_path / kind).code == 0
        (row,) = result(tmp_path / "out")["rows"]
        assert row["splits"]["all"]["classes"] == 2
        assert mean(row, "diversity") > 0.1
    assert_failed(evaluate("--images", tmp_path / "named", "--labels", "7"), "which labels there are", code=2)


def test_pictures_are_brought_to_one_size(evaluate: Evaluate, tmp_path: Path) -> None:
    """The shorter side is resized, the middle is taken; without a size they must be alike."""
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:, 6:54] = (200, 10, 10)  # the middle, and as much beside it as the filter sees
    write_pictures(tmp_path / "wide", image[None], ["."])
    outcome = evaluate("--images", tmp_path / "wide")
    assert_failed(outcome, "60×40", "--size", code=2)
    assert evaluate("--images", tmp_path / "wide", "--size", 20).code == 0
    assert mean(result(tmp_path / "out")["rows"][0], "colourfulness") == pytest.approx(
        colourfulness(np.full((1, 20, 20, 3), (200, 10, 10), dtype=np.uint8))[0]
    )


def test_imagenets_folders_are_labels_in_their_order(tmp_path: Path) -> None:
    """As many folders named by WordNet's ids as there are labels; one fewer is a mistake."""
    from trainer.config import ConfigError
    from trainer.evaluate.picture_folder import open_pictures

    names = ["n01443537", "n01440764", "n01484850"]
    write_pictures(tmp_path / "val", np.zeros((3, 8, 8, 3), dtype=np.uint8), names)
    pictures = open_pictures(tmp_path / "val", count=3, names=(), side=None, labels=None)
    assert [(file.parent.name, label) for file, label in zip(pictures.files, pictures.labels_N, strict=True)] == [
        ("n01440764", 0),
        ("n01443537", 1),
        ("n01484850", 2),
    ]
    shutil.rmtree(tmp_path / "val" / names[0])
    with pytest.raises(ConfigError, match="unknown label 'n01440764'"):
        open_pictures(tmp_path / "val", count=3, names=(), side=None, labels=None)


def test_a_damaged_picture_is_named(evaluate: Evaluate, tmp_path: Path) -> None:
    """It is not skipped, for then the row would be of other pictures than it says."""
    write_pictures(tmp_path / "some", np.zeros((2, 8, 8, 3), dtype=np.uint8), [".", "."])
    whole = (tmp_path / "some" / "001.png").read_bytes()
    (tmp_path / "some" / "001.png").write_bytes(whole[:-20])
    assert_failed(evaluate("--images", tmp_path / "some"), "001.png", "cut off", code=1)
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("size", [(), ("--size", 8)])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("empty", "999.png: no picture (it is none of PNG, JPEG, WEBP); mend it"),
        ("other", "999.png: no picture (it is none of PNG, JPEG, WEBP); mend it"),
        ("large", "999.png has more than 100,000,000 pixels; make it smaller"),
        ("huge", "999.png has more than 100,000,000 pixels; make it smaller"),  # Pillow does not open it
    ],
)
def test_what_is_no_picture_is_found_before_any_work(
    evaluate: Evaluate, tmp_path: Path, what: str, words: str, size: tuple[str, int] | tuple[()]
) -> None:
    """By its header, whichever row and place it has: not when it is come to, after hours perhaps."""
    write_pictures(tmp_path / "some", np.zeros((2, 8, 8, 3), dtype=np.uint8), [".", "."])
    content = {"empty": b"", "other": b"GIF89a" + bytes(100)}.get(what)
    if content is None:
        content = png_header(*{"large": (8_000, 13_000), "huge": (14_000, 14_000)}[what])
    (tmp_path / "some" / "999.png").write_bytes(content)
    assert_failed(evaluate("miniature", "--images", tmp_path / "some", *size), words, code=2)
    assert not (tmp_path / "out").exists()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that says how large it is, and has no pixels."""
    head, empty = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, empty))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


WRONG: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ("nothing to evaluate",)),
    (("miniture",), ("miniture: no such checkpoint", "the nearest is 'miniature'")),
    (("pretrained",), ("name the run as well",)),
    (("miniature", "--pr-class", "3"), ("unknown option --pr-class", "the nearest is '--per-class'")),
    (("miniature", "--per-class", "0"), ("--per-class: '0' is not a whole number from 1",)),
    (("miniature", "--guidance", "nan"), ("--guidance: 'nan' is not a number from 0",)),
    (("miniature", "--plain", "--top-k", "3"), ("--plain samples without --top-k",)),
    (("miniature", "--classifier", "minature"), ("--classifier", "the nearest is 'miniature'")),
    (("miniature", "--classifier", "imagenet"), ("knows 1000 labels, the models have 16",)),
    (("miniature", "--labels", "bal"), ("unknown label 'bal'", "the nearest is 'ball'")),
    (("miniature", "--classifier", "none", "--labels", "bal"), ("unknown label 'bal'", "the nearest is 'ball'")),
    (("miniature", "--labels", "3,2-4"), ("label 3 is there twice",)),
    (("miniature", "--seen", "8-16"), ("--seen: there is no label 16; the nearest is 15",)),
    (("miniature", "--reward", "brightnes"), ("unknown reward 'brightnes'", "the nearest is 'brightness'")),
    (("miniature", "--reward", "brightness=nowhere"), ("'nowhere'", "http://HOST:PORT")),
    (("miniature", "--prompt", "a painting"), ("name the reward first",)),
    (("miniature", "--reward", "brightness", "--reward", "brightness"), ("brightness is given twice",)),
    (("a=miniature", "a=miniature"), ("two rows are named 'a'",)),
    (("--images", "tests/trainers"), ("no such folder", "the nearest is 'tests/trainer'")),
    (("trainer/miniature/weights/var.safetensors",), ("--vqvae miniature",)),
    (("trainer/miniature",), ("no run's folder",)),
    (("FoundationVision/var:var_d17.pth",), ("the nearest is 'FoundationVision/var:var_d1",)),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_what_is_wrong_is_found_before_any_work(
    evaluate: Evaluate, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """One line, exit 2, nothing written."""
    assert_failed(evaluate(*arguments), *words, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.redis
def test_a_prompt_must_be_given_where_it_is_read_and_only_there(evaluate: Evaluate, urls: dict[str, str]) -> None:
    """The service says whether it reads prompts; before any sample is drawn."""
    few = ("miniature", "--per-class", 1)
    assert_failed(evaluate(*few, "--reward", f"mini-clip={urls['mini-clip']}"), "give it --prompt TEXT", code=2)
    wrong = evaluate(*few, "--reward", f"brightness={urls['brightness']}", "--prompt", "a painting")
    assert_failed(wrong, "does not read prompts", "leave its --prompt out", code=2)


@contextmanager
def failing_service(*, after: int, status: int) -> Iterator[str]:
    """A service that scores some batches, and then answers with a status."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FailsAtLast) as server:
        server.posts = 3 - after  # type: ignore[attr-defined]
        server.last_status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_service_that_stays_away_suspends(evaluate: Evaluate, models: dict[str, str], tmp_path: Path) -> None:
    """Exit 75 with the command that goes on; what is done is kept, no score is made up, and it goes on elsewhere."""
    out = tmp_path / "out"
    few = (models["var"], "--vqvae", models["vqvae"], "--per-class", 4, "--chunk", 4, "--score-timeout", 1)
    with failing_service(after=2, status=503) as url:
        outcome = evaluate(*few, "--reward", f"brightness={url}")
    assert_failed(outcome, "go on with: python -m trainer.evaluate", str(out), code=75)
    kept = chunk_files(out)
    assert len(kept) == 2
    assert not (out / "evaluation.json").exists()
    with failing_service(after=2, status=503) as url:  # back again, at another port
        outcome = evaluate(*few, "--reward", f"brightness={url}")
    assert outcome.code == 0, outcome.err
    assert kept.items() <= chunk_files(out).items()
    assert mean(result(out)["rows"][0], "score/brightness") == pytest.approx((0 + 0.25 + 0.5 + 0.75) / 4)


def test_a_service_that_fails_stops(evaluate: Evaluate, models: dict[str, str], tmp_path: Path) -> None:
    """A failure that does not pass: exit 1, and no results."""
    with failing_service(after=0, status=500) as url:
        outcome = evaluate(models["var"], "--vqvae", models["vqvae"], "--reward", f"brightness={url}")
    assert_failed(outcome, "500", "scoring failed", code=1)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_folder_is_held_by_one_evaluation(evaluate: Evaluate, models: dict[str, str], tmp_path: Path) -> None:
    """A second one does not write among the first one's results."""
    from trainer.run_folder import hold

    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"):
        outcome = evaluate(models["var"], "--vqvae", models["vqvae"])
    assert_failed(outcome, "another evaluation is at work there", "--out", code=2)
