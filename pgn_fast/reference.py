"""Every op in plain PyTorch, in data-flow order: what the kernels compute, in its shortest form.

These functions are a backend like any other, and the yardstick of the tests. They take any
floating-point dtype, float64 included. Notation: B images, P prompt tokens, K tokens in the token
library, N patches, S prefix tokens, D embedding width, h heads, T tokens of an image, d head width.
"""

from __future__ import annotations

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
