"""What Prometheus reads, and that docs/contract.md says what each number means."""

import asyncio
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.batching.survey import BATCH_BOUNDS, Events, Survey
from services.http.metrics import PHASES, Metrics
from services.images import encode_batch
from tests.services.conftest import ROOT
from tests.services.serving import IMAGES, JSON, SAFETENSORS, FakeQueue, serving

pytestmark = pytest.mark.anyio

SURVEY = Survey(
    waiting_images=12,
    leased_images=5,
    queued_bytes=345,
    oldest_s=1.5,
    dead_letters=2,
    events=Events(
        batches=(3, 0, 1, 0, 0, 0, 2, 0, 0, 1),
        batch_images=500,
        renewals=7,
        redeliveries=6,
        dead_letters=4,
        resubmissions=8,
        dropped=9,
    ),
)


def samples(text: str) -> dict[tuple[str, str], float]:
    """The samples by name and by the value of the label that is neither reward nor version."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert (sample.labels.pop("reward"), sample.labels.pop("version")) == ("brightness", "1")
            found[sample.name, ",".join(sample.labels.values())] = sample.value
    return found


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """What a scrape finds."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


async def test_requests_and_images_are_counted() -> None:
    """By status; a repeat is a request, but its images are not scored again."""
    headers = {**SAFETENSORS, "Idempotency-Key": "k"}
    async with serving(FakeQueue()) as client:
        for _ in range(2):
            await client.post("/score", content=encode_batch(IMAGES), headers=headers)
        await client.post("/score", content=b"{", headers=JSON)
        await client.get("/info")
        found = await scrape(client)
    assert found["reward_requests_total", "200"] == 2
    assert found["reward_requests_total", "400"] == 1
    assert found["reward_images_total", ""] == 3
    assert found["reward_request_images_sum", ""] == 6
    assert found["reward_request_images_bucket", "2.0"] == 0
    assert found["reward_request_images_bucket", "4.0"] == 2


async def test_each_phase_of_a_request_is_timed() -> None:
    """Reading, decoding, queueing and scoring of what was scored; the total of all."""
    async with serving(FakeQueue()) as client:
        before = await scrape(client)
        assert {before["reward_request_seconds_count", phase] for phase in PHASES} == {0}
        await client.post("/score", content=encode_batch(IMAGES), headers=SAFETENSORS)
        await client.post("/score", content=b"{", headers={"Content-Type": "text/plain"})
        found = await scrape(client)
    counts = {phase: found["reward_request_seconds_count", phase] for phase in PHASES}
    assert counts == {"read": 1, "decode": 1, "queue": 1, "score": 1, "total": 2}
    assert found["reward_request_seconds_sum", "queue"] == pytest.approx(0.020)
    assert found["reward_request_seconds_sum", "score"] == pytest.approx(0.003)
    assert 0 < found["reward_request_seconds_sum", "total"] < 10


async def test_the_queue_is_told_as_it_is_surveyed() -> None:
    """Gauges, counters, and the sizes of batches as a cumulative histogram."""
    queue = FakeQueue()
    queue.seen = SURVEY
    async with serving(queue) as client:
        found = await scrape(client)
    assert found["reward_queue_images", "waiting"] == 12
    assert found["reward_queue_images", "leased"] == 5
    assert found["reward_queue_bytes", ""] == 345
    assert found["reward_queue_oldest_seconds", ""] == 1.5
    assert found["reward_dead_letters_held", ""] == 2
    assert found["reward_renewals_total", ""] == 7
    assert found["reward_redeliveries_total", ""] == 6
    assert found["reward_dead_letters_total", ""] == 4
    assert found["reward_resubmissions_total", ""] == 8
    assert found["reward_dropped_jobs_total", ""] == 9
    buckets = [found["reward_batch_images_bucket", str(float(bound))] for bound in BATCH_BOUNDS]
    assert buckets == [3, 3, 4, 4, 4, 4, 6, 6, 6]
    assert found["reward_batch_images_bucket", "+Inf"] == found["reward_batch_images_count", ""] == 7
    assert found["reward_batch_images_sum", ""] == 500


async def test_nothing_is_said_of_a_queue_that_cannot_be_seen() -> None:
    """While Redis is away its numbers are absent; those of the process stay."""
    async with serving(FakeQueue()) as client:
        found = await scrape(client)
    assert {name for name, _ in found if "queue_" in name or "dead" in name or "batch" in name} == set()
    assert found["reward_images_total", ""] == 0


async def test_a_redis_that_hangs_holds_no_metrics_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then, too, the numbers of the process are told: that the queue's are absent is what raises the alert."""
    monkeypatch.setattr("services.app.SURVEY_S", 0.05)
    queue = FakeQueue()
    monkeypatch.setattr(queue, "survey", asyncio.Event().wait)
    async with serving(queue) as client, asyncio.timeout(5):
        found = await scrape(client)
    assert not any("queue_" in name for name, _ in found)
    assert found["reward_images_total", ""] == 0


def test_every_metric_stands_in_the_contract() -> None:
    """docs/contract.md lists exactly the metrics that there are."""
    metrics = Metrics("brightness", "1")
    metrics.count_request(200)
    metrics.observe_size(1)
    families = text_string_to_metric_families(metrics.text(SURVEY).decode())
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.endswith("_created")
    }
    page = (ROOT / "docs" / "contract.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(reward_[a-z_]+)", page, flags=re.MULTILINE)) == names
