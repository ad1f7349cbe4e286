"""Everything that only a GPU can show, in one call: `python -m benchmarks.on_gpu FOLDER [--minutes 12] [--rehearse]`.

First the tests that need one, of agreement in bfloat16; then training steps at d16 and d30, eager in both readings of
"minibatch 32", and compiled in the first; then ViT-L/14 behind the service, and the recipes at full size. Each step is
a process with a time limit and files of its own: what fails or takes too long does not stop the others, and what no
longer fits into the minutes is left out. `--rehearse` goes the same way on a processor, with small models.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer import machine


class Step(NamedTuple):
    """A process.

    Attributes:
        name: of its log.
        limit_s: seconds that it may take.
        module: what `python -m` runs.
        arguments: of it on a GPU.
        rehearsal: of it on a processor.
        has_json: whether it keeps its figures by `--json`.
    """

    name: str
    limit_s: float
    module: str
    arguments: Sequence[str]
    rehearsal: Sequence[str]
    has_json: bool = True


SMALL = ("--model", "mini", "--images", "16", "--steps", "1", "--warm-up", "0", "--minibatch", "4", "16")
QUICK = ("--rounds", "1", "--seconds", "1", "--in-flight", "64", "--reward", "mini-clip")
D30 = ("--model", "d30", "--steps", "2", "--micro-batch", "8")  # forecast to stay below 75 GB
COMPILED = ("--compile", "--minibatch", "4")  # a second minibatch is a second compilation, and minutes are few
TESTS = ("-q", "-p", "no:cacheprovider")
AGREEMENT = ("tests/trainer/test_loop.py", "tests/services/rewards/test_encoder.py")
STEPS = (
    Step("agreement", 120, "pytest", (*TESTS, "-m", "gpu", *AGREEMENT), (*TESTS, "-k", "precision", *AGREEMENT), False),
    Step("d16", 90, "benchmarks.train_step", ("--model", "d16"), SMALL),
    Step("d16_compiled", 180, "benchmarks.train_step", ("--model", "d16", *COMPILED), (*SMALL, "--compile")),
    Step("d30", 150, "benchmarks.train_step", D30, SMALL),
    Step("d30_compiled", 210, "benchmarks.train_step", (*D30, *COMPILED), SMALL),
    Step("behind", 150, "benchmarks.behind", ("--rounds", "1", "--seconds", "3"), QUICK),
    Step("d16_vit_l_14", 90, "benchmarks.train_step", ("--model", "d16", "--reward", "vit-l-14"), SMALL),
    Step("d20", 90, "benchmarks.train_step", ("--model", "d20"), SMALL),
    Step("d24", 120, "benchmarks.train_step", ("--model", "d24"), SMALL),
    Step("recipes", 300, "pytest", (*TESTS, "-m", "gpu", "tests/trainer/test_full_size.py"), ("--version",), False),
)


def run(step: Step, folder: Path, *, rehearse: bool, left_s: float) -> str:
    """Run a step; return how it went."""
    if left_s < step.limit_s / 3:
        return "left out: no time"
    command = [sys.executable, "-m", step.module, *(step.rehearsal if rehearse else step.arguments)]
    if step.has_json:
        command += ["--json", str(folder / f"{step.name}.json")]
    began_s = time.monotonic()
    with (folder / f"{step.name}.log").open("wb") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=min(step.limit_s, left_s), check=False
            ).returncode
            how = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            how = "took too long"
    return f"{how}, {time.monotonic() - began_s:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps in turn; 0 if all are done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="for logs and figures")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all steps together")
    parser.add_argument("--steps", default=",".join(step.name for step in STEPS), help="some of them, in their order")
    parser.add_argument("--rehearse", action="store_true", help="on a processor, with small models")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps.split(",")) - {step.name for step in STEPS}:
        parser.error(f"--steps has {min(unknown)!r}, must be of {', '.join(step.name for step in STEPS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * options.minutes
    outcomes = {"date": machine.today(), "commit": machine.commit()}
    for step in STEPS:
        if step.name not in options.steps.split(","):
            continue
        outcomes[step.name] = run(step, options.folder, rehearse=options.rehearse, left_s=ends_s - time.monotonic())
        print(f"{step.name}: {outcomes[step.name]}", flush=True)
        (options.folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    return int(not all(outcomes[step.name].startswith("done") for step in STEPS if step.name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
