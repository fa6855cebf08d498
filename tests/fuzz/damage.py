"""Ways to damage a file, a JSON value or a folder's entry, drawn from a ``random.Random``."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

# values that nobody expects where another one belongs
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 10**9, 10**30, 1.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "x", "false", "\x1b[31m", "é", "\ud800", "x" * 100_000, "../../x"),
    *("/etc/passwd", "http://127.0.0.1:9/x", "hf-hub:x/y", "local-dir:/", "module:os.system"),
    *([], [1], [None], [[]], {}, {"": 1}, {"a": {"b": [1, 2]}}, [0] * 10_000),
)


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """Damage bytes: bits flipped, a part cut out, doubled, zeroed or replaced, or the end gone."""
    raw = bytearray(data)
    kind = rng.choice(("flip", "flip", "flip", "cut", "double", "zero", "random", "end", "more"))
    at = rng.randrange(len(raw) + 1)
    stop = min(len(raw), at + rng.choice((1, 8, 100, 5000)))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 1, 4, 50))):
            if raw:
                # the beginning, with headers and lengths, more often than the rest
                where = rng.randrange(min(len(raw), rng.choice((16, 1000, len(raw)))))
                raw[where] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:stop]
    elif kind == "double":
        raw[at:at] = raw[at:stop]
    elif kind == "zero":
        raw[at:stop] = bytes(stop - at)
    elif kind == "random":
        raw[at:stop] = rng.randbytes(stop - at)
    elif kind == "end":
        del raw[at:]
    else:
        raw += rng.randbytes(rng.choice((1, 8, 4096)))
    return bytes(raw)


def json_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one place of it changed, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                walk(inside[key])

    if isinstance(value, dict | list):
        walk(value)
    if not places:
        return rng.choice(ODD_VALUES)
    inside, key = rng.choice(places)
    kind = rng.choice(("odd", "odd", "odd", "remove", "rename", "scale", "wrap"))
    if kind == "odd":
        inside[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif kind == "remove":
        del inside[key]
    elif kind == "rename" and isinstance(inside, dict):
        inside[rng.choice((f"{key}x", str(key)[1:], "backbone", "x" * 1000))] = inside.pop(key)
    elif kind == "scale" and isinstance(inside[key], int | float):
        inside[key] *= rng.choice((-1, 0.5, 2, 1000, 10**7))
    else:
        inside[key] = [inside[key]]
    return value


def entry(path: Path, rng: random.Random) -> None:
    """Put something into a file's place that is none, or a file that nobody can read."""
    path.unlink()
    kind = rng.choice(("gone", "pipe", "folder", "loop", "dangling", "zero", "sparse", "empty"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(rng.choice((10**6, 2**31, 2**40)))
    elif kind == "empty":
        path.touch()
