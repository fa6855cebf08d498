"""Rounding of prompt pixels to 8 bits with error feedback: the last step of prompt inversion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._register import register_op
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes


def feedback_round(
    levels: Tensor, feedback: Tensor, order: Tensor, *, backend: str | None = None
) -> Tensor:
    """Round pixels to 8 bits one by one; the pixels still to come absorb what was rounded off.

        w[r, j] = levels[r, order[j]] - sum_{i<j} feedback[j, i] * (w[r, i] - q[r, i])
        q[r, j] = clip(round(w[r, j]), 0, 255);   result[r, order[j]] = q[r, j]

    With ``feedback`` from a Cholesky factor of A^T A this is Babai's nearest plane for the token
    A u (``pgn_fast.inversion.rounding`` builds it), and GPTQ's rounding with pixels for weights.

    Args:
        levels: pixels of R prompts in units of one 8-bit level, (R, n), n = 3 * p * p; floating
            point. Values outside [0, 255] are clipped, and their error is fed on like any other.
        feedback: (n, n), same device; row j holds the share of each earlier pixel's error that
            pixel j absorbs. Only the part below the diagonal is read.
        order: a permutation of the n pixels, (n,), int64: in which order they are rounded.
        backend: "reference", "cpu", "triton" or "cuda"; None runs the fastest that accepts the
            inputs.

    Returns:
        uint8 (R, n), in the pixels' own order. Not differentiable. Sums run in float32 (float64
        for float64 inputs). Pixels at a rounding tie depend on the order of summation, and all
        later ones with them: compare backends by the token A q, never by pixels.

    Raises:
        ValueError: the shapes, dtypes or devices disagree.
        RuntimeError: the named backend cannot run these inputs, or ``order`` is no permutation.

    Source: Babai, Combinatorica 6 (1986); Frantar et al., arXiv:2210.17323, section 3.
    """
    _check(levels, feedback, order)  # before what follows takes their dtypes for granted
    dtype = torch.float64 if levels.dtype == torch.float64 else torch.float32
    return _op(levels.detach().to(dtype), feedback.detach().to(dtype), order, backend=backend)


def _check(levels: Tensor, feedback: Tensor, order: Tensor) -> None:
    if (
        levels.ndim != 2
        or feedback.shape != (levels.shape[-1],) * 2
        or order.shape != (levels.shape[-1],)
    ):
        raise ValueError(
            "feedback_round takes levels (R, n), feedback (n, n) and order (n,), got "
            f"{tuple(levels.shape)}, {tuple(feedback.shape)} and {tuple(order.shape)}. n is the "
            "number of values in a patch, 3 * p * p: flatten the patches, channel first."
        )
    if not levels.is_floating_point() or not feedback.is_floating_point():
        raise ValueError(
            "feedback_round takes floating-point levels and feedback, got "
            f"{levels.dtype} and {feedback.dtype}. Pass levels before rounding, in [0, 255]."
        )
    if order.dtype != torch.int64:
        raise ValueError(f"feedback_round takes an int64 order, got {order.dtype}.")
    if not levels.device == feedback.device == order.device:
        raise ValueError(
            f"feedback_round: levels are on {levels.device}, feedback on {feedback.device}, order "
            f"on {order.device}. Move them to one device."
        )


def _kernel(levels: Tensor, feedback: Tensor, order: Tensor, backend: str) -> Tensor:
    return select_kernel("feedback_round", backend, levels, feedback)(levels, feedback, order)


def _fake(levels: Tensor, feedback: Tensor, order: Tensor, backend: str) -> Tensor:
    return torch.empty_like(levels, dtype=torch.uint8, memory_format=torch.contiguous_format)


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    n = 3 * s.patch**2
    levels, feedback = draw.pixels(s.B * s.P, n).float(), draw(n, n, grad=False).float() / n
    yield {"levels": levels, "feedback": feedback, "order": draw.permutation(n)}


_op = register_op(
    "feedback_round(Tensor levels, Tensor feedback, Tensor order, str backend) -> Tensor",
    _kernel,
    fake=_fake,
    plain=reference.feedback_round,
    # at ties correct backends differ by whole pixels
    row=OpRow(_examples, {"cpu": ("cpu",)}, timed=False),
)
