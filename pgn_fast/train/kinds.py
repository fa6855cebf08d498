"""What kind of value a choice takes; they come by flags, YAML files, and people's own scripts."""

from __future__ import annotations

import difflib
import functools
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, shown

_WORDS = {float: "a number", int: "a whole number", bool: "True or False", str: "a text"}


@functools.cache
def _kinds(of: type) -> dict[str, Any]:
    return typing.get_type_hints(of)


def typed(of: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields in the types that it declares.

    Lists become tuples, paths become texts, and a text that is a number becomes one: YAML reads
    ``1e-3`` as a text.

    Raises:
        UserError: a name that it does not have, or a value of another kind.
    """
    known, found = _kinds(of), dict[str, Any]()
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else "."
            raise UserError(f"there is no option {name}{meant}")
        try:
            found[name] = _as(known[name], value)
        except (TypeError, ValueError) as error:
            raise UserError(f"`{name}` is {shown(value)}; give {_words(known[name])}.") from error
    return found


def _as(kind: Any, value: Any) -> Any:
    """Raises TypeError, ValueError: it is none of this kind."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (one for one in typing.get_args(kind) if one is not type(None))
        return None if value is None else _as(inner, value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        inner, second = typing.get_args(kind)
        if second is not ... and len(value) != 2:
            raise ValueError
        return tuple(_as(inner, one) for one in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    if kind is str:
        return value if isinstance(value, str) else os.fspath(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool):
        raise TypeError
    if kind is float:
        return value if isinstance(value, numbers.Real) else float(value)
    return value if isinstance(value, numbers.Integral) else _whole(value)


def _whole(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _words(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return f"{_words(next(one for one in arguments if one is not type(None)))}, or None"
    if typing.get_origin(kind) is tuple:
        count = "several" if arguments[1] is ... else "two"
        return f"{count} values, each {_WORDS[arguments[0]]}"
    return "names and their values" if typing.get_origin(kind) is dict else _WORDS[kind]
