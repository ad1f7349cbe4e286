"""A recipe's settings beside the defaults, what it ran on, and the commands that take its runs again."""

import shlex
from dataclasses import dataclass

import yaml

from trainer.config import Config, ConfigError, RewardConfig
from trainer.options import load_config, recipe_names
from trainer.report.runs import Group, Run, flat
from trainer.report.text import DASH

NAME_ONLY = RewardConfig(name="x").model_dump(mode="json")
FREE = ("rewards", "summary")
"""Have no default."""
PLACES = ("summary", "run.dir")
"""Of no account to a command that takes a run again."""


@dataclass(frozen=True)
class Setting:
    """One setting: what the runs have, and the default, where there is one."""

    key: str
    value: str
    default: str
    differs: bool


def settings_of(group: Group) -> list[Setting]:
    """All settings, those that differ from the defaults first; where runs differ, each value once."""
    settings = [flat(run.config.to_dict()) for run in group.runs]
    defaults = _defaults(group.runs[0].config)
    found = []
    for key in dict.fromkeys(key for each in settings for key in each):
        values = list(dict.fromkeys(_spell(each.get(key)) for each in settings))
        default = _spell(defaults[key]) if key in defaults else DASH
        found.append(Setting(key, ", ".join(values), default, differs=values != [default]))
    return sorted(found, key=lambda setting: not setting.differs)


def _defaults(config: Config) -> dict[str, object]:
    plain = Config(rewards=(RewardConfig(name="x"),)).to_dict()
    for name in FREE:
        del plain[name]
    for name, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
        for index in range(len(rewards)):
            own = {key: value for key, value in NAME_ONLY.items() if key != "name"}
            plain |= {f"{name}.{index}.{key}": value for key, value in flat(own).items()}
    return flat(plain)


def versions_of(group: Group) -> list[tuple[str, str]]:
    """What the runs ran on, by name; where they differ, each value once."""
    names = dict.fromkeys(name for run in group.runs for name in run.versions)
    return [(name, ", ".join(dict.fromkeys(run.versions.get(name, DASH) for run in group.runs))) for name in names]


def command_of(run: Run) -> str:
    """A command that takes the run again: its recipe, where that comes along, with what differs; else its settings.

    A run's folder does not record the command that started it.
    """
    recipe = "" if run.summary is None else run.summary.recipe
    if recipe in recipe_names():
        try:
            plain = flat(load_config(recipe, {}).to_dict())
        except ConfigError:  # the recipe that comes along is another one by now
            plain = {}
        own = flat(run.config.to_dict())
        if plain.keys() == own.keys():
            changed = [key for key in own if own[key] != plain[key] and key not in PLACES]
            options = [part for key in changed for part in (f"--{key}", _spell(own[key]))]
            return shlex.join(["python", "-m", "trainer.run", recipe, *options])
    return shlex.join(["python", "-m", "trainer.run", str(run.folder / "config.yaml")])


def _spell(value: object) -> str:
    """A value as YAML, as an option of the command line is read."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
