"""Pre-training: resuming changes nothing, and codes are placed and revived."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.miniature.fitting import Schedule, fit
from trainer.miniature.pretrain import Job, rendered, swap_fine_scales
from trainer.miniature.render import POLICY_WORLD, WIDE_WORLD
from trainer.miniature.tokenizer import CodeKeeper, psnr, to_float
from trainer.models.vqvae import VQVAE, VQVAEConfig

CPU = torch.device("cpu")
TINY = VQVAEConfig(
    vocab_size=16, z_channels=4, ch=4, ch_mult=(1, 2), num_res_blocks=1, patch_nums=(1, 2, 4), norm_groups=2
)


def _linear_fit(state: Path, muon_names: tuple[str, ...], *, stop_at: int | None = None) -> nn.Linear:
    """Fits a line; `stop_at` interrupts it there, as a killed process would."""
    torch.manual_seed(0)

    def loss(model: nn.Linear, step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()

    schedule = Schedule(steps=40, batch=8, lr=0.05, warmup=4)
    fitted = fit(
        "line", nn.Linear(3, 1), loss, schedule, state=state, device=CPU, muon_names=muon_names, save_every_s=0
    )
    return fitted.model


@pytest.mark.parametrize("muon_names", [(), ("weight",)])
def test_a_resumed_fit_equals_one_never_interrupted(tmp_path: Path, muon_names: tuple[str, ...]) -> None:
    """Interrupted at a step and started again, the averaged weights are bit for bit the same, by either optimizer."""
    whole = _linear_fit(tmp_path / "whole.pt", muon_names)
    with pytest.raises(KeyboardInterrupt):
        _linear_fit(tmp_path / "parts.pt", muon_names, stop_at=17)
    resumed = _linear_fit(tmp_path / "parts.pt", muon_names)
    assert torch.equal(whole.weight, resumed.weight)


def test_what_is_cached_is_named_by_its_origin(tmp_path: Path) -> None:
    """The same origin finds its file again; another seed, schedule or input never takes it for its own."""
    job = Job(tmp_path / "cache", seed=0, workers=1, device=CPU)
    path = job.kept("var.pt", 0, Schedule(steps=2, batch=1, lr=0.1), "tokens")
    assert path == job.kept("var.pt", 0, Schedule(steps=2, batch=1, lr=0.1), "tokens")
    assert path.parent.is_dir()
    assert path.suffix == ".pt"
    others = (
        job.kept("var.pt", 1, Schedule(steps=2, batch=1, lr=0.1), "tokens"),
        job.kept("var.pt", 0, Schedule(steps=3, batch=1, lr=0.1), "tokens"),
        job.kept("var.pt", 0, Schedule(steps=2, batch=1, lr=0.1), "other tokens"),
    )
    assert len({path, *others}) == 4


def test_malformed_pictures_keep_their_coarse_scales_and_their_group() -> None:
    """Each row takes its last scales, the third or a later one on, from a row of its group."""
    lengths, groups_N = (1, 4, 9, 16), np.arange(40) // 4 % 2
    tokens_NL = torch.arange(40)[:, None].expand(40, 30)
    mixed_NL = swap_fine_scales(tokens_NL, groups_N, lengths, seed=3)
    assert torch.equal(mixed_NL[:, :5], tokens_NL[:, :5])
    donors_NL = torch.from_numpy(groups_N)[mixed_NL]
    assert torch.equal(donors_NL, torch.from_numpy(groups_N)[:, None].expand(40, 30))
    assert (mixed_NL[:, -1] != tokens_NL[:, -1]).sum() >= 30
    assert (mixed_NL[:, 5] != tokens_NL[:, 5]).any()


def test_a_training_set_is_rendered_once(tmp_path: Path) -> None:
    """The second time it is read; another world is another set."""
    job = Job(tmp_path, seed=0, workers=1, device=CPU)
    first = rendered(job, 5, 8, POLICY_WORLD)
    (file,) = tmp_path.iterdir()
    made = file.stat().st_mtime_ns
    again = rendered(job, 5, 8, POLICY_WORLD)
    assert file.stat().st_mtime_ns == made
    assert (again.images == first.images).all()
    assert again.captions == first.captions
    rendered(job, 5, 8, WIDE_WORLD)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loss_that_is_not_finite_stops_the_fit(tmp_path: Path) -> None:
    """NaN is an error with the step in it, not a weight."""
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(
            "nan",
            nn.Linear(1, 1),
            lambda model, step: model(torch.ones(1, 1)).sum() * float("nan"),
            Schedule(steps=2, batch=1, lr=0.1),
            state=tmp_path / "nan.pt",
            device=CPU,
        )


def test_the_schedule_warms_up_and_ends_low() -> None:
    """The rates rise to their peak and fall to 2 % of it."""
    schedule = Schedule(steps=100, batch=1, lr=0.1, warmup=10)
    rates = [schedule.share_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.03


def test_codes_are_placed_where_the_residuals_are() -> None:
    """After k-means the quantization error is far below that of random codes."""
    torch.manual_seed(0)
    vqvae = VQVAE(TINY)
    images = torch.rand(32, 3, 8, 8) * 2 - 1
    latents = vqvae.latents(images).detach()
    before = float(vqvae.quantize(latents).loss.detach())
    CodeKeeper(vqvae, seed=0).place(vqvae, images)
    assert float(vqvae.quantize(latents).loss.detach()) < 0.5 * before


def test_dead_codes_move_to_residuals() -> None:
    """A code that nothing uses for long is moved onto a residual of the batch; used ones stay."""
    torch.manual_seed(0)
    vqvae = VQVAE(TINY)
    keeper = CodeKeeper(vqvae, seed=0)
    keeper.uses_V[:] = 1.0
    keeper.uses_V[3] = 0.0
    before = vqvae.quantize.embedding.weight.detach().clone()
    residuals = [torch.full((5, TINY.z_channels), 7.0)]
    keeper.revive(0, torch.zeros(1, 21, dtype=torch.long), residuals)
    changed = (vqvae.quantize.embedding.weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3]
    assert (vqvae.quantize.embedding.weight[3] == 7.0).all()


def test_psnr_of_a_known_error() -> None:
    """An error of 0.1 of the range everywhere is 20 dB."""
    image = torch.zeros(1, 3, 4, 4)
    assert float(psnr(image, image + 0.2)) == pytest.approx(20.0, abs=1e-4)


def test_to_float_spans_minus_one_to_one() -> None:
    """0 is −1 and 255 is 1."""
    pixels = np.array([[[[0, 255, 127]]]], dtype=np.uint8)
    assert to_float(pixels).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.00392], abs=1e-4)
