"""Adding and removing tasks while others are answered: a second port, on this machine alone."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..adapters.places import fetch_adapter, find_adapter
from ..errors import UserError, brief
from .access import AllowedHosts, Tokens
from .app import http_error
from .body import read_json
from .errors import ApiError, error_response
from .front import Front
from .tasks import ServedTasks

_logger = logging.getLogger(__name__)
_MAX_BODY = 64 * 1024
# seconds for a body to arrive
_BODY_S = 10.0
_T = TypeVar("_T")


def create_admin(tasks: ServedTasks, tokens: Tokens | None = None) -> FastAPI:
    """``POST /v1/tasks``, ``DELETE /v1/tasks/NAME`` and ``GET /v1/tasks``.

    Args:
        tasks: of the server.
        tokens: bearer tokens, of which a call must carry one; None: none is asked for.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(
        Front, hosts=AllowedHosts.of_server("127.0.0.1"), tokens=tokens, draining=lambda: False
    )
    # one load at a time: each takes all cores for a moment
    loading = asyncio.Lock()

    @app.get("/v1/tasks")
    async def listed() -> Response:
        return _json({"tasks": list(tasks.tasks())})

    @app.post("/v1/tasks")
    async def add(request: Request) -> Response:
        try:
            name, source, replace = await _in_time(_wanted(request))
            async with loading:
                if name in tasks.tasks() and not replace:
                    raise ApiError(
                        409,
                        "task_exists",
                        f'there is a task {name[:128]!r}; "replace": true puts this one in its '
                        "place.",
                    )
                await _in_thread(_add, tasks, name, source)
        except ApiError as error:
            return error_response(error)
        return _json({"name": name, **tasks.tasks().get(name, {})}, 201)

    @app.delete("/v1/tasks/{name}")
    async def remove(name: str) -> Response:
        try:
            tasks.remove(name)
        except KeyError:
            error = ApiError(404, "no_such_task", f"there is no task {name[:128]!r}.")
            return error_response(error)
        return _json({"removed": name})

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return error_response(http_error(request, error))

    return app


async def _in_time(reading: Awaitable[_T]) -> _T:
    try:
        return await asyncio.wait_for(reading, _BODY_S)
    except ClientDisconnect:
        raise ApiError(400, "disconnected", "the client left before it had sent.") from None
    except asyncio.TimeoutError:  # another class than the builtin before Python 3.11
        text = f"the body did not arrive within {_BODY_S:g} seconds."
        raise ApiError(408, "body_too_slow", text) from None


async def _in_thread(function: Callable[..., object], *args: object) -> None:
    """In a thread that, unlike asyncio's own, the end of the process does not wait for."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            function(*args)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="pgn-fast-admin", daemon=True).start()
    await asyncio.wrap_future(done)


async def _wanted(request: Request) -> tuple[str, str, bool]:
    # a form is what a stranger's page could send without asking
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "unsupported_media_type", "send application/json.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise ApiError(413, "too_many_bytes", f"the body is longer than {_MAX_BODY} bytes.")
    call = read_json(bytes(body))
    try:
        name, source, replace = call["name"], call["source"], call.get("replace", False)
    except (AttributeError, TypeError, KeyError):
        name = source = replace = None
    if not (isinstance(name, str) and isinstance(source, str) and isinstance(replace, bool)):
        raise ApiError(
            400,
            "bad_request",
            'the body must be like {"name": "pets", "source": "/adapters/pets"}, a folder of this '
            "machine, or OWNER/NAME on the hub.",
        )
    return name, source, replace


def _add(tasks: ServedTasks, name: str, source: str) -> None:
    try:
        adapter = find_adapter(fetch_adapter(source))
        if adapter is None:
            raise UserError(f"{source[:200]!r} holds no adapter and no training run.")
        tasks.add(name, adapter)
    except (UserError, OSError, ValueError) as error:
        raise ApiError(400, "bad_adapter", f"{brief(error, 600).rstrip('.')}.") from None
    except Exception as error:
        _logger.exception("task %r from %s", name[:128], source[:200])
        text = f"{source[:200]!r} fails with {type(error).__name__}; the server's log says why."
        raise ApiError(400, "bad_adapter", text) from None


def _json(value: dict[str, object], status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
