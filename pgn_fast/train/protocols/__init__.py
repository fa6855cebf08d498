"""The papers' data sets by name: ``vtab/caltech101``, ``pgn/cifar100``, ``fgvc/cub`` and so on.

Their files lie below ``data_dir``, as their sources have them (folders or zip files), saved by
Hugging Face's ``datasets``, or as class folders below split folders. Nothing is downloaded but by
torchvision, when it is asked to.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UserError
from ..folders import find_classes, same_word, split_folders
from ..split import FolderImages, NamedImages, Split
from .places import Place, find_place, inside, is_called
from .readers import READERS
from .table import DATA_SETS, SUITES, DataSet, pgn_words

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = ["DATA_SETS", "SUITES", "DataSet", "find", "is_named", "load", "parts_of", "pgn_words"]

_WORDS = {
    "train": "train",
    "train800": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "val200": "validation",
    "trainval": "trainval",
    "train800val200": "trainval",
    "test": "test",
}
_SAVED = "dataset_dict.json"  # of datasets' DatasetDict.save_to_disk
_HF_SPLITS = {
    "train": ("train", "train800"),
    "validation": ("validation", "val", "val200"),
    "trainval": ("trainval", "train800val200"),
    "test": ("test",),
}


class Layout(NamedTuple):
    """A data set as it lies on this machine: its splits' names, and how one is read."""

    parts: set[str]
    read: Callable[[str], Split]


def is_named(data: str) -> bool:
    """Whether ``data`` is meant as one of the papers' data sets, and not as a folder."""
    return data.partition("/")[0].lower() in SUITES and "/" in data and not Path(data).exists()


def find(name: str) -> DataSet:
    """The row of a data set.

    Raises:
        UserError: there is none of that name; says which are near.
    """
    row = DATA_SETS.get(name.lower())
    if row is None:
        suite = name.partition("/")[0].lower()
        known = [n for n in DATA_SETS if n.startswith(f"{suite}/")] or list(DATA_SETS)
        near = difflib.get_close_matches(name.lower(), known, n=3) or known
        raise UserError(f"data: no data set {name!r}; known: {', '.join(near)}.")
    return row


def load(config: TrainConfig, name: str, wanted: str | None = None) -> Split:
    """A split of the data set ``config.data``.

    Args:
        name: "train", "validation" or "test".
        wanted: the split that the user named: also "trainval", training and validation images
            together, on which the papers train at last.

    Raises:
        UserError: no such data set or split, its files are not there, or they are damaged.
    """
    data = find(config.data)
    part = _WORDS.get((wanted or name).lower())
    layout = _layout(data, config)
    if part is None or part not in layout.parts:
        raise UserError(
            f"data: {data.name} has no split {wanted or name!r}; it has "
            f"{', '.join(p for p in _HF_SPLITS if p in layout.parts)}."
        )
    split = layout.read(part)
    if not len(split):
        raise UserError(f"data: {split.origin} has no image.")
    notes = split.notes
    published = {
        "train": data.sizes.train,
        "validation": data.sizes.validation,
        "trainval": data.sizes.train + (data.sizes.validation or 0),
        "test": data.sizes.test,
    }[part]
    if published and len(split) != published:
        notes += (f"{len(split)} images; the published split has {published}",)
    return Split(name, split.origin, split.images, split.indices, split.class_names, notes)


def parts_of(config: TrainConfig) -> set[str]:
    """The splits that a run takes beside the training images, without being told.

    Where it trains on "trainval", all training images are used, and none is left to choose by.
    """
    parts = _layout(find(config.data), config).parts
    if trains_on_all(config):
        parts = parts - {"validation"}
    return parts


def trains_on_all(config: TrainConfig) -> bool:
    """Whether a run asks for "trainval"."""
    return _WORDS.get((config.train_split or "").lower()) == "trainval"


def _layout(data: DataSet, config: TrainConfig) -> Layout:
    if config.data_dir is None and not (data.reader == "torchvision" and config.dataset_download):
        raise UserError(f"data: {data.name} needs `data_dir`, {_wanted(data)}.")
    root = Path(config.data_dir or "data")
    if data.reader == "torchvision":
        own = _torchvision(data, root, config.dataset_download)
        if own is not None:
            return own
    else:
        reader = READERS[data.reader]
        named = data.reader == "lists"  # of all of VTAB's tasks alike
        place = find_place(root, data.folders, reader.marker(data), named=named)
        if place is not None:
            return _read_place(data, place)
    saved = find_place(root, data.folders, _SAVED, named=True)
    if saved is not None:
        return _hugging_face(data, saved)
    itself = [root] if is_called(root, data.folders) else []
    for folder in (*itself, *(root / name for name in data.folders)):
        if folder.is_dir() and {"train", "test"} <= set(split_folders(folder)):
            return _class_folders(data, folder)
    raise UserError(f"data: {root} does not hold {data.name}; `data_dir` is {_wanted(data)}.")


def _wanted(data: DataSet) -> str:
    names = " or ".join(dict.fromkeys(data.folders))
    return f"a folder in which {names} (or {data.folders[0]}.zip) holds {data.source}"


def _read_place(data: DataSet, place: Place) -> Layout:
    def read(part: str) -> Split:
        found = READERS[data.reader].read(data, place, part)
        names = [inside(row[0], place.title) for row in found.rows]
        images = place.images(names, [row[1] for row in found.rows])
        if not place.has(names[0]):
            raise UserError(
                f"data: {place.title} names the image {names[0]}, which is not there: put "
                f"{data.source} there."
            )
        # without names of their own, classes are called by their labels
        classes = found.class_names or [str(label) for label in range(data.num_classes)]
        return _split(data, part, place.title, images, classes)

    every = set(_HF_SPLITS) - (set() if data.sizes.validation else {"validation"})
    return Layout(every, read)


def _split(
    data: DataSet,
    part: str,
    where: str,
    images: Any,
    classes: list[str] | None,
    notes: tuple[str, ...] = (),
) -> Split:
    origin = f"{data.name} {part}, {where}"
    return Split(part, origin, images, range(len(images)), classes, notes)


def _torchvision(data: DataSet, root: Path, download: bool) -> Layout | None:
    """None where its files are not there."""
    from torchvision import datasets

    kind: Any = getattr(datasets, data.file)

    def read(part: str) -> Split:
        name = "test" if part == "test" else "train"
        choice = {"split": name} if data.file == "SVHN" else {"train": name == "train"}
        dataset = kind(str(folder), download=download, **choice)
        if not hasattr(dataset, "targets"):
            dataset.targets = dataset.labels
        classes = getattr(dataset, "classes", None) or [str(i) for i in range(data.num_classes)]
        images = NamedImages(dataset, f"{data.name} {part}")
        return _split(data, part, f"torchvision's files in {folder}", images, list(classes))

    for folder in (root, *(root / name for name in data.folders)):
        try:
            if folder.is_dir() or download:
                read("train")
                return Layout({"train", "trainval", "test"}, read)
        except ImportError as error:
            raise UserError(
                f"data: torchvision's {data.file} needs the package {error.name}: "
                f"pip install {error.name}"
            ) from error
        except RuntimeError:
            continue  # torchvision: not found or corrupted
        except OSError as error:
            raise UserError(f"data: {data.file} cannot be had: {error}.") from error
    return None


def _hugging_face(data: DataSet, place: Place) -> Layout:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data: {place.title} was saved by Hugging Face's datasets, which is not installed: "
            "pip install 'pgn_fast[datasets]'"
        ) from error
    from ..given import given_split

    root = getattr(place, "root", None)
    if root is None:
        raise UserError(f"data: {place.title}: unpack it; datasets reads folders.")
    saved = datasets.load_from_disk(str(root))
    there = {
        part: next((name for name in names if name in saved), None)
        for part, names in _HF_SPLITS.items()
    }

    def rows(part: str) -> Any:
        name = there[part]
        return datasets.concatenate_datasets(
            [saved[name]]
            if name is not None
            else [saved[there[p]] for p in ("train", "validation") if there[p]]
        )

    def read(part: str) -> Split:
        split = given_split(part, rows(part))
        classes = split.class_names or [str(label) for label in range(data.num_classes)]
        _check_count(data, classes, place.title)
        return _split(data, part, place.title, split.images, classes)

    parts = {part for part, name in there.items() if name is not None}
    return Layout(parts | ({"trainval"} if "train" in parts else set()), read)


def _class_folders(data: DataSet, root: Path) -> Layout:
    folders = split_folders(root)

    def rows(part: str) -> Any:
        found = find_classes(folders[part][0])
        _check_count(data, found.names, str(folders[part][0]))
        return found

    def read(part: str) -> Split:
        used = ["train", "validation"] if part == "trainval" else [part]
        found = [rows(name) for name in used if name in folders]
        notes = found[0].notes
        if data.template is not None:
            words = {same_word(name) for name in pgn_words(data.short)["classes"]}
            if {same_word(name.replace("_", " ")) for name in found[0].names} != words:
                notes += (f"folders are not named as in the paper; its words: {data.name}",)
        paths = [path for each in found for path in each.paths]
        labels = [label for each in found for label in each.labels]
        images = FolderImages(paths, labels)
        return _split(data, part, f"folder {root}", images, found[0].names, notes)

    return Layout({"trainval", *folders}, read)


def _check_count(data: DataSet, classes: list[str], where: str) -> None:
    if len(classes) != data.num_classes:
        raise UserError(
            f"data: {where} has {len(classes)} classes, {data.name} has {data.num_classes}."
        )
