"""How good the miniature's parts are, on pictures that nothing was trained on, and the pictures that show it.

Shape legend: B images · H, W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.rewards.aesthetic import MiniatureAesthetic
from services.rewards.clip import MINIATURE_MODEL, miniature_source
from services.rewards.encoder import Encoder
from services.rewards.options import STANDARD, RewardOptions
from trainer.miniature.aesthetic import auc, rank_correlation
from trainer.miniature.captions import with_article
from trainer.miniature.classifiers import Kind, accuracy, predict
from trainer.miniature.objects import CLASSES
from trainer.miniature.prior import tokenize
from trainer.miniature.rating import rating
from trainer.miniature.render import HELD_OUT_SEED, LUMA, POLICY_WORLD, STYLES, WIDE_WORLD, Renders, World, render_set
from trainer.miniature.tokenizer import psnr, to_float
from trainer.miniature.weights import FILES, load_classifier
from trainer.models.checkpoints import load_var, load_vqvae
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.pictures import save_grid
from trainer.policy import decode_uint8, generate, keyed_uniforms, sample

Images = NDArray[np.uint8]
# The miniature's inference settings; top-k keeps the same share of the vocabulary as the official 900 of 4096.
GUIDANCE, TOP_K, TOP_P = 1.5, 112, 0.96
BRIGHT, DARK = 0.8, 0.2
SAMPLE_SEED, PICTURES_SEED = 7, 8
EVALUATED = 1024  # held-out pictures, or samples of a kind


class Sampling(NamedTuple):
    """A way of drawing samples; no two share random numbers, for `key` takes the place of the step in theirs."""

    key: int
    temperature: float = 1.0
    guided: bool = False


PLAIN, COOL, INFERENCE = Sampling(0), Sampling(1, temperature=0.7), Sampling(2, guided=True)


def held_out(count: int, world: World = WIDE_WORLD) -> Renders:
    """Renders that nothing was trained on."""
    return render_set(HELD_OUT_SEED, count, world)


@torch.no_grad()
def decode_tokens(vqvae: VQVAE, tokens_BL: Tensor) -> Images:
    """Pictures of tokens int64 (B, L), uint8 (B, H, W, 3)."""
    parts = [decode_uint8(vqvae, vqvae.quantize.embed_scales(part)[0]) for part in tokens_BL.split(64)]
    return torch.cat(parts).numpy()


def reconstruct(vqvae: VQVAE, images: Images) -> Images:
    """What encoding to tokens and decoding leaves of images, uint8 (B, H, W, 3)."""
    return decode_tokens(vqvae, tokenize(vqvae, images))


def tokenizer_quality(vqvae: VQVAE, renders: Renders) -> dict[str, float]:
    """Mean over images of the PSNR in dB, in all and for each style, and the number of codes in use."""
    values_B = psnr(to_float(reconstruct(vqvae, renders.images)), to_float(renders.images)).numpy()
    by_style = {
        f"psnr_db/{style}": float(values_B[renders.styles == index].mean()) for index, style in enumerate(STYLES)
    }
    used = tokenize(vqvae, renders.images).unique().numel()
    return {"psnr_db": float(values_B.mean()), **by_style, "codes_in_use": float(used)}


@torch.no_grad()
def draw(var: VAR, vqvae: VQVAE, count: int, sampling: Sampling, *, seed: int = SAMPLE_SEED) -> Images:
    """Samples whose labels take turns."""
    pieces: list[Images] = []
    for first in range(0, count, 64):
        slots = range(first, min(first + 64, count))
        labels = torch.tensor([slot % len(CLASSES) for slot in slots])
        uniforms = keyed_uniforms(seed, sampling.key, slots, 1, var.config.length)
        if sampling.guided:
            rollout = generate(var, vqvae, labels, uniforms_BL=uniforms, guidance=GUIDANCE, top_k=TOP_K, top_p=TOP_P)
        else:
            rollout = sample(var, vqvae, labels, temperature=sampling.temperature, uniforms_BL=uniforms)
        pieces.append(decode_uint8(vqvae, rollout.f_hat_BCHW).numpy())
    return np.concatenate(pieces)


def diversity(images: Images) -> float:
    """Within-class diversity: mean RMS distance of pairs of images of a class, each averaged to 16×16; in [0, 1].

    The class of image i is i mod the number of classes.
    """
    B, side = len(images), images.shape[1] // 4
    small = images.reshape(B, side, 4, side, 4, 3).mean(axis=(2, 4)).reshape(B, -1) / 255
    distances: list[float] = []
    for label in range(len(CLASSES)):
        rows = small[label :: len(CLASSES)]
        squared = ((rows[:, None] - rows[None]) ** 2).mean(axis=2)
        distances.append(float(np.sqrt(squared[np.triu_indices(len(rows), 1)]).mean()))
    return float(np.mean(distances))


def brightness(images: Images) -> NDArray[np.float64]:
    """Mean luma of each image, float64 (B,) in [0, 1]."""
    return np.asarray((images / 255.0 @ LUMA).mean(axis=(1, 2)))


def judge_quality(kind: Kind) -> dict[str, float]:
    """Accuracy of a classifier on renders of both worlds, and on the reconstructions that it will be shown."""
    model, wide, policy = load_classifier(kind), held_out(EVALUATED), held_out(EVALUATED, POLICY_WORLD)
    targets, policy_targets = (r.labels if kind == "label" else r.styles for r in (wide, policy))
    restored = reconstruct(load_vqvae(FILES["vqvae"]), wide.images)
    return {
        "accuracy/wide_world": accuracy(model, wide.images, targets),
        "accuracy/policy_world": accuracy(model, policy.images, policy_targets),
        "accuracy/reconstructions": accuracy(model, restored, targets),
    }


def cosines(encoder: Encoder, images: Images, texts: Sequence[str]) -> NDArray[np.float64]:
    """Cosines of images with texts, float64 (B, T)."""
    return (encoder.images(images) @ encoder.texts(texts).T).double().cpu().numpy()


def clip_quality() -> dict[str, float]:
    """Zero-shot accuracies of the miniature's CLIP, and how well the prompts of the recipes tell their styles."""
    encoder, wide = Encoder(MINIATURE_MODEL, miniature_source("clip"), STANDARD), held_out(2 * EVALUATED)
    restored = reconstruct(load_vqvae(FILES["vqvae"]), wide.images)
    metrics: dict[str, float] = {}
    for name, images in (("renders", wide.images), ("reconstructions", restored)):
        for kind, names, targets in (("style", STYLES, wide.styles), ("class", CLASSES, wide.labels)):
            chosen = cosines(encoder, images, [with_article(name) for name in names]).argmax(axis=1)
            metrics[f"zero_shot_{kind}/{name}"] = float((chosen == targets).mean())
        for style in ("old picture", "painting"):
            scores = cosines(encoder, images, [with_article(style)])[:, 0]
            metrics[f"auc/{style}/{name}"] = auc(scores, wide.styles == STYLES.index(style))
    return metrics


def aesthetic_quality() -> dict[str, float]:
    """How well the miniature's aesthetic score orders pictures as the rule does."""
    reward, wide = MiniatureAesthetic.configured(RewardOptions()), held_out(2 * EVALUATED)
    reward.warmup()
    restored = reconstruct(load_vqvae(FILES["vqvae"]), wide.images)
    metrics: dict[str, float] = {}
    for name, images in (("renders", wide.images), ("reconstructions", restored)):
        scores, ratings = reward.score(images, None), rating(images)
        metrics[f"rank_correlation/{name}"] = rank_correlation(scores, ratings)
        metrics[f"mean_error/{name}"] = float(np.abs(scores - ratings).mean())
    return metrics


def policy_quality(var: VAR, vqvae: VQVAE) -> dict[str, float]:
    """The bar of docs/miniature.md for the pre-trained policy."""
    label, style = load_classifier("label"), load_classifier("style")
    count = EVALUATED
    targets = np.arange(count) % len(CLASSES)
    plain, cool = draw(var, vqvae, 2 * count, PLAIN), draw(var, vqvae, count, COOL)
    guided = draw(var, vqvae, count, INFERENCE)
    renders = held_out(count, POLICY_WORLD)
    painting = STYLES.index("painting")
    called_painting = np.concatenate([predict(style, batch).argmax(axis=1) == painting for batch in (plain, cool)])
    luma = brightness(cool)
    return {
        "label_accuracy/temperature_1": accuracy(label, plain, np.tile(targets, 2)),
        "label_accuracy/temperature_0.7": accuracy(label, cool, targets),
        "label_accuracy/inference": accuracy(label, guided, targets),
        "label_accuracy/renders": accuracy(label, renders.images, renders.labels),
        "diversity/temperature_1": diversity(plain[:count]),
        "diversity/temperature_0.7": diversity(cool),
        "diversity/renders": diversity(renders.images),
        "paintings_per_sample": float(called_painting.mean()),
        "bright_share/temperature_0.7": float((luma >= BRIGHT).mean()),
        "dark_share/temperature_0.7": float((luma < DARK).mean()),
    }


def measure(stage: str) -> dict[str, float]:
    """What docs/miniature.md asks of a stage's stored weights.

    Raises:
        CheckpointError: weights are missing.
    """
    if stage in ("label", "style"):
        return judge_quality("label" if stage == "label" else "style")
    if stage == "clip":
        return clip_quality()
    if stage == "aesthetic":
        return aesthetic_quality()
    vqvae = load_vqvae(FILES["vqvae"])
    if stage == "vqvae":
        return tokenizer_quality(vqvae, held_out(EVALUATED))
    return policy_quality(load_var(FILES["var"]), vqvae)


def save_extremes(path: Path, images: Images) -> None:
    """A grid of the ten best and the ten worst pictures: two rows by the rule, then two by the aesthetic head."""
    reward = MiniatureAesthetic.configured(RewardOptions())
    reward.warmup()
    rows = []
    for scores in (rating(images), reward.score(images, None)):
        order = np.argsort(scores)
        rows += [*order[-1:-11:-1], *order[:10]]
    save_grid(path, images[rows], columns=10)


def save_pictures(folder: Path) -> None:
    """Grids of renders (a row a style), reconstructions (below each original), best and worst renders, and samples.

    Raises:
        CheckpointError: weights are missing.
        OSError: a picture cannot be written.
    """
    var, vqvae = load_var(FILES["var"]), load_vqvae(FILES["vqvae"])
    every = held_out(64 * len(CLASSES))
    rows = []
    for index in range(len(STYLES)):
        for label in range(len(CLASSES)):
            rows.append(int(np.flatnonzero((every.styles == index) & (every.labels == label))[0]))
    originals = every.images[rows]
    save_grid(folder / "renders.png", originals, columns=len(CLASSES))
    restored = reconstruct(vqvae, originals)
    pairs = np.stack([originals.reshape(4, 16, *originals.shape[1:]), restored.reshape(4, 16, *originals.shape[1:])], 1)
    save_grid(folder / "reconstructions.png", pairs.reshape(-1, *originals.shape[1:]), columns=len(CLASSES))
    save_extremes(folder / "aesthetic.png", every.images)
    for name, sampling in (("temperature_1", PLAIN), ("temperature_0.7", COOL), ("inference", INFERENCE)):
        images = draw(var, vqvae, 64, sampling, seed=PICTURES_SEED)
        save_grid(folder / f"samples_{name}.png", images, columns=len(CLASSES))
