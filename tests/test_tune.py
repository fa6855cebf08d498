"""The search: budgets, halving by exact pauses, one answer whatever the kills, one look at test."""

from __future__ import annotations

import json
import os
import shlex
import signal

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast.adapters import read_adapter
from pgn_fast.cli import build_parser, main
from pgn_fast.cli import train as train_command
from pgn_fast.cli import tune as tune_command
from pgn_fast.errors import TrainingStopped, UserError
from pgn_fast.train import loop, run
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.run_folder import RunFolder
from pgn_fast.train.step import Stepper
from pgn_fast.train.tune import tune
from pgn_fast.train.tune_space import METHODS
from pgn_fast.train.tune_trial import Trial, affordable

pytest.importorskip("optuna")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, count in (("train", 9), ("test", 3)):
        # two classes of each tint: no method gets all of them right
        write_images(root / "data" / name, count, tuple("abcdef"), seed=len(name))
    tiny_vit_kwargs(root)
    return root


def given(world, **changes):
    return {
        "data": str(world / "data"),
        "model": MODEL,
        "model_kwargs": tiny_vit_kwargs(world),
        "epochs": 9,
        "batch_size": 12,
        "head_init": "zero",
        "library_size": 4,
        "no_aug": True,
        "workers": 0,
        "val_fraction": 0.34,
    } | changes


def search(world, output, **options):
    changes = options.pop("given", {})
    methods = None if "method" in changes else ("linear", "vpt-deep")
    options = {"trials": 5, "show": False, "methods": methods} | options
    return tune(given(world, **changes), output, device=CPU, **options)


def trials(output):
    """What a search has tried and found, but for what a clock says."""

    def timeless(pairs):
        return {k: v for k, v in pairs if k != "seconds"}

    text = (output / "tune.json").read_text()
    return json.loads(text, object_pairs_hook=timeless)["trials"]


def steps_of(output):
    """Three an epoch, of nine epochs with another seed."""
    return sum(3 * max(map(int, t["scores"])) + 27 * len(t["again"]) for t in trials(output))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A search that nothing disturbed."""
    output = tmp_path_factory.mktemp("done") / "tune"
    return output, search(world, output, trials=9)


def test_halving_pauses_and_the_best_is_whole(world, done):
    output, found = done
    epochs = [sorted(map(int, trial["scores"])) for trial in trials(output)]
    assert len(epochs) == 9 and all(row == [1, 3, 9][: len(row)] for row in epochs)
    assert any(len(row) < 3 for row in epochs) and any(len(row) == 3 for row in epochs)
    whole = [trial for trial in found.trials if "9" in trial.scores]
    whole.sort(key=lambda trial: (-trial.best, trial.losses["9"]))
    # the best three were repeated with another seed, and the best in the mean has won
    finalists = whole[:3]
    assert len(finalists) > 1 and [t for t in found.trials if t.again] == sorted(
        finalists, key=lambda trial: trial.number
    )
    means = {trial.number: (trial.best + trial.again["43"]["score"]) / 2 for trial in finalists}
    assert means[found.best.number] == max(means.values())
    # scores of validation images, the test images once
    assert found.summary["validation"]["top1"] == pytest.approx(found.best.best)
    assert found.summary["test"]["images"] == 18
    assert {p.name for p in output.iterdir()} >= {"best", "tune.png", "tune.json", "summary.json"}
    assert not (output / "frozen").exists()


def test_a_trial_that_paused_is_the_run_that_did_not(world, done, tmp_path):
    output, found = done
    loop.train(TrainConfig.make(**found.given), tmp_path / "again", device=CPU, show=False)
    mine, theirs = (read_adapter(folder / "best")[1] for folder in (tmp_path / "again", output))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_the_best_trial_sees_the_test_images(world, tmp_path, monkeypatch):
    seen = []
    evaluate = run.Run._evaluate

    def noted(self, split, details=False):
        seen.append(split.name)
        return evaluate(self, split, details)

    monkeypatch.setattr(run.Run, "_evaluate", noted)
    search(world, tmp_path / "tune", trials=2)
    assert seen.count("test") == 1 and seen[-1] == "test"


@pytest.mark.parametrize("at", [1, 30, -30])
def test_a_search_that_was_killed_finds_the_same(world, done, tmp_path, monkeypatch, at):
    """From the end: among the repeats."""
    step, calls = Stepper.step, []
    at = at if at > 0 else steps_of(done[0]) + at

    def killed(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Stepper, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        search(world, tmp_path / "tune", trials=9)
    found = search(world, tmp_path / "tune", trials=9, resume=True)
    whole = done[1]
    assert found.best.given == whole.best.given and found.summary["test"] == whole.summary["test"]
    assert trials(tmp_path / "tune") == trials(done[0])
    # nothing but the epoch that was cut off was trained twice
    steps = steps_of(done[0])
    assert steps <= len(calls) - 1 <= steps + 3
    # and once more: nothing is left to do
    again = search(world, tmp_path / "tune", trials=9, resume=True)
    assert again.summary == found.summary


def test_finals_take_what_the_budget_leaves_and_are_of_two_at_least():
    one = {"score": 1.0, "loss": 1.0, "seconds": 5.0}
    row = [Trial(n, {}, {"9": 50.0 - n}, {"9": 1.0}, seconds=10.0) for n in range(3)]
    assert affordable(row, 1, None) == row and affordable(row, 1, 29.0) == row[:2]
    assert affordable(row, 1, 19.0) == affordable(row[:1], 1, None) == []
    # one that was repeated before costs nothing
    row[0].again["1"] = one
    assert affordable(row, 1, 10.0) == row[:2] and affordable(row, 1, -1.0) == []
    assert row[0].spent == 15.0 and row[0].mean_rank() < row[1].mean_rank() < row[0].rank()
    # one that could not be trained with another seed comes last
    row[1].again["1"] = one | {"score": float("-inf"), "loss": float("inf")}
    assert row[1].mean_rank() == float("-inf")


def test_a_later_winner_takes_the_place_of_the_earlier_one(world, tmp_path, monkeypatch):
    short = {"given": {"epochs": 1}}
    search(world, tmp_path / "tune", trials=1, **short)
    monkeypatch.setattr(Trial, "mean_rank", lambda self: self.number)
    found = search(world, tmp_path / "tune", trials=4, resume=True, **short)
    assert found.best.number > 0 and not list((tmp_path / "tune").glob(".*"))
    kept = json.loads((tmp_path / "tune" / "summary.json").read_text())
    assert kept["config"]["lr"] == found.summary["config"]["lr"] == found.best.given["lr"]
    own = tmp_path / "tune" / "trials" / f"{found.best.number:04d}" / "best"
    mine, theirs = (read_adapter(folder)[1] for folder in (own, tmp_path / "tune" / "best"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_of_equal_scores_the_lower_loss_is_better():
    """Also for Optuna's halving and sampler, which take one number a trial."""

    def trial(score, loss):
        return Trial(0, {}, {"3": 10.0, "9": score}, {"3": 1.0, "9": loss})

    ordered = [trial(99.0, float("nan")), trial(99.0, 7.0), trial(99.0, 0.5), trial(99.0, 0.4)]
    # one image of a million more beats any loss
    ordered.append(trial(99.0 + 1e-4, 1e9))
    ranks = [one.rank() for one in ordered]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)
    assert ordered[0].rank(3) == ordered[4].rank(3) < ranks[0]


def test_the_loss_decides_between_trials_of_one_score(world, tmp_path, monkeypatch):
    """All have a top-1 of 50: of every rung a third goes on, not everyone, and the best wins."""
    fit = run.Run.fit

    def leveled(self, until=None):
        record = fit(self, until)
        record.best_score = 50.0
        return record

    monkeypatch.setattr(run.Run, "fit", leveled)
    found = search(world, tmp_path / "tune", trials=6, given={"method": "linear"})
    assert {trial.best for trial in found.trials} == {50.0}
    assert any(len(trial.scores) < 3 for trial in found.trials)
    whole = [trial for trial in found.trials if "9" in trial.scores]
    finalists = sorted(whole, key=lambda trial: trial.losses["9"])[:3]
    assert [trial for trial in whole if trial.again] == [t for t in whole if t in finalists]
    kept = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert kept["search"]["made_by"]["ranking"] == "by the metric, then by the loss"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused_whoever_started_them(world, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with pytest.raises(UserError, match=r"tune runs in one process, and 3 were started: .*srun"):
        search(world, tmp_path / "tune")
    assert not (tmp_path / "tune").exists()
    monkeypatch.setenv(name, "1")
    assert search(world, tmp_path / "tune", trials=1, given={"epochs": 1}).summary["test"]


def test_more_trials_go_on_from_where_it_stood(world, tmp_path):
    search(world, tmp_path / "tune", trials=2)
    first = trials(tmp_path / "tune")
    with pytest.raises(UserError, match="holds a search already"):
        search(world, tmp_path / "tune", trials=3)
    search(world, tmp_path / "tune", trials=3, resume=True)
    assert trials(tmp_path / "tune")[:2] == first and len(trials(tmp_path / "tune")) == 3
    with pytest.raises(UserError, match=r"has `batch_size` = 12, now it is 5: leave it"):
        search(world, tmp_path / "tune", trials=3, resume=True, given={"batch_size": 5})
    with pytest.raises(UserError, match=r"was given no `lr`, now it is 0.5"):
        search(world, tmp_path / "tune", trials=3, resume=True, given={"lr": 0.5})


def test_a_killed_search_goes_on_as_it_was_begun(world, tmp_path, monkeypatch, capsys):
    """By the command that it says, without one of its flags."""
    folder, whole, step = tmp_path / "a tune", tmp_path / "whole", Stepper.step
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    words = ["tune", str(world / "data"), "--model", MODEL, "--model-kwargs", *kwargs]
    words += ["--trials", "2", "--epochs", "3", "-b", "12", "--no-aug", "-j", "0"]
    words += ["--device", "cpu", "--methods", "vpt-deep", "linear", "--output"]
    assert main([*words, str(whole)]) == 0

    def asked(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", asked)
        assert main([*words, str(folder)]) == 143
    again = capsys.readouterr().err.strip().rpartition("Continue with: ")[2]
    assert shlex.split(again) == ["pgn-fast", "tune", "--resume", str(folder)]
    assert main([*shlex.split(again)[1:], "--device", "cpu"]) == 0
    assert trials(folder) == trials(whole) and len(trials(folder)) == 2


def test_a_search_and_a_run_do_not_take_each_others_folder(world, tmp_path, capsys):
    """Either would write its best/ over the other's."""
    options = {"method": "linear", "epochs": 1, "num_prompts": 2}
    searched, trained = tmp_path / "tune", tmp_path / "run"
    search(world, searched, trials=1, given=options)
    loop.train(TrainConfig.make(**given(world, **options)), trained, device=CPU, show=False)
    before = [read_adapter(folder / "best")[0]["weights_digest"] for folder in (searched, trained)]
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds a run already .*pgn-fast train --resume"):
            search(world, trained, trials=1, given=options, resume=resume)
        with pytest.raises(UserError, match=r"holds a search already .*pgn-fast tune --resume"):
            loop.train(TrainConfig.make(**given(world)), searched, device=CPU, resume=resume)
    assert main(["tune", "--resume", str(trained), "--device", "cpu"]) == 2
    assert f"there is no search in {trained}" in capsys.readouterr().err
    assert before == [
        read_adapter(folder / "best")[0]["weights_digest"] for folder in (searched, trained)
    ]


def test_a_folder_has_one_search_at_a_time(world, tmp_path):
    with RunFolder(tmp_path / "tune", search=True) as folder:
        folder.make()
        with pytest.raises(UserError, match="is in use by process"):
            search(world, tmp_path / "tune", trials=1)


def test_what_is_given_is_not_searched(world, tmp_path):
    fixed = {"method": "vpt-deep", "num_prompts": 2, "weight_decay": 0.5}
    found = search(world, tmp_path / "tune", trials=3, given={**fixed, "epochs": 1})
    tried = [trial.given for trial in found.trials]
    assert all(row["method"] == "vpt-deep" and "weight_decay" not in row for row in tried)
    assert all("num_prompts" not in row for row in tried)
    assert len({row["lr"] for row in tried}) == 3
    assert all(found.given[name] == value for name, value in fixed.items())


def test_a_budget_of_time_ends_the_search_and_the_best_is_finished(world, tmp_path, capsys):
    found = search(world, tmp_path / "tune", trials=None, seconds=1e-3, show=True)
    (trial,) = found.trials  # the first is always begun, and its rungs are its own
    assert found.summary["test"] and trial.scores


def test_a_folder_for_frozen_blocks_is_no_claim_that_every_method_has_some(world, tmp_path):
    kept = str(tmp_path / "kept")
    given = {"cache": kept, "epochs": 2, "resolution": 16}
    found = search(world, tmp_path / "tune", trials=2, given=given, methods=("pgn", "linear"))
    assert {trial.given["method"] for trial in found.trials} == {"pgn", "linear"}
    assert not any(trial.failed for trial in found.trials)
    assert len(list((tmp_path / "kept").glob("*/tokens.bin"))) == 2  # training and validation


def test_a_trial_that_fails_is_no_end(world, tmp_path, monkeypatch):
    step = Stepper.step

    def broken(self, *args):
        if self.config.method == "linear":
            raise TrainingStopped("the loss is nan")
        return step(self, *args)

    monkeypatch.setattr(Stepper, "step", broken)
    found = search(world, tmp_path / "tune", trials=6, given={"epochs": 1})
    failed = [trial for trial in found.trials if trial.failed]
    assert failed and all(trial.given["method"] == "linear" for trial in failed)
    assert found.best.given["method"] == "vpt-deep"
    with pytest.raises(TrainingStopped, match="no trial could be trained: the loss is nan"):
        search(world, tmp_path / "none", trials=2, given={"epochs": 1, "method": "linear"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trials": None}, "needs a `budget`"),
        ({"given": {"val_fraction": 0}}, "give `val_fraction` above 0"),
        (
            {"given": {"val_interval": 2}},
            "`val_interval` 2: trials are judged after 1 of `epochs` 9",
        ),
        ({"given": {"init_from": "runs/x"}}, "tune chooses a method's start itself"),
        ({"methods": ("vpt-deeep",)}, "`method` is 'vpt-deeep'"),
        (
            {"given": {"method": "pgn"}, "methods": ("linear",)},
            "`method` and `methods`: give one of them",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_said_before_anything_is_written(world, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        search(world, tmp_path / "tune", **options)
    assert not (tmp_path / "tune").exists()


def test_the_command_and_the_command_that_it_prints(world, tmp_path, capsys):
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    words = ["tune", str(world / "data"), "--model", MODEL, "--model-kwargs", *kwargs]
    words += ["--trials", "2", "--epochs", "2", "-b", "12", "--no-aug", "-j", "0", "--seed", "3"]
    words += ["--device", "cpu", "--output", str(tmp_path / "tune"), "--methods", "vpt-deep"]
    assert main(words) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("again: ")]
    told = shlex.split(line.removeprefix("again: "))
    assert told[:2] == ["pgn-fast", "train"]
    parsed = build_parser("train").parse_args(told[1:])
    again = TrainConfig.make(**train_command.given_fields(parsed))
    summary = json.loads((tmp_path / "tune" / "summary.json").read_text())
    config = again.as_dict()
    assert {k: v for k, v in summary["config"].items() if v != config[k]} == {}
    assert main([*words[:2], "--budget", "soon"]) == 2
    assert "give a time such as 90s, 20m or 1.5h" in capsys.readouterr().err
    assert tune_command.seconds("1.5h") == 5400 and tune_command.seconds("90s") == 90


def test_every_kind_of_value_survives_the_command():
    values = {
        "data": "a folder",
        "method": "pgn",
        "generator_kwargs": {"max_pool": False, "channels": 8},
        "scale": (0.5, 1.0),
        "amp": True,
        "fast": False,
        "aa": "rand-m9",
        "lr": 3e-4,
    }
    parsed = build_parser("train").parse_args(shlex.split(tune_command.command(values))[1:])
    assert TrainConfig.make(**train_command.given_fields(parsed)) == TrainConfig.make(**values)
    assert set(METHODS) <= {"linear", "vpt-shallow", "vpt-deep", "pgn"}
