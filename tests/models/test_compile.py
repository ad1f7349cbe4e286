"""Compiled blocks compute what plain ones do."""

import shutil
from copy import deepcopy

import pytest
import torch

from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.policy import keyed_uniforms, log_probs, sample

PATCH_NUMS = (1, 2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own insides
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_blocks_agree_with_plain_ones() -> None:
    """The same tokens, log-probabilities and gradients; a state's names do not change."""
    torch.manual_seed(0)
    plain = VAR(VARConfig(2, 32, 4, patch_nums=PATCH_NUMS, vocab_size=64, latent_channels=4, num_classes=4)).eval()
    torch.nn.init.normal_(plain.head.weight, std=0.3)
    vqvae = VQVAE(
        VQVAEConfig(64, 4, 8, (1, 1), 1, patch_nums=PATCH_NUMS, share_quant_resi=2, norm_groups=4)
    ).requires_grad_(False)
    compiled = deepcopy(plain)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    labels_B, uniforms_BL = torch.arange(4), keyed_uniforms(0, 0, range(4), 1, 14)
    drawn = [sample(var, vqvae, labels_B, temperature=0.7, uniforms_BL=uniforms_BL) for var in (compiled, plain)]
    assert torch.equal(drawn[0].tokens_BL, drawn[1].tokens_BL)
    torch.testing.assert_close(drawn[0].log_probs_BL, drawn[1].log_probs_BL, atol=1e-5, rtol=1e-5)
    for var in (compiled, plain):
        found_BL, _ = log_probs(var, labels_B, drawn[1].var_input_BLmC, drawn[1].tokens_BL, temperature=0.7)
        torch.testing.assert_close(found_BL.detach(), drawn[1].log_probs_BL, atol=1e-5, rtol=1e-5)
        found_BL.square().mean().backward()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
