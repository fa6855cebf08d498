"""Connections: how many, which one makes way for a new one, and how long each may be silent."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from ..errors import brief
from .admission import client_of
from .errors import ApiError, closing, error_response, overloaded
from .settings import ServerSettings

_logger = logging.getLogger(__name__)
# descriptors that a server needs beside its connections: files, and what one turn accepts at once
ACCEPTED_AT_ONCE = 64
_OTHER_DESCRIPTORS = 32
# seconds after which a connection that says nothing is the first to make way
_SILENT_S = 0.5
_LOOK_S = 1.0
_FULL_ERROR = overloaded("all connections of this server are in use; try again.").body()
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL_ERROR), _FULL_ERROR)
)


class Connection(H11Protocol):
    """uvicorn's connection, which also tells a guard what it is doing.

    ``phase`` is "waiting" (for headers), "reading" (a body) or "working" (an answer is made).
    """

    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self._application: Any = self.app
        self.app = self._call
        self.phase = "waiting"
        # when the phase began, when bytes came last, when writing began to stand still
        self.since = self.active = self.loop.time()
        self.stuck: float | None = None
        self.address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = client_of(self.client[0] if self.client else None)
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.active = self.loop.time()
        super().data_received(data)

    def pause_writing(self) -> None:
        self.stuck = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stuck = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of all refusals, and end the connection.

        It has come instead of a call, or in the midst of one's body: that call gets this answer,
        where its own has not been begun, and whoever works on it is told that the client is gone.
        """
        error = sys.exc_info()[1]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = getattr(error, "error_status_hint", 400)
            why = "its headers are too long" if status == 431 else brief(error, 200)
            body = ApiError(status, "bad_http", f"this is no HTTP/1.1 call: {why}.").body()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            for event in (
                h11.Response(
                    status_code=status, headers=[*headers.items()], reason=STATUS_PHRASES[status]
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """To no other protocol: a call that offers one is answered as if it did not."""
        return False

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        self._enter("reading")

        async def noticed() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._enter("working")
            return message

        try:
            await self._application(scope, noticed, send)
        except asyncio.CancelledError:
            await self._cut_off(scope, noticed, send)
        finally:
            self._enter("waiting")

    async def _cut_off(self, scope: Any, receive: Any, send: Any) -> None:
        """Tell a call that is cancelled, as the server's end alone does, where it can be told."""
        if self.cycle.response_started or self.flow.write_paused:
            self.cycle.disconnected = True
            self.transport.abort()
        else:
            await error_response(closing(), scope["path"])(scope, receive, send)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.since = self.loop.time()


class Guard:
    """All connections of a server, held below a limit.

    Args:
        settings: ``max_connections``, ``header_timeout_s`` and ``timeout_s``.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._limit = connection_limit(settings.max_connections)
        self._connections: set[Connection] = set()
        self._of_client: Counter[str] = Counter()

    def add(self, connection: Connection) -> None:
        """Take a new connection; close the one that has the least claim where all are in use."""
        if len(self._connections) >= self._limit:
            victim = self._least_claim(connection.loop.time())
            _logger.warning(
                "%d connections are open, the most of this server (--max-connections, ulimit -n): "
                "the most silent are closed",
                self._limit,
            )
            if victim is None:
                connection.transport.write(_FULL)
                connection.transport.close()
                return
            # its descriptor is free at the loop's next turn
            self.remove(victim)
            victim.transport.abort()
        self._connections.add(connection)
        self._of_client[connection.address] += 1

    def remove(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._of_client[connection.address] -= 1
            if not self._of_client[connection.address]:
                del self._of_client[connection.address]

    async def watch(self) -> None:
        """Close, for ever, what never ends its headers or never takes its answer."""
        settings = self._settings
        while True:
            await asyncio.sleep(_LOOK_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self._connections):
                late = (
                    connection.phase == "waiting"
                    and now - connection.since > settings.header_timeout_s
                )
                stuck = connection.stuck is not None and now - connection.stuck > settings.timeout_s
                if late or stuck:
                    connection.transport.abort()

    def _least_claim(self, now: float) -> Connection | None:
        """Silent connections first, of the client that has most; then those without a call."""

        def claim(connection: Connection) -> tuple[bool, int, float]:
            last = max(connection.active, connection.since)
            return (
                now - last < _SILENT_S,
                -self._of_client[connection.address],
                last,
            )

        silent = [
            connection
            for connection in self._connections
            if connection.phase == "waiting"
            or (connection.phase == "reading" and now - connection.active >= _SILENT_S)
        ]
        return min(silent, key=claim, default=None)


def connection_limit(wanted: int) -> int:
    """``wanted``, or as many as the process may open where that is less.

    Raises:
        ValueError: the process may open too few descriptors to serve at all.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return wanted
    here = allowed - _open_descriptors() - ACCEPTED_AT_ONCE - _OTHER_DESCRIPTORS
    if here < 8:
        raise ValueError(
            f"this process may open {allowed} files, which leaves none for connections; raise "
            "the limit (ulimit -n 1024)."
        )
    if here < wanted:
        _logger.warning(
            "max_connections=%d is lowered to %d: this process may open %d files (ulimit -n)",
            wanted,
            here,
            allowed,
        )
    return min(wanted, here)


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """One line where descriptors run out, which asyncio tells by a traceback for each attempt."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    ):
        _logger.error("new connections wait, the system has no descriptor or memory: %s", error)
    else:
        loop.default_exception_handler(context)
