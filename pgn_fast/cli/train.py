"""``pgn-fast train``: adapt a frozen backbone to images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..methods import METHODS
from ..train.checks import HEAD_INITS, SCHEDULES, TASKS
from ..train.config import TrainConfig
from ..train.recipes import RECIPES
from ._canvas import add_canvas_arguments
from ._options import (
    KeyValues,
    add_data_arguments,
    add_device_argument,
    add_words_arguments,
    data_fields,
    pick_device,
)
from ._timm import add_timm_arguments, read_settings
from ._train_flags import (
    DEFAULTS,
    add_field,
    add_timm_rates,
    add_timm_training,
    add_trackers,
    with_default,
)

HELP = "adapt a frozen vision transformer to your images"
EPILOG = """\
examples:
  pgn-fast train                                          handwritten digits, offline
  pgn-fast train photos --model vit_base_patch16_224 --method vpt-deep --amp
  pgn-fast train --dataset torch/cifar100 --data-dir data --dataset-download --method pgn
  pgn-fast train photos --recipe vpt-official --lr 0.5 -b 128 --epochs 50
  pgn-fast train --deploy rgb --output runs/rgb           prompts as pixels: pgn-fast invert
  pgn-fast train photos --model vit_base_patch32_clip_224 --deploy rgb --layout enlarged
  pgn-fast train --resume runs/photos                     continue after a kill, to the bit
  torchrun --nproc-per-node 8 -m pgn_fast train photos --amp

what comes out, in --output: best/ and last/ (adapters: eval, predict and from_pretrained take
them), checkpoint.pt (for --resume), history.csv, learning_curve.png, summary.json (which says
which split each figure comes from). Without a validation split one is carved from the training
images by --seed; the test split is touched once, at the end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = add_data_arguments(parser)
    add_field(
        data, "task", str, "multilabel: any number of classes an image (--labels)", choices=TASKS
    )
    data.add_argument("--train-split", metavar="NAME", help="default: train, or the whole folder")
    data.add_argument("--val-split", metavar="NAME", help="default: val/, or carved from train")
    data.add_argument(
        "--test-split",
        metavar="NAME",
        help="default: test/ where there is one; none: it is not read",
    )
    add_field(data, "val_fraction", float, "share of train that is carved, where there is no val")
    data.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images (default: the cores, up to 8)",
    )

    model = parser.add_argument_group("model")
    add_field(
        model, "model", str, "a timm vision transformer, with its tag; pgn_demo_vit is inside"
    )
    model.add_argument(
        "--model-kwargs", nargs="*", action=KeyValues, metavar="NAME=VALUE", help="for timm"
    )
    model.add_argument(
        "--pretrained-path",
        metavar="FILE",
        help="the backbone's weights, in the place of the hub's (resampled to --model-kwargs "
        "img_size=N where that differs)",
    )
    add_field(
        model, "method", str, f"what is trained: {', '.join(METHODS)}, or one that you registered"
    )
    model.add_argument(
        "--method-kwargs",
        nargs="*",
        action=KeyValues,
        metavar="NAME=VALUE",
        help="further arguments of the method's constructor, such as layers=[0,1] of vpt-deep",
    )
    add_words_arguments(model)
    model.add_argument(
        "--head-init",
        choices=HEAD_INITS,
        help="of the linear head: probe (ridge regression on the features of one pass), zero, or "
        "the official code's (default: probe; linear, full: zero)",
    )
    model.add_argument(
        "--init-from", metavar="ADAPTER", help="start from this adapter's weights, in a new run"
    )
    add_field(model, "num_prompts", int, "P; vpt-*: 50")
    add_field(model, "library_size", int, "K, tokens in PGN's library")
    add_field(model, "generator", str, "PGN's network: resnet10, or a timm name such as resnet18")
    model.add_argument(
        "--generator-kwargs",
        nargs="*",
        action=KeyValues,
        metavar="NAME=VALUE",
        help="of that network, such as max_pool=False for small images (resnet10 on digits: so)",
    )
    model.add_argument("--resolution", type=int, metavar="R", help="of PGN's network, in pixels")
    add_field(model, "activation", str, "PGN's mixture", choices=("softmax", "sigmoid"))
    add_field(model, "prompt_dropout", float, "VPT")
    model.add_argument("--project-dim", type=int, metavar="D", help="VPT: stored prompt width")
    model.add_argument(
        "--deploy",
        choices=("rgb",),
        help="rgb: train PGN's prompts to be sent as pixels to an image API (pgn-fast invert)",
    )
    model.add_argument(
        "--no-fast", dest="fast", action="store_false", default=None, help="timm's own blocks"
    )
    model.add_argument("--backend", metavar="NAME", help="of the ops (default: the fastest)")

    canvas = parser.add_argument_group("prompts as pixels (with --deploy rgb)")
    add_canvas_arguments(canvas, "border")

    recipe = parser.add_argument_group("optimization (defaults differ by --method)")
    recipe.add_argument("--recipe", choices=tuple(RECIPES), help="a published recipe's values")
    add_field(recipe, "opt", str, "optimizer, by timm's name")
    add_field(recipe, "lr", float, "highest learning rate; vpt-*, linear: 0.01, full: 1e-4")
    add_field(recipe, "weight_decay", float, "full: 0.05")
    add_field(recipe, "momentum", float, "of SGD")
    add_field(recipe, "sched", str, "learning rate schedule", choices=SCHEDULES)
    add_field(recipe, "epochs", int, "passes over the training images")
    recipe.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="X",
        help="until the highest rate (default: a tenth of the epochs, 3 at most)",
    )
    recipe.add_argument("--min-lr", type=float, metavar="X", help="at the end")
    recipe.add_argument(
        "--warmup-lr", type=float, metavar="X", help="at the beginning (default: the first step up)"
    )
    recipe.add_argument(
        "-b",
        "--batch-size",
        type=int,
        metavar="N",
        help=with_default("batch_size", "images a process"),
    )
    add_field(recipe, "grad_accum_steps", int, "batches an optimizer step")
    recipe.add_argument("--clip-grad", type=float, metavar="NORM", help="largest gradient norm")
    add_field(recipe, "clip_mode", str, "of --clip-grad", choices=("norm", "value", "agc"))
    add_field(recipe, "smoothing", float, "of the labels")
    recipe.add_argument(
        "-vb",
        "--validation-batch-size",
        type=int,
        metavar="N",
        help="images of a batch in validation (default: -b)",
    )

    add_timm_rates(parser)
    add_timm_training(parser)
    add_timm_arguments(parser)

    pixels = parser.add_argument_group("augmentation (digits: none)")
    pixels.add_argument("--no-aug", action="store_true", default=None, help="resize only")
    for name in ("scale", "ratio"):
        pixels.add_argument(
            f"--{name}",
            type=float,
            nargs=2,
            metavar="X",
            help=with_default(name, "of random crops"),
        )
    add_field(pixels, "views", int, "augmented views of an image that take turns; 0: ever new ones")
    add_field(pixels, "hflip", float, "probability")
    add_field(pixels, "vflip", float, "probability")
    add_field(pixels, "color_jitter", float, "strength")
    pixels.add_argument("--color-jitter-prob", type=float, metavar="X", help="probability")
    add_field(pixels, "grayscale_prob", float, "probability")
    pixels.add_argument("--aa", metavar="NAME", help="timm's auto-augment, e.g. rand-m9-mstd0.5")
    add_field(pixels, "gaussian_blur_prob", float, "probability")
    add_field(pixels, "reprob", float, "of random erasing")
    add_field(pixels, "remode", str, "of random erasing", choices=("const", "rand", "pixel"))
    add_field(pixels, "recount", int, "of random erasing")
    pixels.add_argument(
        "--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="timm's ways to crop"
    )
    pixels.add_argument(
        "--train-interpolation", metavar="NAME", help="random, bilinear, ... (default: as below)"
    )
    for name in ("mean", "std"):
        pixels.add_argument(
            f"--{name}", type=float, nargs=3, metavar="X", help="(default: the backbone's own)"
        )
    pixels.add_argument("--crop-pct", type=float, metavar="X", help="of the evaluation's crop")
    pixels.add_argument(
        "--crop-mode",
        choices=("center", "squash", "border"),
        help="of the evaluation; squash with --no-aug: of training, too",
    )
    pixels.add_argument("--interpolation", metavar="NAME", help="(default: the backbone's own)")

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="default: runs/METHOD")
    run.add_argument("--experiment", metavar="NAME", help="a folder in --output")
    run.add_argument(
        "-c", "--config", metavar="FILE", help="YAML of settings, such as a run's args.yaml"
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue the run in DIR (or --output); with more --epochs, beyond its end",
    )
    add_field(run, "seed", int, "of everything that is random")
    add_device_argument(run)
    run.add_argument("--amp", action="store_true", default=None, help="mixed precision")
    add_field(run, "amp_dtype", str, "of --amp", choices=("bfloat16", "float16"))
    run.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile"
    )
    add_field(run, "recovery_interval", int, "batches between checkpoints inside an epoch; 0: none")
    add_field(run, "log_interval", int, "batches between looks at the loss")
    run.add_argument(
        "--no-sync-bn",
        dest="sync_bn",
        action="store_false",
        default=None,
        help="each process's BatchNorm sees its own images (default: those of all)",
    )
    run.add_argument(
        "--stats", action="store_true", default=None, help="where the time of a step goes"
    )
    run.add_argument(
        "--cache",
        metavar="DIR",
        help="where what the blocks below all prompts make of each image is kept, so that they run "
        "once: auto (in --output, while the run lasts), off, or a folder that runs share "
        "(default: auto)",
    )
    run.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="half of the size; the run says the error (default: as it is computed)",
    )
    add_trackers(run)


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``TrainConfig`` that were given, by flags or by the file of ``-c``."""
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in DEFAULTS
        if name not in ("data", "data_dir") and getattr(args, name, None) is not None
    } | data_fields(args)
    if args.config:
        given = read_settings(args.config, tuple(DEFAULTS)) | given
    return given


def run(args: argparse.Namespace) -> int:
    given = given_fields(args)
    if args.experiment:
        args.output = str(Path(args.output or "runs") / args.experiment)
    output, config = _output_and_config(args, given)

    from ..train.loop import train

    summary = train(config, output, device=pick_device(args.device), resume=args.resume is not None)
    if os.environ.get("RANK", "0") == "0":
        print_results(summary, output)
    return 0


def _output_and_config(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Path, TrainConfig]:
    resumed = _run_folder(args.resume) if args.resume else None
    if resumed and args.output and resumed != Path(args.output):
        raise UserError(f"--resume {args.resume} and --output {args.output}: give one of them.")
    if resumed and not resumed.is_dir():
        raise UserError(f"--resume: no folder {resumed}.")
    if args.resume is None:
        config = TrainConfig.make(args.recipe, **given)
        return Path(args.output or f"runs/{config.method}"), config
    from ..train.state import resume_config

    # a recipe that is named again is a claim about the run, as every other flag is
    recipe = RECIPES.get(args.recipe, {})
    method = (recipe | given).get("method", TrainConfig.method)
    output = resumed or Path(args.output or f"runs/{method}")
    config = resume_config(output, given, recipe) or TrainConfig.make(args.recipe, **given)
    return output, config


def _run_folder(path: str) -> Path:
    """The folder of the run that --resume names: itself, its checkpoint, best/ or last/."""
    named = Path(path)
    inside = named.name in ("checkpoint.pt", "best", "last") and (
        named.with_name("checkpoint.pt").is_file()
    )
    return named.parent if inside else named


def print_results(summary: dict[str, Any], output: Path) -> None:
    """The scores of a run, each with the images that it is of."""
    print(f"best epoch {summary['best_epoch']}, chosen by {summary['chosen_by']}")
    for name in ("train", "validation", "test"):
        if summary[name]:
            words = {"top1": "top-1", "mean_class": "mean class", "map": "mean average precision"}
            words |= {"auc": "ROC-AUC"}
            found = summary[name]
            shown = [f"{w} {found[k]:6.2f} %" for k, w in words.items() if found.get(k) is not None]
            shown = shown or [f"loss {found['loss']:.4f}"]
            print(f"{name:>10}: {'  '.join(shown)}  {found['images']} images: {found['split']}")
    if summary["unreadable"]["count"]:
        print(f"unreadable: {summary['unreadable']['count']} images, named in summary.json")
    print(f"written to {output}")
