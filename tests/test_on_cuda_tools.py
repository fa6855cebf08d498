"""Banks, servers, inversion, autotune and other commands on a CUDA device. See on_device.py."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from odd_images import encode
from on_device import exact, graphs, relative
from small_world import tiny_vit
from task_world import FAMILIES, backbone, write_adapters
from task_world import images as task_images
from test_inversion import IMAGES, gamut_pgn
from test_tasks import filled

import pgn_fast
from pgn_fast.cli import main
from pgn_fast.inversion import PatchMap, ServerSpec, verify
from pgn_fast.serve import load_served_model, load_served_tasks

pytestmark = pytest.mark.gpu
__all__ = ["exact", "graphs"]  # fixtures


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_each_tasks_own_model(device, family) -> None:
    bank, tasks = filled(backbone(family).to(device))
    names = [*tasks, *reversed(tasks)]
    pixels = task_images(len(names)).to(device)
    answers = bank(pixels, names)
    every = bank.every(pixels[:3])
    with torch.no_grad():
        for image, name, answer in zip(pixels, names, answers, strict=True):
            assert answer.device.type == device.type
            assert relative(answer, tasks[name](image[None])[0]) <= 2e-5, name
        for name, logits in every.items():
            assert relative(logits, tasks[name](pixels[:3])) <= 2e-5, name
    if device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16):
            half = bank(pixels, names)
        for one, other in zip(half, answers, strict=True):
            assert float((one - other).abs().max()) <= 0.1 * max(float(other.abs().max()), 1)
    assert "tasks on one" in bank.explain()


def test_tasks_that_left_memory_come_back_to_the_device(device, tmp_path) -> None:
    vit, made = write_adapters(tmp_path)
    pixels = torch.randn(3, 3, *vit.patch_embed.img_size)
    expected = {name: model.eval()(pixels) for name, model in made.items()}
    bank = pgn_fast.TaskBank.from_directory(tmp_path, copy.deepcopy(vit).to(device), max_bytes=1)
    for _ in range(2):
        for name, logits in expected.items():
            assert relative(torch.stack(bank(pixels.to(device), [name] * 3)), logits) <= 1e-4


@pytest.mark.parametrize("max_batch", [1, 6])
def test_a_served_model_answers_by_graphs(device, graphs, max_batch, caplog) -> None:
    vit = tiny_vit(img_size=32, num_classes=10)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": (3, 32, 32)}
    served = load_served_model(vit, name="tiny", device=device)
    caplog.set_level("INFO", logger="pgn_fast.serve")
    served.warm_up(max_batch)
    lines = [line for line in caplog.messages if "one CUDA graph" in line]
    assert len(lines) == 2 * (1 if max_batch < 2 else 4), caplog.messages
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 256, (3, 32, 32), dtype=np.uint8) for _ in range(7)]
    for output in ("logits", "features"):
        for count in (1, 3, 6, 7):
            (found,) = served.run([(levels[:count], output)])
            assert found.device.type == "cpu"
            pixels = served.preprocessing.normalize(served.preprocessing.stack(levels[:count]))
            with torch.no_grad():
                tokens = served.model.forward_features(pixels.to(device))
                expected = served.model.forward_head(tokens, pre_logits=output == "features")
            assert relative(found, expected) <= 1e-4, (output, count)


def test_the_server_answers_from_the_device(device, graphs) -> None:
    serving = pytest.importorskip("serving")
    testclient = pytest.importorskip("starlette.testclient")
    from pgn_fast.serve import create_app

    served = load_served_model(serving.tiny_vit(), device=device)
    pictures = serving.images(3, (40, 40))
    with testclient.TestClient(create_app(served)) as client:
        encoded = [encode(picture) for picture in pictures]
        answers = [
            client.post("/v1/predict", json=serving.as_json(encoded, output="logits"))
            for _ in range(8)
        ]
    assert [answer.status_code for answer in answers] == [200] * 8
    first = torch.tensor(np.array(answers[0].json()["values"], dtype=np.float32))
    assert all(
        relative(torch.tensor(np.array(a.json()["values"], dtype=np.float32)), first) <= 1e-4
        for a in answers
    )


def test_served_tasks_are_those_of_the_cpu(device, tmp_path) -> None:
    write_adapters(tmp_path)
    rng = np.random.default_rng(0)
    from PIL import Image

    files = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(3)]
    found = []
    for where in (device, torch.device("cpu")):
        tasks = load_served_tasks(tmp_path, watch_s=0, device=where)
        tasks.warm_up(4)
        found.append([*tasks.answer(files, ["cats", "dogs", "owls"]), *tasks.every(files).values()])
    assert all(t.device.type == "cpu" for t in found[0])
    assert all(relative(a, b) <= 1e-4 for a, b in zip(*found, strict=True))


def test_predictions_of_every_task(device, tmp_path, capsys) -> None:
    from small_world import write_images

    write_adapters(tmp_path / "tasks")
    write_images(tmp_path / "new", 2)
    words = ["predict", "--tasks", str(tmp_path / "tasks"), str(tmp_path / "new"), "--amp"]
    assert main([*words, "--device", device.type, "-j", "0", "-b", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize("cpu_model", [False, True])
def test_inversion(device, cpu_model) -> None:
    model = gamut_pgn()
    if not cpu_model:
        model.to(device)
    prompter = pgn_fast.invert(model).to(device)
    if cpu_model:
        model.to(device)
    pixels = IMAGES.to(device)
    normalized = ServerSpec.from_backbone(model.backbone).normalize(pixels)
    canvases = prompter(normalized)
    assert canvases.dtype == torch.uint8 and canvases.device.type == device.type
    report = verify(prompter, model, pixels)
    assert max(report.output_rel_err) < 1e-2
    assert len(prompter.encode(pixels)) == 2


def test_gamut_libraries_train_and_are_latent_first(device) -> None:
    model = gamut_pgn().to(device).train()
    library = model.prompter.token_library
    assert library.A.device.type == device.type
    before = library.theta.detach().clone()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=10.0)
    model(IMAGES.to(device)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, library.theta)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert model(IMAGES.to(device)).isfinite().all()
    patch_map = PatchMap.from_backbone(model.backbone)
    latent = type(library).from_latent(library().detach(), patch_map, prompt_pos="canvas")
    assert relative(latent(), library()) < 0.05


def test_the_demo_trains_and_is_inverted(device, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    words = ["--epochs", "1", "--device", device.type, "--output", str(run), "-j", "0"]
    assert main(["train", "--method", "vpt-shallow", "--num-prompts", "2", *words]) == 0
    assert main(["eval", str(run), "--device", device.type]) == 0
    assert "top-1" in capsys.readouterr().out


def command(*words: object, seconds: float = 240, **environment: str) -> str:
    """What a command of its own process prints."""
    found = subprocess.run(
        [sys.executable, "-m", "pgn_fast", *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_autotune_remembers_what_it_found(device, tmp_path) -> None:
    # the interpreter's kernels are no candidates on a CPU
    minutes = 0.5 if device.type == "cuda" else 0.1
    said = command(
        *("autotune", "--device", device.type, "--model", "test_vit", "-b", 2),
        *("--minutes", minutes, "--export", tmp_path / "found.json"),
        XDG_CACHE_HOME=str(tmp_path),
        TRITON_INTERPRET="0",
    )
    assert "kept in " in said and "barred" not in said, said
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    tried = [row for row in rows if row["verdict"] in ("preferred", "slower")]
    if device.type == "cuda":
        assert {row["backend"] for row in rows} == {"triton", "cuda"}
    else:
        assert tried, rows
    shown = command("env", XDG_CACHE_HOME=str(tmp_path))
    assert "measured" in shown and "with test_vit" in shown
    if device.type == "cuda":
        assert torch.cuda.get_device_name() in shown


def test_env_and_bench(device, capsys) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    if device.type == "cuda":
        assert "cuda:0" in shown and torch.cuda.get_device_name() in shown
    sizes = ["-b", "2", "--rounds", "2"]
    assert main(["bench", *sizes, "--device", device.type]) == 0
    assert "training step" in capsys.readouterr().out


def test_memory_is_given_back(device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has no figure for it")
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2).to(device)
    step = lambda: model(torch.randn(8, 3, 16, 16, device=device)).square().sum().backward()
    step()
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step()
        model.zero_grad()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
