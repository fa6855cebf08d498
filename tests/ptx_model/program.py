"""PTX text into kernels: parameters, registers, labels and statements."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTHS = {"pred": 1, "b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4, "b64": 8}
WIDTHS |= {"s16": 2, "s32": 4, "u64": 8, "s64": 8, "f64": 8}


@dataclass
class Kernel:
    """One entry of a PTX file."""

    name: str
    parameters: dict[str, tuple[int, int]]  # name -> offset and size in bytes
    statements: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # name or prefix -> width in bytes
    operations: list[Any] = field(default_factory=list)  # of instructions.translate, made once

    def width(self, register: str) -> int:
        """Bytes of a register."""
        return self.registers.get(register) or self.registers[register.rstrip("0123456789")]

    @property
    def parameter_bytes(self) -> int:
        offset, size = list(self.parameters.values())[-1]
        return offset + size


def compile_ptx(source: Path, architecture: str, *flags: str) -> dict[str, Kernel]:
    """The kernels of a .cu file as nvcc compiles it; the PTX is cached by all that goes into it."""
    files = [*sorted(source.parent.glob("*.cuh")), *sorted(source.parent.glob("*.h")), source]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files))
    digest.update(repr((architecture, flags, source.name)).encode())
    cache = Path(tempfile.gettempdir()) / f"pgn_fast_ptx_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    ptx = cache / f"{digest.hexdigest()[:16]}.ptx"
    if not ptx.is_file():
        partial = ptx.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-ptx", *flags]
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.replace(ptx)
    return parse(ptx.read_text())


def missing() -> str | None:
    """Why PTX cannot be made here; None where it can."""
    return None if shutil.which("nvcc") else "needs nvcc"


def find(kernels: dict[str, Kernel], *parts: str) -> Kernel:
    """The one kernel whose mangled name holds all ``parts``."""
    found = [k for name, k in kernels.items() if all(part in name for part in parts)]
    assert len(found) == 1, f"{parts}: {[k.name for k in found]}"
    return found[0]


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX file."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    kernels = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, flags=re.DOTALL):
        kernel = Kernel(entry.group(1), _parameters(entry.group(2)))
        begin = text.index("{", entry.end())
        depth, end = 1, begin + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        _read_body(kernel, text[begin + 1 : end - 1])
        kernels[kernel.name] = kernel
    return kernels


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    offset = 0
    for declaration in filter(str.strip, text.split(",")):
        align, kind, name, length = re.search(  # type: ignore[union-attr]
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", declaration
        ).groups()
        size = WIDTHS[kind] * int(length or 1)
        alignment = int(align or WIDTHS[kind])
        offset = -(-offset // alignment) * alignment
        found[name] = (offset, size)
        offset += size
    return found


def _read_body(kernel: Kernel, body: str) -> None:
    # scopes only group statements; the braces of an operand follow a comma, a bracket or a name
    body = re.sub(r"(^|[;{}\n])\s*[{}](?=\s*(?:$|[\n.@a-zA-Z}]))", r"\1\n", body)
    body = re.sub(r";\s*}", ";\n", body)
    for line in re.split(r";|\n(?=\s*[\w$]+:\s)|(?<=:)\s*\n", body):
        statement = (
            " ".join(line.split()).strip("{} ") if "{" not in line else " ".join(line.split())
        )
        if label := re.fullmatch(r"([\w$]+):(.*)", statement):
            kernel.labels[label.group(1)] = len(kernel.statements)
            statement = label.group(2).strip()
        if not statement:
            continue
        if register := re.match(r"\.reg \.(\w+) (%?[\w$]+)", statement):
            kernel.registers[register.group(2)] = WIDTHS[register.group(1)]
        elif not statement.startswith("."):
            kernel.statements.append(statement)
