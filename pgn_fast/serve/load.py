"""What can be served, from a name or a folder; nothing in here needs the extra ``serve``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from ..adapters.files import OpenAdapter
from ..adapters.places import adapters_of, fetch_adapter, find_adapter, task_name
from ..backbone.load import load_backbone, load_recorded
from ..errors import UserError
from ..methods import METHODS
from .model import ServedModel
from .preprocess import Preprocessing
from .task_folder import TaskFolder
from .tasks import ServedTasks

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
    name: str | None = None,
    device: torch.device | str = "cpu",
    watch_s: float = 2.0,
    max_bytes: int | None = None,
    strict_backbone: bool = True,
    **model_kwargs: Any,
) -> ServedTasks:
    """What was trained, on its frozen backbone.

    Args:
        place: an adapter, a training run (its best adapter), an adapter's repository on the hub
            ("OWNER/NAME" or "OWNER/NAME@REVISION"), or a folder with one of the first two in each
            sub-folder, which names the task. Such a folder is watched while the server runs.
        model: the backbone; None: the one that the first adapter names.
        name: how the API calls the backbone; None: its name.
        device: where it runs.
        watch_s: seconds between two looks at a folder of tasks; 0: none.
        max_bytes: of the tasks in memory; beyond it those used least recently go to disk. None: all
            stay.
        strict_backbone: refuse tasks that were trained on other weights or settings of the
            backbone; False: they are served, with a warning that names both.
        **model_kwargs: for ``timm.create_model``, over those that the adapter recorded.

    Raises:
        UserError: nothing there can be served; the reason of each adapter is named. Where some can,
            the others are named in the log.
    """
    if not 0 <= watch_s < float("inf"):
        raise UserError(f"watch_s={watch_s}: give the seconds between two looks, or 0 for none.")
    folder = fetch_adapter(place)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    named = adapters_in(place)
    adapters = list(named.values())
    if model is None and not adapters:
        raise UserError(
            f"{folder} holds no adapter, no training run and no folder of them; to start with no "
            "task, name the backbone by `model`."
        )
    if model is None:
        backbone, known = recorded_backbone(adapters, **model_kwargs)
    else:
        backbone = load_backbone(model, **model_kwargs)
        known = model if isinstance(model, str) else "backbone"
    tasks = ServedTasks(
        backbone.to(device), name or known, strict=strict_backbone, max_bytes=max_bytes
    )
    if find_adapter(folder):
        for task, adapter in named.items():
            tasks.add(task, adapter)
        return tasks
    watched = TaskFolder(tasks, folder, watch_s)
    failures = watched.load()
    for reason in failures:
        _logger.error("a task was not loaded: %s", reason)
    if adapters and not tasks.tasks():
        raise UserError(f"no task in {folder} can be served: {' '.join(failures)}")
    tasks.failed = failures
    tasks.beside = watched
    return tasks


def adapters_in(place: str | PathLike[str]) -> dict[str, Path]:
    """Name of a task → its adapter: of an adapter or run alone, or of a folder of them."""
    folder = fetch_adapter(place)
    alone = find_adapter(folder)
    return {task_name(place): alone} if alone else adapters_of(folder)


def first_shared(adapters: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The adapter that says which backbone all share, and its configuration: the first one that can
    be read and does not bring a backbone of its own, else the first that can be read.

    Raises:
        UserError: none can be read; the reasons are named.
    """
    reasons, own = [], None
    for adapter in adapters:
        try:
            with OpenAdapter(adapter) as opened:
                config = opened.config
        except (UserError, OSError) as error:
            reasons.append(str(error))
            continue
        if not METHODS[config["method"]].trains_backbone:
            return adapter, config
        own = own or (adapter, config)
    if own is None:
        raise UserError(" ".join(reasons))
    return own


def recorded_backbone(adapters: Sequence[Path], **kwargs: Any) -> tuple[Any, str]:
    """The backbone that the adapters name, as they record it, and its name.

    Args:
        **kwargs: for ``timm.create_model``, over those that were recorded.

    Raises:
        UserError: no adapter can be read, or the first does not say where its backbone is.
    """
    adapter, config = first_shared(adapters)
    name = config.get("base_model_name_or_path")
    if name is None:
        raise UserError(f"{adapter} does not name its backbone; give it by `model`.")
    weights = config.get("base_model_weights")
    if weights and "pretrained_cfg_overlay" not in kwargs:
        raise UserError(
            f"{adapter} was trained on a {name} with weights of its owner ({weights}), which it "
            "does not hold; give that backbone by `model` (on the command line also its file, by "
            "--pretrained-path)."
        )
    # a fine-tuned model brings all its weights
    pretrained = not METHODS[config["method"]].trains_backbone
    recorded = {"pretrained": pretrained, **(config.get("base_model_kwargs") or {}), **kwargs}
    return load_recorded(name, **recorded), name
