"""The tiny models give the official code's numbers."""

import pytest
import torch
from torch import Tensor

from tests.models.agree import clear_positions
from trainer.models.var import VAR
from trainer.models.vqvae import VQVAE
from trainer.policy import generate

TOLERANCE = {"atol": 1e-3, "rtol": 0.0}
Golden = dict[str, Tensor]


def test_teacher_forcing_input_and_decoded_image(vqvae: VQVAE, golden: Golden) -> None:
    """Tokens become the official teacher-forcing input and the official image."""
    f_hat_BCHW, var_input_BLmC = vqvae.quantize.embed_scales(golden["tokens"])
    torch.testing.assert_close(var_input_BLmC, golden["var_input"], **TOLERANCE)
    torch.testing.assert_close(vqvae.decode(f_hat_BCHW), golden["decoded"], **TOLERANCE)


def test_logits(var: VAR, golden: Golden) -> None:
    """Teacher-forced logits are the official ones."""
    with torch.no_grad():
        logits_BLV = var(golden["labels"], golden["var_input"])
    torch.testing.assert_close(logits_BLV, golden["logits"], **TOLERANCE)
    moments = torch.stack((logits_BLV.mean(), logits_BLV.std()))
    torch.testing.assert_close(moments, golden["logits_mean_std"], **TOLERANCE)


def test_encoded_tokens(vqvae: VQVAE, golden: Golden) -> None:
    """An image becomes the official tokens wherever two codes are not equally near."""
    images, expected_BL = golden["encode_input"], golden["encoded_tokens"]
    clear_BL = clear_positions(vqvae, images, expected_BL)
    assert clear_BL.float().mean() > 0.95
    assert torch.equal(vqvae.encode_tokens(images)[clear_BL], expected_BL[clear_BL])


@pytest.mark.parametrize("guidance", [0, 1.5])
def test_greedy_sample(var: VAR, vqvae: VQVAE, golden: Golden, guidance: float) -> None:
    """Greedy sampling, with and without guidance, gives the official picture."""
    uniforms_BL = torch.full(golden["tokens"].shape, 0.5)
    rollout = generate(var, vqvae, golden["labels"], uniforms_BL=uniforms_BL, guidance=guidance, top_k=1, top_p=1.0)
    images = (vqvae.decode(rollout.f_hat_BCHW) + 1) / 2
    torch.testing.assert_close(images, golden[f"greedy_cfg{guidance}"], **TOLERANCE)
