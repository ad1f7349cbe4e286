"""Makes the miniature's weights: `python -m trainer.miniature.pretrain {vqvae,label,style,var,all,pictures}`.

Each stage renders its pictures, trains, measures itself on held-out seeds and writes its weights and its record under
`trainer/miniature/weights/`. A stage that was interrupted goes on where it was saved.
"""

import argparse
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from trainer.miniature import classifiers, prior, quality, tokenizer
from trainer.miniature.classifiers import Kind
from trainer.miniature.objects import CLASSES
from trainer.miniature.render import POLICY_WORLD, WIDE_WORLD, Renders, World, render_set
from trainer.miniature.weights import (
    FOLDER,
    VAR_FILE,
    VQVAE_FILE,
    classifier_file,
    load_classifier,
    record,
)
from trainer.models.checkpoints import CheckpointError, load_var, load_vqvae, save_var, save_vqvae

STAGES = ("vqvae", "label", "style", "var")
PICTURES, POLICY_PICTURES = 48_000, 96_000
TOKENIZER_SEED, POLICY_SEED = 1, 2  # of the rendered sets; evaluation uses `HELD_OUT_SEED`
EVALUATED = 1024  # held-out pictures
STORED = torch.float16


def rendered(cache: Path, seed: int, count: int, world: World, workers: int) -> Renders:
    """A training set, rendered once and kept in the cache."""
    path = cache / f"renders_{seed}_{count}.npz"
    if not path.exists():
        fresh = render_set(seed, count, world, workers=workers)
        cache.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez(file, images=fresh.images, labels=fresh.labels, styles=fresh.styles, captions=fresh.captions)
        path.with_suffix(".tmp").replace(path)
    with np.load(path) as stored:
        return Renders(stored["images"], stored["labels"], stored["styles"], stored["captions"].tolist())


def pretrain_classifier(kind: Kind, cache: Path, seed: int, workers: int, device: torch.device) -> dict[str, float]:
    """Trains and stores one classifier; returns its accuracy on held-out pictures, and on their reconstructions.

    It will judge samples, which come out of the decoder, so half of what it learns from has passed the tokenizer.
    """
    vqvae = load_vqvae(VQVAE_FILE)
    renders = rendered(cache, TOKENIZER_SEED, PICTURES, WIDE_WORLD, workers)
    rows = np.flatnonzero(np.arange(PICTURES) // len(CLASSES) % 2)  # classes take turns: every second round of them
    renders.images[rows] = quality.reconstruct(vqvae, renders.images[rows])
    fitted = classifiers.train(kind, renders, seed=seed, state=cache / f"{kind}.pt", device=device)
    model = fitted.model.cpu()
    save_file({name: t.to(STORED).contiguous() for name, t in model.state_dict().items()}, classifier_file(kind))
    model = load_classifier(kind)
    every, policy = quality.held_out(EVALUATED), quality.held_out(EVALUATED, POLICY_WORLD)
    targets, policy_targets = (r.labels if kind == "label" else r.styles for r in (every, policy))
    metrics = {
        "accuracy/wide_world": classifiers.accuracy(model, every.images, targets),
        "accuracy/policy_world": classifiers.accuracy(model, policy.images, policy_targets),
        "accuracy/reconstructions": classifiers.accuracy(model, quality.reconstruct(vqvae, every.images), targets),
    }
    record(kind, fitted.seconds, seed, classifiers.SCHEDULE, metrics)
    return metrics


def pretrain_vqvae(cache: Path, seed: int, workers: int, device: torch.device) -> dict[str, float]:
    """Trains and stores the tokenizer; returns its reconstruction quality."""
    renders = rendered(cache, TOKENIZER_SEED, PICTURES, WIDE_WORLD, workers)
    fitted = tokenizer.train(renders.images, seed=seed, state=cache / "vqvae.pt", device=device)
    save_vqvae(VQVAE_FILE, fitted.model.cpu().to(memory_format=torch.contiguous_format), dtype=STORED)
    metrics = quality.tokenizer_quality(load_vqvae(VQVAE_FILE), quality.held_out(EVALUATED))
    record("vqvae", fitted.seconds, seed, tokenizer.SCHEDULE, metrics)
    return metrics


def pretrain_var(cache: Path, seed: int, workers: int, device: torch.device) -> dict[str, float]:
    """Trains and stores the policy; returns what docs/miniature.md asks of it."""
    vqvae = load_vqvae(VQVAE_FILE, device=device)
    renders = rendered(cache, POLICY_SEED, POLICY_PICTURES, POLICY_WORLD, workers)
    tokens = cache / "tokens.pt"
    if not tokens.exists():
        torch.save(prior.tokenize(vqvae, renders.images).to(torch.int16), tokens)
    tokens_NL = torch.load(tokens, weights_only=True).long()
    labels_N = torch.from_numpy(renders.labels)
    fitted = prior.train(vqvae, tokens_NL, labels_N, seed=seed, state=cache / "var.pt", device=device)
    save_var(VAR_FILE, fitted.model.cpu(), dtype=STORED)
    models = load_var(VAR_FILE), load_vqvae(VQVAE_FILE)
    metrics = quality.policy_quality(*models, load_classifier("label"), load_classifier("style"))
    record("var", fitted.seconds, seed, prior.SCHEDULE, metrics)
    return metrics


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.miniature.pretrain", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all", "pictures"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache/pretrain"), help="renders and resumable state")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder of the grids")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    arguments = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    FOLDER.mkdir(exist_ok=True)
    try:
        for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
            common = (arguments.cache, arguments.seed, arguments.workers, device)
            if stage == "vqvae":
                metrics = pretrain_vqvae(*common)
            elif stage == "var":
                metrics = pretrain_var(*common)
            elif stage == "pictures":
                metrics = {}
                quality.save_pictures(arguments.pictures, load_vqvae(VQVAE_FILE), load_var(VAR_FILE))
            else:
                metrics = pretrain_classifier(cast(Kind, stage), *common)
            for name, value in metrics.items():
                console.print(f"{stage:8} {name:36} {value:.4f}")
    except (CheckpointError, OSError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
