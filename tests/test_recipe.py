"""Schedules against the official codes' recorded rates, optimizers, and what a recipe means."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_world import tiny_vit
from torch import nn

from pgn_fast.errors import UserError
from pgn_fast.methods import METHODS
from pgn_fast.train import recipe
from pgn_fast.train.checks import OFFICIAL_SCHEDULES, SCHEDULES
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.methods import build_model
from pgn_fast.train.recipes import RECIPES

FIXTURES = Path(__file__).parent / "fixtures"


def cases(name):
    return json.loads((FIXTURES / name / "lr_schedule.json").read_text())


@pytest.mark.parametrize("case", cases("official_pgn"), ids=lambda c: f"{c['T_max']}-epochs")
def test_pgn_schedule_is_the_official_one(case):
    config = TrainConfig.make(
        sched="cosine-pgn",
        lr=case["base_lr"],
        epochs=case["T_max"],
        warmup_epochs=case["warmup_epochs"],
        min_lr=case["eta_min"],
    )
    schedule = recipe.official_rates(config)
    rates = [schedule(epoch) for epoch in range(case["T_max"])]
    # the official code computes each rate from the one before, which gathers roundings: 100 of
    # them are 100 * 2**-53 at most
    assert rates == pytest.approx(case["lr_per_epoch"], rel=1.2e-14, abs=0)
    # eta_min is base / 100 in the official script, and here where nothing is said
    assert case["eta_min"] == pytest.approx(case["base_lr"] / 100, rel=1e-15)
    default = recipe.cosine_pgn(case["base_lr"], case["T_max"], case["warmup_epochs"])
    assert [default(epoch) for epoch in range(case["T_max"])] == pytest.approx(rates, rel=1e-15)


@pytest.mark.parametrize("case", cases("official_vpt"), ids=lambda c: f"{c['total']}-epochs")
def test_vpt_schedule_is_the_official_one(case):
    config = TrainConfig.make(
        sched="cosine-vpt",
        lr=case["base_lr"],
        epochs=case["total"],
        warmup_epochs=case["warmup"],
    )
    schedule = recipe.official_rates(config)
    assert [schedule(epoch) for epoch in range(case["total"])] == case["lr_per_epoch"]
    # one rate an epoch
    assert schedule(3.99) == schedule(3)


def test_official_recipes_name_the_official_schedules():
    pgn, vpt = TrainConfig.make("pgn-official"), TrainConfig.make("vpt-official")
    assert (pgn.method, pgn.sched, pgn.opt, pgn.lr, pgn.epochs, pgn.warmup_epochs) == (
        "pgn",
        "cosine-pgn",
        "sgd",
        0.1,
        100,
        50,
    )
    assert (vpt.method, vpt.sched, vpt.opt, vpt.epochs, vpt.warmup_epochs) == (
        "vpt-deep",
        "cosine-vpt",
        "sgd",
        100,
        10,
    )
    assert TrainConfig.make("vpt-official", lr=3.0).lr == 3.0
    assert set(RECIPES) == {"pgn-official", "vpt-official"}


def rates(**given):
    """The rate of every update of a run with four updates an epoch."""
    config = TrainConfig.make(**{"lr": 1.0, **given})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = recipe.Schedule(config, optimizer, updates_per_epoch=4)
    found = []
    for epoch in range(schedule.epochs):
        for update in range(4):
            schedule.set(epoch, update)
            found.append(schedule.rate)
        schedule.end_epoch(epoch, 50.0)
    return found


def test_cosine_warms_up_in_whole_steps():
    found = rates(epochs=10, warmup_epochs=1)
    # no step is lost at rate zero, and the full rate comes when the warm-up is over
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, (1 + math.cos(math.pi / 10)) / 2])
    assert found[20] == pytest.approx(0.5) and 0 < found[-1] < 0.01
    assert rates(epochs=1)[0] == 1.0
    assert rates(epochs=10, warmup_epochs=1, warmup_lr=0.0)[0] == 0.0
    # by default a tenth of the epochs
    assert TrainConfig.make(epochs=5).warmup_epochs == 0.5
    assert TrainConfig.make(epochs=100).warmup_epochs == 3


@pytest.mark.parametrize("sched", [s for s in SCHEDULES if s not in OFFICIAL_SCHEDULES])
def test_schedules_are_timms_from_any_position(sched):
    """A schedule that begins in the middle has the rates of one that did not stop."""
    whole = rates(sched=sched, epochs=6, decay_epochs=1 if sched != "none" else None)
    assert len(whole) == 24 and all(math.isfinite(rate) for rate in whole)
    if sched == "plateau":
        return
    config = TrainConfig.make(sched=sched, epochs=6, lr=1.0, decay_epochs=1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = recipe.Schedule(config, optimizer, updates_per_epoch=4)
    for position in (23, 5, 14):
        schedule.set(*divmod(position, 4))
        assert schedule.rate == whole[position]


@pytest.mark.parametrize("noise", [None, (0.2, 0.9)])
def test_plateau_waits_across_a_resume(noise):
    def run(resume_at=None):
        config = TrainConfig.make(
            sched="plateau", epochs=12, lr=1.0, patience_epochs=2, warmup_epochs=0, lr_noise=noise
        )
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = recipe.Schedule(config, optimizer, 1)
        found = []
        for epoch in range(12):
            if epoch == resume_at:
                state, saved = schedule.state_dict(), optimizer.state_dict()
                optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
                schedule = recipe.Schedule(config, optimizer, 1)
                optimizer.load_state_dict(saved)
                schedule.load_state_dict(state)
            schedule.set(epoch, 0)
            found.append(schedule.rate)
            schedule.end_epoch(epoch, 10.0)
        return found

    assert run() == run(resume_at=5) and len(set(run())) > 2


@pytest.mark.parametrize("worse", [0.0, 3e-5])
def test_plateau_takes_a_loss_that_no_longer_falls_for_one(worse):
    config = TrainConfig.make(
        sched="plateau", epochs=9, lr=1.0, patience_epochs=2, warmup_epochs=0, eval_metric="loss"
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = recipe.Schedule(config, optimizer, 1)
    found = []
    for epoch in range(9):
        found.append(schedule.rate)
        # every second epoch is not validated
        schedule.end_epoch(epoch, -1.0 - worse * epoch if epoch % 2 == 0 else None)
    assert found[0] == 1.0 and found[-1] < 0.2


def test_lr_base_is_scaled_to_the_images_of_a_step():
    """timm's rule: linear for SGD, square root for adaptive optimizers."""
    config = TrainConfig.make(lr_base=0.1, batch_size=64, grad_accum_steps=2, opt="sgd")
    assert recipe.learning_rate(config, world=4) == pytest.approx(0.2)
    config = TrainConfig.make(lr_base=0.1, batch_size=64, opt="adamw")
    assert recipe.learning_rate(config, world=1) == pytest.approx(0.05)
    assert recipe.learning_rate(TrainConfig.make(lr=0.3), world=4) == 0.3


def test_optimizer_is_timms_over_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    config = TrainConfig.make(opt="sgd", lr=0.5, weight_decay=0.1, momentum=0.8)
    optimizer = recipe.make_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.SGD)
    decayed = {g["weight_decay"]: [p.shape for p in g["params"]] for g in optimizer.param_groups}
    assert decayed == {0.0: [model[1].bias.shape], 0.1: [model[1].weight.shape]}
    assert {g["momentum"] for g in optimizer.param_groups} == {0.8}
    recipe.set_learning_rate(optimizer, 0.25)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}
    with pytest.raises(UserError, match="sgdx"):
        recipe.make_optimizer(model, TrainConfig.make(opt="sgdx"))


@pytest.mark.parametrize("method", METHODS)
def test_configuration_survives_json(method):
    config = TrainConfig.make(method=method, scale=(0.5, 1.0), mean=[0.1, 0.2, 0.3])
    again = TrainConfig.make(**json.loads(json.dumps(config.as_dict())))
    assert again == config and again.mean == (0.1, 0.2, 0.3)


def test_pgns_network_keeps_its_pixels_on_digits_alone():
    assert TrainConfig.make().generator_kwargs == {"max_pool": False}
    assert TrainConfig.make(data="photos").generator_kwargs == {}
    # timm's networks do not know that switch
    config = TrainConfig.make(generator="resnet18")
    model = build_model(config, tiny_vit().requires_grad_(False), 10)
    assert model.prompter.mixture_logits(torch.zeros(2, 3, 16, 16)).shape == (2, 16, 256)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"method": "prefix"}, "`method` is 'prefix'; known: pgn, vpt-deep"),
        ({"lr": 0}, "`lr` is 0"),
        ({"lr": math.nan}, "`lr` is nan"),
        ({"epochs": 0}, "`epochs` is 0"),
        ({"num_prompts": 0}, "`num_prompts` is 0; give 1"),
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0"),
        ({"epochs": 3, "warmup_epochs": 4}, "`warmup_epochs` 4 is more than `epochs` 3"),
        ({"clip_grad": -1.0}, "`clip_grad` is -1.0; give > 0"),
        ({"clip_grad": 0.0}, "`clip_grad` is 0.0; give > 0"),
        ({"smoothing": 2.0}, r"`smoothing` is 2.0; give 0 \.\.\. 1"),
        ({"hflip": math.nan}, r"`hflip` is nan; give 0 \.\.\. 1"),
        ({"crop_pct": 0.0}, "`crop_pct` is 0.0; give a share above 0"),
        ({"interpolation": "foo"}, "`interpolation` is 'foo'; known: nearest, bilinear"),
        ({"seed": -1}, "`seed` is -1; give 0 or more"),
        ({"seed": 2**63}, "`seed` is 9223372036854775808; give less"),
        ({"scale": (0.9, 0.1)}, "`scale` is 0.9 0.1; give the smallest and the largest"),
        ({"ratio": (0.0, 1.0)}, "`ratio` is 0 1; give"),
        ({"std": (0.5, 0.0, 0.5)}, "`std` is 0.5 0.0 0.5; give three above 0"),
        ({"recipe": "vit"}, "`recipe` is 'vit'; known: pgn-official, vpt-official"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.make(**given)
