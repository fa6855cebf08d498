"""The papers' data sets, read from small stand-ins of every kind of files; words and facts."""

from __future__ import annotations

import dataclasses
import json
import random
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast.cli import main
from pgn_fast.errors import UserError
from pgn_fast.train import protocols
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import load_splits
from pgn_fast.train.loader import eval_transform, train_transform
from pgn_fast.train.protocols.readers import parse_list
from pgn_fast.train.protocols.table import DATA_SETS

CLASSES = ("blue", "green", "red")


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (9, 8), random.Random(seed).randbytes(216)).save(path)


def write_lists(folder: Path, classes: int = 3, line: str = "{name} {label}\n") -> Path:
    """A task of VTAB-1k: four lists and their images."""
    for file, count in (("train800", 6), ("val200", 3), ("test", 4)):
        lines = []
        for i in range(count):
            name = f"images/{file}/{i:06d}.jpg"
            picture(folder / name, i)
            lines.append(line.format(name=name, label=i % classes))
        (folder / f"{file}.txt").write_text("".join(lines), newline="")
    both = [(folder / f"{file}.txt").read_text() for file in ("train800", "val200")]
    (folder / "train800val200.txt").write_text("".join(both))
    return folder


def write_zhou(folder: Path, file: str, images: str = "images") -> Path:
    """Zhou's splits, of three classes whose names are no folders' names."""
    names = ["deep_Blue", "green", "red"]
    content = {}
    for part, count in (("train", 6), ("val", 3), ("test", 3)):
        rows = [[f"c{i % 3}/{part}{i}.png", i % 3, names[i % 3]] for i in range(count)]
        for name, label, _ in rows:
            picture(folder / images / name, label)
        content[part] = rows
    (folder / file).write_text(json.dumps(content))
    return folder


def write_clevr(folder: Path) -> Path:
    for part, counts in (("train", [3, 4, 5, 6, 7, 8, 9, 10]), ("val", [10, 3])):
        scenes = []
        for i, count in enumerate(counts):
            picture(folder / f"CLEVR_v1.0/images/{part}/{i}.png")
            scenes.append({"image_filename": f"{i}.png", "objects": [{}] * count})
        path = folder / f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"scenes": scenes}))
    return folder


def write_fgvc(folder: Path, images: str) -> Path:
    """VPT's splits: class ids that neither begin at zero nor have no gaps."""
    for part, ids in (("train", [7, 3, 12, 3]), ("val", [3]), ("test", [12, 3])):
        content = {}
        for i, label in enumerate(ids):
            picture(folder / images / f"k{label}/{part}{i}.jpg")
            content[f"k{label}/{part}{i}.jpg"] = label
        (folder / f"{part}.json").write_text(json.dumps(content))
    return folder


def zipped(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{inside}{file.relative_to(folder).as_posix()}")
    return path


@pytest.fixture
def three_classes(monkeypatch):
    """Rows whose stand-ins have three classes."""

    def change(*names):
        for name in names:
            row = dataclasses.replace(DATA_SETS[name], num_classes=3)
            monkeypatch.setitem(DATA_SETS, name, row)

    return change


def splits_of(data, root, **options):
    return load_splits(TrainConfig.make(data=data, data_dir=str(root), **options))


def labels_of(split):
    return [split.images.labels[i] for i in split.indices]


# The table.


def test_every_data_set_of_the_papers_has_a_row():
    count = {
        suite: sum(row.suite == suite for row in DATA_SETS.values()) for suite in protocols.SUITES
    }
    assert count == {"pgn": 12, "vtab": 19, "fgvc": 5}
    groups = [row.group for row in DATA_SETS.values() if row.suite == "vtab"]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert all(
        (row.sizes.train, row.sizes.validation) == (800, 200)
        for row in DATA_SETS.values()
        if row.suite == "vtab"
    )


def test_the_words_of_pgns_data_sets():
    rows = [row for row in DATA_SETS.values() if row.suite == "pgn"]
    for row in rows:
        words = protocols.pgn_words(row.short)
        assert len(set(words["classes"])) == row.num_classes and words["names_from"]
        assert words["template"].count("{}") == 1 and row.template == words["template"]
    assert protocols.pgn_words("cifar100")["template"] == "A photo of a {}"
    assert protocols.pgn_words("clevr_count")["classes"][-1] == "10"
    assert protocols.pgn_words("sun397")["classes"][8] == "outdoor apartment building"
    assert protocols.pgn_words("ucf101")["classes"][36] == "handstand pushups"
    content = json.loads((Path(protocols.__file__).parent / "pgn_classes.json").read_text())
    assert content["templates_from"] and {row.short for row in rows} == set(content["sets"])


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"no data set 'vtab/caltech'; known: vtab/caltech101"):
        splits_of("vtab/caltech", tmp_path)
    with pytest.raises(UserError, match="vtab/dtd needs `data_dir`, a folder in which dtd"):
        load_splits(TrainConfig.make(data="vtab/dtd"))
    with pytest.raises(UserError, match=r"does not hold vtab/dtd; .* train800val200\.txt"):
        splits_of("vtab/dtd", tmp_path)


# Lists, in folders and zip files.


@pytest.mark.parametrize("name", [n for n in DATA_SETS if n.startswith("vtab/")])
def test_every_task_of_vtab(name, tmp_path):
    row = DATA_SETS[name]
    classes = min(row.num_classes, 3)
    write_lists(tmp_path / row.folders[0], classes)
    splits = splits_of(name, tmp_path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [6, 3, 4]
    assert splits.num_classes == row.num_classes  # not as many as the lists happen to hold
    assert labels_of(splits.train) == [i % classes for i in range(6)]
    assert "6 images; the published split has 800" in splits.train.notes[0]
    image, label = splits.test.images.open(1)
    assert image.size == (9, 8) and label == 1


def test_all_thousand_images_leave_none_to_choose_by(tmp_path):
    write_lists(tmp_path / "dtd")
    splits = splits_of("vtab/dtd", tmp_path, train_split="train800val200")
    assert len(splits.train) == 9 and splits.validation is None and len(splits.test) == 4
    assert splits_of("vtab/dtd", tmp_path, test_split="none").test is None


@pytest.mark.parametrize("inside", ["", "dtd/", "vtab-1k/dtd/"])
def test_a_zip_file_is_read_as_it_is(tmp_path, inside):
    folder = write_lists(tmp_path / "unpacked")
    zipped(folder, tmp_path / "dtd.zip", inside)
    for root in (tmp_path, tmp_path / "dtd.zip"):
        splits = splits_of("vtab/dtd", root)
        assert labels_of(splits.test) == [0, 1, 2, 0]
        image, label = splits.train.images.open(4)
        expected = Image.open(folder / "images/train800/000004.jpg").convert("RGB")
        assert image.tobytes() == expected.tobytes() and label == 1


def test_one_zip_file_of_many_tasks(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for task, classes in (("cifar", 2), ("dtd", 3)):
            for file in write_lists(tmp_path / task, classes).rglob("*"):
                if file.is_file():
                    archive.write(file, f"vtab-1k/{file.relative_to(tmp_path).as_posix()}")
    assert max(labels_of(splits_of("vtab/cifar100", tmp_path / "all.zip").train)) == 1
    assert max(labels_of(splits_of("vtab/dtd", tmp_path / "all.zip").train)) == 2
    with pytest.raises(UserError, match="does not hold vtab/kitti"):
        splits_of("vtab/kitti", tmp_path / "all.zip")


def test_the_folder_of_another_task_is_not_taken(tmp_path):
    """All tasks have lists of the same names, so that a folder is known by its own name alone."""
    folder = write_lists(tmp_path / "dtd")
    assert len(splits_of("vtab/dtd", folder).train) == 6
    zipped(folder, tmp_path / "svhn.zip")
    for other in (folder, tmp_path / "svhn.zip"):
        with pytest.raises(UserError, match="does not hold vtab/cifar100"):
            splits_of("vtab/cifar100", other)


def test_a_zip_file_that_is_none(tmp_path):
    (tmp_path / "dtd.zip").write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(UserError, match=r"dtd\.zip cannot be read as a zip file"):
        splits_of("vtab/dtd", tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.jpg 0\r\nb.jpg 1\r\n\r\n", [("a.jpg", 0), ("b.jpg", 1)]),
        ("a.jpg\t0\n  b.jpg\t1  \n", [("a.jpg", 0), ("b.jpg", 1)]),
        ("my photo, old.jpg 2\n", [("my photo, old.jpg", 2)]),
        ('"my photo.jpg", 2\n', [("my photo.jpg", 2)]),
        ("a.jpg,2\rb.jpg;1", [("a.jpg", 2), ("b.jpg", 1)]),
    ],
)
def test_lists_of_many_hands(text, expected):
    assert parse_list(text, 3, "list.txt") == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jpg\n", r"line 1 of list\.txt is 'a\.jpg'; an image's name and its label"),
        ("a.jpg 1\n\nb.jpg x", r"line 3 of list\.txt is 'b\.jpg x'"),
        ("\n\n", r"list\.txt names no image"),
        ("a.jpg 1\nb.jpg 3", "the list counts from 1; subtract 1 from every label"),
        ("a.jpg 0\nb.jpg 3", r"label 3 of b\.jpg .* out of range for 3 classes \(0 \.\.\. 2\)\.$"),
        ("a.jpg -1", "label -1 of"),
    ],
)
def test_lists_that_cannot_be_meant(text, message):
    with pytest.raises(UserError, match=message):
        parse_list(text, 3, "list.txt")


def test_a_list_with_a_byte_order_mark_or_foreign_slashes(tmp_path):
    folder = write_lists(tmp_path / "dtd")
    text = (folder / "test.txt").read_text().replace("images/", "images\\")
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    image, _ = splits_of("vtab/dtd", tmp_path).test.images.open(0)
    assert image.size == (9, 8)


@pytest.mark.parametrize(
    "line, message",
    [
        ("../secret.jpg 0\n", "leads out of its folder"),
        ("/etc/passwd 0\n", "leads out of its folder"),
        ("images/nothing.jpg 0\n", r"names the image images/nothing\.jpg, which is not there"),
    ],
)
def test_lists_of_images_that_are_not_there(tmp_path, line, message):
    folder = write_lists(tmp_path / "dtd")
    (folder / "test.txt").write_text(line)
    with pytest.raises(UserError, match=message):
        splits_of("vtab/dtd", tmp_path)


# Zhou's splits, CLEVR's scenes, VPT's splits, torchvision's files.

ZHOU = [n for n, row in DATA_SETS.items() if row.reader == "zhou"]


@pytest.mark.parametrize("name", ZHOU)
def test_zhous_splits(name, tmp_path, three_classes):
    three_classes(name)
    row = DATA_SETS[name]
    write_zhou(tmp_path / row.folders[-1], row.file, random.Random(name).choice(["images", "jpg"]))
    splits = splits_of(name, tmp_path)
    assert splits.class_names == ["deep_Blue", "green", "red"]
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [6, 3, 3]
    assert splits.train.images.open(2)[1] == 2
    # what the paper trains on
    splits = splits_of(name, tmp_path, train_split="trainval")
    assert len(splits.train) == 9 and splits.validation is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["test"][0].__setitem__(1, 3), "label 3 of c0/test0.png in test of .* range"),
        (lambda c: c["test"][0].__setitem__(2, "x"), "label 0 is 'deep_Blue' and 'x'"),
        (lambda c: c["val"].append(["a.png", "1", "green"]), "an image's name, its label and its"),
        (lambda c: c.pop("val"), "has no list 'val'"),
        (lambda c: [c[k].clear() for k in ("val",)], "names no image"),
    ],
)
def test_damaged_splits(change, message, tmp_path, three_classes):
    three_classes("pgn/dtd")
    folder = write_zhou(tmp_path / "dtd", DATA_SETS["pgn/dtd"].file)
    path = folder / DATA_SETS["pgn/dtd"].file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        splits_of("pgn/dtd", tmp_path)


def test_clevrs_scenes_are_counted(tmp_path):
    write_clevr(tmp_path / "clevr")
    splits = splits_of("pgn/clevr_count", tmp_path, val_fraction=0.0)
    assert labels_of(splits.train) == list(range(8)) and labels_of(splits.test) == [7, 0]
    assert splits.class_names == ["3", "4", "5", "6", "7", "8", "9", "10"]
    assert splits.validation is None and splits.test.images.open(0)[0].size == (9, 8)


@pytest.mark.parametrize("name", [n for n in DATA_SETS if n.startswith("fgvc/")])
def test_vpts_splits_of_fgvc(name, tmp_path, three_classes):
    three_classes(name)
    row = DATA_SETS[name]
    write_fgvc(tmp_path / row.folders[0], row.file)
    splits = splits_of(name, tmp_path)
    # ids 3, 7, 12 in order, also where a split lacks one
    assert labels_of(splits.train) == [1, 0, 2, 0]
    assert labels_of(splits.validation) == [0] and labels_of(splits.test) == [2, 0]
    assert splits.test.images.open(0)[0].size == (9, 8)


def test_a_class_that_training_does_not_have(tmp_path, three_classes):
    three_classes("fgvc/cub")
    folder = write_fgvc(tmp_path / "cub", "images")
    (folder / "test.json").write_text('{"k9/a.jpg": 9}')
    with pytest.raises(
        UserError, match=r"test\.json .* has the class 9, which train\.json has not"
    ):
        splits_of("fgvc/cub", tmp_path)


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100", "SVHN"])
def test_torchvisions_files(kind, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    name = f"pgn/{kind.lower()}"
    count = DATA_SETS[name].num_classes

    class StandIn:
        """torchvision's class, whose files are md5 sums of the real ones."""

        def __init__(self, root, train=True, split=None, download=False):
            if not (Path(root) / "files").exists():
                raise RuntimeError("Dataset not found or corrupted.")
            training = split == "train" if split else train
            self.numbers = list(range(count)) * (2 if training else 1)
            setattr(self, "labels" if split else "targets", self.numbers)
            if not split:
                self.classes = [f"class_{i}" for i in range(count)]

        def __len__(self):
            return len(self.numbers)

        def __getitem__(self, index):
            return Image.new("RGB", (9, 8)), self.numbers[index]

    monkeypatch.setattr(torchvision.datasets, kind, StandIn)
    with pytest.raises(UserError, match="--dataset-download fetches it"):
        splits_of(name, tmp_path)
    (tmp_path / kind.lower()).mkdir()
    (tmp_path / kind.lower() / "files").write_text("")
    splits = splits_of(name, tmp_path, val_fraction=0.5)
    assert splits.num_classes == count and len(splits.train) == len(splits.validation) == count
    assert splits.test.images.open(3)[1] == 3
    with pytest.raises(UserError, match="has no split 'val'; it has train, trainval, test"):
        splits_of(name, tmp_path, val_split="val")


def test_class_folders_will_do(tmp_path, three_classes):
    three_classes("pgn/eurosat")
    for split in ("train", "test"):
        write_images(tmp_path / "eurosat" / split, 2, CLASSES)
    splits = splits_of("pgn/eurosat", tmp_path, val_fraction=0.0)
    assert splits.class_names == list(CLASSES) and len(splits.test) == 6
    assert any("folders are not named as in the paper" in note for note in splits.train.notes)


def test_hugging_faces_saved_data(tmp_path, three_classes):
    datasets = pytest.importorskip("datasets")
    three_classes("vtab/dtd")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )

    def rows(count):
        images = [Image.new("RGB", (9, 8), (i, 0, 0)) for i in range(count)]
        labels = [i % 3 for i in range(count)]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    saved = datasets.DatasetDict({"train800": rows(6), "val200": rows(3), "test": rows(4)})
    saved.save_to_disk(tmp_path / "dtd")
    splits = splits_of("vtab/dtd", tmp_path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [6, 3, 4]
    assert splits.class_names == list(CLASSES) and splits.test.images.open(3)[1] == 0
    assert len(splits_of("vtab/dtd", tmp_path, train_split="trainval").train) == 9


def test_saved_data_without_the_package(tmp_path, monkeypatch):
    import sys

    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd/dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'pgn_fast\[datasets\]'"):
        splits_of("vtab/dtd", tmp_path)


# The command, and VTAB's pixels.


def test_training_on_a_task_from_a_zip_file(tmp_path, capsys):
    zipped(write_lists(tmp_path / "unpacked"), tmp_path / "dtd.zip")
    pairs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(tmp_path).items()]
    words = f"train --dataset vtab/dtd --data-dir {tmp_path} --method vpt-deep --epochs 1 -j 2"
    words += f" --num-prompts 1 --device cpu --output {tmp_path / 'run'} --model {MODEL}"
    assert main([*words.split(), "--model-kwargs", *pairs]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_classes"] == 47 and summary["unreadable"]["count"] == 0
    assert summary["test"]["images"] == 4 and "vtab/dtd test" in summary["test"]["split"]
    assert "vtab/dtd train" in capsys.readouterr().out


def test_squashed_pixels_are_the_same_in_training():
    config = TrainConfig.make(no_aug=True, crop_mode="squash")
    pixels = {
        "input_size": (3, 16, 16),
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    image = Image.frombytes("RGB", (20, 8), random.Random(0).randbytes(480))
    training, evaluation = train_transform(config, pixels)(image), eval_transform(pixels)(image)
    assert training.equal(evaluation) and training.shape == (3, 16, 16)
