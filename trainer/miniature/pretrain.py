"""Makes the miniature's weights: `python -m trainer.miniature.pretrain STAGE`.

STAGE is `vqvae`, `label`, `style`, `var`, `clip` or `aesthetic`, or `all` of them, `measure` or `pictures`.

Each stage renders its pictures, trains, stores its weights under `trainer/miniature/weights/`, measures them on
held-out seeds and writes its record beside them. A stage that was interrupted goes on where it was saved; `measure`
measures the stored weights anew.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor

from services.rewards.clip import MINIATURE_MODEL, miniature_source
from services.rewards.encoder import Encoder
from services.rewards.openclip import MINIATURE
from services.rewards.options import STANDARD
from services.rewards.sources import sha256_of
from trainer.miniature import aesthetic, captions, classifiers, clip, objects, prior, quality, render, tokenizer
from trainer.miniature.classifiers import Kind
from trainer.miniature.objects import CLASSES
from trainer.miniature.render import POLICY_WORLD, WIDE_WORLD, Renders, World, render_set
from trainer.miniature.weights import FILES, record_metrics, record_training
from trainer.models.checkpoints import CheckpointError, load_vqvae, save_var, save_vqvae, write_atomically

Stage = Literal["vqvae", "label", "style", "var", "clip", "aesthetic"]
PICTURES, POLICY_PICTURES = 48_000, 96_000
TOKENIZER_SEED, POLICY_SEED = 1, 2  # of the rendered sets; evaluation uses `HELD_OUT_SEED`
STORED = torch.float16
EXIT_INTERRUPTED = 130
RENDERER = tuple(sha256_of(Path(str(module.__file__))) for module in (render, objects))
RENDERER_NAME = hashlib.sha256("".join(RENDERER).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """Where and how a stage is trained.

    Args:
        cache: folder of renders, tokens and resumable states.
        seed: of the training.
        workers: processes that render.
        device: where the model is trained.
    """

    cache: Path
    seed: int
    workers: int
    device: torch.device

    def kept(self, name: str, *made_of: object) -> Path:
        """The cached file of that name and origin: what other things, or another renderer, made has another path."""
        self.cache.mkdir(parents=True, exist_ok=True)
        stem, dot, suffix = name.partition(".")
        return (
            self.cache / f"{stem}-{hashlib.sha256(repr((RENDERER, *made_of)).encode()).hexdigest()[:12]}{dot}{suffix}"
        )


def rendered(job: Job, seed: int, count: int, world: World) -> Renders:
    """A training set, rendered once and kept in the cache."""
    path = job.kept("renders.npz", seed, count, world)
    if not path.exists():
        fresh = render_set(seed, count, world, workers=job.workers)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, images=fresh.images, labels=fresh.labels, styles=fresh.styles, captions=fresh.captions)

        write_atomically(path, fresh.images.nbytes, write)
    with np.load(path) as stored:
        return Renders(stored["images"], stored["labels"], stored["styles"], stored["captions"].tolist())


def tokenized(job: Job, renders: Renders) -> Tensor:
    """The pictures' tokens, int64 (N, L), made once and kept in the cache."""
    pictures = hashlib.sha256(renders.images.data).hexdigest()
    path = job.kept("tokens.pt", sha256_of(FILES["vqvae"]), pictures)
    if not path.exists():
        tokens_NL = prior.tokenize(load_vqvae(FILES["vqvae"], device=job.device), renders.images).to(torch.int16)
        write_atomically(path, tokens_NL.nbytes, lambda temporary: torch.save(tokens_NL, temporary))
    stored: Tensor = torch.load(path, weights_only=True)
    return stored.long()


def train_vqvae(job: Job) -> None:
    """Trains and stores the tokenizer."""
    renders = rendered(job, TOKENIZER_SEED, PICTURES, WIDE_WORLD)
    state = job.kept("vqvae.pt", job.seed, tokenizer.CONFIG, tokenizer.SCHEDULE, PICTURES, WIDE_WORLD)
    fitted = tokenizer.train(renders.images, seed=job.seed, state=state, device=job.device)
    save_vqvae(FILES["vqvae"], fitted.model.cpu().to(memory_format=torch.contiguous_format), dtype=STORED)
    record_training("vqvae", fitted.seconds, job.seed, tokenizer.SCHEDULE, renderer=RENDERER_NAME)


def swap_fine_scales(tokens_NL: Tensor, groups_N: NDArray[np.int64], lengths: Sequence[int], seed: int) -> Tensor:
    """Gives every picture the fine scales of another of its group: malformed, as a sample may be.

    Args:
        tokens_NL: int64 (N, L).
        groups_N: int64 (N,).
        lengths: tokens of each scale.
        seed: of the draws: whose scales, and from which one on (the third at the earliest).

    Returns:
        int64 (N, L); `tokens_NL` is left as it is.
    """
    generator, mixed_NL = np.random.default_rng(seed), tokens_NL.clone()
    starts = np.cumsum([0, *lengths])[2:-1]
    members = {group: np.flatnonzero(groups_N == group) for group in np.unique(groups_N)}
    for row, group in enumerate(groups_N):
        donor, start = generator.choice(members[group]), generator.choice(starts)
        mixed_NL[row, start:] = tokens_NL[donor, start:]
    return mixed_NL


def through_tokenizer(renders: Renders, malformed: NDArray[np.int64], seed: int) -> None:
    """Lets every second round of classes pass the tokenizer, in place, as what is to be judged in training will have.

    Args:
        renders: classes take turns in it.
        malformed: of the rows that pass, those whose fine scales become another picture's of the same style.
        seed: of these draws.
    """
    vqvae = load_vqvae(FILES["vqvae"])
    rows = passing_rows(len(renders.images))
    tokens_NL = prior.tokenize(vqvae, renders.images[rows])
    mixed = np.isin(rows, malformed)
    tokens_NL[mixed] = swap_fine_scales(tokens_NL[mixed], renders.styles[rows[mixed]], vqvae.quantize.lengths, seed)
    renders.images[rows] = quality.decode_tokens(vqvae, tokens_NL)


def passing_rows(count: int) -> NDArray[np.int64]:
    """The rows of every second round of classes, which take turns."""
    return np.flatnonzero(np.arange(count) // len(CLASSES) % 2)


def train_judge(kind: Kind, job: Job) -> None:
    """Trains and stores one classifier.

    It will judge samples, which come out of the decoder, so half of what it learns from has passed the tokenizer. An
    object that the policy draws badly is still of its style: the judge of styles sees those pictures malformed.
    """
    renders = rendered(job, TOKENIZER_SEED, PICTURES, WIDE_WORLD)
    malformed = passing_rows(PICTURES) if kind == "style" else np.array([], dtype=np.int64)
    through_tokenizer(renders, malformed, job.seed)
    schedule = classifiers.SCHEDULES[kind]
    origin = (job.seed, schedule, PICTURES, WIDE_WORLD, sha256_of(FILES["vqvae"]))
    state = job.kept(f"{kind}.pt", *origin)
    fitted = classifiers.train(kind, renders, seed=job.seed, state=state, device=job.device, schedule=schedule)
    weights = {name: entry.to("cpu", STORED).contiguous() for name, entry in fitted.model.state_dict().items()}
    needed = sum(entry.nbytes for entry in weights.values())
    write_atomically(FILES[kind], needed, lambda temporary: save_file(weights, temporary))
    record_training(kind, fitted.seconds, job.seed, schedule, renderer=RENDERER_NAME)


def train_var(job: Job) -> None:
    """Trains and stores the policy."""
    vqvae = load_vqvae(FILES["vqvae"], device=job.device)
    renders = rendered(job, POLICY_SEED, POLICY_PICTURES, POLICY_WORLD)
    tokens_NL, labels_N = tokenized(job, renders), torch.from_numpy(renders.labels)
    origin = (job.seed, prior.CONFIG, prior.SCHEDULE, POLICY_PICTURES, POLICY_WORLD, sha256_of(FILES["vqvae"]))
    state = job.kept("var.pt", *origin)
    fitted = prior.train(vqvae, tokens_NL, labels_N, seed=job.seed, state=state, device=job.device)
    save_var(FILES["var"], fitted.model.cpu(), dtype=STORED)
    record_training("var", fitted.seconds, job.seed, prior.SCHEDULE, renderer=RENDERER_NAME)


def reward_pictures(job: Job) -> tuple[Renders, NDArray[np.int64]]:
    """What the reward models learn from, and what may be said of each picture, int64 (N, 6).

    Half of the pictures have passed the tokenizer, a third of those malformed: of them style, colours and contrast
    alone are told.
    """
    renders = rendered(job, TOKENIZER_SEED, PICTURES, WIDE_WORLD)
    malformed = passing_rows(PICTURES)[::3]
    through_tokenizer(renders, malformed, job.seed)
    traits_NK = captions.traits_of(renders)
    for kind in ("noun", "hue", "light"):
        traits_NK[malformed, captions.KINDS.index(kind)] = captions.UNSAID
    return renders, traits_NK


def train_clip(job: Job) -> None:
    """Trains and stores the miniature's CLIP."""
    renders, traits_NK = reward_pictures(job)
    origin = (
        job.seed,
        clip.SCHEDULE,
        clip.KEEP,
        clip.RINGING,
        MINIATURE.read_text(),
        PICTURES,
        sha256_of(FILES["vqvae"]),
    )
    state = job.kept("clip.pt", *origin)
    fitted = clip.train(renders.images, traits_NK, seed=job.seed, state=state, device=job.device)
    weights = clip.stored(fitted.model, STORED)
    needed = sum(entry.nbytes for entry in weights.values())
    write_atomically(FILES["clip"], needed, lambda temporary: save_file(weights, temporary))
    record_training("clip", fitted.seconds, job.seed, clip.SCHEDULE, renderer=RENDERER_NAME)


def train_aesthetic(job: Job) -> None:
    """Fits and stores the aesthetic head over the stored CLIP."""
    renders, _ = reward_pictures(job)
    encoder = Encoder(MINIATURE_MODEL, miniature_source("clip"), STANDARD)
    vectors_ND = encoder.images(renders.images)
    began_s = time.monotonic()
    weights = aesthetic.fit_head(vectors_ND.cpu(), renders.images)
    seconds = time.monotonic() - began_s
    write_atomically(FILES["aesthetic"], 4096, lambda temporary: save_file(weights, temporary))
    record_training("aesthetic", seconds, job.seed, None, renderer=RENDERER_NAME)


TRAIN: dict[Stage, Callable[[Job], None]] = {
    "vqvae": train_vqvae,
    "label": lambda job: train_judge("label", job),
    "style": lambda job: train_judge("style", job),
    "var": train_var,
    "clip": train_clip,
    "aesthetic": train_aesthetic,
}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.miniature.pretrain", description=__doc__)
    parser.add_argument("stage", choices=(*TRAIN, "all", "measure", "pictures"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache/pretrain"), help="renders and resumable state")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder of the grids")
    parser.add_argument("--workers", type=_count, default=2, help="processes that render")
    arguments = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = Job(arguments.cache, arguments.seed, arguments.workers, device)
    try:
        if arguments.stage == "pictures":
            quality.save_pictures(arguments.pictures)
            return 0
        for stage in TRAIN if arguments.stage in ("all", "measure") else (arguments.stage,):
            if arguments.stage != "measure":
                TRAIN[stage](job)
            metrics = quality.measure(stage)
            record_metrics(stage, metrics)
            for name, value in metrics.items():
                console.print(f"{stage:8} {name:36} {value:.4f}")
    except (CheckpointError, OSError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        remedy = "the same command goes on where the stage was last saved"
        console.print(f"[bold red]error:[/] interrupted; {remedy}", soft_wrap=True)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
