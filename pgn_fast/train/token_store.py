"""Rows of numbers on disk, found by what they were made from.

A folder holds ``tokens.bin``, rows of one shape and dtype, and ``index.bin``, a record of 32 bytes
for each: its key and a checksum. A row is written first and its record after it; what a kill, a
power cut or a full disk left unfinished has no record, or one whose checksum does not fit, and is
never read. Rows are only added, by whoever holds the folder's lock, and never written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import size_text, write_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RECORD = np.dtype([("key", "S16"), ("checksum", "S16")])
_LOCK, _TOKENS, _INDEX = "lock", "tokens.bin", "index.bin"
_PATIENCE = 0.1  # seconds between looks at a lock


class NoRoom(OSError):
    """The disk is too small for what was to be written."""


class TokenStore:
    """Rows of one shape that were made in one way; they have a folder of their own.

    Args:
        root: the folder of all stores.
        shape, dtype: of a row.
        about: how the rows are made from what their keys stand for; it names the folder.
    """

    def __init__(
        self,
        root: Path,
        shape: Sequence[int],
        dtype: torch.dtype,
        about: Mapping[str, Any],
    ) -> None:
        self._about = json.dumps(about, indent=1, sort_keys=True, default=str)
        self.folder = root / row_key(self._about).hex()
        self.shape, self.dtype = tuple(shape), dtype
        self.row_bytes = prod(shape) * dtype.itemsize
        self._places: dict[bytes, int] = {}  # key -> row
        self._looked_at = 0  # records
        # as bytes: NumPy has no bfloat16
        self._rows: np.ndarray | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def check_room(self, count: int) -> None:
        """Raises NoRoom: ``count`` more rows would not leave a twentieth of the free space free."""
        place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free, need = shutil.disk_usage(place).free, count * self.row_bytes
        if need > 0.95 * free:
            raise NoRoom(f"{size_text(need)} are needed in {place}, {size_text(free)} are free")

    def open(self) -> None:
        """Look at what is there, or has come since: rows whose record and checksum are whole.

        Raises:
            OSError: the folder cannot be read.
        """
        try:
            index = (self.folder / _INDEX).read_bytes()
            found = (self.folder / _TOKENS).stat().st_size // self.row_bytes
        except FileNotFoundError:
            return
        records = np.frombuffer(index[: len(index) - len(index) % _RECORD.itemsize], _RECORD)
        records = records[:found]
        if not len(records):
            return
        path = self.folder / _TOKENS
        self._rows = np.memmap(path, np.uint8, "r", shape=(found, self.row_bytes))
        for place in range(self._looked_at, len(records)):
            key, checksum = records[place].tolist()
            if checksum == _checksum(self._rows[place]):
                self._places[key] = place
        self._looked_at = len(records)

    @contextmanager
    def writing(self, waits: Callable[[], None]) -> Iterator[None]:
        """Inside, no one else adds rows, in this process or another.

        Args:
            waits: is called again and again while somebody else does; it may raise.

        Raises:
            OSError: the folder cannot be made, or its disk knows no locks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _lock(descriptor):
                waits()
                time.sleep(_PATIENCE)
            # for people
            write_files({self.folder / "about.json": self._about.encode()})
            yield
        finally:
            if fcntl is not None:
                # not left to close(): data-loading processes hold copies of the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Append rows (n, *shape); inside of ``writing``, after ``open``. ``open`` shows them.

        Raises:
            OSError: the disk is full, or the folder cannot be written; rows that were there stay.
        """
        plain = rows.detach().to("cpu", self.dtype).contiguous().view(torch.uint8)
        data = plain.reshape(len(keys), self.row_bytes).numpy()
        with (
            open(self.folder / _TOKENS, "ab") as tokens,
            open(self.folder / _INDEX, "ab") as index,
        ):
            # after the last whole record, whatever a killed writer left there
            count = index.tell() // _RECORD.itemsize
            index.truncate(count * _RECORD.itemsize)
            tokens.truncate(count * self.row_bytes)
            tokens.write(data.tobytes())
            tokens.flush()
            records = np.empty(len(keys), _RECORD)
            records["key"] = keys
            records["checksum"] = [_checksum(row) for row in data]
            index.write(records.tobytes())

    def read(self, keys: Iterable[bytes]) -> Tensor:
        """Rows (n, *shape) by their keys, which must be there."""
        places = [self._places[key] for key in keys]
        if not places:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        assert self._rows is not None
        data = torch.from_numpy(self._rows[places])
        return data.view(self.dtype).reshape(len(places), *self.shape)


def row_key(*parts: object) -> bytes:
    """16 bytes of SHA-256 of the parts' texts."""
    return _digest("\n".join(map(str, parts)).encode())


def _lock(descriptor: int) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _checksum(row: np.ndarray) -> bytes:
    return _digest(row)


def _digest(content: Any) -> bytes:
    """16 bytes, of which the last is not zero: NumPy strips zeros from byte strings."""
    found = hashlib.sha256(content).digest()
    return found[:15] + bytes([found[15] | 1])
