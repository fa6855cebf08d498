"""Tensors that come out of files: what they may be, and ``torch.save``'s archives."""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import open_file
from .errors import UserError, brief, shown

# what the pickle inside an archive of tensors, numbers, strings, lists and dicts refers to
_PLAIN = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {kind}Storage"
        for kind in (
            *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte"),
            "Bool",
        )
    ),
}
_RESAVE = "Save its tensors alone, as torch.save(state_dict, file) does, and pass that file"
MEGABYTE = 1 << 20
_DIGEST = 64  # hexadecimal digits of SHA-256


def seal_archive(data: bytes) -> bytes:
    """An archive of ``torch.save`` with a digest of all its bytes, as the archive's comment."""
    # the last two bytes of an archive without comment are the length of it, zero
    return data[:-2] + _seal(hashlib.sha256(data))


def _seal(digest: Any) -> bytes:
    return _DIGEST.to_bytes(2, "little") + digest.hexdigest().encode()


def read_archive(path: Path, *, largest_pickle: int = MEGABYTE, sealed: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors, on the CPU, in dicts and lists with numbers and strings.

    Nothing in the file is run. Its checksums are compared, which torch does not, and what it says
    about sizes is held against its own size before memory is taken.

    Args:
        path: the file.
        largest_pickle: bytes that the description of the objects may have, tensors' data apart.
        sealed: whether it must have the digest that ``seal_archive`` gives.

    Raises:
        UserError: the file is not there, no such archive, damaged, or holds other objects; the
            message names the file.
    """
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if sealed:
                _check_seal(file, size)
            comment = _DIGEST if sealed else 0
            _check_pickle(_described(file, size, comment, largest_pickle))
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            _check_sizes(content, size)
            return content
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        # torch and zipfile name damaged files by many exceptions, and torch's words advise to let
        # the file run code
        except (Exception, RecursionError) as error:
            kind = type(error).__name__
            raise UserError(f"{path} is damaged, or no checkpoint of torch.save ({kind}).") from (
                None if "weights_only" in str(error) else error
            )


def _check_seal(file: Any, size: int) -> None:
    found, left = hashlib.sha256(), size - _DIGEST - 2
    while left > 0 and (chunk := file.read(min(left, MEGABYTE))):
        found.update(chunk)
        left -= len(chunk)
    found.update(b"\0\0")
    if file.read() != _seal(found):
        raise UserError("it is damaged or truncated: its digest differs, or it has none")


def _described(file: Any, size: int, comment: int, largest_pickle: int) -> bytes:
    """The pickle inside an archive, whose records and checksums are right."""
    file.seek(0)
    start = file.read(4)
    if start != b"PK\x03\x04":
        raise UserError(
            f"no checkpoint that torch.save wrote: it begins with {shown(start)}. It may be an "
            "error page in the place of a download, or of a torch before 1.6; load and save it "
            "again there"
        )
    # one end of the archive, so that all who read it read the same records
    file.seek(max(0, size - 22 - comment))
    if file.read(4) != b"PK\x05\x06":
        raise UserError("the archive is truncated, or something follows it. Copy it again")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1 for r in records):
            raise UserError("its records are compressed or encrypted, which torch.save's are not")
        if sum(record.file_size for record in records) > size:
            raise UserError("its records claim more bytes than the file has")
        pickles = [r for r in records if r.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len({r.filename for r in records}) != len(records):
            raise UserError("no checkpoint that torch.save wrote: no data.pkl, or several")
        if pickles[0].file_size > largest_pickle:
            raise UserError(
                f"it describes its objects in {pickles[0].file_size} bytes, where "
                f"{largest_pickle} are enough for any state dict. {_RESAVE}"
            )
        if damaged := archive.testzip():
            raise UserError(
                f"{shown(damaged)} is damaged: its checksum differs. Copy or download it again"
            )
        return archive.read(pickles[0])


def _check_pickle(pickled: bytes) -> None:
    """Refuse a pickle that refers to anything but tensors and plain containers."""
    for operation, argument, _ in pickletools.genops(io.BytesIO(pickled)):
        if operation.name in ("GLOBAL", "INST") and argument not in _PLAIN:
            named = brief(str(argument).replace(" ", "."), 100)
            raise UserError(
                f"it holds a {named} beside its tensors, which is not loaded. {_RESAVE}"
            )
        if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            raise UserError(f"it holds objects that are no tensors. {_RESAVE}")


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            yield from _tensors(value)


def _check_sizes(content: Any, size: int) -> None:
    """A tensor may say that one number fills a gigabyte; it would, as soon as it is copied."""
    needed = 0
    for tensor in _tensors(content):
        check_kind("a tensor", tensor)
        needed += tensor.numel() * tensor.element_size()
    # tensors may share their data, but not without end
    if needed > 4 * size:
        raise UserError(f"its tensors would take {needed} bytes, the file has {size}")


def check_kind(name: str, tensor: Any) -> None:
    """Refuse what is no plain tensor with a number of its own for every place.

    Raises:
        UserError: names the tensor, and what it is.
    """
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise UserError(f"{name} is no tensor, it is {shown(tensor)}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{name} is {tensor.layout}, {tensor.dtype}: no plain tensor of numbers")
    if tensor.is_meta:
        raise UserError(f"{name} has a shape and no numbers (device meta)")
    needed = tensor.numel() * tensor.element_size()
    if needed > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{name} is expanded to {tuple(tensor.shape)} from fewer numbers. Save it contiguous"
        )


def check_numbers(tensors: Mapping[str, Tensor], unchecked: frozenset[str] = frozenset()) -> None:
    """Refuse numbers that no training that went well leaves: NaN, infinities, and variances of
    batch norm below zero.

    Args:
        unchecked: names that may hold infinities, as masks do; NaN is refused there too.

    Raises:
        ValueError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        bad = tensor.isnan() if name in unchecked else ~tensor.isfinite()
        if count := int(bad.sum()):
            raise ValueError(f"{shown(name)} has {count} values that are not finite")
        if name.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:
            raise ValueError(f"{shown(name)} is a variance and has values below zero")


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Hold names, shapes and kinds of stored tensors against those that a model has.

    Args:
        expected, found: by name, with ``shape`` and ``dtype``; floating-point numbers of another
            precision fit.

    Raises:
        ValueError: names some of the tensors that are missing, unknown, or do not fit.
    """
    problems = [f"missing: {shown(name)}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown: {shown(name)}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        wanted, there = expected[name], found[name]
        if tuple(wanted.shape) != tuple(there.shape):
            problems.append(f"{name} is {list(there.shape)}, not {list(wanted.shape)}")
        elif wanted.dtype != there.dtype and not (
            wanted.dtype.is_floating_point and there.dtype.is_floating_point
        ):
            problems.append(f"{name} is {there.dtype}, not {wanted.dtype}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"tensors do not fit: {'; '.join(problems[:5])}{more}")


def plain_name(name: str) -> str:
    """The name of a tensor without the parts that ``torch.compile`` puts in."""
    return name.replace("_orig_mod.", "")
