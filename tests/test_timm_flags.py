"""Every flag of timm's train.py, from a list of its parser's arguments: accepted, or answered."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from small_world import SIZES, tiny_config, tiny_vit, tiny_vit_kwargs, write_images
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad

from pgn_fast.adapters import read_adapter
from pgn_fast.cli import build_parser, main
from pgn_fast.cli._timm import ALREADY_SO, REFUSED
from pgn_fast.models import FineTuned
from pgn_fast.train import checkpoints, loop
from pgn_fast.train.average import Average
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.distributed import Processes
from pgn_fast.train.objective import Objective
from pgn_fast.train.recipe import make_optimizer
from pgn_fast.train.step import Stepper

CPU = torch.device("cpu")
HEAD = ("head.weight", "head.bias")
LIST = json.loads((Path(__file__).parent / "fixtures" / "timm_train_flags.json").read_text())
ARGUMENTS = [a for a in LIST["arguments"] if a["flags"][0].startswith("-")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_images(root / "data" / "train", 7)
    write_images(root / "data" / "val", 3, seed=1)
    tiny_vit_kwargs(root)
    return root


def configure(world, **changes):
    values = {"method": "vpt-deep", "library_size": 4, "batch_size": 6, "epochs": 3, "lr": 0.02}
    return tiny_config(world, **values | changes)


def parser():
    commands = next(
        a for a in build_parser("train")._actions if isinstance(a, argparse._SubParsersAction)
    )
    return commands.choices["train"]


def words_for(argument, flag):
    """The flag with a value of timm's type that both parsers take."""
    if argument.get("action") in ("store_true", "store_false"):
        return [flag]
    own = next(a for a in parser()._actions if flag in a.option_strings)
    value = {"int": "3", "float": "0.5"}.get(argument.get("type"), "a=1")
    if own.choices:
        value = str(next(iter(own.choices)))
    count = own.nargs if isinstance(own.nargs, int) else 1
    return [flag, *[value] * (count or 1)]


def test_the_list_is_timms():
    assert LIST["source"].endswith("/train.py") and len(LIST["arguments"]) == 173


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda a: a["flags"][0])
def test_every_flag_is_accepted_or_answered(argument, capsys):
    for flag in argument["flags"]:
        own = next((a for a in parser()._actions if flag in a.option_strings), None)
        assert own is not None, flag
        if own.option_strings[0] in REFUSED:
            assert main(["train", *words_for(argument, flag)]) == 2
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert f"{flag}: {REFUSED[own.option_strings[0]]}" in line
        elif flag not in ("--device-modules", "--input-size"):
            parser().parse_args(words_for(argument, flag))
    assert not set(ALREADY_SO) & set(REFUSED)


EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "mixup_off_epoch": 2,
    "model_ema": True,
    "model_ema_decay": 0.8,
    "model_ema_warmup": True,
    "layer_decay": 0.7,
    "opt_betas": (0.8, 0.95),
    "clip_grad": 1.0,
    "clip_mode": "agc",
    "lr_noise": (0.2, 0.9),
    "reprob": 0.5,
    "gaussian_blur_prob": 0.3,
    "train_interpolation": "random",
    "prompt_dropout": 0.2,
    "val_interval": 2,
    "checkpoint_hist": 2,
    "eval_metric": "loss",
    "recovery_interval": 1,
}


class Stopped(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bce_loss": True, "mixup_mode": "elem", "sched": "step", "decay_epochs": 1},
        {"method": "pgn", "grad_accum_steps": 2, "bn_momentum": 0.3, "sched": "plateau"},
        {"amp": True, "amp_dtype": "float16", "opt": "lamb", "sched": "poly", "cutmix": 0.0},
        {"method": "full", "cutmix_minmax": (0.2, 0.8), "aa": "rand-m3-n1", "opt": "lion"},
        {"sched": "plateau", "epochs": 5, "lr_noise": (0.2, 1.0), "mixup_off_epoch": 0},
    ],
    ids=["cross-entropy", "bce", "pgn", "float16", "full", "plateau with noise"],
)
def test_kill_and_resume_is_exact_with_all_of_them(world, tmp_path, monkeypatch, changes):
    config = configure(world, **{**EVERYTHING, **changes})
    loop.train(config, tmp_path / "whole", device=CPU, show=False)
    for at in (3, 6):
        calls = iter(range(1, 100))
        real = checkpoints.save

        def save(output, state, calls=calls, at=at, real=real):
            real(output, state)
            if next(calls) == at:
                raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(checkpoints, "save", save)
            loop.train(config, tmp_path / str(at), device=CPU, show=False)
        loop.train(config, tmp_path / str(at), device=CPU, resume=True, show=False)
        one, two = (checkpoints.load(tmp_path / name) for name in ("whole", str(at)))
        for part in ("model", "average"):
            assert one[part].keys() == two[part].keys() and one[part]
            assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])
        runs = ("whole", str(at))
        kept = [sorted(p.name for p in (tmp_path / n / "epochs").iterdir()) for n in runs]
        assert kept[0] == kept[1] and 1 <= len(kept[0]) <= 2
        adapters = [read_adapter(tmp_path / name / "best")[1] for name in runs]
        assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_validation_at_intervals_and_the_metric_that_chooses(world, tmp_path):
    config = configure(world, epochs=4, val_interval=3, eval_metric="loss")
    summary = loop.train(config, tmp_path, device=CPU, show=False)
    history = checkpoints.load(tmp_path)["record"]["history"]
    assert [row["epoch"] for row in history if "validation_loss" in row] == [3, 4]
    best = min((r for r in history if "validation_loss" in r), key=lambda r: r["validation_loss"])
    assert summary["best_epoch"] == best["epoch"] and summary["chosen_by"] == "validation loss"


def test_mixed_targets_are_timms_and_odd_batches_are_whole():
    config = TrainConfig.make(mixup=1.0, smoothing=0.1)
    objective = Objective(config, 4, CPU)
    images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 1])
    mixed, targets = objective.mix(images, labels, epoch=0)
    assert mixed.shape == images.shape and targets.shape == (5, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    assert torch.equal(mixed[4], images[4]) and targets[4].argmax() == 1
    logits = torch.randn(5, 4)
    expected = -(targets * logits.log_softmax(1)).sum()
    torch.testing.assert_close(objective(logits, targets), expected)
    off = Objective(TrainConfig.make(mixup=1.0, mixup_off_epoch=1), 4, CPU)
    assert torch.equal(off.mix(images, labels, epoch=1)[0], images)
    plain = Objective(TrainConfig.make(smoothing=0.2), 4, CPU)
    assert torch.equal(plain.mix(images, labels, epoch=0)[1], labels)


def test_the_average_is_timms_over_what_is_trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    average = Average(model, TrainConfig.make(model_ema=True, model_ema_decay=0.5))
    whole = ModelEmaV3(model, decay=0.5)
    for step in range(1, 4):
        with torch.no_grad():
            model[1].weight += step
        average.update(step)
        whole.update(model, step=step)
    assert not any(name.startswith("0.") for name in average.state_dict())
    now = model[1].weight.clone()
    with average.applied():
        assert torch.equal(model[1].weight, whole.module[1].weight)
        assert not torch.equal(model[1].weight, now)
    assert torch.equal(model[1].weight, now)


@pytest.mark.parametrize("mode", ["layer decay", "agc"])
def test_fine_tuning_steps_as_timms_own_model(mode):
    """The rates of layers, and which gradients are clipped adaptively, go by the model's shape."""
    changes = {"layer_decay": 0.5} if mode == "layer decay" else {"clip_grad": 0.01}
    config = TrainConfig.make(
        method="full", opt="sgd", lr=0.1, smoothing=0.1, clip_mode="agc", **changes
    )
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES)
    ours = FineTuned(tiny_vit(), 3)
    ours.preprocessing = {"input_size": (3, 16, 16)}
    state = plain.state_dict()
    ours.load_state_dict({k if k in HEAD else f"backbone.{k}": v for k, v in state.items()})
    stepper = Stepper(config, ours, Objective(config, 3, CPU), Processes(CPU), lambda x: x)
    stepper.optimizer = make_optimizer(ours, config)
    theirs = make_optimizer(plain, config)
    for optimizer in (stepper.optimizer, theirs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    stepper.step([(images, labels)], 0, 1)
    torch.nn.functional.cross_entropy(plain(images), labels, label_smoothing=0.1).backward()
    if mode == "agc":
        dispatch_clip_grad(model_parameters(plain, exclude_head=True), 0.01, mode="agc")
    theirs.step()
    for name, value in plain.state_dict().items():
        key = name if name in HEAD else f"backbone.{name}"
        torch.testing.assert_close(ours.state_dict()[key], value, msg=name)


def test_settings_come_from_a_file_and_go_into_one(world, tmp_path, capsys):
    config = configure(world, epochs=1, mixup=0.3)
    loop.train(config, tmp_path / "first", device=CPU, show=False)
    args = tmp_path / "first" / "args.yaml"
    words = ["train", "-c", str(args), "--output", str(tmp_path), "--experiment", "second"]
    assert main([*words, "--device", "cpu"]) == 0
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("first", "second"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    # a flag takes the file's place
    again = yaml.safe_load((tmp_path / "second" / "args.yaml").read_text())
    assert again["mixup"] == 0.3 and again["epochs"] == 1
    args.write_text("epoch: 3\n")
    assert main(["train", "-c", str(args)]) == 2
    assert "epoch is no setting of this command; did you mean epochs?" in capsys.readouterr().err


def test_timms_names_for_the_backbone_set_its_keywords():
    words = ["--img-size", "112", "--model-kwargs", "depth=2", "--gp", "avg"]
    assert parser().parse_args(words).model_kwargs == {
        "img_size": 112,
        "depth": 2,
        "global_pool": "avg",
    }
    size = parser().parse_args(["--input-size", "3", "96", "128"]).model_kwargs
    assert size == {"img_size": (96, 128)}
