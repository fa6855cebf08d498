"""The backend "cpu" of ``frozen_linear``: the oneDNN that is bundled with torch.

torch multiplies float32 matrices by MKL, whose AVX-512 kernels run on Intel's processors alone. On
others it stays with AVX2: half the speed of oneDNN's kernels on an AMD EPYC with AVX-512. On Intel
the two are equal.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional as F

# multiplications below which oneDNN's call, 12 us, costs more than its kernels win
_SMALLEST = 2**20


def missing() -> str | None:
    """Reason oneDNN's linear layer is unavailable here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch does not offer oneDNN's linear layer"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"oneDNN is used on x86-64 alone, this is {platform.machine()}"
    return None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run. x (..., I), weight (O, I), bias (O,) or None, float32: see ops.frozen_linear."""
    if x.numel() * weight.shape[0] < _SMALLEST:
        return F.linear(x, weight, bias)
    return multiply(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN; ``weight`` as it is, or as ``pack`` returned it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight (O, I) in the layout that oneDNN multiplies by, for ``multiply``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
