"""What stands on the pooled features of a prompted ViT: a new layer, the old one, or texts."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("linear", "keep", "zero_shot")
HEAD_INITS = ("torch", "zero", "official")
# new layers as nn.Linear made them -> how often their weight and bias had been written by then
_new: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


class KeptHead(nn.Module):
    """The backbone's own classifier, frozen: pooled features (B, D) to logits (B, C)."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        # in a tuple: as a submodule its weights would appear in the state dict a second time
        self._backbone = (backbone,)

    def forward(self, pooled: Tensor) -> Tensor:
        return backbone_logits(self._backbone[0], pooled)


class ZeroShotHead(nn.Module):
    """Logits by similarity to class texts, as CLIP classifies: nothing here is trained.

        logits = logit_scale * normalize(features) @ normalize(class_embeddings).T

    The class embeddings (C, E) are normalized once, here. Features are the backbone's projected
    ones where its head projects to E (CLIP's image projection), else the pooled ones.

    Source: Radford et al., arXiv:2103.00020, section 3.1.2.
    """

    def __init__(self, backbone: Any, class_embeddings: Tensor, logit_scale: float) -> None:
        super().__init__()
        if class_embeddings.ndim != 2 or not class_embeddings.is_floating_point():
            raise ValueError(
                "class_embeddings must be floating-point, (C, E): one row per class, got "
                f"{class_embeddings.dtype} of shape {tuple(class_embeddings.shape)}"
            )
        width = class_embeddings.shape[1]
        projects = getattr(backbone.head, "out_features", None) == width
        if not projects and width != backbone.num_features:
            raise ValueError(
                f"class_embeddings are {width} wide, but this backbone's features are "
                f"{backbone.num_features} wide and its head gives {backbone.num_classes}; use a "
                "CLIP backbone with its projection, such as vit_base_patch32_clip_224.openai"
            )
        self._projector = (backbone if projects else None,)
        self.logit_scale = float(logit_scale)
        self.class_embeddings: Tensor
        like = next(backbone.parameters())
        normalized = F.normalize(class_embeddings.detach().to(like.device), dim=-1)
        self.register_buffer("class_embeddings", normalized)

    def forward(self, pooled: Tensor) -> Tensor:
        projector = self._projector[0]
        features = pooled if projector is None else backbone_logits(projector, pooled)
        features = F.normalize(features, dim=-1)
        return self.logit_scale * features @ self.class_embeddings.to(features.dtype).T


def build_head(
    head: str | nn.Module,
    backbone: Any,
    num_classes: int | None,
    *,
    class_embeddings: Tensor | None = None,
    logit_scale: float = 100.0,
    init: str = "torch",
) -> nn.Module:
    """The head that ``PGN`` and ``VPT`` were asked for, on pooled features (B, D).

    Args:
        head: "linear", "keep", "zero_shot", or a module.
        backbone: a timm vision transformer.
        num_classes: C. None: the backbone's own number. 0 with "linear": the pooled features.
        class_embeddings: (C, E), for "zero_shot".
        logit_scale: for "zero_shot", already exponentiated.
        init: of a new linear layer, see ``linear_head``.

    Raises:
        ValueError: the arguments contradict each other or the backbone; TypeError: no such kind.
    """
    if isinstance(head, str) and head not in HEADS:
        raise ValueError(f"head={head!r}; known: {', '.join(HEADS)}, or a module")
    if (class_embeddings is None) == (head == "zero_shot"):
        raise ValueError(
            "head='zero_shot' needs class_embeddings (C, E), one encoded text per class"
            if class_embeddings is None
            else f"class_embeddings were given, but head={head!r} does not use them"
        )
    if isinstance(head, nn.Module):
        return head
    if head == "linear":
        num_classes = backbone.num_classes if num_classes is None else num_classes
        return linear_head(backbone, num_classes, init)
    if head == "keep":
        built: nn.Module = KeptHead(backbone)
        own = backbone.num_classes
    elif head == "zero_shot":
        assert class_embeddings is not None
        built = ZeroShotHead(backbone, class_embeddings, logit_scale)
        own = len(class_embeddings)
    else:
        raise TypeError(f"head takes a name or a module, got {type(head).__name__}")
    if num_classes not in (None, own):
        raise ValueError(f"num_classes={num_classes}, but head={head!r} has {own} classes")
    if own < 1:
        raise ValueError("head='keep': this backbone has none, its num_classes is 0")
    return built


def linear_head(backbone: Any, num_classes: int, init: str = "torch") -> nn.Module:
    """A new linear layer (D -> C) on the backbone's device.

    Args:
        backbone: a timm vision transformer.
        num_classes: C; 0 gives the identity, as in timm.
        init: see ``initialize_head``.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    if init not in HEAD_INITS:
        raise ValueError(f"head_init={init!r}; known: {', '.join(HEAD_INITS)}")
    if num_classes == 0:
        return nn.Identity()
    like = next(backbone.parameters())
    dtype = trained_dtype(like.dtype)
    layer = nn.Linear(backbone.num_features, num_classes, device=like.device, dtype=dtype)
    initialize_head(layer, init)
    if init == "torch" and not layer.weight.is_inference():  # which counts no writes
        _new[layer] = _writes(layer)
    return layer


def is_new(head: nn.Module) -> bool:
    """Whether a head is a linear layer as ``linear_head`` made it by default: nobody chose another
    start, trained it or loaded it since. A copy of one is not."""
    return head in _new and _new[head] == _writes(head)


def _writes(layer: nn.Module) -> tuple[int, int]:
    return layer.weight._version, layer.bias._version


def initialize_head(layer: nn.Linear, init: str) -> None:
    """Set a linear layer's start in place.

    Args:
        init: "torch" keeps nn.Linear's own start, as the official PGN code does: the loss begins
            near ln C. "zero": it begins at ln C exactly, and the prompts' gradients at the second
            step. "official" draws weights Kaiming normal (fan-out) and sets biases to -log(99), as
            the official VPT code does: made for a hundred classes; with few classes the loss begins
            ten times above ln C.
    """
    if init == "official":
        nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out")
        nn.init.constant_(layer.bias, -math.log(99.0))
    elif init == "zero":
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def trained_dtype(frozen: torch.dtype) -> torch.dtype:
    """The dtype of trained weights on a backbone of dtype ``frozen``: never half precision."""
    return torch.promote_types(frozen, torch.float32)


def count_classes(head: nn.Module, num_classes: int | None) -> int:
    """C of a head: as told, else as its last layer says; 0 where nothing says it."""
    if isinstance(head, KeptHead):
        return head._backbone[0].num_classes
    if isinstance(head, ZeroShotHead):
        return len(head.class_embeddings)
    if num_classes is not None:
        return num_classes
    widths = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else 0


def backbone_logits(backbone: Any, pooled: Tensor) -> Tensor:
    """The backbone's own classifier on pooled features; DeiT's two, averaged."""
    classifier = backbone.get_classifier()
    if isinstance(classifier, tuple):
        return torch.stack([part(pooled) for part in classifier]).mean(dim=0)
    return classifier(pooled)
