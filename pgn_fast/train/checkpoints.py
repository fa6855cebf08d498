"""Checkpoints of a run: everything that decides the rest of it, in one file, replaced at once.

A run writes its adapters and reports first and this file last. Killed in between, it does the last
stretch again from the older checkpoint and comes to the same bits (on CPU), so no moment is unsafe.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import write_files
from .._stored import MEGABYTE, read_archive, seal_archive
from ..errors import UserError

FILE = "checkpoint.pt"
_FORMAT = 3
# beside tensors: an epoch's scores, and the names of images that could not be read
_LARGEST_PICKLE = 32 * MEGABYTE


def save(output: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint by ``state``: tensors, numbers, strings, lists and dicts.

    Raises:
        OSError: it could not be written; the older checkpoint is whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    write_files({output / FILE: seal_archive(buffer.getvalue())})


def load(output: Path) -> dict[str, Any] | None:
    """The run's checkpoint, tensors on the CPU; None where there is none yet.

    Raises:
        UserError: the file is no checkpoint of this library, or damaged.
    """
    path = output / FILE
    if not path.exists():
        return None
    try:
        state = read_archive(path, largest_pickle=_LARGEST_PICKLE, sealed=True)
    except UserError as error:
        raise UserError(f"`resume`: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(
            f"`resume`: {path} is not a checkpoint that this version of pgn_fast can continue."
        )
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """Where Python's, NumPy's and torch's generators stand."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            numpy_state["state"]["key"].tolist(),
            numpy_state["state"]["pos"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put all generators back to where ``random_state`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, pos, has_gauss, np_gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), pos, has_gauss, np_gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
