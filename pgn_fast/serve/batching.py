"""Images of many calls through the model together: a bounded queue and the threads that empty it.

A worker takes the oldest call, waits up to ``max_wait`` for others to fill the batch, and runs
it. Calls are never split: a batch is made of whole calls. While all workers are busy the queue
fills, so that the batches grow by themselves under load.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .admission import Share
from .errors import closing, overloaded
from .preprocess import Levels

# the images of one call, (C, H, W) each, and what they are put to (``Target.key``)
Call = tuple[Sequence[Levels], Any]


@dataclass
class _Waiting:
    levels: Sequence[Levels]
    key: Any
    client: str
    result: Future[Tensor] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs a model on what callers submit.

    Args:
        run: calls, each its images (list of uint8 (C, H, W)) and a key → one result
            (images, size) for each call; called in worker threads, several at a time.
        max_batch: images that go through ``run`` together; a single larger call goes alone.
        max_wait: seconds that a batch waits for more images after its first.
        capacity: images that may wait; clients divide it (``Share``).
        workers: threads.
        observe_batch: told the number of images and the seconds of every batch that ran.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Call]], Sequence[Tensor]],
        *,
        max_batch: int,
        max_wait: float,
        capacity: int,
        workers: int = 1,
        observe_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._observe_batch = observe_batch
        self._queue: deque[_Waiting] = deque()
        self._images = Share(capacity)
        self._closed = False
        self._changed = threading.Condition()
        # one worker at a time waits for a batch to fill; the others wait for their turn
        self._turn = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"pgn-fast-model-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Images that wait."""
        return self._images.total

    @property
    def alive(self) -> bool:
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def submit(self, levels: Sequence[Levels], key: Any, client: str = "") -> Future[Tensor]:
        """Queue the images of one call of a client.

        Returns:
            A future of the outputs, (images, size). Cancelling it takes the call out of the queue.

        Raises:
            ApiError: 503, the queue is full or the server is closing.
        """
        waiting = _Waiting(levels, key, client)
        with self._changed:
            if self._closed:
                raise closing()
            self._check(client, len(levels))
            self._queue.append(waiting)
            self._images.take(client, len(levels))
            self._changed.notify()
        return waiting.result

    def check(self, client: str) -> None:
        """Raises ApiError 503 where not even one image of this client could wait now."""
        with self._changed:
            self._check(client, 1)

    def _check(self, client: str, images: int) -> None:
        if not self._images.fits(client, images):
            raise overloaded(
                f"{self.depth} images wait already and this server lets "
                f"{self._images.capacity} wait; try again."
            )

    def close(self) -> None:
        """Take nothing more, answer what was accepted, stop the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._turn:
                batch = self._collect()
            if batch is None:
                return
            if batch := [call for call in batch if call.result.set_running_or_notify_cancel()]:
                self._answer(batch)

    def _collect(self) -> list[_Waiting] | None:
        """The calls of the next batch; None when the queue is closed and empty."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            full_by = self._queue[0].since + self._max_wait
            while self.depth < self._max_batch and not self._closed:
                left = full_by - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch = [self._queue.popleft()]
            count = len(batch[0].levels)
            while self._queue and count + len(self._queue[0].levels) <= self._max_batch:
                batch.append(self._queue.popleft())
                count += len(batch[-1].levels)
            for call in batch:
                self._images.give_back(call.client, len(call.levels))
            return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        began = time.perf_counter()
        try:
            results = self._run([(call.levels, call.key) for call in batch])
            for call, result in zip(batch, results, strict=True):
                call.result.set_result(result)
        except Exception as error:
            left = [call for call in batch if not call.result.done()]
            if len(batch) > 1:  # what one call brings about is not the others' answer
                for call in left:
                    self._answer([call])
                return
            # whatever the model raises is the answer of the call, and the worker goes on
            for call in left:
                call.result.set_exception(error)
        images = sum(len(call.levels) for call in batch)
        self._observe_batch(images, time.perf_counter() - began)
