"""The miniature's shipped weights, by name, and the record of how they were made."""

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from services.rewards.sources import sha256_of
from trainer.miniature.classifiers import OUTPUTS, Classifier, Kind
from trainer.miniature.fitting import Schedule
from trainer.models.checkpoints import CheckpointError, write_atomically

FOLDER = Path(str(resources.files("trainer.miniature") / "weights"))
REWARDS_FOLDER = Path(str(resources.files("services.rewards") / "weights"))
"""The rewards' weights are part of the services, which run without the trainer."""
FILES = {
    "vqvae": FOLDER / "vqvae.safetensors",
    "label": FOLDER / "label_classifier.safetensors",
    "style": FOLDER / "style_classifier.safetensors",
    "var": FOLDER / "var.safetensors",
    "clip": REWARDS_FOLDER / "mini-clip.safetensors",
    "aesthetic": REWARDS_FOLDER / "mini-aesthetic.safetensors",
}
RECORDS = "metrics.json"


def load_classifier(kind: Kind, *, device: str | torch.device = "cpu") -> Classifier:
    """One of the miniature's classifiers, frozen, float32.

    Raises:
        CheckpointError: the file is missing or not this classifier's.
    """
    path, model = FILES[kind], Classifier(OUTPUTS[kind])
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: {str(error).splitlines()[0]}; expected the miniature's {kind} classifier; {remedy(kind)}"
        ) from error
    return model.eval().requires_grad_(False).to(device)


def remedy(stage: str) -> str:
    """What to do where the weights of a stage are missing."""
    return f"make it with: python -m trainer.miniature.pretrain {stage}"


def record_training(stage: str, seconds: float, seed: int, schedule: Schedule | None, *, renderer: str) -> None:
    """Writes down how a stage's weights were made, beside them; its metrics are forgotten until they are measured.

    Args:
        stage: whose weights they are.
        seconds: of training.
        seed: of training.
        schedule: of training; None where a solution was computed at once.
        renderer: names the code that drew the pictures.
    """
    seeded = f" --seed {seed}" if seed else ""
    _record(
        stage,
        {
            "command": f"python -m trainer.miniature.pretrain {stage}{seeded}",
            "sha256": sha256_of(FILES[stage]),
            "seed": seed,
            "schedule": None if schedule is None else asdict(schedule),
            "seconds": round(seconds),
            "hardware": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "renderer": renderer,
        },
    )


def record_metrics(stage: str, metrics: dict[str, float]) -> None:
    """Writes down what a stage's weights were measured at."""
    _record(stage, read_records()[stage] | {"metrics": {name: round(value, 4) for name, value in metrics.items()}})


def read_records() -> dict[str, dict[str, Any]]:
    """The record of every stage: command, sha256 of the file, seed, schedule, seconds, hardware, metrics."""
    return _read(FOLDER / RECORDS) | _read(REWARDS_FOLDER / RECORDS)


def _record_file(stage: str) -> Path:
    return FILES[stage].with_name(RECORDS)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return records


def _record(stage: str, content: dict[str, Any]) -> None:
    file = _record_file(stage)
    text = json.dumps(_read(file) | {stage: content}, indent=2) + "\n"
    write_atomically(file, len(text), lambda temporary: temporary.write_text(text))
