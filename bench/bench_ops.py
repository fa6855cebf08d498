"""Every fused op, backend and direction at the sizes of PGN, always beside eager PyTorch.

"eager" and "compile" are what somebody without this package would write; the ratios of
``bench/report.py`` are against the faster of the two. The contenders of a case alternate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level import measured
from rows import DEVICE
from torch import Tensor

from pgn_fast.ops import (
    add_layer_norm,
    frozen_linear,
    mix_prompts,
    prompt_attention,
    prompted_patch_embed,
)
from pgn_fast.ops.dispatch import unsupported_reason

ON_GPU = DEVICE.type == "cuda"
OURS = ["triton", "cuda"] if ON_GPU else ["cpu"]

# name: patch size, width, heads, prompts
VITS = {"B/32": (32, 768, 12, 16), "B/16": (16, 768, 12, 16), "L/14": (14, 1024, 16, 16)}
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


@pytest.fixture
def draw(dtype):
    """``draw(*shape)``: normal numbers."""
    return functools.partial(torch.randn, dtype=dtype, device=DEVICE)


@pytest.fixture
def compare(measure, quick, dtype, request):
    """``compare(plain, op, leaves, direction, ...)``: eager, compiled and every backend that runs.

    ``plain(*leaves)`` is the task in eager PyTorch and ``op(*leaves, backend=name)`` ours;
    "training" is the forward and the gradients of all ``leaves``. ``refused_for`` are the tensors
    that decide which backends run.
    """

    def timed(
        plain: Callable[..., Tensor],
        op: Callable[..., Tensor],
        leaves: list[Tensor],
        direction: str,
        *,
        name: str,
        refused_for: list[Tensor],
        **facts: Any,
    ) -> None:
        refused = {backend: unsupported_reason(backend, name, *refused_for) for backend in OURS}
        contenders: dict[str, Callable[..., Tensor]] = {
            backend: functools.partial(op, backend=backend)
            for backend, reason in refused.items()
            if reason is None
        }
        if not contenders:
            pytest.skip("; ".join(filter(None, refused.values())))
        contenders["eager"] = plain
        if not quick:  # compiling takes longer than a smoke test may
            torch.compiler.reset()  # one compiled function a case, none recompiled for the next
            contenders["compile"] = torch.compile(plain, dynamic=False)
        backward = direction == "training"
        runs = {who: call(run, leaves, backward) for who, run in contenders.items()}
        measure(runs, suite="ops", dtype=dtype, op=name, direction=direction, **facts)

    return timed


def call(function: Callable[..., Tensor], leaves: list[Tensor], backward: bool) -> Any:
    """A run of the forward without a graph, or of forward and backward for all ``leaves``."""
    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return function(*leaves)

        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


both_directions = pytest.mark.parametrize("direction", ["forward", "training"])


@both_directions
@pytest.mark.parametrize(
    "B, K, D",
    measured(
        (1, 256, 768),
        tables=((64, 256, 768),),
        all=((512, 256, 768), (1, 4096, 768), (64, 4096, 1024)),
    ),
)
def bench_mix_prompts(compare, draw, dtype, quick, B, K, D, direction):
    P, B = 16, 1 if quick else B
    logits, library = draw(B, P, K), draw(K, D)

    def plain(logits: Tensor, library: Tensor) -> Tensor:
        return logits.softmax(dim=-1) @ library

    products = 3 if direction == "training" else 1
    compare(
        plain,
        mix_prompts,
        [logits, library],
        direction,
        name="mix_prompts",
        refused_for=[logits],
        case=f"mix_prompts {direction}, B={B}, P={P}, K={K}, D={D}",
        flops=products * 2 * B * P * K * D,
        bytes=products * (B * P * (K + D) + K * D) * dtype.itemsize,
    )


@both_directions
@pytest.mark.parametrize(
    "vit, B",
    measured(
        ("B/32", 8),
        tables=(("B/32", 1), ("B/16", 8)),
        all=(("B/16", 1), ("L/14", 8), ("B/32", 64), ("B/16", 64), ("B/32", 512)),
    ),
)
def bench_prompted_patch_embed(compare, draw, dtype, quick, vit, B, direction):
    p, D, _, P = VITS[vit]
    K, size = 256, (2 * p if quick else 224)
    B, N = 1 if quick else B, (size // p) ** 2
    images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=DEVICE)
    weight, bias, pos_embed = draw(D, 3, p, p), draw(D), draw(1, 1 + N, D)
    prefix, logits, library = draw(1, 1, D), draw(B, P, K), draw(K, D)
    mean, std = (torch.tensor(x, device=DEVICE)[:, None, None] for x in (MEAN, STD))

    def plain(logits: Tensor, library: Tensor) -> Tensor:
        pixels = ((images.float() / 255 - mean) / std).to(dtype)
        patches = F.conv2d(pixels, weight, bias, stride=p).flatten(2).mT
        tokens = torch.cat([prefix.expand(B, -1, -1), patches], dim=1) + pos_embed
        return torch.cat([tokens, logits.softmax(dim=-1) @ library], dim=1)

    def ours(logits: Tensor, library: Tensor, backend: str) -> Tensor:
        frozen = (images, weight, bias, pos_embed, prefix)
        return prompted_patch_embed(*frozen, logits, library, mean=MEAN, std=STD, backend=backend)

    mixing = (3 if direction == "training" else 1) * 2 * B * P * K * D
    numbers = weight.numel() + pos_embed.numel() + library.numel() + B * (1 + N + P) * D
    compare(
        plain,
        ours,
        [logits, library],
        direction,
        name="prompted_patch_embed",
        refused_for=[weight, images],
        case=f"prompted_patch_embed {direction}, ViT-{vit}, B={B}, P={P}, K={K}, uint8",
        flops=2 * B * N * 3 * p * p * D + mixing,
        bytes=images.numel() + numbers * dtype.itemsize,
    )


@both_directions
@pytest.mark.parametrize(
    "vit, B, P, Q",
    measured(
        ("B/16", 4, 50, None),
        tables=(("B/16", 4, 10, None), ("B/16", 4, 0, None), ("B/16", 4, 50, 1)),
        all=(
            ("B/32", 8, 50, None),
            ("B/16", 4, 200, None),
            ("L/14", 2, 50, None),
            ("B/16", 64, 50, None),
        ),
    ),
)
def bench_prompt_attention(compare, draw, dtype, quick, vit, B, P, Q, direction):
    p, D, h, _ = VITS[vit]
    T, d = 1 + (5 if quick else (224 // p) ** 2), D // h
    B = 1 if quick else B * (16 if ON_GPU else 1)
    Q = T if Q is None else Q
    qkv = draw(B, T, 3, h, d).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0][:, :, :Q].detach(), qkv[1].detach(), qkv[2].detach()
    tensors = [q, k, v, draw(h, P, d), draw(h, P, d)]

    def plain(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        keys = torch.cat([prompt_k.expand(B, -1, -1, -1), k], dim=2)
        values = torch.cat([prompt_v.expand(B, -1, -1, -1), v], dim=2)
        return F.scaled_dot_product_attention(q, keys, values)

    backward = direction == "training"
    moved = sum(t.numel() for t in tensors) + q.numel()
    compare(
        plain,
        prompt_attention,
        tensors,
        direction,
        name="prompt_attention",
        refused_for=[q],
        case=f"prompt_attention {direction}, ViT-{vit}, B={B}, P={P}, {Q} queries",
        flops=(7 if backward else 2) * 2 * B * h * Q * (T + P) * d,
        bytes=(3 if backward else 1) * moved * dtype.itemsize,
    )


@both_directions
@pytest.mark.parametrize(
    "rows, I, O",
    measured(
        (1576, 768, 3072),
        tables=((1576, 3072, 768), (50, 768, 1536)),
        all=((8, 768, 768),),
    ),
)
def bench_frozen_linear(compare, draw, dtype, quick, rows, I, O, direction):  # noqa: E741
    rows = 17 if quick else rows
    x, weight, bias = draw(rows, I), draw(O, I), draw(O)

    def plain(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def ours(x: Tensor, backend: str) -> Tensor:
        return frozen_linear(x, weight, bias, backend=backend)

    products = 2 if direction == "training" else 1
    compare(
        plain,
        ours,
        [x],
        direction,
        name="frozen_linear",
        refused_for=[x],
        case=f"frozen_linear {direction}, {rows} rows, {I} to {O}",
        flops=products * 2 * rows * I * O,
        bytes=products * (rows * (I + O) + I * O) * dtype.itemsize,
    )


@both_directions
@pytest.mark.parametrize("rows, D", measured((1576, 768), all=((514, 1024),)))
def bench_add_layer_norm(compare, draw, dtype, quick, rows, D, direction):
    rows = 17 if quick else rows
    x, y = draw(rows, D), draw(rows, D)

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]  # one tensor for autograd to start from

    def plain(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return both((total, F.layer_norm(total, (D,), eps=1e-6)))

    def ours(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return both(add_layer_norm(x, y, backend=backend))

    backward = direction == "training"
    compare(
        plain,
        ours,
        [x, y],
        direction,
        name="add_layer_norm",
        refused_for=[x, y],
        case=f"add_layer_norm {direction}, {rows} rows, D={D}",
        flops=(20 if backward else 8) * rows * D,
        bytes=(9 if backward else 5) * rows * D * dtype.itemsize,
    )
