"""``pgn-fast demo``: what prompts add to a frozen backbone, on handwritten digits, in minutes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import UserError

HELP = "see linear probe, VPT and PGN compete on handwritten digits, offline, in minutes"
EPILOG = """\
The packaged backbone (1.2 million parameters, pretrained by this repository on procedural images)
is frozen and adapted to the packaged handwritten digits: 1,000 images to train, 797 to test.

examples:
  pgn-fast demo                          the table, and plots under outputs/demo
  pgn-fast demo --quick                  seconds: does it run here?
  pgn-fast demo --rgb                    prompts as pixels, with a picture of them
  pgn-fast demo --split validation       what the recipes were chosen by
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=_count, default=3, metavar="N", help="runs of each method (default: 3)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/demo"),
        metavar="DIR",
        help="for plots and demo.json (default: outputs/demo)",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the JSON there as well (bench/results)"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="score on the 797 test images, or on 200 kept back from the 1,000 (default: test)",
    )
    parser.add_argument(
        "--rgb",
        action="store_true",
        help="prompts as pixels instead: train in gamut, deploy as 8-bit canvases; rgb.json, and "
        "one picture",
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each, for tests")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no number of runs; give 1 or more")
    return value


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..demo import report
    from ..demo.recipes import RECIPES

    console = Console(highlight=False)
    if args.rgb:
        from ..demo import rgb

        if args.split != "test":
            raise UserError("--rgb scores the test images: leave --split out.")
        recipe = report.quick_recipes()["pgn"] if args.quick else None
        results = []
        for seed in range(1 if args.quick else args.seeds):
            # one picture, of the first run
            results.append(rgb.run(None if seed else args.output, seed, recipe=recipe))
            console.print(str(results[-1]))
        files = rgb.write(results, args.output, _command(args), args.record)
        console.print(f"written: {', '.join(map(str, files))}")
        return 0
    recipes = report.quick_recipes() if args.quick else RECIPES
    made = report.run_all(
        recipes, 1 if args.quick else args.seeds, split=args.split, say=console.print
    )
    written = report.write(made, args.output, _command(args), args.record)
    console.print(report.table(made))
    for line in report.differences(made):
        console.print(line)
    console.print(f"{made.total_seconds:.0f} s in all; written: {', '.join(map(str, written))}")
    return 0


def _command(args: argparse.Namespace) -> str:
    words = ["pgn-fast", "demo", "--seeds", str(args.seeds), "--split", args.split]
    if args.rgb:
        words = ["pgn-fast", "demo", "--rgb", "--seeds", str(args.seeds)]
    if args.quick:
        words.append("--quick")
    return shlex.join(words)
