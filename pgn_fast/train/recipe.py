"""Learning-rate schedules and optimizers: what is stepped, and how far.

A schedule is a pure function of the position in the run, so a resumed run needs no state of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import as_user_error

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from .config import TrainConfig

# position in epochs (fractions between two epochs' starts) -> learning rate
Schedule = Callable[[float], float]


def cosine(
    lr: float, epochs: int, warmup_epochs: float, min_lr: float = 0.0, warmup_lr: float = 0.0
) -> Schedule:
    """Linear warm-up from ``warmup_lr`` to ``lr``, then half a cosine down to ``min_lr``.

    Follows the position continuously, so the rate changes at every step.
    """

    def rate(position: float) -> float:
        if position < warmup_epochs:
            return warmup_lr + (lr - warmup_lr) * position / warmup_epochs
        progress = min(1.0, (position - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))

    return rate


def cosine_pgn(
    lr: float, epochs: int, warmup_epochs: float, min_lr: float | None = None
) -> Schedule:
    """The official PGN schedule (``CosineWithWarmup``), one rate an epoch.

    Epoch k of the warm-up has ``lr * k / warmup``, but epoch 0 shares epoch 1's rate; the full
    rate is reached at epoch ``warmup_epochs``; then half a cosine to ``min_lr`` (None: lr / 100).

    Source: official PGN code, github.com/jochemloedeman/PGN; checked against its recorded rates.
    """
    floor = lr / 100 if min_lr is None else min_lr

    def rate(position: float) -> float:
        epoch = math.floor(position)
        if epoch < warmup_epochs:
            return lr / warmup_epochs * max(epoch, 1)
        progress = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
        return floor + (lr - floor) * (1 + math.cos(math.pi * progress)) / 2

    return rate


def cosine_vpt(lr: float, epochs: int, warmup_epochs: float) -> Schedule:
    """The official VPT schedule, one rate an epoch: epoch 0 has rate zero, then as k / warmup,
    then half a cosine towards 0.

    Source: official VPT code, github.com/KMnP/vpt; checked against its recorded rates.
    """

    def rate(position: float) -> float:
        epoch = math.floor(position)
        if epoch < warmup_epochs:
            return lr * (epoch / warmup_epochs)
        progress = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
        return lr * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def make_schedule(config: TrainConfig) -> Schedule:
    """The schedule that ``config.sched`` names, with the configuration's rate and lengths."""
    lr, epochs, warmup = config.lr, config.epochs, config.warmup_epochs
    if config.sched == "cosine-pgn":
        return cosine_pgn(lr, epochs, warmup, config.min_lr)
    if config.sched == "cosine-vpt":
        return cosine_vpt(lr, epochs, warmup)
    if config.sched == "constant":
        return lambda position: lr
    return cosine(lr, epochs, warmup, config.min_lr or 0.0, config.warmup_lr)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that timm calls ``config.opt``, over what is trained in ``model``.

    timm leaves one-dimensional parameters, and those in ``model.no_weight_decay()``, without
    weight decay.

    Raises:
        UserError: timm knows no optimizer of that name, or it refuses the values.
    """
    from timm.optim import create_optimizer_v2

    with as_user_error(AssertionError, RuntimeError):
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group this rate, times the group's own ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
