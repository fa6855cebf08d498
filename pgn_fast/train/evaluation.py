"""What a model answers to the images of a split, over the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .distributed import Processes
from .scores import Score, multiclass_score, multilabel_score


class Autocast:
    """A fresh autocast context at each call; none at all where it is off."""

    def __init__(self, device: torch.device, enabled: bool = False, dtype: str = "bfloat16"):
        self.device, self.enabled, self.dtype = device, enabled, getattr(torch, dtype)

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)


def check_labels(labels: Tensor, num_classes: int, task: str = "multiclass") -> None:
    """Labels (B,) int64 are in 0 ... num_classes - 1; of multi-label images they are (B, C).

    Raises:
        UserError: one is not.
    """
    if len(labels) == 0:
        return
    vectors = labels.ndim == 2
    if vectors != (task == "multilabel"):
        raise UserError(
            "data: an image has a vector of labels: give `task` multilabel."
            if vectors
            else "data: `task` multilabel needs a vector of 0 and 1 for each image, one place a "
            "class: a label file (`labels`), or a data set that gives them."
        )
    if vectors:
        if labels.shape[1] != num_classes:
            raise UserError(f"data: {labels.shape[1]} labels an image, {num_classes} classes.")
        return
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"data: label {int(wrong[0])} is out of range for {num_classes} classes "
            f"(0 ... {num_classes - 1})."
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    num_classes: int,
    autocast: Autocast,
    processes: Processes,
    between: Callable[[], None] = lambda: None,
    *,
    task: str = "multiclass",
    details: bool = False,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Score:
    """The score over all images of a loader and of all processes.

    Args:
        between: is called between two batches; it may end the evaluation by an exception.
        task: "multiclass" or "multilabel".
        details: intervals, calibration and confusion too.
        prepare: a batch's images, on the device, to the model's input.
        forward: runs the model, as ``cuda_graphs.graphed_forward`` does; None: the model itself.

    Raises:
        UserError: no image could be read, or a label is out of range.
    """
    model.eval()
    unreadable: list[str] = []
    columns: dict[str, list[Tensor]] = {}
    for pixels, labels, indices, names in loader:
        between()
        unreadable += names
        if len(labels) == 0:
            continue
        check_labels(labels, num_classes, task)
        target = labels.to(autocast.device, non_blocking=True)
        images = prepare(pixels.to(autocast.device, non_blocking=True))
        if forward is None or not isinstance(images, Tensor):  # tokens from files have no graph
            with autocast():
                logits = model(images)
        else:
            logits = forward(images)
        # nothing is read here: that would wait for the device
        answers = _answers(logits.float(), target, num_classes)
        for name, column in {**answers, "index": indices}.items():
            columns.setdefault(name, []).append(column)
    own = {name: torch.cat(parts).cpu() for name, parts in columns.items()}
    parts = [part for part in processes.collect(own) if part]
    if not parts:
        raise UserError(f"data: no image could be read, such as {(unreadable or ['none'])[0]}.")
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # in the order of the images, however many processes there are
    order = rows.pop("index").argsort(stable=True)
    rows = {name: column[order] for name, column in rows.items()}
    unreadable = processes.gather(unreadable) if processes.world > 1 else unreadable
    if task == "multilabel":
        return multilabel_score(**rows, unreadable=unreadable, details=details)
    return multiclass_score(**rows, num_classes=num_classes, unreadable=unreadable, details=details)


def _answers(logits: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    """What a score needs to know of a batch of logits (B, C), on the device."""
    if labels.ndim == 2:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        return {"targets": labels.long(), "probabilities": logits.sigmoid(), "losses": losses}
    best = logits.softmax(dim=1).max(dim=1)
    nearest = logits.topk(min(5, num_classes), dim=1).indices
    return {
        "labels": labels,
        "answers": nearest[:, 0],
        "confidence": best.values,
        "near": (nearest == labels[:, None]).any(dim=1),
        "losses": F.cross_entropy(logits, labels, reduction="none"),
    }
