"""Files that are either the old one or the new one, whole, and reading that never hangs."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

# a file of more than this, of which less than a quarter is on the disk, is made of holes
_SPARSE = 64 << 20
_DAY = 86_400
# errors of a disk, or of a user's share of it, that is full; Windows knows no quota
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_HOST = re.sub(r"\W", "", socket.gethostname()) or "host"
_count = itertools.count()


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Replace files so that neither a kill nor a full disk leaves one of them half written.

    Every file is first written in full beside its target, under a name that no other writer has,
    and flushed to the disk; only then do the new ones take the places of the old, in the order
    given. A failure while writing leaves all old files as they were; a kill between two
    replacements leaves the earlier ones new and the later ones old, each whole. Several processes
    or threads may write the same files at once: each file is in the end one writer's.

    Args:
        contents: target path -> new bytes; the folders must exist.

    Raises:
        OSError: a file could not be written (disk full, no permission); it names the target, and
            of a full disk what is needed and free.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            staged[path] = _temporary(path)
            try:
                with open(staged[path], "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                for temporary in staged.values():
                    temporary.unlink(missing_ok=True)
                raise named(error, path, sum(map(len, contents.values()))) from error
        for path in contents:
            os.replace(staged[path], path)
            del staged[path]
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
    for path in contents:
        _sweep(path)
    for folder in {path.parent for path in contents}:
        _flush_folder(folder)


def named(error: OSError, path: Path, need: int | None = None) -> OSError:
    """The error of writing ``path``, whatever file beside it was written.

    Args:
        need: bytes that were to be written in all; a full disk's error says them.
    """
    reason = error.strerror or str(error)
    if error.errno in FULL:
        free = shutil.disk_usage(path.parent).free
        needed = "" if need is None else f"{size_text(need)} are needed, "
        reason += f" ({needed}{size_text(free)} are free)"
    return OSError(error.errno, reason, str(path))


def size_text(nbytes: float) -> str:
    """ "12.3 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"


def _temporary(path: Path) -> Path:
    writer = f"{_HOST}-{os.getpid()}-{threading.get_ident()}-{next(_count)}"
    return path.with_name(f".{path.name}.{writer}.tmp")


def _sweep(path: Path) -> None:
    """Remove what killed writers of this file left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\w+)-(\d+)-\d+-\d+\.tmp")
    for other in path.parent.iterdir():
        if match := name.fullmatch(other.name):
            try:
                old = time.time() - other.stat().st_mtime > _DAY
                if old or (match[1] == _HOST and not _runs(int(match[2]))):
                    other.unlink()
            except OSError:
                continue  # its writer was faster


def _runs(pid: int) -> bool:
    """Whether a process of that number may be there; Windows has no harmless way to ask."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _flush_folder(folder: Path) -> None:
    """Make the renames in ``folder`` survive a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it, if it is one: a pipe or a device would hang, or never end.

    Raises:
        UserError: not there, no plain file, not readable, or made of holes; it names the path.
    """
    try:
        _check_kind(path, path.stat())
        # the file may have been exchanged since: a pipe then opens at once, and is refused below
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from error
    try:
        found = os.fstat(file.fileno())
        _check_kind(path, found)
        on_disk = getattr(found, "st_blocks", None)
        if found.st_size > _SPARSE and on_disk is not None and 4 * 512 * on_disk < found.st_size:
            raise UserError(
                f"{path} claims {found.st_size} bytes and has {512 * on_disk} on the disk: it is "
                "a sparse file, not data. Copy it again."
            )
    except BaseException:
        file.close()
        raise
    return file


def _check_kind(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no plain file (a folder, a pipe or a device).")
