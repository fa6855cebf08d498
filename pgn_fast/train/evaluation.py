"""Scores of a model on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UserError
from .distributed import Processes


@dataclass(frozen=True)
class Score:
    """What a model reaches on a split: percent of the images that could be read."""

    top1: float
    top5: float | None  # None with five classes or fewer
    loss: float  # mean cross entropy, nats
    images: int
    unreadable: list[str]
    mean_class: float  # mean over the classes that have images: VTAB's and FGVC's figure
    per_class: list[float | None]  # top-1 of each class; None without images of it

    def value(self, metric: str) -> float:
        """What an epoch is chosen by, larger is better, by ``TrainConfig.eval_metric``."""
        if metric == "loss":
            return -self.loss
        if metric == "mean_class":
            return self.mean_class
        # with five classes or fewer, every answer is among the first five
        return self.top1 if metric == "top1" or self.top5 is None else self.top5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Autocast:
    """A fresh autocast context at each call; none at all where it is off."""

    def __init__(self, device: torch.device, enabled: bool = False, dtype: str = "bfloat16"):
        self.device, self.enabled, self.dtype = device, enabled, getattr(torch, dtype)

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Labels (B,) int64 are in 0 ... num_classes - 1.

    Raises:
        UserError: one is not.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"data: label {int(wrong[0])} is out of range for {num_classes} classes "
            f"(0 ... {num_classes - 1})."
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    num_classes: int,
    autocast: Autocast,
    processes: Processes,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Top-1, top-5, mean loss and each class's top-1 over all images of a loader, added up over
    the processes.

    Args:
        between: is called between two batches; it may end the evaluation by an exception.

    Raises:
        UserError: no image could be read, or a label is out of range.
    """
    model.eval()
    top5, loss_sum, unreadable = 0, 0.0, []
    # images and right answers of each class
    seen, right = torch.zeros(2, num_classes, dtype=torch.int64, device=autocast.device)
    for pixels, labels, _, names in loader:
        between()
        unreadable += names
        if len(labels) == 0:
            continue
        check_labels(labels, num_classes)
        labels = labels.to(autocast.device)
        with autocast():
            logits = model(pixels.to(autocast.device))
        logits = logits.float()
        loss_sum += float(F.cross_entropy(logits, labels, reduction="sum"))
        hits = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
        top5 += int(hits.sum())
        seen += torch.bincount(labels, minlength=num_classes)
        right += torch.bincount(labels[hits[:, 0]], minlength=num_classes)
    loss_sum, total5, *counts = processes.sum(loss_sum, top5, *seen.tolist(), *right.tolist())
    images, hit = counts[:num_classes], counts[num_classes:]
    total = int(sum(images))
    if total == 0:
        raise UserError(f"data: no image could be read, such as {(unreadable or ['none'])[0]}.")
    per_class = [100 * h / n if n else None for h, n in zip(hit, images, strict=True)]
    known = [share for share in per_class if share is not None]
    return Score(
        top1=100 * sum(hit) / total,
        top5=100 * total5 / total if num_classes > 5 else None,
        loss=loss_sum / total,
        images=total,
        unreadable=processes.gather(unreadable) if processes.world > 1 else unreadable,
        mean_class=sum(known) / len(known),
        per_class=per_class,
    )
