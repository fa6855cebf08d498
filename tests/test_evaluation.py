"""Scores against their definitions."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import nn

from pgn_fast.errors import UserError
from pgn_fast.train import score_files, scores
from pgn_fast.train.distributed import Processes
from pgn_fast.train.evaluation import Autocast, evaluate
from pgn_fast.train.loader import Batch

CPU = torch.device("cpu")


def score(logits, labels, classes, batch=4, **options):
    batches = [
        Batch(
            logits[i : i + batch],
            labels[i : i + batch],
            torch.arange(len(labels))[i : i + batch],
            [],
        )
        for i in range(0, len(labels), batch)
    ]
    return evaluate(nn.Identity(), batches, classes, Autocast(CPU), Processes(CPU), **options)


def test_scores_are_their_definitions():
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(23) % 6  # the last class has no image
    labels[:9] = 0
    found = score(logits, labels, 7)
    right = logits.argmax(1) == labels
    assert found.top1 == pytest.approx(100 * right.double().mean())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    near = (logits.topk(5).indices == labels[:, None]).any(1)
    assert found.top5 == pytest.approx(100 * near.double().mean())
    each = [100 * right[labels == c].double().mean().item() for c in range(6)]
    assert found.per_class == [*map(pytest.approx, each), None]
    assert found.mean_class == pytest.approx(sum(each) / 6) != found.top1
    assert found.images == 23
    assert [found.value(m) for m in ("top1", "top5", "mean_class", "loss")] == [
        found.top1,
        found.top5,
        found.mean_class,
        -found.loss,
    ]
    few = score(logits[:, :5], labels.clamp(max=4), 5)
    assert few.top5 is None and few.value("top5") == few.top1


def many(count=40, classes=4, seed=0):
    """Logits that know something of their labels, single ones or vectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = (torch.rand(count, classes, generator=generator) < 0.3).float()
    noise = torch.randn(count, classes, generator=generator)
    return noise + 2 * vectors, vectors


def test_details_are_their_definitions():
    pytest.importorskip("torchmetrics")
    logits = 2 * torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 6
    found = score(logits, labels, 7, details=True)
    best = logits.softmax(1).max(1)
    right = (best.indices == labels).double()
    # of 15 bins of the confidence: share of the images, times how far it is from what is right
    error = 0.0
    for low in range(15):
        inside = (best.values > low / 15) & (best.values <= (low + 1) / 15)
        if inside.any():
            gap = right[inside].mean() - best.values[inside].double().mean()
            error += float(inside.double().mean() * gap.abs())
    assert found.calibration_error == pytest.approx(100 * error, abs=1e-3)
    assert found.confusion.shape == (7, 7)
    for true, answer in ((0, 0), (3, 5), (6, 1)):
        count = ((labels == true) & (best.indices == answer)).sum()
        assert found.confusion[true, answer] == count
    low, high = found.intervals["top1"]
    # 1.96 standard errors of a share, about
    width = 1.96 * 100 * float((right.mean() * (1 - right.mean()) / 200).sqrt())
    assert low < found.top1 < high and high - low == pytest.approx(2 * width, rel=0.15)
    assert found.intervals == score(logits, labels, 7, details=True).intervals
    assert f"({low:.2f} ... {high:.2f})" in found.line() and "calibration error" in found.line()
    assert "confusion" not in found.as_dict()


def test_a_bootstrap_counts_classes_that_it_drew():
    """Mean class accuracy where a class has one image, which a third of the resamples lack."""
    logits = torch.eye(3)[[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
    labels = torch.tensor([0] * 9 + [1])
    found = score(logits, labels, 3, details=True)
    assert found.top1 == found.mean_class == 100
    assert found.intervals["mean_class"] == [100, 100]


def test_several_labels_are_scored_by_their_definitions():
    pytest.importorskip("torchmetrics")
    logits, vectors = many()
    vectors[:, 3] = 0  # no image has the last class
    found = score(logits, vectors, 4, task="multilabel", details=True)
    precisions, areas = [], []
    for c in range(3):
        order = logits[:, c].argsort(descending=True)
        hits = vectors[order, c]
        precision = hits.cumsum(0) / torch.arange(1, 41)
        precisions.append(float(100 * (precision * hits).sum() / hits.sum()))
        pairs = logits[vectors[:, c] == 1, c][:, None] > logits[vectors[:, c] == 0, c][None]
        areas.append(100 * float(pairs.float().mean()))
    assert found.per_class[3] is None
    assert found.per_class[:3] == pytest.approx(precisions, abs=1e-3)
    assert found.map == pytest.approx(sum(precisions) / 3, abs=1e-3)
    assert found.auc == pytest.approx(sum(areas) / 3, abs=1e-3)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, vectors)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.top1 is None and not {"top1", "top5"} & set(found.as_dict())
    assert found.value("map") == found.map and found.value("auc") == found.auc
    low, high = found.intervals["map"]
    assert low < found.map < high


@pytest.mark.parametrize("every", [0, 1])
def test_several_labels_that_tell_nothing_have_no_score(every):
    """No class has images with it and without: torchmetrics' nan, and no bad model's 0."""
    pytest.importorskip("torchmetrics")
    logits, vectors = many()
    found = score(logits, torch.full_like(vectors, every), 4, task="multilabel", details=True)
    assert math.isnan(found.map) and math.isnan(found.auc) and found.per_class == [None] * 4
    told = found.as_dict()
    assert told["map"] is told["auc"] is None and found.headline == ("map", None)
    assert json.loads(json.dumps(told, allow_nan=False))["loss"] == found.loss
    assert found.value("map") == found.value("auc") == -found.loss
    assert "mean average precision undefined (no class has images with it" in found.line()


def test_labels_of_the_other_task_are_answered():
    logits, vectors = many()
    with pytest.raises(UserError, match="give `task` multilabel"):
        score(logits, vectors, 4)
    with pytest.raises(UserError, match="needs a vector of 0 and 1 for each image"):
        score(logits, torch.zeros(40, dtype=torch.int64), 4, task="multilabel")


def test_a_report_has_tables_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("matplotlib")
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    found = score(logits, torch.arange(50) % 3, 3, details=True)
    assert score_files.write_details(tmp_path, found, ["a", "b", "ü"]) == []
    with open(tmp_path / "confusion_matrix.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["a", "b", "ü"]
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == found.confusion.tolist()
    with open(tmp_path / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == pytest.approx(found.per_class, abs=1e-4)
    assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(scores, "has_torchmetrics", lambda: False)
    monkeypatch.setattr(score_files, "has_torchmetrics", lambda: False)
    plain = score(logits, torch.arange(50) % 3, 3, details=True)
    assert plain.confusion is None and plain.top1 == found.top1 and plain.intervals
    (line,) = score_files.write_details(tmp_path / "plain", plain, None)
    assert "pip install 'pgn_fast[metrics]'" in line
    with pytest.raises(UserError, match="is scored by torchmetrics"):
        scores.check_torchmetrics("multilabel")
