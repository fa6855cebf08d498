"""Values that may stand in a configuration: plain, finite, within bounds, never the name of code.

A ``Value`` says what one entry takes. Constructors hold it against what Python code gives them,
after ``plain`` has turned NumPy's and torch's numbers into Python's; adapters hold it against what
a file says, as it stands there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from .errors import shown

# bounds that no model reaches, which keep a typing error or a hostile file from asking for years
LARGEST_COUNT = 10_000_000
LARGEST_SIDE = 16_384  # pixels


@dataclass(frozen=True)
class Value:
    """What an entry takes: ``words`` for messages, and the test."""

    words: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError where ``value`` is none that this entry takes."""
        if not self.accepts(value):
            raise ValueError(f"{name} takes {self.words}, got {shown(value)}")


def whole(low: int = 1, high: int = LARGEST_COUNT) -> Value:
    """A whole number in [low, high]; True and False are none."""
    return Value(
        f"a whole number from {low} to {high}",
        lambda v: type(v) is int and low <= v <= high,
    )


def number(low: float = -1e9, high: float = 1e9, *, below_high: bool = False) -> Value:
    """A finite number in [low, high], or in [low, high) with ``below_high``."""

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return low <= value < high if below_high else low <= value <= high

    return Value(f"a number in [{low:g}, {high:g}{')' if below_high else ']'}", accepts)


def flag() -> Value:
    """True or False."""
    return Value("True or False", lambda v: type(v) is bool)


def choice(*words: str) -> Value:
    """One of some words."""
    return Value(
        "one of " + ", ".join(map(repr, words)), lambda v: isinstance(v, str) and v in words
    )


def text(longest: int = 200) -> Value:
    """A string of at most ``longest`` characters."""
    return Value(
        f"a string of at most {longest} characters",
        lambda v: isinstance(v, str) and len(v) <= longest,
    )


def several(item: Value, low: int = 0, high: int = 1000) -> Value:
    """A list of ``low`` to ``high`` items that ``item`` accepts."""
    count = str(low) if low == high else f"{low} to {high}"
    return Value(
        f"a list of {count} items, each {item.words}",
        lambda v: (
            isinstance(v, list | tuple) and low <= len(v) <= high and all(map(item.accepts, v))
        ),
    )


def table(entries: Mapping[str, Value]) -> Value:
    """A dictionary that has entries of these names at most."""
    return Value(
        "a dictionary of " + ", ".join(f"{n} ({v.words})" for n, v in entries.items()),
        lambda v: (
            isinstance(v, Mapping)
            and all(n in entries and entries[n].accepts(x) for n, x in v.items())
        ),
    )


def either(*values: Value) -> Value:
    """What any one of ``values`` accepts."""
    return Value(" or ".join(v.words for v in values), lambda x: any(v.accepts(x) for v in values))


def optional(value: Value) -> Value:
    """None, or what ``value`` accepts."""
    return Value(f"{value.words} or None", lambda v: v is None or value.accepts(v))


def plain(name: str, value: Any) -> Any:
    """``value`` in the types that JSON has: Python's numbers for NumPy's and for tensors of one
    number, lists for tuples, ranges, sets and arrays.

    Raises:
        TypeError: something else, which no configuration can hold; ``name`` says where.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {plain_key(name, k): plain(f"{name}[{shown(k)}]", v) for k, v in value.items()}
    if isinstance(value, AbstractSet):
        value = sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(f"{name}[{i}]", v) for i, v in enumerate(value)]
    # NumPy's scalars and arrays, torch's tensors; a parameter's value is its number of now
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        if hasattr(value, "detach"):
            value = value.detach()
        return plain(name, value.tolist())
    raise TypeError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which no configuration "
        "can hold: give plain numbers, words, lists or dictionaries of them"
    )


def plain_key(name: str, key: Any) -> str:
    """A dictionary's key, which JSON wants to be a string."""
    if not isinstance(key, str):
        raise TypeError(f"{name} has the key {shown(key)}; keys must be strings")
    return str(key)
