"""Figures that papers report, from what a model answered to each image of a split.

Top-k, mean class accuracy and their bootstrap are a line or two each; calibration, confusion
matrices, ROC-AUC and average precision are torchmetrics' (the extra ``metrics``). Its bootstrap is
not taken: a class that is missing in a resample would count there as one without a right answer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

# resamples of the images behind an interval; of multi-label ones each sorts every class's scores
_RESAMPLES = {"multiclass": 1000, "multilabel": 200}
# classes from which a confusion matrix would be larger than the score
_MOST_CONFUSED = 1000
UNDEFINED = "no class has images with it and images without"
INSTALL = "pip install 'pgn_fast[metrics]'"


@dataclass(frozen=True)
class Score:
    """What a model reaches on the images of a split that could be read; shares in percent.

    Attributes:
        loss: mean cross entropy in nats; multi-label: mean binary cross entropy.
        images, unreadable: how many were scored; "name: reason" of those that were not.
        top1, top5: None for multi-label data; top5 with five classes or fewer, too.
        mean_class: mean over the classes that have images: VTAB's and FGVC's figure.
        map, auc: multi-label data: mean over the classes of average precision and of the area under
            the ROC curve. A class counts where some images have it and some have not; nan where
            none does, as torchmetrics has it.
        per_class: top-1 of each class, or its average precision; None where there is none.
        calibration_error: expected, of 15 bins of the top class's probability, or of every class's.
        intervals: of some of these figures, 2.5 % and 97.5 % of a bootstrap over the images.
        confusion: images (C, C) by true class and answer.
    """

    loss: float
    images: int
    unreadable: list[str]
    top1: float | None = None
    top5: float | None = None
    mean_class: float | None = None
    map: float | None = None
    auc: float | None = None
    per_class: list[float | None] = field(default_factory=list)
    calibration_error: float | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    confusion: Tensor | None = None

    def value(self, metric: str) -> float:
        """What an epoch is chosen by, larger is better, by ``TrainConfig.eval_metric``; the loss
        where that is not defined."""
        if metric == "loss":
            return -self.loss
        # with five classes or fewer, every answer is among the first five
        found = self.top1 if metric == "top5" and self.top5 is None else getattr(self, metric)
        assert found is not None
        return -self.loss if math.isnan(found) else found

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without what does not belong to the task, and without the confusion matrix;
        None for what is not defined."""
        other = ("map", "auc") if self.map is None else ("top1", "top5", "mean_class")
        found = {k: v for k, v in vars(self).items() if k not in (*other, "confusion")}
        return found | ({"map": None, "auc": None} if self.undefined else {})

    @property
    def headline(self) -> tuple[str, float | None]:
        """The name of the figure of every epoch, and its value where it is defined."""
        name = "map" if self.top1 is None else "top1"
        return name, None if self.undefined else getattr(self, name)

    @property
    def undefined(self) -> bool:
        """Whether the images tell nothing of several labels."""
        return self.map is not None and math.isnan(self.map)

    def line(self) -> str:
        """The figures in one line, with their intervals where there are some."""
        names = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class"}
        names |= {"map": "mean average precision", "auc": "ROC-AUC"}
        shown = []
        for name, word in names.items():
            if (value := getattr(self, name)) is not None:
                low, high = self.intervals.get(name, (None, None))
                if math.isnan(value):
                    shown.append(f"{word} undefined ({UNDEFINED})")
                    continue
                around = "" if low is None else f" ({low:.2f} ... {high:.2f})"
                shown.append(f"{word} {value:.2f} %{around}")
        shown.append(f"loss {self.loss:.4f}")
        if self.calibration_error is not None:
            shown.append(f"calibration error {self.calibration_error:.2f} %")
        return "  ".join(shown)


def has_torchmetrics() -> bool:
    """Whether the extra ``metrics`` is installed."""
    return importlib.util.find_spec("torchmetrics") is not None


def check_torchmetrics(task: str) -> None:
    """Raises UserError: the scores of this task need torchmetrics, and it is not installed."""
    if task == "multilabel" and not has_torchmetrics():
        raise UserError(f"`task` multilabel is scored by torchmetrics: {INSTALL}")


def multiclass_score(
    labels: Tensor,
    answers: Tensor,
    confidence: Tensor,
    near: Tensor,
    losses: Tensor,
    num_classes: int,
    unreadable: list[str],
    details: bool,
) -> Score:
    """Of images with one class each, everything of shape (n,) on the CPU.

    Args:
        labels, answers: true class and the model's, int64.
        confidence: probability of the answer, 0 ... 1.
        near: whether the true class is among the five most probable.
        losses: cross entropy, nats.
        details: intervals, and calibration and confusion where torchmetrics is there.
    """
    hits = (labels == answers).double()
    images = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels, weights=hits, minlength=num_classes)
    known = images > 0
    each = 100 * right / images

    def resampled(chosen: Tensor) -> list[float]:
        count = torch.bincount(labels[chosen], minlength=num_classes)
        good = torch.bincount(labels[chosen], weights=hits[chosen], minlength=num_classes)
        drawn = count > 0
        return [
            100 * float(good.sum()) / len(chosen),
            100 * float((good[drawn] / count[drawn]).mean()),
        ]

    figures: dict[str, Any] = {}
    if details:
        intervals = bootstrap(resampled, len(labels), _RESAMPLES["multiclass"])
        figures["intervals"] = dict(zip(("top1", "mean_class"), intervals, strict=True))
    if details and has_torchmetrics():
        from torchmetrics.functional import classification as metrics

        # of the top class: its probability against whether it was right
        error = metrics.binary_calibration_error(confidence.double(), hits.long(), n_bins=15)
        figures["calibration_error"] = 100 * float(error)
        if num_classes <= _MOST_CONFUSED:
            figures["confusion"] = metrics.multiclass_confusion_matrix(answers, labels, num_classes)
    return Score(
        loss=float(losses.double().mean()),
        images=len(labels),
        unreadable=unreadable,
        top1=100 * float(hits.mean()),
        top5=100 * float(near.double().mean()) if num_classes > 5 else None,
        mean_class=float(each[known].mean()),
        per_class=[float(e) if k else None for e, k in zip(each, known, strict=True)],
        **figures,
    )


def multilabel_score(
    targets: Tensor, probabilities: Tensor, losses: Tensor, unreadable: list[str], details: bool
) -> Score:
    """Of images with any number of classes.

    Args:
        targets: (n, C) int64, 0 or 1.
        probabilities: (n, C), 0 ... 1.
        losses: (n,), binary cross entropy, a mean over the classes, nats.
        details: intervals and calibration.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed; see ``has_torchmetrics``.
    """
    from torchmetrics.functional import classification as metrics

    def figures(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which classes count, and their average precisions and areas."""
        positive = targets[chosen].sum(0)
        known = (positive > 0) & (positive < len(chosen))
        count = int(known.sum())
        if count == 0:
            return known, torch.zeros(0), torch.zeros(0)
        found, true = probabilities[chosen][:, known], targets[chosen][:, known]
        if count == 1:  # torchmetrics wants two labels
            one = metrics.binary_average_precision(found[:, 0], true[:, 0])
            return known, one[None], metrics.binary_auroc(found[:, 0], true[:, 0])[None]
        precision = metrics.multilabel_average_precision(found, true, count, average=None)
        return known, precision, metrics.multilabel_auroc(found, true, count, average=None)

    def means(chosen: Tensor) -> list[float]:
        _, precision, area = figures(chosen)
        return [100 * float(x.mean()) for x in (precision, area)]  # nan where no class counts

    everything = torch.arange(len(targets))
    known, precision, _ = figures(everything)
    each: list[float | None] = [None] * targets.shape[1]
    for place, value in zip(known.nonzero().flatten().tolist(), precision.tolist(), strict=True):
        each[place] = 100 * value
    mean, area = means(everything)
    more: dict[str, Any] = {}
    if details and bool(known.any()):
        intervals = bootstrap(means, len(targets), _RESAMPLES["multilabel"])
        more["intervals"] = dict(zip(("map", "auc"), intervals, strict=True))
    if details:
        flat = probabilities.flatten(), targets.flatten()
        more["calibration_error"] = 100 * float(metrics.binary_calibration_error(*flat, n_bins=15))
    loss = float(losses.double().mean())
    return Score(loss, len(targets), unreadable, map=mean, auc=area, per_class=each, **more)


def bootstrap(
    statistics: Callable[[Tensor], list[float]], count: int, resamples: int
) -> list[list[float]]:
    """For each statistic the values that 2.5 % and 97.5 % of the resamples stay below.

    Args:
        statistics: of the images with these numbers, (count,) int64, some of them repeated; nan
            where these tell nothing, which is left out.
        count: images. The resamples are the same ones every time.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [
        statistics(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    values = torch.tensor(drawn, dtype=torch.float64)  # (resamples, statistics)
    return values.nanquantile(ends, dim=0).T.tolist()
