"""Predictions of any number of images: streamed, whole or not at all, in parts that go on."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from small_world import tiny_vit, write_images

import pgn_fast
import pgn_fast.cli._answers  # before its backbone is another one
from pgn_fast.backbone import load
from pgn_fast.cli import main
from pgn_fast.cli import predict as command
from pgn_fast.train import tables

NAMES = ["blue", "green", "red"]


@pytest.fixture(autouse=True)
def backbone(monkeypatch):
    """The adapter's backbone, whatever it is called."""
    monkeypatch.setattr(load, "load_backbone", lambda name, **options: tiny_vit())


@pytest.fixture
def world(tmp_path):
    torch.manual_seed(0)
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
    torch.nn.init.normal_(model.head.weight)
    model.class_names = NAMES
    model.save_pretrained(tmp_path / "run" / "best")
    write_images(tmp_path / "new", 4)
    return tmp_path


def predict(world, *words, images="new"):
    given = [world / "run", world / images, "--device", "cpu", "-j", "0", "-b", "3"]
    given += ["--model", "tiny", *words]
    return main(["predict", *map(str, given)])


def table(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_stands_for_its_best_adapter(world, capsys):
    assert predict(world) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "file,class,probability" and len(lines) == 13


def test_logits_are_the_models(world):
    assert predict(world, "--output", world / "p.csv", "--logits", "--topk", "2") == 0
    assert predict(world, "--output", world / "p.jsonl", "--logits") == 0
    rows = table(world / "p.csv")
    lines = [json.loads(line) for line in (world / "p.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        logits = torch.tensor([float(row[f"logit_{name}"]) for name in NAMES])
        assert line["logits"] == logits.tolist()
        best = logits.softmax(0).topk(2)
        assert [row["class1"], row["class2"]] == [NAMES[i] for i in best.indices]
        assert float(row["probability1"]) == pytest.approx(float(best.values[0]), abs=2e-6)
        assert line["predictions"][0]["class"] == row["class1"]


def test_rows_stream_and_a_file_is_whole_or_not_there(world, monkeypatch):
    output, seen = world / "p.csv", []
    real = command._Predictor._batches

    def stop_after_two(self, split):
        for number, batch in enumerate(real(self, split)):
            if number == 2:
                (temporary,) = world.glob(".p.csv.*.tmp")
                seen.append(temporary.read_text().count(".png"))
                raise KeyboardInterrupt
            yield batch

    output.write_text("the old one")
    with monkeypatch.context() as patched:
        patched.setattr(command._Predictor, "_batches", stop_after_two)
        assert predict(world, "--output", output) == 130
    assert seen == [6] and output.read_text() == "the old one"
    assert not list(world.glob(".*.tmp"))
    assert predict(world, "--output", output) == 0 and len(table(output)) == 12


def test_outputs_that_cannot_be_are_refused_before_the_work(world, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_backbone", lambda *a, **k: pytest.fail("loaded"))
    for output, message in (
        (world / "nowhere" / "x.csv", "there is no folder"),
        (world / "new", "is a folder"),
    ):
        assert predict(world, "--output", output) == 2
        error = capsys.readouterr().err
        assert message in error and ".tmp" not in error and error.count("\n") == 1
    assert predict(world, "--parts", 2) == 2
    assert "--output FILE is needed" in capsys.readouterr().err


def test_a_failing_write_names_the_users_path(tmp_path):
    path = tmp_path / "gone" / "x.csv"
    with pytest.raises(OSError, match=r"gone/x\.csv'$"), tables.replacing(path):
        pass


def test_a_full_disk_names_the_users_path_and_what_is_free(tmp_path):
    """As a write fails: the system's error then names no file."""
    path = tmp_path / "x.csv"
    path.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"left on device \(.* are free\): .*x\.csv'$"
    with pytest.raises(OSError, match=message), tables.replacing(path):
        raise full
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_and_stays_one(world):
    os.mkfifo(world / "pipe")
    reader = os.open(world / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert predict(world, "--output", world / "pipe") == 0
        assert os.read(reader, 100_000).count(b".png") == 12
    finally:
        os.close(reader)
    assert not (world / "pipe").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_not_utf8_are_written(world, capsysbinary):
    raw = os.fsencode(world / "new" / "red")
    os.rename(raw + b"/0.png", raw + b"/caf\xe9.png")
    assert predict(world, "--output", world / "p.csv") == 0
    assert (world / "p.csv").read_bytes().count(b"/caf\xe9.png") == 1
    assert len(table(world / "p.csv")) == 12
    assert predict(world, "--output", world / "p.jsonl") == 0
    names = [
        json.loads(line)["file"] for line in (world / "p.jsonl").read_text("ascii").splitlines()
    ]
    assert sum(os.fsencode(name).endswith(b"/caf\xe9.png") for name in names) == 1
    assert all(os.path.exists(name) for name in names)
    capsysbinary.readouterr()
    assert predict(world) == 0
    assert b"/caf\xe9.png," in capsysbinary.readouterr().out


def test_what_cannot_be_read_is_named_and_counted(world, capsys):
    (world / "new" / "red" / "0.png").write_bytes(b"torn")
    Image.new("RGB", (1, 400_000)).save(world / "new" / "thin.png")
    (world / "new" / "notes.txt").write_text("")
    assert predict(world, "--output", world / "p.csv") == 0
    error = capsys.readouterr().err
    assert "1 file skipped: 1 .txt" in error and "11 of 13 images classified" in error
    assert error.count("unreadable, left out: ") == 2 and "more than 1000 to 1" in error
    assert predict(world, images="new/thin.png") == 2


# parts


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_images_and_the_last_one_joins(world, monkeypatch, kind, order):
    whole, joined = world / f"whole.{kind}", world / f"joined.{kind}"
    assert predict(world, "--output", whole) == 0
    for turn, rank in enumerate(order):
        as_rank(monkeypatch, rank, 3)
        assert not joined.exists()
        assert predict(world, "--output", joined) == 0
        parts = sorted((world / f"joined.{kind}.parts").glob(f"part-*-of-00003.{kind}"))
        assert len(parts) == turn + 1
    assert joined.read_bytes() == whole.read_bytes()


def test_more_processes_than_images(world, monkeypatch):
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        assert predict(world, "--output", world / "p.csv", images="new/red/0.png") == 0
    assert len(table(world / "p.csv")) == 1


def test_a_second_start_computes_what_is_missing(world, monkeypatch, capsys):
    output = world / "p.csv"
    computed = []
    real = command._Predictor.write

    def record(self, split, file):
        if len(computed) == stop_at:
            raise KeyboardInterrupt
        computed.append(list(split.indices))
        return real(self, split, file)

    monkeypatch.setattr(command._Predictor, "write", record)
    stop_at = 2
    assert predict(world, "--output", output, "--parts", 4) == 130
    assert len(computed) == 2 and not output.exists()
    stop_at = 99
    assert predict(world, "--output", output, "--parts", 4) == 0
    assert computed == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert capsys.readouterr().err.count("is there already") == 2
    before = output.read_bytes()
    # nothing changed: nothing is computed
    assert predict(world, "--output", output, "--parts", 4) == 0
    assert len(computed) == 4 and output.read_bytes() == before
    # an image is another one: its part is computed again
    write_images(world / "other", 1)
    os.replace(world / "other" / "blue" / "0.png", world / "new" / "red" / "3.png")
    assert predict(world, "--output", output, "--parts", 4) == 0
    assert computed[4:] == [[9, 10, 11]] and output.read_bytes() != before
    # and so is everything where the columns, or the adapter, are others
    assert predict(world, "--output", output, "--parts", 4, "--topk", "2") == 0
    assert len(computed) == 9 and "class2" in table(output)[0]
    os.utime(world / "run" / "best" / "adapter_model.safetensors", (1, 1))
    assert predict(world, "--output", output, "--parts", 4, "--topk", "2") == 0
    assert len(computed) == 13


def test_a_reader_that_has_enough_ends_it_quietly(world):
    code = (
        "import sys; from pgn_fast.cli import predict\n"
        "class Many:\n"
        "    columns = None\n"
        "    def write(self, split, file):\n"
        "        for i in range(100_000): file.write('row\\n')\n"
        "        return {'rows': 1, 'images': 1}\n"
        "sys.exit(predict._to_terminal(Many(), None))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
