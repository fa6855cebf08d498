"""The affine algebra of a frozen block, folded into its weights.

With a norm's gain g and shift e, an attention scale s, and LayerScale gains c, for
x_hat = (x - mean) / std (all in float64, rounded once):

    W_qkv (g x_hat + e) + b_qkv  =  (W_qkv g) x_hat + (b_qkv + W_qkv e)        norm into Linear
    softmax(s q k)               =  softmax((s q) k)                           scale into W_q, b_q
    softmax_j(q (k_j + b_k))     =  softmax_j(q k_j)            the key bias shifts all alike
    sum_j p_j (v_j + b_v)        =  (sum_j p_j v_j) + b_v       p sums to one: W_o b_v joins b_o
    c (W_o o + b_o)              =  (c W_o) o + c b_o                         LayerScale into Linear
    W_2 (u sigmoid(a u))         =  (W_2 / a) silu(a u)      a = 1.702 (QuickGELU) into W_1 and W_2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.layers import activations
from torch import Tensor, nn

from .families import Family
from .options import FastOptions
from .weights import BlockWeights, FrozenLinear, Norm, from_timm

_QUICK_GELU = 1.702


@torch.no_grad()
@torch.inference_mode(False)  # tensors made in inference mode could not be saved for a backward
def fold_block(
    family: Family,
    backbone: Any,
    i: int,
    options: FastOptions,
    dtype: torch.dtype,
    backend_for: Callable[[str], str],
) -> BlockWeights:
    """Block ``i`` with its affine algebra folded, in ``dtype``.

    Weights that stay as they are (an output projection without LayerScale, say) are timm's own
    tensors where the dtype is theirs too.
    """
    w = from_timm(family, backbone, i, backend_for)
    qkv, out, fc1, fc2 = (_wide(linear) for linear in (w.qkv, w.out, w.fc1, w.fc2))
    A = w.attn_dim

    if options.fold:
        w.norm1, qkv = _fold_norm(w.norm1, qkv)
        w.norm2, fc1 = _fold_norm(w.norm2, fc1)
        if w.q_norm is None:
            rows = torch.ones(3 * A, dtype=torch.float64, device=qkv.weight.device)
            rows[:A] = w.scale
            qkv, w.scale = _scale_rows(qkv, rows), 1.0
    if options.biases and qkv.bias is not None:
        bias = qkv.bias.clone()
        if w.k_norm is None and not family.rotates(backbone):  # a rotated bias is not dead
            w.key_shift = _placed(bias[A : 2 * A], dtype, w)
            bias[A : 2 * A] = 0
        if w.inner_norm is None:
            moved = out.weight @ bias[2 * A :]
            out = FrozenLinear(out.weight, moved if out.bias is None else out.bias + moved)
            w.value_shift = _placed(bias[2 * A :], dtype, w)
            bias[2 * A :] = 0
        qkv = FrozenLinear(qkv.weight, bias)
    if options.fold:
        if w.ls1 is not None:
            out, w.ls1 = _scale_rows(out, w.ls1.double().to(out.weight.device)), None
        if w.ls2 is not None:
            fc2, w.ls2 = _scale_rows(fc2, w.ls2.double().to(fc2.weight.device)), None
        if isinstance(w.act, activations.QuickGELU) and not w.glu and w.hidden_norm is None:
            fc1 = _scale_rows(fc1, fc1.weight.new_full(fc1.weight.shape[:1], _QUICK_GELU))
            fc2, w.act = FrozenLinear(fc2.weight / _QUICK_GELU, fc2.bias), nn.SiLU()

    if w.score_bias is not None:
        w.score_bias = w.score_bias.to(dtype)
    wide = iter((qkv, out, fc1, fc2))
    w.replace_linears(lambda original: _round(next(wide), original, dtype))
    return w


def _placed(bias: Tensor, dtype: torch.dtype, w: BlockWeights) -> Tensor:
    return bias.to(dtype, copy=True).to(w.qkv.weight.device)


def _fold_norm(norm: Norm, linear: FrozenLinear) -> tuple[Norm, FrozenLinear]:
    weight, bias = linear.weight, linear.bias
    if norm.bias is not None:
        shift = weight @ norm.bias.double().to(weight.device)
        bias = shift if bias is None else bias + shift
    if norm.weight is not None:
        weight = weight * norm.weight.double().to(weight.device)
    return replace(norm, weight=None, bias=None), FrozenLinear(weight, bias)


def _scale_rows(linear: FrozenLinear, gain: Tensor) -> FrozenLinear:
    bias = None if linear.bias is None else linear.bias * gain
    return FrozenLinear(linear.weight * gain[:, None], bias)


def _wide(linear: FrozenLinear) -> FrozenLinear:
    """In float64, on the CPU where the device has none."""
    device = "cpu" if linear.weight.device.type == "mps" else linear.weight.device
    bias = None if linear.bias is None else linear.bias.to(device).double()
    return FrozenLinear(linear.weight.to(device).double(), bias)


def _round(wide: FrozenLinear, original: FrozenLinear, dtype: torch.dtype) -> FrozenLinear:
    """Back to ``dtype`` in one rounding; the original tensors where nothing changed."""

    def back(t: Tensor, like: Tensor | None) -> Tensor:
        t = t.to(dtype).to(original.weight.device)
        same = like is not None and like.dtype == dtype and torch.equal(t, like)
        return like.detach() if same and like is not None else t

    bias = None
    if wide.bias is not None and wide.bias.any():
        bias = back(wide.bias, original.bias)
    return replace(original, weight=back(wide.weight, original.weight), bias=bias)
