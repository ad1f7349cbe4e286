"""ViT-L/14 at its full size, with random weights in both layouts: served on the CPU, end to end."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from services.client import RewardClient, ScoreResult
from services.rewards.openclip import OPENAI_MARKS
from tests.services.conftest import Process
from tests.services.rewards.models import noise, photograph
from tests.vit_l_14 import MODEL, ON_A_CPU, environment, make_model, save_head, save_model

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

PROMPTS = ["an old picture", "a painting", "a painting"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its numbers are what files in half precision hold."""
    return make_model()


@pytest.fixture(scope="module")
def weights(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its weights in the two layouts."""
    folder = tmp_path_factory.mktemp("vit-l-14")
    state = {name: entry.half() for name, entry in model.state_dict().items()}
    marks = dict(zip(OPENAI_MARKS, (torch.tensor(224), torch.tensor(77), torch.tensor(49408)), strict=True))
    torch.save(state | marks, folder / "openai_layout.pt")
    return {"open_clip": save_model(model, folder), "openai": folder / "openai_layout.pt"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head in the published shape."""
    return save_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    """Of a size that has to be scaled down."""
    return np.stack([photograph(256, 256), noise(256, 256), photograph(256, 256, seed=1)])


def score(url: str, images: NDArray[np.uint8], prompts: list[str] | None) -> ScoreResult:
    """Through the client."""

    async def run() -> ScoreResult:
        async with RewardClient(url, timeout_s=300) as client:
            return await client.score(images, prompts)

    return asyncio.run(run())


def by_hand(model: nn.Module, images: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit embeddings of pictures and prompts by open_clip's own transform and tokenizer."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        vectors = model.encode_image(inputs, normalize=True)  # type: ignore[operator]
        texts = model.encode_text(open_clip.get_tokenizer(MODEL)(PROMPTS), normalize=True)  # type: ignore[operator]
    return vectors, texts


@pytest.mark.parametrize("layout", ["open_clip", "openai"])
def test_it_is_served_on_the_cpu_end_to_end(
    layout: str,
    model: nn.Module,
    weights: dict[str, Path],
    head: Path,
    pictures: NDArray[np.uint8],
    start: Callable[..., Process],
    redis_url: str,
) -> None:
    """`clip` and `aesthetic` by HTTP, queue and worker score as open_clip does by hand, whichever layout they read.

    And a picture alone as in the batch, to 1e-5.
    """
    from services.rewards.head import load_head

    settings = ON_A_CPU | environment(weights[layout], head) | {"REDIS_URL": redis_url}
    vectors, texts = by_hand(model, pictures)
    service = start("serve", "clip", "aesthetic", "--port", "0", "--announce", **settings)
    urls = service.announced()["rewards"]
    for name, prompts, expected, bound in (
        ("clip", PROMPTS, (vectors * texts).sum(dim=1).numpy(), 2e-3),
        ("aesthetic", None, load_head(head)(vectors), 0.05),
    ):
        answer = score(urls[name], pictures, prompts)
        assert answer.scores == pytest.approx(expected, abs=bound)
        alone = score(urls[name], pictures[:1], None if prompts is None else prompts[:1])
        assert alone.scores == pytest.approx(answer.scores[:1], rel=0, abs=1e-5)
        assert answer.reward == name
        assert MODEL in answer.version
    service.send(signal.SIGTERM)
    assert service.wait() == 0
