"""``pgn-fast tasks``: a directory of adapters, one a task, for a TaskBank and the server."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

HELP = "list, add, remove and show the tasks of a directory"
EPILOG = """\
A directory of tasks holds one adapter a sub-directory, named after the task.

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
            action.add_argument("adapter", type=Path, help="directory of an adapter or of a run")


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "add": _add, "remove": _remove, "show": _show}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from ..adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
    from ..errors import UserError

    if not args.directory.is_dir():
        raise UserError(f"no tasks: there is no folder {args.directory}.")
    folders = sorted(f for f in args.directory.iterdir() if (f / CONFIG_FILE).exists())
    damaged = 0
    for folder in folders:
        try:
            config, _ = read_adapter(folder)
        except UserError as error:
            damaged += 1
            print(f"{folder.name:<24} damaged: {error}")
            continue
        size = (folder / WEIGHTS_FILE).stat().st_size
        classes = config.get("num_classes")
        told = f"{classes} classes" if classes is not None else "classes as its head has"
        print(
            f"{folder.name:<24} {config.get('method'):<12} {told:<12} {size / 1e3:8.1f} kB  "
            f"{config.get('base_model_name_or_path')}"
        )
    print(f"{len(folders)} tasks" + (f", {damaged} of them damaged" if damaged else ""))
    return 2 if damaged else 0


def _add(args: argparse.Namespace) -> int:
    from ..adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
    from ..errors import UserError

    target = _place(args)
    if target.exists():
        raise UserError(f"{target} is there already: remove the task first, or choose another name")
    source = args.adapter
    if not (source / CONFIG_FILE).exists() and (source / "best" / CONFIG_FILE).exists():
        source = source / "best"
    read_adapter(source)  # whole and undamaged, or refused
    # copied beside it first: whoever watches the directory sees a whole adapter or none
    waiting = target.with_name(f".{target.name}.adding")
    shutil.rmtree(waiting, ignore_errors=True)
    waiting.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (source / name).exists():
            shutil.copyfile(source / name, waiting / name)
    waiting.rename(target)
    print(f"{args.name}: {source} -> {target}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from ..adapters import CONFIG_FILE
    from ..errors import UserError

    target = _place(args)
    if not (target / CONFIG_FILE).exists():
        raise UserError(f"no task {args.name!r} in {args.directory}{_nearest(args)}")
    leaving = target.with_name(f".{target.name}.removing")
    shutil.rmtree(leaving, ignore_errors=True)
    target.rename(leaving)
    shutil.rmtree(leaving)
    print(f"{args.name}: removed")
    return 0


def _show(args: argparse.Namespace) -> int:
    from ..adapters import read_adapter
    from ..errors import UserError

    target = _place(args)
    if not target.is_dir():
        raise UserError(f"no task {args.name!r} in {args.directory}{_nearest(args)}")
    config, tensors = read_adapter(target)
    shapes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    print(json.dumps({**config, "tensors": shapes}, indent=2))
    return 0


def _place(args: argparse.Namespace) -> Path:
    from ..errors import UserError

    if args.name != Path(args.name).name or args.name.startswith("."):
        raise UserError(
            f"NAME is {args.name!r}: a task's name is that of its folder, without slashes and not "
            "hidden"
        )
    return args.directory / args.name


def _nearest(args: argparse.Namespace) -> str:
    import difflib

    there = [f.name for f in args.directory.iterdir()] if args.directory.is_dir() else []
    near = difflib.get_close_matches(args.name, there)
    return f"; the nearest are {', '.join(near)}" if near else ""
