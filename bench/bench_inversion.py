"""Prompts to pixels: rounding against its plain-torch form, a library's inversion, the prompter.

    pytest bench/bench_inversion.py --benchmark-only

The two promised times are asserted here, not in the tests: 16 prompts rounded on one thread, and a
library inverted on two cores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch

from pgn_fast.inversion import GamutLibrary, PatchMap, RgbPrompter, invert_library
from pgn_fast.inversion.rounding import FeedbackRounding
from pgn_fast.ops import feedback_round
from pgn_fast.ops.dispatch import unsupported_reason
from pgn_fast.prompts import PromptGenerator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# name: embedding width and pixels of a patch
SHAPES = {"S/16": (384, 768), "B/32": (768, 3072)}
# promised, of the CPU op
ROUNDING_MS = {"S/16": 1.5, "B/32": 12.0}  # an image of 16 prompts, one thread
LIBRARY_SECONDS = 60.0  # 256 tokens at B/32


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def bench_feedback_round(measure, quick, one_thread, shape, images):
    D, n = (24, 48) if quick else SHAPES[shape]
    rounding = FeedbackRounding.from_map(torch.randn(D, n))
    levels = 20 + 215 * torch.rand(16 * images, n, device=DEVICE)
    feedback, order = rounding.feedback.to(DEVICE), rounding.order.to(DEVICE)
    runs = {
        "eager" if backend == "reference" else backend: functools.partial(
            feedback_round, levels, feedback, order, backend=backend
        )
        for backend in ("reference", "cpu", "triton")
        if unsupported_reason(backend, "feedback_round", levels, feedback) is None
    }
    seconds = measure(
        runs,
        suite="inversion",
        case=f"feedback_round, {shape}, {images} images of 16 prompts",
        op="feedback_round",
        direction="forward",
        flops=len(levels) * n * n,
        bytes=2 * n * n + 5 * levels.numel(),
    )
    if "cpu" in seconds:
        assert 1e3 * seconds["cpu"] / images <= ROUNDING_MS[shape]


def bench_invert_library(measure, quick):
    """256 tokens out of every patch's reach, so that the solver runs to its end; from scratch."""
    import timm

    name, tokens = ("test_vit", 8) if quick else ("vit_base_patch32_224", 256)
    backbone = timm.create_model(name, num_classes=0, dynamic_img_size=False).eval()
    patch_map = PatchMap.from_backbone(backbone)
    library = 10 * torch.randn(tokens, patch_map.embed_dim)
    D, n, iterations = patch_map.embed_dim, patch_map.patch_values, 200

    def invert() -> None:
        fresh = dataclasses.replace(patch_map)  # without its decompositions
        made = invert_library(library, fresh, on_unreachable="project", iters=iterations)
        assert made.reach_err.min() > 0.1

    seconds = measure(
        {"ours": invert},
        suite="inversion",
        case=f"{tokens} tokens inverted, {name}",
        op="invert_library",
        direction="forward",
        flops=iterations * tokens * 4 * D * n,
        bytes=8 * D * n,
    )
    assert quick or seconds["ours"] <= LIBRARY_SECONDS


@pytest.mark.parametrize("images", [1, 8])
def bench_prompter(measure, quick, images):
    """Generator, pixel mixing, rounding, canvas: uint8 images in, uint8 canvases out."""
    import timm

    name = "test_vit" if quick else "vit_base_patch32_clip_224"
    backbone = timm.create_model(name, num_classes=0, dynamic_img_size=False).eval()
    patch_map = PatchMap.from_backbone(backbone)
    inverted = invert_library(GamutLibrary(256, patch_map), patch_map)
    generator = PromptGenerator(patch_map.embed_dim)
    prompter = RgbPrompter(generator, inverted).to(DEVICE)
    height, width = patch_map.image_size
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, device=DEVICE)
    P, n = generator.num_prompts, patch_map.patch_values
    measure(
        {"ours": lambda: prompter(pixels)},
        suite="inversion",
        case=f"canvases of {images} images, {name}",
        op="prompter",
        direction="forward",
        flops=images * P * (n * n + 2 * 256 * n),
        bytes=2 * n * n + 4 * 256 * n + 2 * pixels.numel(),
    )
