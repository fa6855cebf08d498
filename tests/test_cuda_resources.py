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


@pytest.fixture(scope="module")
def code() -> dict[tuple[str, str], list[tuple[int, str]]]:
    """{(architecture, kernel): [(address, instruction)]} of the built library."""
    command = [cuobjdump(), "-sass", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return disassembled(text)


def disassembled(text: str) -> dict[tuple[str, str], list[tuple[int, str]]]:
    found = {}
    for part in text.split("arch = ")[1:]:
        for function in part.split("Function : ")[1:]:
            lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", function)
            instructions = [(int(address, 16), text) for address, text in lines]
            found[part.split()[0], short_name(function.split()[0])] = instructions
    return found


def jumps_back(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(begin, end) of every loop, by the branches that lead to an earlier address."""
    ends = [address for address, text in instructions if text in ("EXIT", "RET")]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)", text)
        begin = int(target.group(1), 16) if target else address
        # rarely run parts stand after the program's end and jump back to where they came from
        if begin < address and not any(begin <= end <= address for end in ends):
            loops.append((begin, address))
    return loops


def calls_in_inner_loops(instructions: list[tuple[int, str]]) -> list[str]:
    """Calls (of a division's slow path, say) inside a loop that holds no other loop."""
    loops = jumps_back(instructions)
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    inside = lambda at: any(begin <= at <= end for begin, end in inner)
    at = dict(instructions)

    def waits(call: str) -> bool:
        """sm_80 calls the instruction that brings a warp's lanes together again."""
        target = re.search(r"0x([0-9a-f]+)", call)
        return target is not None and "WARPSYNC" in at.get(int(target.group(1), 16), "")

    return [
        text
        for address, text in instructions
        if "CALL" in text and inside(address) and not waits(text)
    ]


def empty_kernels(found: dict[tuple[str, str], list[tuple[int, str]]]) -> list[tuple[str, str]]:
    """Kernels of under ten instructions: an architecture for which the body was left out."""
    return [name for name, instructions in found.items() if len(instructions) < 10]


@needs_library
def test_no_kernel_is_empty(code):
    assert code and not empty_kernels(code)


@needs_library
def test_inner_loops_of_16_bit_kernels_call_nothing(code):
    """Those are the ones that the library is fast with."""
    half = {name: c for name, c in code.items() if "half" in name[1] or "bfloat16" in name[1]}
    calling = {name: calls for name, c in half.items() if (calls := calls_in_inner_loops(c))}
    assert half and not calling


@needs_library
@pytest.mark.parametrize("arch, instruction", [("sm_80", "HMMA"), ("sm_90a", "HGMMA")])
def test_products_run_on_tensor_cores(code, arch, instruction):
    """Every 16-bit kernel that multiplies tiles holds tensor-core instructions; Hopper's own kernel
    holds Hopper's, and stands in no other architecture's code."""
    plain = ("add_splits", "place_rows", "prepare")
    checked, without = 0, []
    for (of, name), instructions in code.items():
        half = "half" in name or "bfloat16" in name
        if of != arch or not half or name.startswith(plain):
            continue
        if ("sm90" in name) != (instruction == "HGMMA"):
            continue
        checked += 1
        if not any(text.split(".")[0].endswith(instruction) for _, text in instructions):
            without.append(name)
    assert checked and not without, without
    assert not any("sm90" in name for of, name in code if of != "sm_90a")


@needs_library
def test_the_end_of_the_hopper_kernel_is_not_a_chain_of_branches(code):
    """Its bias and positions are loaded without a branch around each: they arrive together."""
    for (_, name), instructions in code.items():
        if "sm90" in name:
            branches = sum("BSSY" in text for _, text in instructions)
            assert branches <= 8, f"{name}: {branches} branches that meet again, 39 when divided"


LOOP = """arch = sm_80
        Function : f
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   IADD3 R1, R2, R3, RZ ;
        /*0020*/                   CALL.REL.NOINC 0x100 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
"""


def test_the_gates_see_an_empty_body_and_a_call_in_a_loop():
    found = disassembled(LOOP)
    (instructions,) = found.values()
    assert empty_kernels(found) == list(found)
    assert calls_in_inner_loops(instructions) == ["CALL.REL.NOINC 0x100"]
    assert calls_in_inner_loops([i for i in instructions if "BRA" not in i[1]]) == []


@pytest.mark.skipif(
    shutil.which("nvcc") is None or cuobjdump() is None, reason="needs nvcc and cuobjdump"
)
def test_built_for_plain_9_0_the_hopper_kernel_is_seen_to_be_empty(tmp_path):
    """The build that once returned memory that had not been written."""
    source = Path(__file__).parents[1] / "csrc/cuda/patch_embed_sm90.cu"
    cubin = tmp_path / "plain.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-cubin", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True)
    dump = [cuobjdump(), "-sass", str(cubin)]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    # of a cubin the listing names the architecture in another form
    found = disassembled("arch = sm_90\n" + text)
    hopper = {name: c for (_, name), c in found.items() if "sm90" in name}
    assert hopper and all(len(c) < 20 for c in hopper.values())
    # and it stops the launch rather than return what was there
    assert all(any("BPT.TRAP" in text for _, text in c) for c in hopper.values())


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    text = json.dumps(measured(), indent=1, sort_keys=True)
    TABLE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
