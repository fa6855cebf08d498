"""Bugs seeded into the Triton kernels' text: the checks that pass on the kernels must fail on each.

A mutant that survives means that a test asserts less than it seems to.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import triton_cases as cases

pytest.importorskip("triton", reason="the Triton kernels need Triton")

import pgn_fast.kernels

# file, what the kernel says, what the mutant says; the first is found exactly so many times
MUTANTS = {
    "mask lets in tokens past the library's end": (
        "mix_prompts",
        'mask=k[None, :] < K,\n            other=float("-inf"),',
        'mask=k[None, :] < K + 1,\n            other=float("-inf"),',
    ),
    "running sums are not rescaled": (
        "mix_prompts",
        "mixture = mixture * rescale[:, None]",
        "mixture = mixture",
    ),
    "softmax gradient without its mean": (
        "mix_prompts",
        "grad_weights - inner[:, None]",
        "grad_weights",
    ),
    "rows of the next range are counted twice": (
        "mix_prompts",
        "end = tl.minimum(first + blocks_per_split,",
        "end = tl.minimum(first + blocks_per_split + 1,",
    ),
    "the last row is left out": (
        "_common",
        "row = first + tl.minimum(step, left - 1)",
        "row = first + tl.minimum(step, left - 2)",
    ),
    "strides of image and head are swapped": (
        "prompt_attention",
        "k_ptr += b * k_b + h * k_h\n    v_ptr",
        "k_ptr += b * k_h + h * k_b\n    v_ptr",
    ),
    "attention is not rescaled": (
        "prompt_attention",
        "acc = acc * rescale[:, None]",
        "acc = acc",
    ),
    "keys past the last take part": (
        "prompt_attention",
        "tl.where(j[None, :] < T + P, scores * (scale * LOG2_E)",
        "tl.where(j[None, :] < T + P + 1, scores * (scale * LOG2_E)",
    ),
    "prompt keys are read one row too early": (
        "_attention",
        "prompt_ptr + (row - T) * prompt_t",
        "prompt_ptr + (row - T - 1) * prompt_t",
    ),
    "rows and columns of a patch are swapped": (
        "prompted_patch_embed",
        "within = c.to(tl.int64) * image_c + y * image_y + k % PATCH_W",
        "within = c.to(tl.int64) * image_c + k % PATCH_W * image_y + y",
    ),
    "uint8 pixels are not centered": (
        "prompted_patch_embed",
        "pixels.to(tl.float32) - 128.0",
        "pixels.to(tl.float32)",
    ),
    "patches overwrite the prompts before them": (
        "prompted_patch_embed",
        "(S + P, S)",
        "(S, S)",
    ),
}


# the op that a file is a part of, where it is not the op's own
PART_OF = {"_attention": "prompt_attention", "_common": "mix_prompts"}


def load(file: str, text: str, folder: Path) -> tuple[str, ModuleType]:
    """The op of a kernel file, and its module with ``text`` in the place of the file's."""
    module = load_beside(file, text, folder)
    if file not in PART_OF:
        return file, module
    op, name = PART_OF[file], f"pgn_fast.kernels.{mutant_of(file)}"
    with mock.patch.dict(sys.modules, {name: module}):
        text = source(op).replace(f"from .{file} ", f"from .{mutant_of(file)} ")
        return op, load_beside(op, text, folder)


def mutant_of(file: str) -> str:
    return f"mutant_of_{file}"


def load_beside(file: str, text: str, folder: Path) -> ModuleType:
    """The kernel file ``text`` as a module beside the real one."""
    path = folder / f"{mutant_of(file)}.py"
    path.write_text(text)
    name = f"pgn_fast.kernels.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def source(file: str) -> str:
    return (Path(pgn_fast.kernels.__path__[0]) / f"{file}.py").read_text()


@pytest.mark.parametrize("file", sorted({file for file, *_ in MUTANTS.values()}))
def test_the_unchanged_text_passes(file, device, tmp_path):
    cases.check(*load(file, source(file), tmp_path), device)


@pytest.mark.parametrize("bug", MUTANTS)
def test_seeded_bug_is_caught(bug, device, tmp_path):
    file, right, wrong = MUTANTS[bug]
    text = source(file)
    assert text.count(right) == 1, "the kernel changed: write this mutant again"
    op, mutant = load(file, text.replace(right, wrong), tmp_path)
    with pytest.raises(AssertionError):
        cases.check(op, mutant, device)
