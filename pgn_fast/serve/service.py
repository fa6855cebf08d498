"""What one call goes through, and the limits that it meets on the way."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from .batching import Batcher
from .body import PredictCall, parse_call
from .decode import decode_call
from .errors import ApiError, out_of_time, overloaded
from .metrics import Metrics
from .model import ServedModel
from .settings import ServerSettings

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)
# seconds between looks at whether the server is idle
_IDLE_LOOK_S = 1.0


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
        self._calls = 0
        self._pending_bytes = 0
        self.metrics = Metrics(lambda: self.batcher.depth, lambda: self._calls)

    def start(self) -> None:
        """Start the threads; called where the event loop runs."""
        settings = self._settings
        self._pool = ThreadPoolExecutor(settings.decode_threads, "pgn-fast-decode")
        self.batcher = Batcher(
            self._served.run,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            capacity=settings.queue_images,
            workers=settings.model_workers,
            observe_batch=self.metrics.observe_batch,
        )
        self._watch = asyncio.create_task(self._watch_for_idleness())

    def stop(self) -> None:
        self._watch.cancel()
        self.batcher.close()
        self._pool.shutdown()

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
        expected = self._expected_bytes(request)
        with self._admission(expected):
            with self._stage("read"):
                body = await self._read(request, deadline)
            with self._stage("decode"):
                call, submitted = await self._in_pool(self._submit, request, body, deadline)
            del body
            with self._stage("predict"):
                values = await _before(
                    deadline, asyncio.wrap_future(submitted), out_of_time("waiting for the model")
                )
            with self._stage("answer"):
                # base64 takes less time than another thread takes to begin
                if call.encoding == "base64":
                    answer = self._answer(call, values)
                else:
                    answer = await self._in_pool(self._answer, call, values)
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
    def _admission(self, expected: int) -> Iterator[None]:
        """Count the call while it is in progress; 503 where there is no room for it."""
        settings = self._settings
        if self._calls >= settings.max_calls or self.batcher.depth >= settings.queue_images:
            raise overloaded(
                f"{self._calls} calls are in progress and {self.batcher.depth} images wait, the "
                "most that this server lets in; try again."
            )
        if self._pending_bytes + expected > settings.max_pending_bytes:
            raise overloaded(
                f"bodies of {self._pending_bytes} bytes are in progress and "
                f"{settings.max_pending_bytes} is the most here; try again."
            )
        self._calls += 1
        self._pending_bytes += expected
        try:
            yield
        finally:
            self._calls -= 1
            self._pending_bytes -= expected

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.metrics.observe_stage(name, time.perf_counter() - began)

    async def _read(self, request: Request, deadline: float) -> bytes:
        too_slow = ApiError(
            408,
            "body_too_slow",
            f"the body did not arrive within {self._settings.timeout_s:g} seconds.",
        )
        return await _before(deadline, self._read_limited(request), too_slow)

    async def _read_limited(self, request: Request) -> bytes:
        limit = self._settings.max_call_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _too_large("longer", limit)
        return bytes(body)

    def _submit(
        self, request: Request, body: bytes, deadline: float
    ) -> tuple[PredictCall, Future[Tensor]]:
        """Decode a call and hand it to the model, which may begin before the event loop knows."""
        settings, served = self._settings, self._served
        call = parse_call(
            request.headers.get("content-type", ""),
            body,
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
        levels = [served.preprocessing.geometry(image) for image in images]
        return call, self.batcher.submit(levels, call.output)

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

    async def _watch_for_idleness(self) -> None:
        seen = 0
        while True:
            await asyncio.sleep(_IDLE_LOOK_S)
            if self._calls == 0 and self._seen > seen:
                seen = self._seen
                await self._in_pool(self._on_idle)

    async def _in_pool(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


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


def error_response(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers(), media_type="application/json")
