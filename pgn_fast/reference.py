"""Every op in plain PyTorch, in data-flow order: what the kernels compute, in its shortest form.

These functions are a backend like any other, and the yardstick of the tests. They take any
floating-point dtype, float64 included. Notation: B images, P prompt tokens, K tokens in the token
library, N patches, S prefix tokens, D embedding width, h heads, T tokens of an image, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(logits: Tensor, activation: str = "softmax") -> Tensor:
    """Mixture coefficients of every prompt token: (B, P, K) -> (B, P, K)."""
    return logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid()


def mix_prompts(logits: Tensor, token_library: Tensor, activation: str = "softmax") -> Tensor:
    """prompts[b, p] = sum_k mixture(logits[b, p])[k] * token_library[k]."""
    return mixture(logits, activation) @ token_library  # (B, P, D)


def mix_prompts_backward(
    grad_prompts: Tensor, logits: Tensor, token_library: Tensor, activation: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Gradients of mix_prompts for logits (B, P, K) and token_library (K, D)."""
    coefficients = mixture(logits, activation)  # (B, P, K)
    grad_library = coefficients.flatten(0, 1).mT @ grad_prompts.flatten(0, 1)  # (K, D)
    grad_coefficients = grad_prompts @ token_library.mT  # (B, P, K)
    if activation == "softmax":
        mean = (coefficients * grad_coefficients).sum(dim=-1, keepdim=True)
        return coefficients * (grad_coefficients - mean), grad_library
    return coefficients * (1 - coefficients) * grad_coefficients, grad_library


def feedback_round(levels: Tensor, feedback: Tensor, order: Tensor) -> Tensor:
    """Round pixels to 8 bits one by one; those still to come absorb the error of those before.

    w[:, j] = levels[:, order[j]] - sum_{i<j} feedback[j, i] * (w[:, i] - q[:, i]),
    q = round(w) clipped to [0, 255]; levels (R, n), feedback (n, n), order (n,) -> uint8 (R, n).
    """
    w, errors = levels[:, order], torch.zeros_like(levels)
    rounded = torch.empty_like(levels, dtype=torch.uint8)
    for start in range(0, order.numel(), 64):
        stop = start + 64
        block = w[:, start:stop] - errors[:, :start] @ feedback[start:stop, :start].mT
        for j, pixel in enumerate(order[start:stop].tolist(), start):
            w_j = block[:, j - start] - errors[:, start:j] @ feedback[j, start:j]
            q_j = w_j.round().clamp(0, 255)
            errors[:, j] = w_j - q_j
            rounded[:, pixel] = q_j.to(torch.uint8)
    return rounded
