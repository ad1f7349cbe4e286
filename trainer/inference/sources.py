"""Which policies a command is about: what was named on the command line, found without reading any weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from trainer.config import Config, ConfigError
from trainer.inference.labels import World
from trainer.models.checkpoints import PUBLISHED_FILES, PUBLISHED_REPOSITORY, PUBLISHED_VQVAE
from trainer.nearest import nearest
from trainer.run_folder import STATES

CHECKPOINT = Path("checkpoint") / "var.safetensors"
WEIGHTS = (".safetensors", ".pth")
MINIATURE, PRETRAINED = "miniature", "pretrained"


@dataclass(frozen=True)
class PolicySource:
    """Where a policy comes from.

    Args:
        name: what it is called.
        var: its transformer: `miniature`, a path or a published name; for a state that of the run's beginning.
        vqvae: its tokenizer, likewise.
        world: whose labels it draws.
        run: the run's settings, where it is of a run.
        state: the folder of a run's state whose weights take the place of `var`'s.
    """

    name: str
    var: str
    vqvae: str
    world: World
    run: Config | None = None
    state: Path | None = None

    @property
    def is_trained(self) -> bool:
        """Whether these are weights of a run, and not those that it began with."""
        return self.run is not None and (self.state is not None or self.var != self.run.model.var)


def find_sources(texts: Sequence[str], vqvae: str | None) -> list[PolicySource]:
    """The policies that are named, in order.

    Args:
        texts: each `[NAME=]MODEL`: a run's folder, the folder of one of its states, a file of weights, a published
            name, `miniature`, or `pretrained`, which is what the first run among them began with.
        vqvae: the tokenizer of files that are of no run; None where it is not told.

    Raises:
        ConfigError: a model is not there, or nobody says which tokenizer it takes.
    """
    pairs = [split_name(text) for text in texts]
    found = {text: _find(text, vqvae) for _, text in pairs if text != PRETRAINED}
    if any(text == PRETRAINED for _, text in pairs):
        run = next((source.run for source in found.values() if source.run is not None), None)
        if run is None:
            raise ConfigError("pretrained is what a run began with: name the run as well, or miniature, or a file")
        source = PolicySource(PRETRAINED, run.model.var, run.model.vqvae, run.model.classifier, run)
        found[PRETRAINED] = source
    return [replace(found[text], name=name or found[text].name) for name, text in pairs]


def split_name(text: str) -> tuple[str | None, str]:
    """The two parts of `[NAME=]MODEL`; a path that exists is no name."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and name and not Path(text).exists() else (None, text)


def _find(text: str, vqvae: str | None) -> PolicySource:
    path = Path(text)
    if text == MINIATURE:
        return PolicySource(MINIATURE, MINIATURE, MINIATURE, "miniature")
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        run = path.parent.parent if path.parent.name == CHECKPOINT.parent.name else None
        if vqvae is None and run is not None and (run / "config.yaml").is_file():
            settings = read_settings(run)
            return PolicySource(run.resolve().name, text, settings.model.vqvae, settings.model.classifier, settings)
        return _of_file(path.stem, text, vqvae)
    if text.startswith(f"{PUBLISHED_REPOSITORY}:"):
        file = text.partition(":")[2]
        if file not in PUBLISHED_FILES or file == PUBLISHED_VQVAE:
            names = [f"{PUBLISHED_REPOSITORY}:{name}" for name in PUBLISHED_FILES if name != PUBLISHED_VQVAE]
            raise ConfigError(f"{text}: no such published checkpoint; {nearest(text, names)}")
        return _of_file(Path(file).stem, text, vqvae or f"{PUBLISHED_REPOSITORY}:{PUBLISHED_VQVAE}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    models = (entry for entry in beside if entry.suffix in WEIGHTS or (entry / "config.yaml").is_file())
    known = [PRETRAINED, MINIATURE, *sorted(str(path.parent / entry.name) for entry in models)]
    raise ConfigError(f"{text}: no such checkpoint or run; {nearest(text, known)}")


def _of_file(name: str, text: str, vqvae: str | None) -> PolicySource:
    if vqvae is None:
        raise ConfigError(f"{text} is of no run: name the tokenizer it was trained with: --vqvae miniature, or a file")
    world: World = "none"
    if vqvae == MINIATURE:
        world = "miniature"
    elif Path(vqvae.partition(":")[2] or vqvae).name == PUBLISHED_VQVAE:
        world = "imagenet"
    return PolicySource(name, text, vqvae, world)


def _of_folder(folder: Path) -> PolicySource:
    is_state = folder.resolve().parent.name == STATES
    run = folder.resolve().parent.parent if is_state else folder
    if not (run / "config.yaml").is_file():
        runs = [str(path.parent) for path in folder.glob("*/config.yaml")]
        hint = f"; it holds runs: {nearest(str(folder), runs)}" if runs else ""
        raise ConfigError(f"{folder}: no run's folder, for it has no config.yaml, nor the folder of a state{hint}")
    settings = read_settings(run)
    source = PolicySource(
        run.resolve().name, settings.model.var, settings.model.vqvae, settings.model.classifier, settings
    )
    if is_state:
        state = folder if folder.name.startswith("step_") else folder.resolve()  # `.`, or a link
        return replace(source, name=f"{source.name}@{_step_of(state)}", state=state)
    last = max((run / STATES).glob("step_*"), default=None)
    file = run / CHECKPOINT
    if file.is_file() and (last is None or _steps_of(file) >= _step_of(last)):
        return replace(source, var=str(file))
    if last is None:
        raise ConfigError(f"{folder}: the run has neither a state nor a checkpoint yet; let it take a step")
    return replace(source, state=last)


def _step_of(state: Path) -> int:
    """After which step a state was saved, by the name of its folder."""
    step = state.name.removeprefix("step_")
    if not step.isdecimal():
        raise ConfigError(f"{state}: no state, for its name is not step_NNNNNNNN; name another, or move it away")
    return int(step)


def _steps_of(file: Path) -> int:
    """After how many steps a run wrote its checkpoint."""
    try:
        with safe_open(file, framework="pt") as opened:
            return int((opened.metadata() or {})["steps"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{file}: no checkpoint that a run has written; name one of its states") from error


def read_settings(run: Path) -> Config:
    """The settings of a run, from its folder.

    Raises:
        ConfigError: they cannot be read.
    """
    path = run / "config.yaml"
    try:
        return Config.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({str(error).splitlines()[0]})") from error
