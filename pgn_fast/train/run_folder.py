"""The folder of a run: one process writes into it at a time, and it holds one run only.

That of a search is locked, and told from a run's, in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .._files import write_files
from ..errors import UserError
from ..prompts.networks import TIMM
from . import checkpoints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
ARGS = "args.yaml"
# the file of a search by ``tune``, whose folder holds runs of its own
SEARCH = "tune.json"
# what a run or a search leaves; a folder with one of these is not a new one
_TRACES = (SEARCH, checkpoints.FILE, "best", "last", "summary.json")
# POSIX locks do not refuse the process that holds them already
_held: set[Path] = set()


class RecordedBackbone(NamedTuple):
    """How a run made its backbone: timm's name and keywords, and a weights file on this machine."""

    name: str | None
    kwargs: dict[str, Any]
    path: str | None


def recorded_backbone(run: Path) -> RecordedBackbone:
    """How the backbone of the run in a folder was made, by its ``args.yaml``.

    The folder may come from somebody else: only a name of timm's registry, keywords that describe
    an architecture, and a weights file that is there are taken.

    Returns:
        Nothing in it where no run says.
    """
    try:
        args = yaml.safe_load((run / ARGS).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return RecordedBackbone(None, {}, None)
    if not isinstance(args, dict) or not isinstance(args.get("model_kwargs"), dict):
        return RecordedBackbone(None, {}, None)
    given, name = args["model_kwargs"], args.get("model")
    kwargs = {k: v for k, v in given.items() if k in TIMM and TIMM[k].accepts(v)}
    if args.get("layout") == "enlarged":
        kwargs["dynamic_img_size"] = True
    path = args.get("pretrained_path") or given.get("checkpoint_path")
    return RecordedBackbone(
        name if isinstance(name, str) and re.fullmatch(r"[\w.]+", name) else None,
        kwargs,
        path if isinstance(path, str) and Path(path).is_file() else None,
    )


class RunFolder:
    """A folder that a run owns while it is open, by a lock file with the owner's pid and host.

    The lock is the operating system's, so it ends with its process however that ends; what a dead
    owner left is taken over, and ``took_over`` says so. A folder that does not exist yet is made,
    and locked, by ``create``: what refuses a run before that leaves nothing behind.

    Args:
        path: the folder.
        resume: whether a run in it is continued; without, a folder that holds a run is refused.
        writes: False in the processes of a distributed run that only read.
        search: whether it is the folder of a search, and not of one run.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, writes: bool = True, search: bool = False
    ) -> None:
        self.path, self.resume, self.writes, self.search = path, resume, writes, search
        self.took_over: str | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> RunFolder:
        """Raises UserError: another run works in the folder, or it holds one already."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"`output`: {self.path} is a file; give a folder.")
        if self.path.is_dir():
            self._claim()
        return self

    def create(self, settings: dict[str, Any]) -> None:
        """``make`` the folder, and write the settings there.

        ``args.yaml`` is what timm's train.py writes, and what ``-c`` reads.
        """
        if not self.writes:
            return
        self.make()
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_files({self.path / ARGS: text.encode()})

    def make(self) -> None:
        """Make the folder and lock it, where that is not done yet."""
        if self._descriptor is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is None:
            return
        # removed while it is held: whoever opened it meanwhile finds another file at its path
        with contextlib.suppress(OSError):
            os.unlink(self._lock)
        os.close(self._descriptor)
        self._descriptor = None
        _held.discard(self._lock.resolve())

    @property
    def _lock(self) -> Path:
        return self.path / LOCK

    def _claim(self) -> None:
        if self.writes:
            self._descriptor = self._take()
        trace = next((name for name in _TRACES if (self.path / name).exists()), None)
        kind = "search" if trace == SEARCH else "run"
        other = self.search != (kind == "search")
        if trace is None or (self.resume and not other):
            return
        self.__exit__()
        command = "tune" if kind == "search" else "train"
        way = f"pgn-fast {command} --resume continues it; give"
        if not other:
            way = "Add `resume=True` to continue it, or give"
        raise UserError(
            f"`output`: {self.path} holds a {kind} already ({trace}). {way} another folder."
        )

    def _take(self) -> int:
        while True:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
            owner = _read(descriptor)
            mine = owner.get("host") == socket.gethostname()
            if self._lock.resolve() in _held or not _lock(descriptor):
                os.close(descriptor)
                raise UserError(self._in_use(owner))
            if owner and not mine:
                # a lock of another machine may not be seen from here, as on some shared disks
                os.close(descriptor)
                raise UserError(
                    f"{self._in_use(owner)} If that machine is gone, delete {self._lock}."
                )
            if not _same_file(descriptor, self._lock):
                # its owner ended and removed it between our opening and locking it
                os.close(descriptor)
                continue
            if owner:
                self.took_over = (
                    f"took over {self.path} from process {owner.get('pid')}, which ended without "
                    "giving it back"
                )
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%c")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
            _held.add(self._lock.resolve())
            return descriptor

    def _in_use(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        return (
            f"`output`: {self.path} is in use by {who}, since {owner.get('since', '?')}. Wait for "
            "that run, stop it, or give another folder."
        )


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {"pid": "?"}
    return content if isinstance(content, dict) else {"pid": "?"}


def _lock(descriptor: int) -> bool:
    """POSIX record locks: unlike flock's they are not inherited by data-loading processes."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
