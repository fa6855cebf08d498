"""Images to the tokens that enter block 0, its prompts among them where one op can place them.

Prompts that stay in the sequence are mixed and placed by ``prompted_patch_embed``, after the
patches, in the buffer (B, S + N + P, D) that it allocates. ``apart`` says why they are not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import prompted_patch_embed
from ..ops._register import leaves_this_package, transformed
from . import eager
from .cache import BackboneCache
from .entering import mixed_rows
from .inputs import mean_and_std
from .options import FastOptions
from .schedule import FrozenTokens, Mixture, PromptSchedule
from .steps import BlockStep


class Embedded(NamedTuple):
    """The sequence that enters block 0, before ``norm_pre``, or a block above.

    Attributes:
        x: (B, S + N, D), or (B, S + N + P, D) with prompts ``inside``.
        num_tokens: S + N.
        rope: rotary embedding, as ``eager.embed`` gives it.
        prompts: what the last P rows of x hold, (P, D) or (B, P, D), and what the gradient goes
            through; None where it goes through all of x. Not inside: the prompts that are to join,
            or None.
        inside: the prompts of block 0 are the last rows of x.
        block: that the sequence enters.
    """

    x: Tensor
    num_tokens: int
    rope: Tensor | None
    prompts: Tensor | None
    inside: bool
    block: int = 0


class Embedding:
    """The embedding of one engine; ``cache``, ``options`` and ``backend`` are the engine's."""

    def __init__(self, cache: BackboneCache, options: FastOptions, backend: str | None) -> None:
        self.cache, self.options, self.backend = cache, options, backend

    def __call__(
        self, images: Tensor | FrozenTokens, schedule: PromptSchedule, first: BlockStep
    ) -> Embedded:
        """Images, and the prompts of block 0; or the tokens that enter a block above.

        Args:
            first: the step of block 0.
        """
        if isinstance(images, FrozenTokens):
            x, rope, block = eager.half_way(self.cache.backbone, images, schedule)
            return Embedded(x, x.shape[1], rope, None, inside=False, block=block)
        if self.prompts_apart(schedule, first, images.device.type) is None:
            return self._with_prompts(images, schedule)
        below = images.requires_grad or schedule.patch_weight is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and below):
            x, rope = self.tokens(images, schedule)
        prompts = schedule.parts(0).tokens
        if prompts is not None:
            prompts = eager.prompt_tokens(0, prompts, x, self.backend)
            if schedule.position == "add":
                return Embedded(x + prompts, x.shape[1], rope, None, inside=False)
        return Embedded(x, x.shape[1], rope, prompts, inside=False)

    def tokens(self, images: Tensor, schedule: PromptSchedule) -> tuple[Tensor, Tensor | None]:
        """What ``eager.embed`` returns: no prompts."""
        if self.apart(schedule, images.device.type) is not None:
            return eager.embed(self.cache.backbone, images, schedule.patch_weight)
        return self.by_op(images), None

    def prompts_apart(
        self, schedule: PromptSchedule, first: BlockStep, device_type: str
    ) -> str | None:
        """Why the prompts of block 0, whose step is ``first``, are not written by the op; None
        where they are."""
        tokens = first.tokens
        if schedule.position == "add":
            return "nothing is inserted, the prompts are added to tokens or pixels"
        if tokens is None:
            return "no prompt tokens enter block 0"
        if not isinstance(tokens, Tensor | Mixture):
            return "the prompts of block 0 are computed from the embedded tokens"
        if self.options.kv_only and first.kv_only:
            return "the prompts of block 0 are keys and values only"
        return self.apart(schedule, device_type)

    def mixed_apart(self, schedule: PromptSchedule) -> str | None:
        """Why a mixture whose prompts the op writes is mixed by another op; None where it is not,
        or where there is none."""
        tokens = schedule.parts(0).tokens
        if not isinstance(tokens, Mixture) or tokens.logits.dtype == self.cache.dtype:
            return None
        return (
            f"the mixture is {tokens.logits.dtype}, the backbone {self.cache.dtype}: mixed in "
            "the first, rounded once"
        )

    def apart(self, schedule: PromptSchedule, device_type: str) -> str | None:
        """Why timm's own code embeds the images; None where one op does."""
        if not self.options.embed:
            return "embed is switched off"
        if reason := self.cache.embed_unsupported_reason:
            return reason
        if schedule.patch_weight is not None:
            return "another patch projection stands in"
        if leaves_this_package() or transformed():
            return "an exported or transformed program runs in PyTorch's own ops"
        if torch.is_autocast_enabled(device_type):
            return "under autocast timm adds its position embedding in float32"
        eager_op = self.cache.backend_for("prompted_patch_embed", self.cache.dtype) == "reference"
        if eager_op and torch.compiler.is_compiling():
            return "a compiler fuses eager PyTorch itself"
        return None

    def by_op(
        self, images: Tensor, mixture: Mixture | None = None, prompts: Tensor | None = None
    ) -> Tensor:
        """(B, S + N + P, D) by one op, prompts last."""
        backbone, cache = self.cache.backbone, self.cache
        mean, std = (None, None) if images.is_floating_point() else mean_and_std(backbone)
        proj = backbone.patch_embed.proj
        prefix = cache.family.prefix(backbone)
        return prompted_patch_embed(
            images,
            proj.weight,
            proj.bias,
            getattr(backbone, "pos_embed", None),
            torch.cat(prefix, dim=1) if prefix else None,
            None if mixture is None else mixture.logits,
            None if mixture is None else mixture.token_library,
            activation="softmax" if mixture is None else mixture.activation,
            prompts=prompts,
            mean=mean,
            std=std,
            backend=cache.backend_for("prompted_patch_embed", cache.dtype),
        )

    def _with_prompts(self, images: Tensor, schedule: PromptSchedule) -> Embedded:
        """One buffer for all tokens. Its gradient goes through the prompts' rows alone, unless the
        images have one too or ``first`` is switched off."""
        tokens: Any = schedule.parts(0).tokens
        dtype = self.cache.dtype
        if isinstance(tokens, Mixture) and tokens.logits.dtype != dtype:
            tokens = tokens.tokens(self.backend)  # mixed in float32, rounded once
        mixture = tokens if isinstance(tokens, Mixture) else None
        prompts = None if isinstance(tokens, Mixture) else tokens.to(dtype)
        spread = images.requires_grad or not self.options.first
        # a compiler gets the op's own gradient
        tracked = torch.is_grad_enabled() and (spread or torch.compiler.is_compiling())
        with torch.set_grad_enabled(tracked):
            x = self.by_op(images, mixture, prompts)
        num_tokens = x.shape[1] - (tokens.logits.shape[1] if mixture else tokens.shape[-2])
        if spread:
            prompts = None
        elif torch.compiler.is_compiling():
            prompts = x[:, num_tokens:]
        elif mixture is not None:
            backend = self.cache.backend_for("mix_prompts", dtype)
            prompts = mixed_rows(mixture, x[:, num_tokens:], backend)
        return Embedded(x, num_tokens, None, prompts, inside=True)
