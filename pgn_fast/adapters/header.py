"""Reading safetensors files that strangers wrote: what is inside first, the numbers afterwards.

The header is held against the file before anything of its size is allocated, and tells names,
shapes and dtypes; whoever knows what they must be compares them before the numbers are read. Files
are written by the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .._files import open_file
from .._json import named_once
from ..errors import UserError, shown

LARGEST_CONFIG = 4 << 20  # bytes; class names of a hundred thousand classes
_LARGEST_HEADER = 12 << 20  # bytes: a configuration in it, escaped, and the tensors
_MOST_TENSORS = 16_384
_DEEPEST = 20  # lists and dictionaries inside of each other
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """One tensor as the header describes it; it stands at [begin, end) of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        entries: by the tensors' names; together they cover the data without gap or overlap.
        metadata: strings by name.
        start: bytes before the data.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int


def parse_json(data: bytes) -> Any:
    """The value that JSON text holds.

    Raises:
        ValueError: not JSON, an entry that stands there twice, NaN or an infinity, or nested too
            deep.
    """
    try:
        found = json.loads(data, object_pairs_hook=named_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level, depth = [found], 0
    while level := [
        inner
        for value in level
        if isinstance(value, dict | list)
        for inner in (value.values() if isinstance(value, dict) else value)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def read_header(file: BinaryIO, path: Path) -> Header:
    """What a safetensors file has inside.

    Raises:
        UserError: it is a pickle, truncated, or not a safetensors file; it names the path.
    """
    size = os.fstat(file.fileno()).st_size
    begin = file.read(9)
    # torch.save writes a zip archive or, in old versions, a bare pickle of protocol 2 or later. A
    # safetensors file may begin with the same byte: its first eight are the length of the header
    if begin[:4] == b"PK\x03\x04" or (begin[:1] == b"\x80" and begin[8:] != b"{"):
        raise UserError(
            f"{path} is a pickle (as torch.save writes), not safetensors. Loading it could run "
            "code, so it is refused; save the adapter with save_pretrained."
        )
    try:
        length = int.from_bytes(begin[:8], "little")
        if len(begin) < 9 or length > size - 8:
            raise ValueError("it ends before its header does")
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header has {length} bytes")
        file.seek(8)
        parsed = parse_json(file.read(length))
        if not isinstance(parsed, dict):
            raise ValueError(f"its header is {shown(parsed)}")
        metadata = parsed.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError(f"its metadata are {shown(metadata)}")
        if len(parsed) > _MOST_TENSORS:
            raise ValueError(f"it lists {len(parsed)} tensors")
        entries = {name: _entry(name, value) for name, value in parsed.items()}
        _check_cover(entries, size - 8 - length)
    except ValueError as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or save it again."
        ) from error
    return Header(entries, metadata, 8 + length)


def _entry(name: str, value: Any) -> Entry:
    whole = lambda v: type(v) is int and 0 <= v < 1 << 48
    if (
        len(name) > 500
        or not isinstance(value, dict)
        or set(value)
        != {
            "dtype",
            "shape",
            "data_offsets",
        }
    ):
        raise ValueError(f"{shown(name)} is described by {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(whole, shape)):
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
        raise ValueError(f"{shown(name)} has the offsets {shown(offsets)}")
    entry = Entry(_DTYPES[dtype], tuple(shape), *offsets)
    if math.prod(shape) * entry.dtype.itemsize != entry.end - entry.begin:
        raise ValueError(f"{shown(name)} has another number of bytes than its shape")
    return entry


def _check_cover(entries: Mapping[str, Entry], size: int) -> None:
    """The tensors stand one after the other: no gap, no overlap, nothing after the last."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise ValueError(f"{shown(name)} begins at {entry.begin}, the one before ends at {at}")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, the file holds {size}")


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """The tensors that the header lists, on the CPU. All of them stand in one piece of memory.

    Raises:
        ValueError: the file is shorter than it was when its header was read.
    """
    size = max((entry.end for entry in header.entries.values()), default=0)
    data = bytearray(size)
    file.seek(header.start)
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise ValueError("the file became shorter while it was read")
    tensors = {}
    for name, entry in header.entries.items():
        count = math.prod(entry.shape)
        if count == 0:
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
        elif entry.begin % entry.dtype.itemsize:
            # a file of other writers, whose numbers stand at odd places
            part = bytearray(data[entry.begin : entry.end])
            tensors[name] = torch.frombuffer(part, dtype=entry.dtype).view(entry.shape)
        else:
            whole = torch.frombuffer(data, dtype=entry.dtype, count=count, offset=entry.begin)
            tensors[name] = whole.view(entry.shape)
    return tensors


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration in a JSON file; None where there is no such file.

    Raises:
        UserError: not readable as JSON, too large, or no configuration; it names the path.
    """
    if not path.is_file():
        return None
    with open_file(path) as file:
        data = file.read(LARGEST_CONFIG + 1)
    return checked_config(data, str(path))


def checked_config(data: bytes, where: str) -> dict[str, Any]:
    """The configuration in JSON text; ``where`` begins the message of the UserError."""
    if len(data) > LARGEST_CONFIG:
        raise UserError(f"{where} has more than {LARGEST_CONFIG} bytes: no configuration.")
    try:
        config = parse_json(data)
    except ValueError as error:
        raise UserError(f"{where} is not readable JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{where} holds a {type(config).__name__}, not a configuration.")
    return config
