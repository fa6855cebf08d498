"""The moving average of what is trained (timm's ``ModelEmaV3``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .config import TrainConfig


class Average:
    """Follows the trained parts of a model; the frozen backbone is not copied.

    Without ``config.model_ema`` nothing is followed, and ``applied`` changes nothing.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self._parts = nn.ModuleDict(
            {
                name: part
                for name, part in model.named_children()
                if any(p.requires_grad for p in part.parameters())
            }
        )
        self._ema: Any = None
        if config.model_ema:
            decay, warmup = config.model_ema_decay, config.model_ema_warmup
            self._ema = ModelEmaV3(self._parts, decay=decay, use_warmup=warmup)

    def update(self, step: int) -> None:
        """Move towards the parts as they are after optimizer step number ``step`` (from 1)."""
        if self._ema is not None:
            self._ema.update(self._parts, step=step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged values."""
        if self._ema is None:
            yield
            return
        kept = {name: value.clone() for name, value in self._parts.state_dict().items()}
        self._parts.load_state_dict(self._ema.module.state_dict())
        try:
            yield
        finally:
            self._parts.load_state_dict(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._ema is None else self._ema.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._ema is not None:
            self._ema.module.load_state_dict(state)
