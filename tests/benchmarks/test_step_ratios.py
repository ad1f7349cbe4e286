"""The loops that the fast ones are compared with compute the same."""

import torch

from benchmarks.formula import fill
from benchmarks.step_ratios import paired, prefix_logits, sample_without_cache
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.policy import keyed_uniforms, sample

SCALES = (1, 2, 3)
TINY = VARConfig(2, 32, 4, patch_nums=SCALES, vocab_size=32, latent_channels=4, num_classes=4)


def test_sampling_without_a_cache_draws_the_same_tokens() -> None:
    """From logits that are those of one pass over all scales."""
    var = VAR(TINY).eval()
    vqvae = VQVAE(VQVAEConfig(32, 4, 8, (1, 1), 1, SCALES, 2, 4)).eval().requires_grad_(False)
    fill(var)
    fill(vqvae.quantize)
    labels_B, uniforms_BL = torch.arange(4), keyed_uniforms(0, 0, range(4), 1, TINY.length)
    drawn = sample(var, vqvae, labels_B, temperature=0.7, uniforms_BL=uniforms_BL)
    assert torch.equal(sample_without_cache(var, vqvae, labels_B, uniforms_BL, 0.7), drawn.tokens_BL)
    inputs = drawn.var_input_BLmC.split((4, 9), dim=1)
    with torch.no_grad():
        whole_BLV = var(labels_B, drawn.var_input_BLmC)
        for known, end in ((0, 1), (1, 5), (2, 14)):
            found_BlV = prefix_logits(var, labels_B, inputs[:known])
            torch.testing.assert_close(found_BlV, whole_BLV[:, :end], atol=1e-4, rtol=1e-4)


def test_a_pair_compares_what_it_is_given() -> None:
    """Twice the work takes more, in seconds of both kinds."""
    square = torch.randn(300, 300)
    pair = paired(lambda: [square @ square for _ in range(40)], lambda: [square @ square for _ in range(10)], 5)
    assert pair.ratio > 1.5
    assert pair.cpu_ratio > 1.5
    assert pair.first_s > pair.second_s > 0
