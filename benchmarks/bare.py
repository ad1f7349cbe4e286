"""The bare handler: `python -m benchmarks.bare WORKLOAD PORT`, which scores in a thread and has nothing in between."""

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
    uvicorn.run(app_of(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_config=None, access_log=False)
