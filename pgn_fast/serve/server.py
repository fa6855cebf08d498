"""From a model's name to a listening process."""

from __future__ import annotations

import ctypes
import logging.config
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from ..backbone.load import load_backbone
from .access import AllowedHosts, Tokens
from .app import create_app
from .lifetime import Server
from .logs import log_config
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
    log_format: str = "text",
    allowed_hosts: Sequence[str] = (),
    token_file: str | None = None,
) -> bool:
    """Serve until SIGINT or SIGTERM; calls that were let in are answered before it returns.

    The process belongs to the server: the threads that torch uses are divided among the model
    workers, Pillow's warnings about odd images, which would gather in memory, are off, and memory
    that a load has left behind is given back to the system when the load is over.

    Args:
        host, port: where it listens; port 0: a free one.
        access_log: a line for each call.
        log_format: "text" or "json" lines, on stderr.
        allowed_hosts: names that a call's ``Host`` may carry beside the server's own.
        token_file: of bearer tokens, one a line; None: anyone may call.

    Returns:
        Whether calls that were let in were cut off, by a third signal.

    Raises:
        UserError: the token file holds no token, or the address cannot be listened on.
    """
    torch.set_num_threads(max(1, usable_cores() // settings.model_workers))
    warnings.filterwarnings("ignore", module="PIL")
    logging.config.dictConfig(log_config(log_format, access_log))
    app = create_app(
        served,
        settings,
        on_idle=_give_memory_back,
        hosts=AllowedHosts.of_server(host, allowed_hosts),
        tokens=None if token_file is None else Tokens(token_file),
    )
    return Server(app, settings).listen(host, port)


def _give_memory_back() -> None:
    """Return the C library's free memory: glibc keeps most of what its threads once needed."""
    if sys.platform == "linux":
        # another C library may not have it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
