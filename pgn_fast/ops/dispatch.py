"""Which backend runs an op: what is installed, what each accepts, and the measured preference."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import onednn

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Which backends to try first, by op and device; the first that accepts the inputs runs, and the
# reference stands behind every list. An order here is data: bench/results holds the runs behind
# it, and an op is listed only where it beats plain torch there. CUDA devices have no entry yet: no
# kernel has been measured on one.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "add_layer_norm": {"cpu": ("cpu",)},
    "frozen_linear": {"cpu": ("cpu",)},
    "mix_prompts": {"cpu": ("cpu",)},
    "prompted_patch_embed": {"cpu": ("cpu",)},
    "prompt_attention": {"cpu": ("cpu",)},
    "feedback_round": {"cpu": ("cpu",)},
}

# Ops whose gradient is left to torch's own autograd on these devices unless a backend is named: the
# kernels win there, but a Python autograd function costs more than they win.
TRAINED_IN_PLAIN_TORCH: dict[str, tuple[str, ...]] = {"mix_prompts": ("cpu",)}

# Devices on which prompt_attention without any prompts beats torch's own attention.
BEATS_PLAIN_ATTENTION = ("cpu",)

HALF_OR_FLOAT = (torch.float32, torch.float16, torch.bfloat16)

# ops whose dtypes are fewer: torch's own product takes half precision to oneDNN already
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"frozen_linear": (torch.float32,)}

# kernels that a library of torch's brings along: (backend, op) -> the module that calls it
_BROUGHT_ALONG = {("cpu", "frozen_linear"): onednn}


@functools.cache
def _missing(backend: str) -> str | None:
    """Why a backend is not there on this machine at all; None where it is."""
    if backend == "cpu":
        return _native.cpu_missing
    if backend == "cuda":
        return _native.cuda_missing or _cuda_device_missing()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _cuda_device_missing() -> str | None:
    """Why the CUDA kernels of this build run on no device here; None where they run."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    major, minor = torch.cuda.get_device_capability()
    archs = (_native.build_info().get("cuda_arch") or "").split()
    for arch in archs:
        number, _, real = arch.partition("-")
        built_major, built_minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
        if number.endswith("a"):  # runs on this one architecture
            fits = (major, minor) == (built_major, built_minor)
        elif real:  # machine code runs on later devices of its own major version
            fits = major == built_major and minor >= built_minor
        else:  # PTX is compiled for any later device
            fits = (major, minor) >= (built_major, built_minor)
        if fits:
            return None
    return (
        f"the CUDA kernels were built for {', '.join(archs)}, this device is sm_{major}{minor}; "
        f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _interpreted() -> bool:
    """Triton's interpreter runs the kernels on CPU tensors (a debugging aid, slow)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(backend: str, op: str, *tensors: Tensor | None) -> str | None:
    """Why ``backend`` cannot run ``op`` on these tensors; None where it can.

    The sentence is the one that a user reads in the error of a named backend.
    """
    present = [t for t in tensors if t is not None]
    return _refusal(backend, op, present[0].device.type, tuple(t.dtype for t in present))


@functools.cache
def _refusal(backend: str, op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    prefix = f"{op}: backend={backend!r} cannot run: "
    if backend not in BACKENDS:
        return f"{op}: no backend named {backend!r}; known: {', '.join(BACKENDS)}."
    if backend == "reference":
        return None
    library = _BROUGHT_ALONG.get((backend, op))
    if reason := library.missing() if library else _missing(backend):
        return f"{prefix}{reason}. Leave backend=None to use the fastest one that can."
    if not _has_kernel(backend, op):
        return f"{prefix}it has no kernel of this op. Leave backend=None to use one that has."
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device != wanted and not (backend == "triton" and _interpreted()):
        return (
            f"{prefix}its kernels run on {wanted} tensors, these are on {device}. "
            "Leave backend=None to use the fastest one that can."
        )
    taken = _DTYPES.get(op, HALF_OR_FLOAT)
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in taken:
            return (
                f"{prefix}its kernels take {', '.join(map(str, taken))}, got {dtype}. "
                "Leave backend=None to run it in plain torch."
            )
    return None


@functools.cache
def _has_kernel(backend: str, op: str) -> bool:
    if (backend, op) in _BROUGHT_ALONG:
        return True
    if backend == "triton":
        found = importlib.util.find_spec(_triton_name(op)) is not None
        return found and hasattr(importlib.import_module(_triton_name(op)), op)
    name = f"pgn_fast_C::{op}"
    return torch._C._dispatch_has_kernel(name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, backend.upper())
    )


def _triton_name(op: str) -> str:
    return f"pgn_fast.kernels.{op.removesuffix('_backward')}"


@functools.cache
def _kernel(backend: str, op: str) -> Callable[..., Any]:
    if backend == "reference":
        from .. import reference

        return getattr(reference, op)
    if library := _BROUGHT_ALONG.get((backend, op)):
        return getattr(library, op)
    if backend == "triton":
        return getattr(importlib.import_module(_triton_name(op)), op)
    return getattr(torch.ops.pgn_fast_C, op).default


def select_kernel(op: str, backend: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function that runs ``op`` on these tensors.

    Args:
        op: the op's name; a backward is found under its forward's preference.
        backend: a backend's name, or "auto" for the fastest that accepts the inputs.
        tensors: the op's tensor arguments, the first of them on the device that counts.

    Raises:
        RuntimeError: the named backend cannot run these inputs; the message says why.
    """
    present = [t for t in tensors if t is not None]
    return _select(op, backend, present[0].device.type, tuple(t.dtype for t in present))


@functools.cache
def _select(
    op: str, backend: str, device: str, dtypes: tuple[torch.dtype, ...]
) -> Callable[..., Any]:
    if backend != "auto":
        if reason := _refusal(backend, op, device, dtypes):
            raise RuntimeError(reason)
        return _kernel(backend, op)
    for candidate in PREFERENCE[op.removesuffix("_backward")].get(device, ()):
        if _refusal(candidate, op, device, dtypes) is None:
            return _kernel(candidate, op)
    return _kernel("reference", op)


def trains_in_plain_torch(op: str, *tensors: Tensor) -> bool:
    """Whether these tensors need a gradient that TRAINED_IN_PLAIN_TORCH leaves to torch."""
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and tensors[0].device.type in TRAINED_IN_PLAIN_TORCH.get(op, ())
    )


def backends() -> dict[str, str]:
    """What this installation can run, one sentence for each backend.

    Returns:
        ``{"reference": "available", "cpu": "available (avx512)", "triton": "...", "cuda": "..."}``;
        a missing backend's sentence says why it is missing.
    """
    report = {"reference": "available (plain torch, any device and dtype)"}
    info = _native.build_info()
    for backend in BACKENDS[1:]:
        reason = _missing(backend)
        if reason is None and backend == "triton" and not torch.cuda.is_available():
            reason = None if _interpreted() else "no CUDA device is visible to torch"
        detail = {
            "cpu": info.get("cpu_isa"),
            "cuda": f"built with CUDA {info.get('cuda')} for {info.get('cuda_arch')}",
            "triton": "interpreted" if _interpreted() else "compiled at first use",
        }[backend]
        report[backend] = f"available ({detail})" if reason is None else f"missing: {reason}"
    return report
