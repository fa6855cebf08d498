"""Small problems for the Triton launchers, forward and backward, judged against float64.

Sizes that no tile divides, and more than one tile along every loop. ``module`` is the kernel's own
module, or a mutant of it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from numerics import assert_matches
from torch import Tensor

from pgn_fast import reference
from pgn_fast.autotune.cases import in_float64 as leaves_in_float64
from pgn_fast.autotune.cases import results
from pgn_fast.ops.examples import Sizes, examples

SIZES = Sizes(B=3, D=70, h=2, patch=6, image=36, P=7, K=70)


def check(
    op: str,
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **variant: Any,
) -> None:
    """The op's own check, or its examples, forward and backward, by the kernels of ``module``."""
    if op in CHECKS:
        return CHECKS[op](module, device, dtype, **variant)
    public = importlib.import_module(f"pgn_fast.ops.{op}")
    for example in examples(op, SIZES, dtype, device):
        framed = [
            inside_nan(t.detach()).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in example.tensors
        ]
        launcher = lambda name, *_, **__: getattr(module, name)
        with mock.patch.object(public, "select_kernel", launcher):
            found = results(example.call("triton"), framed)
        exact = results(example.call("reference"), leaves_in_float64(example.tensors))
        for i, (actual, expected) in enumerate(zip(found, exact, strict=True)):
            assert_matches(f"{op}, result {i}", actual, expected)


def check_mix_prompts(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    activation: str = "softmax",
) -> None:
    B, P, K, D = 3, 7, 70, 65
    # rows of a larger buffer of NaN: reading one column or row too many shows
    # logits that rise along the library: the running maximum changes in every tile
    rising = torch.randn(B, P, K, device=device) + torch.linspace(0, 4, K, device=device)
    logits = inside_nan(rising.to(dtype))
    grad_prompts = inside_nan(torch.randn(B, P, D, dtype=dtype, device=device))
    library = torch.randn(K, D, dtype=dtype, device=device)
    logits64, library64, grad64 = in_float64(logits, library, grad_prompts)
    prompts = module.mix_prompts(logits, library, activation)
    assert_matches("prompts", prompts, reference.mix_prompts(logits64, library64, activation))
    grads = module.mix_prompts_backward(grad_prompts, logits, library, activation)
    grads64 = reference.mix_prompts_backward(grad64, logits64, library64, activation)
    for name, actual, expected in zip(("logits", "library"), grads, grads64, strict=True):
        assert_matches(f"grad_{name}", actual, expected)


def check_prompt_attention(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    queries: int | None = None,
    shared: bool = True,
    d: int = 40,
) -> None:
    B, H, T, P = 2, 3, 70, 37
    scale = d**-0.5
    qkv = inside_nan(torch.randn(B, T, 3, H, d, dtype=dtype, device=device))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q = q[:, :, :queries]
    shape = (2, H, P, d) if shared else (2, B, H, P, d)
    prompt_k, prompt_v = inside_nan(torch.randn(shape, dtype=dtype, device=device)).unbind(0)
    grad_out = inside_nan(torch.randn(q.shape, dtype=dtype, device=device))
    inputs = q, k, v, prompt_k, prompt_v
    out, lse = module.prompt_attention(*inputs, scale)
    inputs64, (grad64,) = in_float64(*inputs), in_float64(grad_out)
    out64, lse64 = reference.prompt_attention(*inputs64, scale)
    assert_matches("out", out, out64)
    assert_matches("lse", lse, lse64)
    wanted = True, True, True
    grads = module.prompt_attention_backward(grad_out, *inputs, out, lse, scale, *wanted)
    grads64 = reference.prompt_attention_backward(grad64, *inputs64, out64, lse64, scale)
    names = "q", "k", "v", "prompt_k", "prompt_v"
    for name, actual, expected in zip(names, grads, grads64, strict=True):
        assert_matches(f"grad_{name}", actual, expected)


def check_ragged_attention(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    queries: int | None = None,
) -> None:
    """Ranges that end within a tile, share rows, and are empty; NaN in the rows of nobody."""
    H, T, P, d = 3, 70, 90, 40
    ranges = torch.tensor([[0, 70], [70, 70], [65, 75], [3, 4], [0, 70]], device=device)
    B, scale = len(ranges), d**-0.5
    qkv = inside_nan(torch.randn(B, T, 3, H, d, dtype=dtype, device=device))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prompts = inside_nan(torch.randn(2, H, P, d, dtype=dtype, device=device))
    prompts[:, :, 75:] = torch.nan
    inputs = q[:, :, :queries], k, v, *prompts.unbind(0)
    out, lse = module.prompt_attention_ragged(*inputs, ranges, scale)
    out64, lse64 = reference.prompt_attention_ragged(*in_float64(*inputs), ranges.cpu(), scale)
    assert_matches("out", out, out64)
    assert_matches("lse", lse, lse64)


def check_prompted_patch_embed(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    uint8: bool = True,
    channels_last: bool = False,
) -> None:
    B, C, patch, D, S, P, K = 3, 3, 6, 70, 2, 3, 20
    shape = (B, C, 5 * patch, 3 * patch)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    images = images if uint8 else (images / 255).to(dtype)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    draw = lambda *size: torch.randn(size, dtype=dtype, device=device)
    weight, bias, pos_embed, prefix = draw(D, C, patch, patch), draw(D), draw(15, D), draw(S, D)
    logits, library = draw(B, P, K), draw(K, D)
    largest = 255 if uint8 else 1
    options = (
        [1 / (largest * s) for s in (0.2, 0.3, 0.25)],
        [-2.1, -1.5, -1.8],
        "softmax",
        "prepend",
    )
    tensors = weight, bias, pos_embed, prefix, logits, library
    tokens = module.prompted_patch_embed(images, *tensors, None, *options)
    images64 = images.cpu() if uint8 else images.double().cpu()
    expected = reference.prompted_patch_embed(images64, *in_float64(*tensors), None, *options)
    assert_matches("tokens", tokens, expected)


def check_add_layer_norm(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    add: bool = True,
) -> None:
    R, D, eps = 5, 70, 1e-6
    draw = lambda: torch.randn(R, D, dtype=dtype, device=device)
    x, y, grad_total, grad_normed = draw() + 3, draw(), draw(), draw()
    total, normed, rstd = module.add_layer_norm(x, y if add else None, eps)
    grad = module.add_layer_norm_backward(grad_total if add else None, grad_normed, normed, rstd)
    x64, y64, grad_total64, grad_normed64 = in_float64(x, y, grad_total, grad_normed)
    if add:
        assert_matches("total", total, x64 + y64)
    # statistics are those of the rounded sum
    total64 = total.double().cpu().requires_grad_()
    normed64 = torch.nn.functional.layer_norm(total64, (D,), eps=eps)
    (grad64,) = torch.autograd.grad(normed64, total64, grad_normed64)
    assert_matches("normed", normed, normed64.detach())
    assert_matches("grad", grad, grad64 + grad_total64 if add else grad64)


def check_feedback_round(
    module: ModuleType, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Its pixels are float32 whatever ``dtype`` is; at ties a whole row may differ."""
    (example,) = examples("feedback_round", SIZES, torch.float32, device)
    levels, feedback, order = example.tensors
    levels = inside_nan(levels + torch.rand_like(levels))
    rounded = module.feedback_round(levels, inside_nan(feedback), order)
    expected = reference.feedback_round(*in_float64(levels, feedback), order.cpu())
    assert (rounded.cpu() != expected).any(dim=1).double().mean() <= 0.35


def inside_nan(x: Tensor) -> Tensor:
    """``x`` as a view into a buffer that is NaN everywhere else, its last stride still 1."""
    buffer = x.new_full([n + 3 for n in x.shape], float("nan"))
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def in_float64(*tensors: Tensor) -> list[Tensor]:
    return [t.double().cpu() for t in tensors]


# ops whose kernels have more to check than the op's examples say: strides, variants, ties
CHECKS = {
    "mix_prompts": check_mix_prompts,
    "prompt_attention": check_prompt_attention,
    "prompted_patch_embed": check_prompted_patch_embed,
    "add_layer_norm": check_add_layer_norm,
    "feedback_round": check_feedback_round,
}
