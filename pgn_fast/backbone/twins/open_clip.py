"""open_clip's image towers: its own vision transformer, and timm models that it wraps."""

from __future__ import annotations

import copy
from typing import Any

from open_clip import transformer as own
from open_clip.timm_model import TimmModel
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import activations as timm_activations
from torch import Tensor, nn

from .assembly import BlockParts, Parts, TwinRefused
from .checks import check_modules

_OWN = (
    own.VisionTransformer,
    own.Transformer,
    own.ResidualAttentionBlock,
    own.LayerNorm,
    own.LayerNormFp32,
    own.LayerScale,
    own.PatchDropout,
    own.QuickGELU,
    nn.GELU,
)


def vision_tower(model: Any) -> Any:
    visual = getattr(model, "visual", model)
    if type(visual) is not own.VisionTransformer and not isinstance(visual, TimmModel):
        raise TwinRefused(
            f"{type(visual).__name__} of open_clip has no twin; its VisionTransformer and timm "
            "vision transformers have"
        )
    return visual


def unwrap(model: Any) -> Any:
    """The timm model inside a ``TimmModel``, with the projection as its head; else None.

    It is a copy of the outermost module only: all parts are the original's.
    """
    visual = vision_tower(model)
    if not isinstance(visual, TimmModel):
        return None
    trunk = visual.trunk
    layers = [m for m in visual.head if not isinstance(m, nn.Dropout)]
    if not layers:
        return trunk
    twin = copy.copy(trunk)
    twin.__dict__ = {**trunk.__dict__, "_modules": dict(trunk._modules)}
    twin.head = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    twin.num_classes = [m.out_features for m in visual.head.modules() if isinstance(m, nn.Linear)][
        -1
    ]
    return twin


def hub_name(model: Any) -> None:
    return None


def takes_any_size(model: Any) -> bool:
    return False


def configured_size(model: Any) -> tuple[int, int]:
    height, width = vision_tower(model).image_size
    return height, width


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """What open_clip's transforms do, in timm's terms.

    Args:
        processor: settings by open_clip's names (``model.visual.preprocess_cfg`` holds them); None:
            the model's own, or CLIP's mean and standard deviation where it has none.
    """
    visual = vision_tower(model)
    settings = processor if processor is not None else getattr(visual, "preprocess_cfg", None) or {}
    if not isinstance(settings, dict):
        raise TwinRefused(
            "processor: settings by open_clip's names are known here, such as "
            f"model.visual.preprocess_cfg, not a {type(settings).__name__}"
        )
    mode = settings.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise TwinRefused(
            f"resize_mode={mode!r}: images are padded, which timm's transforms do not"
        )
    return {
        "mean": tuple(settings.get("mean") or OPENAI_CLIP_MEAN),
        "std": tuple(settings.get("std") or OPENAI_CLIP_STD),
        "interpolation": settings.get("interpolation", "bicubic"),
        "crop_mode": "center" if mode == "shortest" else "squash",
        "crop_pct": 1.0,
    }


def tokens_of(model: Any, images: Tensor) -> Tensor:
    visual = vision_tower(model)
    x = visual.transformer(visual._embeds(images))
    return x if visual.final_ln_after_pool else visual.ln_post(x)


def parts_of(model: Any, size: tuple[int, int] | None) -> Parts:
    visual = vision_tower(model)
    if size not in (None, configured_size(model)):
        raise TwinRefused(
            f"img_size={size}: give the size to open_clip.create_model(..., force_image_size=...)"
        )
    if visual.attn_pool is not None:
        raise TwinRefused("attentional_pool: its pooling has no place in timm's classes")
    if visual.pool_type not in ("tok", "avg"):
        raise TwinRefused(f"pool_type={visual.pool_type!r} is not known; known: tok, avg")
    check_modules(visual, lambda m: type(m) in (*_OWN, nn.Sequential))
    norm_pre = visual.ln_pre
    return Parts(
        image_size=configured_size(model),
        patch_weight=visual.conv1.weight,
        patch_bias=visual.conv1.bias,
        blocks=[_block(layer) for layer in visual.transformer.resblocks],
        cls=visual.class_embedding.view(1, 1, -1),
        pos=visual.positional_embedding[None],
        norm_pre=None if isinstance(norm_pre, nn.Identity) else norm_pre,
        norm=None if visual.final_ln_after_pool else visual.ln_post,
        fc_norm=visual.ln_post if visual.final_ln_after_pool else None,
        pool="token" if visual.pool_type == "tok" else "avg",
        head=None if visual.proj is None else (visual.proj.T, None),
    )


def _block(layer: Any) -> BlockParts:
    attention = layer.attn
    return BlockParts(
        num_heads=attention.num_heads,
        norm1=layer.ln_1,
        qkv=(attention.in_proj_weight, attention.in_proj_bias),
        out=attention.out_proj,
        norm2=layer.ln_2,
        fc1=layer.mlp.c_fc,
        fc2=layer.mlp.c_proj,
        act=_activation(layer.mlp.gelu),
        ls1=getattr(layer.ls_1, "gamma", None),
        ls2=getattr(layer.ls_2, "gamma", None),
    )


def _activation(act: nn.Module) -> nn.Module:
    return timm_activations.QuickGELU() if isinstance(act, own.QuickGELU) else act
