"""What the training step's parts cost beside the least that they could: `python -m benchmarks.step_ratios`.

- `cached_sampling`: tokens with the key-value cache, over a loop that runs all scales so far at each scale.
- `optimise`: the optimise phase of the miniature, over a bare forward, backward and AdamW on the same batch.
- `operators`: the share of a whole step that each operator takes by itself.

Pairs are interleaved, and the ratio is the median of theirs. On a machine that others use as well, that of CPU seconds
is the steadier one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.formula import fill
from benchmarks.train_step import reward_of
from trainer import machine
from trainer.build import make_learner
from trainer.config import Config
from trainer.distributed import Group
from trainer.loop import train_step
from trainer.models.attention import Scales
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.options import load_config
from trainer.policy import keyed_uniforms, sample
from trainer.settings import Ranks
from trainer.update import Batch, Updates, minibatches


class Pair(NamedTuple):
    """Two ways of doing the same work: medians of wall-clock seconds, of their ratio, and of that of CPU seconds."""

    first_s: float
    second_s: float
    ratio: float
    cpu_ratio: float


def paired(first: Callable[[], object], second: Callable[[], object], rounds: int) -> Pair:
    """Measure two pieces of work in turn, after one round that does not count."""
    wall: list[tuple[float, ...]] = []
    cpu: list[tuple[float, ...]] = []
    for _ in range(1 + rounds):
        spent = []
        for work in (first, second):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            work()
            spent.append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
        walls, cpus = zip(*spent, strict=True)
        wall.append(walls)
        cpu.append(cpus)
    ratio, cpu_ratio = (statistics.median(one / other for one, other in each[1:]) for each in (wall, cpu))
    return Pair(*(statistics.median(each) for each in zip(*wall[1:], strict=True)), ratio, cpu_ratio)


def prefix_logits(var: VAR, labels_B: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Logits (B, L', V) of all scales so far in one pass, as a model without a cache gives them.

    Args:
        var: the transformer.
        labels_B: int64 (B,).
        inputs: (B, l, Cvae) of the scales after the first, as far as they are known.
    """
    cond_BD = var.class_emb(labels_B)
    parts = [cond_BD[:, None] + var.pos_start, *(var.word_embed(input_BlC) for input_BlC in inputs)]
    x_BlC = torch.cat(parts, dim=1)
    end = x_BlC.shape[1]
    x_BlC = x_BlC + var.lvl_embed(var.lvl_1L[:, :end]) + var.pos_1LC[:, :end]
    scales = Scales(var.attn_bias_for_masking[..., :end, :end], None)
    modulation = var.modulate(cond_BD)
    for block, modulation_B16C in zip(var.blocks, modulation.blocks, strict=True):
        x_BlC = block(x_BlC, modulation_B16C, scales)
    logits_BlV: Tensor = var.head(var.head_nm(x_BlC, modulation.head_B12C))
    return logits_BlV


@torch.no_grad()
def sample_without_cache(var: VAR, vqvae: VQVAE, labels_B: Tensor, uniforms_BL: Tensor, temperature: float) -> Tensor:
    """Tokens int64 (B, L) as `trainer.policy.sample` draws them, every scale from a pass over all scales so far."""
    side = var.config.patch_nums[-1]
    f_hat_BCHW = torch.zeros(len(labels_B), var.config.latent_channels, side, side)
    tokens: list[Tensor] = []
    inputs: list[Tensor] = []
    for scale, (begin, end) in enumerate(pairwise(var.config.offsets)):
        logits_BlV = prefix_logits(var, labels_B, inputs)[:, begin:]
        cdf_BlV = (logits_BlV / temperature).softmax(dim=-1).cumsum(dim=-1)
        target_Bl1 = uniforms_BL[:, begin:end, None] * cdf_BlV[..., -1:]
        tokens.append(torch.searchsorted(cdf_BlV, target_Bl1, right=True)[..., 0].clamp_max(cdf_BlV.shape[-1] - 1))
        f_hat_BCHW, next_BlC = vqvae.quantize.next_input(scale, f_hat_BCHW, tokens[-1])
        if next_BlC is not None:
            inputs.append(next_BlC)
    return torch.cat(tokens, dim=1)


def cached_sampling(config: VARConfig, images: int, rounds: int) -> Pair:
    """Sampling with the cache, and without it."""
    var = VAR(config).eval()
    vqvae = VQVAE(VQVAEConfig(patch_nums=config.patch_nums)).eval().requires_grad_(False)
    fill(var)
    fill(vqvae.quantize)
    labels_B = torch.arange(images) % config.num_classes
    uniforms_BL = keyed_uniforms(0, 0, range(images), 1, config.length)
    return paired(
        lambda: sample(var, vqvae, labels_B, temperature=0.7, uniforms_BL=uniforms_BL),
        lambda: sample_without_cache(var, vqvae, labels_B, uniforms_BL, 0.7),
        rounds,
    )


def optimise(rounds: int) -> Pair:
    """Seconds of the miniature's optimise phase, of a bare one on the same batch, and their ratio."""
    config, group = _config(), Group(Ranks(), torch.device("cpu"), timeout_s=60)
    ours, bare = (make_learner(config, group, torch.device("cpu")) for _ in range(2))
    policy, size = ours.policy, config.rollout.group_size
    labels_B = policy.draw_conditions(0, 0, config.rollout.labels).repeat_interleave(size)
    uniforms_BL = keyed_uniforms(0, 0, range(config.rollout.labels), size, policy.length)
    drawn = policy.sample(labels_B, temperature=config.rollout.temperature, uniforms_BL=uniforms_BL)
    advantages_B = torch.randn(len(labels_B), generator=torch.Generator().manual_seed(0))
    batch = Batch(labels_B, drawn.tokens_BL, drawn.log_probs_BL, drawn.log_probs_BL, advantages_B)
    parts = minibatches(len(labels_B), config.optim.minibatch, 0, 0)

    def phase() -> None:
        updates = Updates(policy, ours.optimizer, group, config)
        for rows_M in parts:
            updates.make(batch, rows_M, 0)
        updates.finish(batch, 0)
        updates.metrics()

    var: VAR = bare.policy.var  # type: ignore[attr-defined]

    def least() -> None:
        for rows_M in parts:
            logits_MLV = var(labels_B[rows_M], drawn.var_input_BLmC[rows_M])
            F.cross_entropy(logits_MLV.flatten(0, 1), drawn.tokens_BL[rows_M].flatten()).backward()
            bare.optimizer.step()
            bare.optimizer.zero_grad(set_to_none=True)

    return paired(phase, least, rounds)


def operators() -> dict[str, float]:
    """Each operator's own share of a whole step of the miniature with a free reward, the largest first."""
    config, device = _config(), torch.device("cpu")
    learner = make_learner(config, Group(Ranks(), device, timeout_s=60), device)

    with reward_of("free", config, device) as submit:
        train_step(learner, submit, config, 0)  # the first allocates
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train_step(learner, submit, config, 1)
    own = {entry.key: float(entry.self_cpu_time_total) for entry in profiler.key_averages()}
    total = sum(own.values())
    return {name: time_us / total for name, time_us in sorted(own.items(), key=lambda item: -item[1])}


def _config() -> Config:
    return load_config("mini-bright", {"model.classifier": "none", "run.device": "cpu"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all three, print them, and write the numbers where they are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_ratios", description=__doc__)
    parser.add_argument("--depth", type=int, default=16, help="of the published model that samples")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if min(options.images, options.rounds) < 1:
        parser.error(f"--images is {options.images}, --rounds {options.rounds}: both must be at least 1")
    pairs = {
        f"sampling of {options.images} images at d{options.depth}, cache ÷ recomputed": cached_sampling(
            VARConfig.for_depth(options.depth), options.images, options.rounds
        ),
        "optimise phase of the miniature ÷ bare": optimise(2 * options.rounds),
    }
    shares = operators()
    console = Console(highlight=False, width=120)
    hardware = f"{machine.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title = f"{machine.today()}, commit {machine.commit()}, {hardware}"
    table = Table("", "seconds", "of", "ratio", "of CPU seconds", title=title, title_justify="left")
    for name, pair in pairs.items():
        table.add_row(name, *(f"{value:.3f}" for value in pair))
    console.print(table)
    largest = ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:10])
    console.print(f"operators, own share of a step: {largest}")
    if options.json is not None:
        named = {name: pair._asdict() for name, pair in pairs.items()}
        options.json.write_text(json.dumps({"title": title, "pairs": named, "operators": shares}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
