"""Label files as people have them, and images with several labels from training to prediction."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from small_world import MODEL, tiny_vit_kwargs

from pgn_fast.adapters import from_pretrained, read_adapter
from pgn_fast.cli import main
from pgn_fast.errors import UserError
from pgn_fast.models import LinearProbe
from pgn_fast.train import loop
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import load_splits, split_to_score
from pgn_fast.train.label_file import read_labels

CPU = torch.device("cpu")
COLORS = ("blue", "green", "red")
CHANNEL = {"red": 0, "green": 1, "blue": 2}


def write(root, names):
    """Gray images, in each of which the channels of its colors are bright."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = [40 + i % 7] * 3
        for color in colors_of(i):
            level[CHANNEL[color]] = 220
        Image.new("RGB", (16, 16), tuple(level)).save(path)


def colors_of(i):
    """Of image number i: none, one, two or three."""
    return [color for bit, color in enumerate(COLORS) if i >> bit & 1]


@pytest.fixture
def photos(tmp_path):
    write(tmp_path / "photos", [f"{i}.png" for i in range(24)])
    return tmp_path / "photos"


def labels(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8-sig")
    return str(path)


ROWS = range(24)
FORMATS = {
    "semicolons": "image,labels\n" + "".join(f"{i}.png,{';'.join(colors_of(i))}\n" for i in ROWS),
    "quoted commas": "File Name,Tags\n"
    + "".join(f'{i}.png,"{", ".join(colors_of(i))}"\n' for i in ROWS),
    "bars and tabs": "id\tFinding Labels\n"
    + "".join(f"{i}\t{'|'.join(colors_of(i))}\n" for i in ROWS),
    "spaces": "image_name,tags\n" + "".join(f"{i},{' '.join(colors_of(i))}\n" for i in ROWS),
    "a column a class": "path;blue;green;red\n"
    + "".join(f"./{i}.png;{';'.join(str(i >> b & 1) for b in range(3))}\n" for i in ROWS),
    "a row a label": "image_id,label\n"
    + "".join(f"{i},{color}\n" for i in ROWS for color in colors_of(i) or [""]),
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_every_format_says_the_same(tmp_path, photos, text):
    found = read_labels(photos, labels(tmp_path, text), "multilabel")
    assert found.names == list(COLORS)
    said = {p.name: c for p, c in zip(found.paths, found.classes, strict=True)}
    assert said == {f"{i}.png": tuple(b for b in range(3) if i >> b & 1) for i in ROWS}


def test_single_labels_may_hold_any_sign(tmp_path, photos):
    text = "image,class\n" + "".join(f'{i}.png,"{("a; b", "c, d")[i % 2]}"\n' for i in ROWS)
    config = TrainConfig.make(data=str(photos), labels=labels(tmp_path, text))
    splits = load_splits(config)
    assert splits.class_names == ["a; b", "c, d"] and splits.num_classes == 2
    assert splits.train.images.labels[:2] == [0, 1]


def test_a_column_names_the_splits(tmp_path, photos):
    words = ["Train", "Train", "Train", "valid", "test", "test"]
    text = "image,split,class\n" + "".join(f"{i}.png,{words[i % 6]},{i % 2}\n" for i in ROWS)
    config = TrainConfig.make(data=str(photos), labels=labels(tmp_path, text))
    splits = load_splits(config)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [12, 4, 8]
    assert split_to_score(config).name == "test" and len(split_to_score(config, "all")) == 24
    only = "image,split,class\n" + "".join(f"{i}.png,train,{i % 2}\n" for i in ROWS)
    config = TrainConfig.make(data=str(photos), labels=labels(tmp_path, only))
    with pytest.raises(UserError, match="has no validation split; it has train"):
        split_to_score(config, "val")


def test_rows_without_an_image_are_counted(tmp_path, photos):
    text = "image,labels\n0.png,red\nx/1,blue\nlost.png,red\n"
    found = read_labels(photos, labels(tmp_path, text), "multiclass")
    assert len(found.paths) == 2
    assert found.notes[0].startswith(f"1 of 3 rows name no image in {photos}: lost.png")


def test_names_that_two_images_share_need_their_paths(tmp_path):
    write(tmp_path / "photos", ["a/1.png", "b/1.png", "b/2.png"])
    text = "image,labels\na/1.png,red\nroot/b/1,blue\n2,red\n1,red\nc/2,red\n"
    found = read_labels(tmp_path / "photos", labels(tmp_path, text), "multiclass")
    assert [p.parent.name for p in found.paths] == ["a", "b", "b"]
    # 1 is either of two, and c/2.png is not b/2.png
    assert "2 of 5 rows name no image" in found.notes[0]


@pytest.mark.parametrize(
    "text, task, message",
    [
        ("image,labels\n", "multiclass", "needs a header and a row for each image"),
        ("image,labels\n0.png,a,b\n", "multiclass", "row 2 of .* has 3 columns, the header 2"),
        ("image,labels\nx.png,a\n", "multiclass", "none of the 1 images of .* is below"),
        ("image,cat\n0.png,1\n1.png,-1\n", "multilabel", "'cat' holds '-1', neither 0 nor 1"),
        ("image,a,b\n0.png,1,1\n", "multiclass", "0.png has 2 labels.*give `task` multilabel"),
        ("image,a,b\n0.png,0,0\n", "multiclass", "0.png has 0 labels"),
        ("image,split,a\n0.png,x,1\n0.png,y,1\n", "multilabel", "has 0.png in two splits"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, photos, text, task, message):
    with pytest.raises(UserError, match=message):
        read_labels(photos, labels(tmp_path, text), task)


def test_what_multilabel_cannot_do_is_said(photos, tmp_path):
    with pytest.raises(UserError, match="Give a CSV file with the labels of each image"):
        load_splits(TrainConfig.make(data=str(photos), task="multilabel"))
    with pytest.raises(UserError, match="`mixup` mixes images of one class each"):
        TrainConfig.make(task="multilabel", mixup=0.2)
    with pytest.raises(UserError, match="`eval_metric` top1 is no score of `task` multilabel"):
        TrainConfig.make(task="multilabel", eval_metric="top1")
    with pytest.raises(UserError, match="there is no file"):
        load_splits(TrainConfig.make(data=str(photos), labels=str(tmp_path / "none.csv")))


def test_a_carved_validation_has_the_rare_classes(tmp_path, photos):
    text = "image,labels\n" + "".join(f"{i}.png,common{';rare' if i < 4 else ''}\n" for i in ROWS)
    config = TrainConfig.make(
        data=str(photos), labels=labels(tmp_path, text), task="multilabel", val_fraction=0.25
    )
    validation = load_splits(config).validation
    rare = [validation.images.open(i)[1][1] for i in validation.indices]
    assert sum(rare) == 1 and len(rare) == 6


def test_from_training_to_prediction(tmp_path, photos, capsys):
    pytest.importorskip("torchmetrics")
    path = labels(tmp_path, FORMATS["semicolons"])
    kwargs = tiny_vit_kwargs(tmp_path)
    words = ["train", str(photos), "--labels", path, "--task", "multilabel", "--model", MODEL]
    words += ["--model-kwargs", *(f"{k}={v!r}" for k, v in kwargs.items())]
    words += ["--method", "linear", "--head-init", "probe", "-b", "8", "-j", "0", "--no-aug"]
    words += ["--epochs", "2", "--val-fraction", "0.34", "--device", "cpu", "--hflip", "0"]
    run = tmp_path / "run"
    assert main([*words, "--output", str(run)]) == 0, capsys.readouterr()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["chosen_by"] == "validation mean average precision"
    assert summary["validation"]["map"] > 90
    with open(run / "history.csv") as file:
        assert "validation_map" in next(csv.reader(file))
    assert read_adapter(run / "best")[0]["task"] == "multilabel"
    assert from_pretrained(run / "best", backbone=None if False else tiny(kwargs)).task

    capsys.readouterr()
    report = tmp_path / "report"
    words = ["eval", str(run), str(photos), "--labels", path, "--device", "cpu"]
    assert main([*words, "--report", str(report), "--results-file", f"{report}/score.json"]) == 0
    out = capsys.readouterr().out
    assert "mean average precision" in out and "ROC-AUC" in out and "24 of 24 images" in out
    score = json.loads((report / "score.json").read_text())
    assert score["map"] > 90 and "top1" not in score
    with open(report / "per_class.csv") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(COLORS)

    words = ["predict", str(run), str(photos / "7.png"), "--device", "cpu", "--topk", "3"]
    assert main([*words, "--output", str(tmp_path / "p.csv")]) == 0
    with open(tmp_path / "p.csv") as file:
        (row,) = csv.DictReader(file)
    # an image of all three: probabilities of their own, which do not add up to one
    assert sum(float(row[f"probability{k}"]) for k in (1, 2, 3)) > 1.2


def tiny(kwargs):
    from pgn_fast.backbone.load import load_backbone

    return load_backbone(MODEL, **kwargs)


def test_kill_and_resume_of_several_labels_is_exact(tmp_path, photos):
    pytest.importorskip("torchmetrics")
    config = TrainConfig.make(
        data=str(photos),
        labels=labels(tmp_path, FORMATS["a column a class"]),
        task="multilabel",
        model=MODEL,
        model_kwargs=tiny_vit_kwargs(tmp_path),
        method="vpt-shallow",
        num_prompts=2,
        batch_size=8,
        epochs=2,
        workers=0,
        smoothing=0.1,
        model_ema=True,
    )
    loop.train(config, tmp_path / "whole", device=CPU, show=False)
    half = TrainConfig.make(**{**config.as_dict(), "epochs": 2})
    calls = []

    def stop(*arguments):
        calls.append(1)
        raise KeyboardInterrupt

    real, loop.Run.finish = loop.Run.finish, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(half, tmp_path / "torn", device=CPU, show=False)
    finally:
        loop.Run.finish = real
    loop.train(config, tmp_path / "torn", device=CPU, resume=True, show=False)
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("whole", "torn"))
    assert calls and all(torch.equal(one[key], two[key]) for key in one)


def test_vectors_of_ones_own_data_set_train(tmp_path):
    pytest.importorskip("torchmetrics")
    from small_world import tiny_vit

    import pgn_fast

    rows = [
        (Image.new("RGB", (16, 16), (220 * (i & 1), 220 * (i >> 1 & 1), 0)), [i & 1, i >> 1 & 1])
        for i in range(12)
    ]
    options = {"epochs": 3, "batch_size": 6, "workers": 0, "show": False, "no_aug": True}
    result = pgn_fast.fit(
        LinearProbe(tiny_vit(), 2),
        rows,
        val=rows,
        output=tmp_path / "run",
        task="multilabel",
        head_init="probe",
        **options,
    )
    assert result.validation["map"] == pytest.approx(100)
    bad = [(rows[0][0], [0, 5])]
    with pytest.raises(ValueError, match="as a vector of 0 and 1"):
        pgn_fast.fit(LinearProbe(tiny_vit(), 2), bad, output=tmp_path / "bad", task="multilabel")
