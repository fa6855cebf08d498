"""Pictures by matplotlib, which the extra ``plot`` installs; everything else works without it."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any


def missing() -> str | None:
    """How to get pictures where matplotlib is not installed, or None where it is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "pictures need matplotlib: pip install 'pgn_fast[plot]'"
    return None


def draw_png(width: float, height: float, draw: Callable[[Any], None], *, dpi: int = 120) -> bytes:
    """A PNG of ``width`` × ``height`` inches.

    Args:
        draw: is given the empty ``matplotlib.figure.Figure``.
        dpi: pixels an inch.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; see ``missing``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks 风景, and draws boxes; the names stand in the files beside it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        draw(figure)
        figure.savefig(image, format="png", dpi=dpi)
    return image.getvalue()
