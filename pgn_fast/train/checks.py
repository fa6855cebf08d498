"""What a configuration may hold. Messages name fields in backticks; the CLI makes them flags."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .config import TrainConfig

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
OFFICIAL_SCHEDULES = ("cosine-pgn", "cosine-vpt")
SCHEDULES = (
    "cosine",
    *OFFICIAL_SCHEDULES,
    "constant",
    "tanh",
    "step",
    "multistep",
    "plateau",
    "poly",
    "wsd",
    "rsqrt",
    "none",
)
TASKS = ("multiclass", "multilabel")
EVAL_METRICS = ("top1", "top5", "mean_class", "map", "auc", "loss")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
HEADS = ("linear", "zero_shot")
HEAD_INITS = ("probe", "zero", "official")

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "sched": SCHEDULES,
    "amp_dtype": ("bfloat16", "float16"),
    "deploy": (None, "rgb"),
    "layout": ("border", "enlarged"),
    "interpolation": (None, *INTERPOLATIONS),
    "activation": ("softmax", "sigmoid"),
    "head": HEADS,
    "head_init": HEAD_INITS,
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "crop_mode": (None, "center", "squash", "border"),
    "train_crop_mode": (None, "rrc", "rkrc", "rkrr"),
    "train_interpolation": (None, "random", *INTERPOLATIONS),
    "eval_metric": EVAL_METRICS,
    "task": TASKS,
    "clip_mode": ("norm", "value", "agc"),
    "lr_base_scale": ("", "linear", "sqrt"),
    "cache_dtype": (None, "float32", "bfloat16", "float16"),
}
_AT_LEAST = {
    "num_prompts": 1,
    "library_size": 1,
    "resolution": 1,
    "num_classes": 1,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "min_lr": 0,
    "warmup_lr": 0,
    "grad_accum_steps": 1,
    "workers": 0,
    "color_jitter": 0,
    "seed": 0,
    "recovery_interval": 0,
    "log_interval": 1,
    "lr_base_size": 1,
    "lr_cycle_limit": 1,
    "patience_epochs": 0,
    "mixup": 0,
    "cutmix": 0,
    "mixup_off_epoch": 0,
    "bce_pos_weight": 0,
    "recount": 1,
    "val_interval": 1,
    "checkpoint_hist": 0,
    "validation_batch_size": 1,
    "views": 0,
}
_ABOVE_ZERO = (
    "lr",
    "lr_base",
    "batch_size",
    "epochs",
    "clip_grad",
    "layer_decay",
    "opt_eps",
    "decay_epochs",
    "lr_cycle_mul",
    "lr_k_decay",
    "bn_eps",
)
_SHARES = (
    "smoothing",
    "momentum",
    "prompt_dropout",
    "hflip",
    "vflip",
    "color_jitter_prob",
    "grayscale_prob",
    "reprob",
    "layer_decay_min_scale",
    "gaussian_blur_prob",
    "mixup_prob",
    "mixup_switch_prob",
    "model_ema_decay",
    "bce_target_thresh",
    "bn_momentum",
)
_OF_RGB = ("layout", "image_grid", "canvas_grid", "allow_blank", "compensate", "server")


def check_choice(name: str, value: object, known: tuple[str | None, ...]) -> None:
    """Raises UserError: ``value`` is not among the known ones."""
    if value not in known:
        raise UserError(f"`{name}` is {value!r}; known: {', '.join(filter(None, known))}.")


def check(config: TrainConfig) -> None:
    """Raises UserError: a value out of its range, or two that contradict each other."""
    for name, known in _CHOICES.items():
        check_choice(name, getattr(config, name), known)
    _check_numbers(config)
    _check_pixels(config)
    _check_deployment(config)
    _check_task(config)
    for name in config.tracker:
        check_choice("tracker", name, TRACKERS)
    _check_words(config)
    if config.seed >= 2**63:
        raise UserError(f"`seed` is {config.seed}; give less than 2**63.")
    if not 0 <= config.val_fraction < 1:
        raise UserError(
            f"`val_fraction` is {config.val_fraction}; give a share of the training images "
            "from 0 (no validation) to below 1."
        )
    if config.warmup_epochs is not None and config.warmup_epochs > config.epochs:
        raise UserError(
            f"`warmup_epochs` {config.warmup_epochs:g} is more than `epochs` {config.epochs}: "
            f"the full rate would never be reached; give `warmup_epochs` {config.epochs} or less."
        )
    if config.pretrained_path is not None and "checkpoint_path" in config.model_kwargs:
        raise UserError(
            "`pretrained_path` and checkpoint_path in `model_kwargs` both name the backbone's "
            "weights: give one of them."
        )


def _check_task(config: TrainConfig) -> None:
    several = config.task == "multilabel"
    of_task = ("map", "auc", "loss") if several else ("top1", "top5", "mean_class", "loss")
    if config.eval_metric not in of_task:
        raise UserError(
            f"`eval_metric` {config.eval_metric} is no score of `task` {config.task}: give "
            f"{', '.join(of_task)}."
        )
    if not several:
        return
    for name in ("mixup", "cutmix", "cutmix_minmax"):
        if getattr(config, name):
            raise UserError(
                f"`{name}` mixes images of one class each, as timm does: leave it out with `task` "
                "multilabel."
            )


def _check_numbers(config: TrainConfig) -> None:
    for name, low in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise UserError(f"`{name}` is {value}; give {low} or more.")
    for name in _ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"`{name}` is {value}; give > 0.")
    for name in _SHARES:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"`{name}` is {value}; give 0 ... 1.")


def _check_pixels(config: TrainConfig) -> None:
    for name, top in (("scale", 1.0), ("ratio", math.inf)):
        low, high = getattr(config, name)
        if not 0 < low <= high <= top:
            raise UserError(
                f"`{name}` is {low:g} {high:g}; give the smallest and the largest, above 0"
                + (" and up to 1." if top == 1 else ".")
            )
    for name in ("mean", "std"):
        value = getattr(config, name)
        if value is not None and len(value) != 3:
            raise UserError(f"`{name}` is {' '.join(map(str, value))}; give three values.")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise UserError(f"`crop_pct` is {config.crop_pct}; give a share above 0, up to 1.")
    if config.std is not None and not all(s > 0 for s in config.std):
        raise UserError(f"`std` is {' '.join(map(str, config.std))}; give three above 0.")


def _check_deployment(config: TrainConfig) -> None:
    defaults = type(config)()
    given = [name for name in _OF_RGB if getattr(config, name) != getattr(defaults, name)]
    if given and not config.deploy:
        name = "compensate=False" if given[0] == "compensate" else given[0]
        raise UserError(
            f"`{name}` says how prompts become pixels: add `deploy` rgb, or leave it out."
        )
    if config.deploy and (config.method != "pgn" or config.activation != "softmax"):
        raise UserError(
            f"`deploy` rgb trains `method` pgn with `activation` softmax, got {config.method} "
            f"and {config.activation}. VPT-Shallow needs no training of its own: pgn-fast invert."
        )


def _check_words(config: TrainConfig) -> None:
    given = [n for n in ("class_names", "template", "text_model") if getattr(config, n)]
    if given and config.head != "zero_shot":
        raise UserError(f"`{given[0]}` is for a head of words: add `head` zero_shot.")
    if config.head == "zero_shot" and config.init_from is not None:
        raise UserError("`init_from` brings its own head: leave `head` out.")
