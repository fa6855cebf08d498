"""What a model returns to trainers that pass labels: a loss beside the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


class ClassifierOutput(dict[str, Any]):
    """``loss`` (absent without labels) and ``logits`` (B, C), as entries, attributes, by index."""

    @property
    def loss(self) -> Tensor | None:
        """The mean cross-entropy; None without labels."""
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        """(B, C)."""
        return self["logits"]

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def classifier_output(logits: Tensor, labels: Tensor | None) -> ClassifierOutput:
    """Logits (B, C), and their loss against labels.

    Args:
        labels: class indices (B,), or probabilities (B, C).
    """
    if labels is None:
        return ClassifierOutput(logits=logits)
    return ClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)
