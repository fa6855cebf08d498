"""Every op in eager PyTorch, in data-flow order: what the kernels compute, in its shortest form.

These functions are a backend like any other, and the yardstick of the tests. They take any
floating-point dtype, float64 included. Notation: B images, P prompt tokens, K tokens in the token
library, N patches, S prefix tokens, D embedding width, h heads, Q queries and T keys of an image, d
head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


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


def normalize(images: Tensor, dtype: torch.dtype, scale: list[float], shift: list[float]) -> Tensor:
    """Pixels (B, C, H, W) -> pixel * scale[c] + shift[c], rounded once to ``dtype``."""
    if not scale:
        return images.to(dtype)
    pixels = images.to(torch.promote_types(dtype, torch.float32))
    return (pixels * _channels(scale, pixels) + _channels(shift, pixels)).to(dtype)


def _channels(values: list[float], like: Tensor) -> Tensor:
    """(C, 1, 1) on the device of ``like``; by fills, since a copy from the host would wait for the
    device and cannot stand in a CUDA graph."""
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def prompted_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor,
    logits: Tensor | None,
    token_library: Tensor | None,
    prompts: Tensor | None,
    scale: list[float],
    shift: list[float],
    activation: str,
    position: str,
) -> Tensor:
    """Patch embedding, prefix and prompt tokens of every image: (B, S + N + P, D).

    ``prefix`` (S, D) holds its position embedding already, ``pos_embed`` (N, D) is the patches';
    prompts are mixed from ``logits`` (B, P, K), or given: (P, D) or (B, P, D), or absent.
    """
    pixels = normalize(images, weight.dtype, scale, shift)  # (B, C, H, W)
    patches = F.conv2d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).mT  # (B, N, D)
    if pos_embed is not None:
        patches = patches + pos_embed
    B, _, D = patches.shape
    if logits is not None and token_library is not None:
        prompts = mix_prompts(logits, token_library, activation)
    prompts = prefix.new_empty(0, D) if prompts is None else prompts
    parts = [prefix.expand(B, -1, -1), patches, prompts.expand(B, -1, -1)]
    return torch.cat(parts if position == "append" else [parts[0], parts[2], parts[1]], dim=1)


def patch_embed_grad_images(
    grad_patches: Tensor, weight: Tensor, shape: torch.Size, scale: list[float]
) -> Tensor:
    """Gradient of the patch embedding, (B, D, rows, columns), for the images of ``shape``."""
    grad = conv2d_input(shape, weight, grad_patches, stride=weight.shape[2:])
    return grad * _channels(scale, grad) if scale else grad


def patch_embed_grad_weight(
    grad_patches: Tensor, images: Tensor, shape: torch.Size, scale: list[float], shift: list[float]
) -> Tensor:
    """Gradient of the patch embedding, (B, D, rows, columns), for the weight of ``shape``."""
    pixels = normalize(images, grad_patches.dtype, scale, shift)
    return conv2d_weight(pixels, shape, grad_patches, stride=shape[2:])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias: (..., I), (O, I), (O,) -> (..., O)."""
    return F.linear(x, weight, bias)


def add_layer_norm(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """total = x + y, its normalization over the last dimension, and 1 / sqrt(var + eps)."""
    total = x + y
    normed, _, rstd = torch.native_layer_norm(total, total.shape[-1:], None, None, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return total, normed, rstd.squeeze(-1).to(wide)


def add_layer_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, normed: Tensor, rstd: Tensor
) -> Tensor:
    """grad_total + rstd (g - mean(g) - normed mean(g normed)), g = grad_normed: of x and of y."""
    g, n = (t.to(rstd.dtype) for t in (grad_normed, normed))
    through = g - g.mean(dim=-1, keepdim=True) - n * (g * n).mean(dim=-1, keepdim=True)
    return (grad_total + rstd.unsqueeze(-1) * through).to(normed.dtype)


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the prompts' and the tokens' keys together.

    q (B, h, Q, d); k, v (B, h, T, d); prompt_k, prompt_v (h, P, d) or (B, h, P, d)
    -> attended (B, h, Q, d) and log-sum-exp of the scores (B, h, Q).
    """
    scores = scale * q @ _beside(prompt_k, k).mT  # (B, h, Q, P + T)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=-1)
    return scores.softmax(dim=-1) @ _beside(prompt_v, v), lse


def prompt_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_q: bool = True,
    grad_kv: bool = True,
    grad_prompts: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of prompt_attention for q, k, v, prompt_k and prompt_v; unwanted ones empty."""
    P, keys, values = prompt_k.shape[-2], _beside(prompt_k, k), _beside(prompt_v, v)
    weights = (scale * q @ keys.mT - lse.unsqueeze(-1)).exp().to(q.dtype)  # (B, h, Q, P + T)
    mean = (grad_out * out).sum(dim=-1, keepdim=True)
    grad_scores = scale * weights * (grad_out @ values.mT - mean)
    both = grad_scores.mT @ q, weights.mT @ grad_out  # of keys and of values: (B, h, P + T, d)
    of_prompts = [grad[:, :, :P] for grad in both]
    if prompt_k.ndim == 3:  # shared by the batch
        of_prompts = [grad.sum(dim=0) for grad in of_prompts]
    none = q.new_empty(0)
    return (
        grad_scores @ keys if grad_q else none,
        both[0][:, :, P:].contiguous() if grad_kv else none.clone(),
        both[1][:, :, P:].contiguous() if grad_kv else none.clone(),
        of_prompts[0].contiguous() if grad_prompts else none.clone(),
        of_prompts[1].contiguous() if grad_prompts else none.clone(),
    )


def prompt_attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    ranges: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """prompt_attention where image b sees rows [begin, end) = ranges[b] of prompt_k and prompt_v
    (h, P, d): of all scores those of the other rows are left out."""
    row = torch.arange(prompt_k.shape[1], device=q.device)
    seen = (ranges[:, :1] <= row) & (row < ranges[:, 1:])  # (B, P)
    hidden = F.pad(~seen, (0, k.shape[2]), value=False)[:, None, None]  # (B, 1, 1, P + T)
    scores = (scale * q @ _beside(prompt_k, k).mT).masked_fill(hidden, -torch.inf)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=-1)
    # 0 * inf would let a row that is left out show
    own_v = torch.where(seen[:, None, :, None], prompt_v, 0)
    return scores.softmax(dim=-1) @ _beside(own_v, v), lse


def _beside(prompts: Tensor, tokens: Tensor) -> Tensor:
    """(h, P, d) or (B, h, P, d) in front of (B, h, T, d)."""
    return torch.cat([prompts.expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def feedback_round(levels: Tensor, feedback: Tensor, order: Tensor) -> Tensor:
    """Round pixels to 8 bits one by one; those still to come absorb the error of those before.

    w[:, j] = levels[:, order[j]] - sum_{i<j} feedback[j, i] * (w[:, i] - q[:, i]),
    q = round(w) clipped to [0, 255]; levels (R, n), feedback (n, n), order (n,) -> uint8 (R, n).
    """
    return feedback_integers(levels, feedback, order, 0, 255).to(torch.uint8)


def feedback_integers(
    levels: Tensor, feedback: Tensor, order: Tensor, low: float, high: float
) -> Tensor:
    """As feedback_round, for integers from ``low`` to ``high``, in the dtype of ``levels``."""
    w, errors = levels[:, order], torch.zeros_like(levels)
    rounded = torch.empty_like(levels)
    for start in range(0, order.numel(), 64):
        stop = start + 64
        block = w[:, start:stop] - errors[:, :start] @ feedback[start:stop, :start].mT
        for j, pixel in enumerate(order[start:stop].tolist(), start):
            w_j = block[:, j - start] - errors[:, start:j] @ feedback[j, start:j]
            rounded[:, pixel] = w_j.round().clamp(low, high)
            errors[:, j] = w_j - rounded[:, pixel]
    return rounded
