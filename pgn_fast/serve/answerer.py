"""The seam between the HTTP side and what answers: one frozen model, or tasks on one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .batching import Call
from .preprocess import Preprocessing


@dataclass(frozen=True)
class Target:
    """What a call is put to.

    Attributes:
        key: what the batches' ``run`` gets beside the call's images.
        output: "features" or "logits".
        preprocessing: of the call's images.
        task: its name; None for a model without tasks.
        class_names: C names in label order, where they are known.
    """

    key: Any
    output: str
    preprocessing: Preprocessing
    task: str | None = None
    class_names: Sequence[str] | None = None


class Answerer(Protocol):
    """What a server serves."""

    @property
    def name(self) -> str:
        """Of the model or the backbone."""

    @property
    def outputs(self) -> Sequence[str]:
        """Which there are; the first is what a call gets that does not say."""

    def start(self) -> None:
        """Begin what goes on beside the calls."""

    def stop(self) -> None:
        """End it."""

    def warm_up(self, max_batch: int) -> None:
        """Run what a first call would otherwise wait for."""

    def check_output(self, output: str) -> None:
        """Raises ValueError where there is no such output."""

    def target(self, task: str | None, output: str) -> Target:
        """What a call is put to; it stays there until ``release``.

        Raises:
            ApiError: 400, no such task or output, or a task must be named.
        """

    def release(self, target: Target) -> None:
        """The call that got this target is over."""

    def run(self, calls: Sequence[Call]) -> Sequence[Tensor]:
        """Images and keys of several calls → (images, size) for each, float32 on the CPU."""

    def describe(self) -> dict[str, Any]:
        """For ``GET /v1/model``."""

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Name → what ``GET /v1/tasks/NAME`` says of it; no tasks: empty."""

    def models(self) -> dict[str, dict[str, int]]:
        """Name → sizes of the outputs, as the Open Inference Protocol lists models."""
