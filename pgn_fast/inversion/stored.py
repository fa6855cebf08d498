"""An inverted library on disk: tensors and the JSON of its settings, in safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .jpeg import JpegRounding
from .rounding import FeedbackRounding

FORMAT = 1


def save_stored(
    path: Path, tensors: dict[str, Tensor], rounding: FeedbackRounding, settings: dict[str, Any]
) -> None:
    """Write the tensors, the rounding and the settings (JSON values) into one file, atomically.

    Of the feedback only the part below the diagonal is stored, row by row.
    """
    n = rounding.order.numel()
    rows, columns = torch.tril_indices(n, n, -1)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored["feedback"] = rounding.feedback[rows, columns].cpu()
    stored["order"] = rounding.order.cpu()
    metadata = {"settings": json.dumps(settings), "rounding": json.dumps(rounding.settings())}
    temporary = path.with_name(path.name + ".tmp")
    # safetensors' own save_file makes a file that only its owner may read
    temporary.write_bytes(save(stored, {"format": str(FORMAT), **metadata}))
    temporary.replace(path)


def load_stored(path: Path) -> tuple[dict[str, Tensor], FeedbackRounding, dict[str, Any]]:
    """Read what ``save_stored`` wrote: tensors, rounding, settings.

    Raises:
        ValueError: the file is no inverted library, or of a newer format.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("format") != str(FORMAT) or "settings" not in metadata:
        raise ValueError(
            f"{path}: not an inverted library of format {FORMAT} (found "
            f"{metadata.get('format')!r}); write it with InvertedLibrary.save"
        )
    order, packed = tensors.pop("order"), tensors.pop("feedback")
    n = order.numel()
    feedback = torch.zeros(n, n)
    rows, columns = torch.tril_indices(n, n, -1)
    feedback[rows, columns] = packed
    numbers = json.loads(metadata["rounding"])
    kind = JpegRounding if "quality" in numbers else FeedbackRounding
    rounding = kind(feedback, order, **numbers)
    return tensors, rounding, json.loads(metadata["settings"])
