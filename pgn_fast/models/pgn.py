"""A frozen ViT whose prompts a small network generates from each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..backbone.inputs import check_images, normalized
from ..backbone.load import load_backbone
from ..backbone.options import FastOptions
from ..prompts import PromptGenerator
from .base import PromptedViT
from .heads import build_head
from .values import constructor_values


class PGN(PromptedViT):
    """A frozen ViT whose prompts a small network generates from each image.

    The prompts enter after the patch tokens, without position embedding, before ``norm_pre`` where
    the backbone has one (CLIP), and stay to the end; pooling never sees them.

    Args:
        backbone: a timm vision transformer, or a timm model name (pretrained weights are loaded).
            It is frozen in place.
        num_classes: C of a new linear head; None: as many as the backbone has, 0: no head.
        num_prompts: P, prompt tokens per image.
        library_size: K, tokens in the token library.
        generator: "resnet10" (the paper's), any timm model name, a module from (B, 3, R, R) to
            (B, P * K), or a ready ``PromptGenerator``, which then says all sizes.
        generator_kwargs: for a generator that is named; see ``PromptGenerator``.
        resolution: R in pixels, what the generator sees.
        activation: "softmax" (the paper's) or "sigmoid".
        token_library: a module that yields the library (K, D); None: a plain Parameter.
        head: "linear" (new, trained), "keep" (the backbone's own, frozen), "zero_shot" (CLIP:
            similarity to ``class_embeddings``), or a module on the pooled features (B, D).
        class_embeddings: (C, E), one encoded text per class, for "zero_shot".
        logit_scale: for "zero_shot", already exponentiated (CLIP: 100).
        backend: "reference", "cpu", "triton" or "cuda" for this package's ops; None: the fastest.
        fast: run the backbone with the exact savings; False: by timm's own blocks. Also a memory
            plan, "fast", "balanced" or "min", or ``FastOptions`` to switch single savings.

    Raises:
        ValueError, TypeError: an argument that cannot work; the message says what would.

    Source: Loedeman et al., "Prompt Generation Networks for Input-Space Adaptation of Frozen Vision
    Transformers", arXiv:2210.06466; official code, github.com/jochemloedeman/PGN.
    """

    prompter: PromptGenerator

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        num_prompts: int = 16,
        library_size: int = 256,
        generator: str | nn.Module = "resnet10",
        generator_kwargs: Mapping[str, Any] | None = None,
        resolution: int = 224,
        activation: str = "softmax",
        token_library: nn.Module | None = None,
        head: str | nn.Module = "linear",
        class_embeddings: Tensor | None = None,
        logit_scale: float = 100.0,
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        config = constructor_values(locals())
        num_prompts, library_size = config["num_prompts"], config["library_size"]
        resolution, logit_scale = config["resolution"], config["logit_scale"]
        vit: Any = load_backbone(backbone)
        if isinstance(generator, PromptGenerator):
            prompter = _ready_generator(generator, vit, generator_kwargs, token_library)
        else:
            if isinstance(generator, str) and vit.in_chans != 3:
                generator_kwargs = {"in_chans": vit.in_chans, **(generator_kwargs or {})}
            prompter = PromptGenerator(
                vit.embed_dim,
                num_prompts=num_prompts,
                library_size=library_size,
                generator=generator,
                generator_kwargs=generator_kwargs,
                resolution=resolution,
                activation=activation,
                token_library=token_library,
            )
        built = build_head(
            head, vit, num_classes, class_embeddings=class_embeddings, logit_scale=logit_scale
        )
        super().__init__(
            vit,
            prompter,
            built,
            method="pgn",
            config=config | prompter.config,
            backend=backend,
            fast=fast,
        )

    def prompts(self, images: Tensor) -> Tensor:
        """The prompt tokens of each image, (B, P, D); of a GamutLibrary, what a patch adds to the
        token of a mid-gray one."""
        check_images(self.backbone, images)
        return self.prompter(normalized(self.backbone, images), backend=self.backend)


def _ready_generator(
    generator: PromptGenerator,
    backbone: Any,
    generator_kwargs: Mapping[str, Any] | None,
    token_library: nn.Module | None,
) -> PromptGenerator:
    """The given generator, if it fits the backbone and nothing else was given with it."""
    if generator_kwargs or token_library is not None:
        raise ValueError(
            "generator is a ready PromptGenerator, which has its network and token library: leave "
            "out generator_kwargs and token_library"
        )
    if generator.embed_dim != backbone.embed_dim:
        raise ValueError(
            f"generator makes prompts of width {generator.embed_dim}, the backbone's tokens are "
            f"{backbone.embed_dim} wide"
        )
    return generator
