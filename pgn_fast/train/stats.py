"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PHASES = ("loader", "to device", "forward", "backward", "optimizer")
_NOTHING = nullcontext()


class StepTimes:
    """Seconds of each phase of the steps since the first one, whose compilation is left out.

    Where it is enabled it waits for the device at both ends of a phase, so that a step takes a
    little longer; where not, it does nothing.

    Attributes:
        steps: that were counted.
        seconds: by phase, and in all.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled, self._device = enabled, device
        self.steps, self._begun, self._mark = 0, False, 0.0
        self.seconds = dict.fromkeys((*PHASES, "all"), 0.0)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of a step."""
        return self._measured(name) if self.enabled else _NOTHING

    def begin(self) -> None:
        """The steps of an epoch begin now: what was before is none of their time."""
        self._mark = time.perf_counter()

    def end_step(self) -> None:
        """A step has ended, and the next one begins."""
        if not self.enabled:
            return
        self._wait()
        now = time.perf_counter()
        if self._begun:
            self.steps += 1
            self.seconds["all"] += now - self._mark
        else:
            self._begun = True
            self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._mark = now

    def as_dict(self) -> dict[str, Any] | None:
        """Milliseconds a step by phase, and the share outside of forward and backward in percent;
        None where nothing was counted."""
        if not self.steps:
            return None
        found = {name: 1000 * self.seconds[name] / self.steps for name in PHASES}
        whole = 1000 * self.seconds["all"] / self.steps
        found["other"] = whole - sum(found.values())
        outside = 100 * (1 - (found["forward"] + found["backward"]) / whole)
        return {
            "steps": self.steps,
            "step_ms": round(whole, 3),
            "phases_ms": {name: round(value, 3) for name, value in found.items()},
            "outside_forward_backward": round(outside, 2),
        }

    def line(self) -> str:
        """The same for people; empty where nothing was counted."""
        found = self.as_dict()
        if found is None:
            return ""
        phases = ", ".join(f"{name} {ms:.1f}" for name, ms in found["phases_ms"].items())
        return (
            f"a step takes {found['step_ms']:.1f} ms: {phases}; "
            f"{found['outside_forward_backward']:.1f} % outside of forward and backward"
        )

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type in ("cuda", "mps"):
            getattr(torch, self._device.type).synchronize()
