"""Patch embedding with prompts: images in, the transformer's whole input sequence out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ._register import follow_autocast, register_op
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes
from .mix_prompts import backward as mix_prompts_backward
from .mix_prompts import check as check_mixture

POSITIONS = ("append", "prepend")

# What every kernel of this op gets and may rely on:
#
#   prompted_patch_embed(images, weight, bias, pos_embed, prefix, logits, token_library, prompts,
#                        scale, shift, activation, position) -> (B, S + N + P, D), contiguous
#
#   images         (B, C, H, W), contiguous or channels_last; uint8, or the dtype of weight
#   weight         (D, C, p_h, p_w), contiguous; its dtype is that of all tensors below and of the
#                  result; H and W are multiples of p_h and p_w
#   bias           (D,) or None
#   pos_embed      (N, D) or None: of the patches alone; patches count row by row
#   prefix         (S, D), S >= 0, its position embedding already added
#   prompts come one of three ways, None standing for what is absent: logits (B, P, K) with
#   token_library (K, D), to be mixed as mix_prompts does; or prompts (P, D), shared by the batch,
#   or (B, P, D); or all three None (P = 0)
#   scale, shift   C floats each, or both empty: the pixel that is embedded is
#                  pixel * scale[c] + shift[c], division of uint8 by 255 included
#   position       "append": prefix, patches, prompts; "prepend": prefix, prompts, patches
#
# All but the images are contiguous. Any size may be zero except C, D, K and the patch.
# There is no backward kernel: the gradients to logits and library are those of mix_prompts on the
# prompt rows, and the others are asked for too rarely.


def prompted_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    logits: Tensor | None,
    token_library: Tensor | None,
    *,
    activation: str = "softmax",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    position: str = "append",
    prompts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed the patches of images and put prefix and prompt tokens beside them, in one buffer.

        patches[b, n] = weight . (images[b, patch n] - mean) / std + bias + pos_embed[n]
        prompts[b]    = mix_prompts(logits, token_library)[b]
        tokens[b]     = [prefix, patches[b], prompts[b]]   or   [prefix, prompts[b], patches[b]]

    Args:
        images: (B, C, H, W), contiguous or channels_last; uint8, or the dtype of ``weight``.
        weight: the patch embedding's convolution, (D, C, p_h, p_w), stride equal to the patch
            size, which divides H and W; float32, float16 or bfloat16 (float64 in eager PyTorch).
            Its dtype is also that of the arguments below.
        bias: (D,) or None.
        pos_embed: already resampled to the N patches: (N, D), or (S + N, D) with the prefix
            tokens' first, either with a leading dimension of 1; None: no position embedding.
        prefix: class and register tokens, (S, D), with or without a leading dimension of 1; None:
            none.
        logits: unnormalized mixture coefficients, (B, P, K), as for ``mix_prompts``.
        token_library: library tokens, (K, D).
        activation: "softmax" or "sigmoid", as for ``mix_prompts``.
        mean, std: of each channel, in units of [0, 1]; pixels are normalized with them. uint8
            images are divided by 255 first, also where these are None.
        position: "append" puts the prompts after the patches (PGN), "prepend" between prefix and
            patches (VPT).
        prompts: ready prompt tokens in place of ``logits`` and ``token_library`` (VPT-Shallow):
            (P, D), shared by the batch, or (B, P, D). Without these three there are no prompts.
        backend: "reference", "cpu", "triton" or "cuda"; None runs the fastest that accepts the
            inputs.

    Returns:
        (B, S + N + P, D), contiguous, in the dtype of ``weight`` (under autocast: the autocast
        dtype). Prompts get no position embedding. Differentiable in every tensor: logits, library
        and prompts cheaply, the rest, and second derivatives, in eager PyTorch.

    Raises:
        ValueError: the shapes, dtypes or devices disagree; the message names the argument.
        RuntimeError: the named backend cannot run these inputs; the message says why.

    Source: Loedeman et al., BMVC 2024 (arXiv:2210.06466), section 3; Jia et al., ECCV 2022
    (arXiv:2203.12119), equations 4 and 5 (VPT-Shallow).
    """
    # what goes in as a tensor comes out as one, which the annotation cannot say
    followed: Any = follow_autocast(
        images, weight, bias, pos_embed, prefix, logits, token_library, prompts
    )
    images, weight, bias, pos_embed, prefix, logits, token_library, prompts = followed
    prefix = weight.new_empty(0, weight.shape[0]) if prefix is None else prefix
    prefix = prefix[0] if prefix.ndim == 3 and prefix.shape[0] == 1 else prefix
    if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    _check(images, weight, bias, pos_embed, prefix, logits, token_library, prompts)
    if logits is not None and token_library is not None:
        check_mixture(logits, token_library, activation)
    if position not in POSITIONS:
        raise ValueError(
            f"prompted_patch_embed: position={position!r}; known: {', '.join(POSITIONS)}."
        )
    scale, shift = pixel_factors(images, mean, std)
    S = prefix.shape[0]
    if pos_embed is not None and pos_embed.shape[0] != _num_patches(images, weight):
        prefix, pos_embed = prefix + pos_embed[:S], pos_embed[S:]
    arguments = (images, weight, bias, pos_embed, prefix, logits, token_library, prompts)
    options = (scale, shift, activation, position)
    return _op(*arguments, *options, backend=backend)


def _num_patches(images: Tensor, weight: Tensor) -> int:
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def pixel_factors(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """The one multiplication and addition of a pixel that division and normalization amount to."""
    C, largest = images.shape[1], 1.0 if images.is_floating_point() else 255.0
    if mean is None and std is None and images.is_floating_point():
        return [], []
    mean = [0.0] * C if mean is None else [float(m) for m in mean]
    std = [1.0] * C if std is None else [float(s) for s in std]
    if len(mean) != C or len(std) != C or 0.0 in std:
        raise ValueError(
            f"prompted_patch_embed: mean and std need {C} values each, one a channel of the "
            f"images, std none of them 0; got mean={mean} and std={std}."
        )
    return [1 / (largest * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor,
    logits: Tensor | None,
    token_library: Tensor | None,
    prompts: Tensor | None,
) -> None:
    """Refuse what does not fit together, naming the argument and the way out."""
    if images.ndim != 4 or weight.ndim != 4 or images.shape[1] != weight.shape[1]:
        raise ValueError(
            "prompted_patch_embed takes images (B, C, H, W) and weight (D, C, p_h, p_w), got "
            f"{tuple(images.shape)} and {tuple(weight.shape)}. C is the number of channels: "
            "images need the backbone's."
        )
    H, W, (D, _, p_h, p_w) = *images.shape[2:], weight.shape
    if H % p_h or W % p_w:
        raise ValueError(
            f"prompted_patch_embed: images of {H}x{W} pixels are not whole patches of {p_h}x{p_w}. "
            "Resize or pad the images."
        )
    if not weight.is_floating_point():
        raise ValueError(f"prompted_patch_embed takes a floating-point weight, got {weight.dtype}.")
    if images.dtype not in (torch.uint8, weight.dtype):
        raise ValueError(
            f"prompted_patch_embed: images are {images.dtype}, weight is {weight.dtype}. Pass "
            "uint8 images, or cast them, e.g. images.to(weight.dtype)."
        )
    N, S = _num_patches(images, weight), prefix.shape[0]
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "bias": (bias, [(D,)]),
        "prefix": (prefix, [(S, D)]),
        "pos_embed": (pos_embed, [(N, D), (S + N, D)]),
        "prompts": (
            prompts,
            []
            if prompts is None
            else [(prompts.shape[-2], D), (images.shape[0], prompts.shape[-2], D)],
        ),
        "logits": (logits, [] if logits is None else [(images.shape[0], *logits.shape[1:])]),
        "token_library": (
            token_library,
            [] if token_library is None else [(token_library.shape[0], D)],
        ),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"prompted_patch_embed: {name} is {tuple(tensor.shape)}, expected "
                f"{' or '.join(map(str, allowed))} for B={images.shape[0]} images of N={N} "
                f"patches, S={S} prefix tokens and width D={D}."
            )
        if tensor.dtype != weight.dtype:
            raise ValueError(
                f"prompted_patch_embed: {name} is {tensor.dtype}, weight is {weight.dtype}. Cast "
                f"one, e.g. {name}.to(weight.dtype)."
            )
    for name, tensor in (("images", images), *((n, t) for n, (t, _) in shapes.items())):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"prompted_patch_embed: {name} is on {tensor.device}, weight is on "
                f"{weight.device}. Move one, e.g. {name}.to(weight.device)."
            )
    if (logits is None) != (token_library is None) or (prompts is not None and logits is not None):
        raise ValueError(
            "prompted_patch_embed takes logits and token_library together, or prompts alone, or "
            "none of the three."
        )


def _kernel(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor,
    logits: Tensor | None,
    token_library: Tensor | None,
    prompts: Tensor | None,
    scale: list[float],
    shift: list[float],
    activation: str,
    position: str,
    backend: str,
) -> Tensor:
    rest = (weight, bias, pos_embed, prefix, logits, token_library, prompts)
    channels = images.shape[1]
    tensors = weight, images, logits
    kernel = select_kernel("prompted_patch_embed", backend, *tensors, channels=channels)
    if not images.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous()
    packed = [None if t is None else t.contiguous() for t in rest]
    return kernel(images, *packed, scale, shift, activation, position)


def _fake(images: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    prefix, logits, prompts = rest[2], rest[3], rest[5]
    P = logits.shape[1] if logits is not None else 0 if prompts is None else prompts.shape[-2]
    S, N = prefix.shape[0], _num_patches(images, weight)
    return weight.new_empty(images.shape[0], S + N + P, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, _, prefix, logits, token_library, prompts, *options = inputs
    ctx.scale, ctx.shift, ctx.activation, ctx.position, ctx.backend = options
    ctx.sizes = prefix.shape[0], _num_patches(images, weight)
    ctx.images_shape, ctx.weight_shape = images.shape, weight.shape
    ctx.shared = prompts is not None and prompts.ndim == 2
    needs = ctx.needs_input_grad
    # a gradient of the images needs the weight alone, and the other way round
    ctx.save_for_backward(
        images if needs[1] else None, weight if needs[0] else None, logits, token_library
    )


def _backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, logits, token_library = ctx.saved_tensors
    needs, (S, N) = ctx.needs_input_grad, ctx.sizes
    P = grad_tokens.shape[1] - S - N
    sizes = [S, N, P] if ctx.position == "append" else [S, P, N]
    grad_prefix, *grads = grad_tokens.split(sizes, dim=1)
    grad_patches, grad_prompts = grads if ctx.position == "append" else reversed(grads)
    grad_logits = grad_library = grad_images = grad_weight = None
    if logits is not None and (needs[5] or needs[6]):
        grad_logits, grad_library = mix_prompts_backward.run(
            grad_prompts, logits, token_library, ctx.activation, backend=ctx.backend
        )
    if images is not None or weight is not None:
        rows = ctx.images_shape[2] // ctx.weight_shape[2]
        grad_map = grad_patches.mT.unflatten(2, (rows, -1))  # (B, D, rows, columns)
        if weight is not None:
            grad_images = reference.patch_embed_grad_images(
                grad_map, weight, ctx.images_shape, ctx.scale
            )
        if images is not None:
            grad_weight = reference.patch_embed_grad_weight(
                grad_map, images, ctx.weight_shape, ctx.scale, ctx.shift
            )
    return (
        grad_images,
        grad_weight,
        grad_patches.sum(dim=(0, 1)) if needs[2] else None,
        grad_patches.sum(dim=0) if needs[3] else None,
        grad_prefix.sum(dim=0) if needs[4] else None,
        grad_logits,
        grad_library,
        (grad_prompts.sum(dim=0) if ctx.shared else grad_prompts) if needs[7] else None,
        *(None,) * 5,  # scale, shift, activation, position, backend
    )


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    images = draw.pixels(s.B, 3, s.image, s.image)
    # as large as an embedding's that keeps the pixels' variance
    scale = (3 * s.patch**2) ** -0.5
    rest = {
        "weight": draw(s.D, 3, s.patch, s.patch, grad=False) * scale,
        "bias": draw(s.D, grad=False),
        "pos_embed": draw(s.tokens - 1, s.D, grad=False),
        "prefix": draw(1, s.D, grad=False),
        "logits": draw(s.B, s.P, s.K),
        "token_library": draw(s.K, s.D),
        "mean": [0.48] * 3,
        "std": [0.27] * 3,
    }
    yield {"images": images, **rest}
    yield {"images": images.to(rest["weight"].dtype) / 255, **rest, "position": "prepend"}


_op = register_op(
    "prompted_patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor prefix, Tensor? logits, Tensor? token_library, Tensor? prompts, float[] scale, "
    "float[] shift, str activation, str position, str backend) -> Tensor",
    _kernel,
    fake=_fake,
    plain=reference.prompted_patch_embed,
    row=OpRow(
        _examples, {"cpu": ("cpu",), "sm_90": ("triton",)}, largest={"cuda": {"channels": 64}}
    ),
    setup_context=_setup_context,
    backward=_backward,
)


@register_flop_formula(torch.ops.pgn_fast.prompted_patch_embed)
def _flops(
    images: torch.Size,
    weight: torch.Size,
    bias: Any,
    pos_embed: Any,
    prefix: Any,
    logits: torch.Size | None,
    *rest: Any,
    **options: Any,
) -> int:
    """For torch's FlopCounterMode, from the arguments' shapes."""
    D = weight[0]
    return 2 * images.numel() * D + (0 if logits is None else 2 * logits.numel() * D)
