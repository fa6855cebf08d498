"""timm's classes put together from another library's own tensors.

A reader of one library (``transformers.py``, ``open_clip.py``, ``torchvision.py``) names the parts
of its model in ``Parts``; ``assemble`` builds timm's class around them. The twin's parameters share
storage with the original's: three separate projections become views of the twin's fused one. What
has to be copied is listed in the twin's ``origin.copied``, which ``explain`` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import AttentionPoolLatent, LayerScale, Mlp, SwiGLU
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Pool = Literal["token", "avg", "map", "class_and_mean", "class_and_dist"]


class TwinRefused(ValueError):
    """What of an original no twin can follow; names the setting and its value."""


@dataclass(frozen=True)
class Origin:
    """Where a twin comes from.

    Attributes:
        library: "transformers", "open_clip" or "torchvision".
        kind: the class of the original.
        name: the hub id that it was loaded from; None where it has none.
        copied: twin's tensor -> bytes that are no view of the original's.
    """

    library: str
    kind: str
    name: str | None = None
    copied: Mapping[str, int] = field(default_factory=dict)


@dataclass
class BlockParts:
    """One block. Linears are (out, in); ``qkv`` is one fused pair (weight, bias) or three linears.

    Attributes:
        gate: the gate's half of a gated MLP, whose other half is ``fc1``; None for a plain one.
        ls1, ls2: LayerScale (D,), or None.
    """

    num_heads: int
    norm1: nn.LayerNorm
    qkv: tuple[Tensor, Tensor | None] | tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module
    gate: nn.Linear | None = None
    ls1: Tensor | None = None
    ls2: Tensor | None = None


@dataclass
class MapParts:
    """SigLIP's pooling by attention: one latent query over all tokens."""

    latent: Tensor  # (1, 1, D)
    in_proj_weight: Tensor  # (3 D, D): query, key, value
    in_proj_bias: Tensor
    out: nn.Linear
    norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module
    num_heads: int


@dataclass
class Parts:
    """A vision transformer, part by part.

    Attributes:
        patch_weight: (D, C, p, p).
        cls, dist, reg: prefix tokens (1, n, D), in this order; None where there is none.
        pos: position embedding, (1, N, D) for the patches alone or (1, S + N, D).
        rope: sine and cosine side by side, (N, 2 d), turned half and half; makes it class Eva.
        norm, fc_norm: the norm of all tokens, and the one after pooling.
        head: on the pooled features, a linear layer (weight, bias) or a module of the original's;
            head_dist: a linear layer on the distillation token.
        copied: tensors above that are new memory.
    """

    image_size: tuple[int, int]
    patch_weight: Tensor
    patch_bias: Tensor | None
    blocks: list[BlockParts]
    cls: Tensor | None = None
    dist: Tensor | None = None
    reg: Tensor | None = None
    pos: Tensor | None = None
    rope: Tensor | None = None
    norm_pre: nn.LayerNorm | None = None
    norm: nn.LayerNorm | None = None
    fc_norm: nn.LayerNorm | None = None
    pool: Pool = "token"
    map: MapParts | None = None
    head: tuple[Tensor, Tensor | None] | nn.Module | None = None
    head_dist: tuple[Tensor, Tensor | None] | None = None
    copied: dict[str, int] = field(default_factory=dict)


class ClassAndMean(nn.Module):
    """DINOv2's pooling for its classifiers: tokens (B, S + N, D) to (B, 2 D), the class token
    beside the mean of the patch tokens.

    Source: Oquab et al., arXiv:2304.07193, appendix B.3.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)


def assemble(parts: Parts) -> VisionTransformer | Eva:
    """timm's class of these parts, frozen and in eval mode.

    The three linears of a ``qkv`` get parameters that are views of the twin's fused tensors.
    """
    twin = _Builder(parts)
    return twin.eva() if parts.rope is not None else twin.vision_transformer()


def share(tensor: Tensor) -> nn.Parameter:
    """A frozen parameter on the same storage; writes in place are seen on either side."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Builder:
    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        weight = parts.patch_weight
        self.width, in_chans, *patch = weight.shape
        self.patch = (patch[0], patch[1])
        self.common: dict[str, Any] = {
            "img_size": parts.image_size,
            "patch_size": self.patch,
            "in_chans": in_chans,
            "embed_dim": self.width,
            "depth": len(parts.blocks),
            "num_heads": parts.blocks[0].num_heads,
            "num_classes": _num_classes(parts.head),
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
            "device": "meta",
        }

    def vision_transformer(self) -> VisionTransformer:
        parts = self.parts
        whole = {**self.common, "weight_init": "skip"}
        if parts.pool == "class_and_dist":
            whole |= {"global_pool": "token"}
            kind: type[VisionTransformer] = VisionTransformerDistilled
        else:
            prefix = sum(t.shape[1] for t in (parts.cls, parts.reg) if t is not None)
            grid = [size // p for size, p in zip(parts.image_size, self.patch, strict=True)]
            pool = "map" if parts.pool == "class_and_mean" else parts.pool
            assert parts.pos is not None
            whole |= {
                "global_pool": pool,
                "class_token": parts.cls is not None,
                "reg_tokens": 0 if parts.reg is None else parts.reg.shape[1],
                "no_embed_class": bool(prefix) and parts.pos.shape[1] == grid[0] * grid[1],
            }
            kind = VisionTransformer
        vit = kind(**whole)
        if parts.pool == "class_and_mean":
            vit.attn_pool = ClassAndMean(vit.num_prefix_tokens)  # type: ignore[assignment]
            vit.pool_include_prefix = True
            vit.num_features = vit.head_hidden_size = 2 * self.width
        self._surround(vit)
        _put(vit, "pos_embed", parts.pos)
        if parts.dist is not None:
            _put(vit, "dist_token", parts.dist)
            self._head(vit, "head_dist", parts.head_dist)
        for block, own in zip(vit.blocks, parts.blocks, strict=True):
            self._block(block, own)
            block.attn = self._attention(own)
            block.ls1, block.ls2 = _layer_scale(own.ls1), _layer_scale(own.ls2)
        if parts.map is not None:
            vit.attn_pool = self._map_pool(parts.map)
        return _frozen(vit)

    def eva(self) -> Eva:
        parts = self.parts
        assert parts.rope is not None and parts.cls is not None
        eva = Eva(
            **self.common,
            global_pool=parts.pool,
            num_reg_tokens=0 if parts.reg is None else parts.reg.shape[1],
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_rotate_half=True,
            qkv_bias=True,
            init_values=1.0,
            use_fc_norm=False,
        )
        self._surround(eva)
        rope: Any = eva.rope
        rope.periods = rope._compute_periods(device=parts.rope.device)
        # the original's own table: timm's differs from it by a rounding of the frequencies
        rope.pos_embed_cached = parts.rope
        for block, own in zip(eva.blocks, parts.blocks, strict=True):
            self._block(block, own)
            self._eva_attention(block.attn, own)
            _put(block, "gamma_1", own.ls1)
            _put(block, "gamma_2", own.ls2)
        return _frozen(eva)

    def _surround(self, vit: Any) -> None:
        """Everything but the blocks and the position embedding."""
        parts = self.parts
        _put(vit.patch_embed.proj, "weight", parts.patch_weight)
        _put(vit.patch_embed.proj, "bias", parts.patch_bias)
        _put(vit, "cls_token", parts.cls)
        if parts.reg is not None:
            _put(vit, "reg_token", parts.reg)
        for name in ("norm_pre", "norm", "fc_norm"):
            norm = getattr(parts, name)
            setattr(vit, name, nn.Identity() if norm is None else _norm(norm))
        self._head(vit, "head", parts.head)

    def _head(
        self, vit: Any, name: str, head: tuple[Tensor, Tensor | None] | nn.Module | None
    ) -> None:
        if head is None:
            head = nn.Identity()
        setattr(vit, name, head if isinstance(head, nn.Module) else _linear(*head))

    def _block(self, block: Any, own: BlockParts) -> None:
        block.norm1, block.norm2 = _norm(own.norm1), _norm(own.norm2)
        hidden = own.fc1.out_features
        if own.gate is None:
            block.mlp = Mlp(self.width, hidden, device="meta")
            block.mlp.fc1 = _linear(own.fc1.weight, own.fc1.bias)
        else:
            block.mlp = SwiGLU(self.width, hidden, device="meta")
            block.mlp.fc1_g = _linear(own.gate.weight, own.gate.bias)
            block.mlp.fc1_x = _linear(own.fc1.weight, own.fc1.bias)
        block.mlp.act = own.act
        block.mlp.fc2 = _linear(own.fc2.weight, own.fc2.bias)

    def _attention(self, own: BlockParts) -> Attention:
        weight, bias = self._fused(own)
        attention = Attention(
            self.width,
            own.num_heads,
            attn_head_dim=weight.shape[0] // (3 * own.num_heads),
            device="meta",
        )
        attention.qkv = _linear(weight, bias)
        attention.proj = _linear(own.out.weight, own.out.bias)
        return attention

    def _eva_attention(self, attention: Any, own: BlockParts) -> None:
        weight, bias = self._fused(own)
        attention.qkv = _linear(weight, None)
        if bias is None:
            attention.q_bias = attention.k_bias = attention.v_bias = None
        else:
            q, k, v = bias.chunk(3)
            _put(attention, "q_bias", q)
            _put(attention, "v_bias", v)
            # not persistent in timm, whose own checkpoints have none
            attention.k_bias = k.detach()
        attention.proj = _linear(own.out.weight, own.out.bias)

    def _fused(self, own: BlockParts) -> tuple[Tensor, Tensor | None]:
        if isinstance(own.qkv[0], Tensor):
            return own.qkv  # type: ignore[return-value]
        linears: Sequence[nn.Linear] = own.qkv  # type: ignore[assignment]
        weight = _fuse(linears, "weight")
        assert weight is not None
        return weight, _fuse(linears, "bias")

    def _map_pool(self, own: MapParts) -> AttentionPoolLatent:
        pool = AttentionPoolLatent(self.width, num_heads=own.num_heads, device="meta")
        D = self.width
        _put(pool, "latent", own.latent)
        pool.q = _linear(own.in_proj_weight[:D], own.in_proj_bias[:D])
        pool.kv = _linear(own.in_proj_weight[D:], own.in_proj_bias[D:])
        pool.proj = _linear(own.out.weight, own.out.bias)
        pool.norm = _norm(own.norm)
        pool.mlp = Mlp(D, own.fc1.out_features, device="meta")
        pool.mlp.fc1 = _linear(own.fc1.weight, own.fc1.bias)
        pool.mlp.fc2 = _linear(own.fc2.weight, own.fc2.bias)
        pool.mlp.act = own.act
        return pool


def _fuse(linears: Sequence[nn.Linear], name: str) -> Tensor | None:
    """The three linears' weights or biases as one tensor, of which theirs become views.

    A bias that one of them lacks is zero where another has one.
    """
    tensors = [getattr(linear, name) for linear in linears]
    if all(t is None for t in tensors):
        return None
    like = next(t for t in tensors if t is not None)
    sizes = [linear.out_features for linear in linears]
    if (found := _neighbors(tensors)) is not None:
        return found
    fused = like.new_zeros(sum(sizes), *like.shape[1:])
    for linear, rows in zip(linears, fused.split(sizes), strict=True):
        own = getattr(linear, name)
        if own is not None:
            rows.copy_(own.detach())
            setattr(linear, name, share(rows))
    return fused


def _neighbors(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor over all of them where they already lie one after the other in one storage."""
    present = [t for t in tensors if t is not None and t.is_contiguous()]
    if len(present) < len(tensors):
        return None
    first, end = present[0], present[0].storage_offset()
    for t in present:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or t.storage_offset() != end:
            return None
        end += t.numel()
    shape = (sum(t.shape[0] for t in present), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _num_classes(head: tuple[Tensor, Tensor | None] | nn.Module | None) -> int:
    if not isinstance(head, nn.Module):
        return 0 if head is None else head[0].shape[0]
    return [m.out_features for m in head.modules() if isinstance(m, nn.Linear)][-1]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    _put(linear, "weight", weight)
    if bias is not None:
        _put(linear, "bias", bias)
    return linear


def _norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    new = nn.LayerNorm(
        norm.normalized_shape,
        norm.eps,
        bias=norm.bias is not None,
        device="meta",  # type: ignore[arg-type]
    )
    _put(new, "weight", norm.weight)
    _put(new, "bias", norm.bias)
    return new


def _layer_scale(gain: Tensor | None) -> nn.Module:
    if gain is None:
        return nn.Identity()
    scale = LayerScale(gain.shape[0], device="meta")
    _put(scale, "gamma", gain)
    return scale


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    expected = getattr(module, name)
    if tensor is not None and expected is not None and tensor.shape != expected.shape:
        raise AssertionError(
            f"{type(module).__name__}.{name}: {tuple(tensor.shape)} for {tuple(expected.shape)}"
        )
    if tensor is not None or expected is not None:
        setattr(module, name, None if tensor is None else share(tensor))


def _frozen(vit: Any) -> Any:
    left = [n for n, t in (*vit.named_parameters(), *vit.named_buffers()) if t.is_meta]
    assert not left, f"no tensor for {left}"
    return vit.requires_grad_(False).eval()
