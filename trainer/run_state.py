"""What a run's next step depends on: the trained weights, the optimizer, the random number generators.

Tensors have names such as `policy/3`, `optimizer/12/exp_avg` and `rng/torch`, in one flat mapping.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.loop import Learner
from trainer.models.checkpoints import CheckpointError

POLICY, OPTIMIZER, RNG = "policy/", "optimizer/", "rng/"
Tensors = dict[str, Tensor]


def named_parameters(learner: Learner) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name, in the optimizer's order."""
    return {str(index): parameter for index, parameter in enumerate(learner.policy.parameters())}


def tensors_of(learner: Learner) -> Tensors:
    """Weights and optimizer as they are, not copied."""
    tensors = {f"{POLICY}{name}": parameter.detach() for name, parameter in named_parameters(learner).items()}
    for index, entries in learner.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"{OPTIMIZER}{index}/{key}"] = torch.as_tensor(value)
    return tensors


def generators() -> Tensors:
    """The state of every global generator: torch's on the CPU and on each GPU, numpy's, Python's.

    Nothing of ours draws from them, for samples and minibatches have keys of their own; a library may.
    """
    name, keys, position, *_ = np.random.get_state(legacy=True)
    assert name == "MT19937"
    _, words, _ = random.getstate()
    tensors = {
        f"{RNG}torch": torch.get_rng_state(),
        f"{RNG}numpy": torch.tensor([*keys, position], dtype=torch.int64),
        f"{RNG}python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"{RNG}cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def restore(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Put weights, optimizer and generators back to what they were.

    Args:
        learner: changed in place.
        tensors: of `tensors_of` and `generators`.

    Raises:
        CheckpointError: they are not of this policy and optimizer.
    """
    parameters = named_parameters(learner)
    saved = {name.removeprefix(POLICY): value for name, value in tensors.items() if name.startswith(POLICY)}
    shapes = {name: value.shape for name, value in saved.items()}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise CheckpointError(
            f"the state holds {len(saved)} weights, which are not the {len(parameters)} of this policy; "
            "resume with the recipe that the run began with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            index, _, key = name.removeprefix(OPTIMIZER).partition("/")
            state.setdefault(int(index), {})[key] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    _restore_generators(tensors)


def _restore_generators(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors[f"{RNG}torch"])
    *keys, position = tensors[f"{RNG}numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(tensors[f"{RNG}python"].tolist()), None))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"{RNG}cuda/{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"{RNG}cuda/{index}"], index)


class Snapshot:
    """A copy of weights and optimizer in the machine's memory, taken between two steps.

    On a GPU the copy runs beside the next step's sampling, which changes neither; its first update waits for it.

    Attributes:
        step: steps that were done when it was taken; None while there is no whole one.
    """

    def __init__(self, learner: Learner) -> None:
        """Bind the learner; nothing is copied yet."""
        self._learner = learner
        self._buffers: Tensors = {}
        self._generators: Tensors = {}
        self.step: int | None = None
        is_cuda = learner.policy.device.type == "cuda"
        self._stream = torch.cuda.Stream(learner.policy.device) if is_cuda else None
        if self._stream is not None:
            learner.optimizer.register_step_pre_hook(self._wait)

    def take(self, step: int) -> None:
        """Copy everything as it is now, after so many steps."""
        self.step = None
        tensors = tensors_of(self._learner)
        for name in tensors.keys() - self._buffers.keys():  # the optimizer's come with its first step
            self._buffers[name] = torch.empty_like(tensors[name], device="cpu", pin_memory=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # of None it is a block like any other
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
        self._generators = generators()
        self.step = step

    def tensors(self) -> Tensors:
        """What was copied."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._buffers | self._generators

    def _wait(self, *_: object) -> None:
        assert self._stream is not None
        torch.cuda.current_stream().wait_stream(self._stream)
