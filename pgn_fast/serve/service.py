"""What one call goes through, and the limits that it meets on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from .admission import Admission, Arriving, client_of
from .answerer import Answerer, Target
from .batching import Batcher
from .body import PredictCall
from .decode import declared_pixels, decode_call
from .errors import ApiError, out_of_time
from .fair import FairPool, Steps
from .forms import Form
from .metrics import Metrics
from .preprocess import Levels
from .settings import ServerSettings

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)
# seconds between looks at whether the server is idle, and at bodies that do not arrive
_IDLE_LOOK_S = 1.0
_BODY_LOOK_S = 0.5
# an image of more pixels is left to the threads that do heavy steps: about 50 ms
_HEAVY_PIXELS = 2_000_000
# whose work the server's own is in the pool
_OURS = ""


class Service:
    """One call's way: let in → body read → images decoded → model → answer, each stage timed.

    Args:
        on_idle: called in a thread when no call is in progress, once after every load.
    """

    def __init__(
        self,
        served: Answerer,
        settings: ServerSettings,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._served = served
        self._settings = settings
        self._on_idle = on_idle
        self._seen = 0
        self._admission = Admission(settings)
        self._warm = False
        self.draining = False
        # whether the end waits for nobody: the threads are left to the process's end
        self.cut_off = False
        self.metrics = Metrics(lambda: self.batcher.depth, lambda: self._admission.calls)

    def start(self) -> None:
        """Start the threads; called where the event loop runs."""
        settings = self._settings
        self._pool = FairPool(settings.decode_threads, "pgn-fast-decode")
        self.batcher = Batcher(
            self._served.run,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            capacity=settings.queue_images,
            workers=settings.model_workers,
            observe_batch=self.metrics.observe_batch,
        )
        self._served.start()
        self._watches = [
            asyncio.create_task(watch())
            for watch in (self._warm_up, self._watch_for_idleness, self._watch_bodies)
        ]

    def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        if self.cut_off:
            return
        self._served.stop()
        self.batcher.close()
        self._pool.shutdown()

    def readiness(self) -> str:
        """ "ready", or why no call should be sent here: "failing", "warming up", "draining"."""
        if not self.batcher.alive:
            return "failing"
        if self.draining:
            return "draining"
        return "ready" if self._warm else "warming up"

    async def predict(self, request: Request, form: Form) -> Response:
        """Answer a call whose body and answer have the given form."""
        began = time.perf_counter()
        self._seen += 1
        try:
            response = await self._predict(request, form)
        except ApiError as error:
            response = form.refusal(error)
        except ClientDisconnect:
            response = form.refusal(
                ApiError(400, "disconnected", "the client left before it had sent.")
            )
        except Exception:
            _logger.exception("a call failed")
            response = form.refusal(
                ApiError(500, "internal", "the model could not answer; the server's log says why.")
            )
        self.metrics.observe_call(response.status_code, time.perf_counter() - began)
        return response

    async def _predict(self, request: Request, form: Form) -> Response:
        deadline = time.monotonic() + self._settings.timeout_s
        client = client_of(request.client.host if request.client else None)
        self._admission.check(client, self._expected_bytes(request))
        self.batcher.check(client)
        body = bytearray()
        with self._admission.arriving(client) as arriving:
            with self._stage("read"):
                await self._arrived(request, body, arriving, deadline)
            with self._admission.working(arriving):
                return await self._answered(request, form, body, client, deadline)

    async def _answered(
        self, request: Request, form: Form, body: bytearray, client: str, deadline: float
    ) -> Response:
        late = out_of_time("decoding its images")
        with self._stage("decode"):
            work = self._submit(request, form, body, client, deadline)
            steps = self._pool.submit(client, work)
            call, target, submitted = await _before(deadline, asyncio.wrap_future(steps), late)
        body.clear()
        with self._stage("predict"):
            values = await _before(
                deadline, asyncio.wrap_future(submitted), out_of_time("waiting for the model")
            )
        with self._stage("answer"):
            # base64 takes less time than another thread takes to begin
            if call.encoding == "base64":
                answer = self._answer(form, call, target, values)
            else:
                answer = await self._in_pool(client, self._answer, form, call, target, values)
        if target.task is not None:
            self.metrics.observe_task(target.task, len(values))
            request.state.facts = {"task": target.task}
        return answer

    def _expected_bytes(self, request: Request) -> int:
        """Bytes that the body will have, or could have where the client does not say."""
        limit = self._settings.max_call_bytes
        stated = request.headers.get("content-length", "")
        expected = int(stated) if stated.isascii() and stated.isdigit() else limit
        if expected > limit:
            raise _too_large(f"{expected} bytes", limit)
        return expected

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.metrics.observe_stage(name, time.perf_counter() - began)

    async def _arrived(
        self, request: Request, body: bytearray, arriving: Arriving, deadline: float
    ) -> None:
        """Read a body; ApiError where it is refused on its way, or late."""
        reading = asyncio.ensure_future(self._read(request, body, arriving))
        arriving.stop = reading.cancel
        try:
            done, _ = await asyncio.wait({reading}, timeout=max(0.0, deadline - time.monotonic()))
            if done and not reading.cancelled():
                return reading.result()
        finally:
            reading.cancel()
        raise arriving.refusal or ApiError(
            408,
            "body_too_slow",
            f"the body did not arrive within {self._settings.timeout_s:g} seconds.",
        )

    async def _read(self, request: Request, body: bytearray, arriving: Arriving) -> None:
        limit = self._settings.max_call_bytes
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise _too_large("longer", limit)
            self._admission.arrived(arriving, len(chunk))
            body += chunk

    def _submit(
        self, request: Request, form: Form, body: bytearray, client: str, deadline: float
    ) -> Steps[tuple[PredictCall, Target, Future[Tensor]]]:
        """Decode a call, image by image, and hand it to the model, which may begin at once."""
        settings, served = self._settings, self._served
        call = form.parse(request, bytes(body), settings)
        target = served.target(call.task, call.output)
        try:
            images = decode_call(
                call.images, settings.max_image_pixels, settings.max_call_pixels, deadline
            )
            levels: list[Levels] = []
            for data in call.images:
                heavy = declared_pixels(data) > _HEAVY_PIXELS
                if levels or heavy:
                    yield heavy
                levels.append(target.preprocessing.geometry(next(images)))
            submitted = self.batcher.submit(levels, target.key, client)
        except BaseException:
            served.release(target)
            raise
        # also where it is cancelled; a call that is given up may still be running
        submitted.add_done_callback(lambda _: served.release(target))
        return call, target, submitted

    def _answer(self, form: Form, call: PredictCall, target: Target, values: Tensor) -> Response:
        # no JSON number, and no answer: reported as the model's failure
        if not values.isfinite().all():
            raise ValueError(f"{target.task or self._served.name}: {call.output} are not finite")
        return form.answer(self._served.name, call, target, values)

    async def _warm_up(self) -> None:
        try:
            await self._in_pool(_OURS, self._served.warm_up, self._settings.max_batch)
        except Exception:
            _logger.exception("the model failed at its first batches; this server stays not ready")
        else:
            self._warm = True

    async def _watch_for_idleness(self) -> None:
        seen = 0
        while True:
            await asyncio.sleep(_IDLE_LOOK_S)
            if not self._admission.busy and self._seen > seen:
                seen = self._seen
                await self._in_pool(_OURS, self._on_idle)

    async def _watch_bodies(self) -> None:
        while True:
            await asyncio.sleep(_BODY_LOOK_S)
            self._admission.end_slow_bodies()

    async def _in_pool(self, client: str, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.wrap_future(self._pool.run(client, function, *args))


async def _before(deadline: float, work: Awaitable[_T], too_late: ApiError) -> _T:
    """The result of ``work``; ``too_late`` is raised, and the work cancelled, at the deadline."""
    try:
        return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
    except asyncio.TimeoutError:  # another class than the builtin before Python 3.11
        raise too_late from None


def _too_large(what: str, limit: int) -> ApiError:
    return ApiError(
        413, "too_many_bytes", f"the body is {what}; this server takes {limit} bytes a call."
    )
