"""timm's side of a prompted ViT: classifier, features, and facts about the backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..backbone.inputs import normalized
from ..backbone.readout import Readout
from ..backbone.schedule import PromptSchedule
from .heads import KeptHead, linear_head


class TimmInterface(nn.Module):
    """What code written for timm's ViTs asks a model for. Prompts are never in what comes out."""

    backbone: Any
    prompter: Any
    head: nn.Module
    backend: str | None
    adapter_config: dict[str, Any]
    class_names: Sequence[str] | None
    # of PromptedViT
    _disabled: bool
    _prompted: Callable[..., tuple[Tensor, PromptSchedule]]
    _encode: Callable[..., Tensor]

    @property
    def pretrained_cfg(self) -> Any:
        """timm's facts about the backbone's weights: input size, mean, standard deviation."""
        return getattr(self.backbone, "pretrained_cfg", None)

    @property
    def default_cfg(self) -> Any:
        """timm's facts about the backbone's weights, as ``pretrained_cfg``."""
        return getattr(self.backbone, "default_cfg", None)

    @property
    def feature_info(self) -> Any:
        """The backbone's own: one entry a block."""
        return self.backbone.feature_info

    @property
    def num_prefix_tokens(self) -> int:
        """S, class, distillation and register tokens."""
        return self.backbone.num_prefix_tokens

    @property
    def global_pool(self) -> str:
        """How the backbone pools."""
        return self.backbone.global_pool

    @property
    def num_features(self) -> int:
        """The width of the pooled features that the head reads."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """The width of the pooled features."""
        return self.backbone.num_features

    def get_classifier(self) -> nn.Module:
        """The head; the backbone's own (a pair in distilled DeiT) with ``head="keep"``."""
        return self.backbone.get_classifier() if isinstance(self.head, KeptHead) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new linear layer; ``num_classes=0`` by none.

        ``global_pool`` may only repeat the backbone's: the backbone is frozen, its pooling too.
        """
        if global_pool not in (None, self.backbone.global_pool):
            raise ValueError(
                f"global_pool={global_pool!r}: the frozen backbone pools by "
                f"{self.backbone.global_pool!r}; create it with another global_pool instead"
            )
        self.head = linear_head(self.backbone, num_classes)
        self.adapter_config |= {"num_classes": num_classes, "head": "linear"}
        self.class_names = None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers must not decay: the frozen backbone's.

        Prompts and library do decay where the recipe has a weight decay, as in the official code.
        """
        names = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        own = getattr(getattr(self.prompter, "generator", None), "no_weight_decay", set)
        return names | {f"prompter.generator.{name}" for name in own()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens after chosen blocks, as timm's method of that name gives them.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks for an int, blocks by index for a sequence; None all.
            return_prefix_tokens: pairs of patch and prefix tokens (B, S, D).
            norm: the backbone's final norm on each.
            stop_early: run no block after the last that is wanted.
            output_fmt: "NCHW": (B, D, H / p, W / p) each; "NLC": (B, N, D).
            intermediates_only: leave out the final tokens (B, S + N, D).
            output_dict: a dictionary with timm's keys.
            attn_mask, is_causal: not supported with prompts.

        Returns:
            (final tokens, list), the list alone, or the dictionary.

        Raises:
            ValueError: an output format or a mask that is not supported.
        """
        if attn_mask is not None or is_causal:
            given = "is_causal" if attn_mask is None else "attn_mask"
            raise ValueError(f"forward_intermediates: {given} is not supported with prompts")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; known: NCHW, NLC")
        backbone = self.backbone
        if self._disabled:
            return backbone.forward_intermediates(
                normalized(backbone, x), indices, return_prefix_tokens, norm, stop_early,
                output_fmt, intermediates_only, output_dict,
            )  # fmt: skip
        if isinstance(indices, Sequence):
            indices = list(indices)
        take, last = feature_take_indices(len(backbone.blocks), indices)
        wanted: dict[int, Tensor] = {}
        readout = Readout(prompts=False, after=frozenset(take), stop=last if stop_early else None)
        images, schedule = self._prompted(x, self.backend)
        final = self._encode(images, schedule, readout, wanted)
        found = [wanted[i] for i in sorted(wanted)]
        if norm:
            found = [backbone.norm(tokens) for tokens in found]
        S = backbone.num_prefix_tokens
        prefix, maps = [t[:, :S] for t in found], [t[:, S:] for t in found]
        if output_fmt == "NCHW":
            rows, columns = backbone.patch_embed.dynamic_feat_size(tuple(x.shape[2:]))
            maps = [t.mT.unflatten(2, (rows, columns)).contiguous() for t in maps]
        with_prefix = return_prefix_tokens and S > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": final}
        listed: list[Any] = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return listed if intermediates_only else (final, listed)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """DINO's interface to ``forward_intermediates``: the last n blocks, or blocks by index."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )
