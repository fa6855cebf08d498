"""What a paper's experiment consists of: runs, their choices, what they cost.

Source of PGN's: github.com/jochemloedeman/PGN, ``scripts/pgn_clip/train_clip_pgn.py``. Source of
VPT's: github.com/KMnP/vpt, ``tune_vtab.py``, ``tune_fgvc.py`` and ``demo.ipynb``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ..config import TrainConfig
from ..protocols import DATA_SETS, DataSet, find

PGN_MODEL = "vit_base_patch32_clip_quickgelu_224.openai"
VPT_MODEL = "vit_base_patch16_224.augreg_in21k"
BASE_RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
WEIGHT_DECAYS = (0.01, 0.001, 0.0001, 0.0)
PROMPTS = (1, 5, 10, 50, 100, 200)
VPT_SEEDS = (42, 44, 82, 100, 800)
VPT_METHODS = ("vpt-deep", "vpt-shallow", "linear")
# of VPT's images, whatever the backbone was trained with
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_PIXELS: dict[str, dict[str, Any]] = {
    # resized to the model's square, nothing random
    "vtab": {
        **_IMAGENET,
        "no_aug": True,
        "crop_mode": "squash",
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    },
    # the shorter side to 256, a random square of 224; here a square of that share of the area
    "fgvc": {
        **_IMAGENET,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "scale": (0.875**2, 0.875**2),
        "ratio": (1.0, 1.0),
        "hflip": 0.5,
    },
}


# options that have no flag of their own, in a message
_SET = re.compile(
    r"`(?!(?:data_dir|model|model_kwargs|method|num_prompts|pretrained_path|weight_decay|workers)`)"
    r"(\w+)`"
)


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Attributes:
        folder: below the plan's, with slashes.
        options: fields of ``TrainConfig``.
        recipe: the published recipe under them.
    """

    folder: str
    options: Mapping[str, Any]
    recipe: str

    def config(self) -> TrainConfig:
        """Raises UserError: an option out of its range."""
        try:
            return TrainConfig.make(self.recipe, **self.options)
        except UserError as error:
            raise UserError(_SET.sub(r"`set` \1", str(error))) from error


@dataclass(frozen=True)
class Experiment:
    """The runs of one data set: a search, if any, and the final runs with what it chose.

    Attributes:
        data: its row.
        search: runs on the training split, scored on validation images; the test images are not
            read.
        final: runs with one seed each; the options that ``search`` leaves open are missing.
        tuned: names of those options.
    """

    data: DataSet
    search: Sequence[Cell]
    final: Sequence[Cell]
    tuned: tuple[str, ...] = ()

    def cells(self) -> Iterable[Cell]:
        return itertools.chain(self.search, self.final)


@dataclass(frozen=True)
class Choices:
    """What the user may choose of an experiment; None: the paper's.

    Attributes:
        common: options of every run: where the data are, the device's precision, and what is
            changed on purpose.
    """

    datasets: Sequence[str] = ()
    suite: str = "vtab"
    method: str = "vpt-deep"
    model: str | None = None
    seeds: Sequence[int] | None = None
    num_prompts: Sequence[int] = PROMPTS
    base_rates: Sequence[float] = BASE_RATES
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    common: Mapping[str, Any] = field(default_factory=dict)


def make_plan(paper: str, choices: Choices) -> list[Experiment]:
    """The experiments of "pgn" or "vpt".

    Raises:
        UserError: a data set that is none of the paper's, or an option out of its range.
    """
    suite = "pgn" if paper == "pgn" else choices.suite
    rows = [_row(name, suite) for name in choices.datasets] or [
        row for row in DATA_SETS.values() if row.suite == suite
    ]
    make = _pgn if paper == "pgn" else _vpt
    plan = [make(row, choices) for row in dict.fromkeys(rows)]
    for cell in itertools.chain.from_iterable(one.cells() for one in plan):
        cell.config()  # what the last run would refuse is said before the first
    return plan


def _row(name: str, suite: str) -> DataSet:
    row = find(name if "/" in name else f"{suite}/{name}")
    if row.suite != suite:
        raise UserError(f"`dataset` {name} is none of {suite}'s; give its data sets only.")
    return row


def _pgn(row: DataSet, choices: Choices) -> Experiment:
    """Training and validation images together, the last epoch, the test images once.

    The official code chooses its epoch by the test images; that is not done here.
    """
    options: dict[str, Any] = {
        "data": row.name,
        "model": choices.model or PGN_MODEL,
        "head": "zero_shot",
        "train_split": "trainval",
    }
    if row.short == "clevr_count":
        options["vflip"] = 0.5
    seeds = choices.seeds or (0,)
    final = [
        Cell(f"{row.name}/seed-{seed}", {**options, "seed": seed, **choices.common}, "pgn-official")
        for seed in seeds
    ]
    return Experiment(row, (), final)


def _vpt(row: DataSet, choices: Choices) -> Experiment:
    """Rate, decay and number of prompts by the validation images, then the published seeds.

    VTAB's final runs train on all 1,000 images; FGVC's on the training split, as the search.
    """
    options: dict[str, Any] = {
        "data": row.name,
        "model": choices.model or VPT_MODEL,
        "method": choices.method,
        **_PIXELS[row.suite],
    }
    if choices.method != "vpt-deep":
        options["prompt_dropout"] = 0.0
    common = {**options, **choices.common}
    folder = f"{row.name}/{choices.method}"
    prompts = (0,) if choices.method == "linear" else choices.num_prompts
    search = []
    for count, rate, decay in itertools.product(prompts, choices.base_rates, choices.weight_decays):
        tuned = _tuned(count, rate, decay)
        search.append(
            Cell(
                f"{folder}/search/p{count}-lr{rate:g}-wd{decay:g}",
                # the last epoch is validated whatever the interval is, and counts alone
                {
                    **tuned,
                    "seed": VPT_SEEDS[0],
                    "test_split": "none",
                    "val_interval": 1000,
                    **common,
                },
                "vpt-official",
            )
        )
    split = {"train_split": "trainval"} if row.suite == "vtab" else {}
    final = [
        Cell(f"{folder}/final/seed-{seed}", {**split, "seed": seed, **common}, "vpt-official")
        for seed in choices.seeds or VPT_SEEDS
    ]
    names = ("num_prompts", "lr_base", "weight_decay", "batch_size")
    return Experiment(row, search, final, tuned=names)


def _tuned(count: int, rate: float, decay: float) -> dict[str, Any]:
    """Batches of 64 images from 100 prompts on, else of 128; ``rate`` is for 256 images."""
    prompts = {"num_prompts": count} if count else {}
    return {
        **prompts,
        "lr_base": rate,
        "lr_base_scale": "linear",
        "weight_decay": decay,
        "batch_size": 64 if count >= 100 else 128,
    }


@dataclass(frozen=True)
class Cost:
    """What runs take: images forward and backward, images forward only, and numbers on disk."""

    runs: int
    trained: int
    scored: int

    def hours(self, images_per_second: float) -> float:
        """A forward alone counts a third of a training step."""
        return (self.trained + self.scored / 3) / images_per_second / 3600


def cost_of(experiment: Experiment) -> Cost:
    """Of all its runs, by the published sizes of the splits."""
    sizes = experiment.data.sizes
    validation = sizes.validation or 0
    trained = scored = runs = 0
    for cell in experiment.cells():
        config = cell.config()
        everything = config.train_split == "trainval"
        trained += config.epochs * (sizes.train + (validation if everything else 0))
        scored += 0 if everything else -(-config.epochs // config.val_interval) * validation
        scored += 0 if config.test_split == "none" else sizes.test
        runs += 1
    return Cost(runs, trained, scored)
