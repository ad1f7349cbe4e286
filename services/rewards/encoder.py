"""Pictures and texts as unit vectors of one space, by an `open_clip` model, in batches that fit the memory.

Shape suffixes: B images of a batch, T texts, D dimensions of an embedding, H height and W width in pixels, C = 3
channels (RGB).
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from services.rewards.openclip import full_float32, load_clip
from services.rewards.options import Runtime
from services.rewards.pixels import Preprocessing
from services.rewards.sources import Source, WeightsError

logger = logging.getLogger(__name__)

KEPT_TEXTS = 4096
"""Embeddings of texts that are remembered."""
WARMUP_SIDE = 64
RECOVER_AFTER = 64
"""Full batches that must fit until larger ones are tried again."""
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|CU(BLAS|DNN)_STATUS_\w*ALLOC(ATION)?_FAILED")
"""What plain RuntimeErrors of torch's say of it: cuBLAS and cuDNN take memory past the allocator with its own error."""


class Encoder:
    """Embeds pictures and texts; all on one thread."""

    def __init__(self, model_name: str, source: Source, runtime: Runtime) -> None:
        """Load the model.

        Args:
            model_name: an `open_clip` model, or `mini-clip`.
            source: of its weights.
            runtime: how it runs.

        Raises:
            services.rewards.sources.WeightsError: it cannot be loaded.
        """
        self._source = source
        self._device = device_of(runtime)
        model, self._tokenize, transform = load_clip(model_name, source, cache_dir=runtime.cache_dir)
        self._model = model.to(self._device)
        self._preprocess = Preprocessing(transform).to(self._device)
        self._dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[runtime.precision]
        self._sizes = BatchSizes(runtime.max_batch, bucketed=runtime.compiled)
        self._encode_image = cast(Callable[[Tensor], Tensor], self._model.encode_image)
        if runtime.compiled:
            graphs = len(self._sizes.buckets) + 1  # beyond torch's limit a size would run as it was, uncompiled
            dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, graphs)
            self._encode_image = torch.compile(self._encode_image, dynamic=False)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.dimensions = 0

    def warmup(self) -> None:
        """Run once for each size of batch that is worth it, so that no request waits for what a first run has to do.

        On a GPU the largest is one of them: should it exceed the memory, that is known before the first request.

        Raises:
            WeightsError: the weights are such that nothing finite comes of them.
        """
        largest = [] if self._device.type == "cpu" else [self._sizes.most]
        for size in self._sizes.buckets or [1, *largest]:
            vectors_BD = self.images(np.zeros((size, WARMUP_SIDE, WARMUP_SIDE, 3), dtype=np.uint8))
        self.dimensions = vectors_BD.shape[1]
        if not vectors_BD.isfinite().all() or not self.texts(["a picture"]).isfinite().all():
            raise WeightsError(f"weights {self._source} give embeddings that are not finite: fetch them again")

    @torch.inference_mode()
    def images(self, images_BHWC: NDArray[np.uint8]) -> Tensor:
        """Embed pictures.

        Args:
            images_BHWC: uint8 (B, H, W, 3), of any one size.

        Returns:
            Unit vectors, float32 (B, D), on the device.

        Raises:
            services.rewards.base.UnfitImage: the pictures are too elongated.
            torch.OutOfMemoryError: not even one picture fits the memory.
        """
        images = images_BHWC if images_BHWC.flags.writeable else images_BHWC.copy()
        return torch.cat(self._sizes.map(self._embed, torch.from_numpy(images)))

    def _embed(self, images_BHWC: Tensor, filled_to: int) -> Tensor:
        """Unit vectors of a batch that the memory holds; (B, D)."""
        count = len(images_BHWC)
        inputs = self._preprocess(images_BHWC.to(self._device))
        if filled_to > count:
            inputs = torch.cat([inputs, inputs.new_zeros(filled_to - count, *inputs.shape[1:])])
        inputs = inputs.contiguous()  # of one layout, or each would be compiled for itself
        with full_float32(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            vectors_BD = self._encode_image(inputs)[:count]
        return F.normalize(vectors_BD.float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, or remember how they were embedded; those beyond the model's context are cut.

        Args:
            texts: T of them, of which few differ.

        Returns:
            Unit vectors, float32 (T, D), on the device.
        """
        for text in dict.fromkeys(texts):
            if text not in self._texts:  # one at a time, so that none depends on its neighbours
                tokens = self._tokenize([text]).to(self._device)
                with full_float32(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
                    vector_1D = self._model.encode_text(tokens)  # type: ignore[operator]
                self._texts[text] = F.normalize(vector_1D.float(), dim=-1)[0]
            self._texts.move_to_end(text)
        vectors_TD = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return vectors_TD


def device_of(runtime: Runtime) -> torch.device:
    """Where a model runs.

    Raises:
        RuntimeError: a GPU was asked for, and there is none.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("REWARD_DEVICE is cuda, but torch finds no GPU: make one visible, or set it to auto or cpu")
    wanted = "cuda" if runtime.device == "auto" and torch.cuda.is_available() else runtime.device
    return torch.device("cpu" if wanted == "auto" else wanted)


class BatchSizes:
    """Which batches a forward pass is given: as large as fit the memory, and of few sizes where it is compiled."""

    def __init__(self, most: int, *, bucketed: bool = False) -> None:
        """Begin with what was asked for.

        Args:
            most: images in one forward pass.
            bucketed: whether batches are filled up to a power of two, or to `most`.
        """
        self._wanted = self.most = most
        self._fitted = 0
        powers = [2**power for power in range(most.bit_length()) if 2**power < most]
        self.buckets = [*powers, most] if bucketed else []
        """The sizes that batches are filled up to, ascending; none if they stay as they are."""

    def fill(self, count: int) -> int:
        """The size that a batch of `count` is filled up to."""
        return next((size for size in self.buckets if size >= count), count)

    def map(self, forward: Callable[[Tensor, int], Tensor], rows_B: Tensor) -> list[Tensor]:
        """Give `forward` the rows in order, in batches; one that does not fit the memory is halved.

        The smaller size is kept, for what filled the memory is likely still there, and doubled again after
        `RECOVER_AFTER` passes of it that fitted.

        Args:
            forward: takes rows and the size they are to be filled up to.
            rows_B: (B, …).

        Returns:
            Its results.

        Raises:
            RuntimeError: a single row does not fit.
        """
        results: list[Tensor] = []
        start = 0
        while start < len(rows_B):
            part = rows_B[start : start + self.most]
            try:
                results.append(forward(part, self.fill(len(part))))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            else:
                start += len(part)
                self._note_fit(len(part))
                continue
            # Outside of the handler: while it runs, the error keeps alive what the failed pass had allocated.
            self._shrink(len(part))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results

    def _shrink(self, count: int) -> None:
        smaller = [size for size in self.buckets if size < self.fill(count)]
        self.most, self._fitted = smaller[-1] if smaller else count // 2, 0
        logger.warning("%d images at once exceed the memory: batches are of %d for now", count, self.most)

    def _note_fit(self, count: int) -> None:
        if count < self.most or self.most == self._wanted:
            return
        self._fitted += 1
        if self._fitted >= RECOVER_AFTER:
            larger = [size for size in self.buckets if size > self.most]
            self.most, self._fitted = min(self._wanted, larger[0] if larger else 2 * self.most), 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch's means that memory, of GPU or machine, is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
