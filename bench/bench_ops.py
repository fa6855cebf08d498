"""Every fused op, backend and direction at the sizes of PGN, always beside plain torch.

"eager" and "compile" are what somebody without this package would write; the ratios of
``bench/report.py`` are against the faster of the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rows import DEVICE
from torch import Tensor

from pgn_fast.ops import (
    add_layer_norm,
    frozen_linear,
    mix_prompts,
    prompt_attention,
    prompted_patch_embed,
)
from pgn_fast.ops.dispatch import refusal

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
OURS = ["triton", "cuda"] if ON_GPU else ["cpu"]
CONTENDERS = ["eager", "compile", *OURS]

# name: patch size, width, heads, prompts
VITS = {"B/32": (32, 768, 12, 16), "B/16": (16, 768, 12, 16), "L/14": (14, 1024, 16, 16)}
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def sizes(*usual: Any, full: list[Any]) -> list[Any]:
    return [*usual, *(pytest.param(*size, marks=pytest.mark.full) for size in full)]


def implementation(contender: str, plain: Callable[..., Any], op: Callable[..., Any]) -> Any:
    if contender == "eager":
        return plain
    if contender == "compile":
        torch.compiler.reset()  # one compiled function a case, none recompiled for the next
        return torch.compile(plain, dynamic=False)
    return functools.partial(op, backend=contender)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def call(function: Callable[..., Tensor], leaves: list[Tensor], backward: bool) -> Any:
    """A run of the forward without a graph, or of forward and backward for all ``leaves``."""
    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return function()

        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, grad)


def skip_unless(contender: str, op: str, *tensors: Tensor, quick: bool) -> None:
    if contender == "compile" and quick:
        pytest.skip("compiling takes longer than a smoke test may")
    if contender in OURS and (reason := refusal(contender, op, *tensors)):
        pytest.skip(reason)


both_directions = pytest.mark.parametrize("direction", ["forward", "training"])
every_contender = pytest.mark.parametrize("contender", CONTENDERS)


@every_contender
@both_directions
@pytest.mark.parametrize(
    "B, K, D",
    sizes((1, 256, 768), (64, 256, 768), full=[(512, 256, 768), (1, 4096, 768), (64, 4096, 1024)]),
)
def bench_mix_prompts(measure, quick, B, K, D, direction, contender):
    P = 16
    B, backward = 1 if quick else B, direction == "training"
    logits, library = draw(B, P, K), draw(K, D)
    skip_unless(contender, "mix_prompts", logits, quick=quick)

    def plain(logits: Tensor, library: Tensor) -> Tensor:
        return logits.softmax(dim=-1) @ library

    function = functools.partial(implementation(contender, plain, mix_prompts), logits, library)
    products = 3 if backward else 1
    measure(
        call(function, [logits, library], backward),
        suite="ops",
        case=f"mix_prompts {direction}, B={B}, P={P}, K={K}, D={D}",
        dtype=DTYPE,
        op="mix_prompts",
        direction=direction,
        contender=contender,
        flops=products * 2 * B * P * K * D,
        bytes=products * (B * P * (K + D) + K * D) * DTYPE.itemsize,
    )


@every_contender
@both_directions
@pytest.mark.parametrize(
    "vit, B",
    sizes(
        ("B/32", 1),
        ("B/32", 8),
        ("B/16", 8),
        full=[("B/16", 1), ("L/14", 8), ("B/32", 64), ("B/16", 64), ("B/32", 512)],
    ),
)
def bench_prompted_patch_embed(measure, quick, vit, B, direction, contender):
    p, D, _, P = VITS[vit]
    K, size, backward = 256, (2 * p if quick else 224), direction == "training"
    B, N = 1 if quick else B, (size // p) ** 2
    images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=DEVICE)
    weight, bias, pos_embed = draw(D, 3, p, p), draw(D), draw(1, 1 + N, D)
    prefix, logits, library = draw(1, 1, D), draw(B, P, K), draw(K, D)
    skip_unless(contender, "prompted_patch_embed", weight, images, quick=quick)
    mean, std = (torch.tensor(x, device=DEVICE)[:, None, None] for x in (MEAN, STD))

    def plain(images: Tensor, logits: Tensor, library: Tensor) -> Tensor:
        pixels = ((images.float() / 255 - mean) / std).to(DTYPE)
        patches = F.conv2d(pixels, weight, bias, stride=p).flatten(2).mT
        tokens = torch.cat([prefix.expand(B, -1, -1), patches], dim=1) + pos_embed
        return torch.cat([tokens, logits.softmax(dim=-1) @ library], dim=1)

    def ours(images: Tensor, logits: Tensor, library: Tensor, backend: str) -> Tensor:
        return prompted_patch_embed(
            images,
            weight,
            bias,
            pos_embed,
            prefix,
            logits,
            library,
            mean=MEAN,
            std=STD,
            backend=backend,
        )

    function = functools.partial(implementation(contender, plain, ours), images, logits, library)
    mixing = (3 if backward else 1) * 2 * B * P * K * D
    measure(
        call(function, [logits, library], backward),
        suite="ops",
        case=f"prompted_patch_embed {direction}, ViT-{vit}, B={B}, P={P}, K={K}, uint8",
        dtype=DTYPE,
        op="prompted_patch_embed",
        direction=direction,
        contender=contender,
        flops=2 * B * N * 3 * p * p * D + mixing,
        bytes=images.numel()
        + (weight.numel() + pos_embed.numel() + library.numel() + B * (1 + N + P) * D)
        * DTYPE.itemsize,
    )


@every_contender
@both_directions
@pytest.mark.parametrize(
    "vit, B, P, Q",
    sizes(
        ("B/16", 4, 50, None), ("B/16", 4, 10, None), ("B/16", 4, 0, None), ("B/16", 4, 50, 1),
        full=[("B/32", 8, 50, None), ("B/16", 4, 200, None), ("L/14", 2, 50, None),
              ("B/16", 64, 50, None)],
    ),
)  # fmt: skip
def bench_prompt_attention(measure, quick, vit, B, P, Q, direction, contender):
    p, D, h, _ = VITS[vit]
    T, d, backward = 1 + (5 if quick else (224 // p) ** 2), D // h, direction == "training"
    B = 1 if quick else B * (16 if ON_GPU else 1)
    Q = T if Q is None else Q
    qkv = draw(B, T, 3, h, d).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0][:, :, :Q].detach(), qkv[1].detach(), qkv[2].detach()
    prompt_k, prompt_v = draw(h, P, d), draw(h, P, d)
    skip_unless(contender, "prompt_attention", q, quick=quick)

    def plain(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        keys = torch.cat([prompt_k.expand(B, -1, -1, -1), k], dim=2)
        values = torch.cat([prompt_v.expand(B, -1, -1, -1), v], dim=2)
        return F.scaled_dot_product_attention(q, keys, values)

    tensors = [q, k, v, prompt_k, prompt_v]
    function = functools.partial(implementation(contender, plain, prompt_attention), *tensors)
    moved = sum(t.numel() for t in tensors) + q.numel()
    measure(
        call(function, tensors, backward),
        suite="ops",
        case=f"prompt_attention {direction}, ViT-{vit}, B={B}, P={P}, {Q} queries",
        dtype=DTYPE,
        op="prompt_attention",
        direction=direction,
        contender=contender,
        flops=(7 if backward else 2) * 2 * B * h * Q * (T + P) * d,
        bytes=(3 if backward else 1) * moved * DTYPE.itemsize,
    )


@every_contender
@both_directions
@pytest.mark.parametrize(
    "rows, I, O",
    sizes((1576, 768, 3072), (1576, 3072, 768), (50, 768, 1536), full=[(8, 768, 768)]),
)
def bench_frozen_linear(measure, quick, rows, I, O, direction, contender):  # noqa: E741
    rows, backward = 17 if quick else rows, direction == "training"
    x, weight, bias = draw(rows, I), draw(O, I), draw(O)
    skip_unless(contender, "frozen_linear", x, quick=quick)

    def plain(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def ours(x: Tensor, backend: str) -> Tensor:
        return frozen_linear(x, weight, bias, backend=backend)

    products = 2 if backward else 1
    measure(
        call(functools.partial(implementation(contender, plain, ours), x), [x], backward),
        suite="ops",
        case=f"frozen_linear {direction}, {rows} rows, {I} to {O}",
        dtype=DTYPE,
        op="frozen_linear",
        direction=direction,
        contender=contender,
        flops=products * 2 * rows * I * O,
        bytes=products * (rows * (I + O) + I * O) * DTYPE.itemsize,
    )


@every_contender
@both_directions
@pytest.mark.parametrize("rows, D", sizes((1576, 768), full=[(514, 1024)]))
def bench_add_layer_norm(measure, quick, rows, D, direction, contender):
    rows, backward = 17 if quick else rows, direction == "training"
    x, y = draw(rows, D), draw(rows, D)
    skip_unless(contender, "add_layer_norm", x, y, quick=quick)

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]  # one tensor for autograd to start from

    def plain(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return both((total, F.layer_norm(total, (D,), eps=1e-6)))

    def ours(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return both(add_layer_norm(x, y, backend=backend))

    passes = 9 if backward else 5
    measure(
        call(functools.partial(implementation(contender, plain, ours), x, y), [x, y], backward),
        suite="ops",
        case=f"add_layer_norm {direction}, {rows} rows, D={D}",
        dtype=DTYPE,
        op="add_layer_norm",
        direction=direction,
        contender=contender,
        flops=(20 if backward else 8) * rows * D,
        bytes=passes * rows * D * DTYPE.itemsize,
    )
