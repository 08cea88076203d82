"""What the service counts and times, for Prometheus; `docs/metrics.md` says what each is for."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from index.gallery import Counts, GalleryError
from service.problems import KINDS

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# Every reason of a refusal, so that each series is there, at 0, before its first refusal: the rate
# of one that begins at 1 would miss it.
REASONS = tuple(sorted({kind.slug for kind in KINDS.values()}))
OTHER = "other"
UNKNOWN = "unknown"  # the route of what was answered before a route was found
# Seconds, three steps a decade: from a batch on a GPU to the deadline of the queue.
STAGE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SEARCH_S = (0.0001, 0.00025, 0.0005, *STAGE_S)  # a thousand tracklets take less than 1 ms
REQUEST_S = (*STAGE_S, 120)  # an upload may take as long as its embedding
# The largest batch of each power of two; a tracklet's 15 frames come close below one.
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Embeddings of unit length are 0 to 2 apart, and thresholds need steps of 0.1 there; those of other
# checkpoints are tens apart.
DISTANCES = (
    *(step / 10 for step in range(1, 17)),
    *(1.8, 2, 4, 6, 8, 10, 12, 14, 16, 20, 25, 30, 40, 50, 75, 100),
)


class Metrics:
    """The metrics of one app, in a registry of its own: several apps in a process do not collide.

    Every method may be called from any thread, those of requests from the event loop alone.

    Args:
        version: Of Passerby.
        model: Fingerprint of the checkpoint.
    """

    def __init__(self, *, version: str, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._watched = _Watched()
        registry.register(self._watched)
        self._requests = Counter(
            "passerby_requests_total", "Answered requests.", ["route", "status"], registry=registry
        )
        self._request_duration = Histogram(
            "passerby_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=REQUEST_S,
            registry=registry,
        )
        self._ended: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "Of a tracklet, until its batch began.", STAGE_S
        )
        self._batch_frames = self._histogram("batch_frames", "Frames of a batch.", FRAMES)
        self._embed = self._histogram(
            "embed_duration_seconds", "Of a batch, in the network.", STAGE_S
        )
        self._decode = self._histogram(
            "decode_duration_seconds", "Of an upload, with its wait for a decoder.", STAGE_S
        )
        self._search = self._histogram(
            "search_duration_seconds", "Of a search, with its wait for a thread.", SEARCH_S
        )
        self._nearest = self._histogram(
            "nearest_distance", "Of a query to the nearest tracklet, Euclidean.", DISTANCES
        )
        rejected = Counter(
            "passerby_rejected_total", "Refused uploads.", ["reason"], registry=registry
        )
        self._rejected = {reason: rejected.labels(reason) for reason in (*REASONS, OTHER)}
        decisions = Counter(
            "passerby_decisions_total",
            "Queries with a threshold to decide by.",
            ["decision"],
            registry=registry,
        )
        self._decisions = {name: decisions.labels(name) for name in ("match", "no_match")}
        Info("passerby_build", "What runs here.", registry=registry).info(
            {"version": version, "model": model}
        )
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"passerby_{name}", meaning, buckets=buckets, registry=self._registry)

    def watch(
        self,
        queue: Callable[[], int],
        counts: Callable[[], Counts],
        data_dir: Path | None = None,
    ) -> None:
        """Say where to ask, at each scrape, for what is not counted here.

        Args:
            queue: How many tracklets wait.
            counts: What the gallery holds; a `GalleryError` leaves it out of the scrape.
            data_dir: On the disk that is watched; none where it is None, or not there.
        """
        self._watched.queue, self._watched.counts = queue, counts
        self._watched.data_dir = data_dir

    def tell_readiness(self, checks: Mapping[str, str]) -> None:
        """Note what each part of the service said of itself just now.

        Args:
            checks: From `service.readiness.Readiness.ask`.
        """
        self._watched.ready = {part: answer == "ok" for part, answer in checks.items()}

    def begin_request(self) -> None:
        """Count a request that is under way."""
        self._watched.in_flight += 1

    def end_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            route: The template of its route, never its path: whoever asks must not be able to make
                series.
            status: HTTP status.
            seconds: It took.
        """
        self._watched.in_flight -= 1
        series = self._ended.get((route, status))
        if series is None:
            series = (
                self._requests.labels(route, str(status)),
                self._request_duration.labels(route),
            )
            self._ended[route, status] = series
        series[0].inc()
        series[1].observe(seconds)

    def reject(self, reason: str) -> None:
        """Count an upload that was refused.

        Args:
            reason: Slug of the problem that it was answered with.
        """
        self._rejected.get(reason, self._rejected[OTHER]).inc()

    def observe_decode(self, seconds: float) -> None:
        """Note how long an upload took to become frames, with its wait for a decoder."""
        self._decode.observe(seconds)

    def observe_queue_wait(self, seconds: float) -> None:
        """Note how long a tracklet waited until its batch began."""
        self._queue_wait.observe(seconds)

    def observe_batch(self, frames: int, seconds: float) -> None:
        """Note the size of a batch, and how long the network took for it."""
        self._batch_frames.observe(frames)
        self._embed.observe(seconds)

    def observe_search(self, seconds: float) -> None:
        """Note how long a search took, with its wait for a thread."""
        self._search.observe(seconds)

    def observe_decision(self, nearest: float | None, decision: str | None) -> None:
        """Note how near a query came, and what was made of it.

        Args:
            nearest: Distance of the nearest tracklet; None where nothing was searched.
            decision: "match" or "no_match"; None where there is no threshold.
        """
        if nearest is not None:
            self._nearest.observe(nearest)
        if decision is not None:
            self._decisions[decision].inc()

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """Everything as text.

        Args:
            accept: What the client asks for: OpenMetrics where it names it, else Prometheus' own.

        Returns:
            The text in UTF-8, and its media type.
        """
        families = _WithoutCreated(self._registry)
        kinds = {kind.partition(";")[0].strip().lower() for kind in accept.split(",")}
        if "application/openmetrics-text" in kinds:
            text: bytes = openmetrics.generate_latest(families)  # type: ignore[no-untyped-call]
            return text, OPENMETRICS
        return generate_latest(families), PLAIN


class _Watched(Collector):
    """What is true at the time of a scrape and counted elsewhere."""

    def __init__(self) -> None:
        self.in_flight = 0  # the event loop alone changes it
        self.queue: Callable[[], int] | None = None
        self.counts: Callable[[], Counts] | None = None
        self.data_dir: Path | None = None
        self.ready: Mapping[str, bool] = {}

    def collect(self) -> Iterator[Metric]:
        yield _gauge("requests_in_flight", "Requests under way, this one included.", self.in_flight)
        if self.queue is not None:
            yield _gauge("queue_tracklets", "Tracklets that wait for the worker.", self.queue())
        yield from self._collect_health()
        if self.counts is None:
            return
        try:
            counts = self.counts()
        except GalleryError:
            return  # the rest matters most while the gallery is out of reach
        yield _gauge("gallery_tracklets", "Stored tracklets.", counts.tracklets)
        yield _gauge("gallery_identities", "Distinct identities of them.", counts.identities)

    def _collect_health(self) -> Iterator[Metric]:
        if self.ready:
            ready = GaugeMetricFamily(
                "passerby_ready", "Whether a part can do its work.", labels=["part"]
            )
            for part, is_well in self.ready.items():
                ready.add_metric([part], is_well)
            yield ready
        if self.data_dir is not None:
            with suppress(OSError):  # not made yet, or its disk is gone: the store tells of that
                disk = shutil.disk_usage(self.data_dir)
                yield _gauge("disk_free_bytes", "Of the data directory's disk.", disk.free)
                yield _gauge("disk_size_bytes", "Likewise, all of it.", disk.total)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"passerby_{name}", meaning, value)


class _WithoutCreated(Collector):
    """A registry without the time at which each series began, which would be a third of its series.

    The library's own switch for that is one for the whole process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            created = f"{family.name}_created"
            family.samples = [sample for sample in family.samples if sample.name != created]
            yield family
