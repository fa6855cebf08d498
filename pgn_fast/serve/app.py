"""The routes: ``POST /v1/predict``, ``GET /v1/model``, ``/healthz`` and ``/metrics``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .body import ENCODINGS
from .errors import ApiError
from .model import ServedModel
from .service import Service, error_response
from .settings import OUTPUTS, ServerSettings


def create_app(
    served: ServedModel,
    settings: ServerSettings | None = None,
    *,
    on_idle: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The API as an ASGI application; its threads start and stop with the application's lifespan.

    Args:
        served: model and preprocessing.
        settings: limits and batching; None: the defaults.
        on_idle: called in a thread when no call is in progress, once after every load.

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

    app = FastAPI(title="pgn-fast serve", summary=f"{served.name}, frozen", lifespan=lifespan)

    @app.post("/v1/predict", openapi_extra=_PREDICT_BODY)
    async def predict(request: Request) -> Response:
        return await service.predict(request)

    @app.get("/v1/model")
    async def model() -> Response:
        return _json(
            served.describe()
            | {
                "default_output": settings.default_output,
                "formats": ["png", "jpeg", "webp"],
                "limits": settings.limits(),
            }
        )

    @app.get("/healthz")
    async def healthz() -> Response:
        alive = service.batcher.alive
        return _json({"status": "ok" if alive else "failing"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, "http_error", f"{error.detail}."))

    return app


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
