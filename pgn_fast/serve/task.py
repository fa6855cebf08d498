"""One served task: its name, what is known of it, and how its adapter becomes a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import backbone_pixels, from_pretrained
from ..adapters.files import OpenAdapter
from ..adapters.load import load_on
from ..errors import UserError
from ..methods import METHODS
from .preprocess import Preprocessing

MAX_NAME = 128
_MAX_SIDE = 2048


@dataclass(eq=False)
class Task:
    """One task as it was added; another one of the same name, later, is another ``Task``.

    Attributes:
        name: how calls ask for it.
        id: how the bank knows it, never used twice.
        about: what ``GET /v1/tasks/NAME`` says.
        calls: that are on their way.
        removed: no new call gets it; it leaves the bank when ``calls`` is 0.
    """

    name: str
    id: str
    preprocessing: Preprocessing
    class_names: Sequence[str] | None
    num_classes: int
    about: dict[str, Any]
    calls: int = 0
    removed: bool = False


def check_name(name: str) -> None:
    """Refuse what a call could not ask for, or a line of a log could not show (UserError)."""
    if (
        not name
        or len(name) > MAX_NAME
        or not name.isprintable()
        or set(name) & set("/\\")
        or not name.strip(".")
    ):
        raise UserError(
            f"{name[:MAX_NAME]!r} is no name for a task: up to {MAX_NAME} printable characters "
            "without slashes, not of dots alone."
        )


def load_task(folder: Path, backbone: Any, strict: bool) -> tuple[Any, Preprocessing]:
    """The model of an adapter, and how it wants its images.

    Args:
        backbone: shared by all tasks; a fine-tuned model brings its own.
        strict: refuse an adapter of other weights or settings of the backbone.

    Raises:
        UserError: no adapter, a damaged one, one that cannot be served, or of another backbone.
    """
    with OpenAdapter(folder) as adapter:
        config = adapter.config
    if config.get("task") == "multilabel":
        raise UserError(
            f"{folder} gives several labels an image, and answers here are one class of all: "
            "pgn-fast predict ADAPTER takes it."
        )
    # fine-tuning changed the backbone, so that its model brings another one
    own = METHODS[config["method"]].trains_backbone
    model = from_pretrained(folder) if own else load_on(backbone, folder, strict_backbone=strict)
    try:
        preprocessing = Preprocessing(dict(model.preprocessing or backbone_pixels(backbone)))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: its preprocessing is none ({error}).") from error
    if max(preprocessing.height, preprocessing.width) > _MAX_SIDE:
        raise UserError(
            f"{folder}: images of {preprocessing.height} × {preprocessing.width} pixels are above "
            f"the {_MAX_SIDE} that are served."
        )
    return model, preprocessing
