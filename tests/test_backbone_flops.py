"""The savings, counted: the GEMMs of a step are those of the formulas and no others."""

from __future__ import annotations

import torch
from test_backbone_works_with import backbone
from torch.utils.flop_counter import FlopCounterMode

import pgn_fast

B, N, P, D, H, DEPTH = 4, 16, 8, 64, 256, 5
ROWS = B * (1 + N)
aten = torch.ops.aten


def products(model: pgn_fast.PromptedViT, images: torch.Tensor) -> tuple[float, float]:
    """Flops of the GEMMs forward and in the whole step; attention's own left out."""

    def counted(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts()["Global"]
        counted = (aten.mm, aten.addmm, aten.bmm, torch.ops.pgn_fast.frozen_linear)
        return sum(counts.get(op, 0) for op in counted)

    model(images)  # folds, in float64
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as step:
        model(images).sum().backward()
    assert logits.requires_grad
    return counted(forward), counted(step)


def small(method: type[pgn_fast.PromptedViT], **options) -> pgn_fast.PromptedViT:
    return method(backbone(depth=DEPTH).double(), 0, num_prompts=P, **options)


def test_deep_prompts_cost_what_the_formulas_say() -> None:
    model = small(pgn_fast.VPT)
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    forward, step = products(model, images)
    # all blocks but the last: Q, K, V, projection and MLP of the images' own rows, and the
    # prompts' K and V, once a batch
    blocks = (DEPTH - 1) * (8 * ROWS * D**2 + 4 * ROWS * D * H + 4 * P * D**2)
    # the last: one row an image; K and V moved over to it (2 D^2 each), scores and mixtures of
    # its h rows with all tokens and prompts (2 heads, 4 D a pair)
    last = B * (8 * D**2 + 4 * D * H) + B * 2 * (1 + N + P) * 4 * D
    assert abs(forward - blocks - last) <= 1e-3 * forward
    # backward: the same without weight gradients, but in block 0 nothing for Q, K, V of the
    # images' rows, and the last block's mixtures twice
    backward = blocks - 6 * ROWS * D**2 + last + B * 2 * (1 + N + P) * 4 * D
    assert abs(step - forward - backward) <= 5e-3 * step


def test_balanced_plan_runs_fc1_again_and_min_the_block() -> None:
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    _, fast = products(small(pgn_fast.VPT), images)
    _, balanced = products(small(pgn_fast.VPT, fast="balanced"), images)
    forward, least = products(small(pgn_fast.VPT, fast="min"), images)
    fc1 = ((DEPTH - 1) * ROWS + B) * 2 * D * H
    assert abs(balanced - fast - fc1) <= 1e-6 * fast
    assert fast < least <= fast + forward


def test_reference_costs_more() -> None:
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    _, fast = products(small(pgn_fast.VPT), images)
    _, plain = products(small(pgn_fast.VPT, fast=False), images)
    assert plain > 1.5 * fast
