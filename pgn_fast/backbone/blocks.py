"""The halves of a frozen block: tokens -> queries, keys, values -> tokens.

Letters: B images, T tokens, M rows whose outputs are wanted (M <= T), P prompt tokens, D embedding
width, h heads, d head width, A = h d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import activations, apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import prompt_attention
from ..ops.add_layer_norm import with_rstd
from .schedule import KeyValues
from .splitting import split_projection
from .weights import BlockWeights, Norm

Projected = tuple[Tensor, Tensor, Tensor]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., T, A) -> (..., h, T, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def project(w: BlockWeights, x: Tensor, num_queries: int, separate: bool = False) -> Projected:
    """Tokens (..., T, D) to queries (..., h, M, d) of the first M rows and all keys and values.

    Args:
        separate: keys and values are about to be copied next to the prompts' own; kept in a tensor
            of their own they can go then, where the queries' would hold them.
    """
    n = w.norm1(x)
    if num_queries == x.shape[-2] and not separate:
        q, k, v = split_projection(w.qkv(n), 3, w.num_heads)
    else:
        q = split_heads(w.q(n[..., :num_queries, :]), w.num_heads)
        k, v = split_projection(w.kv(n), 2, w.num_heads)
    return _normalize(w.q_norm, q), _normalize(w.k_norm, k), v


def project_entering(w: BlockWeights, x: Tensor, prompts: Tensor) -> Projected:
    """The same for tokens x (B, T, D) and prompts (P, D) or (B, P, D) that enter after them.

    Apart, so that no gradient goes through the tokens' projections where only the prompts have
    one, and prompts that the batch shares are projected once.
    """
    own = project(w, x, x.shape[-2])
    new = project(w, prompts, prompts.shape[-2])
    return tuple(  # type: ignore[return-value]
        torch.cat([t, p.expand(x.shape[0], -1, -1, -1)], dim=-2)
        for t, p in zip(own, new, strict=True)
    )


def prompt_keys_values(w: BlockWeights, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (P, D) or (B, P, D) to keys and values (h, P, d) or (B, h, P, d)."""
    k, v = split_projection(w.kv(w.norm1(prompts)), 2, w.num_heads)
    return _normalize(w.k_norm, k), v


def free_keys_values(
    w: BlockWeights, keys: KeyValues, absorbed: bool = False
) -> tuple[Tensor, Tensor]:
    """Keys and values that come without tokens, to stand beside those that ``w`` projects.

    The tokens' keys here lack a bias that shifts all scores of a token alike, and their values one
    that the output projection adds: neither holds for keys and values from outside, which give it
    back. ``absorbed``: for ``attend_absorbed``, whose keys lack every bias.
    """
    dtype = w.qkv.weight.dtype
    k, v = keys.k.to(dtype), keys.v.to(dtype)
    shifts = [w.key_shift, w.value_shift]
    if absorbed and w.kv.bias is not None:
        own = w.kv.bias.chunk(2)
        shifts = [b if s is None else s + b for s, b in zip(shifts, own, strict=True)]
    k_shift, v_shift = (None if s is None else s.view(w.num_heads, 1, -1) for s in shifts)
    return k if k_shift is None else k - k_shift, v if v_shift is None else v - v_shift


def join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Two sets of keys and values, (h, P, d) or (B, h, P, d) each, as one."""
    if other is None:
        return one
    return tuple(_beside(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _beside(a: Tensor, b: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-3], b.shape[:-3])
    return torch.cat([t.to(a.dtype).expand(*batch, *t.shape[-3:]) for t in (a, b)], dim=-2)


def _normalize(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def rotate(x: Tensor, rope: Tensor | None, start: int, half: bool) -> Tensor:
    """Rotary embedding (..., N, 2 d) on the patches of x (B, h, M, d), which begin at ``start``.

    Prefix and prompt tokens have no place in the image and stay as they are.
    """
    if rope is None or x.shape[-2] <= start:
        return x
    patches = x[..., start : start + rope.shape[-2], :]
    rotated = apply_rot_embed_cat(patches, rope[..., : patches.shape[-2], :], half=half)
    rest = x[..., start + patches.shape[-2] :, :]
    return torch.cat([x[..., :start, :], rotated.type_as(x), rest], dim=-2)


def attend(
    w: BlockWeights,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: tuple[Tensor, Tensor] | None,
    fused: bool,
    backend: str | None,
    ranges: Tensor | None = None,
) -> Tensor:
    """Attention over the tokens and the prompts' keys and values: (B, h, M, d) -> (B, M, A).

    Args:
        fused: a kernel of this package runs the op; without one, torch's attention over
            concatenated keys is the fastest plain form, and the only one with a bias on scores.
        ranges: (B, 2), where fused: which rows of the prompts each image sees.
    """
    if prompts is None and fused:
        prompts = (k.new_empty(k.shape[1], 0, k.shape[3]),) * 2
    if prompts is not None and fused:
        o = prompt_attention(q, k, v, *prompts, w.scale, ranges=ranges, backend=backend)
    else:
        if prompts is not None:
            k, v = (
                torch.cat([t, p.expand(t.shape[0], -1, -1, -1)], dim=-2)
                for p, t in zip(prompts, (k, v), strict=True)
            )
        bias = score_bias(w, q, k.shape[-2])
        o = F.scaled_dot_product_attention(q, k, v, bias, scale=w.scale)
    return _normalize(w.inner_norm, o.transpose(-3, -2).flatten(-2))


def score_bias(w: BlockWeights, q: Tensor, num_keys: int) -> Tensor | None:
    """The bias (1, h, M, keys) on the scores of queries (B, h, M, d): zero for prompts, which stand
    after the backbone's own tokens."""
    if w.score_bias is None:
        return None
    M, T = q.shape[-2], w.score_bias.shape[-1]
    bias = w.score_bias[..., :M, :].to(q.dtype)
    return F.pad(bias, (0, num_keys - T, 0, max(M - T, 0)))


def attend_absorbed(
    w: BlockWeights,
    x: Tensor,
    num_queries: int,
    prompts: Tensor | None,
    keys: KeyValues | None = None,
) -> Tensor:
    """Attention of the first M rows of x (B, T, D), keys and values never formed: (B, M, A).

    For each head, with n the normalized tokens and prompts (P, D) or (B, P, D):

        score_j = s q . (W_k n_j) = (s W_k^T q) . n_j
        output  = sum_j p_j (W_v n_j) = W_v (sum_j p_j n_j)

    4 M h D flops a token in place of 4 D^2: with one row and heads of 64, 64 times fewer. The key
    bias shifts a row's scores alike and is left out.
    """
    (B, _, D), h, M, A = x.shape, w.num_heads, num_queries, w.attn_dim
    n = w.norm1(x).to(w.kv.weight.dtype)  # (B, T, D)
    q = _normalize(w.q_norm, split_heads(w.q(n[:, :M]), h)) * w.scale  # (B, h, M, d)
    key_weight, value_weight = w.kv.weight.view(2, h, A // h, D)
    u = q.transpose(0, 1).flatten(1, 2) @ key_weight  # (h, B M, D)
    u = u.unflatten(1, (B, M)).transpose(0, 1).flatten(1, 2)  # (B, h M, D)
    scores = u @ n.mT  # (B, h M, T)
    if (bias := score_bias(w, q, n.shape[1])) is not None:
        scores = scores + bias.flatten(1, 2)
    parts = [scores]
    n_prompts = None if prompts is None else w.norm1(prompts).to(n.dtype)
    if n_prompts is not None:
        parts.append(u @ n_prompts.mT)
    k, v = (None, None) if keys is None else free_keys_values(w, keys, absorbed=True)
    if k is not None:
        parts.append((q @ k.mT).flatten(1, 2))
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    p = iter(scores.softmax(dim=-1).split([part.shape[-1] for part in parts], dim=-1))
    z = next(p) @ n  # (B, h M, D)
    if n_prompts is not None:
        z = z + next(p) @ n_prompts
    z = z.unflatten(1, (h, M)).transpose(0, 1).flatten(1, 2)  # (h, B M, D)
    o = (z @ value_weight.mT).unflatten(1, (B, M)).permute(1, 0, 2, 3)  # (B, h, M, d)
    if v is not None:
        o = o + next(p).unflatten(1, (h, M)) @ v
    o = o.transpose(1, 2).flatten(2)  # (B, M, A)
    if w.kv.bias is not None:
        o = o + w.kv.bias[A:]
    return _normalize(w.inner_norm, o)


def gelu_kind(act: nn.Module) -> str | None:
    """torch's name for the GELU that an activation computes, "none" or "tanh"; None: another."""
    if isinstance(act, nn.GELU):
        return act.approximate
    return {activations.GELU: "none", activations.GELUTanh: "tanh"}.get(type(act))


def hidden(w: BlockWeights, u: Tensor, overwrite: bool = False) -> Tensor:
    """What stands between fc1 and fc2: activation, gate, norm. ``overwrite``: u is used up."""
    if w.glu:
        gate, value = u.chunk(2, dim=-1)
        u = w.act(gate) * value
    elif overwrite and (kind := gelu_kind(w.act)):
        u = torch.ops.aten.gelu_(u, approximate=kind)
    elif overwrite and isinstance(w.act, nn.SiLU):
        u = torch.ops.aten.silu_(u)
    else:
        u = w.act(u)
    return _normalize(w.hidden_norm, u)


class Residual(NamedTuple):
    """Tokens after attention.

    Attributes:
        sum: (B, M, D).
        norm: of the sum, (B, M, D).
        rstd: 1 / std (B, M), where one op computed all three; else None.
        statistics: mean and 1 / std of a LayerNorm that ran apart, (B, M, 1); else None.
    """

    sum: Tensor
    norm: Tensor
    rstd: Tensor | None
    statistics: tuple[Tensor | None, Tensor | None] = (None, None)


def add_attention(w: BlockWeights, x: Tensor, o: Tensor, *, statistics: bool = False) -> Residual:
    """Tokens (B, M, D) plus the projected attention output (B, M, A), normed for the MLP.

    Args:
        statistics: of a norm that runs apart, too; a backward wants them.
    """
    p = w.out(o)
    if w.ls1 is None and w.norm2.can_fuse_residual(x, p):
        return Residual(*with_rstd(x, p, w.norm2.eps, w.norm2.backend))
    y = add(x, p, w.ls1)
    if not statistics:
        return Residual(y, w.norm2(y), None)
    n, mean, rstd = w.norm2.with_statistics(y)
    return Residual(y, n, None, (mean, rstd))


def mlp(w: BlockWeights, y: Tensor, n: Tensor) -> Tensor:
    """Tokens (B, M, D) and their norm through the second half of the block."""
    kind = None if w.glu else gelu_kind(w.act)
    u = None if kind is None else w.fc1.gelu(n, kind)
    if u is not None:
        u = _normalize(w.hidden_norm, u)
    else:
        u = w.fc1(n)
        u = hidden(w, u, overwrite=_spent(u))
    return add(y, w.fc2(u), w.ls2)


def add(x: Tensor, y: Tensor, gain: Tensor | None) -> Tensor:
    """x + gain * y, in the place of y where it has the sum's dtype."""
    if gain is not None:
        return x + y * gain
    return y.add_(x) if y.dtype == x.dtype and _spent(y) else x + y


def _spent(t: Tensor) -> bool:
    """Whether ``t`` may be overwritten. Not in torch.jit.trace, whose graph is to be the same with
    gradients and without."""
    return not (t.requires_grad or torch.jit.is_tracing())
