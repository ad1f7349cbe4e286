"""What Prometheus may read of an API: its requests, and the queue as all APIs share it.

API processes behind one port count together, in files of a folder that each of them reads: whichever is asked, the
answer is the same, and no count falls back when one of them is started again.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from services.batching.survey import BATCH_BOUNDS, Survey

CONTENT_TYPE = CONTENT_TYPE_LATEST
PHASES = ("read", "decode", "queue", "score", "total")
"""Of a request: its upload, its decoding, the wait until a worker had the last of its jobs, the longest forward pass
that scored one of its images, and all of it."""
SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LABELS = ("reward", "version")

disable_created_metrics()  # type: ignore[no-untyped-call] # which several processes do not tell


class Metrics:
    """The metrics of one application."""

    def __init__(self, reward: str, version: str, folder: Path | None = None) -> None:
        """Start at zero.

        Args:
            reward: its name.
            version: its version.
            folder: where the processes of this reward count together, after `services.settings.count_in`; None where
                there is but one.
        """
        self._values = (reward, version)
        self._folder = folder
        self._registry = CollectorRegistry()
        self._requests = Counter("reward_requests", "Requests by status", [*LABELS, "status"], registry=self._registry)
        images = Counter("reward_images", "Images scored", LABELS, registry=self._registry)
        sizes = Histogram(
            "reward_request_images", "Images in a request", LABELS, buckets=BATCH_BOUNDS, registry=self._registry
        )
        seconds = Histogram(
            "reward_request_seconds",
            "Seconds of a request by phase",
            [*LABELS, "phase"],
            buckets=SECONDS_BOUNDS,
            registry=self._registry,
        )
        self._scored, self._request_images = images.labels(*self._values), sizes.labels(*self._values)
        self._phases = {phase: seconds.labels(*self._values, phase) for phase in PHASES}

    def count_request(self, status: int) -> None:
        """Count a request by the status of its answer."""
        self._requests.labels(*self._values, str(status)).inc()

    def count_images(self, images: int) -> None:
        """Count images that were scored."""
        self._scored.inc(images)

    def observe_size(self, images: int) -> None:
        """Note how many images a request holds."""
        self._request_images.observe(images)

    def observe_phase(self, phase: str, seconds: float) -> None:
        """Note how long one of `PHASES` took."""
        self._phases[phase].observe(seconds)

    def text(self, survey: Survey | None) -> bytes:
        """All metrics in the text format of Prometheus.

        Args:
            survey: the queue now; None where it cannot be seen, and then nothing is said of it.
        """
        return generate_latest(_Snapshot(self._requests_so_far(), survey, self._values))

    def _requests_so_far(self) -> Iterable[Metric]:
        """What was counted here, or in the files of all processes; where someone removed the folder, here again."""
        if self._folder is None or not self._folder.is_dir():
            return self._registry.collect()
        files = [str(path) for path in self._folder.glob("*.db") if path.stat().st_size]  # 0: it is just being made
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return merged


class _Snapshot(Collector):
    """The metrics at one moment."""

    def __init__(self, requests: Iterable[Metric], survey: Survey | None, values: tuple[str, str]) -> None:
        self._requests = requests
        self._survey = survey
        self._values = values

    def collect(self) -> Iterator[Metric]:
        yield from self._requests
        if self._survey is not None:
            yield from self._gauges(self._survey)
            yield from self._counters(self._survey)

    def _gauges(self, survey: Survey) -> Iterator[Metric]:
        images = GaugeMetricFamily("reward_queue_images", "Images in the queue by state", labels=[*LABELS, "state"])
        images.add_metric([*self._values, "waiting"], survey.waiting_images)
        images.add_metric([*self._values, "leased"], survey.leased_images)
        yield images
        for name, text, value in (
            ("reward_queue_bytes", "Bytes of pixels in the queue", survey.queued_bytes),
            ("reward_queue_oldest_seconds", "Age of the oldest job in the queue", survey.oldest_s),
            ("reward_dead_letters_held", "Dead letters that can be inspected", survey.dead_letters),
        ):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._values, value)
            yield gauge

    def _counters(self, survey: Survey) -> Iterator[Metric]:
        events = survey.events
        for name, text, value in (
            ("reward_renewals", "Leases renewed", events.renewals),
            ("reward_redeliveries", "Jobs delivered again after their worker fell silent", events.redeliveries),
            ("reward_dead_letters", "Jobs given up", events.dead_letters),
            ("reward_resubmissions", "Jobs submitted again because Redis had lost them", events.resubmissions),
            ("reward_dropped_jobs", "Jobs removed unscored: caller gone or deadline passed", events.dropped),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._values, value)
            yield counter
        batches = HistogramMetricFamily("reward_batch_images", "Images in a forward pass", labels=LABELS)
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(float, BATCH_BOUNDS), float("inf")), events.batches, strict=True):
            name = "+Inf" if bound == float("inf") else str(bound)
            buckets.append((name, count + (buckets[-1][1] if buckets else 0)))
        batches.add_metric(self._values, buckets, sum_value=events.batch_images)
        yield batches
