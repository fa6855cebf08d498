"""Which backend runs an op: what is installed, what each accepts, and the measured preference.

``resolve`` is the one place that decides. The ops, the engine, ``explain()`` and the benchmarks ask
it; what a device and its sizes allow is in ``devices``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import devices, measured

BACKENDS = ("reference", "cpu", "triton", "cuda")

HALF = (torch.float16, torch.bfloat16)
HALF_OR_FLOAT = (torch.float32, *HALF)


@dataclass(frozen=True)
class OpRow:
    """What is known of one op; its own file says it, to ``register_op``.

    Attributes:
        examples: calls of the public function at a model's sizes, see ``examples.py``.
        preference: by ``devices.kind``, the backends to try first; the first that accepts the
            inputs runs, and the reference comes after all. An order is data: bench/results holds
            the runs that justify it, and a backend is listed only where it beats eager PyTorch. Of
            GPUs an H200 alone has been measured, in half precision.
        dtypes: what the kernels take.
        largest: by backend, the largest size of each name that its kernels hold, of those that the
            op gives ``select_kernel``. Limits that depend on the device are in ``devices``.
        trains_in_torch: device types on which the gradient is left to torch's own autograd unless a
            backend is named: the kernels win there, but an autograd function in Python costs more
            than they win.
        bundled: backends whose kernel comes with torch, and the module that calls it.
        timed: whether ``pgn-fast autotune`` and the GPU script verify and time it by its examples;
            not where correct backends may differ by more than rounding, or none is to choose.
        eager: what a user without this library would write, where that is faster than the
            reference; it takes an example's arguments.
    """

    examples: Callable[[Any, Any], Iterator[dict[str, Any]]]
    preference: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = HALF_OR_FLOAT
    largest: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trains_in_torch: tuple[str, ...] = ()
    bundled: Mapping[str, ModuleType] = field(default_factory=dict)
    timed: bool = True
    eager: Callable[..., Any] | None = None


OPS: dict[str, OpRow] = {}  # by name, filled by register_op as pgn_fast.ops is imported

# Devices on which prompt_attention without any prompts beats torch's own attention.
PREFER_OVER_SDPA = ("cpu",)

_SizeItems = tuple[tuple[str, int], ...]  # a mapping's items: hashable


def row(op: str) -> OpRow:
    """The row of an op; a backward has that of its forward."""
    return OPS[op.removesuffix("_backward")]


def _missing(backend: str) -> str | None:
    """Why a backend is not there on this machine at all; None where it is."""
    if backend == "cpu":
        return _native.cpu_missing
    if backend == "cuda":
        return _native.cuda_missing or devices.missing("cuda", torch.device("cuda"))
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None if _interpreted() else devices.missing("triton", torch.device("cuda"))
    return None


def _interpreted() -> bool:
    """Triton's interpreter runs the kernels on CPU tensors (a debugging aid, slow)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result  # a compiler would trace the search into files
def resolve(
    op: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    sizes: Mapping[str, int] | None = None,
    requested: str | None = None,
) -> tuple[str, str | None]:
    """Which backend runs an op, and why not the one that was asked for.

    Args:
        op: the op's name; a backward is decided like its forward.
        device: of the tensors.
        dtypes: of the tensors, the first of them the one that counts for a kernel's memory.
        sizes: those of ``limit`` that are known; none of the others is checked.
        requested: a backend's name; None: the fastest.

    Returns:
        A backend's name and a reason. A requested backend that can run comes with None. One that
        cannot run comes as the fastest that can, and the reason is the sentence that an op raises.
        Without a request, the reason says why a preferred backend does not run, or that none is
        preferred there; it is None where the most preferred one runs.
    """
    return _resolve(op, device, dtypes, tuple((sizes or {}).items()), requested)


@functools.lru_cache(maxsize=4096)
def _resolve(
    op: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    sizes: _SizeItems,
    requested: str | None,
) -> tuple[str, str | None]:
    reason = None
    if requested is not None:
        reason = _unsupported_reason(requested, op, device, dtypes, sizes)
        if reason is None:
            return requested, None
    preferred = measured.preference(op, device, dtypes[0])
    if preferred is None:
        preferred = shipped_preference(op, device, dtypes[0])
    for name in preferred:
        refused = _unsupported_reason(name, op, device, dtypes, sizes)
        if refused is None and name == "triton" and not _interpreted():
            # named, it may still find every launcher in its cache
            refused = devices.launcher_missing()
        if refused is None:
            return name, reason
        reason = reason or refused
    return "reference", reason or f"{op}: no backend is faster than eager PyTorch on {device.type}"


def shipped_preference(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that this package tries first where nothing has been measured, see ``OpRow``."""
    if device.type == "cuda" and dtype not in HALF:
        return ()
    return row(op).preference.get(devices.kind(device), ())


def unsupported_reason(
    backend: str, op: str, *tensors: Tensor | None, sizes: Mapping[str, int] | None = None
) -> str | None:
    """Why ``backend`` cannot run ``op`` on these tensors; None where it can. See ``resolve``."""
    present = [t for t in tensors if t is not None]
    return resolve(op, present[0].device, tuple(t.dtype for t in present), sizes, backend)[1]


def _unsupported_reason(
    backend: str, op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: _SizeItems
) -> str | None:
    prefix = f"{op}: backend={backend!r} cannot run: "
    if backend not in BACKENDS:
        return f"{op}: no backend named {backend!r}; known: {', '.join(BACKENDS)}."
    if backend == "reference":
        return None
    bundled = row(op).bundled.get(backend)
    if reason := bundled.missing() if bundled else _missing(backend):
        return f"{prefix}{reason}. Leave backend=None to use the fastest one that can."
    if not has_kernel(backend, op):
        return f"{prefix}it has no kernel of this op. Leave backend=None to use one that has."
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device.type == "cuda" and wanted == "cuda" and (reason := devices.missing(backend, device)):
        return f"{prefix}{reason}. Leave backend=None to use the fastest one that can."
    if device.type != wanted and not (backend == "triton" and _interpreted()):
        return (
            f"{prefix}its kernels run on {wanted} tensors, these are on {device.type}. "
            "Leave backend=None to use the fastest one that can."
        )
    taken = row(op).dtypes
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in taken:
            return (
                f"{prefix}its kernels take {', '.join(map(str, taken))}, got {dtype}. "
                "Leave backend=None to run it in eager PyTorch."
            )
    if reason := limit(backend, op, device, dtypes[0], dict(sizes)):
        return f"{prefix}{reason}. Leave backend=None to run it in eager PyTorch."
    if reason := measured.barred(backend, op, device, dtypes[0]):
        return f"{prefix}{reason}. Leave backend=None to use the fastest one that can."
    return None


def limit(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]
) -> str | None:
    """Which of a problem's sizes the kernels of ``backend`` do not take; None where they take all.

    Args:
        backend: "cpu", "triton" or "cuda".
        op: the op's name, with or without "_backward".
        device: the tensors' device.
        dtype: of the op's operands.
        sizes: what is known of the sizes in the row's ``largest`` and in ``devices.limit``.
    """
    for name, largest in row(op).largest.get(backend, {}).items():
        if sizes.get(name, 0) > largest:
            said = name.replace("_", " ").removesuffix("s") + "s"
            return f"its kernels take {said} up to {largest}, got {sizes[name]}"
    return devices.limit(backend, op, device, dtype, sizes)


@functools.cache
def has_kernel(backend: str, op: str) -> bool:
    """Whether a backend has a kernel of the op, on whatever device."""
    if backend in row(op).bundled:
        return True
    if backend == "triton":
        found = importlib.util.find_spec(_triton_name(op)) is not None
        return found and hasattr(importlib.import_module(_triton_name(op)), op)
    name = f"pgn_fast_C::{op}"
    return torch._C._dispatch_has_kernel(name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, backend.upper())
    )


def _triton_name(op: str) -> str:
    return f"pgn_fast.kernels.{devices.stem(op)}"


@functools.cache
def _kernel(backend: str, op: str) -> Callable[..., Any]:
    if backend == "reference":
        from .. import reference

        return getattr(reference, op)
    if bundled := row(op).bundled.get(backend):
        return getattr(bundled, op)
    if backend == "triton":
        module = importlib.import_module(_triton_name(op))
        if torch.cuda.is_available():
            tiles = measured.tiles(torch.device("cuda"))
            importlib.import_module("pgn_fast.kernels._common").use_tiles(tiles)
        return getattr(module, op)
    return getattr(torch.ops.pgn_fast_C, op).default


def select_kernel(
    op: str, backend: str, *tensors: Tensor | None, **sizes: int
) -> Callable[..., Any]:
    """The function that runs ``op`` on these tensors.

    Args:
        op: the op's name.
        backend: a backend's name, or "auto" for the fastest that accepts the inputs.
        tensors: the op's tensor arguments, the first of them on the device that counts.
        sizes: see ``resolve``.

    Raises:
        RuntimeError: the named backend cannot run these inputs; the message says why.
    """
    present = [t for t in tensors if t is not None]
    dtypes = tuple([t.dtype for t in present])
    return _select(op, backend, present[0].device, dtypes, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def _select(
    op: str, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: _SizeItems
) -> Callable[..., Any]:
    if backend == "auto":
        return _kernel(_resolve(op, device, dtypes, sizes, None)[0], op)
    name, reason = _resolve(op, device, dtypes, sizes, backend)
    if reason is not None:
        raise RuntimeError(reason)
    return _kernel(name, op)


def backends() -> dict[str, str]:
    """What this installation can run, one sentence for each backend.

    Returns:
        ``{"reference": "available", "cpu": "available (avx512)", "triton": "...", "cuda": "..."}``;
        a missing backend's sentence says why it is missing.
    """
    report = {"reference": "available (eager PyTorch, any device and dtype)"}
    info = _native.build_info()
    for backend in BACKENDS[1:]:
        reason = _missing(backend)
        detail = {
            "cpu": info.get("cpu_isa"),
            "cuda": f"built with CUDA {info.get('cuda')} for {info.get('cuda_arch')}",
            "triton": "interpreted" if _interpreted() else "compiled at first use",
        }[backend]
        report[backend] = f"available ({detail})" if reason is None else f"missing: {reason}"
    return report
