"""Official backbones as timm ones: sizes from the settings, weights under timm's names."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

# official name -> timm's, by the kind of backbone
_CLIP = (
    (r"^visual\.class_embedding$", "cls_token"),
    (r"^visual\.positional_embedding$", "pos_embed"),
    (r"^visual\.conv1\.", "patch_embed.proj."),
    (r"^visual\.ln_pre\.", "norm_pre."),
    (r"^visual\.ln_post\.", "norm."),
    (r"^visual\.proj$", "head.weight"),
    (r"^visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)
_DINO = ((r"^dino_vit\.", ""),)
_TORCHVISION = (
    (r"^vit_model\.class_token$", "cls_token"),
    (r"^vit_model\.encoder\.pos_embedding$", "pos_embed"),
    (r"^vit_model\.conv_proj\.", "patch_embed.proj."),
    (r"^vit_model\.encoder\.ln\.", "norm."),
    (r"^vit_model\.heads\.head\.", "head."),
    (r"^vit_model\.encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (
        r"^vit_model\.encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_",
        r"blocks.\1.attn.qkv.",
    ),
    (
        r"^vit_model\.encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.",
        r"blocks.\1.attn.proj.",
    ),
    (r"^vit_model\.encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^vit_model\.encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.", r"blocks.\1.mlp.fc2."),
)
_VPT = (
    (r"^transformer\.embeddings\.cls_token$", "cls_token"),
    (r"^transformer\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^transformer\.encoder\.encoder_norm\.", "norm."),
    (r"^transformer\.encoder\.layer\.(\d+)\.attention_norm\.", r"blocks.\1.norm1."),
    (r"^transformer\.encoder\.layer\.(\d+)\.ffn_norm\.", r"blocks.\1.norm2."),
    (r"^transformer\.encoder\.layer\.(\d+)\.attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^transformer\.encoder\.layer\.(\d+)\.attn\.out\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.encoder\.layer\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
)


def clip(weights: dict[str, Tensor], config: dict[str, Any]) -> VisionTransformer:
    """OpenAI's CLIP image encoder; its projection is the timm head, without bias."""
    backbone = _vit(
        config,
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-5),
        act_layer=QuickGELU,
        mlp_ratio=weights["visual.transformer.resblocks.0.mlp.c_fc.bias"].numel() / config["width"],
    )
    backbone.head = nn.Linear(config["width"], config["output_dim"], bias=False)
    backbone.num_classes = config["output_dim"]
    state = _rename(weights, _CLIP, ignore=("logit_scale",))
    state["head.weight"] = state["head.weight"].T
    return _loaded(backbone, state)


def dino(weights: dict[str, Tensor], config: dict[str, Any]) -> VisionTransformer:
    """The DINO repository's ViT, without its head."""
    ratio = weights["dino_vit.blocks.0.mlp.fc1.bias"].numel() / config["width"]
    vit = {name: value for name, value in weights.items() if name.startswith("dino_vit.")}
    return _loaded(_vit(config, mlp_ratio=ratio), _rename(vit, _DINO))


def torchvision_vit(weights: dict[str, Tensor], config: dict[str, Any]) -> VisionTransformer:
    """torchvision's ViT with its head."""
    backbone = _vit(
        config, mlp_ratio=config["mlp_dim"] / config["width"], num_classes=config["classes"]
    )
    return _loaded(backbone, _rename(weights, _TORCHVISION))


def vpt(weights: dict[str, Tensor], config: dict[str, Any]) -> VisionTransformer:
    """The VPT repository's ViT, without its head."""
    weights = {n: t for n, t in weights.items() if not n.startswith("head.")}
    for i in range(config["layers"]):
        for kind in ("weight", "bias"):
            layer = f"transformer.encoder.layer.{i}.attn."
            q, k, v = (weights.pop(f"{layer}{name}.{kind}") for name in ("query", "key", "value"))
            weights[f"{layer}qkv.{kind}"] = torch.cat([q, k, v])
    ratio = config["mlp_dim"] / config["hidden"]
    backbone = _vit({**config, "width": config["hidden"]}, mlp_ratio=ratio)
    return _loaded(backbone, _rename(weights, _VPT))


class DINOHead(nn.Module):
    """Three linear layers with GELU between, L2 normalization, a linear layer without bias."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        widths = [weights[f"mlp.{i}.weight"].shape for i in (0, 2, 4)]
        layers = [nn.Linear(in_width, out_width) for out_width, in_width in widths]
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        out_width, in_width = weights["last_layer.weight"].shape
        self.last_layer = nn.Linear(in_width, out_width, bias=False)
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(pooled), dim=-1))


def _vit(config: dict[str, Any], **kwargs: Any) -> VisionTransformer:
    sizes = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["width"],
        "depth": config["layers"],
        "num_heads": config["heads"],
        "num_classes": 0,
    }
    return VisionTransformer(**(sizes | kwargs))


def _rename(
    weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...], ignore: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Every tensor under timm's name; one that no rule knows fails later, in load_state_dict."""
    state = {}
    for name, value in weights.items():
        if name not in ignore:
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            state[name] = value
    return state


def _loaded(backbone: VisionTransformer, state: dict[str, Tensor]) -> VisionTransformer:
    own = backbone.state_dict()
    backbone.load_state_dict({name: t.reshape(own[name].shape) for name, t in state.items()})
    return backbone
