"""What Prometheus reads from ``GET /metrics``; one registry for each server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# names that become labels
_MAX_TASKS = 100
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server.

    Args:
        queue_depth: tells how many images wait for the model.
        calls_in_progress: tells how many calls were let in and are not yet answered.
    """

    def __init__(
        self, queue_depth: Callable[[], float], calls_in_progress: Callable[[], float]
    ) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "pgn_fast_calls",
            "Calls of /v1/predict by HTTP status.",
            ["status"],
            registry=self.registry,
        )
        self._images = Counter(
            "pgn_fast_images", "Images that went through the model.", registry=self.registry
        )
        self._batch_images = Histogram(
            "pgn_fast_batch_images", "Images a batch.", buckets=_IMAGES, registry=self.registry
        )
        self._latency = Histogram(
            "pgn_fast_call_seconds",
            "Seconds from a call's headers to its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stage = Histogram(
            "pgn_fast_stage_seconds",
            "Seconds of a call by stage: read (body), decode, predict (queue and model), answer; "
            "and of a batch: model.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._task_calls = Counter(
            "pgn_fast_task_calls",
            'Answered calls by task; tasks after the first hundred are "other".',
            ["task"],
            registry=self.registry,
        )
        self._task_images = Counter(
            "pgn_fast_task_images",
            'Images of answered calls by task; tasks after the first hundred are "other".',
            ["task"],
            registry=self.registry,
        )
        self._tasks: set[str] = set()
        Gauge(
            "pgn_fast_queue_images", "Images waiting for the model.", registry=self.registry
        ).set_function(queue_depth)
        Gauge(
            "pgn_fast_calls_in_progress", "Calls let in, not answered.", registry=self.registry
        ).set_function(calls_in_progress)

    def observe_call(self, status: int, seconds: float) -> None:
        self._calls.labels(str(status)).inc()
        self._latency.observe(seconds)

    def observe_task(self, task: str, images: int) -> None:
        """Count an answered call of a task that there is."""
        if len(self._tasks) < _MAX_TASKS:
            self._tasks.add(task)
        label = task if task in self._tasks else "other"
        self._task_calls.labels(label).inc()
        self._task_images.labels(label).inc(images)

    def observe_batch(self, images: int, seconds: float) -> None:
        self._images.inc(images)
        self._batch_images.observe(images)
        self.observe_stage("model", seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._stage.labels(stage).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
