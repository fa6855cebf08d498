"""``pgn-fast tune``: find the method and its rates under a budget."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import train
from ._options import at_least, pick_device

HELP = "search method, size and rates under a budget, and train the best"
EPILOG = """\
examples:
  pgn-fast tune digits --budget 2m --epochs 9             offline
  pgn-fast tune photos --budget 20m --model vit_base_patch16_224 --no-aug
  pgn-fast tune photos --budget 1h --method vpt-deep --views 4   one method, its rates
  pgn-fast tune --resume runs/tune                        go on after a kill, as it was begun
  pgn-fast tune --resume runs/tune --budget 1h            or for longer, an hour in all

Flags of pgn-fast train hold for every trial; what is given is not searched: --method, --lr,
--weight-decay, --num-prompts, --method-kwargs. Trials are judged by validation images, pause and go
on to the bit (successive halving, by Optuna); of equal scores the lower loss is better. The best
three are trained again with another seed, and the best in the mean of both wins; the test images
are touched once, by that one.
In --output: tune.json and tune.png (all trials), best/ (the adapter), summary.json.
"""
_UNITS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument("--budget", metavar="TIME", help="such as 90s, 20m or 1.5h")
    search.add_argument("--trials", type=at_least(1), metavar="N", help="at most so many trials")
    search.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="to choose from (default: linear vpt-shallow vpt-deep pgn)",
    )
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.run_folder import SEARCH
    from ..train.tune import tune

    if args.recipe:
        raise UserError(f"--recipe {args.recipe} sets what tune searches: use pgn-fast train.")
    given = train.given_fields(args)
    if args.resume and args.output and Path(args.resume) != Path(args.output):
        raise UserError(f"--resume {args.resume} and --output {args.output}: give one of them.")
    output = Path(args.resume or args.output or "runs/tune") / (args.experiment or "")
    if args.resume and not (output / SEARCH).is_file():
        raise UserError(f"--resume: there is no search in {output} ({SEARCH}).")
    found = tune(
        given,
        output,
        seconds=None if args.budget is None else seconds(args.budget),
        trials=args.trials,
        methods=args.methods,
        device=pick_device(args.device),
        resume=args.resume is not None,
    )
    train.print_results(found.summary, output)
    print(f"all {len(found.trials)} trials: {output / 'tune.json'}, {output / 'tune.png'}")
    print(f"again: {command(found.given)}")
    return 0


def seconds(text: str) -> float:
    """ "20m" in seconds.

    Raises:
        UserError: it is no time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or not float(match[1]) > 0:
        raise UserError(f"--budget {text}: give a time such as 90s, 20m or 1.5h.")
    return float(match[1]) * _UNITS[match[2]]


def command(given: dict[str, Any]) -> str:
    """The ``pgn-fast train`` that has these fields of ``TrainConfig``."""
    words = ["pgn-fast", "train"]
    if "data" in given:
        words.append(given["data"])
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "data" or value is None:
            continue
        if value is False:
            flag = "--no-fast" if name == "fast" else f"--no-{name.replace('_', '-')}"
            words.append(flag)
        elif value is True:
            words.append(flag)
        elif isinstance(value, dict):
            # nothing that the shell or KeyValues would take apart
            words += [flag, *(f"{k}={v!r}".replace(" ", "") for k, v in value.items())]
        elif isinstance(value, tuple | list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)
