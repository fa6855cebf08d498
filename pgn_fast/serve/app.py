"""The routes: ``/v1/predict``, ``/v1/model``, ``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .access import AllowedHosts, Tokens
from .body import ENCODINGS
from .errors import ApiError, error_response
from .front import Front
from .model import ServedModel
from .service import Service
from .settings import OUTPUTS, ServerSettings


def create_app(
    served: ServedModel,
    settings: ServerSettings | None = None,
    *,
    on_idle: Callable[[], None] = lambda: None,
    hosts: AllowedHosts | None = None,
    tokens: Tokens | None = None,
) -> FastAPI:
    """The API as an ASGI application; its threads start and stop with the application's lifespan.

    Args:
        served: model and preprocessing.
        settings: limits and batching; None: the defaults.
        on_idle: called in a thread when no call is in progress, once after every load.
        hosts: the names that a call's ``Host`` may carry; None: all.
        tokens: bearer tokens, of which a call must carry one; None: none is asked for.

    Returns:
        The application; its ``state.service`` tells and sets whether it is ready.

    Raises:
        ValueError: the settings' default output is one that the model does not have.
    """
    settings = settings or ServerSettings()
    served.check_output(settings.default_output)
    service = Service(served, settings, on_idle)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="pgn-fast serve",
        summary=f"{served.name}, frozen",
        lifespan=lifespan,
        # these pages run scripts from another server; /openapi.json stays
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_middleware(
        Front,
        hosts=hosts or AllowedHosts(),
        tokens=tokens,
        draining=lambda: service.draining,
    )

    @app.post("/v1/predict", openapi_extra=_PREDICT_BODY)
    async def predict(request: Request) -> Response:
        return await service.predict(request)

    def get(path: str) -> Callable[[Callable[[], Response]], None]:
        """A route for GET and HEAD, answered on the event loop."""

        def add(answer: Callable[[], Response]) -> None:
            async def route() -> Response:
                return answer()

            app.get(path)(route)
            app.head(path, include_in_schema=False)(route)

        return add

    @get("/v1/model")
    def model() -> Response:
        return _json(
            served.describe()
            | {
                "default_output": settings.default_output,
                "formats": ["png", "jpeg", "webp"],
                "limits": settings.limits(),
            }
        )

    @get("/healthz")
    def healthz() -> Response:
        alive = service.batcher.alive
        return _json({"status": "ok" if alive else "failing"}, 200 if alive else 503)

    @get("/readyz")
    def readyz() -> Response:
        status = service.readiness()
        return _json({"status": status}, 200 if status == "ready" else 503)

    @get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(_http_error(request, error))

    return app


def _http_error(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path[:200]
    if error.status_code == 404:
        slash = " Leave out the last slash." if path != "/" and path.endswith("/") else ""
        return ApiError(404, "http_error", f"there is no {path}.{slash}")
    return ApiError(error.status_code, "http_error", f"{error.detail}.", headers=error.headers)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _call_schema(image_format: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["images"],
        "properties": {
            "images": {"type": "array", "items": {"type": "string", "format": image_format}},
            "output": {"enum": list(OUTPUTS)},
            "encoding": {"enum": list(ENCODINGS)},
        },
    }


# the body is read by hand, with limits, so FastAPI cannot find its schema by itself
_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _call_schema("binary")},
            "application/json": {"schema": _call_schema("byte")},
        },
    }
}
