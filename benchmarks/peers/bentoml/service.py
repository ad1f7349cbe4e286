"""BentoML: `bentoml serve benchmarks.peers.bentoml.service:W1`, a process of its server for each core.

The service mounts an ASGI application, since its own file inputs go through a temporary file; a mounted application
knows no adaptive batching, so that a picture is scored as it comes.
Settings: https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html and …/parallelize-requests.html.
"""

import asyncio
import functools

import bentoml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.peers.work import scorer


def application(workload: str) -> Starlette:
    """An ASGI application that a service mounts."""
    score = functools.cache(scorer)  # made by the first request, in its own process
    turn = asyncio.Semaphore(1 if workload == "w3" else 2)

    async def answer(request: Request) -> JSONResponse:
        body = await request.body()
        async with turn:
            (scores,) = await asyncio.to_thread(lambda: score(workload)([body]))
        return JSONResponse({"scores": scores})

    return Starlette(routes=[Route("/score", answer, methods=["POST"])])


def service(workload: str, workers: int) -> type:
    """A service that mounts the application of a workload."""

    @bentoml.service(name=workload, workers=workers, traffic={"timeout": 60}, metrics={"enabled": False})
    @bentoml.asgi_app(application(workload))
    class Scoring:
        pass

    return Scoring


W1 = service("w1", 2)
W2 = service("w2", 2)
W3 = service("w3", 1)
