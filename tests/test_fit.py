"""``pgn_fast.fit``: one's own data sets, loaders and dicts through the one training loop."""

from __future__ import annotations

import copy
import os
import signal

import numpy as np
import pytest
import torch
from given_world import OPTIONS, Batches, model, pictures, tensors
from small_world import MODEL, tiny_vit
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
)

import pgn_fast
from pgn_fast.adapters import read_adapter
from pgn_fast.cli import main
from pgn_fast.errors import TrainingStopped, UserError
from pgn_fast.models import LinearProbe
from pgn_fast.train import checkpoints
from pgn_fast.train.step import Stepper


class Columns:
    """What Hugging Face's data sets look like: dicts, and features that name the classes."""

    class _Label:
        names = ("blue", "green", "red")

    features = {"image": None, "label": _Label()}  # noqa: RUF012

    def __init__(self, pairs, image="image", label="label"):
        self.rows = [{image: x, label: y, "id": i} for i, (x, y) in enumerate(pairs)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_a_data_set_trains_and_its_run_is_written(tmp_path):
    one = model()
    frozen = {k: v.clone() for k, v in one.backbone.state_dict().items()}
    data = Columns(pictures())
    options = {**OPTIONS, "no_aug": True, "head_init": "zero"}
    result = pgn_fast.fit(
        one, data, val=data, test=data, epochs=6, output=tmp_path / "run", **options
    )
    assert isinstance(result, pgn_fast.RunResult) and len(result.history) == 6
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.test["images"] == 14 and result.summary["chosen_by"] == "validation top-1"
    adapter, trained = read_adapter(tmp_path / "run" / "best")
    assert adapter["class_names"] == ["blue", "green", "red"]
    # the given model is the best epoch's, on the backbone as it was
    assert all(torch.equal(one.state_dict()[key], trained[key]) for key in trained)
    assert all(torch.equal(one.backbone.state_dict()[key], frozen[key]) for key in frozen)


@pytest.mark.parametrize("kind", ["dicts", "arrays", "tensors", "loader", "loader of dicts"])
def test_every_kind_of_data_gives_the_same_run(tmp_path, kind):
    pairs = pictures(12)
    images, labels = tensors(pairs)
    data = {
        "pairs": pairs,
        "dicts": Columns(pairs, "pixel_values", "labels"),
        "arrays": [(np.array(x), y) for x, y in pairs],
        "tensors": TensorDataset(images, labels),
        "loader": DataLoader(TensorDataset(images, labels), 12),
        "loader of dicts": [{"pixel_values": images, "labels": labels}],
    }
    kept = {}
    for name in ("pairs", kind):
        # one batch an epoch, so that the order of the images does not matter
        options = {**OPTIONS, "batch_size": 12, "no_aug": True, "opt": "sgd"}
        pgn_fast.fit(model(), iter_safe(data[name]), epochs=2, output=tmp_path / name, **options)
        kept[name] = read_adapter(tmp_path / name / "last")[1]
    for key in kept["pairs"]:
        torch.testing.assert_close(kept["pairs"][key], kept[kind][key], rtol=1e-4, atol=1e-5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pictures())


def iter_safe(data):
    batches = isinstance(data, list) and isinstance(data[0], dict)
    return Batches(data) if batches else data


@pytest.mark.parametrize("loader", [False, True])
def test_a_killed_fit_resumes_to_the_bit(tmp_path, monkeypatch, loader):
    pairs = pictures(20)
    data = TensorDataset(*tensors(pairs)) if loader else pairs

    def given():
        return DataLoader(data, 6, shuffle=True) if loader else data

    options = {**OPTIONS, "epochs": 3, "recovery_interval": 1, "mixup": 0.5}
    pgn_fast.fit(model(), given(), output=tmp_path / "whole", **options)
    calls, real = iter(range(1, 100)), checkpoints.save

    def save(output, state):
        real(output, state)
        if next(calls) == 6:
            raise TrainingStopped("killed")

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        patch.setattr(checkpoints, "save", save)
        pgn_fast.fit(model(), given(), output=tmp_path / "torn", **options)
    torch.manual_seed(99)
    pgn_fast.fit(model(), given(), output=tmp_path / "torn", resume=True, **options)
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("whole", "torn"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_fit_that_was_stopped_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    step, folder = Stepper.step, tmp_path / "run"

    def asked(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped) as stop:
        patch.setattr(Stepper, "step", asked)
        pgn_fast.fit(model(), pictures(), output=folder, **{**OPTIONS, "log_interval": 1})
    assert str(stop.value).endswith(
        f"Continue with: pgn_fast.fit(model, train, ..., output={str(folder)!r}, resume=True)"
    )
    # the command line has neither the model nor the data, and says so
    assert main(["train", "--resume", str(folder)]) == 2
    assert "was started by pgn_fast.fit, by a script that has its" in capsys.readouterr().err
    with pytest.raises(UserError, match="has `method` = 'vpt-deep', now 'linear' is asked for"):
        pgn_fast.fit(LinearProbe(tiny_vit(), 3), pictures(), output=folder, resume=True, **OPTIONS)
    result = pgn_fast.fit(model(), pictures(), output=folder, resume=True, **OPTIONS)
    assert len(result.history) == 30
    # what is written names the backbone that was given, and no default
    assert result.summary["model"] == MODEL + "." + tiny_vit().pretrained_cfg["tag"]


def head_after(tmp_path, given, **options):
    """The head's weight after a run of no steps to speak of."""
    options = {**OPTIONS, "lr": 1e-12, "epochs": 1, "no_aug": True, **options}
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    pgn_fast.fit(given, pictures(), output=folder, **options)
    return given.head.weight


def test_a_new_head_starts_as_the_commands_does_and_others_stay(tmp_path):
    new = model()
    before = new.head.weight.clone()
    started = head_after(tmp_path, new).clone()
    assert not torch.allclose(started, before)
    torch.testing.assert_close(head_after(tmp_path, model(), head_init="probe"), started)
    assert head_after(tmp_path, LinearProbe(tiny_vit(), 3)).abs().max() < 1e-9  # zero
    # trained once, it stays; so does one that was chosen, given, loaded or copied
    torch.testing.assert_close(head_after(tmp_path, new), started)
    own = torch.nn.Linear(32, 3)
    torch.manual_seed(1)
    kept = {
        "chosen": pgn_fast.VPT(tiny_vit(), 3, num_prompts=2, head_init="official"),
        "given": pgn_fast.VPT(tiny_vit(), 3, num_prompts=2, head=own),
        "loaded": pgn_fast.from_pretrained(tmp_path / "0" / "best", tiny_vit(), trainable=True),
        "copied": copy.deepcopy(model()),
        "stepped": model(),
    }
    with torch.no_grad():
        kept["stepped"].head.weight.add_(1)
    for name, given in kept.items():
        before = given.head.weight.clone()
        torch.testing.assert_close(head_after(tmp_path, given), before, msg=name)
    again = head_after(tmp_path, kept["copied"], head_init="probe")
    assert not torch.allclose(again, before)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_prompts": 3}, "num_prompts: the model and the data that are given say it"),
        ({"epoch": 3}, "fit takes no epoch"),
        ({"hflip": 7}, "`hflip` is 7"),
        ({"sched": "plateau"}, "follows the validation score, and there are no validation images"),
        ({"train": 5}, r"`train` takes a data set with len\(\) and indices.*got int"),
        ({"train": {"train": []}}, r"is a dict with the keys train; give .* data\['train'\]"),
        ({"train": iter(pictures())}, "list_iterator can be read once only"),
        ({"train": Stream()}, "an IterableDataset such as Stream has no indices; give a loader"),
        ({"train": DataLoader(Stream(), 2)}, "got DataLoader of a data set without len"),
        ({"train": []}, "`train`: the list has no image"),
        ({"train": [{"picture": 1, "label": 0}]}, "has the keys picture, label; an image is"),
        ({"class_names": ["a", "b"]}, "has 3 classes, the data have 2"),
    ],
)
def test_what_cannot_work_creates_nothing(tmp_path, wrong, message):
    data = wrong.pop("train", pictures())
    with pytest.raises(UserError, match=message):
        pgn_fast.fit(model(), data, output=tmp_path / "run", **{**OPTIONS, **wrong})
    assert not (tmp_path / "run").exists()
