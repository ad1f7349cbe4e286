"""The models of the published d16 size give the official code's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.agree import clear_positions
from tests.models.conftest import load_golden
from tests.models.fill import fill
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE
from trainer.policy import generate

pytestmark = [pytest.mark.slow, pytest.mark.alone]
TOLERANCE = {"atol": 1e-3, "rtol": 0.0}
EVERY = 61  # the golden file keeps every 61st position and logit, and every 8th pixel
Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("d16.npz")


@pytest.fixture(scope="module")
def var() -> VAR:
    model = VAR(VARConfig.for_depth(16))
    fill(model)
    return model.eval()


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    model = VQVAE()
    fill(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def test_logits_and_decoded_image(var: VAR, vqvae: VQVAE, golden: Golden) -> None:
    """Tokens become the official teacher-forcing input, logits and image."""
    f_hat_BCHW, var_input_BLmC = vqvae.quantize.embed_scales(golden["tokens"])
    torch.testing.assert_close(var_input_BLmC[:, ::EVERY], golden["var_input"], **TOLERANCE)
    torch.testing.assert_close(vqvae.decode(f_hat_BCHW)[..., ::8, ::8], golden["decoded"], **TOLERANCE)
    logits_BLV = var(golden["labels"], var_input_BLmC)
    torch.testing.assert_close(logits_BLV[:, ::EVERY, ::EVERY], golden["logits"], **TOLERANCE)
    moments = torch.stack((logits_BLV.mean(), logits_BLV.std()))
    torch.testing.assert_close(moments, golden["logits_mean_std"], **TOLERANCE)


def test_encoded_tokens(vqvae: VQVAE, golden: Golden) -> None:
    """An image becomes the official tokens wherever two codes are not equally near."""
    images = F.interpolate(golden["encode_input"], size=(256, 256), mode="bilinear", align_corners=False)
    expected_BL = golden["encoded_tokens"]
    clear_BL = clear_positions(vqvae, images, expected_BL)
    assert clear_BL.float().mean() > 0.95
    assert torch.equal(vqvae.encode_tokens(images)[clear_BL], expected_BL[clear_BL])


def test_greedy_sample(var: VAR, vqvae: VQVAE, golden: Golden) -> None:
    """Greedy sampling without guidance gives the official picture."""
    uniforms_BL = torch.full(golden["tokens"].shape, 0.5)
    rollout = generate(var, vqvae, golden["labels"], uniforms_BL=uniforms_BL, guidance=0, top_k=1, top_p=1.0)
    images = (vqvae.decode(rollout.f_hat_BCHW)[..., ::8, ::8] + 1) / 2
    torch.testing.assert_close(images, golden["greedy_cfg0"], **TOLERANCE)
