"""Arguments that say how prompts reach an image API: the canvas, and what its server does."""

from __future__ import annotations

import argparse
from typing import Any

from ._options import KeyValues

LAYOUTS = ("border", "enlarged")


def add_canvas_arguments(parser: argparse._ActionsContainer, default: str) -> None:
    """``--layout`` with what belongs to it, and ``--server``; not given, each is None.

    Args:
        default: in the help of ``--layout``.
    """
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="border: the image shrunk into the middle of a canvas of the usual size, prompts "
        "around it; every image API takes that. enlarged: the image whole and the prompts after "
        "it, on a larger canvas; for APIs and timm models that take images of any size "
        f"(default: {default})",
    )
    parser.add_argument(
        "--image-grid",
        type=grid,
        metavar="RxC",
        help="border: patches that the shrunk image keeps, such as 5x5 (default: the most that "
        "leave a cell for every prompt)",
    )
    parser.add_argument(
        "--canvas-grid",
        type=grid,
        metavar="RxC",
        help="enlarged: patches of the canvas, such as 5x13 (default: the most nearly square "
        "without blank cells)",
    )
    parser.add_argument(
        "--allow-blank",
        action="store_true",
        default=None,
        help="enlarged: accept a canvas with blank cells; the server makes tokens of them too",
    )
    parser.add_argument(
        "--no-compensate",
        dest="compensate",
        action="store_false",
        default=None,
        help="enlarged: send the image as it is. Its patches then have the positions of other "
        "cells than in pretraining; compensated (the default), their pixels are changed so that "
        "each token has the position of its place in the image",
    )
    parser.add_argument(
        "--server",
        nargs="+",
        action=KeyValues,
        metavar="NAME=VALUE",
        help="what the API does, where it differs from the backbone's own preprocessing: resize, "
        "crop, interpolation, codec=jpeg, quality, subsampling (0: 4:4:4, 1: 4:2:2, 2: 4:2:0), "
        "dtype=bfloat16",
    )


def grid(text: str) -> tuple[int, int]:
    """The ``type`` of an argument such as 5x13: rows and columns."""
    rows, _, columns = text.lower().partition("x")
    try:
        values = (int(rows), int(columns))
    except ValueError:
        values = (0, 0)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; give rows and columns, such as 5x13")
    return values


def canvas_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of ``add_canvas_arguments`` but for the server."""
    names = ("layout", "image_grid", "canvas_grid", "allow_blank", "compensate")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
