"""LitServe: `python server.py WORKLOAD PORT`, with its ZeroMQ queue and, for pictures, batching.

The body is taken as bytes, which spares the form parser and goes through its queue as one object.
Settings: https://lightning.ai/docs/litserve/api-reference/litserver and …/features/batching.
"""

import sys
from typing import Annotated, Any

import litserve
from fastapi import Body

from benchmarks.peers.work import MAX_BATCH, MAX_WAIT_S, scorer


class Scoring(litserve.LitAPI):
    """Scores bodies of one workload."""

    def __init__(self, workload: str, **options: Any) -> None:
        super().__init__(api_path="/score", **options)
        self.workload = workload
        self.batches = workload == "w2"

    def setup(self, device: str) -> None:
        """Load what scores, in the worker."""
        self.score_bodies = scorer(self.workload)

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """Leave the body as it is."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Keep the bodies apart."""
        return inputs

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """Keep the scores apart."""
        return output

    def predict(self, x: Any) -> Any:
        """Score one body, or a list of them."""
        return self.score_bodies(x) if self.batches else self.score_bodies([x])[0]

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        """Name the scores."""
        return {"scores": output}


if __name__ == "__main__":
    workload, port = sys.argv[1], int(sys.argv[2])
    options = {"max_batch_size": MAX_BATCH, "batch_timeout": MAX_WAIT_S} if workload == "w2" else {}
    server = litserve.LitServer(
        Scoring(workload, **options),
        accelerator="cpu",
        fast_queue=True,
        workers_per_device=1 if workload == "w3" else 2,
    )
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1 if workload == "w3" else 2,
        generate_client_file=False,
        log_level="warning",
    )
