"""Frozen weights packed once for MKL's matrix product, in place of at every call (CPU, float32).

MKL's sgemm copies a weight into its own layout whenever it multiplies. A weight that never changes
can be packed once, for each number of rows: the same product to the bit, faster where that copy
shows, which depends on the processor (measured: 10-16 % on an AVX-512 Xeon, nothing on an EPYC).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fold import FrozenLinear

# below, packing saves less than the call through Python costs
_MIN_ROWS = 64
# row counts to keep packed weights for: a training batch and a validation batch
_KEPT = 2


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights cannot be packed; None where they can."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"MKL packs float32 weights on cpu, these are {dtype} on {device.type}"
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return "this build of torch has no MKL"
    return None


@dataclass
class PackedLinear(FrozenLinear):
    """A FrozenLinear that multiplies by packed copies of its weight."""

    packed: dict[tuple[bool, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return self.multiply(grad, transposed=True)

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        """x W^T + b, or x W where ``transposed``."""
        weight = self.weight.T if transposed else self.weight
        bias = None if transposed else self.bias
        rows = x.numel() // x.shape[-1]
        if rows < _MIN_ROWS or x.dtype != torch.float32:
            return torch.nn.functional.linear(x, weight, bias)
        found = self.packed.pop((transposed, rows), None)
        if found is None:
            mine = [key for key in self.packed if key[0] == transposed]
            for key in mine[: len(mine) + 1 - _KEPT]:
                del self.packed[key]
            weight = weight.detach().contiguous()
            found = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), weight
        self.packed[transposed, rows] = found  # the latest used comes last
        return torch.ops.mkl._mkl_linear(x.contiguous(), *found, bias, rows)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return linear.multiply(x, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.input_gradient(grad), None
