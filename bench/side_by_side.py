"""Jobs in processes of their own, side by side: one that fails or dies costs its own answer.

Processes are spawned, for CUDA knows no fork, and kept for many jobs: what a job has loaded, the
next one has. After an error a new process takes over, whatever the old one has left on the device.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LAST_LINES = 12


@dataclass(frozen=True)
class Job:
    """One call.

    Attributes:
        priority: the smallest goes first; of equals the earlier.
        order: the argument of the call; it travels to another process.
        then: is given the answer, in this process, and yields the jobs that follow; of a call that
            failed it is given None, and the last lines of what became of it.
    """

    priority: float
    order: Any
    then: Callable[[Any, str | None], Iterable[Job]]


def work_off(
    jobs: Iterable[Job],
    call: Callable[[Any], Any],
    *,
    processes: int,
    logs: Path,
    limit: float = float("inf"),
) -> bool:
    """Do all jobs, and those that follow from them.

    Args:
        call: a function of a module, of an order; its answer travels back.
        processes: how many at a time.
        logs: folder for what the processes print.
        limit: seconds, after which nothing is begun and what runs is ended.

    Returns:
        Whether all of them came to an end within the limit.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    numbers = itertools.count()
    waiting: list[tuple[float, int, Job]] = []
    workers: list[_Worker] = []

    def add(more: Iterable[Job]) -> None:
        for job in more:
            heapq.heappush(waiting, (job.priority, next(numbers), job))

    add(jobs)
    try:
        while waiting or any(worker.job for worker in workers):
            left = end - time.monotonic()
            if left <= 0:
                return False
            for worker in _free(workers, processes if waiting else 0, call, logs):
                if waiting:
                    worker.begin(heapq.heappop(waiting)[2])
            busy = {worker.connection: worker for worker in workers if worker.job}
            for connection in wait(list(busy), min(left, 60.0)):
                worker = busy[connection]  # type: ignore[index]
                job, (answer, why) = worker.end()
                if why is not None:
                    workers.remove(worker)
                    worker.kill()
                add(job.then(answer, why))
        return True
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that waits for orders."""

    _count = itertools.count()

    def __init__(self, call: Callable[[Any], Any], logs: Path) -> None:
        self.job: Job | None = None
        self.log = logs / f"{next(self._count):03d}.log"
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, call, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it is dead, which ``end`` finds out
            self.connection.send(job.order)

    def end(self) -> tuple[Job, tuple[Any, str | None]]:
        """The job, its answer, and why there is none."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            said = self.log.read_text(errors="replace") if self.log.exists() else ""
            why = f"its process ended with code {self.process.exitcode}"
            return job, (None, "\n".join([*said.splitlines()[-LAST_LINES:], why]))

    def kill(self) -> None:
        self.process.kill()  # training answers SIGTERM when it is ready to
        self.process.join(10)
        self.connection.close()


def _free(
    workers: list[_Worker], most: int, call: Callable[[Any], Any], logs: Path
) -> Iterator[_Worker]:
    """Those that wait, and new ones up to ``most``."""
    yield from [worker for worker in workers if not worker.job]
    while len(workers) < most:
        workers.append(_Worker(call, logs))
        yield workers[-1]


def _serve(connection: Connection, call: Callable[[Any], Any], log: Path) -> None:
    """The life of a process: an order, its answer, and the next one, up to the first error."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        try:
            connection.send((call(order), None))
        except Exception:
            connection.send((None, "\n".join(traceback.format_exc().splitlines()[-LAST_LINES:])))
            return
