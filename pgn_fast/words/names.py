"""Files of class names as people have them, and which name belongs to which label."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._files import open_file
from ..errors import UserError, shown

# more than the names of every data set that is used for classification
_LARGEST_FILE = 8 << 20
_NUMBERED = re.compile(r"(\d+)[\s:.,;)]+(\S.*)")
_WORDNET = re.compile(r"(n\d{8})[\s:,]+(\S.*)")


def same_name(name: str) -> str:
    """Equal for names that read the same: capitals, accents in either Unicode encoding, and
    spaces, underscores and hyphens between words."""
    words = re.split(r"[\s_-]+", unicodedata.normalize("NFC", name).casefold())
    return " ".join(word for word in words if word)


def read_class_names(path: str | Path) -> list[str] | dict[str, str]:
    """The class names in a file: a list in label order, or {folder or label: name}.

    - text: a class a line; a folder, a tab and its name; numbered lines ("1 cat", "0: cat"); or
      WordNet's ids and names ("n02121808 cat");
    - ``.csv``: one column of names, or two: folder and name, quoted where they have commas;
    - ``.json``: a list of names, or a dictionary of folders or labels and names.

    UTF-8 or UTF-16 with or without a byte order mark, any line ends; blank lines do not count.

    Raises:
        UserError: no such file, or not as above.
    """
    path = Path(path)
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_json(path, text)
    if suffix == ".csv":
        rows = [[c.strip() for c in row] for row in csv.reader(io.StringIO(text, newline=""))]
        rows = [row for row in rows if any(row)]
    else:
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
        rows = [[c.strip() for c in line.split("\t")] for line in lines if line]
    if not rows:
        raise UserError(f"`class_names`: {path} has no names in it.")
    return _from_rows(path, rows)


def _text(path: Path) -> str:
    try:
        with open_file(path) as file:
            data = file.read(_LARGEST_FILE + 1)
    except UserError as error:
        raise UserError(f"`class_names`: {error}") from error
    if len(data) > _LARGEST_FILE:
        raise UserError(f"`class_names`: {path} has more than {_LARGEST_FILE} bytes: no such list.")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`class_names`: {path} is neither UTF-8 nor UTF-16 (byte {error.start}); save it as "
            "UTF-8."
        ) from error


def _from_json(path: Path, text: str) -> list[str] | dict[str, str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"`class_names`: {path} is no JSON ({error}).") from error
    values = content.values() if isinstance(content, dict) else content
    if not isinstance(content, list | dict) or not all(isinstance(v, str) for v in values):
        raise UserError(
            f"`class_names`: {path} holds {shown(content)}; it takes a list of names, or a "
            "dictionary of folders or labels and names."
        )
    return content


def _from_rows(path: Path, rows: list[list[str]]) -> list[str] | dict[str, str]:
    widths = {len(row) for row in rows}
    lines = [row[0] for row in rows]
    if widths == {1} and all(_WORDNET.fullmatch(line) for line in lines):
        rows = [list(m.groups()) for line in lines if (m := _WORDNET.fullmatch(line))]
    elif widths == {1}:
        return _without_numbers(path, lines)
    elif widths != {2}:
        odd = next(row for row in rows if len(row) != len(rows[0]) or len(row) > 2)
        raise UserError(
            f"`class_names`: {path} has rows of {' and '.join(map(str, sorted(widths)))} columns, "
            f"such as {shown(odd)}; every row is a name, or a folder and its name."
        )
    found: dict[str, str] = {}
    for key, name in rows:
        if key in found:
            raise UserError(f"`class_names`: {path} names {shown(key)} twice.")
        found[key] = name
    return found


def _without_numbers(path: Path, lines: list[str]) -> list[str]:
    """Names without their numbers, where the lines count from 0 or from 1.

    Raises:
        UserError: the lines count, but a number is missing.
    """
    matches = [m for line in lines if (m := _NUMBERED.fullmatch(line))]
    numbers = [int(m[1]) for m in matches]
    if len(numbers) < len(lines) or len(lines) < 2:
        return lines
    first = numbers[0]
    if first in (0, 1) and numbers == list(range(first, first + len(lines))):
        return [m[2] for m in matches]
    if len(lines) > 2 and numbers == sorted(set(numbers)):
        raise UserError(
            f"`class_names`: the lines of {path} count {numbers[0]}, {numbers[1]}, ..., "
            f"{numbers[-1]}, and there are {len(lines)}: a class is missing, or the numbers are "
            "part of the names; then give a .json list."
        )
    return lines


def names_for(
    given: Sequence[str] | Mapping[str, str],
    classes: Sequence[str] | None,
    count: int,
    whose: str,
) -> tuple[list[str], list[str]]:
    """The name of every label, in label order, and what a person should know about it.

    A mapping is matched to the data's classes by their names (folders); where it has none of them,
    by labels, which may count from 0 or from 1. A list is in label order; where it holds the data's
    own names in another order, each class gets its own.

    Args:
        given: what ``read_class_names`` gave, or the like.
        classes: the data's own names in label order; None where they have none.
        count: C.
        whose: what the classes belong to, for messages.

    Raises:
        UserError: not one name for each class, or an order that contradicts the data's.
    """
    if isinstance(given, Mapping):
        return _by_key(given, classes, count, whose)
    if len(given) != count:
        raise UserError(
            f"`class_names`: {len(given)} names, {whose} has {count} classes: give one a class, in "
            "label order, or folders and names in two columns with a tab between."
        )
    if classes is None:
        return list(given), []
    at = {same_name(name): label for label, name in enumerate(classes)}
    keys = [re.match(r"(.+?)\s*[,;:=|]\s*\S", name) for name in given]
    if all(key and same_name(key[1]) in at for key in keys):
        raise UserError(
            f"`class_names`: {shown(given[0])} begins with a class of {whose}: put a tab between "
            "folder and name, in every line."
        )
    places = [at.get(same_name(name)) for name in given]
    moved = [i for i, place in enumerate(places) if place is not None and place != i]
    if not moved:
        return list(given), []
    if len(at) == count and None not in places and len(set(places)) == count:
        ordered = dict(zip(places, given, strict=True))
        note = "class names are in another order than the data's classes: matched by name"
        return [ordered[label] for label in range(count)], [note]
    i = moved[0]
    raise UserError(
        f"`class_names`: name {i} is {shown(given[i])}, which is class {places[i]} of {whose}; "
        f"class {i} is {shown(classes[i])}. Give folders and names in two columns with a tab "
        "between."
    )


def _by_key(
    given: Mapping[str, str], classes: Sequence[str] | None, count: int, whose: str
) -> tuple[list[str], list[str]]:
    found = {same_name(key): name for key, name in given.items()}
    if len(found) < len(given):
        raise UserError("`class_names`: two of its folders read the same; give each class once.")
    wanted = [same_name(name) for name in classes or ()]
    if any(key in found for key in wanted):
        missing = [
            name for name, key in zip(classes or (), wanted, strict=True) if key not in found
        ]
        if missing:
            raise UserError(
                f"`class_names`: no name for {len(missing)} of the {count} classes of {whose}, "
                f"such as {shown(missing[0])}."
            )
        return [found[key] for key in wanted], []
    if all(re.fullmatch(r"\d+", key) for key in found):
        by_label = {int(key): name for key, name in found.items()}
        if sorted(by_label) == list(range(count)):
            return [by_label[label] for label in range(count)], []
        if sorted(by_label) == list(range(1, count + 1)):
            note = "class names count from 1: name 1 is taken for label 0, and so on"
            return [by_label[label + 1] for label in range(count)], [note]
    first = shown(classes[0]) if classes else f"labels 0 ... {count - 1}"
    raise UserError(
        f"`class_names`: its {len(given)} keys, such as {shown(next(iter(given)))}, are none of "
        f"the {count} classes of {whose}, such as {first}."
    )
