"""mix_prompts: every backend, dtype and shape, forward and both gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_matches, leaves64

from pgn_fast import reference
from pgn_fast.ops import mix_prompts
from pgn_fast.ops.backends import refusal


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "B, P, K, D",
    [
        pytest.param(2, 16, 256, 192, id="paper-sizes"),
        pytest.param(3, 5, 33, 65, id="nothing-divides-a-block"),
        pytest.param(1, 1, 1, 1, id="smallest"),
        pytest.param(0, 4, 8, 16, id="no-image"),
    ],
)
def test_matches_float64(B, P, K, D, activation, dtype, backend, device):
    logits = torch.randn(B, P, K, dtype=dtype, device=device, requires_grad=True)
    library = torch.randn(K, D, dtype=dtype, device=device, requires_grad=True)
    if reason := refusal(backend, "mix_prompts", logits, library):
        pytest.skip(reason)
    prompts = mix_prompts(logits, library, activation, backend=backend)
    grad_prompts = torch.randn_like(prompts)

    logits64, library64 = leaves64(logits, library)
    prompts64 = reference.mix_prompts(logits64, library64, activation)
    grads64 = torch.autograd.grad(prompts64, (logits64, library64), grad_prompts.double().cpu())
    assert_matches("prompts", prompts.detach(), prompts64.detach())
    if reason := refusal(backend, "mix_prompts_backward", logits, library):
        pytest.skip(reason)
    grads = torch.autograd.grad(prompts, (logits, library), grad_prompts)
    for name, grad, grad64 in zip(("grad_logits", "grad_library"), grads, grads64, strict=True):
        assert_matches(name, grad, grad64)


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
    ],
)
def test_bad_input_is_named(logits, library, activation, message):
    with pytest.raises(ValueError, match=message):
        mix_prompts(logits, library, activation)
