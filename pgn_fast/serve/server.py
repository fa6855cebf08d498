"""From a model's name to a listening process."""

from __future__ import annotations

import ctypes
import logging
import logging.config
import sys
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from ..adapters import read_adapter
from ..backbone.load import load_backbone
from ..errors import UserError
from .access import AllowedHosts, Tokens
from .admin import create_admin
from .answerer import Answerer
from .app import create_app
from .lifetime import Server
from .logs import log_config
from .model import ServedModel
from .preprocess import Preprocessing
from .settings import ServerSettings, usable_cores
from .task_folder import TaskFolder
from .tasks import ServedTasks, find_adapter, task_name

_logger = logging.getLogger(__name__)


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


def load_served_tasks(
    place: str | PathLike[str],
    *,
    model: str | nn.Module | None = None,
    device: torch.device | str = "cpu",
    watch_s: float = 2.0,
    max_bytes: int | None = None,
    **model_kwargs: Any,
) -> ServedTasks:
    """What was trained, on its frozen backbone.

    Args:
        place: an adapter, a training run (its best adapter), or a folder with one of them in each
            sub-folder, which names the task. Such a folder is watched while the server runs.
        model: the backbone; None: the one that the first adapter names.
        device: where it runs.
        watch_s: seconds between two looks at a folder of tasks; 0: none.
        max_bytes: of the tasks in memory; beyond it those used least recently go to disk. None: all
            stay.
        **model_kwargs: for ``timm.create_model``.

    Raises:
        UserError: nothing there can be served; the reason of each adapter is named. Where some can,
            the others are named in the log.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    alone = find_adapter(folder)
    adapters = [alone] if alone else [a for p in sorted(folder.iterdir()) if (a := find_adapter(p))]
    if model is None and not adapters:
        raise UserError(
            f"{folder} holds no adapter, no training run and no folder of them; to start with no "
            "task, name the backbone by model."
        )
    strict = model is None
    if model is None:
        model, model_kwargs = _backbone_of(adapters, model_kwargs)
    backbone = load_backbone(model, **model_kwargs).to(device)
    name = model if isinstance(model, str) else "backbone"
    tasks = ServedTasks(backbone, name, strict=strict, max_bytes=max_bytes)
    if alone:
        tasks.add(task_name(folder), alone)
        return tasks
    watched = TaskFolder(tasks, folder, watch_s)
    failures = watched.load()
    for reason in failures:
        _logger.error("a task was not loaded: %s", reason)
    if adapters and not tasks.tasks():
        raise UserError(f"no task in {folder} can be served: {' '.join(failures)}")
    tasks.beside = watched
    return tasks


def _backbone_of(adapters: Sequence[Path], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The backbone that the first readable adapter names, and how to create it."""
    reasons = []
    for adapter in adapters:
        try:
            config, _ = read_adapter(adapter)
        except UserError as error:
            reasons.append(str(error))
            continue
        name = config.get("base_model_name_or_path")
        if isinstance(name, str):
            # a fine-tuned model brings all its weights
            fine_tuned = len(adapters) == 1 and config.get("method") == "full"
            return name, ({"pretrained": False} if fine_tuned else {}) | kwargs
        reasons.append(f"{adapter} does not name its backbone; give it by model.")
    raise UserError(" ".join(reasons))


def run_server(
    served: Answerer,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    access_log: bool = False,
    log_format: str = "text",
    allowed_hosts: Sequence[str] = (),
    token_file: str | None = None,
    admin_port: int | None = None,
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
        admin_port: where tasks are added and removed, on 127.0.0.1 alone; None: nowhere.

    Returns:
        Whether calls that were let in were cut off, by a third signal.

    Raises:
        UserError: the token file holds no token, or the address cannot be listened on.
    """
    torch.set_num_threads(max(1, usable_cores() // settings.model_workers))
    warnings.filterwarnings("ignore", module="PIL")
    logging.config.dictConfig(log_config(log_format, access_log))
    tokens = None if token_file is None else Tokens(token_file)
    app = create_app(
        served,
        settings,
        on_idle=_give_memory_back,
        hosts=AllowedHosts.of_server(host, allowed_hosts),
        tokens=tokens,
    )
    admin = None
    if admin_port is not None:
        if not isinstance(served, ServedTasks):
            raise UserError("admin_port adds and removes tasks; a single model has none.")
        admin = create_admin(served, tokens), admin_port
    return Server(app, settings, admin).listen(host, port)


def _give_memory_back() -> None:
    """Return the C library's free memory: glibc keeps most of what its threads once needed."""
    if sys.platform == "linux":
        # another C library may not have it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
