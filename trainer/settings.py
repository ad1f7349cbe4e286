"""Settings of the trainer that come from the environment: the one place here that reads it.

Those that are its alone begin with `TRAINER_`.
"""

import os
from difflib import get_close_matches

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from trainer.config import ConfigError

PREFIX = "TRAINER_"


class Ranks(BaseSettings):
    """What torchrun tells each process; a process that nobody told anything is alone."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    rank: int = Field(default=0, ge=0, description="of this process")
    world_size: int = Field(default=1, ge=1, description="processes of the run")
    local_rank: int = Field(default=0, ge=0, description="of this process on its machine: which GPU is its own")
    local_world_size: int = Field(default=1, ge=1, description="processes of the run on this machine")
    torchelastic_run_id: str = Field(
        default="", description="set by torchrun alone, and so tells whether it started this"
    )
    torchelastic_restart_count: int = Field(default=0, ge=0, description="how often torchrun started them again")


class Settings(BaseSettings):
    """What a run may be told besides its recipe."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    reward_token: SecretStr | None = Field(default=None, description="bearer token for the run's reward services")
    trainer_metrics_host: str = Field(
        default="127.0.0.1", description="where the logger `prometheus` listens; 0.0.0.0: on all addresses"
    )
    trainer_metrics_port: int = Field(default=9400, ge=1, le=65535, description="likewise its port")

    @property
    def token(self) -> str | None:
        """The bearer token in plain text, for a request's header."""
        return None if self.reward_token is None else self.reward_token.get_secret_value()


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        ConfigError: a variable is out of range, or begins with `TRAINER_` and is no setting; one line that names it.
    """
    known = [name.upper() for name in Settings.model_fields if name.upper().startswith(PREFIX)]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = get_close_matches(name.upper(), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"unset it; there are {', '.join(known)}"
            raise ConfigError(f"{name} is no setting of the trainer: {remedy}")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{str(first['loc'][0]).upper()}: {first['msg']}: correct or unset it") from None
