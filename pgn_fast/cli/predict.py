"""``pgn-fast predict``: name the classes of images."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import UserError
from ._options import (
    ADAPTER,
    add_backbone_arguments,
    add_device_argument,
    add_run_arguments,
    add_strict_argument,
    at_least,
    pick_device,
)

if TYPE_CHECKING:
    from ..train.split import Split
    from ..train.tables import Parts
    from ._answers import EveryTask, OneAdapter

HELP = "name the classes of images, as CSV or JSON lines"
EPILOG = """\
With --tasks DIR in the place of ADAPTER every image goes through every task of the folder, what
lies below their first prompts once: a row an image, or with --table long a row an image and task.
A task that cannot be loaded is named, the others are written, and the exit code is 2.

Rows are written as they come, and a file takes its name when it is whole. Under torchrun, or with
--parts N, each part is a file in OUTPUT.parts/; a second start computes only what is missing, and
whoever finishes last joins them. Exit code 2 where no image could be read.

examples:
  pgn-fast predict runs/photos/best cat.jpg dog.png
  pgn-fast predict runs/photos new_photos --output predictions.csv
  pgn-fast predict runs/photos new_photos --format jsonl --topk 3 | head
  pgn-fast predict new_photos --tasks tasks/ --table long --output predictions.csv
  torchrun --nproc-per-node 8 -m pgn_fast predict runs/photos archive --output archive.csv
"""
# seconds between two lines of progress: on a terminal, and elsewhere
_TERMINAL_S, _LOG_S = 0.5, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help=f"{ADAPTER}. With --tasks there is none, and images begin here",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image files, or folders of them"
    )
    parser.add_argument(
        "--tasks",
        action=_Tasks,
        metavar="DIR",
        help="every task of a folder with an adapter or a run in each sub-folder",
    )
    parser.add_argument(
        "--table",
        choices=("wide", "long"),
        help="of --tasks: columns for each task, or rows for each task (wide)",
    )
    add_backbone_arguments(parser)
    add_strict_argument(parser)
    parser.add_argument("--output", metavar="FILE", help="default: the terminal")
    parser.add_argument(
        "--format", choices=("csv", "jsonl"), help="default: as --output ends, else csv"
    )
    parser.add_argument(
        "--topk", type=at_least(1), default=1, metavar="K", help="classes an image (1)"
    )
    parser.add_argument("--logits", action="store_true", help="write every class's logit too")
    parser.add_argument(
        "--parts",
        type=at_least(1),
        metavar="N",
        help="files that the rows are computed in, each kept when it is whole (one a process)",
    )
    add_run_arguments(parser)
    add_device_argument(parser)


class _Tasks(argparse.Action):
    """``--tasks``: what stands in ADAPTER's place is an image, and further ones may be missing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "images":
                action.nargs, action.required = "*", False


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)

    from ..train.data import image_files
    from ..train.distributed import Processes
    from ..train.tables import Parts, digest_of, replacing

    images = args.images if args.tasks is None else [args.adapter, *(args.images or ())]
    # torchrun's numbers alone: processes that share nothing need no process group
    processes = Processes(device)
    output = _checked_output(args.output)
    suffix = output.suffix if output else ""
    kind = args.format or ("jsonl" if suffix in (".jsonl", ".json") else "csv")
    count = args.parts or processes.world
    if count > 1 and output is None:
        raise UserError("--output FILE is needed where rows are computed in parts.")
    split = image_files(images)
    if processes.first:
        for note in split.notes:
            print(note, file=sys.stderr)
    from ._answers import EveryTask, OneAdapter, check_table

    check_table(args, kind)
    asked = (OneAdapter if args.tasks is None else EveryTask)(args, kind, processes.device)
    if processes.first:
        for reason in asked.failed:
            print(f"left out: {reason}", file=sys.stderr)
    predictor = _Predictor(args, asked)
    if count > 1:
        assert output is not None
        names = [split.images.name(i) for i in split.indices]
        options = [args.model, repr(args.model_kwargs), args.pretrained_path, args.amp]
        run = digest_of(names, asked.digest, options, args.amp_dtype, asked.columns.header(), kind,
                        args.topk, args.logits, args.table, count)  # fmt: skip
        parts = Parts(output, count, run)
        return _in_parts(predictor, split, parts, processes.rank, processes.world)
    if output is None:
        return _to_terminal(predictor, split)
    with replacing(output) as file:
        about = predictor.write(split, file)
    return _end(about["rows"], about["images"], asked.failed)


def _checked_output(given: str | None) -> Path | None:
    """The file that will be written, looked at before any work is done."""
    if given is None:
        return None
    path = Path(given)
    if path.is_dir():
        raise UserError(f"--output {given} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise UserError(f"--output {given}: there is no folder {path.parent}. Make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output {given}: no permission to write there.")
    return path


def _to_terminal(predictor: _Predictor, split: Split) -> int:
    # a name that is not UTF-8 goes out as the bytes that it is
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        about = predictor.write(split, sys.stdout)
    except BrokenPipeError:
        # the reader has what it wanted, as head does; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return _end(about["rows"], about["images"], predictor.asked.failed)


def _in_parts(predictor: _Predictor, split: Split, parts: Parts, rank: int, world: int) -> int:
    """Compute this process's parts, as far as they are missing, and join all where it is last."""
    from dataclasses import replace
    from functools import partial

    from ..train.tables import digest_of_files

    for number in range(rank, parts.count, world):
        begin, end = (len(split) * k // parts.count for k in (number, number + 1))
        share = replace(split, indices=range(begin, end))
        digest = digest_of_files(split.images.paths[begin:end])
        path = parts.path(number)
        if parts.done(number, digest):
            print(f"{path} is there already", file=sys.stderr)
            continue
        parts.write(number, digest, partial(predictor.write, share))
        print(f"{path} is written", file=sys.stderr)
    notes = parts.join(predictor.columns.header())
    if notes is None:
        return 0  # another process is not done, and will join
    print(
        f"{parts.output} is joined from {parts.count} parts; {parts.folder} may be removed",
        file=sys.stderr,
    )
    rows, images = (sum(note[key] for note in notes) for key in ("rows", "images"))
    return _end(rows, images, predictor.asked.failed)


def _end(rows: int, images: int, failed: Sequence[str]) -> int:
    print(f"{rows} of {images} images classified", file=sys.stderr)
    if failed:
        print(f"{len(failed)} tasks were left out", file=sys.stderr)
    return 0 if rows and not failed else 2


class _Predictor:
    """Rows of images, as what is asked answers."""

    def __init__(self, args: argparse.Namespace, asked: OneAdapter | EveryTask) -> None:
        self.args, self.asked, self.columns = args, asked, asked.columns

    def write(self, split: Split, file: TextIO) -> dict[str, Any]:
        """All rows of a split: how many images and rows there are, and what was unreadable."""
        unreadable: list[str] = []
        rows = 0
        progress = _Progress(len(split))
        file.write(self.columns.header())
        for batch, missing in self._batches(split):
            for row in batch:
                file.write(self.columns.line(row))
            file.flush()
            for name in missing:
                progress.say(f"unreadable, left out: {name}")
            rows += len(batch)
            unreadable += missing
            progress.update(len(batch) + len(missing))
        progress.end()
        return {"images": len(split), "rows": rows, "unreadable": unreadable}

    def _batches(self, split: Split) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        """Rows as the columns take them, and the images that could not be read."""
        from ..train.loader import make_loader

        args = self.args
        loader = make_loader(split, self.asked.transform, args.batch_size, workers=args.workers)
        for pixels, _, indices, missing in loader:
            if len(indices) == 0:
                yield [], missing
                continue
            files = [split.images.name(index) for index in indices.tolist()]
            yield list(self.asked.rows(pixels, files)), missing


class _Progress:
    """How far it is, on stderr: a line that is rewritten on a terminal, one a minute elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._terminal = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < (_TERMINAL_S if self._terminal else _LOG_S):
            return
        self._last = now
        rate = self._done / (now - self._start)
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - self._done) / rate))
        line = f"{self._done:,} of {self._total:,} images  {rate:,.0f} images/s  left {left}"
        print(f"\r{line}\x1b[K" if self._terminal else line, end="", file=sys.stderr)
        print(end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
