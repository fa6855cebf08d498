"""The routes: ``/v1/predict``, ``/v1/model``, ``/v1/tasks``, probes, metrics and ``/v2``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from . import v2
from .access import AllowedHosts, Tokens
from .answerer import Answerer
from .body import ENCODINGS
from .errors import ApiError, error_response
from .forms import PredictForm
from .front import Front
from .service import Service
from .settings import OUTPUTS, ServerSettings


def create_app(
    served: Answerer,
    settings: ServerSettings | None = None,
    *,
    on_idle: Callable[[], None] = lambda: None,
    hosts: AllowedHosts | None = None,
    tokens: Tokens | None = None,
) -> FastAPI:
    """The API as an ASGI application; its threads start and stop with the application's lifespan.

    Args:
        served: a model, or tasks.
        settings: limits and batching; None: the defaults, and its first output.
        on_idle: called in a thread when no call is in progress, once after every load.
        hosts: the names that a call's ``Host`` may carry; None: all.
        tokens: bearer tokens, of which a call must carry one; None: none is asked for.

    Returns:
        The application; its ``state.service`` tells and sets whether it is ready.

    Raises:
        ValueError: the settings' default output is one that the model does not have.
    """
    settings = settings or ServerSettings(default_output=served.outputs[0])
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
        return await service.predict(request, PredictForm())

    def get(path: str) -> Callable[[Callable[[], Response]], None]:
        """A route that is answered on the event loop."""

        def add(answer: Callable[[], Response]) -> None:
            async def route() -> Response:
                return answer()

            app.get(path)(route)

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

    @get("/v1/tasks")
    def tasks() -> Response:
        short = ("method", "num_classes")
        found = served.tasks().items()
        return _json({"tasks": [{"name": name, **{k: t[k] for k in short}} for name, t in found]})

    @app.get("/v1/tasks/{name}")
    async def task(name: str) -> Response:
        found = served.tasks().get(name)
        if found is None:
            error = ApiError(404, "no_such_task", f"there is no task {name[:128]!r}.")
            return error_response(error)
        return _json({"name": name, **found})

    v2.add_routes(app, service, served)

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
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return error_response(http_error(request, error), request.url.path)

    return app


def http_error(request: Request, error: HTTPException) -> ApiError:
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
            "task": {"type": "string"},
            "topk": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 5},
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
