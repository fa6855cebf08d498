"""Rows of predictions as they come: CSV or JSON lines, in one file or in parts that are joined.

A file takes its name when it is whole. Parts stand in a folder beside it, each with a note of what
it was made from, so that a second start computes only what is missing or no longer true.

Names that are not UTF-8 keep their bytes in CSV (Python: ``open(..., errors="surrogateescape")``);
in JSON lines they are escapes such as ``\\udce9`` (``os.fsencode(name)`` gives the bytes).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .._files import FULL, named, write_files

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """What a row says, and how it is written.

    Attributes:
        kind: "csv" or "jsonl".
        topk: the most probable classes of an image, with their probabilities.
        logits: class names, where all logits are written too; else None.
    """

    kind: str
    topk: int
    logits: Sequence[str] | None = None

    def header(self) -> str:
        if self.kind == "jsonl":
            return ""
        logits = (f"logit_{name}" for name in self.logits or ())
        return _csv_line(["file", *_best_columns(self.topk), *logits])

    def line(self, row: Row) -> str:
        """``row``: {"file", "predictions": [{"class", "index", "probability"}], "logits"?}."""
        if self.kind == "jsonl":
            return json.dumps(row) + "\n"
        return _csv_line([row["file"], *_best_cells(row), *row.get("logits", ())])


@dataclass(frozen=True)
class TaskColumns:
    """What a row says of an image that went through several tasks.

    In a wide table every task has columns of its own, ``TASK/class`` and so on, where no name of a
    task has a slash; in a long one every image has a row a task.

    Attributes:
        kind: "csv" or "jsonl".
        topk: the most probable classes of an image in each task, with their probabilities.
        names: task -> its classes, in the order of the columns.
        logits: whether all logits are written too; not in a long CSV.
        table: "wide" or "long".
    """

    kind: str
    topk: int
    names: Mapping[str, Sequence[str]]
    logits: bool
    table: str = "wide"

    def header(self) -> str:
        if self.kind == "jsonl":
            return ""
        if self.table == "long":
            return _csv_line(["file", "task", *_best_columns(self._most)])
        columns = ["file"]
        for task, classes in self.names.items():
            columns += [f"{task}/{c}" for c in _best_columns(min(self.topk, len(classes)))]
            columns += [f"{task}/logit_{name}" for name in classes] if self.logits else []
        return _csv_line(columns)

    def line(self, row: Row) -> str:
        """``row``: {"file", "tasks": {name: {"predictions", "logits"?}}}; see ``Columns.line``."""
        answers = {task: row["tasks"][task] for task in self.names}
        if self.table == "wide":
            if self.kind == "jsonl":
                return json.dumps({"file": row["file"], "tasks": answers}) + "\n"
            cells = [c for a in answers.values() for c in (*_best_cells(a), *a.get("logits", ()))]
            return _csv_line([row["file"], *cells])
        if self.kind == "jsonl":
            lines = ({"file": row["file"], "task": t, **a} for t, a in answers.items())
            return "".join(json.dumps(line) + "\n" for line in lines)
        width = 2 * self._most
        return "".join(
            _csv_line([row["file"], task, *(_best_cells(a) + [""] * width)[:width]])
            for task, a in answers.items()
        )

    @property
    def _most(self) -> int:
        return max(min(self.topk, len(classes)) for classes in self.names.values())


def _best_columns(topk: int) -> list[str]:
    numbers = range(1, topk + 1) if topk > 1 else ("",)
    return [f"{name}{k}" for k in numbers for name in ("class", "probability")]


def _best_cells(answer: Row) -> list[Any]:
    return [cell for p in answer["predictions"] for cell in (p["class"], p["probability"])]


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of ``path`` once it is whole.

    What is no regular file, such as ``/dev/stdout`` or a pipe, is written to as it is.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and is the one that is named.
    """
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    if path.exists() and not path.is_file():
        with open(path, "w", **options) as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (
            error.filename == str(temporary) or (error.errno in FULL and error.filename is None)
        ):
            raise named(error, path) from error
        raise


class Parts:
    """The parts of one table: ``OUTPUT.parts/part-00000-of-00008.csv`` and so on.

    Args:
        output: the table that they will be joined to.
        count: how many there are.
        run: a digest of everything that decides the rows but the images' content.
    """

    def __init__(self, output: Path, count: int, run: str) -> None:
        self.output, self.count, self.run = output, count, run
        self.folder = output.with_name(f"{output.name}.parts")
        self._suffix = output.suffix or ".csv"

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}-of-{self.count:05d}{self._suffix}"

    def done(self, number: int, digest: str | None = None) -> dict[str, Any] | None:
        """What is known of a part that is whole and of this run; None where it is neither.

        Args:
            digest: what its images are now (``digest_of_files``); None: not looked at.
        """
        try:
            note = json.loads(self._note(number).read_bytes())
        except (OSError, ValueError):
            return None
        whole = self.path(number).is_file() and note.get("run") == self.run
        return note if whole and digest in (None, note.get("digest")) else None

    def write(self, number: int, digest: str, rows: Callable[[TextIO], dict[str, Any]]) -> None:
        """Compute one part; ``rows`` writes them and returns what the note will say beside."""
        self.folder.mkdir(exist_ok=True)
        self._note(number).unlink(missing_ok=True)
        with replacing(self.path(number)) as file:
            about = rows(file)
        note = {"run": self.run, "digest": digest, **about}
        write_files({self._note(number): (json.dumps(note) + "\n").encode()})

    def join(self, header: str) -> list[dict[str, Any]] | None:
        """Write the whole table where all parts are there: their notes, or None."""
        notes = [self.done(number) for number in range(self.count)]
        if any(note is None for note in notes):
            return None
        with replacing(self.output) as table:
            table.write(header)
            for number in range(self.count):
                with open(
                    self.path(number), encoding="utf-8", errors="surrogateescape", newline=""
                ) as part:
                    part.read(len(header))
                    shutil.copyfileobj(part, table)
        return [note for note in notes if note is not None]

    def _note(self, number: int) -> Path:
        return self.path(number).with_suffix(".json")


def digest_of(*facts: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def digest_of_files(paths: Sequence[Path]) -> str:
    """Changes where a file is another one, or was written since."""
    facts: list[Any] = []
    for path in paths:
        try:
            status = path.stat()
            facts.append([str(path), status.st_size, status.st_mtime_ns])
        except OSError:
            facts.append([str(path), None, None])
    return digest_of(facts)
