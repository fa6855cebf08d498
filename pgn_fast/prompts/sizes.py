"""One check for every argument that counts something."""

from __future__ import annotations

import operator
from typing import Any


def require_sizes(**sizes: Any) -> None:
    """Refuse a number of prompts, channels and the like that is no whole number from 1 on.

    Raises:
        ValueError: names the first such argument, and what it was.
    """
    for name, size in sizes.items():
        try:
            whole = operator.index(size)
        except TypeError:
            whole = 0
        if whole < 1 or isinstance(size, bool):
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
