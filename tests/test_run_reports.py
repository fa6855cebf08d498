"""What a run tells beside its folder: trackers, and where the time of a step goes."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from small_world import tiny_config, tiny_vit_kwargs, write_images

from pgn_fast.cli import build_parser, main
from pgn_fast.errors import UserError
from pgn_fast.train import loop, trackers
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.stats import PHASES, StepTimes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, count in (("train", 9), ("val", 3), ("test", 3)):
        write_images(root / "data" / name, count, seed=len(name))
    tiny_vit_kwargs(root)
    return root


def configure(world, **changes):
    values = {"method": "vpt-shallow", "batch_size": 8, "epochs": 2}
    return tiny_config(world, **values | changes)


def test_tensorboard_has_epochs_steps_and_the_test(world, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("accelerate")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(world, tracker=("tensorboard",), log_interval=2)
    summary = loop.train(config, tmp_path, device=CPU, show=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    # 27 images in batches of 8: 4 steps an epoch
    for name in ("train/loss", "validation/top1"):
        logged = events.Scalars(name)
        assert [e.step for e in logged] == [4, 8]
        expected = [float(row[name.replace("/", "_")]) for row in rows]
        assert [e.value for e in logged] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Scalars("step/loss")] == [2, 4, 6, 8]
    (found,) = events.Scalars("test/top1")
    assert (found.step, found.value) == (8, pytest.approx(summary["test"]["top1"]))


WANDB = """
import json, pathlib
said = []
class Run:
    def log(self, values, step=None): said.append([step, values])
    def finish(self): pathlib.Path({path!r}).write_text(json.dumps(said))
class Config(dict):
    def update(self, values, allow_val_change): said.append(["config", values])
config = Config()
def init(**options):
    said.append(["init", options])
    return Run()
"""


def test_weights_and_biases_gets_what_timms_flags_say(world, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    said = tmp_path / "said.json"
    (tmp_path / "wandb.py").write_text(WANDB.format(path=str(said)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    words = ["--log-wandb", "--wandb-project", "pets", "--wandb-tags", "a", "b"]
    commands = build_parser("train").parse_args(["train", *words, "--wandb-resume-id", "x1"])
    given = {n: getattr(commands, n) for n in ("tracker", "wandb_project", "wandb_tags")}
    config = configure(world, **given, wandb_resume_id=commands.wandb_resume_id)
    loop.train(config, tmp_path / "run", device=CPU, show=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (_, options), (_, settings), *rows = json.loads(said.read_text())
    assert options == {
        "project": "pets",
        "name": "run",
        "dir": str(tmp_path / "run"),
        "tags": ["a", "b"],
        "id": "x1",
        "resume": "must",
    }
    assert settings["method"] == "vpt-shallow" and settings["epochs"] == 2
    assert [step for step, _ in rows] == [4, 8, 8] and "test/top1" in rows[-1][1]


def test_a_missing_tracker_is_one_line_before_anything_begins(world, tmp_path, monkeypatch, capsys):
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name)
    )
    with pytest.raises(UserError, match="needs the package mlflow: pip install"):
        loop.train(configure(world, tracker=("mlflow",)), tmp_path / "run", device=CPU, show=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="`tracker` is 'comet'; known: tensorboard, wandb"):
        TrainConfig.make(tracker=("comet",))
    assert main(["train", "--tracker", "comet"]) == 2
    assert "--tracker" in capsys.readouterr().err


def test_stats_split_the_time_of_a_step(world, tmp_path, capsys):
    config = configure(world, stats=True)
    summary = loop.train(config, tmp_path / "run", device=CPU)
    # the first of 8 steps is left out
    stats = summary["stats"]
    assert stats["steps"] == 7 and set(stats["phases_ms"]) == {*PHASES, "other"}
    assert sum(stats["phases_ms"].values()) == pytest.approx(stats["step_ms"], abs=0.01)
    assert all(ms > 0 for ms in stats["phases_ms"].values())
    inside = stats["phases_ms"]["forward"] + stats["phases_ms"]["backward"]
    expected = 100 * (1 - inside / stats["step_ms"])
    assert stats["outside_forward_backward"] == pytest.approx(expected, abs=0.1)
    assert "% outside of forward and backward" in capsys.readouterr().out
    plain = loop.train(configure(world), tmp_path / "plain", device=CPU, show=False)
    assert plain["stats"] is None


def test_stats_leave_out_what_lies_between_epochs(monkeypatch):
    clock = iter([10.0, 11.0, 12.0, 13.0, 100.0, 101.0, 102.0, 103.0])
    monkeypatch.setattr("pgn_fast.train.stats.time.perf_counter", lambda: next(clock))
    times = StepTimes(CPU, enabled=True)
    times.begin()
    times.end_step()  # the first
    with times.phase("forward"):
        pass
    times.begin()  # after a validation
    with times.phase("forward"):
        pass
    times.end_step()
    assert (times.steps, times.seconds["forward"], times.seconds["all"]) == (1, 2.0, 3.0)
