"""`python -m trainer.sample`: the pictures it writes, what they hold, and which policies it finds."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from tests.trainer.conftest import Outcome, make_vqvae
from tests.trainer.test_run import assert_failed
from trainer.contact_sheet import SETTINGS
from trainer.evaluate.__main__ import main as evaluate_main
from trainer.evaluate.measures import thumbnails
from trainer.inference.drawing import draw
from trainer.inference.loading import load_policy
from trainer.inference.sampling import Sampling
from trainer.inference.sources import find_sources
from trainer.models.checkpoints import load_var, save_var, save_vqvae
from trainer.run import main as run_main
from trainer.sample import main, parse_seeds
from trainer.var_policy import VarPolicy

Sample = Callable[..., Outcome]
CPU = torch.device("cpu")
OFFICIAL = Sampling(False, 1.5, 900, 0.96, 1.0)
SIDE = 8
STATE_FILES = ("manifest.json", "state.safetensors", "values.json")


@pytest.fixture
def sample(capsys: pytest.CaptureFixture[str]) -> Sample:
    """Runs the command in this process."""

    def runner(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([*map(str, arguments), "--device", "cpu"])
        return Outcome(code, *capsys.readouterr())

    return runner


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Path:
    """The folder of a real run of two steps on the labels 0 and 2, with a state before, between and after."""
    folder = tmp_path_factory.mktemp("runs")
    content = {
        "model": models,
        "rollout": {"labels": 2, "group_size": 4, "chunk": 8, "classes": [0, 2]},
        "optim": {"lr": 0.01, "minibatch": 4},
        "rewards": [{"name": "brightness"}],
        "eval": {"samples": 4},
        "checkpoint": {"every": 1, "keep": 3},
        "run": {"dir": str(folder), "steps": 2, "device": "cpu"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    assert run_main([str(folder / "tiny.yaml")]) == 0
    return folder / "tiny"


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a PNG holds."""
    with Image.open(path) as picture:
        content: dict[str, Any] = json.loads(picture.info[SETTINGS])
    return content


def loaded(text: object, vqvae: str | None = None) -> VarPolicy:
    """The policy of a source."""
    (source,) = find_sources([str(text)], vqvae)
    return load_policy(source, CPU, "float32")


def read(path: Path) -> NDArray[np.uint8]:
    """A PNG's pixels."""
    return np.asarray(Image.open(path))


def parts_of(sheet: Path, rows: int, columns: int, panels: int = 1) -> NDArray[np.uint8]:
    """The images of a sheet, (panels, rows, columns, 8, 8, 3), found from its right and lower edges."""
    pixels, wide = read(sheet), columns * (SIDE + 2) - 2
    top = pixels.shape[0] - 4 - (rows * (SIDE + 2) - 2)
    found = []
    for panel in range(panels):
        left = pixels.shape[1] - 4 - (panels - panel) * wide - (panels - panel - 1) * 12
        cells = [
            pixels[top + r * 10 : top + r * 10 + SIDE, left + c * 10 : left + c * 10 + SIDE]
            for r in range(rows)
            for c in range(columns)
        ]
        found.append(np.stack(cells).reshape(rows, columns, SIDE, SIDE, 3))
    return np.stack(found)


@pytest.mark.redis
def test_the_reference_stands_beside_what_became_of_it(sample: Sample, run: Path, tmp_path: Path) -> None:
    """`--compare`: a panel of what the run began with and one of its end, drawn from the same random numbers."""
    outcome = sample(run, "--compare", "--labels", "2,0", "--seeds", "5,0-1", "--out", tmp_path / "pair.png")
    assert outcome.code == 0, outcome.err
    panels = parts_of(tmp_path / "pair.png", 2, 3, panels=2)
    keys = [(label, seed) for label in (2, 0) for seed in (5, 0, 1)]
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    for panel, var in zip(panels, (config["var"], run / "checkpoint" / "var.safetensors"), strict=True):
        policy = VarPolicy(load_var(var), make_vqvae(), range(4))
        images = draw(policy, [k[0] for k in keys], [0] * 6, OFFICIAL, seeds=[k[1] for k in keys])
        assert np.array_equal(panel.reshape(images.shape), images)
    assert not np.array_equal(*panels)
    assert [model["name"] for model in settings_of(tmp_path / "pair.png")["models"]] == ["pretrained", "tiny"]


@pytest.mark.redis
def test_a_run_is_found_by_its_folder_a_state_or_its_checkpoint(run: Path) -> None:
    """The folder is its end; a state is that step; a state from before the first step is the reference."""
    end = loaded(run).digest()
    assert end == loaded(run / "checkpoint" / "var.safetensors").digest()
    assert end == loaded(run / "states" / "step_00000002").digest()
    start = loaded(run / "states" / "step_00000000").digest()
    between = loaded(run / "states" / "step_00000001").digest()
    assert len({start, between, end}) == 3
    pretrained, _ = find_sources(["pretrained", str(run)], None)
    assert load_policy(pretrained, CPU, "float32").digest() == start


@pytest.mark.redis
def test_a_run_is_found_from_within(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name also where its path has none."""
    for folder, text, name in (
        ("states/step_00000002", ".", "tiny@2"),
        ("states", "step_00000001", "tiny@1"),
        ("checkpoint", "..", "tiny"),
        (".", ".", "tiny"),
        (".", "checkpoint/var.safetensors", "tiny"),
    ):
        monkeypatch.chdir(run / folder)
        (source,) = find_sources([text], None)
        assert source.name == name
        assert load_policy(source, CPU, "float32").length == 21


@pytest.mark.redis
def test_what_lies_among_the_states_is_refused(run: Path, tmp_path: Path, sample: Sample) -> None:
    """By one line, as itself and as the last state of its run."""
    (tmp_path / "tiny" / "states" / "step_00000002 (copy)").mkdir(parents=True)
    for name in ("config.yaml", "checkpoint/var.safetensors"):
        (tmp_path / "tiny" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tiny" / name).write_bytes((run / name).read_bytes())
    for folder in (tmp_path / "tiny" / "states" / "step_00000002 (copy)", tmp_path / "tiny"):
        assert_failed(sample(folder, "--out", tmp_path / "a.png"), "step_00000002 (copy): no state", code=2)


@pytest.mark.redis
def test_an_unfinished_run_is_its_last_state(run: Path, tmp_path: Path) -> None:
    """Without a checkpoint; with a state later than the checkpoint, for the run went on."""
    copy = tmp_path / "copy"
    for name in ("config.yaml", *(f"states/step_0000000{step}/{file}" for step in (0, 1, 2) for file in STATE_FILES)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((run / name).read_bytes())
    end = loaded(run).digest()
    assert loaded(copy).digest() == end
    (source,) = find_sources([str(copy)], None)
    assert source.state == copy / "states" / "step_00000002"
    save_var(copy / "checkpoint" / "var.safetensors", loaded(copy / "states" / "step_00000001").var, {"steps": "1"})
    assert loaded(copy).digest() == end


@pytest.mark.redis
def test_the_run_tells_which_labels_it_has_seen(run: Path, tmp_path: Path) -> None:
    """An evaluation of a run tells them from the others, without being told."""
    few = ["--per-class", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert evaluate_main(["pretrained", str(run), *few]) == 0
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["seen"] == [0, 2]
    assert [[row["name"], *row["splits"]] for row in content["rows"]] == [
        ["pretrained", "all", "seen", "unseen"],
        ["tiny", "all", "seen", "unseen"],
    ]


@pytest.mark.redis
def test_a_state_whose_beginning_is_gone_is_refused(run: Path, tmp_path: Path, sample: Sample) -> None:
    """The file that the run began from holds other weights now: exit 1, not other pictures."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    save_vqvae(tmp_path / "vqvae.safetensors", make_vqvae(seed=1))
    copy = tmp_path / "copy"
    for file in STATE_FILES:
        (copy / "states" / "step_00000001").mkdir(parents=True, exist_ok=True)
        target = copy / "states" / "step_00000001" / file
        target.write_bytes((run / "states" / "step_00000001" / file).read_bytes())
    config["model"]["vqvae"] = str(tmp_path / "vqvae.safetensors")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert_failed(sample(copy, "--out", tmp_path / "a.png"), "hold other weights than those", code=1)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
@pytest.mark.redis
def test_adapters_in_a_state_draw_as_the_merged_checkpoint(run: Path, tmp_path: Path) -> None:
    """LoRA: the state holds adapters alone, the checkpoint is merged; few pixels differ."""
    recipe = run.parent / "tiny.yaml"
    options = ["--model.lora.rank", "2", "--model.lora.alpha", "4", "--run.dir", str(tmp_path)]
    assert run_main([str(recipe), *options]) == 0
    keys = [(label, seed) for label in range(4) for seed in range(16)]
    images = [
        draw(loaded(source), [k[0] for k in keys], [0] * 64, OFFICIAL, seeds=[k[1] for k in keys])
        for source in (tmp_path / "tiny", tmp_path / "tiny" / "states" / "step_00000002", run)
    ]
    assert (images[0] != images[1]).mean() < 0.01
    assert (images[0] != images[2]).mean() > 0.1


def test_the_picture_holds_what_makes_it_again(sample: Sample, tmp_path: Path) -> None:
    """The command in a PNG draws the same PNG, byte for byte; labels may be given by name."""
    path = tmp_path / "a.png"
    options = ("--labels", "ice cream,3", "--seeds", "7", "--per-seed", 2, "--top-k", 112, "--zoom", 2)
    assert sample("miniature", *options, "--out", path).code == 0
    settings, content = settings_of(path), path.read_bytes()
    assert settings["sampling"] == {"plain": False, "guidance": 1.5, "top_k": 112, "top_p": 0.96, "temperature": 1.0}
    assert settings["label_seed_index"] == [[15, 7, 0], [15, 7, 1], [3, 7, 0], [3, 7, 1]]
    assert settings["models"][0]["weights"] == loaded("miniature").digest()
    program, flag, module, *arguments = shlex.split(settings["command"])
    assert (program, flag, module) == ("python", "-m", "trainer.sample")
    path.unlink()
    assert main(arguments) == 0
    assert path.read_bytes() == content


def test_samples_are_those_that_are_evaluated(sample: Sample, tmp_path: Path) -> None:
    """Of the same seed, label and index."""
    plain = ["miniature", "--plain", "--labels", "tree", "--device", "cpu"]
    evaluation = ["--seed", "7", "--per-class", "2", "--out", str(tmp_path / "evaluation")]
    assert evaluate_main([*plain, *evaluation]) == 0
    assert sample(*plain, "--seeds", "7", "--per-seed", 2, "--out", tmp_path / "each").code == 0
    (measured,) = (load_file(path)["thumbnails"] for path in tmp_path.rglob("chunk_*.safetensors"))
    images = np.stack([read(path) for path in sorted((tmp_path / "each").iterdir())])
    assert np.array_equal(measured, thumbnails(images))


def test_each_image_is_a_file_of_a_folder(sample: Sample, models: dict[str, str], tmp_path: Path) -> None:
    """Named for model, label, seed and index; as in the grid, and each with its own settings."""
    tiny = (models["var"], "--vqvae", models["vqvae"], "--plain", "--labels", "1", "--seeds", "2-3", "--per-seed", 2)
    assert sample(*tiny, "--out", tmp_path / "each").code == 0
    assert sample(*tiny, "--out", tmp_path / "grid.png").code == 0
    (grid,) = parts_of(tmp_path / "grid.png", 1, 4)
    names = [f"var_0001_seed{seed}_{index}.png" for seed in (2, 3) for index in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == names
    for name, expected in zip(names, grid[0], strict=True):
        assert np.array_equal(read(tmp_path / "each" / name), expected)
    assert settings_of(tmp_path / "each" / names[1])["label_seed_index"] == [[1, 2, 1]]
    assert len({expected.tobytes() for expected in grid[0]}) == 4


@pytest.mark.parametrize(
    ("names", "file"), [(("", ""), "miniature"), (("run 1=", "run-1="), "run-1"), (("a/b=", "a:b="), "a-b")]
)
def test_no_model_overwrites_anothers_files(sample: Sample, tmp_path: Path, names: tuple[str, str], file: str) -> None:
    """Names that would be the same as a file's are refused before anything is drawn; a sheet may show them."""
    models, few = [f"{name}miniature" for name in names], ("--labels", "0", "--seeds", "0")
    outcome = sample(*models, *few, "--out", tmp_path / "each")
    assert_failed(outcome, f"two models would be named {file}_….png: tell them apart by NAME=MODEL", code=2)
    assert not list(tmp_path.iterdir())
    assert sample(*models, *few, "--out", tmp_path / "sheet.png").code == 0


def test_a_folder_has_no_limit_of_pixels(sample: Sample, tmp_path: Path) -> None:
    """What a sheet is too small for is drawn in chunks, of which each is written before the next one is begun."""
    broken, many = tmp_path / "broken.pth", ("--labels", "0", "--seeds", "0-5", "--zoom", 64, "--vqvae", "miniature")
    assert_failed(sample("miniature", *many, "--out", tmp_path / "a.png"), "1 × 6 images of 4096×4096", code=2)
    broken.write_bytes(b"no weights")
    assert_failed(sample("miniature", broken, *many, "--chunk", 4, "--out", tmp_path / "a"), "broken.pth", code=1)
    names = {f"miniature_0000_seed{seed}_0.png" for seed in range(6)}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert sample("miniature", *many, "--chunk", 6, "--out", tmp_path / "b").code == 0
    for name in names:
        assert np.array_equal(read(tmp_path / "a" / name), read(tmp_path / "b" / name))


def test_a_file_keeps_its_models_name(sample: Sample, tmp_path: Path) -> None:
    """Underscores, and letters of any script."""
    names = ("猫", "犬", "run_1", "run-1")
    models, few = [f"{name}=miniature" for name in names], ("--labels", "0", "--seeds", "0")
    assert sample(*models, *few, "--out", tmp_path).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_0000_seed0_0.png" for name in names}


def test_sampling_settings_reach_the_policy(sample: Sample, models: dict[str, str], tmp_path: Path) -> None:
    """Each of them changes the picture; greedy sampling does not depend on the seed."""
    tiny = (models["var"], "--vqvae", models["vqvae"], "--labels", "0", "--seeds", "0-7")

    def drawn(*options: object) -> bytes:
        assert sample(*tiny, *options, "--out", tmp_path / "a.png").code == 0
        return parts_of(tmp_path / "a.png", 1, 8).tobytes()

    settings = ((), ("--guidance", 0), ("--top-k", 2), ("--top-p", 0.3), ("--temperature", 3), ("--plain",))
    cold = ("--plain", "--temperature", 0.3)
    assert len({drawn(*options) for options in (*settings, cold)}) == len(settings) + 1
    greedy = np.frombuffer(drawn("--top-k", 1), dtype=np.uint8).reshape(8, SIDE, SIDE, 3)
    assert (greedy == greedy[0]).all()


def test_models_of_other_sizes_are_not_put_side_by_side(sample: Sample, models: dict[str, str], tmp_path: Path) -> None:
    """A sheet has the same rows and columns for all."""
    outcome = sample(models["var"], "miniature", "--vqvae", models["vqvae"], "--out", tmp_path / "a.png")
    assert_failed(outcome, "miniature and var have other labels or sizes", code=2)


def test_seeds_are_numbers_and_ranges() -> None:
    """In the order in which they are given."""
    assert parse_seeds("3,0-2") == (3, 0, 1, 2)


WRONG: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ("required: [NAME=]MODEL",)),
    (("miniatur",), ("the nearest is 'miniature'",)),
    (("miniature", "--compare"), ("name the run as well",)),
    (("miniature", "--labels", "mushrom"), ("the nearest is 'mushroom'",)),
    (("miniature", "--labels", "5-2"), ("5-2 runs backwards; write 2-5",)),
    (("miniature", "--labels", "16"), ("there is no label 16; the nearest is 15",)),
    (("miniature", "--seeds", "x"), ("'x' is no seed",)),
    (("miniature", "--seeds", "0,1-3,2"), ("--seeds: 2 is given twice",)),
    (("miniature", "--seeds", "0-99999"), ("100000 seeds; give from 1 to 10,000",)),
    (("miniature", "--seeds", "9-1"), ("give from 1",)),
    (("miniature", "--topk", "3"), ("unknown option --topk: the nearest is '--top-k'",)),
    (("miniature", "--top-p", "0"), ("'0' is not a number above 0 to 1",)),
    (("miniature", "--temperature", "0"), ("not a number above 0",)),
    (("miniature", "--dtype", "float3"), ("unknown 'float3'; the nearest is 'float32'",)),
    (("miniature", "--plain", "--guidance", "1"), ("--plain samples without --guidance",)),
    (("miniature", "--zoom", "64", "--seeds", "0-99"), ("pixels, more than 100,000,000", "--zoom")),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_what_is_wrong_is_one_line(
    sample: Sample, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Exit 2, nothing written."""
    assert_failed(sample(*arguments, "--out", tmp_path / "a.png"), *words, code=2)
    assert not list(tmp_path.iterdir())
