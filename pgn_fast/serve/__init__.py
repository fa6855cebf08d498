"""Trained tasks, or a frozen timm model as it is, behind an image API.

``create_app(load_served_tasks("runs/pets"))`` is the ASGI application, ``run_server`` what
``pgn-fast serve`` runs; these two need the optional extra ``serve``. What answers, without HTTP,
are ``load_served_tasks`` and ``load_served_model``. Names are loaded, and the extra is looked for,
when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_EXPORTS = {
    "ApiError": "errors",
    "Preprocessing": "preprocess",
    "ServedModel": "model",
    "ServedTasks": "tasks",
    "ServerSettings": "settings",
    "create_app": "app",
    "load_served_model": "load",
    "load_served_tasks": "load",
    "run_server": "server",
}
# names that answer without HTTP
_WITHOUT_EXTRA = {
    "ApiError",
    "Preprocessing",
    "ServedModel",
    "ServedTasks",
    "ServerSettings",
    "load_served_model",
    "load_served_tasks",
}
# module -> its package on PyPI
_EXTRA = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "h11": "h11",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}

__all__ = [
    "ApiError",
    "Preprocessing",
    "ServedModel",
    "ServedTasks",
    "ServerSettings",
    "create_app",
    "load_served_model",
    "load_served_tasks",
    "run_server",
]

if TYPE_CHECKING:
    from .app import create_app as create_app
    from .errors import ApiError as ApiError
    from .load import load_served_model as load_served_model
    from .load import load_served_tasks as load_served_tasks
    from .model import ServedModel as ServedModel
    from .preprocess import Preprocessing as Preprocessing
    from .server import run_server as run_server
    from .settings import ServerSettings as ServerSettings
    from .tasks import ServedTasks as ServedTasks


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed = {} if name in _WITHOUT_EXTRA else _EXTRA
    missing = [package for module, package in needed.items() if not _is_there(module)]
    if missing:
        raise ImportError(
            f"the server needs {', '.join(missing)}, which the extra 'serve' brings: "
            "pip install 'pgn_fast[serve]'."
        )
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
