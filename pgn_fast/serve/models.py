"""The models of tasks: those on the shared backbone in a bank, fine-tuned ones beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..models import FineTuned
from ..tasks import TaskBank


class Models:
    """A bank of tasks, and beside it fine-tuned models, each with a backbone of its own.

    Args:
        bank: of the tasks that share its backbone.
    """

    def __init__(self, bank: TaskBank) -> None:
        self._bank = bank
        self._fine_tuned: dict[str, FineTuned] = {}

    def add(self, name: str, model: Any) -> None:
        if isinstance(model, FineTuned):
            self._fine_tuned[name] = model.to(next(self._bank.backbone.parameters()).device)
        else:
            self._bank.add(name, model)

    def remove(self, name: str) -> None:
        if self._fine_tuned.pop(name, None) is None:
            self._bank.remove(name)

    def __call__(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Images (B, 3, H, W) and one name each → B logit vectors."""
        own = [i for i, name in enumerate(tasks) if name in self._fine_tuned]
        if not own:
            return self._bank(images, tasks)
        results: dict[int, Tensor] = {}
        for name in {tasks[i] for i in own}:
            rows = [i for i in own if tasks[i] == name]
            results.update(zip(rows, self._fine_tuned[name](images[rows]), strict=True))
        if shared := [i for i in range(len(tasks)) if i not in results]:
            names = [tasks[i] for i in shared]
            results.update(zip(shared, self._bank(images[shared], names), strict=True))
        return [results[i] for i in range(len(tasks))]

    def every(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) through each of these tasks: name -> (B, C)."""
        names = list(names)
        found = {n: self._fine_tuned[n](images) for n in names if n in self._fine_tuned}
        shared = [n for n in names if n not in found]
        return found | (self._bank.every(images, shared) if shared else {})
