"""A frozen ViT with prompts in the plainest way: timm's own blocks and ``torch.cat``.

Every faster engine of this package is measured against these functions. They change nothing in
the backbone, not for a moment: two threads may run one backbone with different prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import keyed
from .inputs import normalized
from .schedule import KeyValues, Mixture, Position, PromptFunction, PromptSchedule, call


def encode_eager(
    backbone: VisionTransformer,
    images: Tensor,
    schedule: PromptSchedule,
    *,
    rows: int | None = None,
    prompts_read: bool = True,
    backend: str | None = "reference",
    take: tuple[set[int], dict[int, Tensor]] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Images and prompts to tokens after the backbone's final norm.

    Args:
        backbone: a timm ``VisionTransformer`` or one of its relatives (see ``load_backbone``).
        images: normalized images (B, C, H, W), in the backbone's dtype, or uint8.
        schedule: the prompts; those of another dtype are cast to the tokens'.
        rows: return only the first ``rows`` tokens, where the caller reads no others; None all.
        prompts_read: False: prompts that are left after the last block are not returned.
        backend: which backend mixes a ``Mixture``.
        take: block indices, and where their output tokens (B, S + N, D) go, without prompts.
        stop: the last block that runs; None: all do.

    Returns:
        (B, S + P + N, D) in the order that ``schedule.position`` names, P being
        ``schedule.num_prompts_left``; (B, S + N, D) without prompts; (B, rows, D) with ``rows``.
    """
    depth, num_prefix, position = (
        len(backbone.blocks),
        backbone.num_prefix_tokens,
        schedule.position,
    )
    check_schedule(backbone, schedule, images.shape[0])
    x, rope = embed(backbone, images, schedule.patch_weight)
    inside = 0  # prompt tokens in the sequence
    for i in range(depth):
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
            x = getattr(backbone, "norm_pre", nn.Identity())(x)
        run = block_function(backbone, i, rope, inside, position, keys)
        if backbone.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(run, x, use_reentrant=False)
        else:
            x = run(x)
        if i == schedule.last and not schedule.keep:
            x = remove_prompts(x, inside, position, num_prefix)
            inside = 0
        if take is not None and i in take[0]:
            take[1][i] = remove_prompts(x, inside, position, num_prefix)
        if i == stop:
            break
    if not prompts_read and rows is None:
        x = remove_prompts(x, inside, position, num_prefix)
    return backbone.norm(x[:, :rows])


def check_schedule(backbone: Any, schedule: PromptSchedule, batch_size: int) -> None:
    """Refuse a schedule that does not fit the backbone, in one sentence that names the block.

    Raises:
        ValueError: wrong shapes, no such block, or keys and values for a block that takes none.
    """
    blocks = backbone.blocks
    for i in schedule.entries:
        has_keys = i < len(blocks) and schedule.parts(i).keys is not None
        if has_keys and (reason := keyed.refusal(blocks[i])):
            raise ValueError(f"PromptSchedule: block {i} takes no KeyValues: {reason}")
    schedule.check(
        depth=len(blocks),
        width=backbone.embed_dim,
        heads=lambda i: keyed.heads(blocks[i]),
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
    backbone: VisionTransformer,
    images: Tensor,
    patch_weight: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Patch embedding, prefix tokens and position embedding: what stands before ``norm_pre``.

    Args:
        images: normalized images, or uint8 ones (see ``images.check_images``).

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
    if isinstance(backbone, Eva):
        return backbone._pos_embed(patches)
    if isinstance(backbone, Beit):
        x = torch.cat([backbone.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return x if backbone.pos_embed is None else x + backbone.pos_embed, None
    return backbone.patch_drop(backbone._pos_embed(patches)), None


def prefix_tokens(backbone: VisionTransformer) -> list[Tensor | None]:
    """Class, distillation and register tokens in their order, (1, n, D) each, None what is absent.
    Their position embedding is the first rows of ``pos_embed`` where that has any for them."""
    names = ("cls_token", "dist_token", "reg_token")
    return [getattr(backbone, name, None) for name in names]


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
    backbone: VisionTransformer,
    index: int,
    rope: Tensor | None,
    num_prompts: int,
    position: Position,
    keys: KeyValues | None = None,
) -> Callable[[Tensor], Tensor]:
    """Block ``index`` as a function of the sequence, its position terms extended to the prompts."""
    block = backbone.blocks[index]
    bias = None
    if isinstance(backbone, Eva):
        if rope is not None and getattr(backbone, "rope_mixed", False):
            rope = rope[index]
        rope = _extend_rope(rope, num_prompts, position)
        if keys is None:
            return lambda x: block(x, rope=rope)
    if isinstance(backbone, Beit):
        bias = _extend_relative_bias(backbone, block, num_prompts, position)
        if keys is None:
            return lambda x: _beit_block(block, x, bias)
    if keys is not None:
        return lambda x: keyed.run_block(block, x, keys, rope, bias)
    return block


def _extend_rope(rope: Tensor | None, num_prompts: int, position: Position) -> Tensor | None:
    """Rotary rows (..., N, 2 d) for N patches and P prompts: prompts have no place in the image,
    so theirs are the identity, sine 0 and cosine 1, as if they were prefix tokens."""
    if rope is None or num_prompts == 0:
        return rope
    sine, cosine = rope.new_empty(*rope.shape[:-2], num_prompts, rope.shape[-1]).chunk(2, dim=-1)
    identity = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    return torch.cat([rope, identity] if position == "append" else [identity, rope], dim=-2)


def _extend_relative_bias(
    backbone: Any, block: Any, num_prompts: int, position: Position
) -> Tensor | None:
    """BEiT's relative position bias (1, h, T, T), with zeros for every pair that has a prompt."""
    shared, own = backbone.rel_pos_bias, block.attn.relative_position_bias_table
    bias = None if shared is None else shared()
    if own is not None:
        own_bias = block.attn._get_rel_pos_bias()
        bias = own_bias if bias is None else own_bias + bias
    if bias is None or num_prompts == 0:
        return bias
    if position == "append":
        return F.pad(bias, (0, num_prompts, 0, num_prompts))
    for dim in (-2, -1):
        zeros = torch.zeros_like(bias.narrow(dim, 0, 1)).repeat_interleave(num_prompts, dim)
        one, rest = bias.split([1, bias.shape[dim] - 1], dim)
        bias = torch.cat([one, zeros, rest], dim)
    return bias


def _beit_block(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """timm's BEiT block with the attention bias as an argument, which its own forward has not."""
    attention = block.attn
    y = block.norm1(x)
    qkv_bias = None
    if attention.q_bias is not None:
        qkv_bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(y, attention.qkv.weight, qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if bias is not None:
        bias = bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    y = attention.proj(y.transpose(1, 2).flatten(2))
    x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
    y = block.mlp(block.norm2(x))
    return x + (y if block.gamma_2 is None else block.gamma_2 * y)


def rows_read(backbone: VisionTransformer) -> int | None:
    """How many leading tokens the backbone's own pooling reads: the class token, also the
    distillation token, or None for a pool over the patches."""
    if isinstance(backbone, VisionTransformerDistilled):
        return 2
    return 1 if backbone.global_pool == "token" else None


def pool(backbone: VisionTransformer, tokens: Tensor) -> Tensor:
    """The backbone's own pooling of tokens without prompts: (B, S + N, D) to (B, D).

    The class token, the mean of class and distillation token, an average or attention over the
    patches, and the norm behind it, whichever the backbone was made with.
    """
    return backbone.forward_head(tokens, pre_logits=True)


def pool_mean(backbone: VisionTransformer, tokens: Tensor) -> Tensor:
    """The mean of the given tokens (B, T, D), and the backbone's norm behind pooling: (B, D)."""
    return backbone.fc_norm(tokens.mean(dim=1))
