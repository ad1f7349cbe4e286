"""The bare handler: `python -m benchmarks.bare WORKLOAD PORT [fast]` scores in a thread, with nothing in between.

It runs as `pip install fastapi uvicorn` has it, with asyncio's loop and h11; `fast` takes uvloop and httptools, as our
services do.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request

from benchmarks.peers.work import scorer
from services.protocol import SCORE_PATH


def app_of(workload: str) -> FastAPI:
    """An application with the one route; the encoder, which has threads of its own, is given one request at a time."""
    app, score = FastAPI(), scorer(workload)
    threads = ThreadPoolExecutor(1 if workload == "w3" else 2)

    @app.post(SCORE_PATH)
    async def answer(request: Request) -> dict[str, list[float]]:
        body = await request.body()
        (scores,) = await asyncio.get_running_loop().run_in_executor(threads, score, [body])
        return {"scores": scores}

    return app


if __name__ == "__main__":
    loop, http = ("uvloop", "httptools") if "fast" in sys.argv else ("asyncio", "h11")
    where = {"host": "127.0.0.1", "port": int(sys.argv[2])}
    uvicorn.run(app_of(sys.argv[1]), loop=loop, http=http, log_config=None, access_log=False, **where)
