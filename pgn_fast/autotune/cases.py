"""The ops as autotune measures them: inputs at a model's own sizes, odd ones, and the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference

Call = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in the letters of ``reference``; h heads of D / h."""

    B: int = 8
    D: int = 768
    h: int = 12
    patch: int = 16
    image: int = 224
    P: int = 16
    K: int = 256

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


ODD = Sizes(B=3, D=36, h=3, patch=6, image=18, P=5, K=7)  # divides no block, aligned to nothing


def inputs(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs of an op, those that get a gradient marked; the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.requires_grad_() if grad else x

    s = sizes
    if op == "mix_prompts":
        return [draw(s.B, s.P, s.K), draw(s.K, s.D)]
    if op == "add_layer_norm":
        return [draw(s.B, s.tokens, s.D), draw(s.B, s.tokens, s.D)]
    if op == "prompt_attention":
        heads = [draw(s.B, s.h, s.tokens, s.D // s.h) for _ in range(3)]
        return [*heads, *(draw(s.h, s.P, s.D // s.h) for _ in range(2))]
    if op == "prompted_patch_embed":
        pixels = torch.randint(0, 256, (s.B, 3, s.image, s.image), generator=generator)
        weight = draw(s.D, 3, s.patch, s.patch, grad=False) * (3 * s.patch**2) ** -0.5
        rest = [draw(s.D, grad=False), draw(s.tokens - 1, s.D, grad=False)]
        rest += [draw(1, s.D, grad=False), draw(s.B, s.P, s.K), draw(s.K, s.D)]
        return [pixels.to(device, torch.uint8), weight, *rest]
    raise ValueError(f"no case for {op}")


def call(op: str, backend: str) -> Call:
    """The op by a named backend, as a function of ``inputs``; returns one tensor."""
    named: dict[str, Call] = {
        "mix_prompts": lambda *x: ops.mix_prompts(*x, backend=backend),
        "add_layer_norm": lambda *x: ops.add_layer_norm(*x, backend=backend)[1],
        "prompt_attention": lambda *x: ops.prompt_attention(*x, backend=backend),
        "prompted_patch_embed": partial(
            ops.prompted_patch_embed, mean=[0.48] * 3, std=[0.27] * 3, backend=backend
        ),
    }
    return named[op]


def plain(op: str) -> Call:
    """The same in plain torch with torch's own autograd: what a user has without this library."""
    named: dict[str, Call] = {
        "mix_prompts": reference.mix_prompts,
        "add_layer_norm": lambda x, y: reference.add_layer_norm(x, y, 1e-6)[1],
        "prompt_attention": lambda q, k, v, pk, pv: (
            torch.nn.functional.scaled_dot_product_attention(
                *(q, torch.cat([_each(pk, k), k], 2), torch.cat([_each(pv, v), v], 2))
            )
        ),
        "prompted_patch_embed": _patch_embed,
    }
    return named[op]


def _patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    prefix: Tensor,
    logits: Tensor,
    library: Tensor,
) -> Tensor:
    scale, shift = [1 / (255 * 0.27)] * 3, [-0.48 / 0.27] * 3
    tensors = images, weight, bias, pos, prefix, logits, library
    return reference.prompted_patch_embed(*tensors, None, scale, shift, "softmax", "append")


def _each(prompts: Tensor, tokens: Tensor) -> Tensor:
    return prompts.expand(len(tokens), -1, -1, -1)


def results(function: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The output and every gradient, of a fixed gradient of the output."""
    out = function(*tensors)
    wanted = [x for x in tensors if x.requires_grad]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, ramp.to(out.device, out.dtype))]


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    """The same rounded inputs in float64 on the CPU; pixels stay bytes."""
    found = []
    for x in tensors:
        y = x.detach().cpu()
        y = y if y.dtype == torch.uint8 else y.double()
        found.append(y.requires_grad_(x.requires_grad))
    return found


def strided(tensors: list[Tensor]) -> list[Tensor]:
    """The same values as slices of larger tensors, their last dimension no longer dense."""
    found = []
    for x in tensors:
        y = torch.stack([x.detach(), x.detach()], dim=-1)[..., 0]
        found.append(y.requires_grad_(x.requires_grad))
    return found
