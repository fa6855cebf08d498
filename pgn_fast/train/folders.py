"""Folders as people have them: which files are images, which folders are splits, which classes.

A walk ends, reads each image once, and counts what it leaves out:

- files of other suffixes than those that are read (``pgn_fast.images.readable_suffixes``);
- hidden files and folders, and what operating systems leave behind (``__MACOSX``, ``Thumbs.db``);
- pipes, sockets and devices; broken links; links to what is read anyway or to a folder above.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..images import readable_suffixes

_LEFT_BEHIND = {
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
_SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
# words that a split's name may have beside: images_train, Test Set, train2017
_BESIDE = r"images?|imgs?|photos|pictures|data|dataset|set|split|(?:19|20)\d\d"


@dataclass(frozen=True)
class Found:
    """Images below some folders, in natural order, and how many other files there were, by kind."""

    paths: list[Path]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Classes:
    """A folder of class folders."""

    paths: list[Path]
    labels: list[int]
    names: list[str]
    skipped: Mapping[str, int]
    notes: tuple[str, ...]


def find_images(roots: Iterable[str | os.PathLike[str]]) -> Found:
    """Every image among these files and folders, once.

    A file that is named itself counts as an image, whatever its suffix.

    Raises:
        UserError: a path that does not exist, or a folder that cannot be opened.
    """
    walk = _Walk()
    for root in (os.fspath(root) for root in roots):
        if os.path.isdir(root):
            walk.folder(root, above=root)
        elif os.path.lexists(root):
            walk.named.append(root)
        else:
            raise UserError(f"no file or folder named {root}.")
    return walk.finish()


def find_classes(folder: Path) -> Classes:
    """Images by class: a class is a folder directly below ``folder``, at any depth its images.

    Raises:
        UserError: no image, images in no class folder, or a class folder without images.
    """
    found = find_images([folder])
    skipped = f" ({describe(found.skipped)})" if found.skipped else ""
    if not found.paths:
        raise UserError(f"data: no image in {folder}{skipped}.")
    inside = [path.relative_to(folder).parts for path in found.paths]
    stray = [parts[0] for parts in inside if len(parts) == 1]
    if stray:
        raise UserError(
            f"data: {len(stray)} image(s) lie directly in {folder}, in no class folder, such as "
            f"{stray[0]}. Put each image into a folder named after its class."
        )
    names = sorted((path.name for path in visible_folders(folder)), key=natural)
    index = {name: i for i, name in enumerate(names)}
    labels = [index[parts[0]] for parts in inside]
    empty = sorted(set(names) - {names[label] for label in labels}, key=natural)
    if empty:
        raise UserError(
            f"data: class folder {folder / empty[0]} has no image. Fill it or remove it{skipped}."
        )
    return Classes(found.paths, labels, names, found.skipped, _notes(names, found.skipped))


def split_folders(root: Path, strict: bool = True) -> dict[str, list[Path]]:
    """The folders below ``root`` whose names say that they are splits, by split.

    A folder so named that holds images and no folders, beside others that are no splits, is a
    class ("train" beside "bus" and "car"), and then nothing is a split.

    Args:
        strict: refuse what could be either; otherwise it is a split.

    Raises:
        UserError: it could be either.
    """
    folders = visible_folders(root)
    splits: dict[str, list[Path]] = {}
    for folder in folders:
        if name := split_name(folder.name):
            splits.setdefault(name, []).append(folder)
    named = [folder for group in splits.values() for folder in group]
    others = [folder for folder in folders if folder not in named]
    if not others:
        return splits
    if not any(visible_folders(folder) for folder in named):
        return {}
    if strict and len(named) == 1 and any(find_images([other]).paths for other in others):
        raise UserError(
            f"data: {named[0]} may be a split, or a class beside {others[0].name}. Name the "
            "training images by --train-split FOLDER (to score: --split FOLDER); a dot for the "
            "folder says that every folder in it is a class."
        )
    return splits


def split_name(folder: str) -> str | None:
    """ "train", "validation" or "test" where a folder's name says so, in any capitalization."""
    words = re.split(r"[\W_]+", folder.casefold())
    words = [re.sub(rf"(?<=.)(?:{_BESIDE})$", "", word) for word in words]
    words = [word for word in words if word and not re.fullmatch(_BESIDE, word)]
    if len(words) != 1:
        return None
    return next((split for split, names in _SPLITS.items() if words[0] in names), None)


def visible_folders(root: Path) -> list[Path]:
    """The folders directly below, linked ones among them, hidden ones not, in natural order."""
    with _opened(os.fspath(root)) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name)]
    return [root / name for name in sorted(names, key=natural)]


def describe(skipped: Mapping[str, int]) -> str:
    """One line: "73 files skipped: 38 .xyz, 35 .txt"."""
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    total = sum(skipped.values())
    return f"{total} file{'s' * (total != 1)} skipped: " + ", ".join(f"{n} {k}" for k, n in kinds)


def natural(text: str) -> tuple[list[str | int], str]:
    """Sorting key: "2.png" before "10.png", capitals like small letters."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def same_word(name: str) -> str:
    """Equal for names that look alike: capitals, and accents in either Unicode encoding."""
    return unicodedata.normalize("NFC", name).casefold()


def _notes(names: list[str], skipped: Mapping[str, int]) -> tuple[str, ...]:
    notes = [describe(skipped)] if skipped else []
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(same_word(name), name)
        if other != name:
            notes.append(f"class folders {other!r} and {name!r} look alike and are two classes")
    return tuple(notes)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def _opened(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be opened: {error.strerror}.") from error


class _Walk:
    """Real files first, then what links lead to, as far as it is not among them already."""

    def __init__(self) -> None:
        self.named: list[str] = []  # by the user, whatever they are
        self._paths: list[str] = []
        self._links: deque[tuple[str, frozenset[tuple[int, int]]]] = deque()
        self._real_folders: dict[str, str] = {}
        self._folders: set[tuple[int, int]] = set()
        self._skipped: Counter[str] = Counter()

    def folder(self, path: str, above: str | frozenset[tuple[int, int]]) -> None:
        """Collect the images below ``path``; ``above``: the walk's root, or its ancestors."""
        if isinstance(above, str):
            real = Path(os.path.realpath(above))
            above = frozenset(_identity(os.stat(parent)) for parent in real.parents)
        if not self._enter(path):
            return
        stack = [path]
        while stack:
            with _opened(stack.pop()) as entries:
                for entry in entries:
                    if _hidden(entry.name):
                        self._skipped["hidden"] += 1
                    elif entry.is_symlink():
                        self._links.append((entry.path, above))
                    elif entry.is_dir(follow_symlinks=False):
                        if self._enter(entry.path):
                            stack.append(entry.path)
                    else:
                        self._file(entry.path, entry.is_file(follow_symlinks=False))

    def finish(self) -> Found:
        """Follow the links, and put everything in order."""
        several = bool(self._links or self.named)
        taken = {self._place(path) for path in self._paths} if several else set()
        for path in self.named:
            if (place := os.path.realpath(path)) not in taken:
                taken.add(place)
                self._paths.append(path)
        self._links = deque(sorted(self._links, key=lambda link: natural(link[0])))
        while self._links:
            path, above = self._links.popleft()
            try:
                status = os.stat(path)
            except OSError:
                self._skipped["broken links"] += 1
                continue
            if not stat.S_ISDIR(status.st_mode):
                if (place := os.path.realpath(path)) in taken:
                    self._skipped["links to files that are read anyway"] += 1
                else:
                    taken.add(place)
                    self._file(path, stat.S_ISREG(status.st_mode))
            elif _identity(status) in self._folders or _identity(status) in above:
                self._skipped["links to folders above, or that are read anyway"] += 1
            else:
                before = len(self._paths)
                self.folder(path, above)
                fresh = self._paths[before:]
                self._paths[before:] = [p for p in fresh if self._place(p) not in taken]
                taken.update(map(self._place, fresh))
        paths = sorted(self._paths, key=natural)
        return Found([Path(path) for path in paths], dict(self._skipped))

    def _place(self, path: str) -> str:
        """Where a file that is no link itself really lies."""
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)

    def _enter(self, path: str) -> bool:
        """Whether a folder is new."""
        identity = _identity(os.stat(path))
        new = identity not in self._folders
        self._folders.add(identity)
        return new

    def _file(self, path: str, regular: bool) -> None:
        suffix = os.path.splitext(path)[1].lower()
        if not regular:
            self._skipped["no regular files"] += 1
        elif suffix in readable_suffixes():
            self._paths.append(path)
        else:
            self._skipped[suffix or "without a suffix"] += 1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
