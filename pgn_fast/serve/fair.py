"""Threads that divide their time fairly among clients, and among the calls of one client.

Work comes in steps, such as one image to decode. After each step its call goes back into line, and
the next step is one of the client, and of that client's call, that has had the least CPU time. A
small call therefore waits for no more than a step, not for the large calls that came before it; and
one more thread does light steps alone, so that a small call does not wait for a heavy step either.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")
# each ``yield`` ends a step, and tells whether the next one is heavy
Steps = Generator[bool, None, _T]
# clients without work that are remembered for the time they have had
_REMEMBERED = 1000


@dataclass(order=True)
class _Job:
    used: float
    number: int
    steps: Steps[Any] = field(compare=False)
    result: Future[Any] = field(compare=False)


@dataclass
class _Client:
    """The calls of one client.

    Attributes:
        used: CPU seconds that it has had, on the clock that all clients share.
        clock: CPU seconds that each of its calls would have had of an equal share.
        light, heavy: its calls by their next step; heaps, the least CPU seconds first.
        active: calls that wait or run.
    """

    used: float
    clock: float = 0.0
    light: list[_Job] = field(default_factory=list)
    heavy: list[_Job] = field(default_factory=list)
    active: int = 0


class FairPool:
    """A pool of threads for work in steps.

    Args:
        threads: that do every step.
        name: what their names begin with.
        light_threads: further threads, that do light steps.
    """

    def __init__(self, threads: int, name: str, light_threads: int = 1) -> None:
        self._clients: dict[str, _Client] = {}
        # CPU seconds that each client would have had of an equal share; newcomers start here
        self._clock = 0.0
        self._numbers = itertools.count()
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(
                target=self._work, args=(i < threads,), name=f"{name}-{i}", daemon=True
            )
            for i in range(threads + light_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, client: str, steps: Steps[_T]) -> Future[_T]:
        """Run a generator, whose first step is a light one; its return value is the result.

        Returns:
            A future; cancelling it drops the steps that have not begun.
        """
        result: Future[_T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            entry = self._clients.setdefault(client, _Client(self._clock))
            if entry.active == 0:
                # time that it did not use is not saved up
                entry.used = max(entry.used, self._clock)
            entry.active += 1
            heapq.heappush(entry.light, _Job(entry.clock, next(self._numbers), steps, result))
            self._changed.notify()
        return result

    def run(self, client: str, function: Callable[..., _T], *args: Any) -> Future[_T]:
        """Run a function as a single step."""

        def step() -> Steps[_T]:
            yield from ()
            return function(*args)

        return self.submit(client, step())

    def shutdown(self) -> None:
        """Finish what was submitted and stop the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, all_steps: bool) -> None:
        while (taken := self._take(all_steps)) is not None:
            client, job = taken
            began = time.thread_time()
            heavy = _step(job)
            self._give_back(client, job, time.thread_time() - began, heavy)

    def _take(self, all_steps: bool) -> tuple[_Client, _Job] | None:
        with self._changed:
            while True:
                waiting = [
                    client
                    for client in self._clients.values()
                    if client.light or (all_steps and client.heavy)
                ]
                if waiting:
                    client = min(waiting, key=lambda client: client.used)
                    heaps = [client.light] if not all_steps else [client.light, client.heavy]
                    return client, heapq.heappop(min(filter(None, heaps), key=lambda h: h[0]))
                if self._closed:
                    return None
                self._changed.wait()

    def _give_back(self, client: _Client, job: _Job, seconds: float, heavy: bool | None) -> None:
        """Account for a step; ``heavy`` tells of the next one, None: there is none."""
        with self._changed:
            active = sum(1 for other in self._clients.values() if other.active)
            self._clock += seconds / max(1, active)
            client.used += seconds
            client.clock += seconds / client.active
            job.used += seconds
            if heavy is None:
                client.active -= 1
                self._forget()
            else:
                heapq.heappush(client.heavy if heavy else client.light, job)
                # not every thread that waits may do it
                self._changed.notify_all()

    def _forget(self) -> None:
        """Drop the clients that have no work and are owed none."""
        if len(self._clients) > _REMEMBERED:
            self._clients = {name: c for name, c in self._clients.items() if c.active}
        else:
            for name in [
                name for name, c in self._clients.items() if not c.active and c.used <= self._clock
            ]:
                del self._clients[name]


def _step(job: _Job) -> bool | None:
    """Run one step; whether the next one is heavy, None when the job is over."""
    if job.result.cancelled():
        job.steps.close()
        return None
    try:
        return bool(next(job.steps))
    except StopIteration as stop:
        _settle(job.result.set_result, stop.value)
    except BaseException as error:
        # whatever was raised is the answer, and the thread goes on
        _settle(job.result.set_exception, error)
    return None


def _settle(setter: Callable[[Any], None], value: Any) -> None:
    # cancelled while the step ran: nothing waits for the result
    with contextlib.suppress(InvalidStateError):
        setter(value)
