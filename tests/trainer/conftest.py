"""Tiny models with random weights, an in-process reward, and runs of the command line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from services.rewards.brightness import Brightness
from tests.services.conftest import descendants, is_alive, wait_until
from trainer.config import Config, RewardConfig
from trainer.distributed import Group
from trainer.loop import LabelJudge, Learner
from trainer.models.checkpoints import save_var, save_vqvae
from trainer.models.var import VAR, VARConfig
from trainer.models.vqvae import VQVAE, VQVAEConfig
from trainer.run import main
from trainer.scoring import Scored, combine
from trainer.settings import Ranks
from trainer.var_policy import Context, VarPolicy

ROOT = Path(__file__).resolve().parents[2]
PATCH_NUMS = (1, 2, 4)
TINY = VARConfig(
    depth=2, width=32, heads=2, patch_nums=PATCH_NUMS, vocab_size=32, latent_channels=4, num_classes=4, mlp_ratio=2.0
)
TINY_VQVAE = VQVAEConfig(
    vocab_size=32,
    z_channels=4,
    ch=8,
    ch_mult=(1, 1),
    num_res_blocks=1,
    patch_nums=PATCH_NUMS,
    share_quant_resi=2,
    norm_groups=4,
)
END_S = 120.0


def make_var(seed: int = 0) -> VAR:
    """A tiny policy whose distribution is neither uniform nor certain."""
    torch.manual_seed(seed)
    var = VAR(TINY)
    with torch.no_grad():
        var.head.weight.normal_(std=0.3)
    return var.eval()


def make_vqvae(seed: int = 0) -> VQVAE:
    """A tiny tokenizer whose codes make pictures of different brightness."""
    torch.manual_seed(seed)
    vqvae = VQVAE(TINY_VQVAE)
    with torch.no_grad():
        vqvae.quantize.embedding.weight.normal_()
        vqvae.decoder.conv_out.weight.normal_(std=0.3)
    return vqvae.eval().requires_grad_(False)


def make_config(**sections: dict[str, Any]) -> Config:
    """Settings of a small run; a section's values are laid over these."""
    content: dict[str, Any] = {
        "model": {"classifier": "none"},
        "rollout": {"labels": 4, "group_size": 4, "temperature": 0.7, "chunk": 8},
        "optim": {"lr": 1e-3, "minibatch": 8},
        "rewards": [{"name": "brightness"}],
        "run": {"name": "test", "seed": 3, "steps": 2},
    }
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    return Config.model_validate(content)


class TinyLearner(Learner):
    """A learner whose policies are known to be VARs."""

    policy: VarPolicy
    reference: VarPolicy


def make_learner(
    config: Config, *, judge: LabelJudge | None = None, autocast: Context = nullcontext, group: Group | None = None
) -> TinyLearner:
    """Policy, frozen reference, tokenizer and optimizer, as a run makes them."""
    var = make_var()
    policy = VarPolicy(var, make_vqvae(), tuple(range(TINY.num_classes)), autocast)
    return TinyLearner(
        policy=policy,
        reference=replace(policy, var=deepcopy(var).requires_grad_(False)),
        optimizer=torch.optim.AdamW(
            var.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True
        ),
        judge=judge,
        group=group or alone(),
    )


def alone() -> Group:
    """A group of this process."""
    return Group(Ranks(), torch.device("cpu"), timeout_s=60)


def answered(result: Scored | BaseException) -> Future[Scored]:
    """A score that has come, or an error."""
    future: Future[Scored] = Future()
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


class Submit:
    """In place of the reward services: brightness at once, in this process; keeps the batches it was sent."""

    def __init__(self, rewards: Sequence[RewardConfig] = (RewardConfig(name="brightness"),)) -> None:
        self._rewards = rewards
        self.batches: list[NDArray[np.uint8]] = []

    def __call__(self, images_BHW3: NDArray[np.uint8]) -> Future[Scored]:
        self.batches.append(images_BHW3)
        raw_B = Brightness().score(images_BHW3, None)
        return answered(combine({"brightness": raw_B}, self._rewards, len(images_BHW3)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state."""
    return {name: entry.clone() for name, entry in model.state_dict().items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The `model` section of a recipe whose weights are tiny ones on disk."""
    folder = tmp_path_factory.mktemp("models")
    save_var(folder / "var.safetensors", make_var())
    save_vqvae(folder / "vqvae.safetensors", make_vqvae())
    return {
        "var": str(folder / "var.safetensors"),
        "vqvae": str(folder / "vqvae.safetensors"),
        "classifier": "none",
    }


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str]) -> Path:
    """A recipe file of two small steps, whose runs go to a folder beside it."""
    content = {
        "summary": "A tiny run [of tests].",
        "model": models,
        "rollout": {"labels": 2, "group_size": 4, "temperature": 0.7, "chunk": 8},
        "optim": {"lr": 1.0e-3, "minibatch": 4},
        "rewards": [{"name": "brightness", "shape": {"at_least": 0.58}}],
        "eval": {"samples": 8},
        "run": {"dir": str(tmp_path / "runs"), "steps": 2, "device": "cpu", "grid_every": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str


class Run:
    """A `python -m trainer.run …` of a test, with its output in files."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        ranks: int = 1,
        restarts: int = 0,
        meets: Sequence[str] = ("--standalone",),
    ) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        torchrun = ["torch.distributed.run", *meets, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        launcher = [*torchrun, "-m"] if ranks > 1 else []
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *launcher, "trainer.run", *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.children: set[int] = set()
        self._services: set[int] = set()

    def note_children(self) -> set[int]:
        """The processes below it, now and earlier, that belong to reward services; a library may start others."""
        new = set(descendants(self._popen.pid)) - self._services
        self.children |= new
        for pid in new:
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                asks = command.endswith(b"\0services\0list\0")  # what rewards there are, and is gone
                if (b"\0services\0" in command and not asks) or b"redis-server" in command:
                    self._services.add(pid)
        return self._services

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._popen.send_signal(number)

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._popen.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    def rank(self, number: int) -> int:
        """The process of a rank."""
        wanted = f"RANK={number}".encode()
        (pid,) = (
            pid
            for pid in descendants(self._popen.pid)
            if {wanted, b"WORLD_SIZE=2"} <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            and b"trainer.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        return pid

    def error(self) -> str:
        """What it has said so far."""
        return self._err.read_text()

    def _has_ended(self) -> bool:
        self.note_children()
        return self._popen.poll() is not None

    def outcome(self) -> Outcome:
        """Wait for its end; none of its processes may outlive it."""
        wait_until(self._has_ended, END_S)
        wait_until(lambda: not any(is_alive(pid) for pid in self.children))
        return Outcome(self._popen.returncode, self._out.read_text(), self._err.read_text())

    def close(self) -> None:
        """End it, whatever it does."""
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs as processes; all are ended with the test."""
    runs: list[Run] = []

    def starter(*arguments: object, **how: Any) -> Run:
        folder = tmp_path / f"output-{len(runs)}"
        folder.mkdir()
        runs.append(Run(arguments, folder, **how))
        return runs[-1]

    yield starter
    for run in runs:
        run.close()


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process, which spares seconds of imports; no new process may be left."""

    def runner(*arguments: object) -> Outcome:
        before = set(descendants(os.getpid()))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        wait_until(lambda: set(descendants(os.getpid())) <= before)
        return Outcome(code, out, err)

    return runner
