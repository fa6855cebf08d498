"""Compiles csrc/cuda for the host (see cuda_host.h) and calls its launchers through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
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


def build(source: Path = CUDA, only: str = "*") -> Kernels:
    """The library of host-compiled kernels; cached by the content of all its sources.

    ``only`` names the .cu file to compile, without the others sooner done.
    """
    files = sorted([*source.iterdir(), *HERE.iterdir()])
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file()))
    digest.update(only.encode())
    cache = Path(tempfile.gettempdir()) / f"pgn_fast_cuda_host_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        partial, entry = library.with_suffix(f".{os.getpid()}"), library.with_suffix(".cpp")
        kernels = sorted(source.glob(f"{only}.cu"))
        entry.write_text(entry_points("".join(p.read_text() for p in kernels)))
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DPGN_FAST_CUDA_HOST"]
        command += [f"-I{HERE}", f"-I{source}", f"-isystem{cuda_include()}"]
        command += ["-x", "c++", str(entry), *map(str, kernels), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(library)
    return Kernels(ctypes.CDLL(str(library)))


def entry_points(kernels: str) -> str:
    """C++ that puts every launcher of launch.h that is in this source behind a plain C function."""
    found = re.findall(
        r"(\w+) (\w+)\(const (\w+)& args, DType dtype((?:, void\* scratch)?)"
        r"((?:,\s+cudaStream_t stream)?)\);",
        HEADER,
    )
    lines = ['#include "controls.h"', 'extern "C" {']
    for returned, name, struct, scratch, stream in found:
        if re.search(rf"^\w+ {name}\(const {struct}&", kernels, flags=re.M):
            given = ", scratch" * bool(scratch) + ", nullptr" * bool(stream)
            lines += [
                f"{returned} {name}(const pgn_fast::cuda::{struct}* args, int dtype{scratch}) {{",
                "  const auto type = static_cast<pgn_fast::cuda::DType>(dtype);",
                f"  return pgn_fast::cuda::{name}(*args, type{given});",
                "}",
            ]
    return "\n".join([*lines, "}", ""])


def layout_assertions() -> str:
    """A C++ file that compiles only where the structs below lie in memory as launch.h's do."""
    lines = ["#include <cstddef>", '#include "launch.h"', "using namespace pgn_fast::cuda;"]
    for struct in STRUCTS.values():
        name = struct.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            lines.append(f"static_assert(offsetof({name}, {field}) == {at.offset});")
            lines.append(f"static_assert(sizeof({name}::{field}) == {at.size});")
    return "\n".join(lines) + "\n"


GUARD = 256  # elements of poison before and after an output


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that stands in a larger buffer of NaN; `intact` checks what is around it."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
    return buffer[GUARD : GUARD + size].view(shape)


def intact(out: Tensor) -> bool:
    buffer = out.as_strided((out.numel() + 2 * GUARD,), (1,), out.storage_offset() - GUARD)
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())


class Arguments(ctypes.Structure):
    """A launcher's argument struct filled from tensors and numbers, which it keeps alive."""

    def __init__(self, **values: Any):
        plain = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
        super().__init__(**plain)
        self.tensors = values


class Tensor4D(ctypes.Structure):
    """Heads of launch.h: (B, h, T, d), or (h, P, d) shared by the batch, by element strides."""

    def __init__(self, x: Tensor | None = None):
        if x is None:
            super().__init__()
        else:
            strides = x.stride() if x.ndim == 4 else (0, *x.stride())
            assert strides[-1] == 1
            super().__init__(x.data_ptr(), *strides[:-1])
        self.tensor = x


def structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of launch.h as ctypes, by name; what the header says is all that is known."""
    scalars: dict[str, Any] = {
        "int64_t": ctypes.c_int64,
        "int": ctypes.c_int,
        "bool": ctypes.c_bool,
        "float": ctypes.c_float,
    }
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", HEADER))
    found: dict[str, type[ctypes.Structure]] = {}
    for struct, body in re.findall(r"^struct (\w+) \{(.*?)^\};", HEADER, flags=re.M | re.S):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+\*?) (.*)", declaration, re.S).groups()
            for name, length in re.findall(r"(\w+)(?:\[(\w+)\])?", names):
                field = ctypes.c_void_p if kind.endswith("*") else (scalars | found)[kind]
                fields.append((name, field * int(constants[length]) if length else field))
        base = Tensor4D if struct == "Heads" else Arguments
        found[struct] = type(struct, (base,), {"_fields_": fields})
    return found


HEADER = re.sub(r"//.*", "", (CUDA / "launch.h").read_text())
STRUCTS = structs()
globals().update(STRUCTS)  # cuda_host.MixPrompts(logits=..., K=...)
single = ctypes.c_float
