"""The inversion's accuracy on patch embeddings of known spectrum, with a published PGN.

The figures in the comments are what an independent prototype reached on the same inputs. Numbers
14 and 15, the promised times, are asserted by bench/bench_inversion.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from inversion_fixtures import isotropic_tokens, published, synthetic_map
from torch import Tensor

from pgn_fast.inversion import GamutLibrary, InvertedLibrary, PatchMap, invert_library

KINDS = ("rand", "a1", "a2")
SHAPES = ("S/16", "B/16", "L/14", "B/32")
CASES = [pytest.param(shape, kind, id=f"{shape}-{kind}") for shape in SHAPES for kind in KINDS]


@functools.cache
def prompts_of(shape: str, kind: str) -> tuple[PatchMap, InvertedLibrary, Tensor, Tensor]:
    """128 prompts of an in-gamut library with real coefficients: map, inverse, levels, contents."""
    patch_map = synthetic_map(shape, kind)
    tokens, coefficients = published()
    library = GamutLibrary(len(tokens), patch_map)
    with torch.no_grad():
        matching = tokens if patch_map.embed_dim == 768 else isotropic_tokens(patch_map.embed_dim)
        library.theta.copy_(matching)
        wanted = coefficients @ library().double()
    inverted = invert_library(library, patch_map)
    return patch_map, inverted, inverted.mix(coefficients), wanted


def content_errors(patch_map: PatchMap, levels: Tensor, wanted: Tensor) -> Tensor:
    """|content of the patch - wanted|, one a prompt, without what no norm lets through."""
    contents = (levels.double() - 127.5) @ patch_map.A.T
    return patch_map.center(contents - wanted).norm(dim=1)


@pytest.mark.parametrize("shape, kind", CASES)
def test_float_canvas_is_exact_and_in_gamut(shape, kind):
    """Number 1: any mixture of an in-gamut library is in gamut and has the mixed token."""
    patch_map, inverted, levels, wanted = prompts_of(shape, kind)
    relative = patch_map.relative_error((levels.double() - 127.5) @ patch_map.A.T, wanted)
    assert relative.max() <= 1e-5
    assert levels.min() >= inverted.margin and levels.max() <= 255 - inverted.margin


# prototype: 2.0 2.8 6.6 | 1.4 1.4 4.9 | 1.2 1.4 4.4 | 2.9 9.3 21.3
REQUIRED_GAIN = dict(
    zip(
        [(shape, kind) for shape in SHAPES for kind in KINDS],
        [1.9, 2.5, 6.0, 1.35, 1.35, 4.5, 1.15, 1.3, 4.0, 2.7, 8.0, 18.0],
        strict=True,
    )
)


@pytest.mark.parametrize("shape, kind", CASES)
def test_gain_of_feedback_rounding(shape, kind):
    """Numbers 2, 3 and 5: how much nearer than plain rounding, and the prediction within 5 %."""
    patch_map, inverted, levels, wanted = prompts_of(shape, kind)
    nearest = content_errors(patch_map, inverted.to_uint8(levels, "nearest"), wanted)
    feedback = content_errors(patch_map, inverted.to_uint8(levels), wanted)
    size = patch_map.center(wanted).norm(dim=1)
    assert (nearest / size).mean() / (feedback / size).mean() >= REQUIRED_GAIN[shape, kind]
    # the closed form is for the root mean square
    measured = nearest.square().mean().sqrt() / feedback.square().mean().sqrt()
    assert measured == pytest.approx(patch_map.rounding.gain, rel=0.05)


@pytest.mark.parametrize("kind, allowed", [("a1", 6e-4), ("a2", 2e-4)])
def test_absolute_token_error_at_b32(kind, allowed):
    """Number 4: prompts of the nearest in-gamut library (prototype: 4.9e-4 and 1.5e-4)."""
    patch_map = synthetic_map("B/32", kind)
    tokens, coefficients = published()
    inverted = invert_library(tokens, patch_map, on_unreachable="project", iters=40)
    assert inverted.reach_err.median() > 0.5  # a latent library is far out of reach here
    levels = inverted.mix(coefficients)
    wanted = coefficients @ (inverted.patches.double() @ patch_map.A.T)
    error = content_errors(patch_map, inverted.to_uint8(levels), wanted)
    assert (error / patch_map.center(wanted).norm(dim=1)).mean() <= allowed


def test_box_solve_beats_clipping():
    """Number 6: S/16 a1, 64 tokens, 200 iterations; required 0.31 where clipping has 0.51.

    The library of the prototype (DINO's, 0.306 against 0.509) is not at hand. These are random
    directions with the norms of a published library, scaled until clipping fails about as badly.
    """
    patch_map = synthetic_map("S/16", "a1")
    solver, mid = patch_map.solver, torch.full((768,), 127.5, dtype=torch.float64)
    directions = torch.randn(64, 384, generator=torch.Generator().manual_seed(3)).double()
    norms = 3 * published("pgn_vit_eurosat", 1)[0].norm(dim=1)[:64, None]
    tokens = norms * torch.nn.functional.normalize(directions, dim=1)
    y = patch_map.center(tokens - patch_map.d - patch_map.positions[3])
    size = patch_map.center(tokens).norm(dim=1)
    relative = lambda levels: ((levels @ solver.A.T - y).norm(dim=1) / size).mean().item()
    clipped = relative(solver.min_norm(y, mid).clamp(0, 255))
    solved = solver.in_box(y, 0.0, 255.0, mid, iterations=200)
    assert solved.min() >= 0 and solved.max() <= 255
    assert clipped >= 0.45
    assert relative(solved) <= 0.31
    assert relative(solved) <= 0.61 * clipped

    # the optimum, by an independent method: accelerated projected gradient to convergence
    step = 1 / torch.linalg.matrix_norm(solver.A, 2) ** 2
    best, previous = solved.clone(), solved.clone()
    for i in range(500):
        ahead = best + i / (i + 3) * (best - previous)
        previous = best
        best = (ahead - step * (ahead @ solver.A.T - y) @ solver.A).clamp(0, 255)
    assert relative(solved) <= 1.005 * relative(best)


@pytest.mark.filterwarnings("error")
def test_auto_exposure():
    """Number 7: a CLIP prompt is brightened to fill the gamut; error after ln_pre (prototype
    0.0018 mean, 0.0025 max)."""
    patch_map = synthetic_map("B/32", "rand", scale_free=True)
    tokens, coefficients = published()
    inverted = invert_library(tokens, patch_map, prompt_pos="none", scale="auto")
    coefficients = coefficients.reshape(8, 16, -1)
    levels = inverted.mix(coefficients)
    assert levels.min() >= inverted.margin - 1e-3
    assert levels.max() <= 255 - inverted.margin + 1e-3
    rounded = inverted.to_uint8(levels)
    seen = patch_map.tokens(rounded) + patch_map.positions
    norm = lambda x: torch.nn.functional.layer_norm(x, (768,))
    error = (norm(seen) - norm(coefficients @ tokens)).norm(dim=-1) / 768**0.5
    assert error.mean() <= 0.0022 and error.max() <= 0.003
