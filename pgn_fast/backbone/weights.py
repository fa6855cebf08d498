"""A frozen block as the engine computes it: norms, linear layers, and what stands between them.

``from_timm`` reads a block's own tensors; ``fold.fold_block`` makes copies with the affine algebra
done, ``packed`` copies that the GEMM library has laid out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.frozen_linear import frozen_linear, frozen_linear_gelu
from .families import Family
from .families.base import heads


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

    def can_fuse_residual(self, x: Tensor, y: Tensor) -> bool:
        """Whether ``add_layer_norm`` is this norm of x + y, and has a kernel here."""
        plain = not self.rms and self.weight is None and self.bias is None
        return plain and x.dtype == y.dtype and self.backend not in (None, "reference")

    def with_statistics(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The norm of x, and LayerNorm's mean and 1 / std (..., 1), for ``input_gradient``."""
        if self.rms:
            return self(x), None, None
        dtype = x.dtype
        x = x if self.weight is None else x.to(self.weight.dtype)
        shape = x.shape[-1:]
        n, mean, rstd = torch.native_layer_norm(x, shape, self.weight, self.bias, self.eps)
        return n.to(dtype), mean, rstd

    def input_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x from that of the output; statistics that are not given, or that this
        gradient is differentiated through, are computed again.

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
        if mean is None or rstd is None or torch.is_grad_enabled():
            _, mean, rstd = torch.native_layer_norm(x, shape, self.weight, self.bias, self.eps)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, self.weight, self.bias, [True, False, False]
        )
        return grad_x.to(dtype)


# the linears of a block
PLACES = ("qkv", "out", "fc1", "fc2")


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

    def gelu(self, x: Tensor, approximate: str) -> Tensor | None:
        """GELU of the product, without a gradient; None where no library has both in one call."""
        return frozen_linear_gelu(x.to(self.weight.dtype), self.weight, self.bias, approximate)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """(..., out) -> (..., in)."""
        return frozen_linear(grad, self.weight.T, backend=self.backend)

    def rows(self, start: int, stop: int) -> FrozenLinear:
        """The outputs start..stop alone, as a view."""
        bias = None if self.bias is None else self.bias[start:stop]
        return type(self)(self.weight[start:stop], bias, self.backend)

    @staticmethod
    def places(block: int, depth: int) -> tuple[str, ...]:
        """Which linears of that block this kind is for."""
        return PLACES


@dataclass
class BlockWeights:
    """One frozen block. A: attention width (heads x head width), H: hidden width.

    Attributes:
        qkv: (3 A, D); q, kv and k, v are its rows.
        scale: what the scores are multiplied by; 1 where it is folded into q.
        out: attention output projection (D, A); fc1: (H, D), or (2 H, D) with the gate first
            where ``glu``; fc2: (D, H).
        ls1, ls2: gains of LayerScale (D,), None where there are none or they are folded.
        score_bias: (1, h, S + N, S + N), added to the scores of the backbone's own tokens; None
            where the family has none.
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
    ls1: Tensor | None
    norm2: Norm
    fc1: FrozenLinear
    act: nn.Module
    glu: bool
    hidden_norm: Norm | None
    fc2: FrozenLinear
    ls2: Tensor | None
    rotate_half: bool
    score_bias: Tensor | None = None
    key_shift: Tensor | None = None
    value_shift: Tensor | None = None
    attn_dim: int = 0

    def __post_init__(self) -> None:
        self.attn_dim = A = self.qkv.weight.shape[0] // 3
        self.q, self.kv = self.qkv.rows(0, A), self.qkv.rows(A, 3 * A)

    def replace_linears(
        self, make: Callable[[FrozenLinear], FrozenLinear], places: tuple[str, ...] = PLACES
    ) -> None:
        """Put ``make(linear)`` in place of each of these linears."""
        for place in places:
            setattr(self, place, make(getattr(self, place)))
        self.__post_init__()

    def with_linears(
        self, make: Callable[[FrozenLinear], FrozenLinear], places: tuple[str, ...] = PLACES
    ) -> BlockWeights:
        """The same with ``make(linear)`` for each of these linears; the rest is shared."""
        copied = replace(self)
        copied.replace_linears(make, places)
        return copied

    def tensors(self) -> list[Tensor]:
        """Every weight, for counting."""
        found: list[Tensor | None] = [self.ls1, self.ls2, self.score_bias]
        for linear in (self.qkv, self.out, self.fc1, self.fc2):
            found += [linear.weight, linear.bias]
        return [t for t in found if t is not None]


def multiplied_by(linear: type[FrozenLinear], weights: list[BlockWeights]) -> list[BlockWeights]:
    """The same blocks, their products by objects of ``linear``."""
    if linear is FrozenLinear:
        return weights
    make = lambda bare: linear(bare.weight, bare.bias, bare.backend)
    depth = len(weights)
    return [w.with_linears(make, linear.places(i, depth)) for i, w in enumerate(weights)]


def from_timm(
    family: Family, backbone: Any, i: int, backend_for: Callable[[str], str]
) -> BlockWeights:
    """Block ``i`` by timm's own tensors: no copy, nothing folded, never out of date.

    ``backend_for``: op -> the backend that runs it.
    """
    block = backbone.blocks[i]
    attention, mlp = block.attn, block.mlp
    num_heads, width = heads(block)
    frozen_linear_backend = backend_for("frozen_linear")
    linear = lambda weight, bias: FrozenLinear(weight, bias, frozen_linear_backend)
    norm2 = _norm(block.norm2)
    norm2.backend = backend_for("add_layer_norm")
    return BlockWeights(
        num_heads=num_heads,
        norm1=_norm(block.norm1),
        qkv=linear(*family.qkv(attention)),
        # timm's fused attention does not read the attribute: torch scales by the head width
        scale=width**-0.5 if attention.fused_attn else attention.scale,
        q_norm=_optional_norm(getattr(attention, "q_norm", None)),
        k_norm=_optional_norm(getattr(attention, "k_norm", None)),
        inner_norm=_optional_norm(getattr(attention, "norm", None)),
        out=linear(attention.proj.weight, attention.proj.bias),
        ls1=family.gain(block, 1),
        norm2=norm2,
        fc1=linear(*_fc1(mlp)),
        act=mlp.act,
        glu=isinstance(mlp, GluMlp | SwiGLU),
        hidden_norm=_optional_norm(mlp.norm),
        fc2=linear(mlp.fc2.weight, mlp.fc2.bias),
        ls2=family.gain(block, 2),
        rotate_half=getattr(attention, "rotate_half", False),
        score_bias=family.score_bias(backbone, i),
    )


def _norm(module: nn.Module) -> Norm:
    rms = not isinstance(module, nn.LayerNorm)
    bias = None if rms else module.bias
    return Norm(rms, float(module.eps), module.weight, bias)  # type: ignore[arg-type]


def _optional_norm(module: nn.Module | None) -> Norm | None:
    return None if module is None or isinstance(module, nn.Identity) else _norm(module)


def _fc1(mlp: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the first layer, the gate first."""
    if not isinstance(mlp, SwiGLU):
        return mlp.fc1.weight, mlp.fc1.bias
    bias = None if mlp.fc1_g.bias is None else torch.cat([mlp.fc1_g.bias, mlp.fc1_x.bias])
    return torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight]), bias
