"""torchvision's ``VisionTransformer``."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.vision_transformer import (
    Encoder,
    EncoderBlock,
    MLPBlock,
    VisionTransformer,
)

from .assembly import BlockParts, Parts, TwinRefused
from .checks import check_modules

_OWN = (VisionTransformer, Encoder, EncoderBlock, MLPBlock)
_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU)


def vision_tower(model: nn.Module) -> Any:
    if type(model) is not VisionTransformer:
        raise TwinRefused(
            f"{type(model).__name__} of torchvision has no twin; VisionTransformer (vit_b_16 and "
            "its like) has"
        )
    return model


def unwrap(model: nn.Module) -> None:
    return None


def hub_name(model: nn.Module) -> None:
    return None


def takes_any_size(model: nn.Module) -> bool:
    return False


def configured_size(model: Any) -> tuple[int, int]:
    return model.image_size, model.image_size


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """What torchvision's transforms do, in timm's terms.

    Args:
        processor: ``weights.transforms()``; None: mean and standard deviation of ImageNet, which
            all of torchvision's ViT weights have, and the geometry of its first ones.
    """
    if processor is None:
        return {
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
        }
    try:
        crop, resize = processor.crop_size[0], processor.resize_size[0]
        return {
            "input_size": (3, crop, crop),
            "mean": tuple(processor.mean),
            "std": tuple(processor.std),
            "interpolation": processor.interpolation.value,
            "crop_pct": crop / resize,
            "crop_mode": "center",
        }
    except AttributeError as error:
        raise TwinRefused(
            "processor: torchvision's weights.transforms() is known here, not a "
            f"{type(processor).__name__}"
        ) from error


def tokens_of(model: Any, images: Tensor) -> Tensor:
    x = model._process_input(images)
    return model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1))


def parts_of(model: Any, size: tuple[int, int] | None) -> Parts:
    if not isinstance(model.conv_proj, nn.Conv2d):
        raise TwinRefused("conv_stem_configs: a stem of several convolutions is no patch embedding")
    if size not in (None, configured_size(model)):
        raise TwinRefused(
            f"img_size={size}: torchvision's model takes its own size only, {model.image_size}; "
            "resize its weights by torchvision.models.vision_transformer.interpolate_embeddings"
        )
    check_modules(
        model, lambda m: type(m) in (*_OWN, *_ACTIVATIONS, nn.Sequential), skip=("heads",)
    )
    return Parts(
        image_size=configured_size(model),
        patch_weight=model.conv_proj.weight,
        patch_bias=model.conv_proj.bias,
        blocks=[_block(layer) for layer in model.encoder.layers],
        cls=model.class_token,
        pos=model.encoder.pos_embedding,
        norm=model.encoder.ln,
        head=_head(model.heads),
    )


def _block(layer: Any) -> BlockParts:
    attention = layer.self_attention
    linears = [m for m in layer.mlp if not isinstance(m, nn.Dropout)]
    fc1, act, fc2 = linears
    return BlockParts(
        num_heads=attention.num_heads,
        norm1=layer.ln_1,
        qkv=(attention.in_proj_weight, attention.in_proj_bias),
        out=attention.out_proj,
        norm2=layer.ln_2,
        fc1=fc1,
        fc2=fc2,
        act=act,
    )


def _head(heads: nn.Module) -> Any:
    """The classifier: often the user's own by now."""
    layers = list(heads) if isinstance(heads, nn.Sequential) else [heads]
    layers = [m for m in layers if not isinstance(m, nn.Identity | nn.Dropout)]
    if len(layers) == 1 and type(layers[0]) is nn.Linear:
        return layers[0].weight, layers[0].bias
    return heads if any(isinstance(m, nn.Linear) for m in heads.modules()) else None
