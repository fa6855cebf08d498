"""Folders as strangers have them: every image once, the right class, and nothing silently lost."""

from __future__ import annotations

import os
import socket
import sys

import pytest
from PIL import Image
from small_world import write_images

from pgn_fast.errors import UserError
from pgn_fast.train.classes import match_classes
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import image_files, load_splits, split_to_score
from pgn_fast.train.folders import describe, find_images, natural, split_folders, split_name


def splits_of(data, **given):
    return load_splits(TrainConfig.make(data=str(data), val_fraction=0, **given))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def names(split):
    return [os.path.relpath(p, split.origin.removeprefix("folder ")) for p in split.images.paths]


# files


def test_every_suffix_that_pillow_opens_is_read(tmp_path):
    suffixes = ["jpg", "JPG", "jpeg", "png", "PNG", "webp", "bmp", "gif", "tif", "TIFF"]
    suffixes += ["avif"] * (".avif" in Image.registered_extensions())
    for suffix in suffixes:
        picture(tmp_path / "a" / f"x.{suffix}")
        picture(tmp_path / "b" / f"x.{suffix}")
    train = splits_of(tmp_path).train
    assert len(train) == 2 * len(suffixes) and train.notes == ()
    for i in range(len(train)):
        assert train.images.open(i)[0].size == (4, 4)


def test_what_is_skipped_is_counted_by_suffix(tmp_path):
    write_images(tmp_path, 1)
    for name in ("a.xyz", "b.XYZ", "c.heic", "README", "d.eps"):
        (tmp_path / "red" / name).write_bytes(b"?")
    (tmp_path / "labels.csv").write_text("no image, but beside the class folders")
    note = "6 files skipped: 2 .xyz, 1 .csv, 1 .eps, 1 .heic, 1 without a suffix"
    assert splits_of(tmp_path).train.notes == (note,)
    assert image_files([tmp_path]).notes == (note,)
    assert describe({".xyz": 1}) == "1 file skipped: 1 .xyz"
    # a file that is named itself is taken at its word
    assert len(image_files([tmp_path / "red" / "a.xyz"])) == 1
    (tmp_path / "blue" / "0.png").rename(tmp_path / "blue" / "0.xyz")
    with pytest.raises(UserError, match=r"blue has no image.* 3 \.xyz"):
        splits_of(tmp_path)


def test_hidden_folders_and_leftovers_are_no_data(tmp_path):
    write_images(tmp_path, 2)
    for folder in (".ipynb_checkpoints", ".trash/red", "__MACOSX/red", "red/.thumbs", "@eaDir"):
        picture(tmp_path / folder / "x.png")
    picture(tmp_path / "red" / "._0.png")
    (tmp_path / "red" / "Thumbs.db").write_bytes(b"")
    train = splits_of(tmp_path).train
    assert train.class_names == ["blue", "green", "red"] and len(train) == 6
    assert train.notes == ("7 files skipped: 7 hidden",)
    assert len(image_files([tmp_path])) == 6


def test_pipes_and_sockets_are_left_alone(tmp_path):
    write_images(tmp_path, 1)
    os.mkfifo(tmp_path / "red" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "blue" / "socket.jpg"))
        split = splits_of(tmp_path).train
    assert len(split) == 3 and split.notes == ("2 files skipped: 2 no regular files",)
    named = image_files([tmp_path / "red" / "pipe.png"])
    with pytest.raises(ValueError, match="not a regular file"):
        named.images.open(0)


# links


@pytest.mark.parametrize("target", ["..", ".", "../..", "../green", "../../.."])
@pytest.mark.parametrize("both", [False, True])
def test_linked_folders_end_and_every_image_comes_once(tmp_path, target, both):
    root = tmp_path / "deep" / "data"
    write_images(root, 2)
    picture(tmp_path / "elsewhere.png")
    for name in ("red", "blue") if both else ("red",):
        os.symlink(target, root / name / "up")
    train = splits_of(root).train
    assert len(train) == len(image_files([root])) == 6
    assert "links to folders" in train.notes[0]
    labels = [train.class_names[label] for label in train.images.labels]
    assert labels == [path.split("/")[0] for path in names(train)]


def test_links_to_a_pool_are_images(tmp_path):
    pool = write_images(tmp_path / "pool", 4)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(3):
        os.symlink(pool / "red" / f"{i}.png", tmp_path / "data" / "cat" / f"{i}.png")
    os.symlink(pool / "blue", tmp_path / "data" / "dog" / "linked")
    # the same picture again, and one that is gone
    os.symlink(pool / "red" / "0.png", tmp_path / "data" / "dog" / "again.png")
    os.symlink(pool / "gone.png", tmp_path / "data" / "dog" / "gone.png")
    train = splits_of(tmp_path / "data").train
    assert train.images.labels == [0, 0, 0, 1, 1, 1, 1]
    assert "1 broken links" in train.notes[0] and "1 links to files that are" in train.notes[0]
    # hard links are files of their own
    os.link(pool / "red" / "0.png", pool / "red" / "copy.png")
    assert len(find_images([pool]).paths) == 13


def test_overlapping_arguments_name_an_image_once(tmp_path):
    write_images(tmp_path, 2)
    os.symlink(tmp_path / "red", tmp_path / "link")
    given = [tmp_path / "red" / "0.png", tmp_path / "red", tmp_path, tmp_path / "link"]
    assert len(image_files(given)) == 6
    assert len(image_files([tmp_path / "link"])) == 2


# classes


def test_a_class_is_the_first_folder_below(tmp_path):
    for animal in ("cat", "dog"):
        for age in ("young", "old/2024-01"):
            picture(tmp_path / animal / age / "1.png")
    picture(tmp_path / "dog" / "2.png")
    train = splits_of(tmp_path).train
    assert train.class_names == ["cat", "dog"] and train.images.labels == [0, 0, 1, 1, 1]


def test_names_that_look_alike_are_said(tmp_path):
    for name in ("Cat", "cat", "caf\u00e9", "cafe\u0301"):
        picture(tmp_path / name / "1.png")
    split = splits_of(tmp_path).train
    assert len(split.class_names) == 4 and len(split.notes) == 2
    assert "'Cat'" in "".join(split.notes) and "look alike" in split.notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"plain"):
        os.mkdir(raw + b"/" + name)
        picture(tmp_path / "x.png")
        os.rename(raw + b"/x.png", raw + b"/" + name + b"/\xff\xfe.png")
    train = splits_of(tmp_path).train
    assert [os.fsencode(name) for name in train.class_names] == [b"caf\xe9", b"plain"]
    assert train.images.open(0)[1] == 0


def test_natural_order():
    assert sorted(["10", "2", "B", "a", "a²", "1"], key=natural) == ["1", "2", "10", "a", "a²", "B"]


# splits


@pytest.mark.parametrize(
    "folder, split",
    [
        ("train", "train"),
        ("Train", "train"),
        ("TRAINING", "train"),
        ("images_train", "train"),
        ("train-images", "train"),
        ("Training Set", "train"),
        ("trainset", "train"),
        ("train2017", "train"),
        ("train_2017", "train"),
        ("Val", "validation"),
        ("valid", "validation"),
        ("validation_data", "validation"),
        ("dev", "validation"),
        ("Test", "test"),
        ("test.images", "test"),
        ("testing", "test"),
        ("trains", None),
        ("trainval", None),
        ("bullet train", None),
        ("contest", None),
        ("images", None),
        ("set", None),
        ("", None),
    ],
)
def test_split_names(folder, split):
    assert split_name(folder) == split


@pytest.mark.parametrize(
    "layout", ["Train Val Test", "images_train images_val images_test", "TRAINING valid testing"]
)
def test_splits_in_any_capitalization(tmp_path, layout):
    for folder, count in zip(layout.split(), (4, 2, 3), strict=True):
        write_images(tmp_path / folder, count)
    splits = splits_of(tmp_path)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [12, 6, 9]


def test_a_folder_named_otherwise_beside_splits_is_named(tmp_path):
    for folder in ("train", "test", "annotations"):
        write_images(tmp_path / folder, 1)
    assert splits_of(tmp_path).train.notes == ("folders that are no split, not read: annotations",)


def test_a_train_may_be_a_class(tmp_path):
    write_images(tmp_path, 2, ("bus", "car", "train"))
    assert splits_of(tmp_path).train.class_names == ["bus", "car", "train"]
    # with folders inside it could be either
    picture(tmp_path / "train" / "2024" / "1.png")
    with pytest.raises(UserError, match=r"train may be a split, or a class beside bus"):
        splits_of(tmp_path)
    assert splits_of(tmp_path, train_split=".").train.class_names == ["bus", "car", "train"]
    assert splits_of(tmp_path, train_split=".").test is None
    assert len(split_to_score(TrainConfig.make(data=str(tmp_path)), ".")) == 7


def test_two_folders_for_one_split_are_refused(tmp_path):
    for folder in ("train", "Training"):
        write_images(tmp_path / folder, 1)
    with pytest.raises(UserError, match="both look like the train split; name one with --train-s"):
        splits_of(tmp_path)
    assert len(splits_of(tmp_path, train_split="Training").train) == 3
    assert len(splits_of(tmp_path, train_split="TRAINING").train) == 3
    assert set(split_folders(tmp_path)) == {"train"}


# scores


def test_without_a_test_split_the_validation_is_scored_and_said(tmp_path):
    for folder, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / folder, count)
    config = TrainConfig.make(data=str(tmp_path))
    split = split_to_score(config)
    assert (split.name, len(split)) == ("validation", 6) and "no test split" in split.notes[0]
    assert len(split_to_score(config, "training")) == 9
    write_images(tmp_path / "Test", 1)
    assert split_to_score(config).name == "test" and not split_to_score(config).notes
    assert split_to_score(TrainConfig.make(data=str(tmp_path / "val"))).name == "all"


def test_classes_are_matched_by_name(tmp_path):
    write_images(tmp_path, 1, ("red", "blue"))
    split = split_to_score(TrainConfig.make(data=str(tmp_path)))
    matched = match_classes(split, ["red", "green", "blue"], "the adapter")
    assert matched.images.labels == [2, 0]
    assert [matched.images.open(i)[1] for i in range(2)] == [2, 0]
    assert matched.notes == ("2 of 3 classes have images; none: green",)
    with pytest.raises(UserError, match="'blue' is none of the 2"):
        match_classes(split, ["red", "green"], "the adapter")


def test_a_validation_split_may_lack_a_class(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1, ("green", "red"))
    splits = splits_of(tmp_path)
    assert splits.validation.images.labels == [1, 2] and splits.num_classes == 3
    assert "none: blue" in splits.validation.notes[0]
