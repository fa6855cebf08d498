"""Where a data set's files are: a folder, or a zip file that is read as it is."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image

from ..._files import open_file
from ...errors import UserError
from ...images import UnreadableImage, read_image
from ..split import FolderImages, Images

# more than any list of images; a larger member of a zip file is a bomb
_LARGEST_FILE = 512 << 20
_open: dict[tuple[int, str], zipfile.ZipFile] = {}


class Place(Protocol):
    """Files below one root, by their names with slashes."""

    @property
    def title(self) -> str:
        """What messages call it."""

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""

    def text(self, name: str) -> str:
        """A text file's content, without a byte order mark. Raises UserError: not readable."""

    def images(self, names: Sequence[str], labels: Sequence[int]) -> Images:
        """The images of these names, which ``inside`` has made."""


@dataclass(frozen=True)
class Folder:
    """A folder on the disk."""

    root: Path

    @property
    def title(self) -> str:
        return f"folder {self.root}"

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def text(self, name: str) -> str:
        with open_file(self.root / name) as file:
            return _decoded(file.read(_LARGEST_FILE), f"{self.root / name}")

    def images(self, names: Sequence[str], labels: Sequence[int]) -> Images:
        return FolderImages([self.root / name for name in names], list(labels))


@dataclass(frozen=True)
class Zip:
    """A zip file; ``prefix`` is the folder inside of it that counts as the root, with a slash."""

    path: Path
    prefix: str

    @property
    def title(self) -> str:
        return f"{self.path}{f' ({self.prefix})' if self.prefix else ''}"

    def has(self, name: str) -> bool:
        wanted = f"{self.prefix}{name}"
        names = _archive(self.path).NameToInfo
        return wanted in names or any(n.startswith(f"{wanted.rstrip('/')}/") for n in names)

    def text(self, name: str) -> str:
        return _decoded(_member(self.path, f"{self.prefix}{name}"), f"{name} in {self.path}")

    def images(self, names: Sequence[str], labels: Sequence[int]) -> Images:
        members = tuple(f"{self.prefix}{name}" for name in names)
        return ZipImages(self.path, members, list(labels))


@dataclass(frozen=True)
class ZipImages:
    """Image files inside of a zip file; each process opens it for itself."""

    path: Path
    members: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.members)

    def open(self, index: int) -> tuple[Image.Image, int]:
        try:
            data = _member(self.path, self.members[index])
        except UserError as error:
            raise UnreadableImage(str(error)) from error
        return read_image(data), self.labels[index]

    def name(self, index: int) -> str:
        return f"{self.path}: {self.members[index]}"


def find_place(
    root: Path, folders: Sequence[str], marker: str, *, named: bool = False
) -> Place | None:
    """The first folder or zip file among ``root`` and ``root/NAME`` that holds ``marker``.

    Args:
        root: what the user gave: the data set's own folder, the one above, or a zip file.
        folders: names of the data set's own folder.
        marker: a file or folder in it, by which it is known.
        named: other data sets have such a file, too, so that ``root`` itself counts only where it
            has one of these names.
    """
    own = not named or is_called(root, folders)
    for place in [*([root] if own else []), *(root / name for name in folders)]:
        if place.is_dir() and (place / marker).exists():
            return Folder(place)
    for path in [root] if root.is_file() else [root / f"{name}.zip" for name in folders]:
        if path.is_file() and (found := _in_zip(path, folders, marker, named)):
            return found
    return None


def is_called(path: Path, folders: Sequence[str]) -> bool:
    """Whether a folder or a zip file has one of these names."""
    name = Path(os.path.abspath(path)).name
    return name.removesuffix(".zip").casefold() in {f.casefold() for f in folders}


def _in_zip(path: Path, folders: Sequence[str], marker: str, named: bool) -> Zip | None:
    names = _archive(path).NameToInfo
    # a marker that is a folder may have no entry of its own
    roots = {name.partition(f"{marker}/")[0] for name in names if f"/{marker}/" in f"/{name}"}
    roots |= {name.removesuffix(marker) for name in names if f"/{name}".endswith(f"/{marker}")}
    # an archive of several data sets: the one of the right name
    right = [root for root in roots if root and is_called(Path(root), folders)]
    alone = len(roots) == 1 and (not named or is_called(path, folders))
    chosen = right or (list(roots) if alone or not named else [])
    if not chosen:
        return None
    return Zip(path, min(chosen, key=lambda root: (root.count("/"), root)))


def _archive(path: Path) -> zipfile.ZipFile:
    key = (os.getpid(), str(path))
    if key not in _open:
        try:
            _open[key] = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"data: {path} cannot be read as a zip file ({error}).") from error
    return _open[key]


def _member(path: Path, name: str) -> bytes:
    archive = _archive(path)
    try:
        info = archive.getinfo(name)
        if info.file_size > _LARGEST_FILE:
            raise UserError(f"data: {name} in {path} has {info.file_size} bytes unpacked.")
        return archive.read(info)
    except KeyError as error:
        raise UserError(f"data: {path} has no {name}.") from error
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"data: {name} in {path} cannot be unpacked ({error}).") from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {where} is not UTF-8 (byte {error.start}); save it as UTF-8."
        ) from error


def inside(name: str, where: str) -> str:
    """A name from a list, as a path below its root: other systems' slashes become one's own.

    Raises:
        UserError: it leads out of the root.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"data: {name!r} in {where} leads out of its folder.")
    return str(path)
