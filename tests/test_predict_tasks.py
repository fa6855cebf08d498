"""``pgn-fast predict --tasks``: every image through every task of a folder, wide or long."""

from __future__ import annotations

import csv
import json
import os
import shutil

import pytest
import torch
from small_world import write_images
from timm.data import create_transform

import pgn_fast
from pgn_fast.adapters import from_pretrained, save_pretrained
from pgn_fast.backbone.load import load_backbone
from pgn_fast.cli import build_parser, main
from pgn_fast.images import read_image
from pgn_fast.models.baselines import FineTuned, LinearProbe

PIXELS = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}
CLASSES = {"pets": ["ant", "bee, or wasp", "cat"], "cars": None, "probe": None, "tuned": None}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Four tasks of three preprocessings; one is a run's folder, one has a backbone of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    backbone = load_backbone("pgn_demo_vit")
    torch.manual_seed(0)
    models = {
        "pets": pgn_fast.VPT(backbone, 3, num_prompts=2),
        "cars": pgn_fast.VPT(backbone, 5, num_prompts=3, layers=[4, 5]),
        "probe": LinearProbe(backbone, 2),
        "tuned": FineTuned(load_backbone("pgn_demo_vit"), 2),
    }
    for name, model in models.items():
        torch.nn.init.normal_(model.head.weight)
        pixels = PIXELS | ({"crop_pct": 1.0} if name == "cars" else {})
        place = folder / name / "best" if name == "cars" else folder / name
        save_pretrained(model, place, class_names=CLASSES[name], preprocessing=pixels)
    return folder


@pytest.fixture
def world(tasks, tmp_path):
    write_images(tmp_path / "new", 2)
    shutil.copytree(tasks, tmp_path / "tasks")
    return tmp_path


def predict(world, *words):
    given = [world / "new", "--tasks", world / "tasks", "--device", "cpu", "-j", "0", "-b", "4"]
    return main(["predict", *map(str, [*given, *words])])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def expected(world, name, file):
    place = world / "tasks" / name
    model = from_pretrained(place / "best" if name == "cars" else place, None)
    pixels = {k: model.preprocessing[k] for k in PIXELS}
    with torch.inference_mode():
        return model(create_transform(**pixels, is_training=False)(read_image(file))[None])[0]


def test_a_wide_table_has_columns_for_each_task(world):
    assert predict(world, "--output", world / "p.csv", "--logits", "--topk", 3) == 0
    rows = table(world / "p.csv")
    assert len(rows) == 6
    assert list(rows[0])[:4] == ["file", "cars/class1", "cars/probability1", "cars/class2"]
    # a task of two classes has two best ones
    assert "probe/class2" in rows[0] and "probe/class3" not in rows[0]
    assert "pets/logit_bee, or wasp" in rows[0]
    for row in rows[:2]:
        for name, classes in CLASSES.items():
            right = expected(world, name, row["file"])
            names = classes or [str(c) for c in range(len(right))]
            found = torch.tensor([float(row[f"{name}/logit_{c}"]) for c in names])
            assert (found - right).abs().max() <= 1e-5 * right.abs().max(), name
            assert row[f"{name}/class1"] == names[int(right.argmax())]
            best = float(right.softmax(0).max())
            assert float(row[f"{name}/probability1"]) == pytest.approx(best, abs=1e-5)


def test_a_long_table_has_rows_for_each_task(world):
    assert predict(world, "--output", world / "wide.jsonl", "--logits") == 0
    assert predict(world, "--output", world / "long.csv", "--table", "long", "--topk", 3) == 0
    assert predict(world, "--output", world / "long.jsonl", "--table", "long", "--logits") == 0
    wide = [json.loads(line) for line in (world / "wide.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (world / "long.jsonl").read_text().splitlines()]
    rows = table(world / "long.csv")
    assert len(wide) == 6 and len(lines) == len(rows) == 24
    assert [line["task"] for line in lines[:4]] == sorted(CLASSES)
    for line, row in zip(lines, rows, strict=True):
        (whole,) = [w for w in wide if w["file"] == line["file"]]
        answer = whole["tasks"][line["task"]]
        assert {"file": line["file"], "task": line["task"], **answer} == line
        assert (row["file"], row["task"]) == (line["file"], line["task"])
        assert row["class1"] == line["predictions"][0]["class"]
        assert (row["class3"] == "") == (len(line["logits"]) < 3)


def test_it_resumes_in_parts_and_an_adapter_that_changed_is_another_run(world, capsys):
    output = world / "p.csv"
    assert predict(world, "--output", world / "whole.csv") == 0
    assert predict(world, "--output", output, "--parts", 3) == 0
    assert output.read_bytes() == (world / "whole.csv").read_bytes()
    (world / "p.csv.parts" / "part-00001-of-00003.csv").unlink()
    capsys.readouterr()
    assert predict(world, "--output", output, "--parts", 3) == 0
    assert capsys.readouterr().err.count("is there already") == 2
    shutil.rmtree(world / "tasks" / "pets")
    assert predict(world, "--output", output, "--parts", 3) == 0
    assert "is there already" not in capsys.readouterr().err
    assert not any(name.startswith("pets/") for name in table(output)[0])


def test_a_damaged_task_is_named_and_the_others_are_written(world, capsys):
    weights = world / "tasks" / "pets" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert predict(world, "--output", world / "p.csv") == 2
    error = capsys.readouterr().err
    assert f"left out: {world / 'tasks' / 'pets'}" in error and "1 tasks were left out" in error
    assert "cars/class" in table(world / "p.csv")[0]


def test_a_task_of_other_frozen_weights_is_left_out(world, capsys):
    other = load_backbone("pgn_demo_vit")
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.01)
    save_pretrained(
        pgn_fast.VPT(other, 2, num_prompts=1), world / "tasks" / "zebras", preprocessing=PIXELS
    )
    assert predict(world, "--output", world / "p.csv") == 2
    error = capsys.readouterr().err
    assert "zebras" in error and error.count("digest ") >= 2
    assert not any("zebras" in name for name in table(world / "p.csv")[0])
    with pytest.warns(UserWarning, match="backbone is not the one of the training"):
        assert predict(world, "--no-strict-backbone", "--output", world / "q.csv") == 0
    assert "zebras/class" in table(world / "q.csv")[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--table", "long", "--logits"], "give --format jsonl, or --table wide"),
        (["--tasks", "nowhere"], "there is no folder nowhere"),
        (["--parts", "2"], "--output FILE is needed"),
    ],
)
def test_what_cannot_be_is_one_line(world, words, message, capsys):
    assert predict(world, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, images",
    [
        ("a --tasks t", ["a"]),
        ("--tasks t a", ["a"]),
        ("a b --tasks t", ["a", "b"]),
        ("a --tasks t b c", ["a", "b", "c"]),
    ],
)
def test_images_stand_anywhere(words, images):
    args = build_parser("predict").parse_args(["predict", *words.split()])
    assert args.tasks == "t" and [args.adapter, *(args.images or ())] == images


def test_an_adapter_and_its_images_may_have_flags_between_them():
    args = build_parser("predict").parse_args(["predict", "adapter", "--topk", "3", "a", "b"])
    assert (args.adapter, args.images, args.topk) == ("adapter", ["a", "b"], 3)


def test_flags_that_need_each_other(world, capsys):
    place = str(world / "tasks" / "pets")
    assert main(["predict", place]) == 2
    assert "required: IMAGE" in capsys.readouterr().err
    assert main(["predict", place, str(world / "new"), "--table", "long"]) == 2
    assert "give both, or neither" in capsys.readouterr().err


def test_an_adapter_behind_a_link_that_changed_is_another_run(world, capsys):
    link, elsewhere, output = world / "tasks" / "probe", world / "elsewhere", world / "p.csv"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    assert predict(world, "--output", output, "--parts", 2) == 0
    capsys.readouterr()
    assert predict(world, "--output", output, "--parts", 2) == 0
    assert capsys.readouterr().err.count("is there already") == 2
    for file in elsewhere.iterdir():
        os.utime(file, (1, 1))  # as one that was written at another time
    assert predict(world, "--output", output, "--parts", 2) == 0
    assert capsys.readouterr().err.count("is written") == 2
