"""How autotune calls an op: by the first of its examples, at a model's sizes and at odd ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.examples import ODD, Example, Sizes, examples

__all__ = ["ODD", "Call", "Sizes", "case", "in_float64", "results", "strided"]

Call = Callable[..., Any]


def case(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """The call that is verified and timed; the same tensors in every process."""
    return examples(op, sizes, dtype, device)[0]


def results(function: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The outputs and every gradient, of a fixed gradient of each output."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in tensors if x.requires_grad]
    ramps = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape) for x in outputs]
    grads = [ramp.to(x) for ramp, x in zip(ramps, outputs, strict=True)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, grads)]


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
