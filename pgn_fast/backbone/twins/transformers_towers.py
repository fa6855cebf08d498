"""The towers of transformers' image encoders, part by part: where each keeps what a twin needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from timm.layers import activations as timm_activations
from torch import Tensor, nn
from transformers import activations as hf_activations

from .assembly import BlockParts, Parts, TwinRefused, nbytes
from .checks import check_modules

# attention implementations of transformers that compute the same thing, each by its own kernels
_ATTENTION = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
# classes of encoders that take images of any size without being told
ANY_SIZE = ("Dinov2", "DINOv3")
Read = Callable[[Any, tuple[int, int] | None], Parts]


@dataclass(frozen=True)
class LayerLayout:
    """Where a layer keeps its parts: names of attributes.

    Attributes:
        num_heads, scale, out: of its attention.
        gains: paths of LayerScale's two gains; None where there are none.
    """

    norm1: str
    norm2: str
    attention: str
    num_heads: str
    scale: str
    out: str
    gains: tuple[str, str] | None = None


@dataclass(frozen=True)
class TowerLayout:
    """Where a tower keeps its parts: paths of attributes, None what it has not.

    Attributes:
        patch: the convolution; size: what it was configured for.
    """

    patch: str
    size: str
    layers: str
    layer: LayerLayout
    positions: str
    cls: str | None = None
    norm_pre: str | None = None
    norm: str | None = None
    fc_norm: str | None = None


_VIT_LAYER = LayerLayout(
    norm1="layernorm_before",
    norm2="layernorm_after",
    attention="attention",
    num_heads="num_attention_heads",
    scale="scaling",
    out="o_proj",
)
_CLIP_LAYER = LayerLayout(
    norm1="layer_norm1",
    norm2="layer_norm2",
    attention="self_attn",
    num_heads="num_heads",
    scale="scale",
    out="out_proj",
)
_DINOV2_LAYER = LayerLayout(
    norm1="norm1",
    norm2="norm2",
    attention="attention",
    num_heads="num_attention_heads",
    scale="scaling",
    out="o_proj",
    gains=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_DINOV3_LAYER = replace(_DINOV2_LAYER, num_heads="num_heads")
_VIT = TowerLayout(
    patch="embeddings.patch_embeddings.projection",
    size="embeddings.patch_embeddings.image_size",
    layers="layers",
    layer=_VIT_LAYER,
    positions="embeddings.position_embeddings",
    cls="embeddings.cls_token",
    norm="layernorm",
)
_DINOV2 = replace(_VIT, layers="encoder.layer", layer=_DINOV2_LAYER)
_SIGLIP = TowerLayout(
    patch="embeddings.patch_embedding",
    size="embeddings.image_size",
    layers="encoder.layers",
    layer=_CLIP_LAYER,
    positions="embeddings.position_embedding.weight",
    norm="post_layernorm",
)
# its tokens leave without the last norm, which comes after pooling
_CLIP = replace(
    _SIGLIP,
    cls="embeddings.class_embedding",
    norm_pre="pre_layrnorm",
    norm=None,
    fc_norm="post_layernorm",
)


def check_tower(vision: Any) -> None:
    """Refuse (TwinRefused) modules and an attention that the twin does not support."""
    implementation = getattr(vision.config, "_attn_implementation", None)
    if implementation not in _ATTENTION:
        raise TwinRefused(
            f"attention implementation {implementation!r} may compute something else; load the "
            "model with attn_implementation='sdpa'"
        )
    own = type(vision).__module__
    # the pooler is no part of the twin
    check_modules(vision, lambda m: type(m).__module__ == own or _is_activation(m), ("pooler",))


def _is_activation(module: nn.Module) -> bool:
    return type(module) in _ACTIVATIONS or type(module).__module__ == hf_activations.__name__


_ACTIVATIONS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    hf_activations.GELUActivation: nn.GELU,
    hf_activations.GELUTanh: lambda: nn.GELU(approximate="tanh"),
    hf_activations.QuickGELUActivation: timm_activations.QuickGELU,
    nn.ReLU: nn.ReLU,
    nn.SiLU: nn.SiLU,
    hf_activations.SiLUActivation: nn.SiLU,
}


def activation(module: nn.Module) -> nn.Module:
    if isinstance(module, hf_activations.GELUActivation) and module.act is not nn.functional.gelu:
        raise TwinRefused("hidden_act='gelu_python' is not known to the twin; use 'gelu'")
    make = _ACTIVATIONS.get(type(module))
    if make is None:
        raise TwinRefused(
            f"hidden_act {type(module).__name__} is not known to the twin; known: gelu, "
            "gelu_pytorch_tanh, quick_gelu, relu, silu"
        )
    return make()


def pair(value: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _read(layout: TowerLayout, vision: Any, size: tuple[int, int] | None) -> Parts:
    def part(path: str | None) -> Any:
        return None if path is None else attrgetter(path)(vision)

    configured = pair(part(layout.size))
    size = size or configured
    patch, cls, positions = part(layout.patch), part(layout.cls), part(layout.positions)
    parts = Parts(
        image_size=size,
        patch_weight=patch.weight,
        patch_bias=patch.bias,
        blocks=_blocks(part(layout.layers), layout.layer),
        cls=None if cls is None else cls.view(1, 1, -1),
        dist=getattr(vision.embeddings, "distillation_token", None),
        norm_pre=part(layout.norm_pre),
        norm=part(layout.norm),
        fc_norm=part(layout.fc_norm),
    )
    positions = positions if positions.ndim == 3 else positions[None]
    parts.pos = _positions(vision, positions, size, configured, parts)
    return parts


read_vit: Read = partial(_read, _VIT)
read_clip: Read = partial(_read, _CLIP)
read_siglip: Read = partial(_read, _SIGLIP)


def read_siglip2(vision: Any, size: tuple[int, int] | None) -> Parts:
    """SigLIP2 at its own size, num_patches patches in a square, none of them masked."""
    e = vision.embeddings
    side, p = e.position_embedding_size, e.patch_size
    if side * side != e.num_patches:
        raise TwinRefused(f"num_patches={e.num_patches} is no square, the twin's images are one")
    configured = (side * p, side * p)
    if size not in (None, configured):
        raise TwinRefused(
            f"images of {size[0]}x{size[1]} pixels: the twin of SigLIP2 knows its own size only, "  # type: ignore[index]
            f"{configured[0]}x{configured[1]}"
        )
    weight = e.patch_embedding.weight.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)
    return Parts(
        image_size=configured,
        patch_weight=weight,
        patch_bias=e.patch_embedding.bias,
        blocks=_blocks(vision.encoder.layers, _CLIP_LAYER),
        pos=e.position_embedding.weight[None],
        norm=vision.post_layernorm,
    )


def read_dinov2(vision: Any, size: tuple[int, int] | None) -> Parts:
    """DINOv2, with registers or without."""
    parts = _read(_DINOV2, vision, size)
    registers = getattr(vision.embeddings, "register_tokens", None)
    if registers is not None and registers.shape[1]:
        # registers have no position: the class token's is added to it, as timm's own models have it
        parts.cls = (vision.embeddings.cls_token + parts.pos[:, :1]).detach()  # type: ignore[index]
        parts.copied["cls_token"] = nbytes(parts.cls)
        parts.pos, parts.reg = parts.pos[:, 1:], registers  # type: ignore[index]
    return parts


def read_dinov3(vision: Any, size: tuple[int, int] | None) -> Parts:
    """DINOv3, whose positions are rotary."""
    e = vision.embeddings
    size = size or pair(vision.config.image_size)
    patch = e.patch_embeddings
    # it looks at the shape, the dtype and the device of the images
    like = patch.weight.new_zeros(1, 1, 1, 1).expand(1, 1, *size)
    with torch.no_grad():
        cos, sin = vision.rope_embeddings(like)
    registers = e.register_tokens
    rope = torch.cat([sin, cos], dim=-1)
    return Parts(
        image_size=size,
        patch_weight=patch.weight,
        patch_bias=patch.bias,
        blocks=_blocks(vision.model.layer, _DINOV3_LAYER),
        cls=e.cls_token,
        reg=registers if registers.shape[1] else None,
        rope=rope,
        norm=vision.norm,
        copied={"rope": nbytes(rope)},
    )


def _blocks(layers: Any, layout: LayerLayout) -> list[BlockParts]:
    return [_block(layer, layout) for layer in layers]


def _block(layer: Any, layout: LayerLayout) -> BlockParts:
    attention = getattr(layer, layout.attention)
    heads, scale = getattr(attention, layout.num_heads), getattr(attention, layout.scale)
    gains = [attrgetter(path)(layer) for path in layout.gains or ()] or [None, None]
    return BlockParts(
        num_heads=_heads(attention, heads, scale),
        norm1=getattr(layer, layout.norm1),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=getattr(attention, layout.out),
        norm2=getattr(layer, layout.norm2),
        ls1=gains[0],
        ls2=gains[1],
        **_mlp(layer.mlp),
    )


def _mlp(mlp: Any) -> dict[str, Any]:
    if hasattr(mlp, "fc1"):
        return {"fc1": mlp.fc1, "fc2": mlp.fc2, "act": activation(mlp.activation_fn)}
    gate = getattr(mlp, "gate_proj", None)
    act = activation(mlp.act_fn)
    return {"fc1": mlp.up_proj, "fc2": mlp.down_proj, "act": act, "gate": gate}


def _heads(attention: Any, num_heads: int, scale: float) -> int:
    """The number of heads, after a look at what else shapes attention."""
    head_dim = attention.q_proj.out_features // num_heads
    if scale != head_dim**-0.5:
        raise TwinRefused(f"attention scale {scale} is not 1 / sqrt({head_dim})")
    if getattr(attention, "is_causal", False):
        raise TwinRefused("is_causal=True: attention has a mask, which the twin does not support")
    for name in ("k_proj", "v_proj"):
        if getattr(attention, name).out_features != attention.q_proj.out_features:
            raise TwinRefused(f"{name} is not as wide as q_proj: heads share keys and values")
    return num_heads


def _positions(
    vision: Any, pos: Tensor, size: tuple[int, int], configured: tuple[int, int], parts: Parts
) -> Tensor:
    """Position embedding (1, S + N, D) for images of ``size``, by the original's own resizing."""
    patch = parts.patch_weight.shape[2:]
    grid, own = ([s // p for s, p in zip(hw, patch, strict=True)] for hw in (size, configured))
    # the DINOs resize theirs whenever an image is not square, be it to the same size
    as_it_is = grid == own and (
        grid[0] == grid[1] or not type(vision).__name__.startswith(ANY_SIZE)
    )
    if as_it_is:
        return pos
    prefix = sum(t.shape[1] for t in (parts.cls, parts.dist) if t is not None)
    rows = pos.new_empty(1, prefix + grid[0] * grid[1], pos.shape[-1])
    try:
        with torch.no_grad():
            resized = vision.embeddings.interpolate_pos_encoding(rows, *size)
    except (RuntimeError, TypeError) as error:
        raise TwinRefused(
            f"{type(vision).__name__} itself cannot resize its position embedding to images of "
            f"{size[0]}x{size[1]} pixels ({error})"
        ) from error
    resized = resized.detach().contiguous()
    parts.copied["pos_embed"] = nbytes(resized)
    return resized
