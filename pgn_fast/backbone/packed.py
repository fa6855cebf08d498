"""Frozen weights packed once for the GEMM library, instead of at every call (CPU, float32).

Both libraries that come with torch copy a weight into a layout of their own whenever they multiply;
a weight that never changes can be packed once. On Intel's processors that is MKL's sgemm, which
wants a copy for each number of rows (measured: 10-16 % faster on an AVX-512 Xeon); elsewhere
oneDNN, whose copy serves any number (a training step takes 7-9 % less time on an EPYC).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..ops import frozen_linear, onednn
from ..ops._register import transformed
from .weights import FrozenLinear

# below, packing saves less than the call through Python costs
_MIN_ROWS = 64
# row counts to keep MKL's packed weights for: a training batch and a validation batch
_KEPT = 2


@functools.cache
def gemm_library() -> str | None:
    """Which library packs weights on this processor, "mkl" or "onednn"; None where neither can."""
    if _native.build_info().get("cpu_vendor") == "intel" and _has_mkl():
        return "mkl"
    return "onednn" if onednn.missing() is None else None


def _has_mkl() -> bool:
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights cannot be packed; None where they can."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"float32 weights are packed on cpu, these are {dtype} on {device.type}"
    return None if gemm_library() else f"no library packs weights here: {onednn.missing()}"


@dataclass
class PackedLinear(FrozenLinear):
    """A FrozenLinear that multiplies by packed copies of its weight.

    Attributes:
        packed: the copies, by direction and number of rows (0 for oneDNN: any).
    """

    packed: dict[tuple[bool, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, transposed=False)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return self._product(grad, transposed=True)

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        if transformed():  # torch.func sees through torch's own product alone
            return super().input_gradient(x) if transposed else super().__call__(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _PackedProduct.apply(x, self, transposed)
        return self.multiply(x, transposed)

    def without_bias(self) -> PackedLinear:
        """The same weight and the same packed copies."""
        return PackedLinear(self.weight, None, self.backend, self.packed)

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        """x W^T + b, or x W where ``transposed``."""
        weight = self.weight.T if transposed else self.weight
        bias = None if transposed else self.bias
        rows = x.numel() // x.shape[-1]
        if rows < _MIN_ROWS or x.dtype != torch.float32:
            return frozen_linear(x, weight, bias)
        if gemm_library() == "onednn":
            found = self.packed.get((transposed, 0))
            if found is None:
                found = self.packed[transposed, 0] = onednn.pack(weight), weight
            return onednn.multiply(x, found[0], bias)
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
    """``linear.multiply``, differentiable any number of times: the gradient is such a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear, transposed: bool) -> Tensor:
        ctx.linear, ctx.transposed = linear, transposed
        return linear.multiply(x, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # without the bias: the product the other way round has none, and neither has a gradient
        linear = ctx.linear if not ctx.transposed else ctx.linear.without_bias()
        return linear._product(grad, not ctx.transposed), None, None
