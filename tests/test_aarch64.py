"""The CPU's inner loops compiled for aarch64 and run under emulation, against double.

Needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user-static).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import TOLERANCE

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 to run code for aarch64",
)


def flags() -> list[str]:
    """Those of the inner loops, as the build gives them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (found,) = re.findall(r"target_compile_options\(pgn_\$\{isa\} PRIVATE ([^$]*)", text)
    return found.split()


@pytest.mark.slow
def test_inner_loops_on_aarch64(tmp_path):
    sources = [ROOT / "tests/aarch64/main.cpp"]
    for loop in sorted((ROOT / "csrc/cpu/isa").glob("*.inc")):
        if loop.name != "numbers.inc":
            sources.append(tmp_path / f"{loop.stem}.cpp")
            sources[-1].write_text(f'#define PGN_ISA scalar\n#include "{loop}"\n')
    program = tmp_path / "check"
    command = [COMPILER, "-std=c++17", "-static", *flags(), *sources, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for op, dtype, error in lines:
        assert float(error) <= TOLERANCE[getattr(torch, dtype)], f"{op} {dtype}: {error}"
