"""``pgn-fast reproduce``: a paper's table, run by run, with ours beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._flags import in_flags
from ._options import KeyValues, add_device_argument, at_least, pick_device

HELP = "run the papers' experiments: a plan, its runs, the paper's table with ours beside it"
EPILOG = """\
examples:
  pgn-fast reproduce pgn --plan                 what it takes, and which files are missing
  pgn-fast reproduce pgn --dataset cifar100 --data-dir data --dataset-download
  pgn-fast reproduce vpt --suite vtab-1k --data-dir data/vtab-1k --amp
  pgn-fast reproduce vpt --suite fgvc --dataset cub --num-prompts 10 50 --base-lr 5 1

One folder a run in --output, and the tables; the same command again goes on where it ended.
Nothing is chosen by test images: the official PGN code does that, this does not.
"""
_SUITES = {"vtab-1k": "vtab", "fgvc": "fgvc"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paper", choices=("pgn", "vpt"), help="whose experiments")
    parser.add_argument(
        "--suite", choices=tuple(_SUITES), default="vtab-1k", help="vpt: (default: vtab-1k)"
    )
    parser.add_argument(
        "--dataset", nargs="+", default=[], metavar="NAME", help="some of them (default: all)"
    )
    parser.add_argument("--data-dir", metavar="DIR", default="data", help="their files (data)")
    parser.add_argument(
        "--dataset-download", action="store_true", help="let torchvision download its own"
    )
    parser.add_argument("--output", metavar="DIR", help="default: runs/reproduce/PAPER")
    parser.add_argument("--plan", action="store_true", help="print the plan, and do nothing")
    parser.add_argument(
        "--images-per-second",
        type=float,
        metavar="X",
        help="of training, for --plan (default: measured here)",
    )
    parser.add_argument(
        "--method",
        choices=("vpt-deep", "vpt-shallow", "linear"),
        default="vpt-deep",
        help="vpt: (default: vpt-deep)",
    )
    parser.add_argument("--model", metavar="NAME", help="another backbone than the paper's")
    parser.add_argument(
        "--model-kwargs", nargs="*", action=KeyValues, metavar="NAME=VALUE", help="for timm"
    )
    parser.add_argument("--pretrained-path", metavar="FILE", help="the backbone's weights")
    search = parser.add_argument_group("a smaller search than the paper's (vpt)")
    search.add_argument("--num-prompts", nargs="+", type=at_least(1), metavar="N")
    search.add_argument("--base-lr", nargs="+", type=float, metavar="X", help="for 256 images")
    search.add_argument("--weight-decay", nargs="+", type=float, metavar="X")
    parser.add_argument(
        "--seeds", nargs="+", type=at_least(0), metavar="N", help="one final run each"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        action=KeyValues,
        metavar="NAME=VALUE",
        help="options of pgn-fast train in every run, with underscores: epochs=10 head=linear",
    )
    parser.add_argument("-j", "--workers", type=at_least(0), metavar="N")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.distributed import Processes
    from ..train.reproduce.estimates import Machine, describe, measure
    from ..train.reproduce.plans import make_plan
    from ..train.reproduce.tables import write_tables
    from ..train.reproduce.work import Result, run_experiment

    device = pick_device(args.device)
    output = Path(args.output or f"runs/reproduce/{args.paper}")
    plan = make_plan(args.paper, _choices(args))
    if args.plan:
        machine = Machine(args.images_per_second, 0, "given by --images-per-second")
        measured = measure(plan[0], device, batch_size=8)
        if args.images_per_second is None:
            machine = measured
        machine = Machine(machine.images_per_second, measured.bytes_a_run, machine.measured_with)
        print(in_flags(describe(plan, output, machine)), end="")
        return 0
    method = "pgn" if args.paper == "pgn" else args.method
    first = Processes(device).first
    say: Any = print if first else lambda line: None
    results: dict[str, Result | None] = {experiment.data.name: None for experiment in plan}
    for experiment in plan:
        results[experiment.data.name] = run_experiment(experiment, output, device, say)
        if first:
            table = write_tables(output, args.paper, method, results)
    if first:
        print(table, end="")
    return 0


def _choices(args: argparse.Namespace) -> Any:
    from ..train.reproduce.plans import BASE_RATES, PROMPTS, WEIGHT_DECAYS, Choices

    common: dict[str, Any] = {
        "data_dir": args.data_dir,
        "dataset_download": args.dataset_download,
        "model_kwargs": args.model_kwargs,
        "pretrained_path": args.pretrained_path,
        "workers": args.workers,
        "amp": args.amp or None,
    }
    return Choices(
        datasets=args.dataset,
        suite=_SUITES[args.suite],
        method=args.method,
        model=args.model,
        seeds=args.seeds,
        num_prompts=args.num_prompts or PROMPTS,
        base_rates=args.base_lr or BASE_RATES,
        weight_decays=args.weight_decay or WEIGHT_DECAYS,
        common={k: v for k, v in common.items() if v is not None} | (args.set or {}),
    )
