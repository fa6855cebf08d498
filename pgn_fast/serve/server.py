"""From a model's name to a listening process."""

from __future__ import annotations

import ctypes
import sys
import warnings
from typing import Any

import torch
import uvicorn
from timm.data import resolve_data_config
from torch import nn

from ..backbone.load import load_backbone
from .app import create_app
from .model import ServedModel
from .preprocess import Preprocessing
from .settings import ServerSettings, usable_cores


def load_served_model(
    model: str | nn.Module,
    *,
    name: str | None = None,
    data_args: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    **model_kwargs: Any,
) -> ServedModel:
    """A frozen model with its own preprocessing.

    Args:
        model: a timm name, "pgn_demo_vit", or a timm model.
        name: how the API calls it; None: the name, or the model's architecture.
        data_args: what to change in its preprocessing, in the words of timm's
            ``resolve_data_config``: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``,
            ``mean``, ``std``.
        device: where it runs.
        **model_kwargs: for ``timm.create_model``, such as ``pretrained`` or ``dynamic_img_size``.
    """
    backbone = load_backbone(model, **model_kwargs).to(device)
    config = resolve_data_config(data_args, model=backbone)
    if name is None:
        name = model if isinstance(model, str) else backbone.pretrained_cfg["architecture"]
    return ServedModel(name, backbone, Preprocessing(config))


def run_server(
    served: ServedModel,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    access_log: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM; calls that were let in are answered before it returns.

    The process belongs to the server: the threads that torch uses are divided among the model
    workers, Pillow's warnings about odd images, which would gather in memory, are off, and memory
    that a load has left behind is given back to the system when the load is over.
    """
    torch.set_num_threads(max(1, usable_cores() // settings.model_workers))
    warnings.filterwarnings("ignore", module="PIL")
    config = uvicorn.Config(
        create_app(served, settings, on_idle=_give_memory_back),
        host=host,
        port=port,
        access_log=access_log,
        timeout_graceful_shutdown=int(settings.timeout_s) + 1,
    )
    uvicorn.Server(config).run()


def _give_memory_back() -> None:
    """Return the C library's free memory: glibc keeps most of what its threads once needed."""
    if sys.platform == "linux":
        # another C library may not have it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
