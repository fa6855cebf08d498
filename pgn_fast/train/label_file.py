"""Labels from a CSV file as people have them: one row an image, or one a label, or one column a
class.

    image,labels            image,split,cat,dog         image_id,label
    a.jpg,cat;dog           a.jpg,train,1,1             a,cat
    b.jpg,                  b.jpg,val,0,0               a,dog
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, brief, shown
from .folders import describe, find_images, natural, split_name
from .split import FolderImages, ManyLabelImages, Split

_FILE = {"file", "files", "filename", "file name", "image", "images", "image id", "image name"}
_FILE |= {"image index", "image path", "img", "path", "filepath", "file path", "id", "name"}
_LABELS = {"label", "labels", "class", "classes", "class name", "category", "categories", "tag"}
_LABELS |= {"tags", "target", "targets", "finding labels", "annotation", "annotations"}
_SPLIT = {"split", "set", "subset", "partition", "phase"}
_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}
_BETWEEN = re.compile(r"[;|,]")


@dataclass(frozen=True)
class LabelFile:
    """What the file says, image by image, in the order of the images' names.

    Attributes:
        paths: of the images that are there.
        classes: the numbers of each image's classes, ascending.
        splits: the word of each image's split; None without such a column.
        names: the classes in label order.
        notes: what a person should know.
    """

    paths: Sequence[Path]
    classes: Sequence[tuple[int, ...]]
    splits: Sequence[str] | None
    names: list[str]
    notes: tuple[str, ...]


def labeled_split(root: Path, file: str, task: str, name: str, wanted: str | None) -> Split:
    """A split of the images below ``root`` that a label file names.

    Args:
        root: the folder that the file's names are relative to.
        file: its path.
        task: "multiclass": each image has one class; "multilabel".
        name: "train", "validation", "test", or "all".
        wanted: the split's word in the file, where it is another one.

    Raises:
        UserError: no such file or split, no image that is there, or labels that cannot be read.
    """
    found = read_labels(root, file, task)
    places = list(range(len(found.paths)))
    if name != "all" and found.splits is not None:
        word = wanted or name
        there = sorted(set(found.splits))
        same = [w for w in there if w == word or split_name(w) == (split_name(word) or word)]
        places = [i for i in places if found.splits[i] in same]
        if not places:
            raise UserError(
                f"`labels`: {file} has no {word} split; it has {', '.join(there)[:200]}."
            )
    elif wanted is not None or name not in ("train", "all"):
        raise UserError(f"`labels`: {file} has no column split, of which {wanted or name} is one.")
    paths = [found.paths[i] for i in places]
    classes = [found.classes[i] for i in places]
    images = (
        ManyLabelImages(paths, None, None, classes, len(found.names))
        if task == "multilabel"
        else FolderImages(paths, [c[0] for c in classes])
    )
    origin = f"{file}" + ("" if name == "all" or found.splits is None else f" {wanted or name}")
    return Split(name, origin, images, range(len(images)), found.names, found.notes)


def has_split(root: Path, file: str, task: str, name: str) -> bool:
    """Whether a label file has images of this split."""
    words = read_labels(root, file, task).splits or ()
    return any(split_name(word) == name for word in words)


def read_labels(root: Path, file: str, task: str) -> LabelFile:
    """The labels of the images below ``root``; a file that has not changed is read once."""
    try:
        changed = os.stat(file).st_mtime_ns
    except OSError as error:
        raise UserError(f"`labels`: there is no file {file}.") from error
    return _read(root, file, task, changed)


@functools.lru_cache(maxsize=2)
def _read(root: Path, file: str, task: str, changed: int) -> LabelFile:
    header, rows = _table(file)
    columns = {_plain(title): i for i, title in reversed(list(enumerate(header)))}
    image = next((columns[t] for t in columns if t in _FILE), 0)
    label = next((columns[t] for t in columns if t in _LABELS and columns[t] != image), None)
    part = next((columns[t] for t in columns if t in _SPLIT and columns[t] != image), None)
    notes: tuple[str, ...] = ()
    if label is not None:
        words, note = _words([row[label] for row in rows], task)
        notes += note
        names = sorted({word for several in words for word in several}, key=natural)
    else:
        places = [i for i in range(len(header)) if i not in (image, part)]
        words, names = _one_column_a_class(file, header, rows, places)
    number = {name: i for i, name in enumerate(names)}
    images = _Images(root)
    classes: dict[Path, set[int]] = {}
    splits: dict[Path, str] = {}
    lost: list[str] = []
    for row, several in zip(rows, words, strict=True):
        path = images.find(row[image])
        if path is None:
            lost.append(row[image])
            continue
        classes.setdefault(path, set()).update(number[word] for word in several)
        if part is not None and splits.setdefault(path, row[part]) != row[part]:
            raise UserError(f"`labels`: {file} has {row[image]} in two splits.")
    if not classes:
        raise UserError(
            f"`labels`: none of the {len(rows)} images of {file} is below {root}, such as "
            f"{shown(rows[0][image] if rows else '')}. Names are relative to that folder."
        )
    if lost:
        notes += (f"{len(lost)} of {len(rows)} rows name no image in {root}: {brief(lost[0], 80)}",)
    if images.skipped:
        notes += (describe(images.skipped),)
    paths = sorted(classes, key=lambda path: natural(str(path)))
    if task == "multiclass":
        _one_each(file, paths, classes)
    found = [tuple(sorted(classes[path])) for path in paths]
    parts = None if part is None else [splits[path] for path in paths]
    return LabelFile(paths, found, parts, names, notes)


def _table(file: str) -> tuple[list[str], list[list[str]]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            first = text.readline()
            text.seek(0)
            between = max(",;\t", key=first.count)
            rows = [row for row in csv.reader(text, delimiter=between, strict=True) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"`labels`: {file} is no readable CSV file ({brief(error)}).") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(
            f"`labels`: {file} needs a header and a row for each image, such as image,labels and "
            "a.jpg,cat;dog."
        )
    for line, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise UserError(
                f"`labels`: row {line} of {file} has {len(row)} columns, the header {len(rows[0])}."
                " Quote cells that contain the separator."
            )
    return rows[0], [[cell.strip() for cell in row] for row in rows[1:]]


def _plain(title: str) -> str:
    return " ".join(re.split(r"[\W_]+", title.strip().casefold()))


def _words(cells: list[str], task: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """The labels of each cell. Single labels are never parted, they may hold any sign."""
    if task == "multiclass":
        return [[cell] if cell else [] for cell in cells], ()
    if any(_BETWEEN.search(cell) for cell in cells):
        parts = [[word.strip() for word in _BETWEEN.split(cell)] for cell in cells]
        return [[word for word in several if word] for several in parts], ()
    split = [cell.split() for cell in cells]
    spaces = any(len(several) > 1 for several in split)
    note = ("labels are parted at spaces, as no ; | or , is among them",) if spaces else ()
    return split, note


def _one_column_a_class(
    file: str, header: list[str], rows: list[list[str]], places: list[int]
) -> tuple[list[list[str]], list[str]]:
    for i in places:
        for row in rows:
            if row[i].casefold() not in _YES | _NO:
                raise UserError(
                    f"`labels`: {file} has no column named label or labels, and its column "
                    f"{shown(header[i])} holds {shown(row[i])}, neither 0 nor 1. Name the column "
                    "of the labels so, or keep only the columns of the classes."
                )
    words = [[header[i] for i in places if row[i].casefold() in _YES] for row in rows]
    return words, [header[i] for i in places]


def _one_each(file: str, paths: Sequence[Path], classes: Mapping[Path, set[int]]) -> None:
    for path in paths:
        if (count := len(classes[path])) != 1:
            raise UserError(
                f"`labels`: {path.name} has {count} labels in {file}; one is expected"
                + (": for several give `task` multilabel." if count else ".")
            )


class _Images:
    """Finds images below a folder by what a label file calls them."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"data: {root} is no folder; `labels` names the images below it.")
        found = find_images([root])
        self.skipped = found.skipped
        self._by_path: dict[str, Path | None] = {}
        self._by_name: dict[str, Path | None] = {}
        for path in found.paths:
            inside = path.relative_to(root)
            for names, known in (
                ({inside.as_posix(), inside.with_suffix("").as_posix()}, self._by_path),
                ({path.name, path.stem}, self._by_name),
            ):
                for name in names:
                    # two images of one name: only more of their paths tells them apart
                    known[name] = None if name in known else path

    def find(self, name: str) -> Path | None:
        """By its path below the folder, which may begin above it, or by its name alone.

        The name alone does where no path is given, and only one image has it.
        """
        parts = Path(name.replace("\\", "/")).parts
        for begin in range(len(parts)):
            if path := self._by_path.get("/".join(parts[begin:])):
                return path
        return self._by_name.get(parts[0]) if len(parts) == 1 else None
