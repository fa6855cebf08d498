"""What prompts are compared with: a linear probe, and fine-tuning of the whole backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .._stored import plain_name
from ..backbone.inputs import normalized
from ..backbone.load import load_backbone
from ..backbone.schedule import FrozenTokens
from .checkpoints import AdapterCheckpoints
from .heads import linear_head


def _classify(head: nn.Module, pooled: Tensor) -> Tensor:
    """Pooled features (B, D) to logits in the head's dtype: float32 on a half-precision backbone,
    see ``linear_head``."""
    own = next(head.parameters(), None)
    return head(pooled if own is None else pooled.to(own.dtype))


class LinearProbe(AdapterCheckpoints):
    """A trained linear layer on the pooled features of a frozen backbone.

    Args:
        backbone: as for ``PGN``; it is frozen in place and stays in eval mode.
        num_classes: C; None: as many as the backbone has.
    """

    def __init__(self, backbone: str | nn.Module, num_classes: int | None = None) -> None:
        super().__init__()
        self.backbone = load_backbone(backbone)
        num_classes = self.backbone.num_classes if num_classes is None else num_classes
        self.num_classes = num_classes
        self.method = "linear"
        self.adapter_config = {"num_classes": num_classes}
        self.head = linear_head(self.backbone, num_classes)

    def train(self, mode: bool = True) -> LinearProbe:
        """Training mode for the head; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def frozen_blocks(self) -> int:
        """How many blocks come before anything that is trained: all."""
        return len(self.backbone.blocks)

    def below(self, images: Tensor) -> FrozenTokens:
        """Images (B, 3, H, W) to pooled features (B, D), which the model takes in their place."""
        with torch.no_grad():
            features = self.backbone.forward_features(normalized(self.backbone, images))
            pooled = self.backbone.forward_head(features, pre_logits=True)
        return FrozenTokens(pooled, self.frozen_blocks)

    def forward(self, images: Tensor | FrozenTokens) -> Tensor:
        """Images (B, 3, H, W), or what ``below`` made of them, to logits (B, C)."""
        frozen = images if isinstance(images, FrozenTokens) else self.below(images)
        return self.classify(frozen.tokens)

    def classify(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, D) to logits (B, C)."""
        return _classify(self.head, pooled)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The head's weights."""
        return {plain_name(f"head.{n}"): value for n, value in self.head.state_dict().items()}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``adapter_state_dict`` gave; RuntimeError where it does not fit."""
        own = {plain_name(f"head.{name}"): name for name in self.head.state_dict()}
        self.head.load_state_dict({own.get(name, name): value for name, value in state.items()})


class FineTuned(nn.Module):
    """A backbone that is trained as a whole, with a new linear head.

    Args:
        backbone: as for ``PGN``; from here on its weights change.
        num_classes: C; None: as many as the backbone has.
    """

    def __init__(self, backbone: str | nn.Module, num_classes: int | None = None) -> None:
        super().__init__()
        self.backbone = load_backbone(backbone).requires_grad_(True)
        num_classes = self.backbone.num_classes if num_classes is None else num_classes
        # the backbone's own head would be a parameter without a gradient
        self.backbone.reset_classifier(0)
        self.num_classes = num_classes
        self.method = "full"
        self.adapter_config = {"num_classes": num_classes}
        self.head = linear_head(self.backbone, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone, as the backbone names them."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """From a parameter's name to its layer, as the backbone counts them, the head last: what
        timm's layer decay goes by."""
        prefix = "backbone."
        names = {name: name.removeprefix(prefix) for name, _ in self.named_parameters()}
        layers = group_with_matcher(
            iter([(name, None) for name in names.values()]),
            self.backbone.group_matcher(coarse=coarse),
            reverse=True,
        )
        return lambda name: (float(layers[names[name]]),)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, C)."""
        features = self.backbone.forward_features(normalized(self.backbone, images))
        return _classify(self.head, self.backbone.forward_head(features, pre_logits=True))

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """All weights: backbone and head."""
        return {plain_name(name): value for name, value in self.state_dict().items()}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``adapter_state_dict`` gave; RuntimeError where it does not fit."""
        own = {plain_name(name): name for name in self.state_dict()}
        self.load_state_dict({own.get(name, name): value for name, value in state.items()})
