"""Runs as people start, stop and repeat them: folders, signals, few images, longer and again."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small_world import MODEL, tiny_config, tiny_vit_kwargs, write_images

from pgn_fast.adapters import WEIGHTS_FILE, read_adapter
from pgn_fast.cli import main
from pgn_fast.errors import TrainingStopped, UserError
from pgn_fast.train import checkpoints, loop, run
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.loader import EpochBatches
from pgn_fast.train.run_folder import LOCK, RunFolder, recorded_backbone
from pgn_fast.train.state import resume_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_images(root / "data", 9)
    tiny_vit_kwargs(root)
    return root


def configure(world, **changes):
    values = {"method": "vpt-shallow", "library_size": 4, "batch_size": 8, "epochs": 2, "lr": 0.02}
    return tiny_config(world, **values | changes)


def flags(world, *more):
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    return [
        *("train", str(world / "data"), "--model", MODEL, "--model-kwargs", *kwargs),
        *(
            "--method",
            "vpt-shallow",
            "--num-prompts",
            "2",
            "-b",
            "8",
            "-j",
            "0",
            "--device",
            "cpu",
            *more,
        ),
    ]


# --- the folder


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        assert not (tmp_path / "run").exists()
        folder.create({})
        about = json.loads((tmp_path / "run" / LOCK).read_text())
        assert (about["pid"], about["host"]) == (os.getpid(), socket.gethostname())
        for _ in range(2):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
                RunFolder(tmp_path / "run", resume=True).__enter__()
    assert not (tmp_path / "run" / LOCK).exists()


def test_another_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from pgn_fast.train.run_folder import RunFolder\n"
        "f = RunFolder(Path(sys.argv[1])); f.__enter__(); f.create({}); print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid} on"):
            RunFolder(tmp_path / "run", resume=True).__enter__()
    finally:
        child.kill()
        child.wait()
    with RunFolder(tmp_path / "run", resume=True) as folder:
        assert f"from process {child.pid}, which ended" in folder.took_over


def test_the_lock_of_another_machine_is_not_broken(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "today"}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere, since today.*delete .*\.lock"):
        RunFolder(tmp_path, resume=True).__enter__()
    assert "elsewhere" in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("trace", ["checkpoint.pt", "best", "summary.json"])
def test_a_folder_that_holds_a_run_is_no_place_for_another(tmp_path, trace):
    (tmp_path / trace).mkdir()
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder(tmp_path).__enter__()
    assert {p.name for p in tmp_path.iterdir()} == {trace}


def test_a_refused_run_creates_nothing(world, tmp_path, capsys):
    for wrong in (
        ["--method", "linear", "--model", "vit_no_such"],
        ["--backend", "nope"],
        ["--opt", "sgdx"],
        ["--init-from", str(tmp_path / "nothing")],
        ["--pretrained-path", str(tmp_path / "nothing.safetensors"), "--model-kwargs"],
    ):
        assert main([*flags(world, "--output", str(tmp_path / "run")), *wrong]) == 2, wrong
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_best_belongs_to_the_run_that_wrote_it(world, tmp_path, monkeypatch):
    real = run.Run.finish
    other = tmp_path / "other"
    loop.train(configure(world, seed=1), other, device=CPU, show=False)

    def finish(self):
        (self.output / "best" / WEIGHTS_FILE).write_bytes(
            (other / "best" / WEIGHTS_FILE).read_bytes()
        )
        (self.output / "best" / "adapter_config.json").write_bytes(
            (other / "best" / "adapter_config.json").read_bytes()
        )
        return real(self)

    monkeypatch.setattr(run.Run, "finish", finish)
    with pytest.raises(TrainingStopped, match="no longer the adapter that this run wrote"):
        loop.train(configure(world), tmp_path / "run", device=CPU, show=False)


# --- signals and dead workers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(world, tmp_path, number):
    command = [*flags(world, "-b", "2", "--epochs", "200", "--output", str(tmp_path / "run"))]
    child = subprocess.Popen(
        [sys.executable, "-m", "pgn_fast.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "history.csv").exists() and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(number)
    _, error = child.communicate()
    assert child.returncode == 128 + number
    assert error.count("\n") == 1 and f"stopped by {number.name}, saved at step" in error
    assert f"pgn-fast train --resume {tmp_path / 'run'}" in error
    assert not (tmp_path / "run" / LOCK).exists()
    state = checkpoints.load(tmp_path / "run")
    assert 0 < state["processes"][0]["position"]["updates"] < 200 * 13


class Asked:
    """A StopRequest that is asked to stop at its n-th look."""

    def __init__(self, at):
        self.at, self.looks = at, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    @property
    def number(self):
        self.looks += 1
        return signal.SIGTERM if self.looks == self.at else None


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_run_that_was_stopped_continues_to_the_bit(world, tmp_path, monkeypatch, at):
    """In the middle of an epoch, at its end, and while validating."""
    config = configure(world, prompt_dropout=0.2, color_jitter=0.3)
    loop.train(config, tmp_path / "whole", device=CPU, show=False)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", lambda: Asked(at))
        with pytest.raises(TrainingStopped, match="stopped by SIGTERM") as stop:
            loop.train(config, tmp_path / "torn", device=CPU, show=False)
    assert stop.value.exit_code == 143
    loop.train(config, tmp_path / "torn", device=CPU, resume=True, show=False)
    for name in ("best", "last"):
        one, other = (read_adapter(tmp_path / f / name)[1] for f in ("whole", "torn"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dead_worker_is_one_line_that_names_the_checkpoint(world, tmp_path, capsys, monkeypatch):
    real, calls = run.Run._update, iter(range(100))

    def update(self, group, report):
        if next(calls) == 5:
            for worker in self.source.loader._iterator._workers:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.5)
            next(iter(self.source.loader))
        real(self, group, report)

    monkeypatch.setattr(run.Run, "_update", update)
    output = str(tmp_path / "run")
    assert main(flags(world, "-j", "1", "--epochs", "3", "--output", output)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a data-loading process died" in line and "fewer -j" in line
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint.pt'}" in line


# --- short, small, longer


def test_one_epoch_works_and_only_a_given_warmup_is_refused(world, tmp_path, capsys):
    assert main(flags(world, "--epochs", "1", "--output", str(tmp_path / "run"))) == 0
    row = (tmp_path / "run" / "history.csv").read_text().splitlines()[1].split(",")
    assert float(row[1]) > 0
    assert main(flags(world, "--epochs", "1", "--warmup-epochs", "3")) == 2
    assert "--warmup-epochs 3 is more than --epochs 1" in capsys.readouterr().err


@pytest.mark.parametrize("size, batch, expected", [(120, 64, [64, 56]), (65, 64, [33, 32])])
def test_every_image_has_its_turn_in_every_epoch(size, batch, expected):
    sampler = EpochBatches(size, batch, seed=3)
    batches = list(sampler)
    assert [len(b) for b in batches] == expected
    assert sorted(i for b in batches for _, i in b) == list(range(size))


@pytest.mark.parametrize("size", range(1, 60, 7))
@pytest.mark.parametrize("world, batch, accumulate", [(1, 12, 1), (2, 6, 1), (1, 4, 3), (3, 2, 2)])
def test_a_steps_images_do_not_depend_on_how_they_are_spread(size, world, batch, accumulate):
    whole = [sorted(i for _, i in b) for b in EpochBatches(size, 12, seed=5)]
    parts = [EpochBatches(size, batch, 5, rank, world, accumulate) for rank in range(world)]
    ranks = [list(part) for part in parts]
    found = []
    for start in parts[0].starts:
        count = parts[0].batches_of_step(start)
        assert 1 <= count <= accumulate
        assert all(len(b) <= batch for own in ranks for b in own[start : start + count])
        found.append(sorted(i for own in ranks for b in own[start : start + count] for _, i in b))
    assert found == whole
    for rank, part in enumerate(parts):
        part.set_position(0, 1)
        assert list(part) == ranks[rank][1:]


def test_few_images_are_said(world, tmp_path, capsys):
    loop.train(configure(world, batch_size=64, epochs=3), tmp_path, device=CPU)
    out = capsys.readouterr().out
    assert "24 images are fewer than a batch of 64: batches have 24" in out
    # one step an epoch, and none of them at rate zero
    rates = [line.split(",")[1] for line in (tmp_path / "history.csv").read_text().splitlines()[1:]]
    assert len(rates) == 3 and all(float(rate) > 0 for rate in rates)


def test_batchnorm_on_one_image_is_one_line_at_the_start(world, tmp_path, capsys):
    """Images of 16 pixels leave the generator maps of one pixel."""
    command = flags(world, "--method", "pgn", "-b", "1", "--output", str(tmp_path / "run"))
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Give -b 2 or more, or a larger --resolution" in line
    assert not (tmp_path / "run").exists()


def test_unreadable_neighbors_do_not_leave_batchnorm_one_image(tmp_path):
    write_images(tmp_path / "data", 4)
    tiny_vit_kwargs(tmp_path)
    for name in ("0", "2"):
        (tmp_path / "data" / "green" / f"{name}.png").write_bytes(b"torn")
    config = configure(tmp_path, method="pgn", batch_size=2, epochs=3, val_fraction=0)
    summary = loop.train(config, tmp_path / "run", device=CPU, show=False)
    assert summary["unreadable"]["count"] == 2


def test_resume_with_more_epochs_goes_on(world, tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main(flags(world, "--epochs", "2", "--output", output)) == 0
    assert main(["train", "--resume", output, "--epochs", "4"]) == 0
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) == 5
    assert main(["train", "--resume", str(tmp_path / "run" / "best")]) == 0
    assert main(["train", "--resume", output, "--epochs", "3"]) == 2
    assert "has --epochs = 4, now 3 is asked for: give more to go on" in capsys.readouterr().err
    with pytest.raises(UserError, match="`epochs` = 4, now 100"):
        resume_config(tmp_path / "run", {}, {"epochs": 100})


def test_a_new_run_starts_from_an_adapter(world, tmp_path):
    loop.train(configure(world), tmp_path / "first", device=CPU, show=False)
    start = str(tmp_path / "first" / "best")
    frozen = configure(world, init_from=start, epochs=1, lr=1e-12, warmup_epochs=0)
    loop.train(frozen, tmp_path / "second", device=CPU, show=False)
    one, other = (read_adapter(tmp_path / name)[1] for name in ("first/best", "second/last"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="is a vpt-shallow adapter, `method` is linear"):
        loop.train(configure(world, init_from=start, method="linear"), tmp_path / "x", device=CPU)


# --- what the run knew, and eval knows again


def test_eval_makes_the_backbone_as_the_run_did(world, tmp_path, capsys):
    data = tmp_path / "split"
    for name in ("train", "val"):
        write_images(data / name, 6, seed=len(name))
    output = str(tmp_path / "run")
    command = flags(world, "--epochs", "1", "--output", output)
    command[1] = str(data)
    assert main(command) == 0
    capsys.readouterr()
    for adapter in (output, f"{output}/best"):
        assert main(["eval", adapter, str(data), "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert "there is no test split" in err
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert f"top-1 {summary['validation']['top1']:.2f} %" in out


def test_classes_are_matched_by_name(world, tmp_path, capsys):
    loop.train(configure(world), tmp_path / "run", device=CPU, show=False)
    for name in ("green", "red"):
        (tmp_path / "some" / name).mkdir(parents=True)
        source = world / "data" / name / "0.png"
        (tmp_path / "some" / name / "0.png").write_bytes(source.read_bytes())
    assert main(["eval", str(tmp_path / "run"), str(tmp_path / "some"), "--device", "cpu"]) == 0
    few = capsys.readouterr().out
    assert "2 of 2 images" in few
    (tmp_path / "some" / "violet").mkdir()
    (tmp_path / "some" / "violet" / "0.png").write_bytes(source.read_bytes())
    assert main(["eval", str(tmp_path / "run"), str(tmp_path / "some"), "--device", "cpu"]) == 2
    assert "'violet' is none of the 3" in capsys.readouterr().err


def test_a_strangers_arguments_choose_an_architecture_and_nothing_else(tmp_path):
    args = {
        "model": "local-dir:/etc",
        "model_kwargs": {
            "img_size": 32,
            "pretrained_cfg_overlay": {"url": "http://example.invalid"},
            "act_layer": "torch.nn.GELU",
            "cache_dir": "elsewhere",
            "depth": 10**9,
            "checkpoint_path": "/dev/zero",
        },
        "pretrained_path": "https://example.invalid/weights",
    }
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(args))
    assert recorded_backbone(tmp_path) == (None, {"img_size": 32}, None)
    (tmp_path / "args.yaml").write_text("!!python/object/apply:os.system ['true']")
    assert recorded_backbone(tmp_path) == (None, {}, None)
    assert recorded_backbone(tmp_path / "nowhere") == (None, {}, None)


def test_pretrained_path_resamples_the_position_embedding(world, tmp_path):
    sizes = {k: v for k, v in tiny_vit_kwargs(world).items() if k != "checkpoint_path"}
    sizes |= {"img_size": 24}
    sizes.pop("pretrained")
    path = tiny_vit_kwargs(world)["checkpoint_path"]
    config = configure(world, model_kwargs=sizes, pretrained_path=path, epochs=1)
    summary = loop.train(config, tmp_path / "run", device=CPU, show=False)
    assert main(["eval", str(tmp_path / "run"), str(world / "data"), "--device", "cpu"]) == 0
    assert summary["config"]["pretrained_path"] == path


# --- words


@pytest.mark.parametrize(
    "words, answer",
    [
        (["train", "--learning-rate", "0.1"], "--learning-rate: did you mean --lr?"),
        (["train", "--warmup-epoch", "1", "--optt", "x"], "did you mean --opt?"),
        (["train", "--num_workers=3"], "did you mean --workers?"),
        (["eval", "x", "--spilt", "val"], "did you mean --split?"),
    ],
)
def test_an_unknown_flag_gets_the_right_help_page(words, answer, capsys):
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and answer in line
    assert line.startswith(f"pgn-fast {words[0]}: error: unknown:")
    assert f"pgn-fast {words[0]} --help" in line


def test_messages_speak_flags_on_the_command_line_and_names_in_python(capsys):
    with pytest.raises(UserError, match=r"`hflip` is 2; give 0 \.\.\. 1"):
        TrainConfig.make(hflip=2)
    assert main(["train", "--hflip", "2"]) == 2
    assert "--hflip is 2.0; give 0 ... 1" in capsys.readouterr().err
    assert main(["train", "-b", "0"]) == 2
    assert "-b is 0; give > 0" in capsys.readouterr().err
    assert math.isfinite(TrainConfig.make().lr)
