"""Token-library mixing: the last step of a Prompt Generation Network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import reference
from ._register import follow_autocast, register_op
from .dispatch import OpRow, select_kernel
from .examples import Draw, Sizes

ACTIVATIONS = ("softmax", "sigmoid")

# What every kernel of this op gets and may rely on:
#
#   mix_prompts(logits, token_library, activation) -> prompts (B, P, D), contiguous
#   mix_prompts_backward(grad_prompts, logits, token_library, activation)
#       -> (grad_logits (B, P, K), grad_library (K, D)), contiguous
#
#   logits (B, P, K), token_library (K, D), grad_prompts (B, P, D): contiguous, one dtype and
#   device. K >= 1; B, P and D may be 0. Sums run in float32. grad_library is summed over the B * P
#   rows in an order that depends on nothing but the sizes (no atomics); it is zero for no rows.


def mix_prompts(
    logits: Tensor,
    token_library: Tensor,
    activation: str = "softmax",
    *,
    backend: str | None = None,
) -> Tensor:
    """Mix the token library into the prompt tokens of every image.

        prompts[b, p] = sum_k softmax(logits[b, p])[k] * token_library[k]

    Args:
        logits: unnormalized mixture coefficients, (B, P, K); float32, float16 or bfloat16
            (float64 in eager PyTorch).
        token_library: library tokens, (K, D); same dtype and device as ``logits``.
        activation: "softmax" (the paper's) or "sigmoid" (an option of the official code; the
            coefficients then do not sum to one).
        backend: "reference", "cpu", "triton" or "cuda" for forward and backward; None runs the
            fastest that accepts the inputs.

    Returns:
        Prompt tokens, (B, P, D), in the dtype of the arguments (under autocast: the autocast
        dtype). Differentiable in both arguments, twice in eager PyTorch. Sums run in float32; the
        (B, P, K) coefficients are recomputed in backward, not stored, except in training on CPU
        without a named backend, which torch's own autograd does faster.

    Raises:
        ValueError: the shapes, dtypes or devices disagree, or the activation is unknown.
        RuntimeError: the named backend cannot run these inputs; the message says why.

    Source: Loedeman et al., BMVC 2024 (arXiv:2210.06466); official code, ``pgn_models/tlpgn.py``.
    """
    logits, token_library = follow_autocast(logits, token_library)  # type: ignore[assignment]
    return _op(logits, token_library, activation, backend=backend)


def check(logits: Tensor, token_library: Tensor, activation: str) -> None:
    """Refuse what does not fit together, naming the argument and the way out."""
    if logits.ndim != 3 or token_library.ndim != 2 or logits.shape[2] != token_library.shape[0]:
        raise ValueError(
            "mix_prompts takes logits (B, P, K) and token_library (K, D), got "
            f"{tuple(logits.shape)} and {tuple(token_library.shape)}. K is the library size: "
            "set the generator's output to P * K."
        )
    if logits.shape[2] == 0:
        raise ValueError(
            f"mix_prompts: the token library is empty, token_library is "
            f"{tuple(token_library.shape)}. It needs at least one token."
        )
    if logits.dtype != token_library.dtype:
        raise ValueError(
            f"mix_prompts: logits are {logits.dtype}, token_library is {token_library.dtype}. "
            "Cast one, e.g. token_library.to(logits.dtype)."
        )
    if logits.device != token_library.device:
        raise ValueError(
            f"mix_prompts: logits are on {logits.device}, token_library is on "
            f"{token_library.device}. Move one, e.g. token_library.to(logits.device)."
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"mix_prompts takes floating-point logits and token_library, got {logits.dtype}."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"mix_prompts: activation={activation!r}; known: {', '.join(ACTIVATIONS)}."
        )


def _kernel(logits: Tensor, token_library: Tensor, activation: str, backend: str) -> Tensor:
    kernel = select_kernel("mix_prompts", backend, logits, token_library)
    return kernel(logits.contiguous(), token_library.contiguous(), activation)


def _fake(logits: Tensor, token_library: Tensor, activation: str, backend: str) -> Tensor:
    return token_library.new_empty(*logits.shape[:2], token_library.shape[1])


def _backward_kernel(
    grad_prompts: Tensor, logits: Tensor, token_library: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    kernel = select_kernel("mix_prompts_backward", backend, logits, token_library)
    tensors = (t.contiguous() for t in (grad_prompts, logits, token_library))
    return kernel(*tensors, activation)


def _backward_fake(
    grad_prompts: Tensor, logits: Tensor, token_library: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), token_library.new_empty(token_library.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, token_library, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(logits, token_library)


def _backward(ctx: Any, grad_prompts: Tensor) -> tuple[Tensor | None, ...]:
    grads = backward.run(grad_prompts, *ctx.saved_tensors, ctx.activation, backend=ctx.backend)
    return *grads, None, None  # activation and backend have no gradient


def _examples(s: Sizes, draw: Draw) -> Iterator[dict[str, Any]]:
    logits, library = draw(s.B, s.P, s.K), draw(s.K, s.D)
    for activation in ACTIVATIONS:
        yield {"logits": logits, "token_library": library, "activation": activation}


backward = register_op(
    "mix_prompts_backward(Tensor grad_prompts, Tensor logits, Tensor token_library, "
    "str activation, str backend) -> (Tensor, Tensor)",
    _backward_kernel,
    fake=_backward_fake,
    plain=reference.mix_prompts_backward,
)
_op = register_op(
    "mix_prompts(Tensor logits, Tensor token_library, str activation, str backend) -> Tensor",
    _kernel,
    fake=_fake,
    plain=reference.mix_prompts,
    row=OpRow(_examples, {"cpu": ("cpu",)}, trains_in_torch=("cpu",)),
    check=check,
    setup_context=_setup_context,
    backward=_backward,
)
