"""One reader a kind of files. Each gives lists of (image's name, label) by split.

"trainval" is what the papers train on at last: training and validation images together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, shown
from .places import Place, inside
from .table import DataSet

Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Read:
    """A split as a reader found it.

    Attributes:
        rows: names of images below the place, and labels from 0.
        class_names: in label order; None: the files do not tell.
    """

    rows: Rows
    class_names: list[str] | None


@dataclass(frozen=True)
class Reader:
    """A kind of files.

    Attributes:
        marker: the file or folder by which a data set's folder is known.
        read: a split, by the name "train", "validation", "test" or "trainval".
    """

    marker: Callable[[DataSet], str]
    read: Callable[[DataSet, Place, str], Read]


def merged(read: Callable[[str], Rows], split: str) -> Rows:
    """A split; "trainval" as training and validation images one after the other."""
    return read("train") + read("validation") if split == "trainval" else read(split)


# VTAB-1k's lists: "images/train800/000000.jpg 12" a line.

_LISTS = {
    "train": "train800.txt",
    "validation": "val200.txt",
    "trainval": "train800val200.txt",
    "test": "test.txt",
}


def _read_list(data: DataSet, place: Place, split: str) -> Read:
    file = _LISTS[split]
    return Read(parse_list(place.text(file), data.num_classes, f"{file} in {place.title}"), None)


def parse_list(text: str, num_classes: int, where: str) -> Rows:
    """Lines of an image's name, white space and its label; the name may have spaces itself.

    Raises:
        UserError: a line of another form, or a label out of range.
    """
    rows: Rows = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(.*[^\s,;])[\s,;]+(-?\d+)\s*", line)
        if match is None:
            raise UserError(
                f"data: line {number} of {where} is {shown(line)}; an image's name and its label "
                "are expected, such as images/0.jpg 3."
            )
        rows.append((match[1].strip('"'), int(match[2])))
    check_labels(rows, num_classes, where)
    return rows


def check_labels(rows: Rows, num_classes: int, where: str) -> None:
    """Raises UserError: no rows, or a label out of range; says where labels count from 1."""
    if not rows:
        raise UserError(f"data: {where} names no image.")
    labels = [label for _, label in rows]
    low, high = min(labels), max(labels)
    if low >= 0 and high < num_classes:
        return
    name = rows[labels.index(high if high >= num_classes else low)][0]
    hint = (
        ": the list counts from 1; subtract 1 from every label of every list"
        if low >= 1 and high == num_classes
        else ""
    )
    raise UserError(
        f"data: label {high if high >= num_classes else low} of {name} in {where} is out of range "
        f"for {num_classes} classes (0 ... {num_classes - 1}){hint}."
    )


# Zhou's splits: {"train": [["folder/image.jpg", 0, "name"], ...], "val": ..., "test": ...}.

_ZHOU = {"train": "train", "validation": "val", "test": "test"}
# the folder of images, as PGN's and CoOp's instructions call it
_ZHOU_IMAGES = ("images", "jpg", "2750", "SUN397", "UCF-101-midframes")


def _read_zhou(data: DataSet, place: Place, split: str) -> Read:
    where = f"{data.file} in {place.title}"
    content = _json(place.text(data.file), where)
    missing = [key for key in _ZHOU.values() if not isinstance(content.get(key), list)]
    if missing:
        raise UserError(f"data: {where} has no list {missing[0]!r}; it takes train, val and test.")
    names: dict[int, str] = {}
    lists: dict[str, Rows] = {}
    for key in _ZHOU.values():
        lists[key] = []
        for item in content[key]:
            if not _is_zhou(item):
                raise UserError(
                    f"data: {where}: {key} has the item {shown(item)}; an image's name, its label "
                    "and its class's name are expected."
                )
            path, label, name = item
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"data: {where}: label {label} is {shown(names[label])} and {shown(name)}."
                )
            lists[key].append((path, label))
        check_labels(lists[key], data.num_classes, f"{key} of {where}")
    found = [names.get(label) for label in range(data.num_classes)]
    if None in found:
        raise UserError(f"data: {where} has no image of class {found.index(None)}.")
    folder = next((name for name in _ZHOU_IMAGES if place.has(name)), None)
    rows = merged(lambda part: lists[_ZHOU[part]], split)
    if folder is not None and not place.has(inside(rows[0][0], where)):
        rows = [(f"{folder}/{name}", label) for name, label in rows]
    return Read(rows, [str(name) for name in found])


def _is_zhou(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 3
        and isinstance(item[0], str)
        and type(item[1]) is int
        and isinstance(item[2], str)
    )


# CLEVR's scenes: how many objects there are, 3 ... 10.

_FEWEST = 3


def _read_clevr(data: DataSet, place: Place, split: str) -> Read:
    part = "val" if split == "test" else "train"
    file = f"scenes/CLEVR_{part}_scenes.json"
    where = f"{file} in {place.title}"
    scenes = _json(place.text(file), where).get("scenes")
    if not isinstance(scenes, list):
        raise UserError(f"data: {where} has no list of scenes.")
    rows: Rows = []
    for scene in scenes:
        try:
            name, count = scene["image_filename"], len(scene["objects"])
        except (TypeError, KeyError) as error:
            raise UserError(f"data: {where} has a scene without {error}.") from error
        rows.append((f"images/{part}/{name}", count - _FEWEST))
    check_labels(rows, data.num_classes, where)
    return Read(rows, [str(_FEWEST + label) for label in range(data.num_classes)])


# FGVC's splits: {"folder/image.jpg": class id, ...}; ids are put in order and counted from 0.

_FGVC = {"train": "train.json", "validation": "val.json", "test": "test.json"}


def _read_fgvc(data: DataSet, place: Place, split: str) -> Read:
    lists = {part: _fgvc_ids(place, file) for part, file in _FGVC.items()}
    # the training images have all classes; another split may lack one
    ids = sorted(set(lists["train"].values()))
    where = f"train.json in {place.title}"
    if len(ids) != data.num_classes:
        raise UserError(f"data: {where} has {len(ids)} classes, {data.name} {data.num_classes}.")
    at = {label: i for i, label in enumerate(ids)}
    folder = f"{data.file}/" if data.file else ""

    def rows(part: str) -> Rows:
        unknown = set(lists[part].values()) - set(ids)
        if unknown:
            raise UserError(
                f"data: {_FGVC[part]} in {place.title} has the class {shown(min(unknown))}, which "
                "train.json has not."
            )
        return [(f"{folder}{name}", at[label]) for name, label in lists[part].items()]

    return Read(merged(rows, split), None)


def _fgvc_ids(place: Place, file: str) -> dict[str, int]:
    where = f"{file} in {place.title}"
    content = _json(place.text(file), where)
    try:
        return {str(name): int(label) for name, label in content.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"data: {where}: a class id is no number ({error}).") from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"data: {where} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"data: {where} holds {shown(content)}, not a dictionary.")
    return content


READERS: dict[str, Reader] = {
    "lists": Reader(lambda data: "train800.txt", _read_list),
    "zhou": Reader(lambda data: data.file, _read_zhou),
    "clevr": Reader(lambda data: "scenes", _read_clevr),
    "fgvc": Reader(lambda data: "train.json", _read_fgvc),
}
