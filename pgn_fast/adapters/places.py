"""Where adapters lie: in a folder itself, in a training run's ``best``, on the hub."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from .. import hub
from .files import CONFIG_FILE, WEIGHTS_FILE

_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# of a training run: its adapters, and files that it leaves beside them
RUN_ADAPTERS = ("best", "last")
_RUN_FILES = ("summary.json", "checkpoint.pt")


def find_adapter(folder: str | PathLike[str]) -> Path | None:
    """The adapter in a folder: itself, or the best one of a training run; None: neither.

    One of its two files is enough: what is missing or damaged is told by whoever reads it. A folder
    of tasks, of which one is called "best", is no training run.
    """
    place = Path(folder)
    if _has_any(place, _FILES):
        return place
    best = place / "best"
    return best if _has_any(best, _FILES) and not _holds_tasks(place) else None


def _holds_tasks(folder: Path) -> bool:
    """Whether adapters lie in it that are none of a training run's."""
    if _has_any(folder, _RUN_FILES):
        return False
    return any(name not in RUN_ADAPTERS for name in adapters_of(folder))


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    # os.path: a folder that may not be looked into holds nothing, and is no error
    return any(os.path.isfile(folder / name) for name in names)


def adapters_of(directory: Path) -> dict[str, Path]:
    """The adapters in a directory's sub-folders, by the sub-folders' names, sorted."""
    places = (p for p in sorted(directory.iterdir()) if p.is_dir() and not p.name.startswith("."))
    return {p.name: adapter for p in places if (adapter := find_adapter(p))}


def fetch_adapter(directory_or_repo_id: str | PathLike[str]) -> Path:
    """The directory of an adapter; a repository's two files are fetched into the hub's cache.

    Args:
        directory_or_repo_id: a path, or "OWNER/NAME" or "OWNER/NAME@REVISION"; a path of that name
            comes first, whatever is in it.

    Raises:
        HubError: the hub cannot be reached or the repository is no adapter's.
    """
    folder, name = Path(directory_or_repo_id), str(directory_or_repo_id)
    if folder.exists() or not hub.is_repo_id(name):
        return folder
    try:
        found = [hub.download(name, file) for file in _FILES]
    except hub.HubError as error:
        raise hub.HubError(f"there is no folder {name}, and on the hub, {error}") from error
    for path, file in zip(found, _FILES, strict=True):
        if path is None:
            raise hub.HubError(f"{name}: the repository has no {file}, so it is no adapter's")
    assert found[0] is not None
    return found[0].parent


def task_name(place: str | PathLike[str]) -> str:
    """What a task is called by its place: the folder's name, of ``runs/pets/best`` the run's, of
    "OWNER/NAME@REVISION" the repository's."""
    if hub.is_repo_id(str(place)) and not Path(place).exists():
        return hub.split_revision(str(place))[0].rpartition("/")[2]
    resolved = Path(place).resolve()
    return resolved.parent.name if resolved.name == "best" else resolved.name
