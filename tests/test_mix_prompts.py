"""mix_prompts: every backend, dtype and shape, forward and both gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_matches, leaves64

from pgn_fast import reference
from pgn_fast.ops import mix_prompts
from pgn_fast.ops.dispatch import unsupported_reason

BACKENDS = ["reference", "cpu", "triton", "cuda"]


def check_against_float64(logits, library, activation, backend):
    """Forward and both gradients; skips with the dispatcher's own sentence."""
    if reason := unsupported_reason(backend, "mix_prompts", logits, library):
        pytest.skip(reason)
    prompts = mix_prompts(logits, library, activation, backend=backend)
    grad_prompts = torch.randn_like(prompts)

    logits64, library64 = leaves64(logits, library)
    prompts64 = reference.mix_prompts(logits64, library64, activation)
    grads64 = torch.autograd.grad(prompts64, (logits64, library64), grad_prompts.double().cpu())
    assert_matches("prompts", prompts.detach(), prompts64.detach())
    if reason := unsupported_reason(backend, "mix_prompts_backward", logits, library):
        pytest.skip(reason)
    grads = torch.autograd.grad(prompts, (logits, library), grad_prompts)
    for name, grad, grad64 in zip(("grad_logits", "grad_library"), grads, grads64, strict=True):
        assert_matches(name, grad, grad64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "B, P, K, D",
    [
        pytest.param(2, 16, 256, 192, id="paper-sizes"),
        pytest.param(3, 5, 33, 65, id="nothing-divides-a-block"),
        pytest.param(1, 1, 1, 1, id="smallest"),
        pytest.param(0, 4, 8, 16, id="no-image"),
        pytest.param(2, 0, 8, 16, id="no-prompt"),
    ],
)
def test_matches_float64(B, P, K, D, activation, dtype, backend, device):
    logits = torch.randn(B, P, K, dtype=dtype, device=device, requires_grad=True)
    library = torch.randn(K, D, dtype=dtype, device=device, requires_grad=True)
    check_against_float64(logits, library, activation, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("R, K", [(300, 40), (2, 1500)], ids=["many-rows", "deep-library"])
def test_large_sizes_take_the_other_way(R, K, backend, device):
    logits = torch.randn(1, R, K, device=device, requires_grad=True)
    library = torch.randn(K, 72, device=device, requires_grad=True)
    check_against_float64(logits, library, "softmax", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, device):
    logits = torch.randn(4, 9, 2, device=device).transpose(0, 2).requires_grad_()
    library = torch.randn(4, 12, device=device)[:, ::2].requires_grad_()
    check_against_float64(logits, library, "softmax", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend, device):
    logits = torch.tensor([[[3e4, -3e4, 3e4], [-1e30, 0.0, -torch.inf]]], device=device)
    library = torch.randn(3, 5, device=device)
    if reason := unsupported_reason(backend, "mix_prompts", logits, library):
        pytest.skip(reason)
    expected = reference.mix_prompts(logits.double().cpu(), library.double().cpu())
    assert_matches("prompts", mix_prompts(logits, library, backend=backend), expected)


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 3),
    P=st.integers(0, 7),
    K=st.integers(1, 70),
    D=st.integers(0, 70),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_random_shapes_on_cpu(B, P, K, D, activation, dtype):
    logits = torch.randn(B, P, K, dtype=dtype, requires_grad=True)
    library = torch.randn(K, D, dtype=dtype, requires_grad=True)
    check_against_float64(logits, library, activation, "cpu")


def test_gradients_of_the_reference():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    library = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    op = (
        torch.ops.pgn_fast.mix_prompts
    )  # with the backward of its own, in eager PyTorch for float64
    for activation in ("softmax", "sigmoid"):
        torch.autograd.gradcheck(op, (logits, library, activation, "auto"))


def test_op_is_registered_correctly():
    logits = torch.randn(2, 3, 8, requires_grad=True)
    library = torch.randn(8, 4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.pgn_fast.mix_prompts.default, (logits, library, "softmax", "auto")
    )


@pytest.mark.parametrize(
    "logits, library, activation, message",
    [
        (torch.zeros(2, 3, 8), torch.zeros(9, 4), "softmax", "K is the library size"),
        (torch.zeros(2, 3, 0), torch.zeros(0, 4), "softmax", "library is empty"),
        (torch.zeros(2, 3, 8).half(), torch.zeros(8, 4), "softmax", "Cast one"),
        (torch.zeros(2, 3, 8).int(), torch.zeros(8, 4).int(), "softmax", "floating-point"),
        (torch.zeros(2, 3, 8), torch.zeros(8, 4), "tanh", "known: softmax, sigmoid"),
        (torch.zeros(2, 3, 8), torch.zeros(8, 4, device="meta"), "softmax", "Move one"),
    ],
)
def test_bad_input_is_named(logits, library, activation, message):
    with pytest.raises(ValueError, match=message):
        mix_prompts(logits, library, activation)
