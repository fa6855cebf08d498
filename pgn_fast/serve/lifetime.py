"""A server from its first connection to its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from ..errors import UserError
from .connections import ACCEPTED_AT_ONCE, Connection, Guard, on_loop_error
from .settings import ServerSettings

_logger = logging.getLogger(__name__)
# connections that the system keeps until they are accepted
_BACKLOG = 1024
_ADMIN_CONNECTIONS = 16


class Server(uvicorn.Server):
    """uvicorn's server with guarded connections and an end in two steps.

    SIGTERM begins the drain: ``/readyz`` turns false, so that a balancer sends new calls elsewhere,
    and every answer closes its connection, but all that comes is still answered. After ``drain_s``
    the listening ends, and what was let in is answered. SIGINT, or a second SIGTERM, ends the
    listening at once; one more cuts off what is in progress.

    Args:
        app: of ``create_app``.
        settings: limits and times.
        admin: an application for this machine alone, and its port; None: none.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: ServerSettings,
        admin: tuple[FastAPI, int] | None = None,
    ) -> None:
        self._guard = Guard(settings)
        super().__init__(
            uvicorn.Config(
                app,
                # h11 bounds the headers of a call, the faster httptools does not
                http=functools.partial(Connection, guard=self._guard),  # type: ignore[arg-type]
                ws="none",
                access_log=False,
                server_header=False,
                log_config=None,
                # also how many connections asyncio accepts before it looks at any of them
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=int(settings.timeout_s) + 1,
            )
        )
        self._service = app.state.service
        self._settings = settings
        self._stop_at: float | None = None
        self._admin = admin
        self._admin_server: asyncio.Server | None = None

    def listen(self, host: str, port: int) -> bool:
        """Serve until a signal, or until ``drain`` is called.

        Returns:
            Whether calls that were let in were cut off.

        Raises:
            UserError: the address cannot be listened on.
        """
        sockets = _bind(host, port)
        self.run(sockets)
        return self.force_exit

    def drain(self) -> None:
        """Begin the end: not ready from now on, and after ``drain_s`` seconds not listening."""
        if self._stop_at is None:
            _logger.info("draining: answering for %g more seconds", self._settings.drain_s)
            self._service.draining = True
            self._stop_at = time.monotonic() + self._settings.drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(on_loop_error)
        self._watch = loop.create_task(self._guard.watch())
        # before the other port: who reaches that one reaches this one
        if self._admin is not None:
            await self._listen_for_admin(*self._admin)
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)
        if sockets:
            _logger.info("listening on %s", ", ".join(map(_address, sockets)))

    async def _listen_for_admin(self, app: FastAPI, port: int) -> None:
        guard = Guard(dataclasses.replace(self._settings, max_connections=_ADMIN_CONNECTIONS))
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False)
        config.load()
        state = self._admin_state = ServerState()

        def connection() -> Connection:
            return Connection(config, state, {}, guard=guard)

        (listening,) = _bind("127.0.0.1", port)
        loop = asyncio.get_running_loop()
        self._admin_server = await loop.create_server(connection, sock=listening)
        self._admin_watch = loop.create_task(guard.watch())
        _logger.info("admin listens on %s", _address(listening))

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        if self._admin_server is not None:
            self._admin_server.close()
        await super().shutdown(sockets)
        if self._admin_server is not None:
            await self._answer_admin()
            self._admin_watch.cancel()
        if self.force_exit:
            # the base class stops the application only where nothing is cut off
            self._service.cut_off = True
            await self.lifespan.shutdown()
            if cut_off := len(self.server_state.tasks):
                _logger.warning("%d calls were cut off", cut_off)
        self._watch.cancel()
        _logger.info("stopped")

    async def _answer_admin(self) -> None:
        """Wait for what is being loaded, as long as for any call."""
        until = time.monotonic() + self._settings.timeout_s
        while self._admin_state.tasks and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.1)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGINT and SIGTERM, and do not raise them again when all is answered."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGTERM and self._stop_at is None:
            self.drain()
        else:
            self.should_exit = True


def _bind(host: str, port: int) -> list[socket.socket]:
    """A listening socket on every address of ``host``."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"port {port} is none: give one of 1 to 65535, or 0 for a free one.")
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            where: Any = (address[0], port, *address[2:])
            sockets.append(socket.create_server(where, family=family, backlog=_BACKLOG))
            # with port 0 the first address's port is that of all
            port = sockets[0].getsockname()[1]
    except OSError as error:
        for each in sockets:
            each.close()
        # asyncio's and Python's own messages repeat the address
        number = None if isinstance(error, socket.gaierror) else error.errno
        reason = os.strerror(number) if number else error.strerror or error
        raise UserError(f"cannot listen on {_url(host, port)}: {reason}.") from error
    return sockets


def _address(listening: socket.socket) -> str:
    return _url(*listening.getsockname()[:2])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
