"""Training, evaluation and prediction on a CUDA device, by graphs. See on_device.py."""

from __future__ import annotations

import csv
import json
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from on_device import exact, graphs, relative, without_graphs
from small_world import MODEL, tiny_config, tiny_vit, tiny_vit_kwargs, write_images
from test_runs import Asked
from torch import nn

import pgn_fast
from pgn_fast.adapters import read_adapter
from pgn_fast.cli import main
from pgn_fast.cuda_graphs import graphed
from pgn_fast.errors import TrainingStopped
from pgn_fast.train import checkpoints, loop

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("graphs")]
__all__ = ["exact", "graphs"]  # fixtures
STEP = "training step of 8 images: one CUDA graph, within "


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for name, count in (("train", 32), ("val", 8), ("test", 8)):
        write_images(root / "data" / name, count, seed=len(name))
    tiny_vit_kwargs(root)
    return root


def configure(world: Path, **changes):
    values = {
        "method": "vpt-deep",
        "library_size": 4,
        "batch_size": 8,
        "epochs": 2,
        "lr": 0.02,
    }
    return tiny_config(world, **values | changes)


def rows(folder: Path) -> list[dict[str, float]]:
    timed = {"seconds", "images_per_second"}
    with open(folder / "history.csv") as file:
        return [
            {k: float(v) for k, v in row.items() if k not in timed} for row in csv.DictReader(file)
        ]


def assert_same(one: Path, other: Path, bound: float = 1e-3) -> None:
    """The same run, up to the order in which a GPU adds."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=bound)
        assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=bound)
    mine, theirs = (read_adapter(folder / "last")[1] for folder in (one, other))
    for name, tensor in mine.items():
        if tensor.is_floating_point() and float(theirs[name].abs().max()) > 1e-3:
            assert relative(tensor, theirs[name]) <= 30 * bound, name


@pytest.mark.parametrize("method", ["pgn", "vpt-shallow", "vpt-deep", "linear", "full"])
def test_a_run_by_graphs_is_the_eager_run(world, tmp_path, device, method, capsys) -> None:
    config = configure(world, method=method)
    summary = loop.train(config, tmp_path / "graphed", device=device)
    said = capsys.readouterr().out
    assert STEP in said and "inference of 8 images: one CUDA graph" in said, said
    assert "no CUDA graph" not in said
    assert summary["test"]["images"] == 24
    with without_graphs():
        loop.train(config, tmp_path / "eager", device=device)
    assert "CUDA graph" not in capsys.readouterr().out
    assert_same(tmp_path / "graphed", tmp_path / "eager")


FLAGS = {
    "mixup": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
    "bce": {"bce_loss": True, "mixup": 0.2},
    "average": {"model_ema": True, "model_ema_decay": 0.9},
    "clipped": {"clip_grad": 0.1},
    "accumulated": {"grad_accum_steps": 2},
    "dropout": {"prompt_dropout": 0.2},
    "erased": {"reprob": 0.5},
    "recomputed": {"grad_checkpointing": True},
    "workers": {"workers": 2},
    "measured": {"stats": True, "synchronize_step": True},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))
def test_flags_under_graphs(world, tmp_path, device, flags, capsys) -> None:
    config = configure(world, **flags)
    loop.train(config, tmp_path / "graphed", device=device)
    assert STEP in (said := capsys.readouterr().out), said
    with without_graphs():
        loop.train(config, tmp_path / "eager", device=device)
    assert_same(tmp_path / "graphed", tmp_path / "eager")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["pgn", "vpt-deep"])
def test_mixed_precision(world, tmp_path, device, method, dtype, capsys) -> None:
    if method == "pgn" and device.type == "cpu":
        pytest.skip("convolutions in half precision take minutes on a CPU")
    config = configure(world, method=method, amp=True, amp_dtype=dtype)
    loop.train(config, tmp_path / "half", device=device)
    assert STEP in (said := capsys.readouterr().out), said
    loop.train(configure(world, method=method), tmp_path / "whole", device=device)
    for mine, theirs in zip(rows(tmp_path / "half"), rows(tmp_path / "whole"), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.1, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb", "lion", "nadamw"])
def test_optimizers_take_the_graphs_gradients(world, tmp_path, device, optimizer) -> None:
    config = configure(world, opt=optimizer, lr=0.002)
    loop.train(config, tmp_path / "graphed", device=device, show=False)
    with without_graphs():
        loop.train(config, tmp_path / "eager", device=device, show=False)
    assert_same(tmp_path / "graphed", tmp_path / "eager")


@pytest.mark.parametrize(
    "at, changes",
    [
        (5, {"prompt_dropout": 0.2, "color_jitter": 0.3}),
        (12, {"amp": True, "amp_dtype": "float16"}),
        (9, {"model_ema": True, "mixup": 0.5}),
        (9, {"method": "pgn"}),
    ],
)
def test_a_run_that_was_stopped_goes_on(world, tmp_path, device, monkeypatch, at, changes) -> None:
    config = configure(world, **changes)
    loop.train(config, tmp_path / "whole", device=device, show=False)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", lambda: Asked(at))
        with pytest.raises(TrainingStopped, match="stopped by SIGTERM") as stop:
            loop.train(config, tmp_path / "torn", device=device, show=False)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    state = checkpoints.load(tmp_path / "torn")
    assert (state["processes"][0]["random"]["cuda"] is None) == (device.type == "cpu")
    loop.train(config, tmp_path / "torn", device=device, resume=True, show=False)
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_a_run_goes_on_on_another_device(world, tmp_path, device) -> None:
    loop.train(configure(world, epochs=1), tmp_path / "run", device=device, show=False)
    loop.train(configure(world), tmp_path / "run", device=torch.device("cpu"), resume=True)
    longer = configure(world, epochs=3)
    summary = loop.train(longer, tmp_path / "run", device=device, resume=True, show=False)
    assert len(rows(tmp_path / "run")) == 3 and summary["best_epoch"] in (1, 2, 3)


def words(world: Path, device: torch.device, *more: object) -> list[str]:
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    given = ["--model", MODEL, "--model-kwargs", *kwargs, "-j", "0", "--device", device.type]
    return [*given, "-b", "8", *map(str, more)]


def test_the_commands(world, tmp_path, device, capsys) -> None:
    run, data = tmp_path / "run", world / "data"
    train = words(world, device, "--method", "vpt-deep", "--num-prompts", 2, "--epochs", 2, "--amp")
    assert main(["train", str(data), *train, "--output", str(run)]) == 0
    assert STEP in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert main(["train", "--resume", str(run), "--epochs", "3", "--device", device.type]) == 0
    capsys.readouterr()
    scores = tmp_path / "scores.json"
    more = words(world, device, "--split", "test", "--results-file", scores, "--amp")
    assert main(["eval", str(run), str(data), *more]) == 0
    assert json.loads(scores.read_text())["images"] == summary["test"]["images"]
    for name, context in (("graphed", nullcontext()), ("eager", without_graphs())):
        table = words(world, device, "--logits", "--output", tmp_path / f"{name}.csv", "-b", 4)
        with context:
            assert main(["predict", str(run), str(data / "test"), *table]) == 0
    errors = capsys.readouterr().err
    assert "inference of 4 images: one CUDA graph" in errors, errors
    one, other = ((tmp_path / f"{name}.csv").read_text() for name in ("graphed", "eager"))
    for mine, theirs in zip(one.splitlines()[1:], other.splitlines()[1:], strict=True):
        assert mine.split(",")[0] == theirs.split(",")[0]
        numbers = ([float(x) for x in line.split(",")[3:]] for line in (mine, theirs))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-4)
    assert main(["verify", str(run), "--device", device.type, "-j", "0"]) == 0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_frozen_blocks_run_once(world, tmp_path, device, dtype, capsys) -> None:
    kept = {"method_kwargs": {"layers": [1]}, "no_aug": True, "head_init": "zero", "epochs": 3}
    cache = {"cache": str(tmp_path / "cache"), "cache_dtype": dtype}
    config = configure(world, **kept | cache)
    loop.train(config, tmp_path / "cached", device=device)
    assert "the frozen blocks run once for 96 images" in (said := capsys.readouterr().out), said
    loop.train(config, tmp_path / "again", device=device)
    assert "the frozen blocks run once" not in capsys.readouterr().out
    loop.train(configure(world, **kept, cache="off"), tmp_path / "plain", device=device)
    assert STEP in capsys.readouterr().out
    bound = 1e-3 if dtype is None else 0.05
    assert_same(tmp_path / "cached", tmp_path / "again")
    assert_same(tmp_path / "cached", tmp_path / "plain", bound)


def test_fit_of_a_model_on_the_device(device, tmp_path, capsys) -> None:
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 16, 16, generator=draw), i % 3) for i in range(48)]
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2).to(device)
    options = {"epochs": 3, "batch_size": 8, "lr": 0.05, "workers": 0}
    result = pgn_fast.fit(model, data, data, output=tmp_path / "run", **options)
    assert STEP in (said := capsys.readouterr().out), said
    assert next(model.parameters()).device.type == device.type
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    there = [(image.to(device), label) for image, label in data]
    pgn_fast.fit(model, there, there, output=tmp_path / "there", **options)
    loader = torch.utils.data.DataLoader(there, batch_size=8)  # batches of somebody else
    again = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
    pgn_fast.fit(again, loader, loader, output=tmp_path / "two", device=device.type, **options)
    assert next(again.parameters()).device.type == device.type


def test_compiled_runs_have_no_graph_of_ours(world, tmp_path, device, capsys) -> None:
    config = configure(world, torchcompile="aot_eager", epochs=1)
    loop.train(config, tmp_path / "run", device=device)
    assert "training step: no CUDA graph, `torchcompile` is given" in capsys.readouterr().out


def test_graphs_switched_off(world, tmp_path, device, monkeypatch, capsys) -> None:
    if device.type == "cpu":
        pytest.skip("stand-ins are not switched off")
    monkeypatch.setenv("PGN_FAST_CUDA_GRAPHS", "off")
    loop.train(configure(world, epochs=1), tmp_path / "run", device=device)
    assert "CUDA graph" not in capsys.readouterr().out


# graphs of single steps


def step_with(model: nn.Module, told: list[str], step, **options):
    return graphed(step, model, what="a step", tell=told.append, **options)


def test_a_step_that_waits_for_the_device_runs_eagerly_and_so_do_others_after_it(device) -> None:
    model, told, x = nn.Linear(4, 4).to(device), [], torch.randn(8, 4, device=device)
    stream = torch.cuda.current_stream() if device.type == "cuda" else None
    waits = step_with(model, told, lambda x: (model(x) * float(x.sum())).detach())
    expected = (model(x) * float(x.sum())).detach()
    for _ in range(8):
        assert relative(waits(x), expected) <= 1e-5
    assert len(told) == 1 and told[0].startswith("a step: no CUDA graph, it cannot be recorded")
    if device.type == "cuda":
        assert "previous error" not in told[0], told  # the operation that failed says more
        assert torch.cuda.current_stream() == stream
    good = step_with(model, told, lambda x: model(x).detach())
    for n in range(8):
        assert relative(good(x + n), model(x + n)) <= 1e-5
    assert "one CUDA graph" in told[1]
    free = [torch.empty(1 << 20, device=device) for _ in range(4)]
    del free


def test_an_error_of_the_step_is_told_and_the_stream_is_back(device) -> None:
    model, told, x = nn.Linear(4, 4).to(device), [], torch.randn(8, 4, device=device)
    calls = iter(range(100))

    def run(x):
        if next(calls) == 3:  # the recording
            raise ValueError("a step of its own mind")
        return model(x).detach()

    step = step_with(model, told, run)
    for _ in range(8):
        assert relative(step(x), model(x)) <= 1e-5
    assert told == [
        "a step: no CUDA graph, it cannot be recorded (a step of its own mind); it runs eagerly"
    ]


def test_random_numbers_in_a_graph_are_those_of_eager_steps(device) -> None:
    model, told, drawn = nn.Linear(4, 64).to(device), [], {}
    x = torch.randn(32, 4, device=device)
    step = lambda x: nn.functional.dropout(model(x), 0.5).detach()
    for name, run in (("graphed", step_with(model, told, step)), ("eager", step)):
        torch.manual_seed(5)
        drawn[name] = [run(x).clone() for _ in range(12)]
    if device.type == "cuda":
        pairs = zip(drawn["graphed"], drawn["eager"], strict=True)
        assert [n for n, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == []
        assert not torch.equal(drawn["graphed"][-1], drawn["graphed"][-2])
    assert "one CUDA graph" in told[0] and len(told) == 1, told


def test_a_graph_of_inference_mode_does_not_spoil_one_of_training(device) -> None:
    model, told, x = nn.Linear(4, 4).to(device), [], torch.randn(8, 4, device=device)
    serving = step_with(model, told, lambda x: model(x))
    with torch.inference_mode():
        for _ in range(8):
            found = serving(x)
            assert found.is_inference() and relative(found, model(x)) <= 1e-5

    def gradient(x):
        loss = nn.functional.dropout(model(x), 0.5).square().sum()
        return torch.autograd.grad(loss, model.weight)[0]

    training = step_with(model, told, gradient)
    for _ in range(12):
        assert training(x).isfinite().all()
    with torch.inference_mode():
        assert relative(serving(x), model(x)) <= 1e-5
    assert len(told) == 2 and all("one CUDA graph" in line for line in told), told


def test_a_graph_on_another_stream(device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has no streams")
    model, told = nn.Linear(4, 4).to(device), []
    step = step_with(model, told, lambda x: model(x).detach())
    streams = [torch.cuda.Stream() for _ in range(2)]
    for n in range(12):
        with torch.cuda.stream(streams[n // 2 % 2]):
            x = torch.full((8, 4), float(n), device=device)
            assert relative(step(x), model(x)) <= 1e-5
    assert "one CUDA graph" in told[0] and len(told) == 1, told
