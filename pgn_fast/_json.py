"""JSON objects from strangers, in which a name that stands twice could mean either value."""

from __future__ import annotations

from typing import Any

from .errors import shown


class NamedTwice(ValueError):
    """An object names something twice; ``name`` says what."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{shown(name)} stands there twice")
        self.name = name


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(..., object_pairs_hook=named_once)``.

    Raises:
        NamedTwice: a name stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise NamedTwice(next(name for name in found if names.count(name) > 1))
    return found
