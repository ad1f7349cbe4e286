"""The examples work as the documents have them: served as processes, scored by the client, trained against."""

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from services.client import RewardClient, RewardRefused, ScoreResult
from services.rewards import create_reward

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
JPEG = "examples.jpeg_compressibility:JpegCompressibility"
IMAGES = np.random.default_rng(0).integers(0, 256, (70, 9, 7, 3), dtype=np.uint8)
EXAMPLE_LINES = 20
ONE_STEP = ["--run.steps", "1", "--rollout.labels", "2", "--optim.minibatch", "32", "--eval.samples", "16"]
"""What makes a recipe of the miniature's one small training step."""


@contextmanager
def serve_standalone() -> Iterator[str]:
    """Serve the standalone example; gives its address."""
    command = [sys.executable, "examples/standalone_service.py", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def standalone_service() -> Iterator[str]:
    """The address of the standalone example."""
    with serve_standalone() as url:
        yield url


@pytest.fixture(scope="module")
def jpeg_service() -> Iterator[str]:
    """The address of the class, served by our command."""
    command = [sys.executable, "-m", "services", "serve", JPEG, "--port", "0", "--announce", "--until-stdin-closes"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            (url,) = json.loads(process.stdout.readline())["rewards"].values()
            yield str(url)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def score(url: str, images_BHWC: NDArray[np.uint8], prompts: list[str] | None = None) -> ScoreResult:
    """Score by the client."""

    async def run() -> ScoreResult:
        async with RewardClient(url) as client:
            return await client.score(images_BHWC, prompts)

    return asyncio.run(run())


def jpeg_kilobytes(image_HWC: NDArray[np.uint8]) -> float:
    """The size of an image as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


def warmth(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the standalone service says it scores."""
    means: NDArray[np.float64] = (images_BHWC[..., 0].astype(float) - images_BHWC[..., 2]).mean(axis=(1, 2)) / 255
    return means


@pytest.mark.redis
def test_the_class_is_served_as_it_is(jpeg_service: str) -> None:
    """The very scores of a direct computation, in order, under a name made of the class's."""
    result = score(jpeg_service, IMAGES)
    assert result.scores.tolist() == [-jpeg_kilobytes(image_HWC) for image_HWC in IMAGES]
    assert (result.reward, result.version) == ("jpeg-compressibility", "0")
    assert len(set(result.scores.tolist())) > 1


def test_the_class_is_short() -> None:
    """A reward takes no more than this, blank lines included; a smooth picture is worth more than noise."""
    assert len((EXAMPLES / "jpeg_compressibility.py").read_text().splitlines()) <= EXAMPLE_LINES
    noise, smooth = create_reward(JPEG).score(np.stack([IMAGES[0], np.full_like(IMAGES[0], 90)]), None)
    assert noise < smooth < 0


def test_the_standalone_service_is_scored_by_the_client(standalone_service: str) -> None:
    """More images than it takes at once, as JSON, in order; a fault is named by its position in the batch."""
    result = score(standalone_service, IMAGES, ["a prompt"] * len(IMAGES))
    assert result.scores == pytest.approx(warmth(IMAGES), abs=1e-12)
    assert (result.reward, result.version) == ("warmth", "1")
    prompts = ["short"] * len(IMAGES)
    prompts[67] = "long" * 1000
    with pytest.raises(RewardRefused, match="1000 characters") as caught:
        score(standalone_service, IMAGES, prompts)
    assert (caught.value.status, caught.value.index) == (422, 67)


def test_the_standalone_service_stands_alone() -> None:
    """The standard library, numpy and Pillow; nothing of ours and no framework."""
    code = "import sys; sys.argv = ['x']; import runpy; runpy.run_path('examples/standalone_service.py', run_name='x')"
    code += "; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    known = {"numpy", "PIL", "defusedxml"} | set(sys.stdlib_module_names)
    assert "numpy" in loaded
    assert {name for name in loaded - known if not name.startswith("_")} <= {"sitecustomize", "usercustomize"}


def train(name: str, url: str, folder: Path) -> dict[str, float]:
    """The metrics of one small training step against a service."""
    command = [sys.executable, "-m", "trainer.run", "mini-bright", "--run.dir", str(folder), *ONE_STEP]
    command += ["--rewards.0.name", name, "--rewards.0.url", url, "--rewards.0.shape", "identity"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (folder / "mini-bright" / "metrics.jsonl").read_text().splitlines()
    metrics: dict[str, float] = json.loads(line)
    return metrics


def assert_trained_on(name: str, metrics: dict[str, float]) -> None:
    """The raw score was the reward, it told the samples apart, and the policy was updated by it."""
    assert metrics["reward"] == metrics[f"raw_score/{name}"] != 0
    assert metrics["reward_std"] > 0
    assert metrics["advantage_abs_mean"] > 0
    assert metrics["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.redis
def test_the_class_is_trained_against(jpeg_service: str, tmp_path: Path) -> None:
    """A JPEG of 64×64 pixels has between some hundred bytes and some kB."""
    metrics = train("jpeg-compressibility", jpeg_service, tmp_path)
    assert_trained_on("jpeg-compressibility", metrics)
    assert -10 < metrics["reward"] < -0.5


@pytest.mark.slow
def test_the_standalone_service_is_trained_against(standalone_service: str, tmp_path: Path) -> None:
    """By JSON alone."""
    metrics = train("warmth", standalone_service, tmp_path)
    assert_trained_on("warmth", metrics)
    assert -1 < metrics["reward"] < 1
