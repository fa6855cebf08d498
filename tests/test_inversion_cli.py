"""From the command line: train in gamut, invert, look; and a verdict before anybody trains."""

from __future__ import annotations

import errno
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pgn_fast import _files
from pgn_fast.adapters import backbone_pixels
from pgn_fast.cli import main
from pgn_fast.errors import UserError
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.methods import deployment_library


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rgb")
    words = ["train", "--deploy", "rgb", "--epochs", "1", "--warmup-epochs", "0", "--lr", "3e-3"]
    words += ["--library-size", "16", "--resolution", "16", "--device", "cpu"]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return folder / "run" / "best"


def test_invert_writes_canvases_pictures_and_report(adapter, tmp_path, capsys):
    out = tmp_path / "inverted"
    # the run's folder is enough: its best adapter is meant
    assert main(["invert", str(adapter.parent), "--out", str(out), "--count", "3"]) == 0
    assert "relative token error" in capsys.readouterr().out
    files = {path.name for path in out.iterdir()}
    pictures = {"canvas_000.png", "canvas_001.png", "canvas_002.png", "overview.png"}
    assert files == pictures | {"library.png", "errors.png", "report.json", "library.safetensors"}
    for name in files - {"report.json", "library.safetensors"}:
        assert np.asarray(Image.open(out / name)).std() > 5
    assert Image.open(out / "canvas_000.png").size == (32, 32)
    report = json.loads((out / "report.json").read_text())
    assert report["prompt_pos"] == "canvas" and report["layout"]["image"] == [3, 3]
    assert len(report["canvases"]["token_rel_err"]) == 3 * 7
    assert max(report["canvases"]["output_rel_err"]) < 0.01
    assert len(report["reachability"]["residual"]) == 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of six images of noise."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.randint(0, 256, (64, 64, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def test_vit(tmp_path_factory):
    """Arguments for a timm backbone with 4 x 4 patches of 16 pixels, whose weights are a file."""
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model("test_vit", img_size=64).state_dict(), weights)
    kwargs = ["pretrained=False", "img_size=64", f"checkpoint_path={weights}"]
    return ["--model", "test_vit", "--model-kwargs", *kwargs]


def trained(photos, test_vit, folder, *words):
    """One epoch in a few seconds; the adapter's folder."""
    command = ["train", str(photos), *test_vit, *words, "--output", str(folder / "run")]
    command += ["--num-prompts", "5", "--library-size", "8", "--resolution", "32", "--epochs", "1"]
    command += ["--generator-kwargs", "channels=4", "groups=2", "--warmup-epochs", "0", "-b", "5"]
    assert main([*command, "--device", "cpu"]) == 0
    return folder / "run" / "best"


def inverted(adapter, photos, test_vit, folder, *words):
    """What ``pgn-fast invert`` writes into its report."""
    command = ["invert", str(adapter), *test_vit, "--out", str(folder / "out"), "-n", "2"]
    assert main([*command, "--images", str(photos), *words]) == 0
    return json.loads((folder / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    "words, grid, compensated, file",
    [
        (["--layout", "enlarged"], [3, 7], True, "canvas_000.png"),
        (["--layout", "enlarged", "--no-compensate"], [3, 7], False, "canvas_000.png"),
        (
            ["--layout", "enlarged", "--canvas-grid", "4x6", "--allow-blank"],
            [4, 6],
            True,
            "canvas_000.png",
        ),
        (
            ["--image-grid", "3x3", "--server", "codec=jpeg", "subsampling=2", "resize=64"],
            [4, 4],
            False,
            "canvas_000.jpg",
        ),
    ],
)
def test_layouts(words, grid, compensated, file, photos, test_vit, tmp_path):
    """Trained in a layout, inverted without naming it: what is served is what was trained."""
    adapter = trained(photos, test_vit, tmp_path, "--deploy", "rgb", *words)
    report = inverted(adapter, photos, test_vit, tmp_path)
    assert report["layout"]["grid"] == grid
    assert report["layout"]["compensate_positions"] == compensated
    size = [side * 16 for side in grid[::-1]]
    assert list(Image.open(tmp_path / "out" / file).size) == size
    errors = report["canvases"]["output_rel_err"]
    assert len(errors) == 2
    if file.endswith("png"):  # JPEG changes the image, noise most of all
        assert max(errors) < 0.01


def test_latent_adapters(photos, test_vit, tmp_path, capsys):
    """Trained without --deploy rgb: the same tokens on a larger canvas, or another sequence."""
    adapter = trained(photos, test_vit, tmp_path)
    report = inverted(adapter, photos, test_vit, tmp_path)
    assert report["layout"]["grid"] == [3, 7] and report["prompt_pos"] == "none"
    assert max(report["canvases"]["output_rel_err"]) < 0.01
    assert "was not trained on" not in capsys.readouterr().err
    report = inverted(
        adapter,
        photos,
        test_vit,
        tmp_path,
        "--layout",
        "border",
        "--server",
        "resize=70",
        "crop=64",
    )
    assert report["layout"]["image"] == [3, 3] and report["canvases"]["output_rel_err"] == []
    assert Image.open(tmp_path / "out" / "canvas_000.png").size == (70, 70)
    assert "note: the adapter was not trained on a 4x4 canvas" in capsys.readouterr().err


def test_invert_takes_image_files(adapter, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 40, 3), np.uint8)).save(photo)
    words = ["invert", str(adapter), "--out", str(tmp_path / "out"), "--images", str(photo)]
    assert main(words) == 0
    assert len(list((tmp_path / "out").glob("canvas_*.png"))) == 1


def test_unreadable_images_are_named_and_the_others_keep_their_names(adapter, tmp_path, capsys):
    folder, random = tmp_path / "photos", np.random.RandomState(0)
    folder.mkdir()
    for name in "abc":
        Image.fromarray(random.randint(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"torn")
    out = tmp_path / "out"
    assert main(["invert", str(adapter), "--out", str(out), "--images", str(folder)]) == 0
    assert f"unreadable, left out: {folder / 'b.png'}" in capsys.readouterr().err
    canvases = json.loads((out / "report.json").read_text())["canvases"]
    assert canvases["images"] == [str(folder / "a.png"), str(folder / "c.png")]
    assert len(canvases["unreadable"]) == 1 and "b.png" in canvases["unreadable"][0]


def test_a_full_disk_leaves_the_older_files_whole(adapter, tmp_path, monkeypatch):
    words = ["invert", str(adapter), "--out", str(tmp_path / "out"), "--count"]
    assert main([*words, "1"]) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", fsync)
    assert main([*words, "2"]) == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_verdict(capsys):
    assert main(["invert", "--analyze", "test_vit", "--random-weights"]) == 0
    out = capsys.readouterr().out
    assert "test_vit: exact" in out and "random weights" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["invert"], "give an ADAPTER and --out DIR, or --analyze NAME"),
        (["invert", "nowhere", "--out", "x"], "nowhere"),
        (["invert", "nowhere", "--out", "x", "-n", "0"], "-n/--count: is 0; give 1 or more"),
        (["invert", "nowhere", "--analyze", "test_vit"], "give one of them"),
        (["invert", "--analyze", "resnet18", "--random-weights"], "resnet18|ResNet"),
        (["train", "--deploy", "rgb", "--method", "vpt-deep"], "--deploy rgb trains --method pgn"),
        (["train", "--deploy", "rgb", "--num-prompts", "20"], "leave no room for an image"),
        (
            ["train", "--layout", "enlarged"],
            "how prompts become pixels: add --deploy rgb",
        ),
        (["train", "--no-compensate"], "--no-compensate says how prompts become pixels"),
        (["train", "--deploy", "rgb", "--layout", "enlarged"], "pgn_demo_vit here has one size"),
        (["train", "--deploy", "rgb", "--canvas-grid", "4x6"], "belong to layout enlarged"),
        (["train", "--deploy", "rgb", "--image-grid", "4x"], "is '4x'; give rows and columns"),
        (["train", "--deploy", "rgb", "--server", "codec=jpeg", "subsampling=2"], "gray-only"),
        (["train", "--deploy", "rgb", "--server", "color=1"], "ServerSpec has no color; known"),
        (["invert", "--analyze", "pgn_demo_vit", "--layout", "enlarged"], "has one size"),
        (
            ["train", "--deploy", "rgb", "--mean", "0.4", "0.4", "0.4"],
            "normalized as the server does, by 0.5 0.5 0.5",
        ),
    ],
)
def test_one_line_for_what_cannot_work(words, message, tmp_path, capsys):
    where = ["--output", str(tmp_path / "run")] if words[0] == "train" else []
    assert main([*words, *where]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_what_a_trained_adapter_does_not_take(adapter, tmp_path, capsys):
    words = ["invert", str(adapter), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--image-grid", "2x2"], "library was trained for a 4x4 canvas with an image of 3x3"),
        (["--server", "codec=jpeg"], "a server with codec=png but is deployed on one with codec="),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options, server, message",
    [
        ({"global_pool": "avg"}, None, "pools over the patches"),
        ({}, {"codec": "jpeg", "subsampling": 2}, "does not keep"),
    ],
)
def test_positions_that_cannot_be_compensated(options, server, message):
    config = TrainConfig.make(
        model="test_vit", deploy="rgb", layout="enlarged", num_prompts=4, server=server or {}
    )
    backbone = timm.create_model("test_vit", dynamic_img_size=True, **options)
    with pytest.raises(UserError, match=message):
        deployment_library(config, backbone, backbone_pixels(backbone))


def test_demo(tmp_path, capsys):
    record = tmp_path / "results" / "demo_rgb.json"
    words = ["demo", "--rgb", "--quick", "--output", str(tmp_path), "--record", str(record)]
    assert main(words) == 0
    assert "from uint8 canvases" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "rgb.png")).std() > 5
    content = json.loads(record.read_text())
    assert content == json.loads((tmp_path / "rgb.json").read_text())
    (run,) = content["runs"]
    assert run["seed"] == 0 and content["mean"]["latent"] == run["latent"]
    assert content["command"] == "pgn-fast demo --rgb --seeds 3 --quick"
    assert main(["demo", "--rgb", "--split", "validation"]) == 2
