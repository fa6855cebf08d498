"""From the command line: train in gamut, invert, look; and a verdict before anybody trains."""

from __future__ import annotations

import errno
import json
import re

import numpy as np
import pytest
from PIL import Image

from pgn_fast.adapters import atomic
from pgn_fast.cli import main


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rgb")
    words = ["train", "--deploy", "rgb", "--epochs", "1", "--warmup-epochs", "0", "--lr", "3e-3"]
    words += ["--library-size", "16", "--resolution", "16", "--device", "cpu"]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return folder / "run" / "best"


def test_invert_writes_canvases_pictures_and_report(adapter, tmp_path, capsys):
    out = tmp_path / "inverted"
    assert main(["invert", str(adapter), "--out", str(out), "--count", "3"]) == 0
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

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    assert main([*words, "2"]) == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_verdict(capsys):
    assert main(["invert", "--analyse", "test_vit", "--random-weights"]) == 0
    out = capsys.readouterr().out
    assert "test_vit: exact" in out and "random weights" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["invert"], "give an ADAPTER and --out DIR, or --analyse NAME"),
        (["invert", "nowhere", "--out", "x"], "nowhere"),
        (["invert", "nowhere", "--out", "x", "-n", "0"], "-n/--count: is 0; give 1 or more"),
        (["invert", "nowhere", "--analyse", "test_vit"], "give one of them"),
        (["invert", "--analyse", "resnet18", "--random-weights"], "resnet18|ResNet"),
        (["train", "--deploy", "rgb", "--method", "vpt-deep"], "--deploy rgb trains --method pgn"),
        (["train", "--deploy", "rgb", "--num-prompts", "20"], "leave no room for an image"),
        (
            ["train", "--deploy", "rgb", "--mean", "0.4", "0.4", "0.4"],
            "normalised as the server does, by 0.5 0.5 0.5",
        ),
    ],
)
def test_one_line_for_what_cannot_work(words, message, tmp_path, capsys):
    where = ["--output", str(tmp_path / "run")] if words[0] == "train" else []
    assert main([*words, *where]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_demo(tmp_path, capsys):
    assert main(["demo", "--rgb", "--quick", "--output", str(tmp_path)]) == 0
    assert "from uint8 canvases" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "rgb.png")).std() > 5
