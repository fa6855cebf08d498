"""What every call meets first: its id, the checks of who calls, and its line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers

from .access import AllowedHosts, Tokens
from .errors import ApiError, error_response

access_logger = logging.getLogger("pgn_fast.access")
# probes carry neither a name nor a token, and learn one bit
PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,64}")
# a target that names the server too, as calls through a proxy do (RFC 9112, 3.2.2)
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(/.*)?", re.IGNORECASE)
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Front:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        hosts: names by which the server may be called.
        tokens: bearer tokens; None: anyone may call.
        draining: whether the server is about to stop, so that connections should end.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: AllowedHosts,
        tokens: Tokens | None,
        draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._tokens = tokens
        self._draining = draining

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        call, host = _as_routed(scope, headers)
        status = 0

        async def tagged(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode())]
                if self._draining():
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            self._check(call["path"], host, headers)
        except ApiError as error:
            await error_response(error, call["path"])(call, receive, tagged)
        else:
            await self._app(call, receive, tagged)
        finally:
            self._log(scope, headers, request_id, status, time.perf_counter() - began)

    def _check(self, path: str, host: str, headers: Headers) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy before this server may have believed the other one
            raise ApiError(
                400,
                "bad_request",
                "the call states its length by Transfer-Encoding and by Content-Length; send one.",
                headers={"Connection": "close"},
            )
        if path in PROBES:
            return
        self._hosts.check(host, headers.get("origin"))
        if self._tokens is not None:
            self._tokens.check(headers.get("authorization"))

    def _log(
        self, scope: Any, headers: Headers, request_id: str, status: int, seconds: float
    ) -> None:
        if not access_logger.isEnabledFor(logging.INFO):
            return
        client = scope.get("client") or ("",)
        facts = {
            "request_id": request_id,
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 6),
        }
        if trace := _TRACE.fullmatch(headers.get("traceparent", "")):
            facts["trace_id"] = trace[1]
        facts |= scope["state"].get("facts", {})
        access_logger.info("call", extra={"facts": facts})


def _as_routed(scope: Any, headers: Headers) -> tuple[Any, str]:
    """The call as the routes know it, and the name by which it addresses the server.

    HEAD is GET to them: the server that listens leaves the body out.
    """
    call, host = scope, headers.get("host", "")
    if scope["method"] == "HEAD":
        call = {**call, "method": "GET"}
    if match := _ABSOLUTE.fullmatch(scope.get("raw_path") or b""):
        path = match[2] or b"/"
        call = {**call, "raw_path": path, "path": unquote(path.decode("ascii"))}
        host = match[1].decode("ascii")
    return call, host
