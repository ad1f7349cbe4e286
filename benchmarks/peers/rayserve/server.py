"""Ray Serve: `python server.py WORKLOAD PORT`, with its throughput settings and HAProxy (see `benchmarks.contenders`).

Settings: https://docs.ray.io/en/latest/serve/advanced-guides/performance.html and …/dyn-req-batch.html.
"""

import asyncio
import sys

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.work import MAX_BATCH, MAX_WAIT_S, scorer

WORKLOAD, PORT = sys.argv[1], int(sys.argv[2])
REPLICAS = 1 if WORKLOAD == "w3" else 2


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=128, ray_actor_options={"num_cpus": 0.5})
class Scoring:
    """Scores bodies of one workload."""

    def __init__(self, workload: str) -> None:
        self.score = scorer(workload)
        self.batches = workload == "w2"

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT_S)
    async def score_together(self, bodies: list[bytes]) -> list[list[float]]:
        """Score what came together."""
        return await asyncio.to_thread(self.score, bodies)

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        """Answer a request."""
        body = await request.body()
        if self.batches:
            return {"scores": await self.score_together(body)}
        (scores,) = await asyncio.to_thread(self.score, [body])
        return {"scores": scores}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT, "access_log": False})
    serve.run(Scoring.bind(WORKLOAD), route_prefix="/score", logging_config={"enable_access_log": False}, blocking=True)
