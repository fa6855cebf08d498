"""``pgn-fast tasks``: a directory of adapters, one a task, for a TaskBank and the server."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# bytes: file systems take 255, of which a copy that is on its way needs some
_LONGEST = 220
HELP = "list, add, remove and show the tasks of a directory"
EPILOG = """\
A directory of tasks holds one adapter a sub-directory, named after the task, all of them on one
backbone.

examples:

  pgn-fast tasks add tasks/ pets runs/pets/best
  pgn-fast tasks list tasks/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help_ in (
        ("list", "one line a task: method, classes, bytes, backbone"),
        ("add", "copy an adapter or a run's best one into the directory"),
        ("remove", "delete a task's adapter from the directory"),
        ("show", "what one task's adapter says of itself"),
    ):
        action = actions.add_parser(name, help=help_, description=help_)
        action.add_argument("directory", type=Path, metavar="DIR", help="of the tasks")
        if name != "list":
            action.add_argument("name", metavar="NAME", help="of the task")
        if name == "add":
            action.add_argument(
                "adapter", help="directory of an adapter or of a run, or OWNER/NAME on the hub"
            )


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "add": _add, "remove": _remove, "show": _show}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from ..adapters import WEIGHTS_FILE, read_adapter
    from ..adapters.places import adapters_of
    from ..errors import UserError

    if not args.directory.is_dir():
        raise UserError(f"no tasks: there is no folder {args.directory}.")
    damaged, found = 0, adapters_of(args.directory)
    for name, folder in found.items():
        try:
            config, _ = read_adapter(folder)
        except (UserError, OSError) as error:
            damaged += 1
            print(f"{name:<24} damaged: {error}")
            continue
        size = (folder / WEIGHTS_FILE).stat().st_size
        classes = config.get("num_classes")
        told = f"{classes} classes" if classes is not None else "classes as its head has"
        print(
            f"{name:<24} {config.get('method'):<12} {told:<12} {size / 1e3:8.1f} kB  "
            f"{config.get('base_model_name_or_path')}"
        )
    print(f"{len(found)} tasks" + (f", {damaged} of them damaged" if damaged else ""))
    return 2 if damaged else 0


def _add(args: argparse.Namespace) -> int:
    from ..adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
    from ..adapters.files import OpenAdapter
    from ..adapters.places import RUN_ADAPTERS
    from ..errors import UserError
    from ._options import adapter_folder

    target = _place(args)
    if args.name in RUN_ADAPTERS:
        raise UserError(
            f"NAME is {args.name!r}: a folder of that name marks its parent as a training run; "
            "choose another name."
        )
    if len(os.fsencode(args.name)) > _LONGEST:
        raise UserError(
            f"NAME is {len(os.fsencode(args.name))} bytes long; a folder's name has at most "
            f"{_LONGEST} here."
        )
    taken = f"{target} is there already: remove the task first, or choose another name"
    if os.path.lexists(target):
        raise UserError(taken)
    source = Path(adapter_folder(args.adapter))
    with OpenAdapter(source) as adapter:
        _check_backbone(args.directory, source, adapter.config)
    # copied beside it first: whoever watches the directory sees a whole adapter or none
    waiting = target.with_name(f".{target.name}.adding.{os.getpid()}")
    try:
        waiting.mkdir(parents=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if (source / name).exists():
                shutil.copyfile(source / name, waiting / name)
        read_adapter(waiting)  # whole and undamaged, or refused
        waiting.rename(target)
    except FileExistsError:
        raise UserError(taken) from None
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # another process was faster
            raise
        raise UserError(taken) from None
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    print(f"{args.name}: {source} -> {target}")
    return 0


def _check_backbone(directory: Path, source: Path, config: Mapping[str, Any]) -> None:
    """The tasks of a directory stand on one backbone: refuse one with another digest."""
    from ..adapters.files import OpenAdapter
    from ..adapters.places import adapters_of
    from ..errors import UserError

    digest = config.get("backbone_digest")
    if digest is None or not directory.is_dir():
        return
    for name, folder in adapters_of(directory).items():
        try:
            with OpenAdapter(folder) as adapter:
                other = adapter.config
        except (UserError, OSError):
            continue
        known = other.get("backbone_digest")
        # the digest of an adapter that keeps the backbone's own head counts that head, too
        heads = {c.get("head") == "keep" for c in (config, other)}
        if known in (None, digest) or len(heads) > 1:
            continue
        mine, theirs = (
            f"{c.get('base_model_name_or_path') or 'a backbone of no known name'} (digest "
            f"{c['backbone_digest'][:12]})"
            for c in (config, other)
        )
        raise UserError(
            f"{source} was trained on {mine}, and {name!r} in {directory} on {theirs}: the tasks "
            "of a directory share one backbone. Add it to a directory of its own."
        )


def _remove(args: argparse.Namespace) -> int:
    from ..errors import UserError

    target = _place(args)
    adapter = _adapter(args)
    if adapter != target:
        raise UserError(
            f"{target} is a training run, of which {adapter.name}/ is the task; nothing is "
            "deleted: move the run out of the directory"
        )
    if target.is_symlink():  # what it leads to is somebody else's
        target.unlink()
    else:
        leaving = target.with_name(f".{target.name}.removing.{os.getpid()}")
        target.rename(leaving)
        shutil.rmtree(leaving)
    print(f"{args.name}: removed")
    return 0


def _show(args: argparse.Namespace) -> int:
    from ..adapters import read_adapter

    config, tensors = read_adapter(_adapter(args))
    shapes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    print(json.dumps({**config, "tensors": shapes}, indent=2))
    return 0


def _place(args: argparse.Namespace) -> Path:
    from ..errors import UserError
    from ..serve.task import check_name

    check_name(args.name)  # as the server has it
    if args.name.startswith("."):
        raise UserError(
            f"NAME is {args.name!r}: a task's name is that of its folder, which must not be hidden."
        )
    return args.directory / args.name


def _adapter(args: argparse.Namespace) -> Path:
    """The adapter of the task NAME; of a training run its best one."""
    from ..adapters.places import find_adapter
    from ..errors import UserError

    found = find_adapter(_place(args))
    if found is None:
        raise UserError(f"no task {args.name!r} in {args.directory}{_nearest(args)}")
    return found


def _nearest(args: argparse.Namespace) -> str:
    import difflib

    from ..adapters.places import adapters_of

    there = adapters_of(args.directory) if args.directory.is_dir() else {}
    near = difflib.get_close_matches(args.name, list(there))
    return f"; the nearest are {', '.join(near)}" if near else ""
