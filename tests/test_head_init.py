"""Where a head starts: the ridge probe against its definition, and what it is worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pgn_fast.train import head_init, loop
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.head_init import ridge_probe

CPU = torch.device("cpu")


def blobs(count, width, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, width, generator=generator)
    return centers[labels] + 0.5 * torch.randn(count, width, generator=generator) + 3, labels


@pytest.mark.parametrize("count, width", [(200, 12), (30, 64), (6, 8)])
def test_the_probe_is_ridge_regression(count, width, monkeypatch):
    """Against the normal equations, for one ridge and one temperature."""
    monkeypatch.setattr(head_init, "_RIDGES", [1e-2])
    monkeypatch.setattr(head_init, "_SCALES", [4.0])
    features, labels = blobs(count, width)
    weight, bias = ridge_probe(features, labels, 5)
    x = features.double() - features.double().mean(0)
    y = F.one_hot(labels, 5).double()
    ridge = 1e-2 * x.square().sum()
    expected = torch.linalg.solve(
        x.T @ x + ridge * torch.eye(width, dtype=torch.float64), x.T @ (y - y.mean(0))
    )
    torch.testing.assert_close(weight.double(), 4 * expected.T, rtol=1e-5, atol=1e-6)
    logits = features.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(logits.mean(0), 4 * y.mean(0), rtol=1e-4, atol=1e-4)


def test_left_out_predictions_are_those_of_fits_without_the_image(monkeypatch):
    """The strength that is chosen is the one that an explicit leave-one-out chooses."""
    features, labels = blobs(20, 30, classes=3, seed=1)
    y = F.one_hot(labels, 3).double()
    losses = {}
    for power in (-3, -1, 0):
        monkeypatch.setattr(head_init, "_RIDGES", [10.0**power])
        monkeypatch.setattr(head_init, "_SCALES", [2.0])
        total = (features.double() - features.double().mean(0)).square().sum()
        loss = 0.0
        for i in range(20):
            keep = torch.arange(20) != i
            mean = features[keep].double().mean(0)
            x, target = features[keep].double() - mean, y[keep] - y[keep].mean(0)
            gram = x.T @ x + 10.0**power * total * torch.eye(30, dtype=torch.float64)
            fitted = (features[i].double() - mean) @ torch.linalg.solve(gram, x.T @ target)
            loss += float(F.cross_entropy(2 * (fitted + y[keep].mean(0)), labels[i])) / 20
        losses[power] = loss
    monkeypatch.setattr(head_init, "_RIDGES", [10.0**power for power in losses])
    weight, _ = ridge_probe(features, labels, 3)
    monkeypatch.setattr(head_init, "_RIDGES", [10.0 ** min(losses, key=losses.get)])
    assert torch.equal(weight, ridge_probe(features, labels, 3)[0])


def test_degenerate_features_give_finite_weights():
    for features in (torch.zeros(8, 4), torch.ones(8, 4), torch.eye(8)[:, :4]):
        weight, bias = ridge_probe(features, torch.arange(8) % 2, 3)
        assert weight.isfinite().all() and bias.isfinite().all()


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep", "pgn"])
def test_no_method_starts_below_a_linear_probe(tmp_path, method):
    """200 digits, 10 classes: the first epoch at a rate of nearly zero shows the start."""
    given = {"method": method, "epochs": 1, "lr": 1e-9, "warmup_epochs": 0, "val_fraction": 0.8}
    found = {}
    for init in ("probe", "zero", "official"):
        config = TrainConfig.make(**given, head_init=init)
        loop.train(config, tmp_path / init, device=CPU, show=False)
        row = (tmp_path / init / "history.csv").read_text().splitlines()[1].split(",")
        found[init] = float(row[4]), float(row[5])
    assert found["zero"][0] == pytest.approx(math.log(10), abs=1e-3)
    assert found["probe"][0] < 1.0 and found["probe"][1] > 80
    assert found["official"][0] > math.log(10)
    assert TrainConfig.make(method=method).head_init == "probe"
    assert TrainConfig.make("vpt-official").head_init == "official"
