"""Which cases a run measures, from the environment.

PGN_FAST_BENCH   "chosen" (default): a few minutes on two cores; "tables": those of the README;
                 "all": every case
PGN_FAST_BENCH_DTYPE   of ops and models, "float32,bfloat16" for both; default float32, on a GPU
                 bfloat16
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

LEVELS = ("chosen", "tables", "all")
LEVEL = os.environ.get("PGN_FAST_BENCH", "chosen")
if LEVEL not in LEVELS:
    raise pytest.UsageError(f"PGN_FAST_BENCH is one of {', '.join(LEVELS)}, got {LEVEL!r}")
ALL = LEVEL == "all"

# seconds after which the default run begins no further case
BUDGET = 210.0

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_default = "bfloat16" if torch.cuda.is_available() else "float32"
_wanted = os.environ.get("PGN_FAST_BENCH_DTYPE", _default).split(",")
if unknown := sorted(set(_wanted) - set(_DTYPES)):
    raise pytest.UsageError(
        f"PGN_FAST_BENCH_DTYPE names {', '.join(_DTYPES)}, divided by commas, got {unknown[0]!r}"
    )
DTYPES = [_DTYPES[name] for name in _wanted]


def measured(*chosen: Any, tables: tuple[Any, ...] = (), all: tuple[Any, ...] = ()) -> list[Any]:
    """The cases of this level: each level has those of the levels before it."""
    return [*chosen, *(tables if LEVEL != "chosen" else ()), *(all if ALL else ())]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
