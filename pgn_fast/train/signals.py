"""SIGTERM and SIGINT end a run at the next safe moment, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ..errors import TrainingStopped


class Interrupted(TrainingStopped):
    """A signal ended the run; its checkpoint continues it. Exit code 128 + the signal's number.

    Args:
        what: what has ended, and what is kept.
        how: the command or call that goes on.
    """

    def __init__(self, what: str, how: str, number: int) -> None:
        super().__init__(f"{what}. Continue with: {how}")
        self.what, self.number = what, number
        self.exit_code = 128 + number

    def continued_by(self, how: str) -> Interrupted:
        """The same, for whoever started the run in another way than ``pgn-fast train``."""
        return Interrupted(self.what, how, self.number)


class Asked(Exception):
    """Unwinds an evaluation when a signal has come; the run answers it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """Inside, the first SIGTERM or SIGINT only asks to stop; the second SIGINT interrupts at once.

    In a thread other than the main one signals are not ours to take, and nothing is changed.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
