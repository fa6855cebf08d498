"""A frozen ViT with learned prompts: VPT-Deep, VPT-Shallow and the ablations of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone.load import load_backbone
from ..backbone.options import FastOptions
from ..prompts import PixelPrompts, Prompter, VisualPrompts
from ..prompts.pixels import LOCATIONS as PIXEL_LOCATIONS
from .base import POOLS, PromptedViT
from .heads import build_head
from .values import constructor_values

TOKEN_LOCATIONS = ("prepend", "add", "add-1")


class VPT(PromptedViT):
    """A frozen ViT with learned prompts, the same for every image: VPT-Deep, -Shallow, ablations.

    Prompts stand after the prefix tokens and before the patch tokens. Those of block 0 enter
    before ``norm_pre`` where the backbone has one (CLIP), those of other blocks before the block.

    Args:
        backbone: a timm vision transformer, or a timm model name (pretrained weights are loaded).
            It is frozen in place.
        num_classes: C of a new linear head; None: as many as the backbone has, 0: no head.
        num_prompts: P, prompt tokens per block. For "pad" pixels of border, for "below" channels,
            for "prepend-pixel" patches; "add" and "add-1" have no tokens and do not use it.
        deep: new prompts at every block; False: VPT-Shallow, prompts at block 0 that stay.
        layers: the block indices, from 0, that get prompts of their own; None: all.
        shared: one set of prompts for all these blocks.
        expand: after the last such block the prompts stay in the sequence; False: they leave.
        project_dim: the prompts' stored width, projected to D by one shared linear layer.
        dropout: on the prompts, in training; each image and block has its own mask.
        location: "prepend", or the paper's ablations "add" (one vector per token, added), "add-1"
            (one vector for all tokens), "pad", "below", "prepend-pixel" (see ``PixelPrompts``).
            The last three act once, on the image: ``deep`` is without meaning for them.
        pool: "original" (the backbone's), or the mean of patches "img_pool", of prompts
            "prompt_pool", of both "imgprompt_pool".
        head, class_embeddings, logit_scale, backend, fast: as for ``PGN``.
        head_init: of a new linear head. "torch": nn.Linear's own, the loss begins near ln C;
            "zero": at ln C; "official": the official code's Kaiming weights and biases of -log 99,
            made for a hundred classes and hard to recover from with few.

    Raises:
        ValueError, TypeError: an argument that cannot work; the message says what would.

    Source: Jia et al., "Visual Prompt Tuning", arXiv:2203.12119, section 3.2 and, for the
    ablations, section 4.3.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        num_prompts: int = 50,
        deep: bool = True,
        layers: Sequence[int] | None = None,
        shared: bool = False,
        expand: bool = True,
        project_dim: int | None = None,
        dropout: float = 0.0,
        location: str = "prepend",
        pool: str = "original",
        head: str | nn.Module = "linear",
        class_embeddings: Tensor | None = None,
        logit_scale: float = 100.0,
        head_init: str = "torch",
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        config = constructor_values(locals())
        # whatever they came as: arrays, tensors of one number, ranges
        layers, shared, dropout = config["layers"], config["shared"], config["dropout"]
        num_prompts, project_dim = config["num_prompts"], config["project_dim"]
        logit_scale = config["logit_scale"]
        vit: Any = load_backbone(backbone)
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}; known: {', '.join(POOLS)}")
        if location not in (*TOKEN_LOCATIONS, *PIXEL_LOCATIONS):
            known = ", ".join((*TOKEN_LOCATIONS, *PIXEL_LOCATIONS))
            raise ValueError(f"location={location!r}; known: {known}")
        if location != "prepend" and not expand:
            raise ValueError(f"expand=False removes prompt tokens; location={location!r} has none")
        without_tokens = not location.startswith("prepend") or not expand
        if pool == "prompt_pool" and without_tokens:
            raise ValueError(
                f"pool='prompt_pool' averages prompt tokens, but with location={location!r} and "
                f"expand={expand} none are there after the last block"
            )
        prompter: Prompter
        if location in PIXEL_LOCATIONS:
            token_only = {"layers": layers is not None, "project_dim": project_dim is not None}
            token_only |= {"shared": shared, "dropout": dropout > 0}
            if given := [name for name, is_given in token_only.items() if is_given]:
                raise ValueError(
                    f"location={location!r} prompts the image, once: {', '.join(given)} cannot "
                    "apply to it"
                )
            prompter = PixelPrompts(vit, num_prompts, location)
        else:
            every_token = vit.num_prefix_tokens + vit.patch_embed.num_patches
            prompter = VisualPrompts(
                vit.embed_dim,
                tuple(vit.patch_embed.patch_size),
                {"prepend": num_prompts, "add": every_token, "add-1": 1}[location],
                _prompted_blocks(layers, deep, len(vit.blocks)),
                shared=shared,
                project_dim=project_dim,
                dropout=dropout,
                position="prepend" if location == "prepend" else "add",
                keep=expand,
            )
        built = build_head(
            head,
            vit,
            num_classes,
            class_embeddings=class_embeddings,
            logit_scale=logit_scale,
            init=head_init,
        )
        super().__init__(
            vit,
            prompter,
            built,
            method="vpt-deep" if deep else "vpt-shallow",
            config=config,
            pool=pool,
            backend=backend,
            fast=fast,
        )


def _prompted_blocks(layers: Sequence[int] | None, deep: bool, depth: int) -> tuple[int, ...]:
    """Which blocks get prompts of their own, in order."""
    if layers is None:
        return tuple(range(depth)) if deep else (0,)
    if not deep:
        raise ValueError("layers says which blocks get prompts, deep=False says block 0: give one")
    blocks = tuple(sorted(layers))
    if not blocks or len(set(blocks)) < len(blocks) or blocks[0] < 0 or blocks[-1] >= depth:
        raise ValueError(
            f"layers={list(layers)} must be different block indices from 0 to {depth - 1}, the "
            f"backbone's last; all are range({depth})"
        )
    return blocks
