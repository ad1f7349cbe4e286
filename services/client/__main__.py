"""`python -m services.client URL FILE…`: score pictures from the shell.

Shape suffixes: B images of a batch, H height and W width in pixels, C = 3 channels (RGB).
"""

import argparse
import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.client import RewardAnswerInvalid, RewardClient, RewardError, RewardRefused
from services.images import BodyError, decode_picture
from services.protocol import Limits
from services.settings import token_of

EXIT_SERVICE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
ATTEMPTS = 4
"""Few: whoever sits at the shell would rather hear that nothing answers."""
PORTION_BYTES = 256 * 2**20
"""Pixels that are held at once."""
DEFAULT_TOKEN_NAME = "REWARD_TOKEN"  # noqa: S105 - the name of a variable


class PictureUnreadable(ValueError):
    """A file is missing or no picture; the message names it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of all files, in their order, and the reward that gave them."""

    scores: list[float]
    reward: str
    version: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded file and its position on the command line."""

    position: int
    image_HWC: NDArray[np.uint8]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; argparse prints usage and exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m services.client",
        description="Score pictures by a reward service.",
        allow_abbrev=False,  # a --token would become --token-env
    )
    parser.add_argument("url", metavar="URL", help="of the service: http://HOST:PORT or https://HOST:PORT")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG or WebP")
    parser.add_argument("--prompt", metavar="TEXT", help="for all pictures, where the reward reads one")
    add_token_option(parser)
    parser.add_argument("--deadline", type=_seconds, default=60.0, metavar="S", help="seconds for all (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args(arguments)


def add_token_option(parser: argparse.ArgumentParser) -> None:
    """Give a command `--token-env NAME`, for `read_token`."""
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        type=_variable,
        help=f"the environment variable that holds the bearer token (default: {DEFAULT_TOKEN_NAME}, where it is set)",
    )


def read_token(name: str | None) -> str | None:
    """Read the bearer token from the environment.

    Args:
        name: of the variable, which must be set; None for the usual one, which may be absent.

    Raises:
        ValueError: it is not set.
    """
    token = token_of(name or DEFAULT_TOKEN_NAME)
    if token is None and name is not None:
        raise ValueError(f"--token-env {name}: the variable is not set or empty; set it to the token")
    return token


def read_portions(files: Sequence[Path], limits: Limits, *, portion_bytes: int) -> Iterator[list[Picture]]:
    """Decode the files, no more at once than memory should hold.

    Args:
        files: PNG, JPEG or WebP.
        limits: of one picture.
        portion_bytes: of pixels at once; a larger picture comes by itself.

    Raises:
        PictureUnreadable: a file is missing, or no picture within the limits.
    """
    portion: list[Picture] = []
    held_bytes = 0
    for position, file in enumerate(files):
        try:
            image_HWC = decode_picture(file.read_bytes(), position, limits, room_bytes=limits.max_body_bytes)
        except (OSError, BodyError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise PictureUnreadable(f"{printable(file)}: {reason}") from error
        if portion and held_bytes + image_HWC.nbytes > portion_bytes:
            yield portion
            portion, held_bytes = [], 0
        portion.append(Picture(position, image_HWC))
        held_bytes += image_HWC.nbytes
    yield portion


async def score_files(
    client: RewardClient,
    files: Sequence[Path],
    prompt: str | None,
    *,
    deadline_s: float,
    portion_bytes: int = PORTION_BYTES,
) -> Scored:
    """Score the files, those of one size together.

    Args:
        client: of the service, open.
        files: pictures.
        prompt: for all of them, or None.
        deadline_s: seconds for all of them.
        portion_bytes: of pixels that are held at once.

    Raises:
        PictureUnreadable: a file is missing or no picture; what others were scored is lost.
        RewardError: see `services.client`; a refusal that names an image names its file.
    """
    ends_s = time.monotonic() + deadline_s
    info = await client.info(deadline_s=deadline_s)
    scores = [0.0] * len(files)  # each is written once, or an error is raised
    versions: set[tuple[str, str]] = set()

    async def score_group(group: Sequence[Picture]) -> None:
        images_BHWC = np.stack([picture.image_HWC for picture in group])
        prompts = None if prompt is None else [prompt] * len(group)
        try:
            result = await client.score(images_BHWC, prompts, deadline_s=max(0.001, ends_s - time.monotonic()))
        except RewardRefused as error:
            if error.index is None:
                raise
            name = printable(files[group[error.index].position])
            raise RewardRefused(f"{name}: {error}", status=error.status, problem=error.problem) from error
        versions.add((result.reward, result.version))
        for picture, score in zip(group, result.scores.tolist(), strict=True):
            scores[picture.position] = score

    for portion in read_portions(files, info.limits, portion_bytes=portion_bytes):
        by_size: dict[tuple[int, ...], list[Picture]] = {}
        for picture in portion:
            by_size.setdefault(picture.image_HWC.shape, []).append(picture)
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in by_size.values():
                    tasks.create_task(score_group(group))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    if len(versions) != 1:
        raise RewardAnswerInvalid(f"{client.url} changed its model between pictures: run the command again")
    ((reward, version),) = versions
    return Scored(scores, reward, version, info.higher_is_better)


def print_table(files: Sequence[Path], scored: Scored) -> None:
    """Print a row for each file."""
    better = "higher" if scored.higher_is_better else "lower"
    table = Table(title=f"{scored.reward} {scored.version} ({better} is better)")
    table.add_column("file", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for file, score in zip(files, scored.scores, strict=True):
        table.add_row(Text(printable(file)), f"{score:.6g}")
    Console(highlight=False).print(table)


def print_json(files: Sequence[Path], scored: Scored) -> None:
    """Print one object: the reward, its version, and the files with their scores in full precision."""
    rows = [{"file": str(file), "score": score} for file, score in zip(files, scored.scores, strict=True)]
    print(json.dumps({"reward": scored.reward, "version": scored.version, "scores": rows}, indent=1))


def printable(file: Path) -> str:
    """A file's name as text, whatever its bytes."""
    return os.fsencode(file).decode(errors="replace")


async def run(options: argparse.Namespace) -> None:
    """Score and print.

    Raises:
        ValueError: the command line is at fault, or a file.
        RewardError: the service is.
    """
    token = read_token(options.token_env)
    async with RewardClient(options.url, token=token, timeout_s=options.deadline, attempts=ATTEMPTS) as client:
        scored = await score_files(client, options.files, options.prompt, deadline_s=options.deadline)
    (print_json if options.json else print_table)(options.files, scored)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and turn an expected error into one line and an exit code."""
    options = parse_arguments(arguments)
    logging.getLogger("stamina").addHandler(logging.NullHandler())  # a retry that succeeds is no news
    try:
        asyncio.run(run(options))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except RewardRefused as error:
        hint = f": set {options.token_env or DEFAULT_TOKEN_NAME} to the token" if error.status == 401 else ""
        return _fail(f"{error}{hint}", EXIT_SERVICE)
    except RewardError as error:
        return _fail(str(error), EXIT_SERVICE)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _seconds(text: str) -> float:
    """Read a number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} s is no deadline: give a positive number of seconds")
    return seconds


def _variable(text: str) -> str:
    """Read the name of an environment variable."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", text):
        # Not repeated: it may be the token itself.
        raise argparse.ArgumentTypeError("this is no name of an environment variable: name one, not the token itself")
    return text


if __name__ == "__main__":
    sys.exit(main())
