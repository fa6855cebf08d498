"""What the arguments of the models take, by their names: in Python code, and in an adapter's file.

The names mean the same in every method. An argument that is not listed, as of a registered method,
takes any plain value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from .._values import (
    LARGEST_SIDE,
    Value,
    choice,
    either,
    flag,
    number,
    optional,
    plain,
    several,
    table,
    text,
    whole,
)
from ..backbone.options import WORDS, FastOptions, Memory
from ..ops.dispatch import BACKENDS
from ..ops.mix_prompts import ACTIVATIONS
from .heads import HEADS

_FAST = either(
    flag(),
    choice(*get_args(Memory)),
    table(
        {
            name: choice(*get_args(WORDS[name])) if name in WORDS else flag()
            for name in FastOptions.__dataclass_fields__
        }
    ),
)

VALUES: dict[str, Value] = {
    "num_classes": optional(whole(0)),
    "num_prompts": whole(1, 1_000_000),
    "library_size": whole(),
    "generator": text(100),
    "generator_kwargs": optional(Value("a dictionary", lambda v: isinstance(v, Mapping))),
    "resolution": optional(whole(1, LARGEST_SIDE)),
    "activation": choice(*ACTIVATIONS),
    "token_library": optional(Value("a dictionary", lambda v: isinstance(v, Mapping))),
    "deep": flag(),
    "layers": optional(several(whole(0, 1000), 0, 1000)),
    "shared": flag(),
    "expand": flag(),
    "project_dim": optional(whole()),
    "dropout": number(0, 1, below_high=True),
    "location": text(100),
    "pool": text(100),
    "head": choice(*HEADS),
    "logit_scale": number(),
    "backend": optional(choice(*BACKENDS)),
    "fast": _FAST,
}
# not said by a configuration: the class embeddings are in the head, whose start is past
_NOT_SAVED = ("self", "__class__", "backbone", "class_embeddings", "head_init")
# checked, with names of their own in the message, where networks are built
_CHECKED_ELSEWHERE = ("generator", "generator_kwargs")


def constructor_values(
    values: Mapping[str, Any], known: Mapping[str, Value] = VALUES
) -> dict[str, Any]:
    """A constructor's own arguments out of its ``locals()``, as plain values that can be saved.

    Modules and ``FastOptions`` stay what they are.

    Args:
        known: what the arguments take; others take any plain value.

    Raises:
        ValueError, TypeError: an argument that no configuration can hold, or of another type or
            size than it takes. Better now than when a trained model is saved.
    """
    found = {}
    for name, value in values.items():
        if name in _NOT_SAVED:
            continue
        if not isinstance(value, nn.Module | FastOptions) and name not in _CHECKED_ELSEWHERE:
            value = plain(name, value)
            if name in known:
                known[name].check(name, value)
        found[name] = value
    return found
