"""``pgn-fast verify``: whether an adapter is whole, fits its backbone, and scores as recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._options import (
    adapter_folder,
    add_adapter_arguments,
    add_device_argument,
    add_run_arguments,
    load_adapter,
    pick_device,
)

HELP = "check an adapter: digests, shapes, and its scores where the data are at hand"
EPILOG = """\
examples:
  pgn-fast verify runs/pgn                                 digests, shapes, scores of the run
  pgn-fast verify runs/pgn/best --no-scores
"""
# one image of a test split may fall the other way on another processor
_TOLERANCE = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("--no-scores", action="store_true", help="digests and shapes only")
    add_run_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..adapters import read_adapter
    from ..backbone.digest import backbone_digest
    from .push import run_summary

    device = pick_device(args.device)
    folder = Path(adapter_folder(args.adapter))
    config, tensors = read_adapter(folder)
    numbers = sum(t.numel() for t in tensors.values())
    recorded = config.get("weights_digest")
    print(f"weights: {numbers:,d} numbers in {len(tensors)} tensors, ", end="")
    print("digest as recorded" if recorded else "no digest recorded")
    model = load_adapter(args)
    print(f"backbone: {config.get('base_model_name_or_path') or 'as given'}, shapes fit")
    wanted = config.get("backbone_digest")
    if wanted is None:
        print("backbone: no digest recorded, so its weights are not known to be those")
    else:
        found = backbone_digest(model.backbone, head=config.get("head") == "keep")
        if found != wanted:
            raise UserError(
                f"{folder}: trained on a backbone with digest {wanted[:16]}…, this one has "
                f"{found[:16]}…: other weights. Give the right one by --model."
            )
        print(f"backbone: digest {wanted[:16]}… as recorded")
    summary = None if args.no_scores else run_summary(folder)
    if summary is None:
        print("scores: not checked" + ("" if args.no_scores else ", no run's summary beside it"))
        return 0
    return _check_scores(args, model.to(device), summary)


def _check_scores(args: argparse.Namespace, model: Any, summary: dict[str, Any]) -> int:
    from ..train.config import TrainConfig
    from ..train.data import load_splits
    from ..train.distributed import Processes
    from ..train.evaluation import Autocast, evaluate
    from ..train.loader import eval_transform, make_loader

    fields = TrainConfig.make().as_dict()
    config = TrainConfig.make(**{n: v for n, v in summary["config"].items() if n in fields})
    device = next(model.parameters()).device
    try:
        splits = load_splits(config)
    except UserError as error:
        print(f"scores: not checked, the data are not at hand ({error})")
        return 0
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        recorded = summary.get(name)
        if not recorded or split is None:
            continue
        loader = make_loader(
            split, eval_transform(model.preprocessing), args.batch_size, workers=args.workers
        )
        autocast = Autocast(device, args.amp, args.amp_dtype)
        score = evaluate(
            model, loader, model.num_classes, autocast, Processes(device), task=config.task
        )
        if score.top1 is None:
            assert score.map is not None
            said = f"mean average precision {score.map:.2f} %, recorded {recorded['map']:.2f} %"
            if abs(score.map - recorded["map"]) > 0.01:
                raise UserError(f"{name}: {said}.")
            print(f"{name}: {said}, {score.images} images")
            continue
        off = abs(score.top1 - recorded["top1"]) * score.images / 100
        said = f"{name}: top-1 {score.top1:.2f} %, recorded {recorded['top1']:.2f} %"
        if off > _TOLERANCE + 1e-6:
            raise UserError(f"{said}: {off:.0f} images of {score.images} differ.")
        print(f"{said}, {score.images} images")
    return 0
