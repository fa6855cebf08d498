"""What a configuration may say, entry by entry: strict types, sane sizes, no name of code, file or
address. Whatever else stands there is refused before anything is built, or ignored with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._values import (
    LARGEST_SIDE,
    Value,
    choice,
    flag,
    number,
    optional,
    plain,
    several,
    table,
    text,
    whole,
)
from ..errors import UserError, brief, shown
from ..methods import METHODS, MODEL_ARGUMENTS
from ..models.values import VALUES
from ..prompts.networks import TIMM, check_kwargs

GIVEN = "module:"  # begins the class name of a module that only the user's code can build
# constructor arguments that may be such modules
MODULES = ("generator", "token_library", "head")

_DIGEST = Value(
    "64 hexadecimal digits",
    lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef"),
)
_NAME = Value(
    "a model's name, no path and no address",
    lambda v: (
        isinstance(v, str)
        and len(v) <= 200
        and not v.startswith((".", "/", "local-dir:"))
        and v.count("/") <= 1
        and ".." not in v
        and "\\" not in v
        and "://" not in v
        and v.isprintable()
        and " " not in v
    ),
)
_ANYTHING_PLAIN = Value(
    "finite numbers, words, lists and dictionaries of them", lambda v: _is_plain(v)
)
_SIDES = several(whole(1, LARGEST_SIDE), 2, 2)
PREPROCESSING: dict[str, Value] = {
    "input_size": several(whole(1, LARGEST_SIDE), 3, 3),
    "interpolation": choice(
        "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random"
    ),
    "mean": several(number(), 1, 64),
    "std": several(number(1e-9), 1, 64),
    "crop_pct": optional(number(1e-3, 100)),
    "crop_mode": choice("center", "squash", "border"),
}
# entries that are no values of a constructor
ABOUT: dict[str, Value] = {
    "pgn_fast_version": text(),
    "peft_type": text(1000),
    "method": text(),
    "base_model_name_or_path": optional(_NAME),
    "base_model_kwargs": optional(table(TIMM)),
    "base_model_weights": optional(text(1000)),
    "backbone_digest": optional(_DIGEST),
    "embed_dim": whole(1, 1_000_000),
    "depth": whole(0, 100_000),
    "patch_size": several(whole(1, LARGEST_SIDE), 2, 2),
    "in_chans": whole(1, 100_000),
    "img_size": optional(_SIDES),
    "global_pool": optional(text(100)),
    "num_prefix_tokens": whole(0, 100_000),
    "class_token": flag(),
    "dtype": text(100),
    "class_names": optional(several(text(10_000), 0, 1_000_000)),
    "preprocessing": optional(Value("a dictionary", lambda v: isinstance(v, dict))),
    "task": choice("multiclass", "multilabel"),
    "weights_digest": _DIGEST,
    "config_digest": _DIGEST,
}
# of a library that was trained in gamut (inversion.GamutLibrary.to_config)
_CELLS = several(whole(0, 1_000_000), 0, 1_000_000)
_LIBRARY: dict[str, dict[str, Value]] = {
    "layout": {
        "grid": _SIDES,
        "image": _SIDES,
        "image_cells": _CELLS,
        "prompt_cells": _CELLS,
        "compensate_positions": flag(),
    },
    "server": {
        "resize": optional(whole(1, LARGEST_SIDE)),
        "crop": optional(whole(1, LARGEST_SIDE)),
        "interpolation": text(20),
        "mean": several(number(), 3, 3),
        "std": several(number(1e-9), 3, 3),
        "codec": text(20),
        "quality": whole(1, 100),
        "subsampling": whole(0, 2),
        "dtype": text(20),
        "dynamic_size": flag(),
    },
}
_LIBRARY_ITSELF = {"n_tokens": whole(), "margin": number(0, 127.5, below_high=True), "key": text()}


def check_config(config: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a configuration with an entry that is not what it must be.

    Entries that nothing here knows are left to the caller.

    Raises:
        UserError: names the first such entry, what it takes and what stands there.
    """
    try:
        method = config.get("method")
        row = METHODS.get(method) if isinstance(method, str) else None
        if row is None:
            raise ValueError(f"method is {shown(method)}; known: {', '.join(METHODS)}")
        values = VALUES
        if row.registered:
            # the arguments of a method from elsewhere mean what its constructor says
            values = {name: VALUES[name] for name in MODEL_ARGUMENTS if name in VALUES}
        for name, value in config.items():
            if name in MODULES and isinstance(value, str) and value.startswith(GIVEN):
                continue
            (ABOUT.get(name) or values.get(name) or _ANYTHING_PLAIN).check(brief(name, 60), value)
        for name, value in (config.get("preprocessing") or {}).items():
            if name in PREPROCESSING:
                PREPROCESSING[name].check(f"preprocessing: {name}", value)
        if row.name == "pgn":
            _check_generator(config)
            if isinstance(config.get("token_library"), Mapping):
                _check_library(config["token_library"])
        for name, value in row.fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f"method is {row.name!r}, but {name} is {shown(config[name])}")
        _check_counts(config)
    except ValueError as error:
        raise UserError(f"{where}: {brief(error, 800)}.") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_generator(config: Mapping[str, Any]) -> None:
    """A network by name is built from its name and settings: no others may reach timm."""
    name = config.get("generator")
    if isinstance(name, str) and not name.startswith(GIVEN):
        check_kwargs(name, config.get("generator_kwargs") or {})


def _check_library(library: Mapping[str, Any]) -> None:
    wanted = {*_LIBRARY_ITSELF, *_LIBRARY}
    if set(library) != wanted:
        raise ValueError(
            f"token_library has the entries {shown(sorted(map(str, library)))}, not "
            f"{', '.join(sorted(wanted))}"
        )
    for name, value in _LIBRARY_ITSELF.items():
        value.check(f"token_library: {name}", library[name])
    for part, entries in _LIBRARY.items():
        found = library[part]
        if not isinstance(found, Mapping) or not set(found) <= set(entries):
            raise ValueError(
                f"token_library: {part} takes {', '.join(entries)}, got {shown(found)}"
            )
        for name, value in found.items():
            entries[name].check(f"token_library: {part}: {name}", value)


def _check_counts(config: Mapping[str, Any]) -> None:
    names, classes = config.get("class_names"), config.get("num_classes")
    if names is not None and classes and len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names, num_classes is {classes}")


def plain_preprocessing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing by timm's names in plain types, checked before it is saved.

    Raises:
        ValueError, TypeError: an entry that could not be loaded again.
    """

    found = {str(n): plain(f"preprocessing: {n}", v) for n, v in given.items()}
    for name, value in found.items():
        if name in PREPROCESSING:
            PREPROCESSING[name].check(f"preprocessing: {name}", value)
    return found


def split_unknown(
    config: Mapping[str, Any], parameters: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """The entries that mean something to this version, and the names of the others."""
    known = parameters | set(ABOUT)
    unknown = [name for name in config if name not in known]
    return {n: v for n, v in config.items() if n in known}, unknown
