"""``summary.json``: what a run reached, on which images, by which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import Score
    from .run import Run


_METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class accuracy", "loss": "loss"}


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
        "chosen_by": f"validation {_METRICS[config.eval_metric]}"
        if splits.validation
        else "last epoch",
        "train": {
            "split": splits.train.origin,
            "images": len(splits.train),
            "top1": best["train_top1"],
            "loss": best["train_loss"],
        },
        "validation": splits.validation
        and {
            "split": splits.validation.origin,
            "images": len(splits.validation),
            "top1": best["validation_top1"],
            "loss": best["validation_loss"],
        },
        "test": test and splits.test and {"split": splits.test.origin, **test.as_dict()},
        "seconds": round(sum(row["seconds"] for row in record.history), 1),
        "unreadable": {"count": len(record.unreadable), "images": record.unreadable},
        "notes": {
            split.name: list(split.notes)
            for split in (splits.train, splits.validation, splits.test)
            if split is not None and split.notes
        },
        "config": config.as_dict(),
    }
