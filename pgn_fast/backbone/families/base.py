"""What the rest of the package asks about one of timm's classes of vision transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import written

_IDENTITY = nn.Identity()


class Family:
    """One of timm's classes: how its tokens are made, where positions enter, what a block is.

    A subclass overrides what its class does differently, and has a row in ``FAMILIES``. The methods
    up to ``run_block`` are all that the eager path needs, for every block class that timm puts into
    the family. The engine also reads the weights of ``blocks`` and ``attentions``, the classes that
    it computes by its own code; backbones of other blocks run by the eager path.

    Letters: B images, S prefix tokens, N patches, T = S + N, h heads of width d, A = h d.

    Attributes:
        kind: timm's class.
        blocks, attentions: the classes that ``qkv``, ``project``, ``gain`` and ``scale`` read.
        prefix_names: attributes that hold prefix tokens (1, n, D), in their order.
        position_modules: attributes of the backbone, None or modules that ``score_bias`` runs.
    """

    kind: ClassVar[type[nn.Module]]
    blocks: ClassVar[tuple[type[nn.Module], ...]] = ()
    attentions: ClassVar[tuple[type[nn.Module], ...]] = ()
    prefix_names: ClassVar[tuple[str, ...]] = ("cls_token",)
    position_modules: ClassVar[tuple[str, ...]] = ()

    # ---- tokens ---------------------------------------------------------------------------------

    def tokens(self, backbone: Any, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches as ``patch_embed`` gives them to tokens (B, S + N, D), position embedding added,
        and a rotary embedding or None: what stands before ``norm_pre``."""
        raise NotImplementedError

    def norm_pre(self, backbone: Any) -> nn.Module:
        """The norm between the position embedding and block 0 (CLIP's ``ln_pre``)."""
        return getattr(backbone, "norm_pre", _IDENTITY)

    def pooled_rows(self, backbone: Any) -> int | None:
        """How many leading tokens the backbone's own pooling reads; None: also patches."""
        return 1 if backbone.global_pool == "token" else None

    def embed_unsupported_reason(self, backbone: Any) -> str | None:
        """Why one op cannot embed patches and prefix tokens; None where ``tokens`` is: prefix
        tokens, then patches, plus ``pos_embed`` of all tokens or of the patches alone."""
        return f"the tokens of {type(backbone).__name__} are put together by its own code"

    def prefix(self, backbone: Any) -> list[Tensor]:
        """The prefix tokens (1, n, D); their position embedding is the first rows of ``pos_embed``
        where that has any for them."""
        found = (getattr(backbone, name, None) for name in self.prefix_names)
        return [t for t in found if t is not None]

    # ---- positions in a block -------------------------------------------------------------------

    def rotates(self, backbone: Any) -> bool:
        """Whether queries and keys are rotated by their place in the image."""
        return False

    def block_rope(self, backbone: Any, rope: Tensor | None, i: int) -> Tensor | None:
        """What block ``i`` takes of the rotary embedding from ``tokens``: sine and cosine side by
        side, (N, 2 d)."""
        return rope

    def biases_scores(self, backbone: Any) -> bool:
        """Whether any block has a ``score_bias``."""
        return False

    def score_bias(self, backbone: Any, i: int) -> Tensor | None:
        """What block ``i`` adds to the scores of its tokens, (1, h, T, T)."""
        return None

    # ---- blocks ---------------------------------------------------------------------------------

    def run_block(self, block: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        """timm's own block on tokens (B, T + P, D), with position terms that have rows for the
        prompts."""
        return block(x)

    def qkv(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        """Weight (3 A, D) and bias (3 A,) of queries, keys and values."""
        return attention.qkv.weight, attention.qkv.bias

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, T, A) by timm's own modules."""
        return attention.qkv(x).chunk(3, dim=-1)

    def gain(self, block: Any, index: int) -> Tensor | None:
        """LayerScale (D,) of the attention (1) or of the MLP (2); None where there is none."""
        return getattr(getattr(block, f"ls{index}"), "gamma", None)

    def scale(self, block: Any, index: int, y: Tensor) -> Tensor:
        """y times ``gain``, by timm's own module."""
        return getattr(block, f"ls{index}")(y)


class BareParameters(Family):
    """Classes whose LayerScale and whose biases of queries, keys and values are parameters of block
    and attention, not modules (EVA, BEiT)."""

    def qkv(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        biases = _separate_biases(attention)
        return super().qkv(attention) if biases is None else (attention.qkv.weight, biases)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, ...]:
        biases = _separate_biases(attention)
        if biases is None:
            return super().project(attention, x)
        if attention.qkv_bias_separate:
            return (attention.qkv(x) + biases).chunk(3, dim=-1)
        return F.linear(x, attention.qkv.weight, biases).chunk(3, dim=-1)

    def gain(self, block: Any, index: int) -> Tensor | None:
        return getattr(block, f"gamma_{index}")

    def scale(self, block: Any, index: int, y: Tensor) -> Tensor:
        gain = self.gain(block, index)
        return y if gain is None else gain * y


class BiasedScores(Family):
    """Classes of which every block may add a bias to its scores (BEiT), zero where a prompt takes
    part."""

    def embed_unsupported_reason(self, backbone: Any) -> str | None:
        return patches_unsupported_reason(backbone)

    def run_block(self, block: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        # timm's forwards take no bias of another size
        return written.run_block(self, block, x, rope=rope, bias=bias)


def after_class_token(backbone: Any, patches: Tensor) -> Tensor:
    """The class token, where there is one, and the patches: (B, S + N, D)."""
    if backbone.cls_token is None:
        return patches
    return torch.cat([backbone.cls_token.expand(len(patches), -1, -1), patches], dim=1)


def heads(block: Any) -> tuple[int, int]:
    """h and d of a block's attention."""
    attention = block.attn
    return attention.num_heads, attention.proj.in_features // attention.num_heads


def hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks that are registered on a module, of every kind."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def changed(module: nn.Module) -> bool:
    """Whether a module runs other code than its class: a hook, or a forward of its own."""
    return any(map(len, hooks(module))) or "forward" in module.__dict__


def patches_unsupported_reason(backbone: Any) -> str | None:
    """Why a patch embedding is not one convolution of whole, separate patches; None where it is."""
    patch_embed = backbone.patch_embed
    if type(patch_embed) is not timm.layers.PatchEmbed or type(patch_embed.proj) is not nn.Conv2d:
        return f"{type(patch_embed).__name__} is no plain patch embedding"
    if not isinstance(patch_embed.norm, nn.Identity) or not patch_embed.flatten:
        return "its patches are normalized or kept as a map"
    if getattr(backbone, "dynamic_img_size", False) or patch_embed.dynamic_img_pad:
        return "its images may have any size"
    if any(i % p for i, p in zip(patch_embed.img_size, patch_embed.patch_size, strict=True)):
        return "its images are not whole patches"
    proj, p = patch_embed.proj, tuple(patch_embed.patch_size)
    if (proj.kernel_size, proj.stride, proj.padding) != (p, p, (0, 0)) or proj.groups != 1:
        return "its patches overlap or are padded"
    if "_pos_embed" in backbone.__dict__:
        return "its _pos_embed was replaced"
    drops = (getattr(backbone, name, _IDENTITY) for name in ("pos_drop", "patch_drop"))
    for module in (*patch_embed.modules(), *drops):
        if changed(module):
            return "its patch embedding has a hook or another forward"
    return None


def _separate_biases(attention: Any) -> Tensor | None:
    """Their biases (3 A,) where they are apart from the Linear."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
