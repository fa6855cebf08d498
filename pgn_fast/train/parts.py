"""What a run works with: images, a model, and how pixels become its input."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters import from_pretrained
from ..errors import UserError
from .class_texts import class_texts
from .config import TrainConfig
from .data import load_splits
from .loader import preprocessing
from .methods import build_model, deployment_library, load_backbone_for
from .split import Splits


@dataclass
class Parts:
    """The parts of a run.

    Attributes:
        splits: images to train on, to choose by, and to test with.
        model: on the CPU, in training mode.
        pixels: the preprocessing of images, by timm's names.
        fresh: whether the head is new, so that ``TrainConfig.head_init`` is its start.
        objective: in the place of the ``Objective`` that the configuration describes.
        rates: number of the update, from 0 -> learning rate, in the place of the schedule.
        keep: where ``cache`` "auto" keeps its files, for several runs; None: in the run's folder.
    """

    splits: Splits
    model: Any
    pixels: dict[str, Any]
    fresh: bool = True
    objective: Any = None
    rates: Callable[[int], float] | None = None
    keep: Path | None = None


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def assemble(config: TrainConfig, splits: Splits | None = None, backbone: Any = None) -> Parts:
    """The parts that a configuration names; the data first, they are sooner found to be wrong.

    Args:
        splits, backbone: where other runs have them already.

    Raises:
        UserError: data, backbone or method cannot be had or do not fit each other.
    """
    seed_everything(config.seed)
    splits, texts = splits or load_splits(config), None
    if config.head == "zero_shot":
        texts, splits = class_texts(config, splits)
    backbone = backbone if backbone is not None else load_backbone_for(config)
    # what is trained begins alike, whatever making the backbone drew
    seed_everything(config.seed)
    pixels = preprocessing(backbone, config)
    if config.init_from is not None:
        model = from_pretrained(config.init_from, backbone, trainable=True)
        _check_start(config, model, splits)
        return Parts(splits, model, pixels, fresh=False)
    library = deployment_library(config, backbone, pixels)
    head = None if texts is None else texts.head(config, backbone)
    model = build_model(config, backbone, splits.num_classes, token_library=library, head=head)
    return Parts(splits, model, pixels)


def _check_start(config: TrainConfig, model: Any, splits: Splits) -> None:
    """The adapter that training starts from has the data's classes, and is of the run's method."""
    from ..methods import method_of

    if method_of(model) != config.method:
        raise UserError(
            f"`init_from`: {config.init_from} is a {method_of(model)} adapter, `method` is "
            f"{config.method}."
        )
    if model.num_classes != splits.num_classes:
        raise UserError(
            f"`init_from`: the head of {config.init_from} has {model.num_classes} classes, "
            f"{splits.train.origin} has {splits.num_classes}."
        )
    known, found = model.class_names, splits.class_names
    if known and found and list(known) != list(found):
        raise UserError(
            f"`init_from`: the classes of {config.init_from} are {', '.join(known[:3])}, ..., "
            f"those of {splits.train.origin} are {', '.join(found[:3])}, ...: other labels."
        )
