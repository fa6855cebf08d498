"""A frozen ViT with prompts in the plainest way: timm's own blocks and ``torch.cat``.

Every faster path of this package is measured against these functions. They change nothing in
the backbone, not for a moment: two threads may run one backbone with different prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import families, support, written
from .families import Family
from .families.base import heads
from .inputs import normalized
from .readout import EVERYTHING, Readout
from .schedule import (
    FrozenTokens,
    KeyValues,
    Mixture,
    Position,
    PromptFunction,
    PromptSchedule,
    call,
)


def encode_eager(
    backbone: Any,
    images: Tensor | FrozenTokens,
    schedule: PromptSchedule,
    readout: Readout = EVERYTHING,
    *,
    backend: str | None = "reference",
    taken: dict[int, Tensor] | None = None,
) -> Tensor:
    """Images and prompts to tokens after the backbone's final norm.

    Args:
        backbone: a timm vision transformer (see ``load_backbone``).
        images: normalized images (B, C, H, W), in the backbone's dtype, or uint8; or the tokens
            that enter a block, whose turn it is then.
        schedule: the prompts; those of another dtype are cast to the tokens'.
        readout: which tokens are read.
        backend: which backend mixes a ``Mixture``.
        taken: where the output tokens (B, S + N, D), without prompts, of the blocks in
            ``readout.after`` go.

    Returns:
        (B, S + P + N, D) in the order that ``schedule.position`` names, P being
        ``schedule.num_prompts_left``; (B, S + N, D) without prompts; (B, rows, D) with ``rows``.
    """
    family = families.of(backbone)
    num_prefix, position = backbone.num_prefix_tokens, schedule.position
    check_schedule(backbone, schedule, images.shape[0])
    begin = 0
    if isinstance(images, FrozenTokens):
        x, rope, begin = half_way(backbone, images, schedule)
    else:
        x, rope = embed(backbone, images, schedule.patch_weight)
    inside = 0  # prompt tokens in the sequence
    for i in range(begin, len(backbone.blocks)):
        tokens, keys = schedule.parts(i)
        if i in schedule.entries and position == "add":
            x = x + tokens.to(x.dtype)  # type: ignore[union-attr]
        elif i in schedule.entries:
            x = remove_prompts(x, inside, position, num_prefix)
            prompts = None if tokens is None else prompt_tokens(i, tokens, x, backend)
            inside = 0 if prompts is None else prompts.shape[-2]
            if prompts is not None:
                x = add_prompts(x, prompts, position, num_prefix)
        if i == 0:
            x = family.norm_pre(backbone)(x)
        run = block_function(family, backbone, i, rope, inside, position, keys)
        if backbone.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(run, x, use_reentrant=False)
        else:
            x = run(x)
        if i == schedule.last and not schedule.keep:
            x = remove_prompts(x, inside, position, num_prefix)
            inside = 0
        if taken is not None and i in readout.after:
            taken[i] = remove_prompts(x, inside, position, num_prefix)
        if i == readout.stop:
            break
    if not readout.prompts and readout.rows is None:
        x = remove_prompts(x, inside, position, num_prefix)
    return backbone.norm(x[:, : readout.rows])


def check_schedule(backbone: Any, schedule: PromptSchedule, batch_size: int) -> None:
    """Refuse a schedule that does not fit the backbone, in one sentence that names the block.

    Raises:
        ValueError: wrong shapes, no such block, or keys and values for a block that takes none.
    """
    blocks = backbone.blocks
    for i in schedule.entries:
        if i >= len(blocks) or schedule.parts(i).keys is None:
            continue
        if reason := support.keys_unsupported_reason(families.of(backbone), blocks[i]):
            raise ValueError(f"PromptSchedule: block {i} takes no KeyValues: {reason}")
    schedule.check(
        depth=len(blocks),
        width=backbone.embed_dim,
        heads=lambda i: heads(blocks[i]),
        batch_size=batch_size,
    )


def prompt_tokens(
    i: int, tokens: Tensor | Mixture | PromptFunction, x: Tensor, backend: str | None
) -> Tensor:
    """The prompt tokens that enter block ``i``, (P, D) or (B, P, D), in the dtype of its input x,
    (B, S + N, D) without prompts."""
    if isinstance(tokens, Mixture):
        tokens = tokens.tokens(backend)
    elif not isinstance(tokens, Tensor):
        tokens = call(i, tokens, x)
    return tokens.to(x.dtype)


def embed(
    backbone: Any, images: Tensor, patch_weight: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Patch embedding, prefix tokens and position embedding: what stands before ``norm_pre``.

    Args:
        images: normalized images, or uint8 ones (see ``inputs.check_images``).

    Returns:
        Tokens (B, S + N, D), and for class ``Eva`` its rotary position embedding, sine and cosine
        side by side: (N, 2 d), or (depth, h, N, 2 d) where every block has its own.
    """
    images = normalized(backbone, images)
    if patch_weight is None:
        patches = backbone.patch_embed(images)
    else:
        weight, bias = patch_weight
        stand_in = {"proj.weight": weight} | ({} if bias is None else {"proj.bias": bias})
        patches = torch.func.functional_call(backbone.patch_embed, stand_in, (images,))
    return families.of(backbone).tokens(backbone, patches)


def half_way(
    backbone: Any, frozen: FrozenTokens, schedule: PromptSchedule
) -> tuple[Tensor, Tensor | None, int]:
    """Tokens that enter a block, the rotary embedding of ``embed``, and the block's index.

    Raises:
        ValueError: the schedule has prompts below that block, or changes the embedding.
    """
    x, block = frozen.tokens, frozen.block
    if (schedule.entries and schedule.first < block) or schedule.patch_weight is not None:
        raise ValueError(
            f"tokens that enter block {block} are given, but prompts enter block {schedule.first}; "
            "give the images"
        )
    if getattr(backbone, "rope", None) is None:
        return x, None, block
    vit: Any = backbone
    # images of one size have it in common
    none = x.new_zeros(0, vit.in_chans, *vit.patch_embed.img_size)
    return x, embed(vit, none)[1], block


def add_prompts(x: Tensor, prompts: Tensor, position: Position, num_prefix: int) -> Tensor:
    """Put prompts (P, D) or (B, P, D) into the sequence x, (B, S + N, D); see PromptSchedule."""
    prompts = prompts.to(x.dtype)
    if position == "add":
        return x + prompts
    prompts = prompts.expand(x.shape[0], -1, -1)
    if position == "append":
        return torch.cat([x, prompts], dim=1)
    return torch.cat([x[:, :num_prefix], prompts, x[:, num_prefix:]], dim=1)


def remove_prompts(x: Tensor, num_prompts: int, position: Position, num_prefix: int) -> Tensor:
    """Take ``num_prompts`` prompt tokens out of the sequence (B, S + P + N, D)."""
    if num_prompts == 0:
        return x
    if position == "append":
        return x[:, :-num_prompts]
    return torch.cat([x[:, :num_prefix], x[:, num_prefix + num_prompts :]], dim=1)


def block_function(
    family: Family,
    backbone: Any,
    i: int,
    rope: Tensor | None,
    num_prompts: int,
    position: Position,
    keys: KeyValues | None = None,
) -> Callable[[Tensor], Tensor]:
    """Block ``i`` as a function of the sequence, its position terms extended to the prompts.

    Args:
        rope: as ``embed`` gives it.
    """
    block = backbone.blocks[i]
    rope = _extend_rope(family.block_rope(backbone, rope, i), num_prompts, position)
    bias = family.score_bias(backbone, i)
    bias = _extend_bias(bias, num_prompts, position, backbone.num_prefix_tokens)
    if keys is None:
        return lambda x: family.run_block(block, x, rope, bias)
    return lambda x: written.run_block(family, block, x, keys=keys, rope=rope, bias=bias)


def _extend_rope(rope: Tensor | None, num_prompts: int, position: Position) -> Tensor | None:
    """Rotary rows (..., N, 2 d) for N patches and P prompts: prompts have no place in the image,
    so theirs are the identity, sine 0 and cosine 1, as if they were prefix tokens."""
    if rope is None or num_prompts == 0:
        return rope
    sine, cosine = rope.new_empty(*rope.shape[:-2], num_prompts, rope.shape[-1]).chunk(2, dim=-1)
    identity = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    return torch.cat([rope, identity] if position == "append" else [identity, rope], dim=-2)


def _extend_bias(
    bias: Tensor | None, num_prompts: int, position: Position, num_prefix: int
) -> Tensor | None:
    """A bias on scores (1, h, T, T), with zeros for every pair of tokens that has a prompt."""
    if bias is None or num_prompts == 0:
        return bias
    if position == "append":
        return F.pad(bias, (0, num_prompts, 0, num_prompts))
    for dim in (-2, -1):
        prefix, patches = bias.split([num_prefix, bias.shape[dim] - num_prefix], dim)
        shape = list(bias.shape)
        shape[dim] = num_prompts
        bias = torch.cat([prefix, bias.new_zeros(shape), patches], dim)
    return bias
