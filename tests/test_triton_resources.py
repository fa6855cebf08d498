"""Registers, spills and shared memory of the Triton kernels, held to tests/resources/triton.json.

Compiled for sm_90 without a GPU, in one process that does not interpret. Every dtype, architecture
and tile: ``python tools/triton_aot.py --all``; ``--update`` rewrites the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need Triton")

import triton_aot as aot

ROOT = Path(__file__).parents[1]
TABLE = json.loads(aot.TABLE.read_text())


@pytest.mark.slow
def test_compiled_kernels_cost_what_the_table_says():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/triton_aot.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_kernel_divides_in_64_bits():
    assert not [name for name, figures in TABLE["kernels"].items() if figures["long_divisions"]]


# the launchers at 2^31 rows, on tensors without memory: what the interpreter cannot show, since it
# has no types that must agree
FROM_2_TO_THE_31 = """
import torch, triton_aot as aot
from pgn_fast.kernels import mix_prompts, prompted_patch_embed

def mixed(*_):
    logits, library = aot._empty(2**28, 8, 40), aot._empty(40, 64)
    prompts = mix_prompts.mix_prompts(logits, library, "softmax")
    mix_prompts.mix_prompts_backward(prompts, logits, library, "softmax")

def patched(*_):
    images, weight = aot._empty(2**27, 3, 32, 32), aot._empty(64, 3, 8, 8)
    arguments = images, weight, None, None, weight[:0, 0, 0], None, None, None, [], [], "softmax"
    prompted_patch_embed.prompted_patch_embed(*arguments, "append")

aot.CASES.update(mix_prompts=mixed, prompted_patch_embed=patched)
for op in "mix_prompts", "prompted_patch_embed":
    for launch in aot.launches(op, torch.float32):
        print(launch.name(op, 90), aot.compile_launch(launch, 90)["long_divisions"])
"""


@pytest.mark.slow
def test_from_2_to_the_31_rows_on_kernels_count_in_64_bits():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tools")
    command = [sys.executable, "-c", FROM_2_TO_THE_31]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    divisions = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(divisions) == 5 and min(divisions) > 0, done.stdout


def test_table_has_no_spill_where_it_counts():
    """Half precision on Hopper is what the library is fast with: no tile of it may spill."""
    spilling = [
        name
        for name, figures in TABLE["kernels"].items()
        if " sm_90 " in name and "16" in name.split()[2] and figures["spills"]
    ]
    assert not spilling


@pytest.mark.slow
def test_attention_fits_a_consumer_s_card():
    """Of `make gates`, the op with the largest tiles on the architectures with the least room."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/triton_aot.py", "--gates", "--arch", "120"]
    command += ["--op", "prompt_attention"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"shared": 101_376}, None),
        ({"shared": 119_000}, "119000 bytes of shared memory, 101376 are offered"),
        ({"long_divisions": 10}, "10 divisions of 64 bits"),
    ],
)
def test_what_does_not_fit_a_card_is_named(changes, complaint):
    found = aot.unfit("kernel", figures(**changes), 89)
    assert (complaint in found[0]) if complaint else not found


def figures(**changes: int) -> dict[str, int]:
    known = {"registers": 100, "stack": 0, "spills": 0, "shared": 1000}
    return known | {"tensor_cores": 8, "wgmma": 8, "long_divisions": 0} | changes


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"registers": 109, "shared": 1099}, None),
        ({"registers": 90, "shared": 500, "wgmma": 4}, None),
        ({"registers": 120}, "registers 100 -> 120"),
        ({"stack": 8}, "stack 0 -> 8"),
        ({"spills": 1}, "spills 0 -> 1"),
        ({"shared": 1200}, "shared 1000 -> 1200"),
        ({"long_divisions": 2}, "long_divisions 0 -> 2"),
        ({"wgmma": 0}, "lost its wgmma instructions"),
    ],
)
def test_growth_is_named(changes, complaint):
    table = {"triton": aot.triton.__version__, "kernels": {"kernel": figures()}}
    found = aot.complaints({"kernel": figures(**changes)}, table)
    assert found == ([f"kernel: {complaint}"] if complaint else [])


def test_other_compilers_are_held_to_spills_only():
    table = {"triton": "0.0", "kernels": {"kernel": figures()}}
    assert aot.complaints({"kernel": figures(registers=200, shared=9999)}, table) == []
    assert aot.complaints({"kernel": figures(spills=2)}, table) == ["kernel: spills 0 -> 2"]
    assert "not in the table" in aot.complaints({"other": figures()}, table)[0]
