"""One distribution: what is sampled is what is scored, and nothing but its own numbers sets a sample."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.conftest import TINY
from tests.models.fill import fill
from trainer.miniature.weights import FILES
from trainer.models.checkpoints import load_vqvae
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.policy import Rollout, decode_uint8, generate, keyed_uniforms, log_probs, sample

TEMPERATURE = 0.7
# Bounds of |recomputed - recorded| log-probability under bfloat16 autocast, for logits of standard deviation 1.4;
# measured on a CPU: at most 0.024, 0.005 on average.
BFLOAT16_MAX, BFLOAT16_MEAN = 0.05, 0.01


def draw(var: VAR, vqvae: VQVAE, batch: int, temperature: float = TEMPERATURE, seed: int = 0) -> tuple[Tensor, Rollout]:
    labels_B = torch.arange(batch) % TINY.num_classes
    uniforms_BL = keyed_uniforms(seed, 0, range(batch), 1, TINY.length)
    return labels_B, sample(var, vqvae, labels_B, temperature=temperature, uniforms_BL=uniforms_BL)


@pytest.fixture(scope="module")
def rollout(var: VAR, vqvae: VQVAE) -> tuple[Tensor, Rollout]:
    return draw(var, vqvae, batch=64)


@pytest.fixture(scope="module")
def short() -> tuple[VAR, VQVAE]:
    """The tiny models with two scales only, for tests that need many samples."""
    var = VAR(replace(TINY, patch_nums=(1, 2)))
    vqvae = VQVAE(VQVAEConfig(vocab_size=64, z_channels=8, ch=32, patch_nums=(1, 2)))
    fill(var)
    fill(vqvae)
    return var.eval(), vqvae.eval()


@torch.no_grad()
def test_recorded_log_probs_are_the_recomputed_ones(var: VAR, rollout: tuple[Tensor, Rollout]) -> None:
    """One teacher-forced pass gives the log-probs that were recorded while sampling: the first ratio is 1."""
    labels_B, drawn = rollout
    recomputed_BL, entropy_BL = log_probs(var, labels_B, drawn.var_input_BLmC, drawn.tokens_BL, temperature=TEMPERATURE)
    assert recomputed_BL.dtype == drawn.log_probs_BL.dtype == entropy_BL.dtype == torch.float32
    torch.testing.assert_close(recomputed_BL, drawn.log_probs_BL, atol=1e-4, rtol=0)


@torch.no_grad()
def test_recorded_log_probs_under_bfloat16(var: VAR, vqvae: VQVAE) -> None:
    """Under bfloat16 autocast both log-probs agree to the stated bounds, and their ratio averages 1."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        labels_B, drawn = draw(var, vqvae, batch=32)
        recomputed_BL, _ = log_probs(var, labels_B, drawn.var_input_BLmC, drawn.tokens_BL, temperature=TEMPERATURE)
    assert recomputed_BL.dtype == drawn.log_probs_BL.dtype == drawn.f_hat_BCHW.dtype == torch.float32
    gap_BL = recomputed_BL - drawn.log_probs_BL
    assert gap_BL.abs().max() < BFLOAT16_MAX
    assert gap_BL.abs().mean() < BFLOAT16_MEAN
    assert abs(gap_BL.exp().mean() - 1) < 0.002


def test_rollout_holds_what_the_tokens_imply(vqvae: VQVAE, rollout: tuple[Tensor, Rollout]) -> None:
    """The latent map and the transformer's input of a rollout are those that its tokens give."""
    drawn = rollout[1]
    f_hat_BCHW, var_input_BLmC = vqvae.quantize.embed_scales(drawn.tokens_BL)
    torch.testing.assert_close(drawn.f_hat_BCHW, f_hat_BCHW)
    torch.testing.assert_close(drawn.var_input_BLmC, var_input_BLmC)
    assert not any(part.requires_grad for part in drawn)


@torch.no_grad()
def test_log_probs_and_entropy_are_those_of_the_softmax(var: VAR, rollout: tuple[Tensor, Rollout]) -> None:
    """Against torch's own categorical distribution over logits / temperature."""
    labels_B, drawn = rollout
    logits_BLV = var(labels_B, drawn.var_input_BLmC)
    for temperature in (0.5, 1.3):
        found_BL, entropy_BL = log_probs(var, labels_B, drawn.var_input_BLmC, drawn.tokens_BL, temperature=temperature)
        expected = torch.distributions.Categorical(logits=logits_BLV / temperature)
        torch.testing.assert_close(found_BL, expected.log_prob(drawn.tokens_BL), atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy_BL, expected.entropy(), atol=1e-4, rtol=0)


def test_gradients_flow_through_log_probs_only(var: VAR, rollout: tuple[Tensor, Rollout]) -> None:
    """Log-probs can be differentiated; the entropy is a diagnostic."""
    labels_B, drawn = (part[:2] for part in (rollout[0], rollout[1].tokens_BL))
    found_BL, entropy_BL = log_probs(var, labels_B, rollout[1].var_input_BLmC[:2], drawn, temperature=TEMPERATURE)
    assert found_BL.requires_grad
    assert not entropy_BL.requires_grad
    (gradient,) = torch.autograd.grad(found_BL.sum(), [var.head.weight])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_frequencies_follow_the_softmax(short: tuple[VAR, VQVAE], temperature: float) -> None:
    """First tokens of one label are drawn as often as softmax(logits / temperature) says (chi-square, 63 degrees)."""
    var, vqvae = short
    count, length = 4000, var.config.length
    labels_B = torch.full((count,), 3)
    with torch.no_grad():
        probs_V = (var.step(0, None, var.start(labels_B[:1]))[0, 0] / temperature).softmax(-1)
    rng = torch.Generator().manual_seed(5)
    observed_V = torch.zeros(TINY.vocab_size)
    for part_B in labels_B.split(1000):
        uniforms_BL = torch.rand(len(part_B), length, generator=rng)
        tokens_BL = sample(var, vqvae, part_B, temperature=temperature, uniforms_BL=uniforms_BL).tokens_BL
        observed_V += tokens_BL[:, 0].bincount(minlength=TINY.vocab_size)
    chi_square = ((observed_V - count * probs_V) ** 2 / (count * probs_V)).sum()
    assert chi_square < 110  # exceeded by chance twice in 10,000


def test_temperature_matters(var: VAR, vqvae: VQVAE) -> None:
    """A lower temperature draws likelier tokens."""
    cold, hot = (draw(var, vqvae, 16, temperature)[1].log_probs_BL.mean() for temperature in (0.3, 1.5))
    assert cold > hot + 1


def test_a_sample_does_not_depend_on_its_batch(var: VAR, vqvae: VQVAE) -> None:
    """The same label and numbers give the same tokens alone, in a batch, and in another order."""
    labels_B = torch.arange(6)
    uniforms_BL = keyed_uniforms(1, 2, range(6), 1, TINY.length)

    def tokens(rows: Sequence[int]) -> Tensor:
        chosen = list(rows)
        drawn = sample(var, vqvae, labels_B[chosen], temperature=TEMPERATURE, uniforms_BL=uniforms_BL[chosen])
        return drawn.tokens_BL

    together_BL = tokens(range(6))
    assert torch.equal(torch.cat([tokens([row]) for row in range(6)]), together_BL)
    assert torch.equal(tokens([5, 3, 1]), together_BL[[5, 3, 1]])


def test_class_modulation_is_computed_once_an_image(var: VAR, vqvae: VQVAE) -> None:
    """A block's AdaLN projection runs once for a whole sampling run, not once a scale."""
    calls: list[int] = []
    handle = var.blocks[0].ada_lin.register_forward_hook(lambda *_: calls.append(1))
    try:
        draw(var, vqvae, batch=2)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_top_k_of_one_is_greedy(var: VAR, vqvae: VQVAE) -> None:
    """With top_k = 1 the uniforms do not matter, and every token is the likeliest."""
    labels_B = torch.tensor([1, 4])
    drawn = [
        generate(var, vqvae, labels_B, uniforms_BL=torch.full((2, TINY.length), u), guidance=0, top_k=1)
        for u in (0.0, 0.999)
    ]
    assert torch.equal(drawn[0].tokens_BL, drawn[1].tokens_BL)
    with torch.no_grad():
        logits_BLV = var(labels_B, drawn[0].var_input_BLmC)
    assert torch.equal(logits_BLV.argmax(-1), drawn[0].tokens_BL)
    assert torch.equal(drawn[0].log_probs_BL, torch.zeros(2, TINY.length))


def test_generate_without_filters_is_sample(var: VAR, vqvae: VQVAE) -> None:
    """Inference with guidance and filters off draws what the policy draws."""
    labels_B, drawn = draw(var, vqvae, batch=4)
    same = generate(
        var,
        vqvae,
        labels_B,
        uniforms_BL=keyed_uniforms(0, 0, range(4), 1, TINY.length),
        guidance=0,
        top_k=0,
        top_p=1.0,
        temperature=TEMPERATURE,
    )
    assert torch.equal(same.tokens_BL, drawn.tokens_BL)
    assert torch.equal(same.log_probs_BL, drawn.log_probs_BL)


def test_filters_keep_what_they_say(short: tuple[VAR, VQVAE]) -> None:
    """First tokens come from the k likeliest and from the smallest set that holds the mass p."""
    var, vqvae = short
    count = 512
    labels_B = torch.zeros(count, dtype=torch.long)
    uniforms_BL = torch.rand(count, var.config.length, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probs_V = var.step(0, None, var.start(labels_B[:1]))[0, 0].softmax(-1)
    ranked = probs_V.argsort(descending=True)
    kept = int((probs_V[ranked].cumsum(0) < 0.5).sum()) + 1
    for options, allowed in (({"top_k": 5, "top_p": 1.0}, 5), ({"top_k": 0, "top_p": 0.5}, kept)):
        drawn = generate(var, vqvae, labels_B, uniforms_BL=uniforms_BL, guidance=1.5, **options)
        assert set(drawn.tokens_BL[:, 0].tolist()) == set(ranked[:allowed].tolist())


def test_extreme_uniforms_draw_possible_tokens(var: VAR, vqvae: VQVAE) -> None:
    """The ends of [0, 1) never draw a token that was filtered out."""
    for edge in (0.0, 1 - 2**-24):
        uniforms_BL = torch.full((10, TINY.length), edge)
        drawn = generate(var, vqvae, torch.arange(10), uniforms_BL=uniforms_BL, guidance=0, top_k=3, top_p=0.9)
        assert drawn.log_probs_BL.isfinite().all()


def test_keyed_uniforms_depend_on_their_key_alone() -> None:
    """Every seed, step and slot has numbers of its own, whichever slots are asked for together."""
    keys = [(seed, step, slot) for seed in (0, 1) for step in (0, 1, 2**33) for slot in (0, 1, 7)]
    groups = {key: keyed_uniforms(key[0], key[1], [key[2]], 2, 5) for key in keys}
    for key, numbers in groups.items():
        assert torch.equal(numbers, keyed_uniforms(key[0], key[1], [key[2]], 2, 5))
    rows = torch.cat(list(groups.values()))
    assert len(rows.unique()) == rows.numel()
    together = keyed_uniforms(0, 0, [7, 0, 1], 2, 5)
    assert torch.equal(together, torch.cat([groups[0, 0, slot] for slot in (7, 0, 1)]))
    assert together.dtype == torch.float32
    assert 0 <= float(rows.min()) <= float(rows.max()) < 1


def test_keyed_uniforms_are_uniform() -> None:
    """Mean and variance are those of the uniform distribution."""
    numbers = keyed_uniforms(3, 4, range(100), 16, 30)
    assert numbers.shape == (1600, 30)
    assert abs(numbers.mean() - 1 / 2) < 0.006
    assert abs(numbers.var() - 1 / 12) < 0.002


def test_decode_uint8(vqvae: VQVAE, golden: dict[str, Tensor]) -> None:
    """Pictures are the decoder's images, channels last, rounded to 0 … 255."""
    f_hat_BCHW, _ = vqvae.quantize.embed_scales(golden["tokens"])
    images_BhwC = decode_uint8(vqvae, f_hat_BCHW)
    assert images_BhwC.dtype == torch.uint8
    assert images_BhwC.is_contiguous()
    expected = (golden["decoded"].permute(0, 2, 3, 1) + 1) * 127.5
    assert (images_BhwC - expected).abs().max() < 0.6


def test_a_decoder_in_bfloat16_draws_the_same_picture() -> None:
    """Of the miniature's own tokens: mean luma within 0.001, a pixel's value within 1 on average."""
    vqvae = load_vqvae(FILES["vqvae"])
    tokens_BL = torch.randint(512, (8, 130), generator=torch.Generator().manual_seed(0))
    f_hat_BCHW, _ = vqvae.quantize.embed_scales(tokens_BL)
    fast, plain = (decode_uint8(vqvae, f_hat_BCHW, dtype=dtype).float() for dtype in (torch.bfloat16, torch.float32))
    assert not torch.equal(fast, plain)
    assert (fast - plain).abs().mean() < 1
    luma = torch.tensor([0.2989, 0.5870, 0.1140]) / 255
    assert ((fast - plain) @ luma).mean(dim=(1, 2)).abs().max() < 0.001


def test_misuse_is_refused(var: VAR, vqvae: VQVAE) -> None:
    """Labels, temperatures, filters, keys and shapes out of range are named, and so is active DropPath."""
    labels_B, uniforms_BL = torch.tensor([0]), torch.zeros(1, TINY.length)
    with pytest.raises(ValueError, match="temperature is 0"):
        sample(var, vqvae, labels_B, temperature=0, uniforms_BL=uniforms_BL)
    with pytest.raises(ValueError, match="classes 0 … 9"):
        sample(var, vqvae, labels_B + 10, temperature=1, uniforms_BL=uniforms_BL)
    with pytest.raises(ValueError, match="one number a token"):
        sample(var, vqvae, labels_B, temperature=1, uniforms_BL=uniforms_BL[:, 1:])
    with pytest.raises(ValueError, match="top_p 0"):
        generate(var, vqvae, labels_B, uniforms_BL=uniforms_BL, top_p=0)
    with pytest.raises(ValueError, match="step -1"):
        keyed_uniforms(0, -1, [0], 1, 1)
    with pytest.raises(ValueError, match="DropPath is active"):
        sample(VAR(TINY, drop_path=0.1).train(), vqvae, labels_B, temperature=1, uniforms_BL=uniforms_BL)
