"""The encoder: what it embeds agrees with open_clip, in any batch, in whatever memory there is."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from services.rewards.encoder import RECOVER_AFTER, BatchSizes, Encoder, is_out_of_memory
from services.rewards.openclip import load_clip
from services.rewards.options import Runtime
from services.rewards.sources import Source, WeightsError
from tests.services.rewards.models import SMALL_NAME, noise, photograph, saved

HALF_BOUND = 0.02
"""By which a cosine in half precision may differ, as docs/clip_and_aesthetic.md states it."""
SIZES = ((24, 24), (32, 20), (64, 64), (224, 224), (512, 512), (300, 400))
"""Height and width; the model's own is 56, to which the first two are scaled up."""
PICTURES = [make(*size) for make in (photograph, noise) for size in SIZES]


@pytest.fixture(scope="module")
def encoder(small_source: Source) -> Encoder:
    """Of the small model, in float32."""
    return Encoder(SMALL_NAME, small_source, Runtime(device="cpu"))


def batch(count: int, *, side: int = 64) -> NDArray[np.uint8]:
    """Pictures of both kinds, uint8 (B, side, side, 3)."""
    return np.stack([(photograph if seed % 2 else noise)(side, side, seed=seed) for seed in range(count)])


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: "x".join(map(str, picture.shape)))
def test_cosines_agree_with_open_clips_own_pipeline(
    picture: NDArray[np.uint8], encoder: Encoder, small_source: Source
) -> None:
    """Within 2e-3 of a PIL image through open_clip's transform, model and tokenizer, up- and downscaled."""
    model, tokenizer, transform = load_clip(SMALL_NAME, small_source)
    texts = ["an old picture", "a painting of a fish"]
    clip: Any = model
    with torch.no_grad():
        image = clip.encode_image(transform(Image.fromarray(picture))[None], normalize=True)
        expected = image @ clip.encode_text(tokenizer(texts), normalize=True).T
    assert torch.allclose(encoder.images(picture[None]) @ encoder.texts(texts).T, expected, atol=2e-3)


def test_the_batch_never_changes_an_embedding(encoder: Encoder) -> None:
    """By more than 1e-5: alone, in any order, beside any others."""
    images = batch(13)
    whole = encoder.images(images)
    alone = torch.cat([encoder.images(image[None]) for image in images])
    order = np.random.default_rng(0).permutation(13)
    assert torch.allclose(alone, whole, atol=1e-6)
    assert torch.allclose(encoder.images(images[order]), whole[torch.from_numpy(order)], atol=1e-6)


def test_embeddings_are_unit_vectors(encoder: Encoder) -> None:
    """Of pictures and texts, in float32, and `dimensions` is theirs after the warm-up."""
    encoder.warmup()
    for vectors in (encoder.images(batch(3)), encoder.texts(["a", "b", "a"])):
        assert vectors.dtype == torch.float32
        assert vectors.shape == (3, encoder.dimensions)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-6)


def test_read_only_images_are_taken(encoder: Encoder) -> None:
    """The worker's images are views of what came over the network."""
    images = batch(2)
    images.flags.writeable = False
    assert encoder.images(images).shape[0] == 2


def test_a_text_is_embedded_once(encoder: Encoder) -> None:
    """And then remembered, whatever texts are beside it."""
    forwards: list[int] = []
    embedding: nn.Module = encoder._model.token_embedding  # type: ignore[assignment]
    handle = embedding.register_forward_hook(lambda *_: forwards.append(1))
    try:
        first = encoder.texts(["a tree", "a heart", "a tree"])
        again = encoder.texts(["a heart", "a tree", "a moon"])
    finally:
        handle.remove()
    assert len(forwards) == 3
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[:2], again[[1, 0]])


def test_old_texts_are_forgotten(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a service whose every prompt is new does not fill its memory; a batch still has all of its own."""
    monkeypatch.setattr("services.rewards.encoder.KEPT_TEXTS", 3)
    assert encoder.texts([f"number {index}" for index in range(9)]).shape[0] == 9
    assert list(encoder._texts) == ["number 6", "number 7", "number 8"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_bound(precision: Any, small_source: Source, encoder: Encoder) -> None:
    """Cosines of pictures and texts differ from float32's by no more than is stated."""
    half = Encoder(SMALL_NAME, small_source, Runtime(device="cpu", precision=precision))
    images, texts = batch(16), ["an old picture", "a painting"]
    difference = half.images(images) @ half.texts(texts).T - encoder.images(images) @ encoder.texts(texts).T
    assert 0 < difference.abs().max() < HALF_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bfloat16", HALF_BOUND), ("float16", HALF_BOUND)])
def test_a_gpu_agrees_with_the_cpu(precision: Any, bound: float, small_source: Source, encoder: Encoder) -> None:
    """Pre-processing included; in float32 the batch changes no embedding by more than 1e-5 there either."""
    on_gpu = Encoder(SMALL_NAME, small_source, Runtime(device="cuda", precision=precision))
    images, texts = batch(16, side=300), ["an old picture", "a painting"]
    theirs = (on_gpu.images(images) @ on_gpu.texts(texts).T).cpu()
    assert torch.allclose(theirs, encoder.images(images) @ encoder.texts(texts).T, atol=bound)
    if precision == "float32":
        alone = torch.cat([on_gpu.images(image[None]) for image in images])
        assert torch.allclose(alone, on_gpu.images(images), rtol=0, atol=1e-5)


def test_a_missing_gpu_is_one_clear_error(small_source: Source) -> None:
    """It is not replaced by a CPU in silence."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="REWARD_DEVICE is cuda, but torch finds no GPU"):
        Encoder(SMALL_NAME, small_source, Runtime(device="cuda"))


class Memory:
    """A forward pass that truly runs out of memory where it is given more rows than `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: list[int] = []

    def __call__(self, rows: Tensor, filled_to: int) -> Tensor:
        self.seen.append(len(rows))
        if filled_to > self.most:
            torch.empty(2**60, dtype=torch.uint8)
        return rows * 2


@pytest.mark.parametrize(("count", "limit", "most"), [(64, 64, 5), (7, 64, 7), (9, 4, 1), (1, 1, 1)])
def test_a_batch_that_exceeds_the_memory_is_halved(
    count: int, limit: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it fits; every row is answered once, in order, and the smaller size is kept."""
    forward, sizes, rows = Memory(most), BatchSizes(limit), torch.arange(count)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(torch.cat(sizes.map(forward, rows)), rows * 2)
    assert sizes.most <= max(most, 1) or count <= most
    assert len(caplog.records) == sum(size > most for size in forward.seen)
    forward.seen.clear()
    sizes.map(forward, rows)
    assert all(size <= most for size in forward.seen)


def test_larger_batches_are_tried_again() -> None:
    """After many that fitted: what filled the memory may have been another process."""
    forward, sizes = Memory(16), BatchSizes(64)
    sizes.map(forward, torch.arange(64))
    assert sizes.most == 16
    forward.most = 64
    sizes.map(forward, torch.arange(16 * RECOVER_AFTER))
    assert sizes.most == 32
    sizes.map(forward, torch.arange(32 * RECOVER_AFTER))
    assert sizes.most == 64


def test_a_compiled_batch_shrinks_to_a_size_that_is_compiled() -> None:
    """The next smaller bucket, whatever the batch was filled up from."""
    sizes = BatchSizes(64, bucketed=True)
    sizes.map(Memory(32), torch.arange(33))
    assert sizes.most == 32
    sizes.map(Memory(7), torch.arange(40))
    assert sizes.most == 4


def test_weights_that_give_nothing_finite_are_refused(small_vit: nn.Module, tmp_path: Path) -> None:
    """Before the service is ready, not score by score."""
    model = copy.deepcopy(small_vit)
    with torch.no_grad():
        model.visual.proj.fill_(torch.nan)  # type: ignore[union-attr]
    encoder = Encoder(SMALL_NAME, saved(model, tmp_path / "nan.safetensors"), Runtime(device="cpu"))
    with pytest.raises(WeightsError, match=r"nan.safetensors give embeddings that are not finite"):
        encoder.warmup()


def test_a_single_picture_that_does_not_fit_is_an_error() -> None:
    """There is nothing left to halve."""
    with pytest.raises(RuntimeError) as caught:
        BatchSizes(8).map(Memory(0), torch.arange(8))
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_library_that_finds_no_memory_halves_the_batch_too(words: str) -> None:
    """cuBLAS and cuDNN allocate for themselves; another failure of theirs is no lack of memory."""

    def forward(rows: Tensor, _: int) -> Tensor:
        if len(rows) > 2:
            raise RuntimeError(words)
        return rows

    assert torch.equal(torch.cat(BatchSizes(8).map(forward, torch.arange(8))), torch.arange(8))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert not is_out_of_memory(ValueError(words))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    """It is raised at once."""
    calls: list[int] = []

    def forward(rows: Tensor, filled_to: int) -> Tensor:
        calls.append(filled_to)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSizes(8).map(forward, torch.arange(8))
    assert calls == [8]


def test_an_encoder_goes_on_in_halves(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, with a model that runs out of memory beyond three pictures."""
    images = batch(10)
    expected, encode = encoder.images(images), encoder._encode_image

    def hungry(inputs: Tensor) -> Tensor:
        if len(inputs) > 3:
            torch.empty(2**60, dtype=torch.uint8)
        return encode(inputs)

    monkeypatch.setattr(encoder, "_encode_image", hungry)
    monkeypatch.setattr(encoder, "_sizes", BatchSizes(64))
    assert torch.allclose(encoder.images(images), expected, atol=1e-6)


def test_compiled_batches_have_few_sizes() -> None:
    """Powers of two, and the largest; each batch is filled up to the next."""
    sizes = BatchSizes(48, bucketed=True)
    assert sizes.buckets == [1, 2, 4, 8, 16, 32, 48]
    assert BatchSizes(48).buckets == []
    assert [sizes.fill(count) for count in (1, 3, 16, 33, 48)] == [1, 4, 16, 48, 48]
    filled: list[int] = []

    def forward(rows: Tensor, filled_to: int) -> Tensor:
        filled.append(filled_to)
        return rows

    sizes.map(forward, torch.arange(100))
    assert filled == [48, 48, 4]


@pytest.mark.slow
def test_compiling_changes_no_embedding(
    small_source: Source, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And after the warm-up nothing is compiled any more."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # which the encoder raises to what it needs
    compiled = Encoder(SMALL_NAME, small_source, Runtime(device="cpu", compiled=True, max_batch=4))
    compiled.warmup()
    images = batch(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compiled.images(images), encoder.images(images), atol=1e-5)


def test_texts_beyond_the_context_are_cut(encoder: Encoder) -> None:
    """As open_clip does; what is beyond changes nothing."""
    words = "a painting of " + "very " * 200
    assert len(open_clip.get_tokenizer(SMALL_NAME)([words])[0]) == 77
    assert torch.equal(encoder.texts([words])[0], encoder.texts([words + "old"])[0])
