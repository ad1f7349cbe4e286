"""A run's state is on disk whole or not at all, comes back as it was, and is refused in one line where it cannot."""

import _thread
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import Checkpoints, RunState
from trainer.models.checkpoints import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
FILES = ("state.safetensors", "values.json", "manifest.json")
KILLS = 10
SAVER = """
import os, signal, sys, time
from itertools import count
from pathlib import Path
import torch
from trainer.checkpoint import Checkpoints, RunState

def save_for_ever(store):
    first = store.load().step if store.latest() else 0
    for step in count(first):
        for again in (0, 1):  # the second replaces the first
            tensors = {"a": torch.full((300_000,), step), "b": torch.tensor(step)}
            store.save(RunState(step, tensors, {"step": step}, again))

for line in sys.stdin:
    child = os.fork()
    if not child:
        save_for_ever(Checkpoints(Path(sys.argv[1]), keep=1, run="killed"))
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

KILLED_AT = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from trainer.checkpoint import Checkpoints, RunState

folder, step = Path(sys.argv[1]), int(sys.argv[2])
left = 0

def kill(event, _):
    global left
    if left and event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
for operation in count(1):
    place = shutil.copytree(folder / "start", folder / f"killed-{operation}")
    child = os.fork()
    if not child:
        store = Checkpoints(place, keep=1, run="mine")
        store.load()
        left = operation
        store.save(RunState(step, {}, {"saved": "again"}))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def make_state(step: int, score: float | None = None, **values: Any) -> RunState:
    """A small state whose content says its step."""
    return RunState(step, {"weight": torch.arange(6.0).view(2, 3) + step}, {"step": step, **values}, score)


def make_store(folder: Path, keep: int = 3, run: str = "mine") -> Checkpoints:
    return Checkpoints(folder, keep=keep, run=run)


def fill(folder: Path, *steps: int) -> list[Path]:
    store = make_store(folder)
    return [store.save(make_state(step)) for step in steps]


def failure(act: Callable[[], object]) -> str:
    """The message of the error that must come: one line, not a wall."""
    with pytest.raises(CheckpointError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    return message


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit agree."""
    return first.keys() == second.keys() and all(
        (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
        and torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name, tensor in first.items()
    )


def holds_step(state: RunState, step: int) -> bool:
    """Whether all of a state's content is that of its step."""
    return state.step == step == state.values["step"] and same(state.tensors, make_state(step).tensors)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    """Values, shapes and dtypes come back bit by bit: vectors, matrices, a scalar, nothing."""
    matrix = torch.tensor([[0, 1, 2], [3, 4, 100]]).to(dtype)
    tensors = {"matrix": matrix, "vector": matrix[1].clone(), "scalar": matrix[1, 2].clone()}
    tensors |= {"empty": matrix[:0].clone(), "none": matrix[:, :0].clone()}
    store = make_store(tmp_path)
    store.save(RunState(7, tensors, {}))
    assert same(store.load().tensors, tensors)


def test_special_floats_survive(tmp_path: Path) -> None:
    """A tensor may hold what JSON may not: NaN, infinities, minus zero."""
    tensors = {"odd": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])}
    store = make_store(tmp_path)
    store.save(RunState(0, tensors, {}))
    assert same(store.load().tensors, tensors)


def test_names_values_and_score_survive(tmp_path: Path) -> None:
    """Names are any text; values are any JSON, integers of any length and floats to the last bit."""
    tensors = {
        name: torch.tensor([float(i)]) for i, name in enumerate(["", "a.b/c", "größe 🎲", 'quote " \\ \n', "\0"])
    }
    values = {"rng": {"state": 2**128 - 1}, "x": 0.1 + 0.2, "list": [None, True, "ü\n", [], {}], "": ""}
    store = make_store(tmp_path / "new" / "folder")
    path = store.save(RunState(123, tensors, values, -0.1))
    loaded = make_store(tmp_path / "new" / "folder").load()
    assert path == tmp_path / "new" / "folder" / "step_00000123"
    assert names(path) == sorted(FILES)
    assert same(loaded.tensors, tensors)
    assert (loaded.step, loaded.values, loaded.score) == (123, values, -0.1)


def test_shared_strided_and_trained_tensors(tmp_path: Path) -> None:
    """Tensors that share memory, are views or need a gradient are stored as what they show."""
    base = torch.arange(12.0).view(3, 4)
    tensors = {"all": base, "tied": base, "row": base[1], "column": base[:, 1], "turned": base.t()}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    store = make_store(tmp_path)
    store.save(RunState(1, tensors, {}))
    assert same(store.load().tensors, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (RunState(-1, {}, {}), "step is -1"),
        (RunState(1, {}, {}, float("nan")), "finite numbers"),
        (RunState(1, {}, {"lr": float("inf")}), "finite numbers"),
        (RunState(1, {}, {"path": Path("x")}), "what JSON holds"),
        (RunState(1, {}, {"pair": (1, 2)}), "lists of tuples"),
        (RunState(1, {}, {"state": {0: 1}}), "strings of other names"),
        (RunState(1, {"__metadata__": torch.zeros(1)}, {}), "'__metadata__'"),
        (RunState(1, {"\udc80": torch.zeros(1)}, {}), "no such name"),
        (RunState(1, {"z": torch.zeros(1, dtype=torch.complex128)}, {}), "complex128"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, state: RunState, reason: str) -> None:
    """A state that its files could not give back as it was is the caller's error; nothing is written."""
    with pytest.raises(ValueError, match=reason):
        make_store(tmp_path).save(state)
    assert names(tmp_path) == []


def test_keep_is_positive(tmp_path: Path) -> None:
    """A store that would keep nothing is refused."""
    with pytest.raises(ValueError, match="keep is 0"):
        make_store(tmp_path, keep=0)


@pytest.mark.parametrize("made", [True, False])
def test_no_state_yet(tmp_path: Path, made: bool) -> None:
    """A folder that is missing or empty has no last state, and loading says so."""
    folder = tmp_path / "states"
    if made:
        folder.mkdir()
    store = make_store(folder)
    assert (store.latest(), store.best(), store.steps()) == (None, None, [])
    assert failure(store.load) == f"{folder}: expected a run's states, found none; start the run without --resume"


def test_what_is_no_state_is_named(tmp_path: Path) -> None:
    """A path to nothing, to a file in a state or to the folder above it is refused by name."""
    (path,) = fill(tmp_path, 1)
    store = make_store(tmp_path)
    missing = failure(lambda: store.load(tmp_path / "step_00000002"))
    assert "step_00000002: no such state" in missing
    assert "damaged" not in missing
    for wrong in (path / "state.safetensors", tmp_path):
        assert f"{wrong}: expected the folder of a state" in failure(lambda wrong=wrong: store.load(wrong))


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    """The last two and the best, the later one of two equals, stay; a state without score is never best."""
    store = make_store(tmp_path, keep=2)
    stay = []
    for step, score in enumerate([None, 0.5, 0.9, 0.1, 0.9, 0.2, None, 0.3]):
        store.save(make_state(step, score))
        stay.append(store.steps())
        assert names(tmp_path) == [f"step_{kept:08d}" for kept in stay[-1]]
    assert stay == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    assert store.best() == tmp_path / "step_00000004"
    assert store.latest() == tmp_path / "step_00000007"
    assert all(holds_step(store.load(tmp_path / f"step_{step:08d}"), step) for step in (4, 6, 7))


def test_steps_beyond_eight_digits(tmp_path: Path) -> None:
    """Order is that of numbers, not of names."""
    store = make_store(tmp_path, keep=1)
    store.save(make_state(99_999_999))
    store.save(make_state(100_000_000))
    assert (store.steps(), store.load().step) == ([100_000_000], 100_000_000)


def test_an_older_state_loads_by_its_path(tmp_path: Path) -> None:
    """A named state is read, the last one is not taken in its place; one of another folder too."""
    paths = fill(tmp_path / "a", 1, 2)
    assert holds_step(make_store(tmp_path / "a").load(paths[0]), 1)
    assert holds_step(make_store(tmp_path / "b").load(paths[0]), 1)
    assert holds_step(make_store(tmp_path / "a").load(), 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    """A file that ends early is named, and so is the state to resume from in its place."""
    before, path = fill(tmp_path, 1, 2)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(share * len(whole))])
    message = failure(make_store(tmp_path).load)
    assert message.startswith(f"{path / name}: found ")
    assert message.endswith(f"; the one before it is {before}: resume with --resume {before}")
    if name != "manifest.json":
        assert f"found {int(share * len(whole)):,} bytes, expected {len(whole):,} bytes" in message
    assert holds_step(make_store(tmp_path).load(before), 1)


@pytest.mark.parametrize("name", FILES)
def test_any_altered_byte(tmp_path: Path, name: str) -> None:
    """No byte of a state can change without its refusal."""
    before, path = fill(tmp_path, 1, 2)
    store, whole = make_store(tmp_path), (path / name).read_bytes()
    for position, byte in enumerate(whole):
        (path / name).write_bytes(whole[:position] + bytes([byte ^ 1]) + whole[position + 1 :])
        message = failure(store.load)
        assert message.startswith(f"{path / name}: found "), position
        assert message.endswith(f"--resume {before}")
    (path / name).write_bytes(whole)
    assert holds_step(store.load(), 2)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(tmp_path: Path, name: str) -> None:
    """A file that is gone is named."""
    before, path = fill(tmp_path, 1, 2)
    (path / name).unlink()
    message = failure(make_store(tmp_path).load)
    assert message.startswith(f"{path / name}: found no ")
    assert message.endswith(f"--resume {before}")


def test_the_offered_state_is_a_whole_one(tmp_path: Path) -> None:
    """What is offered in place of a damaged state has itself been read; without any, no path is offered."""
    first, second, third = fill(tmp_path, 1, 2, 3)
    for path in (third, second):
        whole = (path / "state.safetensors").read_bytes()
        (path / "state.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert failure(make_store(tmp_path).load).endswith(f"the one before it is {first}: resume with --resume {first}")
    (first / "values.json").unlink()
    assert failure(make_store(tmp_path).load).endswith("name another, or start the run without --resume")


def test_a_renamed_state(tmp_path: Path) -> None:
    """A folder's name does not make a state that of another step."""
    (path,) = fill(tmp_path, 1)
    path.rename(tmp_path / "step_00000005")
    assert "found step 1, expected 5" in failure(make_store(tmp_path).load)


def test_another_run(tmp_path: Path) -> None:
    """Another run's states are neither loaded nor joined by this run's, nor deleted."""
    fill(tmp_path, 1)
    store = make_store(tmp_path, keep=1, run="other")
    for act in (store.load, store.best, lambda: store.save(make_state(2))):
        assert "step_00000001/manifest.json: found the run mine, expected other; resume with" in failure(act)
    assert names(tmp_path) == ["step_00000001"]
    assert holds_step(make_store(tmp_path).load(), 1)


def test_newer_format(tmp_path: Path) -> None:
    """A state of a format to come is refused as such, and never deleted as damaged."""
    before, path = fill(tmp_path, 1, 2)
    content = json.loads((path / "manifest.json").read_text()) | {"format": 9, "shards": []}
    (path / "manifest.json").write_text(json.dumps(content))
    store = make_store(tmp_path, keep=1)
    message = failure(store.load)
    assert "found format 9, expected 1; resume with the version that wrote it" in message
    assert message.endswith(f"--resume {before}")
    assert "found format 9" in failure(lambda: store.save(make_state(3)))
    assert names(tmp_path) == [before.name, path.name]


def test_the_same_step_again(tmp_path: Path) -> None:
    """The later of two savings of a step is the one that stays, alone."""
    store = make_store(tmp_path, keep=1)
    store.save(make_state(1, 0.1, turn="first"))
    store.save(make_state(1, 0.2, turn="second"))
    loaded = store.load()
    assert (loaded.values["turn"], loaded.score, names(tmp_path)) == ("second", 0.2, ["step_00000001"])


def test_a_damaged_state_is_replaced_and_never_counted(tmp_path: Path) -> None:
    """A state that cannot be read does not push out one that can, and goes with the next save."""
    _, damaged, again = fill(tmp_path, 1, 2, 3)
    (damaged / "values.json").unlink()
    (again / "manifest.json").write_text("{}")
    store = make_store(tmp_path, keep=2)
    store.save(make_state(3))
    assert store.steps() == [1, 3]
    assert holds_step(store.load(), 3)


def test_a_run_that_went_back(tmp_path: Path) -> None:
    """After a resume from an earlier state, the next save ends the continuation that was given up."""
    paths = fill(tmp_path, 1, 2, 3)
    store = make_store(tmp_path, keep=1)
    assert holds_step(store.load(paths[0]), 1)
    assert store.steps() == [1, 2, 3]
    store.save(make_state(2, turn="again"))
    assert (store.steps(), store.load().values["turn"]) == ([2], "again")


def test_a_new_run_never_deletes_later_states(tmp_path: Path) -> None:
    """A run that was not resumed from a folder's states does not take them for its own."""
    other = fill(tmp_path / "other", 1)[0]
    fill(tmp_path / "mine", 1, 2)
    store = make_store(tmp_path / "mine")
    store.load(other)
    message = failure(lambda: store.save(make_state(1)))
    assert "holds the state of step 2, and the run, now at step 1, was not resumed from a state in it" in message
    assert store.steps() == [1, 2]


def test_leftovers(tmp_path: Path) -> None:
    """What a killed save left is no state, and goes with the next one; other files stay."""
    (path,) = fill(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".step_00000002.4711.tmp")
    (tmp_path / "notes.txt").write_text("mine")
    store = make_store(tmp_path)
    assert (store.steps(), store.latest()) == ([1], path)
    store.save(make_state(3))
    assert names(tmp_path) == ["notes.txt", "step_00000001", "step_00000003"]


def test_a_state_set_aside(tmp_path: Path) -> None:
    """A kill between the two renames that replace a state loses nothing: the former one is found, and brought back."""
    (path,) = fill(tmp_path, 1)
    aside = path.rename(tmp_path / ".step_00000001.old")
    store = make_store(tmp_path)
    assert (store.steps(), store.latest()) == ([1], aside)
    assert holds_step(store.load(), 1)
    store.save(make_state(2))
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    shutil.copytree(path, aside)
    assert store.load(path).step == 1
    store.save(make_state(3))
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("step", [1, 2])
def test_full_disk(tmp_path: Path, step: int) -> None:
    """A write that the system stops says why, leaves nothing behind and every former state as it was."""
    fill(tmp_path, 1)
    store = make_store(tmp_path, keep=1)
    store.load()
    big = RunState(step, {"weight": torch.zeros(100_000)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = failure(lambda: store.save(big))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (" in message
    assert "File too large" in message
    assert "it needs 400,000 bytes" in message
    assert names(tmp_path) == ["step_00000001"]
    assert holds_step(store.load(), 1)


def test_unwritable(tmp_path: Path) -> None:
    """A folder that cannot be made is named, with the system's reason."""
    (tmp_path / "file").touch()
    message = failure(lambda: make_store(tmp_path / "file" / "states").save(make_state(1)))
    assert str(tmp_path / "file" / "states") in message
    assert "Not a directory" in message


def test_an_interrupt_leaves_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A save that ends by an exception of another kind tidies up as well."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a job in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    fill(tmp_path, 1)
    big = RunState(2, {str(i): torch.zeros(1_000_000) for i in range(20)}, {})
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path).save(big)
    assert names(tmp_path) == ["step_00000001"]


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """After SIGKILL in the middle of saving, every state there is whole and its own step's, and none is lost."""
    command = [sys.executable, "-c", SAVER, str(tmp_path)]
    draw, last, torn = random.Random(5), -1, 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(KILLS):
            saver.stdin.write(f"{draw.uniform(0.15, 0.35)}\n")
            assert saver.stdout.readline() == f"{-signal.SIGKILL}\n"
            torn += any(name.startswith(".") for name in names(tmp_path))
            store = Checkpoints(tmp_path, keep=1, run="killed")
            assert store.steps()
            assert store.steps()[-1] >= last
            for path in (store.latest(), store.best()):
                state = store.load(path)
                assert state.values == {"step": state.step}
                assert state.tensors["b"] == state.step
                assert torch.equal(state.tensors["a"], torch.full((300_000,), state.step))
            last = store.load().step
        saver.stdin.close()
        assert saver.wait(20) == 0
    assert torn
    assert last > KILLS // 3


@pytest.mark.parametrize("step", [2, 3])
def test_kill_at_every_operation(tmp_path: Path, step: int) -> None:
    """Killed before any single operation on its files, a save leaves the former states or the new one, all whole."""
    fill(tmp_path / "start", 1, 2)
    subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(tmp_path), str(step)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
        check=True,
    )
    former, seen = [(1, False), (2, False)], set()
    for place in tmp_path.glob("killed-*"):
        store, saved = make_store(place, keep=1), []
        for found in store.steps():
            path = place / f"step_{found:08d}"
            state = store.load(path if path.exists() else place / f".{path.name}.old")
            saved.append((state.step, "saved" in state.values))
        assert saved == former or (step, True) in saved
        seen.add(tuple(saved))
        store.load()
        store.save(RunState(9, {}, {}))
        assert names(place) == ["step_00000009"]
    assert {tuple(former), ((step, True),)} <= seen
