"""Models and their files."""

import pytest
from torch import nn

from services.rewards.sources import Source
from tests.services.rewards.models import SMALL_NAME, random_model, register, saved


@pytest.fixture(scope="session", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`small-vit` and `small-vit-quickgelu` are models of open_clip."""
    register(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def small_vit(small_models: None) -> nn.Module:
    """A small ViT with random weights."""
    return random_model(SMALL_NAME)


@pytest.fixture(scope="session")
def small_source(small_vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Its weights."""
    return saved(small_vit, tmp_path_factory.mktemp("weights") / "small.safetensors")
