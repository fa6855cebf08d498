"""Training runs: every method, and that no kill, full disk or NaN loses anything."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_world import MODEL, tiny_config, tiny_vit_kwargs, write_images

import pgn_fast
from pgn_fast import _files
from pgn_fast.adapters import WEIGHTS_FILE, backbone_pixels, read_adapter
from pgn_fast.errors import TrainingStopped, UserError
from pgn_fast.methods import METHODS
from pgn_fast.train import checkpoints, loop, objective, parts, recipe, run, split, state
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.distributed import Processes
from pgn_fast.train.run_folder import RunFolder
from pgn_fast.train.signals import StopRequest

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by threads; and a resumed run must have as many as the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images in three splits, and the backbone's weights."""
    root = tmp_path_factory.mktemp("world")
    for name, count in (("train", 9), ("val", 3), ("test", 3)):
        write_images(root / "data" / name, count, seed=len(name))
    return root


def configure(world, **changes):
    values = {
        "method": "vpt-deep",
        "library_size": 4,
        "batch_size": 8,
        "epochs": 2,
        "warmup_epochs": 1,
        "lr": 0.02,
    }
    return tiny_config(world, **values | changes)


def outcome(folder: Path):
    """All that a run leaves, but for what a clock says."""
    tensors = {
        f"{name}/{key}": tensor
        for name in ("best", "last")
        for key, tensor in safetensors.torch.load_file(folder / name / WEIGHTS_FILE).items()
    }
    timed = {"seconds", "images_per_second"}
    with open(folder / "history.csv") as file:
        rows = [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]
    summary = json.loads((folder / "summary.json").read_text())
    state = checkpoints.load(folder)
    return tensors, rows, {k: v for k, v in summary.items() if k not in timed}, state


def assert_same_run(one: Path, other: Path) -> None:
    (tensors, rows, summary, state), (tensors2, rows2, summary2, state2) = map(
        outcome, (one, other)
    )
    assert tensors.keys() == tensors2.keys()
    for name in tensors:
        assert torch.equal(tensors[name], tensors2[name]), name
    assert rows == rows2
    assert summary == summary2
    own, own2 = state["processes"][0], state2["processes"][0]
    assert torch.equal(own["random"]["torch"], own2["random"]["torch"])
    moments, moments2 = (s["optimizer"]["state"] for s in (state, state2))
    assert moments.keys() == moments2.keys() and moments
    for i, entries in moments.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments2[i][key]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(world, tmp_path, method):
    config = configure(world, method=method, weight_decay=0.01)
    summary = loop.train(config, tmp_path / "run", device=CPU, show=False)
    assert summary["test"]["split"] == f"folder {world / 'data' / 'test'}"
    assert summary["test"]["images"] == 9 and 0 <= summary["test"]["top1"] <= 100
    assert summary["validation"]["split"] == f"folder {world / 'data' / 'val'}"
    assert summary["best_epoch"] in (1, 2) and summary["chosen_by"] == "validation top-1"
    adapter, tensors = read_adapter(tmp_path / "run" / "last")
    assert adapter["method"] == method and adapter["class_names"] == ["blue", "green", "red"]
    assert any(name.startswith("backbone.") for name in tensors) == (method == "full")
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "best",
        "last",
        "args.yaml",
        "checkpoint.pt",
        "history.csv",
        "learning_curve.png",
        "summary.json",
        "per_class.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
    }
    if method != "full":
        # the frozen backbone is the file's, to the bit: the same logits around a fresh copy
        backbone = pgn_fast.backbone.load.load_backbone(MODEL, **tiny_vit_kwargs(world))
        model = pgn_fast.from_pretrained(tmp_path / "run" / "best", backbone)
        images = torch.stack(
            [
                torch.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16).roll(i, dims=2)
                for i in range(2)
            ]
        )
        assert model(images).shape == (2, 3)
        assert model.preprocessing == {
            k: list(v) if isinstance(v, tuple) else v for k, v in backbone_pixels(backbone).items()
        }


def test_training_learns_and_keeps_the_backbone(world, tmp_path):
    # the probe would solve these tints before the first step
    choices = {"head_init": "zero", "no_aug": True, "batch_size": 9}
    config = configure(world, method="vpt-deep", epochs=12, lr=0.05, **choices)
    folder, stop = RunFolder(tmp_path), StopRequest()
    one = run.Run(config, folder, Processes(CPU), parts.assemble(config), None, stop, show=False)
    before = {k: v.clone() for k, v in one.model.backbone.state_dict().items()}
    one.fit()
    losses = [row["train_loss"] for row in one.record.history]
    assert losses[-1] < 0.5 * losses[0] and one.record.history[-1]["validation_top1"] > 60
    for name, value in one.model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epochz": 2}, "there is no option epochz; did you mean `epochs`"),
        ({"epochs": "two"}, "`epochs` is 'two'; give a whole number"),
        ({"epochs": 2.5}, "`epochs` is 2.5; give a whole number"),
        ({"seed": True}, "`seed` is True; give a whole number"),
        ({"lr": None}, "`lr` is None; give a number"),
        ({"scale": 0.5}, "`scale` is 0.5; give two values, each a number"),
        ({"scale": [0.5]}, r"`scale` is \[0.5\]; give two values"),
        ({"mean": [0.5]}, "`mean` is 0.5; give three values"),
        ({"amp": "yes"}, "`amp` is 'yes'; give True or False"),
        ({"tracker": "wandb"}, "`tracker` is 'wandb'; give several values, each a text"),
        ({"method_kwargs": [1]}, r"`method_kwargs` is \[1\]; give names and their values"),
    ],
)
def test_a_choice_of_another_kind_is_one_sentence(given, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.make(**given)


def test_choices_are_taken_as_people_have_them(tmp_path):
    """YAML reads 1e-3 as a text, scripts have paths and NumPy's numbers."""
    given = {"lr": "1e-3", "data": tmp_path, "scale": [0.5, 1], "seed": np.int64(3), "epochs": 4.0}
    config = TrainConfig.make(**given)
    assert (config.lr, config.data, config.scale, config.seed) == (1e-3, str(tmp_path), (0.5, 1), 3)
    assert type(config.epochs) is int and config.epochs == 4


def quick_plot(output, history, title):
    """A file where the plot would be, in the time of a file."""
    _files.write_files({output / "learning_curve.png": b"plot"})


def test_a_full_disk_says_what_is_needed_and_leaves_the_old(tmp_path, monkeypatch):
    old = {tmp_path / "a": b"old", tmp_path / "b": b"old"}
    _files.write_files(old)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=r"device \(3.0 kB are needed, .* are free\): .*a'$"):
        _files.write_files({tmp_path / "a": bytes(1000), tmp_path / "b": bytes(2000)})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


class Killed(BaseException):
    """Stands for a kill: nothing of the package catches it."""


def interrupt(monkeypatch, at):
    """The process dies before its ``at``-th file is replaced."""
    calls = iter(range(1, 1000))

    def replace(source, target):
        if next(calls) == at:
            raise Killed
        os.rename(source, target)

    monkeypatch.setattr(_files.os, "replace", replace)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "vpt-deep", "prompt_dropout": 0.3, "opt": "sgd"},
        {"method": "pgn", "recovery_interval": 2, "grad_accum_steps": 2, "workers": 0},
    ],
    ids=["dropout", "batchnorm-and-recovery"],
)
def test_resumed_run_is_the_uninterrupted_one(world, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(run, "plot_learning_curve", quick_plot)
    config = configure(world, color_jitter=0.3, batch_size=6, **changes)
    whole = tmp_path / "whole"
    loop.train(config, whole, device=CPU, show=False)
    # every moment of the first run, every third of the second, which writes more often
    for at in range(1, 60, 3 if config.recovery_interval else 1):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            try:
                loop.train(config, folder, device=CPU, show=False)
                break
            except Killed:
                pass
        torch.manual_seed(at)
        loop.train(config, folder, device=CPU, resume=True, show=False)
        assert_same_run(whole, folder)
    # two epochs write last/, perhaps best/, history and checkpoint; the end a summary and a plot
    assert at >= 13


def test_killed_twice_and_once_more(world, tmp_path, monkeypatch):
    config = configure(world, epochs=3, prompt_dropout=0.2, recovery_interval=1)
    loop.train(config, tmp_path / "whole", device=CPU, show=False)
    for at in (4, 5, 6):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, at)
            loop.train(config, tmp_path / "torn", device=CPU, resume=True, show=False)
    loop.train(config, tmp_path / "torn", device=CPU, resume=True, show=False)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def test_sigkill_at_a_random_moment(world, tmp_path):
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    command = [
        *("--model", MODEL, "--model-kwargs", *kwargs, "--method", "vpt-deep"),
        *("--num-prompts", "2", "-b", "2", "--epochs", "8", "--prompt-dropout", "0.2"),
        *("--recovery-interval", "7", "--device", "cpu", str(world / "data")),
    ]
    from pgn_fast.cli import main

    child = subprocess.Popen(
        [sys.executable, "-m", "pgn_fast.cli", "train", "--output", tmp_path / "a", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,  # the package that is installed, as in this process
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "a" / "checkpoint.pt").exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    killed_at = checkpoints.load(tmp_path / "a")["processes"][0]["position"]
    assert 0 < killed_at["updates"] < 8 * 13
    assert main(["train", "--resume", str(tmp_path / "a")]) == 0
    assert main(["train", "--output", str(tmp_path / "b"), *command]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("at", [1, 3, 6, 8])
def test_full_disk_stops_and_loses_nothing(world, tmp_path, monkeypatch, at):
    config = configure(world)
    loop.train(config, tmp_path / "whole", device=CPU, show=False)
    calls = iter(range(1, 1000))

    def fsync(descriptor):
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            loop.train(config, tmp_path / "full", device=CPU, show=False)
    for adapter in (p.parent for p in (tmp_path / "full").glob("*/adapter_model.safetensors")):
        read_adapter(adapter)
    assert not list((tmp_path / "full").rglob("*.tmp"))
    loop.train(config, tmp_path / "full", device=CPU, resume=True, show=False)
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def test_loss_that_is_not_finite_stops_at_its_step(world, tmp_path, monkeypatch):
    config = configure(world, recovery_interval=2, batch_size=4, log_interval=50)
    real, steps = objective.F.cross_entropy, []

    def cross_entropy(logits, labels, **options):
        loss = real(logits, labels, **options)
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 5:
                return loss * float("nan")
        return loss

    monkeypatch.setattr(objective.F, "cross_entropy", cross_entropy)
    with pytest.raises(TrainingStopped, match=r"loss is nan at step 5 \(epoch 1\); the last good"):
        loop.train(config, tmp_path, device=CPU, show=False)
    state = checkpoints.load(tmp_path)
    assert state["processes"][0]["position"]["updates"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_full_device_says_what_to_change(world, tmp_path, monkeypatch, capsys):
    """At the first step of epoch 2, epoch 1 is kept; as early as trying the model out, nothing."""
    from pgn_fast.cli import main

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has little.")
    real, calls = objective.F.cross_entropy, iter(range(1, 100))

    def cross_entropy(logits, labels, **options):
        if torch.is_grad_enabled() and next(calls) == 5:
            raise full
        return real(logits, labels, **options)

    monkeypatch.setattr(objective.F, "cross_entropy", cross_entropy)
    advice = (
        r"with `batch_size` 8 \(CUDA out of memory\); {}\. .* `batch_size` 4 `grad_accum_steps` 2 "
        "for 8 images"
    )
    # 27 images in batches of 8, 8, 6 and 5
    with pytest.raises(TrainingStopped, match=advice.format("the last good checkpoint is .*")):
        loop.train(configure(world), tmp_path / "run", device=CPU, show=False)
    assert checkpoints.load(tmp_path / "run")["processes"][0]["position"]["epoch"] == 1
    read_adapter(tmp_path / "run" / "best")

    def forward(model, images):
        raise full

    monkeypatch.setattr(pgn_fast.VPT, "forward", forward)
    with pytest.raises(TrainingStopped, match=advice.format("nothing is saved yet")):
        loop.train(configure(world), tmp_path / "early", device=CPU, show=False)
    monkeypatch.setattr(run.Run, "__init__", lambda *arguments: forward(*arguments[:2]))
    assert main(["train", "--output", str(tmp_path / "third"), "-b", "1"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "--amp or a smaller --model: -b is 1 already" in line


def test_weights_that_are_not_finite_take_no_checkpoints_place(world, tmp_path, monkeypatch):
    real = run.Schedule.set
    calls = iter(range(100))

    def set_rate(self, epoch, update):
        real(self, epoch, update)
        if next(calls) == 5:
            recipe.set_learning_rate(self._optimizer, float("inf"))

    monkeypatch.setattr(run.Schedule, "set", set_rate)
    # 27 images in batches of 9: step 6 is the last of epoch 2
    with pytest.raises(TrainingStopped, match="is not finite after step 6"):
        loop.train(configure(world, batch_size=9), tmp_path, device=CPU, show=False)
    assert checkpoints.load(tmp_path)["processes"][0]["position"] == vars(
        state.Position(epoch=1, updates=3)
    )
    assert all(value.isfinite().all() for value in read_adapter(tmp_path / "last")[1].values())


def test_accumulated_batches_are_one_large_batch(world, tmp_path):
    for name, changes in {
        "large": {"batch_size": 12},
        "parts": {"batch_size": 4, "grad_accum_steps": 3},
    }.items():
        config = configure(world, method="linear", no_aug=True, sched="constant", **changes)
        loop.train(config, tmp_path / name, device=CPU, show=False)
    large, parts = (read_adapter(tmp_path / name / "last")[1] for name in ("large", "parts"))
    for key in large:
        torch.testing.assert_close(large[key], parts[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(world, tmp_path, dtype):
    # float16's loss scaling leaves out the first steps while it finds its scale, so both need time
    runs = {"amp": {"amp": True, "amp_dtype": dtype}, "float32": {}}
    for name, changes in runs.items():
        config = configure(world, head_init="zero", epochs=8, lr=0.05, no_aug=True, **changes)
        loop.train(config, tmp_path / name, device=CPU, show=False)
    half, full = (outcome(tmp_path / name) for name in runs)
    for key, value in half[0].items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, full[0][key])
    first, last = (float(half[1][row]["train_loss"]) for row in (0, -1))
    assert last < 0.5 * first
    if dtype == "bfloat16":
        assert last == pytest.approx(float(full[1][-1]["train_loss"]), rel=0.1)
    assert bool(half[3]["scaler"]) == (dtype == "float16")


def test_test_images_are_touched_once_at_the_end(world, tmp_path, monkeypatch):
    opened = []
    real = split.FolderImages.open

    def record(self, index):
        opened.append(Path(self.name(index)))
        return real(self, index)

    monkeypatch.setattr(split.FolderImages, "open", record)
    loop.train(configure(world), tmp_path, device=CPU, show=False)
    splits = [path.parts[-3] for path in opened]
    first = splits.index("test")
    assert set(splits[first:]) == {"test"} and len(set(opened[first:])) == len(splits[first:]) == 9
    assert splits.count("val") == 2 * 9 and "test" not in splits[:first]


def test_unreadable_images_are_counted_in_the_summary(tmp_path, capsys):
    write_images(tmp_path / "data", 4)
    bad = tmp_path / "data" / "green" / "2.png"
    bad.write_bytes(b"torn")
    config = configure(tmp_path, val_fraction=0, batch_size=12)
    summary = loop.train(config, tmp_path / "run", device=CPU)
    assert summary["unreadable"]["count"] == 1
    assert summary["unreadable"]["images"][0].startswith(str(bad))
    assert capsys.readouterr().out.count("unreadable image, left out") == 1
    assert summary["validation"] is None and summary["chosen_by"] == "last epoch"
    assert summary["best_epoch"] == 2 and summary["test"] is None


def test_no_readable_image_is_an_error(tmp_path):
    write_images(tmp_path / "data", 2)
    for file in (tmp_path / "data").glob("*/*"):
        file.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 6 training images can be read"):
        loop.train(configure(tmp_path, val_fraction=0), tmp_path / "run", device=CPU, show=False)


def test_resume_refuses_another_run(world, tmp_path):
    config = configure(world)
    loop.train(config, tmp_path / "run", device=CPU, show=False)
    with pytest.raises(UserError, match=r"has `lr` = 0\.02, now 0\.5 is asked for"):
        state.resume_config(tmp_path / "run", {"lr": 0.5})
    assert state.resume_config(tmp_path / "run", {"workers": 2, "lr": 0.02}).workers == 2
    assert state.resume_config(tmp_path / "nothing", {}) is None
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is damaged or truncated"):
        state.resume_config(tmp_path / "run", {})
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="its digest differs, or it has none"):
        state.resume_config(tmp_path / "run", {})


def test_resume_refuses_other_data(tmp_path):
    write_images(tmp_path / "data", 4)
    config = configure(tmp_path, val_fraction=0.25)
    loop.train(config, tmp_path / "run", device=CPU, show=False)
    write_images(tmp_path / "data", 5)
    with pytest.raises(UserError, match=r"began with 9 training images.*now has 12"):
        loop.train(config, tmp_path / "run", device=CPU, resume=True, show=False)
