"""What a frozen ViT is made of, and which exact savings are valid for it.

The fast path computes timm's blocks by its own code, so it takes only blocks that it knows to the
last module; everything else runs by ``reference.encode_eager``, and ``refusal`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import timm.layers
from timm.layers import activations
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

Memory = Literal["fast", "balanced", "min"]


@dataclass(frozen=True)
class FastOptions:
    """Switches of the exact savings. All of them leave the numbers as they are, up to rounding.

    Attributes:
        kv_only: prompts whose outputs nobody reads (deep prompts) enter attention as keys and
            values only; no query, projection or MLP rows for them.
        last_rows: the last block computes only the rows that the head reads.
        absorb: for so few rows, the last block's key and value projections move over to them.
        first: the block where prompts enter gives no gradient to the tokens below it.
        fold: LayerNorm, LayerScale and the attention scale are folded into the next weights, in
            float64, rounded once. Costs a copy of the folded weights (``explain`` says how much).
        biases: the key bias is dropped and the value bias moved behind the output projection.
        packed: frozen weights are packed once for the library that multiplies (CPU, float32):
            oneDNN, or MKL on Intel's processors. Costs a further copy of the weights for each
            direction, with MKL also for each number of rows; up to a tenth less time.
        embed: patches are cut, normalized, embedded and put beside prefix and position embedding
            in one op, where a kernel runs it.
        memory: what backward stores of a block of D wide tokens. "fast": the normalized inputs,
            queries, keys, values, attention output and the hidden layer (10 D per token);
            "balanced": all but the hidden layer, whose GEMM runs again (6 D, about an eighth more
            time); "min": the block's input, the block runs again (1 D, about 40 % more time).
    """

    kv_only: bool = True
    last_rows: bool = True
    absorb: bool = True
    first: bool = True
    fold: bool = True
    biases: bool = True
    packed: bool = False
    embed: bool = True
    memory: Memory = "fast"

    def __post_init__(self) -> None:
        if self.memory not in get_args(Memory):
            raise ValueError(
                f"memory takes {', '.join(map(repr, get_args(Memory)))}, got {self.memory!r}"
            )

    @classmethod
    def of(cls, fast: bool | str | Mapping[str, Any] | FastOptions) -> FastOptions | None:
        """What a model's argument ``fast`` says: True, a memory plan's name, or the switches.

        Returns:
            None for False: the reference path.
        """
        if isinstance(fast, FastOptions):
            return fast
        if isinstance(fast, Mapping):
            return cls(**fast)
        if isinstance(fast, str):
            return cls(memory=fast)  # type: ignore[arg-type]
        return cls() if fast else None


_NORMS = (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.RmsNorm)
_ACTIVATIONS: tuple[type, ...] = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    activations.GELU,
    activations.GELUTanh,
    activations.QuickGELU,
    activations.Swish,
)


def refusal(backbone: Any) -> str | None:
    """Why the fast path cannot run this backbone as it is now; None where it can."""
    if type(backbone) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return f"{type(backbone).__name__} is none of the backbone classes that it knows"
    if backbone.training:
        return "the backbone is in training mode"
    if any(p.requires_grad for p in backbone.parameters()):
        return "some of the backbone's weights require a gradient"
    for i, block in enumerate(backbone.blocks):
        if reason := _block_refusal(block):
            return f"block {i}: {reason}"
    return None


def _block_refusal(block: Any) -> str | None:
    if type(block) not in (Block, EvaBlock):
        return f"{type(block).__name__} is none of the block classes that it knows"
    attention, mlp = block.attn, block.mlp
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"{type(attention).__name__} is none of the attention classes that it knows"
    if getattr(attention, "gate", None) is not None:
        return "its attention output is gated"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its queries share keys and values between heads (grouped-query attention)"
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"{type(mlp).__name__} is none of the MLP classes that it knows"
    if getattr(mlp, "gate_last", False):
        return "the gate of its MLP comes last"
    if type(mlp.act) not in _ACTIVATIONS:
        return f"{type(mlp.act).__name__} is none of the activations that it knows"
    for name, norm in _norms(block):
        if type(norm) not in (*_NORMS, nn.Identity):
            return f"{name} is a {type(norm).__name__}, none of the norms that it knows"
    for name, linear in _linears(block):
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__name__}, not a plain Linear"
    for name, module in block.named_modules():
        if any(map(len, _hooks(module))):
            return f"a hook is registered on {name or 'the block'}"
        if "forward" in module.__dict__:
            return f"the forward of {name or 'the block'} was replaced"
    return None


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


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def absorb_refusal(block: Any, has_rope: bool) -> str | None:
    """Why the key projection of a block cannot move over to its queries; None where it can.

    Scores are q . (W_k x + b_k) = (W_k^T q) . x up to a constant: nothing may stand between the
    key projection and the product.
    """
    if has_rope:
        return "keys are rotated by their place in the image"
    if not isinstance(getattr(block.attn, "k_norm", nn.Identity()), nn.Identity):
        return "keys are normalized"
    return None


def embed_refusal(backbone: Any) -> str | None:
    """Why patches and prefix cannot be embedded in one op; None where they can."""
    patch_embed = backbone.patch_embed
    if type(backbone) not in (VisionTransformer, VisionTransformerDistilled):
        return f"the tokens of {type(backbone).__name__} are put together by its own code"
    if type(patch_embed) is not timm.layers.PatchEmbed or type(patch_embed.proj) is not nn.Conv2d:
        return f"{type(patch_embed).__name__} is no plain patch embedding"
    if not isinstance(patch_embed.norm, nn.Identity) or not patch_embed.flatten:
        return "its patches are normalized or kept as a map"
    if backbone.dynamic_img_size or patch_embed.dynamic_img_pad:
        return "its images may have any size"
    if any(i % p for i, p in zip(patch_embed.img_size, patch_embed.patch_size, strict=True)):
        return "its images are not whole patches"
    proj, p = patch_embed.proj, tuple(patch_embed.patch_size)
    if (proj.kernel_size, proj.stride, proj.padding) != (p, p, (0, 0)) or proj.groups != 1:
        return "its patches overlap or are padded"
    if isinstance(backbone, VisionTransformerDistilled) and backbone.reg_token is not None:
        return "its register tokens are left out by timm's own code"
    if "_pos_embed" in backbone.__dict__:
        return "its _pos_embed was replaced"
    for module in (*patch_embed.modules(), backbone.pos_drop, backbone.patch_drop):
        if any(map(len, _hooks(module))) or "forward" in module.__dict__:
            return "its patch embedding has a hook or another forward"
    return None
