"""Files that are either the old one or the new one, whole, whenever the machine stops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Replace files so that neither a kill nor a full disk leaves one of them half written.

    Every file is first written in full beside its target and flushed to the disk; only then do the
    new ones take the places of the old, in the order given. A failure while writing leaves all old
    files as they were; a kill between two replacements leaves the earlier ones new and the later
    ones old, each whole.

    Args:
        contents: target path -> new bytes; the folders must exist.

    Raises:
        OSError: a file could not be written (disk full, no permission); nothing was replaced.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            # one fixed name: what a killed run left behind is overwritten by the next
            staged[path] = path.with_name(f".{path.name}.tmp")
            with open(staged[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in staged.items():
        os.replace(temporary, path)
    for folder in {path.parent for path in contents}:
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Make the renames in ``folder`` survive a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
