"""How the tests of the ops judge a kernel: against float64 on the same rounded inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Allowed error against float64, as a fraction of the largest expected value. Outputs are rounded
# once (eps / 2); the rest is head-room for float32 sums and for gradients that add many rows.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_matches(
    name: str, actual: Tensor, expected: Tensor, terms: Tensor | None = None
) -> None:
    """``actual`` in any dtype equals the float64 ``expected`` within its dtype's tolerance.

    ``terms``: of a plain sum, the sum of the absolute values of what is added. The rounding of a
    sum is a fraction of that, however small the sum becomes by cancellation.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    assert expected.dtype == torch.float64, f"{name}: expected values must be float64"
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - expected.to(actual.device)).abs().max()
    largest = (
        (expected if terms is None else terms).abs().max().clamp_min(torch.finfo(actual.dtype).tiny)
    )
    assert error <= TOLERANCE[actual.dtype] * largest, (
        f"{name}: error {error / largest:.2e} of the largest value, allowed "
        f"{TOLERANCE[actual.dtype]:.0e} for {actual.dtype}"
    )


def leaves64(*tensors: Tensor) -> list[Tensor]:
    """Float64 copies of rounded inputs, on the CPU, ready for gradients."""
    return [t.detach().double().cpu().requires_grad_() for t in tensors]
