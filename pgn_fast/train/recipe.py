"""Learning-rate schedules and optimizers: what is stepped, and how far.

The rate of an update is a function of its position in the run, so a resumed run needs no state of
it; timm's "plateau", which follows the validation score, is the one exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import as_user_error

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from .config import TrainConfig

# epoch, from 0 -> learning rate
EpochRates = Callable[[float], float]


def cosine_pgn(
    lr: float, epochs: int, warmup_epochs: float, min_lr: float | None = None
) -> EpochRates:
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


def cosine_vpt(lr: float, epochs: int, warmup_epochs: float) -> EpochRates:
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


def official_rates(config: TrainConfig) -> EpochRates | None:
    """The published schedule that ``config.sched`` names; None where it names one of timm's."""
    lr, epochs, warmup = config.lr, config.epochs, config.warmup_epochs
    assert warmup is not None
    if config.sched == "cosine-pgn":
        return cosine_pgn(lr, epochs, warmup, config.min_lr)
    if config.sched == "cosine-vpt":
        return cosine_vpt(lr, epochs, warmup)
    return None


class Schedule:
    """Sets the learning rate of an optimizer's groups, times a group's ``lr_scale``, by position.

    Args:
        config: names the schedule and its lengths in epochs.
        optimizer: not yet stepped.
        updates_per_epoch: optimizer steps an epoch.
        rates: number of the update, from 0 -> learning rate, in the place of the schedule.

    Attributes:
        epochs: of the whole run; timm's cycles, cooldown and warm-up prefix make it longer than
            ``config.epochs``.

    Raises:
        UserError: timm refuses the values.
    """

    def __init__(
        self,
        config: TrainConfig,
        optimizer: Optimizer,
        updates_per_epoch: int,
        rates: Callable[[int], float] | None = None,
    ) -> None:
        self._rates = rates
        self._official = official_rates(config)
        self._optimizer, self.epochs = optimizer, config.epochs
        self._timm: Any = None
        self._updates_per_epoch, self._follows_score = updates_per_epoch, False
        if rates is not None or self._official is not None:
            return
        from timm.scheduler import create_scheduler_v2

        self._follows_score = config.sched == "plateau"
        self._smaller = config.eval_metric == "loss"
        by_epoch = self._follows_score or not config.sched_on_updates
        assert config.warmup_epochs is not None
        # whole steps: a warm-up shorter than one step is none, and the first step is never lost
        steps = config.warmup_epochs * (1 if by_epoch else updates_per_epoch)
        steps = math.ceil(steps) if by_epoch else round(steps)
        first = config.lr / (steps + 1) if config.warmup_lr is None else config.warmup_lr
        with as_user_error(AssertionError, TypeError):
            self._timm, self.epochs = create_scheduler_v2(
                optimizer,
                sched=config.sched,
                num_epochs=config.epochs,
                min_lr=config.min_lr or 0.0,
                warmup_lr=first,
                warmup_epochs=steps if by_epoch else steps / updates_per_epoch,  # type: ignore[arg-type]
                step_on_epochs=by_epoch,
                updates_per_epoch=updates_per_epoch,
                plateau_mode="min" if self._smaller else "max",
                **config.schedule_options(),
            )
        self.epochs = int(self.epochs)

    def set(self, epoch: int, update: int) -> None:
        """Set the rate of update number ``update`` (from 0) of ``epoch`` (from 0)."""
        if self._rates is not None:
            number = epoch * self._updates_per_epoch + update
            set_learning_rate(self._optimizer, self._rates(number))
        elif self._official is not None:
            set_learning_rate(self._optimizer, self._official(epoch))
        elif self._timm is not None and not self._follows_score:
            self._timm.step(epoch)
            self._timm.step_update(epoch * self._updates_per_epoch + update)

    def end_epoch(self, epoch: int, score: float | None) -> None:
        """Tell "plateau" the score of the epoch that ended, larger being better, or None where it
        was not validated; other schedules need none."""
        if self._timm is not None and self._follows_score:
            # torch's threshold is relative to the best, and would be an allowance below zero
            self._timm.step(epoch + 1, -score if self._smaller and score is not None else score)

    @property
    def rate(self) -> float:
        """The rate that is set now, of a group without a scale of its own."""
        group = self._optimizer.param_groups[0]
        return group["lr"] / (group.get("lr_scale") or 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What the position does not tell: how long "plateau" has waited, and the rates that its
        noise is on top of."""
        if not self._follows_score:
            return {}
        return {**self._timm.lr_scheduler.state_dict(), "restore_lr": self._timm.restore_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._follows_score and state:
            state = dict(state)
            self._timm.restore_lr = state.pop("restore_lr", None)
            self._timm.lr_scheduler.load_state_dict(state)


def learning_rate(config: TrainConfig, world: int) -> float:
    """``config.lr``, or timm's ``lr_base`` scaled to the images of a step over all processes."""
    if config.lr_base is None:
        return config.lr
    scale = config.lr_base_scale
    if not scale:
        adaptive = any(name in config.opt.lower() for name in ("ada", "lamb"))
        scale = "sqrt" if adaptive else "linear"
    ratio = config.batch_size * config.grad_accum_steps * world / config.lr_base_size
    return config.lr_base * (math.sqrt(ratio) if scale == "sqrt" else ratio)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that timm calls ``config.opt``, over what is trained in ``model``.

    timm leaves one-dimensional parameters, and those in ``model.no_weight_decay()``, without
    weight decay.

    Raises:
        UserError: timm knows no optimizer of that name, or it refuses the values.
    """
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = dict(config.opt_kwargs)
    if config.opt_eps is not None:
        options["eps"] = config.opt_eps
    if config.opt_betas is not None:
        options["betas"] = config.opt_betas
    if config.layer_decay is not None:
        options |= {
            "layer_decay": config.layer_decay,
            "layer_decay_min_scale": config.layer_decay_min_scale,
            "layer_decay_no_opt_scale": config.layer_decay_no_opt_scale,
        }
    with as_user_error(AssertionError, RuntimeError, TypeError):
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **options,
        )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group this rate, times the group's own ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
