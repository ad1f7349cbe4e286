"""A reward whose module is not light."""

import torch

from services.rewards.brightness import Brightness


class Heavy(Brightness):
    """Needs torch, and says so too early."""

    name = "heavy"
    device = torch.device("cpu")
