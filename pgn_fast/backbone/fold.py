"""The weights of a frozen block as the fast path runs them: views of timm's, or folded copies.

Folding is affine algebra done once. With a norm's gain g and shift e, an attention scale s, and
LayerScale gains c, for x_hat = (x - mean) / std (all in float64, rounded once):

    W_qkv (g x_hat + e) + b_qkv  =  (W_qkv g) x_hat + (b_qkv + W_qkv e)        norm into Linear
    softmax(s q k)               =  softmax((s q) k)                           scale into W_q, b_q
    softmax_j(q (k_j + b_k))     =  softmax_j(q k_j)            the key bias shifts all alike
    sum_j p_j (v_j + b_v)        =  (sum_j p_j v_j) + b_v       p sums to one: W_o b_v joins b_o
    c (W_o o + b_o)              =  (c W_o) o + c b_o                         LayerScale into Linear
    W_2 (u sigmoid(a u))         =  (W_2 / a) silu(a u)      a = 1.702 (QuickGELU) into W_1 and W_2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import activations
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import frozen_linear
from .support import FastOptions

_QUICK_GELU = 1.702


@dataclass
class Norm:
    """LayerNorm or RMSNorm over the last dimension; weight and bias None where folded away.

    Attributes:
        backend: which backend runs the norm together with the addition before it; None or
            "reference": they run apart.
    """

    rms: bool
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    backend: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.weight is not None:
            x = x.to(self.weight.dtype)
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps).to(dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).to(dtype)

    def takes_sum(self, x: Tensor, y: Tensor) -> bool:
        """Whether ``add_layer_norm`` is this norm of x + y, and has a kernel here."""
        plain = not self.rms and self.weight is None and self.bias is None
        return plain and x.dtype == y.dtype and self.backend not in (None, "reference")

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of x from that of the output; the statistics are computed again.

        With n the normalized x and g = grad * weight, means over the last dimension:
        LayerNorm (g - mean(g) - n mean(g n)) / std, RMSNorm (g - n mean(g n)) / rms.
        """
        dtype = x.dtype
        if self.weight is not None:
            x = x.to(self.weight.dtype)
        grad = grad.to(x.dtype)
        if self.rms:
            inverse = (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
            n = x * inverse
            g = grad if self.weight is None else grad * self.weight
            return ((g - n * (g * n).mean(dim=-1, keepdim=True)) * inverse).to(dtype)
        shape = x.shape[-1:]
        _, mean, rstd = torch.native_layer_norm(x, shape, self.weight, self.bias, self.eps)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, self.weight, self.bias, [True, False, False]
        )
        return grad_x.to(dtype)


@dataclass
class FrozenLinear:
    """y = x W^T + b with weights that never get a gradient; x is cast to the weights' dtype.

    Attributes:
        backend: which backend runs the product; None is the fastest.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None = None
    backend: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return frozen_linear(x.to(self.weight.dtype), self.weight, self.bias, backend=self.backend)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """(..., out) -> (..., in)."""
        return frozen_linear(grad, self.weight.T, backend=self.backend)

    def rows(self, start: int, stop: int) -> FrozenLinear:
        """The outputs start..stop alone, as a view."""
        bias = None if self.bias is None else self.bias[start:stop]
        return type(self)(self.weight[start:stop], bias, self.backend)


@dataclass
class BlockWeights:
    """One frozen block. A: attention width (heads x head width), H: hidden width.

    Attributes:
        qkv: (3 A, D); q, kv and k, v are its rows.
        scale: what the scores are multiplied by; 1 where it is folded into q.
        out: attention output projection (D, A); fc1: (H, D), or (2 H, D) with the gate first
            where ``glu``; fc2: (D, H).
        gain1, gain2: LayerScale, None where there is none or it is folded.
        key_shift, value_shift: (A,), biases that keys and values lack here because their effect is
            nowhere or in ``out``; None where nothing was taken out.
    """

    num_heads: int
    norm1: Norm
    qkv: FrozenLinear
    scale: float
    q_norm: Norm | None
    k_norm: Norm | None
    inner_norm: Norm | None
    out: FrozenLinear
    gain1: Tensor | None
    norm2: Norm
    fc1: FrozenLinear
    act: nn.Module
    glu: bool
    hidden_norm: Norm | None
    fc2: FrozenLinear
    gain2: Tensor | None
    rotate_half: bool
    key_shift: Tensor | None = None
    value_shift: Tensor | None = None
    attn_dim: int = 0

    def __post_init__(self) -> None:
        self.attn_dim = A = self.qkv.weight.shape[0] // 3
        self.q, self.kv = self.qkv.rows(0, A), self.qkv.rows(A, 3 * A)

    def replace_linears(self, make: Callable[[FrozenLinear], FrozenLinear]) -> None:
        """Put ``make(linear)`` in place of each of the four linears."""
        self.qkv, self.out, self.fc1, self.fc2 = map(make, (self.qkv, self.out, self.fc1, self.fc2))
        self.__post_init__()

    def with_linears(self, make: Callable[[FrozenLinear], FrozenLinear]) -> BlockWeights:
        """The same with ``make(linear)`` for each of the four linears; the rest is shared."""
        copied = replace(self)
        copied.replace_linears(make)
        return copied

    def tensors(self) -> list[Tensor]:
        """Every weight, for counting."""
        found: list[Tensor | None] = [self.gain1, self.gain2]
        for linear in (self.qkv, self.out, self.fc1, self.fc2):
            found += [linear.weight, linear.bias]
        return [t for t in found if t is not None]


def live_block(block: Any, backend_for: Callable[[str], str]) -> BlockWeights:
    """A block by timm's own tensors: no copy, nothing folded, never out of date.

    ``backend_for``: op -> the backend that runs it.
    """
    attention, mlp = block.attn, block.mlp
    # timm's fused attention does not read the attribute: torch scales by the head width
    width = attention.proj.in_features // attention.num_heads
    weights = BlockWeights(
        num_heads=attention.num_heads,
        norm1=_norm(block.norm1),
        qkv=_qkv(attention),
        scale=width**-0.5 if attention.fused_attn else attention.scale,
        q_norm=_optional_norm(getattr(attention, "q_norm", None)),
        k_norm=_optional_norm(getattr(attention, "k_norm", None)),
        inner_norm=_optional_norm(getattr(attention, "norm", None)),
        out=FrozenLinear(attention.proj.weight, attention.proj.bias),
        gain1=_gain(block, 1),
        norm2=_norm(block.norm2),
        fc1=_fc1(mlp),
        act=mlp.act,
        glu=isinstance(mlp, GluMlp | SwiGLU),
        hidden_norm=_optional_norm(mlp.norm),
        fc2=FrozenLinear(mlp.fc2.weight, mlp.fc2.bias),
        gain2=_gain(block, 2),
        rotate_half=getattr(attention, "rotate_half", False),
    )
    backend = backend_for("frozen_linear")
    weights.replace_linears(lambda linear: replace(linear, backend=backend))
    weights.norm2.backend = backend_for("add_layer_norm")
    return weights


@torch.no_grad()
@torch.inference_mode(False)  # tensors made in inference mode could not be saved for a backward
def fold_block(
    block: Any,
    options: FastOptions,
    dtype: torch.dtype,
    rope: bool,
    backend_for: Callable[[str], str],
) -> BlockWeights:
    """A block with its affine algebra folded, in ``dtype``.

    Weights that stay as they are (an output projection without LayerScale, say) are timm's own
    tensors where the dtype is theirs too. ``rope``: keys are rotated, so their bias is not dead.
    """
    w = live_block(block, backend_for)
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
        if w.k_norm is None and not rope:
            w.key_shift = _placed(bias[A : 2 * A], dtype, w)
            bias[A : 2 * A] = 0
        if w.inner_norm is None:
            moved = out.weight @ bias[2 * A :]
            out = FrozenLinear(out.weight, moved if out.bias is None else out.bias + moved)
            w.value_shift = _placed(bias[2 * A :], dtype, w)
            bias[2 * A :] = 0
        qkv = FrozenLinear(qkv.weight, bias)
    if options.fold:
        if w.gain1 is not None:
            out, w.gain1 = _scale_rows(out, w.gain1.double().to(out.weight.device)), None
        if w.gain2 is not None:
            fc2, w.gain2 = _scale_rows(fc2, w.gain2.double().to(fc2.weight.device)), None
        if isinstance(w.act, activations.QuickGELU) and not w.glu and w.hidden_norm is None:
            fc1 = _scale_rows(fc1, fc1.weight.new_full(fc1.weight.shape[:1], _QUICK_GELU))
            fc2, w.act = FrozenLinear(fc2.weight / _QUICK_GELU, fc2.bias), nn.SiLU()

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


def _norm(module: nn.Module) -> Norm:
    rms = not isinstance(module, nn.LayerNorm)
    bias = None if rms else module.bias
    return Norm(rms, float(module.eps), module.weight, bias)  # type: ignore[arg-type]


def _optional_norm(module: nn.Module | None) -> Norm | None:
    return None if module is None or isinstance(module, nn.Identity) else _norm(module)


def _gain(block: Any, index: int) -> Tensor | None:
    """LayerScale: ``ls1.gamma`` in class Block, ``gamma_1`` in class EvaBlock."""
    if hasattr(block, f"gamma_{index}"):
        return getattr(block, f"gamma_{index}")
    return getattr(getattr(block, f"ls{index}"), "gamma", None)


def _qkv(attention: Any) -> FrozenLinear:
    if attention.qkv is None:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in parts]
        if all(b is None for b in biases):
            return FrozenLinear(torch.cat([p.weight for p in parts]))
        bias = torch.cat(
            [
                p.weight.new_zeros(len(p.weight)) if b is None else b
                for p, b in zip(parts, biases, strict=True)
            ]
        )
        return FrozenLinear(torch.cat([p.weight for p in parts]), bias)
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return FrozenLinear(attention.qkv.weight, bias)
    return FrozenLinear(attention.qkv.weight, attention.qkv.bias)


def _fc1(mlp: Any) -> FrozenLinear:
    if not isinstance(mlp, SwiGLU):
        return FrozenLinear(mlp.fc1.weight, mlp.fc1.bias)
    bias = None if mlp.fc1_g.bias is None else torch.cat([mlp.fc1_g.bias, mlp.fc1_x.bias])
    return FrozenLinear(torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight]), bias)
