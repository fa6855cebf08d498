"""bench/real_images.py without its backbone: jobs side by side, its search, its rows, one run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    # processes import this module by the name that pytest gave it
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path, str(BENCH.parent)])
    return importlib.import_module


def worked(order):
    """A job, in its process."""
    if order == "raise":
        raise ValueError("a word of its own")
    if order == "die":
        os.write(2, b"last words\n")
        os._exit(3)
    if order == "sleep":
        time.sleep(600)
    return os.getpid(), order, os.environ.get("OMP_NUM_THREADS")


def test_a_job_that_fails_or_dies_costs_its_own_answer(bench, tmp_path):
    side = bench("side_by_side")
    answers, reasons = [], {}

    def job(order, priority=0.0):
        return side.Job(priority, order, lambda told, why: then(order, told, why))

    def then(order, told, why):
        if told is None:
            reasons[order] = why
        else:
            answers.append(told)
        return [job("after one", -1.0)] if order == 1 else []

    orders = [1, "raise", 2, "die", 3]
    jobs = [job(order, priority) for priority, order in enumerate(orders)]
    assert side.work_off(jobs, worked, processes=1, logs=tmp_path / "logs")
    assert [order for _, order, _ in answers] == [1, "after one", 2, 3]
    assert "ValueError: a word of its own" in reasons["raise"]
    assert reasons["die"].endswith("last words\nits process ended with code 3")
    # one process for what followed each other, a new one after each error
    assert len({process for process, _, _ in answers}) == 3


def test_the_limit_ends_what_runs(bench, tmp_path):
    side = bench("side_by_side")
    jobs = [side.Job(0, order, lambda told, why: []) for order in ("sleep", 1)]
    assert not side.work_off(jobs, worked, processes=1, logs=tmp_path, limit=1)


def test_rates_are_spread_evenly_over_their_range(bench):
    images = bench("real_images")
    contender = images.Contender({}, rates=(1e-4, 1e-2), decays=(0.1, 10.0))
    tried = images.draws(contender, 8)
    assert tried == images.draws(contender, 8)
    for name, (low, high) in (("lr", (1e-4, 1e-2)), ("weight_decay", (0.1, 10.0))):
        places = np.sort(np.log([one[name] / low for one in tried]) / np.log(high / low))
        np.testing.assert_allclose(places, (np.arange(8) + 0.5) / 8, atol=1e-3)


@pytest.fixture
def study(bench, tmp_path):
    """Two contenders of one search: a trial's score is best at the third rate, and one fails."""
    images = bench("real_images")
    leader = images.Contender({"method": "pgn"}, (1e-4, 1e-2))
    follower = images.Contender({"method": "pgn"}, (1e-4, 1e-2), epochs=60, rates_of="a")
    return images.Study(
        tmp_path, tmp_path / "x.npz", "cpu", 8, range(3), {"a": leader, "b": follower}, {"jobs": 4}
    )


def play(study, answer):
    """All jobs in this process, by priority; the orders as they came."""
    waiting, orders = list(study.jobs()), []
    while waiting:
        waiting.sort(key=lambda job: job.priority)
        job = waiting.pop(0)
        orders.append(job.order)
        waiting += job.then(*answer(job.order))
    return orders


def finished(order, device):
    """What a run on a device tells at its end."""
    config = {name: order.given[name] for name in ("seed", "lr", "epochs")}
    return {
        "config": config | {"weight_decay": 0.0},
        "test": {"top1": 70.0 + order.given["seed"], "images": 2000},
        "train": {"loss": 0.5},
        "trained_parameters": 10,
        "seconds": 1.0,
        "peak": 5,
        "machine": {"device": device},
    }


def test_the_search_halves_and_its_winner_trains_every_seed(study):
    told = {}

    def answer(order):
        rate = order.given["lr"]
        if order.until is None:
            return finished(order, "x"), None
        if len(told) == 0:  # the first trial that comes dies
            told[rate] = None
            return None, "dead"
        told[rate] = -abs(np.log(rate / 1e-3))
        return {"top1": told[rate], "loss": 1.0}, None

    orders = play(study, answer)
    tried = [order for order in orders if order.until is not None]
    finals = [order for order in orders if order.until is None]
    assert [order.until for order in tried] == [5] * 8 + [20] * 2
    ranked = sorted((rate for rate in told if told[rate] is not None), key=lambda r: -told[r])
    assert sorted(order.given["lr"] for order in tried[8:]) == sorted(ranked[:2])
    assert {order.given["lr"] for order in finals} == {ranked[0]}
    # the long ones first, and no contender's last seed before another's first
    ways = [(order.folder.parent.name, order.given["seed"]) for order in finals]
    assert ways == [("b", 0), ("b", 1), ("a", 0), ("b", 2), ("a", 1), ("a", 2)]
    assert study.failures == 1
    a, b = map(json.loads, (study.work / "real.jsonl").read_text().splitlines())
    assert (a["contender"], a["value"], a["rounds"]) == ("a", 71.0, 3)
    assert b["facts"]["epochs"] == 60 and b["facts"]["jobs"] == 4
    assert b["facts"]["seeds wanted"] == 3 and b["facts"]["interval"] == pytest.approx(
        4.303 / 3**0.5
    )


def test_one_run_pauses_goes_on_and_trains_on_all_photos(bench, tmp_path):
    runs, images = bench("real_runs"), bench("real_images")
    generator = np.random.default_rng(0)
    held = {"classes": np.array(["a", "b"])}
    for part, each in (("train", 10), ("test", 4)):
        labels = np.repeat([0, 1], each)
        held[f"x_{part}"] = generator.integers(0, 256, (2 * each, 16, 16, 3), dtype=np.uint8)
        held[f"y_{part}"] = labels
    np.savez(tmp_path / "all.npz", **held)
    images.write_photos(tmp_path / "all.npz", tmp_path / "photos.npz", 5)
    given = {"data": "photos", "model": "pgn_demo_vit", "model_kwargs": {}, "pretrained_path": None}
    given |= {"method": "vpt-deep", "num_prompts": 2, "batch_size": 4, "workers": 0, "seed": 0}
    given |= {"no_aug": True, "cache": "off"}

    def order(name, until, **more):
        folder = tmp_path / "a" / name
        return runs.Order({**given, **more}, folder, tmp_path / "photos.npz", "cpu", until)

    search = {"epochs": 3, "val_interval": 1}
    of_search = order("trial", 1, **search)
    apart = runs.parts(of_search, runs.TrainConfig.make(**of_search.given)).splits.validation
    assert sorted(apart.images.dataset.targets[i] for i in apart.indices) == [0, 1]
    first = runs.carry_out(of_search)
    assert first == runs.carry_out(order("trial", 1, **search))  # found again
    assert runs.carry_out(order("trial", 3, **search))["loss"] != first["loss"]
    told = runs.carry_out(order("seed0", None, epochs=2))
    assert told["train"]["images"] == 10 and told["test"]["images"] == 8
    assert told["validation"] is None and told["peak"] >= 0
    assert not (tmp_path / "a" / "seed0").exists() and (tmp_path / "a" / "trial").exists()


def test_weights_travel_as_half_of_their_bytes(bench, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = bench("real_weights")
    whole = torch.randn(4, 5)
    save_file({"w": whole.half()}, tmp_path / "half")
    assert weights.widen(tmp_path / "half", tmp_path / "whole") == "float16"
    found = load_file(tmp_path / "whole")["w"]
    assert found.dtype == torch.float32 and torch.equal(found, whole.half().float())


def test_a_study_goes_on_where_an_earlier_one_ended(bench, study):
    """Seeds that are there are not run again, nor is the search; who ran what is told."""
    rates = study.chosen["a"] = {"lr": 1e-3}, 65.0
    study.seeds = range(1)
    play(study, lambda order: (finished(order, "x"), None))
    written = study.work / "real.jsonl"
    earlier = {row.contender: row for row in bench("rows").read(written) if row.contender == "a"}
    again = dataclasses.replace(study, seeds=range(3), found={}, earlier=earlier)
    orders = play(again, lambda order: (finished(order, "y"), None))
    assert all(order.until is None and order.given["lr"] == rates[0]["lr"] for order in orders)
    ran = sorted((order.folder.parent.name, order.given["seed"]) for order in orders)
    assert ran == [("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    a, b = map(json.loads, written.read_text().splitlines())
    assert (a["value"], a["facts"]["top1"]) == (71.0, [70.0, 71.0, 72.0])
    assert a["facts"]["devices"] == ["x", "y", "y"] and a["machine"] == {"device": "x"}
    assert b["facts"]["devices"] == ["y"] * 3 and b["facts"]["validation"] == 65.0
