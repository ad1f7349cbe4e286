"""Every full-size recipe starts, from checkpoints in the official layout, and runs against real reward services.

The weights are made by a formula or at random, so nothing is downloaded: what is held here is that it runs and writes
all that it should, and not what comes of it.
"""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from benchmarks.formula import fill
from services.redis_server import RedisServer
from tests.services.conftest import Process
from tests.vit_l_14 import ON_A_CPU, environment, make_model, save_head, save_model
from trainer.checkpoint import MANIFEST, TENSORS, VALUES
from trainer.models.checkpoints import PUBLISHED_VQVAE, load_var
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.options import load_config, recipe_names

ROOT = Path(__file__).resolve().parents[2]
KEYS = ROOT / "tests" / "golden" / "state_dict_keys.json"
FEW_SCALES = (1, 2, 3, 4)
SLOW_D30 = "painting-aesthetic-d30"
"""The d30 recipe of `make test-slow`, which has two of d16 besides; `make test-long` has the rest."""
LABEL, STEPS, GROUP_SIZE, GRID_ROWS = 499, 2, 2, 4
ON_THE_CPU = {"run.device": "cpu", "run.dtype": "float32", "run.decode_dtype": "float32"}
IN_BFLOAT16 = {"run.device": "cpu", "rollout.labels": "2", "optim.minibatch": "4"}
ON_A_GPU = {"rollout.labels": "2", "rollout.group_size": "16", "rollout.chunk": "16", "optim.minibatch": "32"}
RUN_S = 540.0

pytestmark = [pytest.mark.redis, pytest.mark.alone, pytest.mark.timeout(900)]


def recipes(size: str) -> list[str]:
    """The full-size recipes of a size, whichever there are."""
    return [name for name in recipe_names() if name.endswith(f"-{size}")]


class Pair(NamedTuple):
    """A transformer and a tokenizer in files such as are published, and their shapes."""

    var: Path
    vqvae: Path
    config: VARConfig
    image_size: int


def publish(folder: Path, name: str, config: VARConfig, vqvae: VQVAEConfig, device: str = "cpu") -> Pair:
    """Write both as bare state dicts by `torch.save`, filled by the formula."""
    folder.mkdir()
    pair = Pair(folder / f"{name}.pth", folder / PUBLISHED_VQVAE, config, vqvae.image_size)
    for path, make in ((pair.var, lambda: VAR(config)), (pair.vqvae, lambda: VQVAE(vqvae))):
        with torch.device(device):
            module: nn.Module = make()
        fill(module)
        torch.save(module.state_dict(), path)
        del module
    gc.collect()
    return pair


def emptied(folder: Path) -> Iterator[Path]:
    """A folder that holds gigabytes for as long as it is needed."""
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """Where a run may write."""
    yield from emptied(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the weights are that all share."""
    yield from emptied(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def urls(weights: Path) -> Iterator[Mapping[str, str]]:
    """`clip` and `aesthetic` over one ViT-L/14, served for all runs."""
    settings = environment(save_model(make_model(), weights), save_head(weights))
    gc.collect()
    if not torch.cuda.is_available():
        settings |= ON_A_CPU
    with RedisServer() as redis, (weights / "services.log").open("w+b") as log:
        arguments = ("serve", "clip", "aesthetic", "--port", "0", "--announce")
        process = Process(arguments, settings | {"REDIS_URL": redis.url}, log)
        try:
            yield process.announced()["rewards"]
        finally:
            process.close()


@pytest.fixture(scope="module")
def classifier(weights: Path) -> Path:
    """The folder in which torchvision finds a ResNet-50, and so downloads none."""
    torch.manual_seed(0)
    folder = weights / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(resnet50().state_dict(), folder / Path(ResNet50_Weights.IMAGENET1K_V2.url).name)
    return weights / "torch"


@pytest.fixture(scope="module")
def d16(weights: Path) -> Pair:
    """In the published shape."""
    return publish(weights / "d16", "var_d16", VARConfig.for_depth(16), VQVAEConfig())


@pytest.fixture(scope="module")
def coarse_d16(weights: Path) -> Pair:
    """Every block and channel of the published shape, and four scales: pictures of 64×64 in 30 tokens."""
    config = replace(VARConfig.for_depth(16), patch_nums=FEW_SCALES)
    return publish(weights / "coarse", "var_d16", config, VQVAEConfig(patch_nums=FEW_SCALES))


@pytest.fixture(scope="module")
def small(weights: Path) -> Pair:
    """Two blocks and four scales, in the same layout."""
    config = VARConfig(2, 128, 2, FEW_SCALES, vocab_size=64, latent_channels=8)
    return publish(weights / "small", "var_d2", config, VQVAEConfig(64, 8, ch=32, patch_nums=FEW_SCALES))


@pytest.fixture(scope="module")
def d30(weights: Path) -> Pair:
    """In the published shape."""
    return publish(weights / "d30", "var_d30", VARConfig.for_depth(30), VQVAEConfig(), "cuda")


Train = Callable[[str, Pair, Mapping[str, str]], Path]


@pytest.fixture
def train(runs: Path, urls: Mapping[str, str], classifier: Path) -> Train:
    """Runs two steps of a recipe on as few images as it takes, as a process; returns the run's folder."""

    def run(recipe: str, pair: Pair, options: Mapping[str, str]) -> Path:
        chosen = {
            "model.var": pair.var,
            "model.vqvae": pair.vqvae,
            "rollout.labels": 1,
            "rollout.group_size": GROUP_SIZE,
            "rollout.classes": [LABEL],
            "rollout.chunk": GROUP_SIZE,
            "optim.minibatch": GROUP_SIZE,
            "eval.samples": 1,
            "run.steps": STEPS,
            "run.dir": runs,
            "run.seed": 1,
            **served(recipe, urls),
            **options,
        }
        command = [sys.executable, "-m", "trainer.run", recipe, *(f"--{key}={value}" for key, value in chosen.items())]
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TORCH_HOME": str(classifier)},
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return runs / recipe

    return run


def served(recipe: str, urls: Mapping[str, str]) -> dict[str, str]:
    """The options that give a recipe's rewards of ViT-L/14 by url; a run starts the others itself."""
    config = load_config(recipe, {})
    return {
        f"{section}.{place}.url": urls[reward.name]
        for section, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards))
        for place, reward in enumerate(rewards)
        if reward.name in urls
    }


def check_run(folder: Path, recipe: str, pair: Pair) -> None:
    """All that a run of two steps should leave is there, and every number in it is one."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    boards = {name for name in found if name.startswith("tensorboard/events.")}
    grids = {f"grids/step_{step:06d}.png" for step in (0, STEPS)}
    assert len(boards) == 1
    assert found - boards - {"services.log"} == {
        ".lock",
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoint/var.safetensors",
        *(f"states/step_0000000{step}/{name}" for step in (0, STEPS) for name in (TENSORS, VALUES, MANIFEST)),
        *grids,
    }
    for grid in grids:
        with Image.open(folder / grid) as image:
            assert image.width == pair.image_size
            assert image.height >= GRID_ROWS * pair.image_size

    config = load_config(recipe, {})
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["grpo"] == config.to_dict()["grpo"]
    assert [(each["name"], each["weight"], each["prompt"], each["shape"]) for each in written["rewards"]] == [
        (each["name"], each["weight"], each["prompt"], each["shape"]) for each in config.to_dict()["rewards"]
    ]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    summary = json.loads((folder / "summary.json").read_text())
    optimised = [f"raw_score/{reward.name}" for reward in config.rewards]
    watched = [f"raw_score/{reward.name}" for reward in config.eval.rewards]
    for line in lines:
        assert_numbers(line, ["reward", "kl", "entropy", "grad_norm", "label_accuracy", *optimised])
    for when in ("before", "after"):
        measured = ["reward", "label_accuracy", *optimised, *watched]
        assert_numbers(summary[when], measured)
        if config.eval.inference:
            assert_numbers(summary[when], [f"inference/{name}" for name in measured])
    check_checkpoint(folder / "checkpoint" / "var.safetensors", pair, learnt=has_choice(lines))


def assert_numbers(values: Mapping[str, Any], names: Sequence[str]) -> None:
    """These are there, and nothing is infinite or NaN."""
    assert all(math.isfinite(value) for value in values.values() if value is not None), values
    for name in names:
        assert values[name] is not None, name


def has_choice(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the images of any group were worth different rewards; two that both miss a threshold are not."""
    return any(line["zero_variance_groups"] < 1 for line in lines)


def check_checkpoint(path: Path, pair: Pair, *, learnt: bool) -> None:
    """It has the layout of what it began with, and other weights where there was something to learn."""
    written, began = load_file(path), torch.load(pair.var, weights_only=True, mmap=True)
    assert {name: (entry.shape, entry.dtype) for name, entry in written.items()} == {
        name: (entry.shape, entry.dtype) for name, entry in began.items()
    }
    with torch.device("meta"):
        model = VAR(pair.config)
    model.load_state_dict(written, strict=True, assign=True)
    assert load_var(path).config == pair.config
    assert all(entry.isfinite().all() for name, entry in written.items() if name != "attn_bias_for_masking")
    if learnt:
        assert not torch.equal(written["head.weight"], began["head.weight"])


def official(name: str) -> dict[str, torch.Size]:
    """Names and shapes of a published checkpoint."""
    entries = json.loads(KEYS.read_text())[name]
    return {key: torch.Size(shape) for key, shape in entries.items() if isinstance(shape, list)}


@pytest.mark.long
@pytest.mark.parametrize("recipe", recipes("d16"))
def test_a_d16_recipe_runs_in_full_on_the_cpu(recipe: str, train: Train, d16: Pair) -> None:
    """Two steps of two images of 256×256; what is written has the names and shapes of the published file."""
    folder = train(recipe, d16, ON_THE_CPU)
    check_run(folder, recipe, d16)
    written = load_file(folder / "checkpoint" / "var.safetensors")
    assert {name: entry.shape for name, entry in written.items()} == official("var_d16")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["aesthetic-d16"])
def test_a_d16_recipe_runs_in_width_on_the_cpu(recipe: str, train: Train, coarse_d16: Pair) -> None:
    """All of the transformer, on pictures of few tokens."""
    check_run(train(recipe, coarse_d16, ON_THE_CPU), recipe, coarse_d16)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bright-d16"])
def test_a_d16_recipe_runs_small_on_the_cpu(recipe: str, train: Train, small: Pair) -> None:
    """Its own settings, by a transformer of two blocks."""
    check_run(train(recipe, small, ON_THE_CPU), recipe, small)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.slow if name == SLOW_D30 else pytest.mark.long) for name in recipes("d30")],
)
def test_a_d30_recipe_runs_small_on_the_cpu(recipe: str, train: Train, small: Pair) -> None:
    """The path that it takes on a GPU, with its precision and micro-batch, by a transformer of two blocks."""
    check_run(train(recipe, small, IN_BFLOAT16), recipe, small)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", recipes("d16"))
def test_a_d16_recipe_runs_on_a_gpu(recipe: str, train: Train, d16: Pair) -> None:
    """With the recipe's precision."""
    check_run(train(recipe, d16, ON_A_GPU), recipe, d16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", recipes("d30"))
def test_a_d30_recipe_runs_on_a_gpu(recipe: str, train: Train, d30: Pair) -> None:
    """With the recipe's precision and micro-batch; 80 GB."""
    check_run(train(recipe, d30, ON_A_GPU), recipe, d30)
