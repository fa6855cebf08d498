"""What a server may be told: its limits, its batching, its threads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

OUTPUTS = ("features", "logits")


def usable_cores() -> int:
    """Cores that this process may run on (the machine's may be more)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _model_workers() -> int:
    """Batches at a time that keep all cores busy.

    Two with an equal share of the cores each; where a share is a single core, one batch more, which
    has the core while another waits for the interpreter.
    """
    cores = usable_cores()
    return cores + 1 if cores <= 2 else 2


@dataclass(frozen=True)
class ServerSettings:
    """Limits and sizes of one server; every limit is stated in ``GET /v1/model``.

    Memory is bounded by them: at most ``max_pending_bytes`` of request bodies,
    ``decode_threads`` images of ``max_image_pixels`` being decoded and ``queue_images`` model
    inputs waiting, each and an eighth more for clients that have none of it yet; and
    128 KiB of buffers for each of ``max_connections``.
    """

    default_output: str = "features"
    """What a call gets that does not say: "features" (pooled) or "logits"."""

    max_call_bytes: int = 16 * 2**20
    """Bytes of one request's body."""
    max_call_images: int = 32
    """Images of one call; also at most ``queue_images``."""
    max_image_pixels: int = 25_000_000
    """Pixels that one image may declare: checked before it is decoded."""
    max_call_pixels: int = 100_000_000
    """Pixels that all images of one call may declare together."""
    timeout_s: float = 30.0
    """Seconds for one call, from the end of its headers to its answer."""
    header_timeout_s: float = 10.0
    """Seconds for the headers of a call, from the connection or the last answer on it."""
    min_body_rate: int = 1024
    """Bytes a second at which a body must arrive, over any five seconds."""
    drain_s: float = 1.0
    """Seconds between SIGTERM, when ``/readyz`` turns false, and the end of listening."""

    max_connections: int = 512
    """Open connections; beyond it the one that has been silent the longest is closed."""
    max_calls: int = 64
    """Calls in progress whose bodies are here; more are answered with 503."""
    max_pending_bytes: int = 256 * 2**20
    """Bytes that have arrived of all bodies in progress."""
    queue_images: int = 256
    """Images that wait for the model; calls that do not fit are answered with 503."""

    max_batch: int = 32
    """Images that go through the model together."""
    max_wait_ms: float = 2.0
    """Milliseconds that a batch waits for more images after its first."""

    model_workers: int = _model_workers()
    """Batches that are computed at the same time, each by a thread of its own."""
    decode_threads: int = usable_cores()
    """Threads that decode images and write answers; one more decodes small images alone."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "default_output":
                if value not in OUTPUTS:
                    raise ValueError(f"default_output={value!r}: known are {', '.join(OUTPUTS)}.")
            elif not math.isfinite(value):
                raise ValueError(f"{field.name}={value} must be a number, and not without an end.")
            elif value < 0 or (value == 0 and field.name not in ("max_wait_ms", "drain_s")):
                raise ValueError(f"{field.name}={value} must be above zero.")
        if self.max_call_images > self.queue_images:
            raise ValueError(
                f"max_call_images={self.max_call_images} can never enter a queue of "
                f"queue_images={self.queue_images}; raise the one or lower the other."
            )
        if self.max_call_bytes > self.max_pending_bytes:
            raise ValueError(
                f"max_call_bytes={self.max_call_bytes} is above max_pending_bytes="
                f"{self.max_pending_bytes}: such a call would never be let in."
            )

    def limits(self) -> dict[str, int | float]:
        """What a client should know before it sends."""
        return {
            "bytes_per_call": self.max_call_bytes,
            "images_per_call": self.max_call_images,
            "pixels_per_image": self.max_image_pixels,
            "pixels_per_call": self.max_call_pixels,
            "seconds_per_call": self.timeout_s,
        }
