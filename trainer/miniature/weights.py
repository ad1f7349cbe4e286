"""The miniature's shipped weights, by name."""

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.miniature.classifiers import OUTPUTS, Classifier, Kind
from trainer.miniature.fitting import Schedule
from trainer.models.checkpoints import CheckpointError

FOLDER = Path(str(resources.files("trainer.miniature") / "weights"))
VQVAE_FILE = FOLDER / "vqvae.safetensors"
VAR_FILE = FOLDER / "var.safetensors"
METRICS_FILE = FOLDER / "metrics.json"


def classifier_file(kind: Kind) -> Path:
    """Where the weights of one of the classifiers are."""
    return FOLDER / f"{kind}_classifier.safetensors"


def load_classifier(kind: Kind) -> Classifier:
    """One of the miniature's classifiers, frozen, float32.

    Raises:
        CheckpointError: the file is missing or not this classifier's.
    """
    path, model = classifier_file(kind), Classifier(OUTPUTS[kind])
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: {str(error).splitlines()[0]}; expected the miniature's {kind} classifier; "
            f"make it with: python -m trainer.miniature.pretrain {kind}"
        ) from error
    return model.eval().requires_grad_(False)


def record(stage: str, seconds: float, seed: int, schedule: Schedule, metrics: dict[str, float]) -> None:
    """Writes down how a stage's weights were made, beside them."""
    content: dict[str, Any] = json.loads(METRICS_FILE.read_text()) if METRICS_FILE.exists() else {}
    content[stage] = {
        "command": f"python -m trainer.miniature.pretrain {stage}",
        "seed": seed,
        "schedule": asdict(schedule),
        "seconds": round(seconds),
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    METRICS_FILE.write_text(json.dumps(content, indent=2) + "\n")
