"""Prompts to pixels: feedback rounding against its plain-torch form, and the whole prompter.

OMP_NUM_THREADS=1 pytest bench/bench_inversion.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from pgn_fast.inversion import GamutLibrary, PatchMap, RgbPrompter, invert_library
from pgn_fast.inversion.rounding import FeedbackRounding
from pgn_fast.ops import feedback_round
from pgn_fast.ops.backends import refusal
from pgn_fast.prompts import PromptGenerator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# name: embedding width and pixels of a patch
SHAPES = {"S/16": (384, 768), "B/32": (768, 3072)}


@pytest.mark.parametrize("contender", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def bench_feedback_round(measure, quick, shape, images, contender):
    D, n = (24, 48) if quick else SHAPES[shape]
    rounding = FeedbackRounding.from_map(torch.randn(D, n))
    levels = 20 + 215 * torch.rand(16 * images, n, device=DEVICE)
    feedback, order = rounding.feedback.to(DEVICE), rounding.order.to(DEVICE)
    backend = "reference" if contender == "eager" else contender
    if reason := refusal(backend, "feedback_round", levels, feedback):
        pytest.skip(reason)
    measure(
        lambda: feedback_round(levels, feedback, order, backend=backend),
        group=f"feedback_round, {shape}, {images} images of 16 prompts",
        op="feedback_round",
        direction="forward",
        contender=contender,
        flops=len(levels) * n * n,
        bytes=2 * n * n + 5 * levels.numel(),
    )


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
        lambda: prompter(pixels),
        group=f"canvases of {images} images, {name}",
        op="prompter",
        direction="forward",
        contender="ours",
        flops=images * P * (n * n + 2 * 256 * n),
        bytes=2 * n * n + 4 * 256 * n + 2 * pixels.numel(),
    )
