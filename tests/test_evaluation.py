"""Scores against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pgn_fast.train.distributed import Processes
from pgn_fast.train.evaluation import Autocast, evaluate
from pgn_fast.train.loader import Batch

CPU = torch.device("cpu")


def score(logits, labels, classes, batch=4):
    batches = [
        Batch(logits[i : i + batch], labels[i : i + batch], torch.arange(i, i + batch), [])
        for i in range(0, len(labels), batch)
    ]
    return evaluate(nn.Identity(), batches, classes, Autocast(CPU), Processes(CPU))


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
