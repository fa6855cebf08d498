"""Rounding to 8 bits with error feedback: the factor, and what it will cost, known in advance.

Each pixel is rounded in turn and its error is absorbed, by least squares in the token A u, by the
pixels that are not rounded yet. That is Babai's nearest plane on the lattice A Z^n, and GPTQ's
weight rounding with pixels for weights and A^T A for the Hessian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops import feedback_round

DAMPING = 1e-3


@dataclass(frozen=True)
class FeedbackRounding:
    """How the pixels of one patch are rounded; made once for a token map A (D, n).

    Attributes:
        feedback: (n, n) float32, strictly lower: the share of each earlier pixel's error that a
            pixel absorbs.
        order: (n,) int64, pixels from the one that moves the token most to the least.
        token_error: expected rms of \\|A (q - u)\\| over uniformly distributed rounding errors, in
            token units.
        nearest_token_error: the same for plain rounding.
        swing: largest rms distance, in levels, between a pixel and its value before rounding that
            the feedback causes. Three times that is the margin to leave to 0 and 255.
    """

    feedback: Tensor
    order: Tensor
    token_error: float
    nearest_token_error: float
    swing: float

    @classmethod
    def from_map(cls, A: Tensor, damping: float = DAMPING) -> FeedbackRounding:
        """Factorize A^T A, float64, O(n^3): about 2 s for n = 3072 on one core.

        Args:
            A: token change per level, (D, n).
            damping: multiple of the mean of diag(A^T A) that is added to the diagonal. Less gives
                a smaller error until pixels saturate, and then a far larger one: the swing grows.

        H = A_o^T A_o + damping; H = R R^T with R upper triangular, so that H^-1 = U^T U with
        U = R^-1; GPTQ's feedback from pixel i on pixel j > i is U[i, j] / U[i, i].
        """
        A = A.double()
        n = A.shape[1]
        order = A.norm(dim=0).argsort(descending=True, stable=True)
        ordered = A[:, order]
        hessian = ordered.T @ ordered
        # the least float64 floor keeps H positive definite for an all-zero map too
        mean = max(hessian.diagonal().mean().item(), torch.finfo(torch.float64).tiny * n)
        hessian.diagonal().add_(damping * mean)
        # Cholesky gives lower factors: flipping rows and columns turns it into the upper one
        R = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
        U = torch.linalg.solve_triangular(R, torch.eye(n, dtype=A.dtype), upper=True)
        unit = (U / U.diagonal()[:, None]).T  # (j, i): lower triangular, ones on the diagonal
        # q - u = -unit @ delta with delta uniform in [-1/2, 1/2]
        token_error = (ordered @ unit).norm().item() / math.sqrt(12)
        feedback = unit.tril(-1)
        return cls(
            feedback.float().contiguous(),
            order,
            token_error,
            A.norm().item() / math.sqrt(12),
            feedback.square().sum(dim=1).max().div(12).sqrt().item(),
        )

    def settings(self) -> dict[str, Any]:
        """What is not a tensor, as plain JSON values."""
        return {
            "token_error": self.token_error,
            "nearest_token_error": self.nearest_token_error,
            "swing": self.swing,
        }

    @property
    def gain(self) -> float:
        """How many times smaller the token error is than with plain rounding, as predicted."""
        return self.nearest_token_error / self.token_error

    @property
    def margin(self) -> float:
        """Levels to leave free at both ends of the gamut: 3.5 times the swing, whole levels."""
        return float(math.ceil(3.5 * self.swing))

    def __call__(self, levels: Tensor, *, backend: str | None = None) -> Tensor:
        """Levels (..., n), floating point -> uint8 of the same shape."""
        rows, device = levels.reshape(-1, levels.shape[-1]), levels.device
        if device not in self._on_device:
            self._on_device[device] = (self.feedback.to(device), self.order.to(device))
        return feedback_round(rows, *self._on_device[device], backend=backend).reshape(levels.shape)

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """Feedback and order where they were needed: 38 MB are not copied for every image."""
        return {}
