"""``pgn-fast eval``: score an adapter on labeled images."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..train.config import TrainConfig
from ._options import (
    add_adapter_arguments,
    add_data_arguments,
    add_device_argument,
    add_run_arguments,
    data_fields,
    load_adapter,
    pick_device,
    task_of,
)

if TYPE_CHECKING:
    from ..train.split import Split

HELP = "score an adapter on labeled images"
EPILOG = """\
examples:
  pgn-fast eval runs/pgn/best                              the 797 test digits
  pgn-fast eval runs/photos photos --split val             of a run, best/ is taken
  pgn-fast eval runs/photos/best more_photos --results-file score.json --report report
  torchrun --nproc-per-node 8 -m pgn_fast eval runs/photos photos    each image once
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    data = add_data_arguments(parser)
    data.add_argument(
        "--split", metavar="NAME", help="default: test, else val, or all of a folder without splits"
    )
    parser.add_argument("--results-file", metavar="FILE", help="write the score there as JSON")
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write per_class.csv, confusion_matrix.csv and confusion_matrix.png there",
    )
    add_run_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    config = TrainConfig.make(**data_fields(args))
    device = pick_device(args.device)

    from ..cuda_graphs import graphed_forward
    from ..train.classes import count_classes, match_classes
    from ..train.data import split_to_score
    from ..train.distributed import Processes
    from ..train.evaluation import Autocast, evaluate
    from ..train.loader import eval_transform, make_loader
    from ..train.reports import write_json
    from ..train.score_files import write_details
    from ..train.scores import check_torchmetrics

    # the data first: they are sooner wrong, and sooner found to be
    task = task_of(args) if args.labels else config.task
    check_torchmetrics(task)
    split = split_to_score(dataclasses.replace(config, task=task), args.split)
    given = config.num_classes
    with Processes(device) as processes:
        device = processes.device
        model = load_adapter(args).to(device)
        if not split.streamed:
            split = match_classes(split, model.class_names, args.adapter)
        num_classes = given or 0 if split.streamed else count_classes(split, given)
        _check_fit(args.adapter, model, split, num_classes, task)
        loader = make_loader(
            split,
            eval_transform(model.preprocessing),
            args.batch_size,
            workers=args.workers,
            rank=processes.rank,
            world=processes.world,
        )
        autocast = Autocast(device, args.amp, args.amp_dtype)
        score = evaluate(
            model,
            loader,
            model.num_classes,
            autocast,
            processes,
            task=task,
            details=True,
            forward=graphed_forward(model, autocast, partial(print, file=sys.stderr)),
        )
        if not processes.first:
            return 0
    for note in split.notes:
        print(note, file=sys.stderr)
    for name in score.unreadable:
        print(f"unreadable, left out: {name}")
    print(
        f"{split.name}: {score.line()}  {score.images} of "
        f"{score.images + len(score.unreadable)} images: {split.origin}"
    )
    if args.report:
        names = model.class_names or split.class_names
        for line in write_details(Path(args.report), score, names):
            print(line, file=sys.stderr)
    if args.results_file:
        content = {"adapter": str(args.adapter), "split": split.origin, **score.as_dict()}
        if split.class_names:
            content["class_names"] = list(split.class_names)
        write_json(Path(args.results_file), content)
    return 0


def _check_fit(adapter: str, model: object, split: Split, num_classes: int, task: str) -> None:
    """The adapter's classes are the data's."""
    if getattr(model, "task", task) != task:
        raise UserError(f"{adapter} gives several labels an image: give theirs by --labels FILE.")
    have = model.num_classes  # type: ignore[attr-defined]
    if num_classes and num_classes != have:
        raise UserError(
            f"{split.origin} has {num_classes} classes, the head of {adapter} has {have}."
        )
