"""What queue and worker add to one image on an idle service: `python -m benchmarks.idle_latency`.

Requests go in turn to `python -m services serve brightness` and to a bare handler: the same body, decoder, reward and
HTTP server, without queue and worker. Both are processes of their own; the difference is taken between them.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from numpy.typing import NDArray

from services.images import decode_batch, encode_batch
from services.processes import bind, url_of
from services.protocol import MEDIA_SAFETENSORS, SCORE_PATH, Limits
from services.rewards.brightness import Brightness

WARM_UP = 50


def bare_app() -> FastAPI:
    """Decode and score in the handler, with nothing in between."""
    app, reward = FastAPI(), Brightness()

    @app.post(SCORE_PATH)
    async def score(request: Request) -> dict[str, list[float]]:
        batch = decode_batch(await request.body(), Limits())
        return {"scores": reward.score(np.stack(batch.images_HWC), None).tolist()}

    return app


def serve_bare() -> None:
    """Serve the bare handler on a free port, whose address is printed as JSON."""
    listener = bind("127.0.0.1", 0)
    print(json.dumps({"rewards": {"brightness": url_of(listener)}}), flush=True)
    config = uvicorn.Config(bare_app(), log_config=None, access_log=False, server_header=False, proxy_headers=False)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A Python process that announces its address; it is ended afterwards."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["rewards"]["brightness"] + SCORE_PATH
        finally:
            process.terminate()


def measure(url_by_name: dict[str, str], body: bytes, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each request, (rounds,) for each address; they take turns."""
    headers = {"Content-Type": MEDIA_SAFETENSORS}
    milliseconds: dict[str, list[float]] = {name: [] for name in url_by_name}
    with httpx.Client(trust_env=False, timeout=30) as client:
        for round_ in range(WARM_UP + rounds):
            for name, url in url_by_name.items():
                started_s = time.perf_counter()
                client.post(url, content=body, headers=headers).raise_for_status()
                if round_ >= WARM_UP:
                    milliseconds[name].append(1000 * (time.perf_counter() - started_s))
    return {name: np.array(values) for name, values in milliseconds.items()}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256, help="pixels of the image")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_bare()
        return 0
    body = encode_batch(np.random.default_rng(0).integers(0, 256, (1, options.side, options.side, 3), dtype=np.uint8))
    service = ("services", "serve", "brightness", "--port", "0", "--announce", "--until-stdin-closes")
    with running(*service) as url, running("benchmarks.idle_latency", "--bare") as bare_url:
        results = measure({"service": url, "bare handler": bare_url}, body, options.rounds)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"one image of {options.side}×{options.side}, {options.rounds} rounds; milliseconds")
    rows = {name: np.percentile(values, (50, 90, 99)) for name, values in results.items()}
    rows["added"] = rows["service"] - rows["bare handler"]
    print(f"{'':14}{'p50':>8}{'p90':>8}{'p99':>8}")
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{value:8.2f}" for value in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
