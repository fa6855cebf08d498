"""What a device has to offer for a backend's kernels: its code and its memory.

``dispatch`` asks ``missing`` and ``limit`` before anything runs, so what is said here is what a
user, ``explain()`` and a benchmark read. Limits that no device changes are in an op's own row.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Mapping

import torch

from .. import _cuda_archs, _native

_MAX_ROWS = 2**31 - 1  # of a batch's queries together


def stem(op: str) -> str:
    """The op in whose files a backward or a ragged form stands."""
    return op.removesuffix("_backward").removesuffix("_ragged")


def missing(backend: str, device: torch.device) -> str | None:
    """Why no kernel of ``backend`` runs on this CUDA device; None where they run.

    A machine may hold GPUs of several kinds: cuda:1 may run what cuda:0 does not. Without an index
    the answer is about torch's current device.
    """
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    index = _index(device)
    if backend == "cuda":
        return _native.cuda_missing or _cuda_archs.missing_code(built_archs(), _capability(index))
    if _capability(index) < _cuda_archs.OLDEST:
        major, minor = _capability(index)
        return (
            "the Triton kernels need compute capability 8.0 or later, "
            f"{_name(index)} has {major}.{minor}"
        )
    return None


def kind(device: torch.device) -> str:
    """What a shipped preference is for: a device's type or, of a GPU that is here, "sm_90"."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    index = _index(device)
    return "sm_{}{}".format(*_capability(index))


@functools.cache
def launcher_missing() -> str | None:
    """Why Triton cannot compile what launches its kernels from Python; None where it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler at first use: install gcc or set CC"
    headers = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(headers, "Python.h")):
        return f"Triton needs Python's headers at first use, and Python.h is not in {headers}"
    return None


def built_archs() -> list[_cuda_archs.Arch]:
    """The architectures whose code is in the CUDA library."""
    return _cuda_archs.parse(_native.build_info().get("cuda_arch") or "")[0]


def limit(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]
) -> str | None:
    """Which of a problem's sizes a device does not take; None where it takes all.

    See ``dispatch.limit``. Of the sizes, "head_width" and "rows" (B * Q queries) count here.
    """
    if stem(op) != "prompt_attention":
        return None
    if sizes.get("rows", 0) > _MAX_ROWS:
        return f"its kernels count B * Q queries in 32 bits, got {sizes['rows']}"
    width = sizes.get("head_width", 0)
    if backend == "cuda" and width and device.type == "cuda":
        # a training step must not get as far as its backward and fail there
        needed = attention_shared_bytes(width, dtype, backward=True)
        offered = shared_bytes(device)
        if needed > offered:
            return (
                f"its kernels need {needed // 1024} KiB of shared memory for head width "
                f"{width} in {dtype}, {_name(device.index or 0)} offers {offered // 1024}"
            )
    return None


def attention_shared_bytes(width: int, dtype: torch.dtype, backward: bool) -> int:
    """Shared memory of the largest block of csrc/cuda/prompt_attention.cu, in bytes."""
    padded, rows, keys, size = -(-width // 32) * 32, 64, 64, dtype.itemsize
    stride = padded + 16 // size  # elements of a tile's row
    scratch = rows * (keys + 16 // size) if size == 4 else 0
    if not backward:
        return ((rows + 2 * keys) * stride + scratch) * size
    grad_query = (2 * (rows + keys) * stride + scratch) * size + rows * 4
    grad_keys = (4 * keys * stride + scratch) * size + 2 * keys * 4
    return max(grad_query, grad_keys)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may ask for on this device, in bytes."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)
