"""Registers, stack and tensor-core instructions of the built CUDA kernels, held to a table.

No GPU is needed: the figures are read from the library that the build made. A stack means spilled
registers or an array that did not stay in them. ``python tests/test_cuda_resources.py`` rewrites
the table after a change that was meant.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pgn_fast import _native

LIBRARY = Path(_native.__file__).with_name("_C_cuda.so")
TABLE = Path(__file__).parent / "resources/cuda.json"
REGISTERS_MORE = 1.1  # compilers differ a little; a growth beyond this is worth a look


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(bundled) if bundled and bundled.is_file() else shutil.which("cuobjdump")


def short_name(mangled: str) -> str:
    """attention_kernel<__half, 64, 4> of a mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout
    name = name.replace("pgn_fast::cuda::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"^void ", "", name.strip()).rsplit("(", 1)[0]
    return re.sub(r"\((?:bool|int)\)", "", name)


def measured() -> dict[str, dict[str, list[int]]]:
    """{architecture: {kernel: [registers, bytes of stack]}} of the built library."""
    report = subprocess.run(
        [cuobjdump(), "-res-usage", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    table: dict[str, dict[str, list[int]]] = {}
    for part in report.split("arch = ")[1:]:
        kernels = table.setdefault(part.split()[0], {})
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part):
            kernels[short_name(name)] = [int(registers), int(stack)]
    return table


needs_library = pytest.mark.skipif(
    not LIBRARY.is_file() or cuobjdump() is None or shutil.which("c++filt") is None,
    reason="needs the built CUDA library, cuobjdump and c++filt",
)


@needs_library
def test_kernels_keep_to_their_registers():
    table, found = json.loads(TABLE.read_text()), measured()
    assert set(found) >= {"sm_80", "sm_90a"}, f"architectures built: {sorted(found)}"
    for arch in table:
        assert set(found[arch]) == set(table[arch]), "kernels came or went: rewrite the table"
        for name, (registers, stack) in found[arch].items():
            allowed_registers, allowed_stack = table[arch][name]
            assert stack <= allowed_stack, f"{arch} {name}: {stack} bytes of stack: a new spill"
            assert registers <= allowed_registers * REGISTERS_MORE, f"{arch} {name}: {registers}"


@needs_library
@pytest.mark.parametrize("arch, instruction", [("sm_80", "HMMA"), ("sm_90a", "HGMMA")])
def test_products_run_on_tensor_cores(arch, instruction):
    """Every 16-bit kernel that multiplies tiles holds tensor-core instructions; Hopper's own kernel
    holds Hopper's and is empty elsewhere."""
    code = subprocess.run(
        [cuobjdump(), "-sass", "-arch", arch, str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    plain = ("add_splits", "place_rows", "prepare")
    checked, without = 0, []
    for part in code.split("Function : ")[1:]:
        name = short_name(part.split()[0])
        half = "half" in name or "bfloat16" in name
        if not half or name.startswith(plain) or ("sm90" in name) != (instruction == "HGMMA"):
            continue
        checked += 1
        if not re.search(rf"\b{instruction}\.", part):
            without.append(name)
    assert checked and not without, without


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    text = json.dumps(measured(), indent=1, sort_keys=True)
    TABLE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
