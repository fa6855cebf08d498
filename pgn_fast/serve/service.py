"""What one call goes through, and the limits that it meets on the way."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from .admission import Admission, Arriving, client_of
from .batching import Batcher
from .body import PredictCall, parse_call
from .decode import decode_call
from .errors import ApiError, error_response, out_of_time
from .fair import FairPool
from .metrics import Metrics
from .model import ServedModel
from .settings import ServerSettings

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)
# seconds between looks at whether the server is idle, and at bodies that do not arrive
_IDLE_LOOK_S = 1.0
_BODY_LOOK_S = 0.5
# whose work the server's own is in the pool
_OURS = ""


class Service:
    """One call's way: let in → body read → images decoded → model → answer, each stage timed.

    Args:
        on_idle: called in a thread when no call is in progress, once after every load.
    """

    def __init__(
        self,
        served: ServedModel,
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
        self._watches = [
            asyncio.create_task(watch())
            for watch in (self._warm_up, self._watch_for_idleness, self._watch_bodies)
        ]

    def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self.batcher.close()
        self._pool.shutdown()

    def readiness(self) -> str:
        """ "ready", or why no call should be sent here: "failing", "warming up", "draining"."""
        if not self.batcher.alive:
            return "failing"
        if self.draining:
            return "draining"
        return "ready" if self._warm else "warming up"

    async def predict(self, request: Request) -> Response:
        began = time.perf_counter()
        self._seen += 1
        try:
            response = await self._predict(request)
        except ApiError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = error_response(
                ApiError(400, "disconnected", "the client left before it had sent.")
            )
        except Exception:
            _logger.exception("a call failed")
            response = error_response(
                ApiError(500, "internal", "the model could not answer; the server's log says why.")
            )
        self.metrics.observe_call(response.status_code, time.perf_counter() - began)
        return response

    async def _predict(self, request: Request) -> Response:
        deadline = time.monotonic() + self._settings.timeout_s
        client = client_of(request.client.host if request.client else None)
        self._admission.check(client, self._expected_bytes(request))
        self.batcher.check(client)
        body = bytearray()
        with self._admission.arriving(client) as arriving:
            with self._stage("read"):
                await self._arrived(request, body, arriving, deadline)
            with self._admission.working(arriving):
                return await self._answered(request, body, client, deadline)

    async def _answered(
        self, request: Request, body: bytearray, client: str, deadline: float
    ) -> Response:
        late = out_of_time("decoding its images")
        with self._stage("decode"):
            steps = self._pool.submit(client, self._submit(request, body, client, deadline))
            call, submitted = await _before(deadline, asyncio.wrap_future(steps), late)
        body.clear()
        with self._stage("predict"):
            values = await _before(
                deadline, asyncio.wrap_future(submitted), out_of_time("waiting for the model")
            )
        with self._stage("answer"):
            # base64 takes less time than another thread takes to begin
            if call.encoding == "base64":
                answer = self._answer(call, values)
            else:
                answer = await self._in_pool(client, self._answer, call, values)
        return Response(answer, media_type="application/json")

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
        self, request: Request, body: bytearray, client: str, deadline: float
    ) -> Generator[None, None, tuple[PredictCall, Future[Tensor]]]:
        """Decode a call, image by image, and hand it to the model, which may begin at once."""
        settings, served = self._settings, self._served
        call = parse_call(
            request.headers.get("content-type", ""),
            bytes(body),
            default_output=settings.default_output,
            max_images=settings.max_call_images,
        )
        try:
            served.check_output(call.output)
        except ValueError as error:
            raise ApiError(400, "no_such_output", str(error)) from None
        images = decode_call(
            call.images, settings.max_image_pixels, settings.max_call_pixels, deadline
        )
        levels = []
        for image in images:
            levels.append(served.preprocessing.geometry(image))
            yield
        return call, self.batcher.submit(levels, call.output, client)

    def _answer(self, call: PredictCall, values: Tensor) -> bytes:
        numbers = values.numpy()
        # no JSON number, and no answer: reported as the model's failure
        if not np.isfinite(numbers).all():
            raise ValueError(f"{self._served.name} computed {call.output} that are not finite")
        answer = {
            "model": self._served.name,
            "output": call.output,
            "dtype": "float32",
            "shape": numbers.shape,
            "encoding": call.encoding,
        }
        if call.encoding == "base64":
            encoded = b'"%s"' % base64.b64encode(numbers.astype("<f4", copy=False).tobytes())
        else:
            encoded = json.dumps(numbers.tolist()).encode()
        return b'%s, "values": %s}' % (json.dumps(answer).encode()[:-1], encoded)

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
