"""What a run says of itself: before it begins, and in ``summary.json`` at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Run
    from .scores import Score


_METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class": "mean class accuracy",
    "map": "mean average precision",
    "auc": "ROC-AUC",
    "loss": "loss",
}


def announcement(run: Run) -> Iterator[str]:
    """Lines of what begins, or continues: images, model, batches."""
    if run.folder.took_over:
        yield run.folder.took_over
    for split in (run.splits.train, run.splits.validation, run.splits.test):
        if split is not None:
            yield f"{split.name}: {len(split)} images: {split.origin}"
            for note in split.notes:
                yield f"{split.name}: {note}"
    count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    yield (
        f"{run.config.method} on {run.config.model}: {count:,} trained parameters, "
        f"{run.splits.num_classes} classes, {run.device}"
    )
    if run.source.batch_size < run.config.batch_size:
        yield (
            f"{len(run.splits.train)} images are fewer than a batch of {run.config.batch_size}: "
            f"batches have {run.source.batch_size}"
        )
    if run.position.updates:
        yield f"continues at epoch {run.position.epoch + 1}, batch {run.position.batch + 1}"


def summarize(run: Run, test: Score | None) -> dict[str, Any]:
    """The content of ``summary.json``: every figure beside the split that it comes from.

    Args:
        run: at its end.
        test: the score on the test images, where there are some.
    """
    record, splits, config = run.record, run.splits, run.config
    best = record.history[record.best_epoch - 1]
    return {
        "method": config.method,
        "model": config.model,
        "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "num_classes": splits.num_classes,
        "best_epoch": record.best_epoch,
        "chosen_by": _chosen_by(run, best),
        "train": {
            "split": splits.train.origin,
            "images": record.images.get("train", len(splits.train)),
            **_of_epoch(best, "train"),
        },
        "validation": splits.validation
        and {
            "split": splits.validation.origin,
            "images": record.images.get("validation", len(splits.validation)),
            **_of_epoch(best, "validation"),
        },
        "test": test and splits.test and {"split": splits.test.origin, **test.as_dict()},
        "stats": run.stepper.times.as_dict(),
        "seconds": round(sum(row["seconds"] for row in record.history), 1),
        "unreadable": {"count": len(record.unreadable), "images": record.unreadable},
        "notes": {
            split.name: list(split.notes)
            for split in (splits.train, splits.validation, splits.test)
            if split is not None and split.notes
        },
        "config": config.as_dict(),
    }


def _chosen_by(run: Run, best: dict[str, Any]) -> str:
    if run.splits.validation is None:
        return "last epoch"
    undefined = best.get("validation_map", math.nan) is None
    return f"validation {_METRICS['loss' if undefined else run.config.eval_metric]}"


def _of_epoch(row: dict[str, Any], split: str) -> dict[str, Any]:
    names = [name for name in ("top1", "map", "loss") if row.get(f"{split}_{name}") is not None]
    return {name: row[f"{split}_{name}"] for name in names}
