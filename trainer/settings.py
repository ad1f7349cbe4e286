"""Settings of the trainer that come from the environment: the one place here that reads it."""

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Ranks(BaseSettings):
    """What torchrun tells each process; a process that nobody told anything is alone."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    rank: int = Field(default=0, ge=0, description="of this process")
    world_size: int = Field(default=1, ge=1, description="processes of the run")
    local_rank: int = Field(default=0, ge=0, description="of this process on its machine: which GPU is its own")
    local_world_size: int = Field(default=1, ge=1, description="processes of the run on this machine")
    torchelastic_run_id: str = Field(default="", description="names one start of torchrun, over all its restarts")
    torchelastic_restart_count: int = Field(default=0, ge=0, description="how often torchrun started them again")


class Settings(BaseSettings):
    """What a run may be told besides its recipe."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    reward_token: SecretStr | None = Field(default=None, description="bearer token for the run's reward services")

    @property
    def token(self) -> str | None:
        """The bearer token in plain text, for a request's header."""
        return None if self.reward_token is None else self.reward_token.get_secret_value()
