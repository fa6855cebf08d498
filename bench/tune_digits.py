"""What ``pgn-fast tune`` finds on the packaged digits against the rates that were chosen by hand.

    python bench/tune_digits.py --rows bench/results/tune.jsonl

For VPT-Deep and PGN, of the sizes of the demonstration: a search of ``--seconds``, as ``pgn-fast
tune digits --budget 3m --method vpt-deep --num-prompts 32 --epochs 20 --val-fraction 0.2`` makes
it, then runs of ``pgn-fast train`` with what it found and with the rates of
``pgn_fast.demo.recipes``. Both have the same images, epochs and seeds; each seed carves validation
images of its own, by which its run chooses its best epoch, and its test images are read once. The
search has the first seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import rows

from pgn_fast.demo.recipes import RECIPES
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.loop import train
from pgn_fast.train.tune import tune


def finish(given: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The summary of a run with this seed."""
    config = TrainConfig.make(**given | {"seed": seed})
    return train(config, folder / f"seed{seed}", show=False)


def row(method: str, who: str, summaries: list[dict[str, Any]], **facts: Any) -> rows.Row:
    """The mean of the seeds' test scores."""
    scores = [summary["test"]["top1"] for summary in summaries]
    config = summaries[0]["config"]
    facts |= {name: config[name] for name in ("lr", "weight_decay", "method_kwargs", "epochs")}
    facts |= {"top1": scores, "sd": statistics.stdev(scores)}
    facts["validation"] = [summary["validation"]["top1"] for summary in summaries]
    return rows.Row(
        *("tune", f"digits, {method}", who, statistics.mean(scores), "%"),
        rounds=len(scores),
        facts=facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="budget of each search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["vpt-deep", "pgn"], choices=RECIPES)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    made: list[rows.Row] = []
    for method in args.methods:
        recipe = RECIPES[method]
        given = {"method": method, "epochs": recipe.epochs, "batch_size": recipe.batch_size}
        given |= {"head_init": recipe.head_init, "val_fraction": 0.2, "seed": 0, "workers": 0}
        given |= recipe.options
        rates = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = tune(given, folder / "tune", seconds=args.seconds)
            spent = sum(trial.spent for trial in found.trials)
            others = range(1, args.seeds)
            tuned = [finish(found.given, seed, folder / "tuned") for seed in others]
            hand = [finish(given | rates, seed, folder / "hand") for seed in range(args.seeds)]
        facts = {"trials": len(found.trials), "seconds of the search": spent}
        made.append(row(method, "tuned", [found.summary, *tuned], **facts))
        made.append(row(method, "by hand", hand))
        for one in made[-2:]:
            print(one.case, one.contender, f"{one.value:.2f} %", one.facts, flush=True)
        if args.rows:
            rows.write(args.rows, made)


if __name__ == "__main__":
    main()
