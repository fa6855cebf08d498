"""Which frozen ViTs the engine runs: it computes timm's blocks by its own code, so only block types
whose every module it recognizes. Others run by ``eager.encode_eager``, and ``unsupported_reason``
says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm.layers
from timm.layers import activations
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from . import families
from .families import Family
from .families.base import changed, hooks

_NORMS = (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.RmsNorm)
_MLPS = (Mlp, GluMlp, SwiGLU)
_ACTIVATIONS: tuple[type, ...] = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    activations.GELU,
    activations.GELUTanh,
    activations.QuickGELU,
    activations.Swish,
)


def unsupported_reason(backbone: Any) -> str | None:
    """Why the engine cannot run this backbone as it is now; None where it can."""
    family = families.find(backbone)
    if family is None or type(backbone) is not family.kind:
        return (
            f"unsupported backbone class {type(backbone).__name__} (supported: {families.names()})"
        )
    if backbone.training:
        return "the backbone is in training mode"
    if any(p.requires_grad for p in backbone.parameters()):
        return "some of the backbone's weights require a gradient"
    blocks: Any = backbone.blocks
    for i, block in enumerate(blocks):
        if reason := _block_unsupported_reason(family, block):
            return f"block {i}: {reason}"
    for name in family.position_modules:
        module = getattr(backbone, name)
        if module is not None and any(map(changed, module.modules())):
            return f"{name} has a hook or another forward"
    return None


def keys_unsupported_reason(family: Family, block: Any) -> str | None:
    """Why keys and values cannot enter a block on the eager path; None where they can."""
    if reason := _attention_unsupported_reason(family, block):
        return reason
    for name, module in (("it", block), ("its attention", block.attn)):
        if changed(module):
            return f"{name} has a hook or another forward, which would be bypassed"
    return None


def absorb_unsupported_reason(family: Family, backbone: Any, i: int) -> str | None:
    """Why the key projection of block ``i`` cannot move over to its queries; None where it can.

    Scores are q . (W_k x + b_k) = (W_k^T q) . x up to a constant: nothing may stand between the
    key projection and the product.
    """
    if family.rotates(backbone):
        return "keys are rotated by their place in the image"
    if not isinstance(getattr(backbone.blocks[i].attn, "k_norm", nn.Identity()), nn.Identity):
        return "keys are normalized"
    return None


def _attention_unsupported_reason(family: Family, block: Any) -> str | None:
    if type(block) not in family.blocks:
        return _unsupported("block", block, family.blocks)
    attention = block.attn
    if type(attention) not in family.attentions:
        return _unsupported("attention", attention, family.attentions)
    if getattr(attention, "gate", None) is not None:
        return "its attention output is gated"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its queries share keys and values between heads (grouped-query attention)"
    return None


def _block_unsupported_reason(family: Family, block: Any) -> str | None:
    if reason := _attention_unsupported_reason(family, block):
        return reason
    mlp = block.mlp
    if type(mlp) not in _MLPS:
        return _unsupported("MLP", mlp, _MLPS)
    if getattr(mlp, "gate_last", False):
        return "the gate of its MLP comes last"
    if type(mlp.act) not in _ACTIVATIONS:
        return _unsupported("activation", mlp.act, _ACTIVATIONS)
    for name, norm in _norms(block):
        if type(norm) not in (*_NORMS, nn.Identity):
            return f"{name}: {_unsupported('norm', norm, _NORMS)}"
    for name, linear in _linears(block):
        kind = type(linear)
        if kind is not nn.Linear:
            return f"{name} is a {kind.__module__}.{kind.__name__}, not a plain Linear"
        # quantized or sharded: numbers that only their own code can read
        if type(linear.weight) not in (Tensor, nn.Parameter):
            return f"the weight of {name} is a {type(linear.weight).__name__}, not a plain tensor"
    for name, module in block.named_modules():
        if any(map(len, hooks(module))):
            return f"a hook is registered on {name or 'the block'}"
        if "forward" in module.__dict__:
            return f"the forward of {name or 'the block'} was replaced"
    return None


def _unsupported(what: str, module: Any, known: tuple[type, ...]) -> str:
    names = ", ".join(dict.fromkeys(kind.__name__ for kind in known))
    return f"unsupported {what} class {type(module).__name__} (supported: {names})"


def _norms(block: Any) -> Iterator[tuple[str, nn.Module]]:
    yield "norm1", block.norm1
    yield "norm2", block.norm2
    for name in ("q_norm", "k_norm", "norm"):
        yield f"attn.{name}", getattr(block.attn, name, nn.Identity())
    yield "mlp.norm", block.mlp.norm


def _linears(block: Any) -> Iterator[tuple[str, nn.Module]]:
    fused = block.attn.qkv is not None
    for name in ("qkv",) if fused else ("q_proj", "k_proj", "v_proj"):
        yield f"attn.{name}", getattr(block.attn, name)
    yield "attn.proj", block.attn.proj
    for name in ("fc1_g", "fc1_x") if isinstance(block.mlp, SwiGLU) else ("fc1",):
        yield f"mlp.{name}", getattr(block.mlp, name)
    yield "mlp.fc2", block.mlp.fc2
