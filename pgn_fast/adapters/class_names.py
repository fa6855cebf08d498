"""Class names in label order, from the forms in which people have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._values import plain
from ..errors import shown


def in_label_order(names: Any, num_classes: int) -> list[str] | None:
    """Class names in label order, from what people have: a list, an id-to-label dictionary as
    transformers' models carry it, or a label-to-id one as torchvision's folders do.

    Args:
        names: or None: not known.
        num_classes: how many there must be; 0: any number.

    Raises:
        ValueError: no names, or not one for each class.
    """
    if names is None:
        return None
    if isinstance(names, Mapping):
        names = _in_order(names)
    elif isinstance(names, str | bytes | set | frozenset | Tensor):
        raise ValueError(
            f"class_names is a {type(names).__name__}; pass class_names=[...] with one name a "
            "class, in label order"
        )
    found = []
    for i, name in _each(names):
        name = plain(f"class_names[{i}]", name)
        if type(name) is int:
            name = str(name)
        if not isinstance(name, str):
            raise ValueError(f"class_names[{i}] is {shown(name)}, no string")
        found.append(name)
    if num_classes and len(found) != num_classes:
        raise ValueError(
            f"class_names has {len(found)} names, the head gives {num_classes} classes; pass "
            "class_names=[...] with one name a class, or set model.class_names = None."
        )
    return found


def _each(names: Any) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(names))
    except TypeError as error:
        raise ValueError(
            f"class_names is a {type(names).__name__}; pass a list of strings"
        ) from error


def _in_order(names: Mapping[Any, Any]) -> list[Any]:
    """The names of {id: name} or {name: id}, by their ids."""
    if all(isinstance(name, str) for name in names.values()):
        pairs = list(names.items())
    else:
        pairs = [(label, name) for name, label in names.items()]
    try:
        # JSON turns the ids of a dictionary into strings
        by_id = {int(plain("class_names", label)): name for label, name in pairs}
    except (TypeError, ValueError) as error:
        raise ValueError(
            "class_names as a dictionary takes {id: name} or {name: id}, ids whole numbers"
        ) from error
    if sorted(by_id) != list(range(len(names))):
        raise ValueError(
            f"class_names as a dictionary must have each id from 0 to {len(names) - 1} once"
        )
    return [by_id[label] for label in range(len(names))]
