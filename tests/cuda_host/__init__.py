"""Compiles csrc/cuda for the host (see cuda_host.h) and calls its launchers through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc/cuda"
A100_SHARED_BYTES = 163 * 1024
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def cuda_include() -> Path | None:
    """Headers of the CUDA toolkit, or of the runtime that comes with pip's torch."""
    site = Path(sysconfig.get_path("platlib"))
    places = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
        *sorted(site.glob("nvidia/*/include")),
    ]
    return next((p for p in places if (p / "cuda_bf16.h").is_file()), None)


def missing() -> str | None:
    """Why the kernels cannot be run on this host; None where they can."""
    if shutil.which("g++") is None:
        return "needs g++"
    return None if cuda_include() else "needs the CUDA headers"


class Kernels:
    """The launchers of one host-compiled library."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def launch(self, op: str, args: Arguments, dtype: torch.dtype, seed: int = 0) -> None:
        """Run a launcher; the fibers of each block run in the order that ``seed`` shuffles."""
        self.library.set_seed(seed)
        error = getattr(self.library, op)(ctypes.byref(args), NUMBERS[dtype])
        assert error == 0, f"{op} returned CUDA error {error}"

    def shared_bytes(self, op: str, args: Arguments, dtype: torch.dtype, limit: int) -> int | None:
        """What a launch's largest block asks for, in bytes; None where ``limit`` refuses it."""
        self.library.largest_request.restype = ctypes.c_int64
        self.library.set_shared_limit(ctypes.c_int64(limit))
        try:
            refused = getattr(self.library, op)(ctypes.byref(args), NUMBERS[dtype]) != 0
            return None if refused else self.library.largest_request()
        finally:
            self.library.set_shared_limit(ctypes.c_int64(A100_SHARED_BYTES))

    def launch_with_scratch(self, op: str, args: Arguments, dtype: torch.dtype) -> None:
        """Run a launcher that names the bytes of scratch it needs and refuses with 0."""
        needed = getattr(self.library, f"{op}_scratch")
        needed.restype = ctypes.c_int64
        size = needed(ctypes.byref(args), NUMBERS[dtype])
        assert size > 0, f"{op} refuses these arguments"
        scratch = torch.full((size,), 255, dtype=torch.uint8)
        pointer = ctypes.c_void_p(scratch.data_ptr())
        error = getattr(self.library, op)(ctypes.byref(args), NUMBERS[dtype], pointer)
        assert error == 0, f"{op} returned CUDA error {error}"


def build(source: Path = CUDA, mix_prompts_only: bool = False) -> Kernels:
    """The library of host-compiled kernels; cached by the content of all its sources.

    ``mix_prompts_only`` leaves the other ops' files out, which is sooner compiled.
    """
    files = sorted([*source.iterdir(), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file()))
    digest.update(bytes([mix_prompts_only]))
    cache = Path(tempfile.gettempdir()) / f"pgn_fast_cuda_host_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DPGN_FAST_CUDA_HOST"]
        command += [f"-I{HERE}", f"-I{source}", f"-isystem{cuda_include()}"]
        kernels = [str(p) for p in sorted(source.glob("*.cu"))]
        if mix_prompts_only:
            kernels = [str(source / "mix_prompts.cu"), "-DPGN_FAST_MIX_PROMPTS_ONLY"]
        command += ["-x", "c++", str(HERE / "entry.cpp"), *kernels, "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(library)
    return Kernels(ctypes.CDLL(str(library)))


def layout_assertions() -> str:
    """A C++ file that compiles only where the structs below lie in memory as launch.h's do."""
    structs = [Heads, *Arguments.__subclasses__()]
    lines = ["#include <cstddef>", '#include "launch.h"', "using namespace pgn_fast::cuda;"]
    for struct in structs:
        name = struct.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            lines.append(f"static_assert(offsetof({name}, {field}) == {at.offset});")
            lines.append(f"static_assert(sizeof({name}::{field}) == {at.size});")
    return "\n".join(lines) + "\n"


class Arguments(ctypes.Structure):
    """A launcher's argument struct filled from tensors and numbers, which it keeps alive."""

    def __init__(self, **values: Any):
        plain = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
        super().__init__(**plain)
        self.tensors = values


pointer, long, integer, boolean, single = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_bool,
    ctypes.c_float,
)


class MixPrompts(Arguments):
    _fields_ = (
        *((name, pointer) for name in ("logits", "library", "prompts")),
        ("R", long),
        *((name, integer) for name in ("K", "D", "P")),
        ("tokens", long),
        ("softmax", boolean),
    )


class MixPromptsBackward(Arguments):
    _fields_ = (
        *((name, pointer) for name in ("grad_prompts", "logits", "library", "grad_logits")),
        *((name, pointer) for name in ("grad_library", "statistics", "partial")),
        *((name, long) for name in ("R", "rows_per_split")),
        *((name, integer) for name in ("K", "D", "splits")),
        ("softmax", boolean),
    )


class PatchEmbed(Arguments):
    _fields_ = (
        *((name, pointer) for name in ("images", "weight", "bias", "pos", "out")),
        *((name, long) for name in ("stride_b", "stride_c", "stride_y", "stride_x")),
        *((name, integer) for name in ("B", "C", "H", "W", "p_h", "p_w", "D", "tokens", "first")),
        *((name, boolean) for name in ("uint8", "normalize")),
        *((name, single * 64) for name in ("scale", "shift")),
    )


class PlaceRows(Arguments):
    _fields_ = (
        *((name, pointer) for name in ("rows", "out")),
        ("batch_stride", long),
        *((name, integer) for name in ("B", "count", "D", "tokens", "first")),
    )


class Heads(ctypes.Structure):
    """A (B, h, T, d) tensor, or (h, P, d) shared by the batch, by its element strides."""

    _fields_ = (("data", pointer), ("batch", long), ("head", long), ("token", long))

    def __init__(self, x: Tensor | None = None):
        if x is None:
            super().__init__()
        else:
            strides = x.stride() if x.ndim == 4 else (0, *x.stride())
            assert strides[-1] == 1
            super().__init__(x.data_ptr(), *strides[:-1])
        self.tensor = x


class PromptAttention(Arguments):
    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "prompt_k", "prompt_v", "out")),
        ("lse", pointer),
        *((name, integer) for name in ("B", "h", "Q", "T", "P", "d")),
        ("scale", single),
        ("ranges", pointer),
    )


class PromptAttentionBackward(Arguments):
    _fields_ = (
        ("forward", PromptAttention),
        *((name, Heads) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, Heads) for name in ("grad_prompt_k", "grad_prompt_v")),
        *((name, pointer) for name in ("delta", "partial")),
        ("splits", integer),
        ("shared", boolean),
    )
