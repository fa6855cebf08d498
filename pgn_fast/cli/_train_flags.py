"""Flags of ``pgn-fast train`` in groups, each the name of a field of TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses

from ..train.checks import EVAL_METRICS, TRACKERS
from ..train.config import TrainConfig
from ._options import KeyValues

DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainConfig)}


def with_default(name: str, help_text: str) -> str:
    default = DEFAULTS[name]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{help_text} (default: {shown})"


def add_field(
    group: argparse._ArgumentGroup,
    name: str,
    kind: type,
    help_text: str,
    choices: tuple[str, ...] | None = None,
) -> None:
    """A flag of a field of TrainConfig; not given, it is None, and the method's default counts."""
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        choices=choices,
        metavar=None if choices else {int: "N", float: "X", str: "NAME"}[kind],
        help=with_default(name, help_text),
    )


def add_timm_rates(parser: argparse.ArgumentParser) -> None:
    """Finer settings of timm's optimizers and schedules."""
    finer = parser.add_argument_group("optimizers and schedules in detail, as timm has them")
    finer.add_argument("--opt-eps", type=float, metavar="X", help="(default: the optimizer's own)")
    finer.add_argument(
        "--opt-betas", type=float, nargs="+", metavar="X", help="(default: the optimizer's own)"
    )
    finer.add_argument(
        "--opt-kwargs", nargs="*", action=KeyValues, metavar="NAME=VALUE", help="for the optimizer"
    )
    finer.add_argument("--lr-base", type=float, metavar="X", help="rate for --lr-base-size images")
    add_field(
        finer, "lr_base_size", int, "images a step, over all processes, that --lr-base is for"
    )
    finer.add_argument(
        "--lr-base-scale",
        choices=("linear", "sqrt"),
        help="from --lr-base to the step's images (default: sqrt for adaptive optimizers)",
    )
    finer.add_argument("--layer-decay", type=float, metavar="X", help="of the rate, a layer")
    add_field(finer, "layer_decay_min_scale", float, "smallest factor of --layer-decay")
    finer.add_argument(
        "--layer-decay-no-opt-scale", type=float, metavar="X", help="freeze layers below it"
    )
    finer.add_argument(
        "--sched-on-updates",
        action=argparse.BooleanOptionalAction,
        help="a rate for every step (default), or for every epoch",
    )
    finer.add_argument(
        "--warmup-prefix", action="store_true", default=None, help="warm-up is extra"
    )
    add_field(finer, "cooldown_epochs", int, "at --min-lr, after the schedule")
    finer.add_argument("--decay-epochs", type=float, metavar="X", help="step, wsd, rsqrt")
    finer.add_argument(
        "--decay-milestones", type=int, nargs="+", metavar="N", help="multistep: epochs"
    )
    finer.add_argument(
        "--decay-rate",
        "--dr",
        type=float,
        metavar="X",
        help=with_default("decay_rate", "step; poly: power"),
    )
    add_field(finer, "patience_epochs", int, "plateau")
    finer.add_argument("--lr-noise", type=float, nargs="+", metavar="X", help="on, off: shares")
    add_field(finer, "lr_noise_pct", float, "largest noise")
    add_field(finer, "lr_noise_std", float, "of the noise")
    add_field(finer, "lr_cycle_mul", float, "length of a cycle to the one before")
    add_field(finer, "lr_cycle_decay", float, "height of a cycle to the one before")
    add_field(finer, "lr_cycle_limit", int, "cycles")
    add_field(finer, "lr_k_decay", float, "cosine, poly")


def add_timm_training(parser: argparse.ArgumentParser) -> None:
    """Mixing, losses, averages and more, as timm has them."""
    more = parser.add_argument_group("mixing, losses and averages, as timm has them")
    add_field(more, "mixup", float, "alpha; 0: none")
    add_field(more, "cutmix", float, "alpha; 0: none")
    more.add_argument(
        "--cutmix-minmax", type=float, nargs=2, metavar="X", help="sides, in the place of --cutmix"
    )
    add_field(more, "mixup_prob", float, "of mixing a batch")
    add_field(more, "mixup_switch_prob", float, "of cutmix where both are on")
    add_field(more, "mixup_mode", str, "what is mixed alike", choices=("batch", "pair", "elem"))
    add_field(more, "mixup_off_epoch", int, "no mixing from this epoch on; 0: to the end")
    for name, text in (
        ("bce-loss", "binary cross entropy of each class"),
        ("bce-sum", "its sum over classes, not its mean"),
        ("model-ema", "score and save the moving average of what is trained"),
        ("model-ema-warmup", "a shorter average at the beginning"),
        ("grad-checkpointing", "recompute activations: less memory, more time"),
        ("synchronize-step", "wait for the GPU after every step"),
    ):
        more.add_argument(f"--{name}", action="store_true", default=None, help=text)
    for name, text in (
        ("bce-target-thresh", "targets above it become 1, others 0"),
        ("bce-pos-weight", "of positive targets"),
        ("bn-momentum", "of the generator's BatchNorm"),
        ("bn-eps", "of the generator's BatchNorm"),
        ("head-init-scale", "multiplies the head's start"),
        ("head-init-bias", "the head's biases"),
    ):
        more.add_argument(f"--{name}", type=float, metavar="X", help=text)
    add_field(more, "model_ema_decay", float, "of the moving average")
    more.add_argument("--torchcompile-mode", metavar="NAME", help="of torch.compile")
    add_field(more, "val_interval", int, "epochs from one validation to the next")
    add_field(more, "eval_metric", str, "what chooses the best epoch", choices=EVAL_METRICS)
    add_field(more, "checkpoint_hist", int, "adapters of best epochs to keep in epochs/")
    more.add_argument("--input-key", metavar="NAME", help="hfds/: column of the images")
    more.add_argument("--target-key", metavar="NAME", help="hfds/: column of the labels")


def add_trackers(run: argparse._ArgumentGroup) -> None:
    """Where else than into the run's folder figures go; timm's flags for W&B among them."""
    run.add_argument(
        "--tracker",
        nargs="+",
        action="extend",
        choices=TRACKERS,
        metavar="NAME",
        help=f"log to {', '.join(TRACKERS)} (pip install 'pgn_fast[tracking]')",
    )
    run.add_argument(
        "--log-wandb",
        dest="tracker",
        action="append_const",
        const="wandb",
        help="timm's flag for --tracker wandb",
    )
    run.add_argument("--wandb-project", metavar="NAME", help="of W&B, MLflow, Trackio (pgn_fast)")
    run.add_argument("--wandb-tags", nargs="*", metavar="TAG", help="of W&B's run")
    run.add_argument("--wandb-resume-id", metavar="ID", help="of W&B's run to continue")
