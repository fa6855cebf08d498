"""One exception for every answer that is not 200; its JSON body is the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.responses import Response


class ApiError(Exception):
    """A call that is refused: an HTTP status, a word for programs and a sentence for people.

    Args:
        status: HTTP status, 4xx where the call must change, 503 where it may be sent again.
        code: a stable word such as ``"too_many_pixels"``.
        message: what was expected, what arrived, what would work.
        retry_after: seconds after which it is worth trying again; sets ``Retry-After``.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self._headers = dict(headers or {})

    def body(self) -> bytes:
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()

    def headers(self) -> dict[str, str]:
        if self.retry_after is not None:
            return {**self._headers, "Retry-After": str(self.retry_after)}
        return self._headers


def overloaded(message: str) -> ApiError:
    return ApiError(503, "overloaded", message, retry_after=1)


def closing() -> ApiError:
    return ApiError(503, "closing", "this server is shutting down.", retry_after=5)


def out_of_time(doing: str) -> ApiError:
    return ApiError(503, "timeout", f"the time for this call ran out while {doing}.", retry_after=1)


def error_response(error: ApiError, path: str = "") -> Response:
    """The answer to a refused call; below ``/v2/`` in the Open Inference Protocol's form."""
    from starlette.responses import Response

    body = error.body()
    if path.startswith("/v2/"):
        body = json.dumps({"error": f"{error.code}: {error.message}"}).encode()
    return Response(body, error.status, error.headers(), media_type="application/json")
