"""add_layer_norm: every backend, dtype and shape, forward and gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_matches, leaves64

from pgn_fast import _C
from pgn_fast.ops import add_layer_norm
from pgn_fast.ops.add_layer_norm import with_rstd
from pgn_fast.ops.dispatch import unsupported_reason

BACKENDS = ["reference", "cpu", "triton", None]


def in_float64(x, y, eps):
    total = x + y
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 9, 768), id="ViT-Base"),
        pytest.param((3, 5, 70), id="nothing divides a vector"),
        pytest.param((7, 11), id="less than a vector"),
        pytest.param((130,), id="one row"),
        pytest.param((0, 4, 64), id="no image"),
    ],
)
def test_matches_float64(shape, dtype, backend, device):
    # a mean far from zero: the variance must be taken about it
    x = (torch.randn(shape, device=device) + 3).to(dtype).requires_grad_()
    y = torch.randn(shape, device=device).to(dtype).requires_grad_()
    if backend and (reason := unsupported_reason(backend, "add_layer_norm", x, y)):
        pytest.skip(reason)
    eps = 1e-6
    total, normed = add_layer_norm(x, y, eps, backend=backend)
    grads = torch.randn_like(total), torch.randn_like(normed)
    got = torch.autograd.grad((total, normed), (x, y), grads)

    # statistics are those of the rounded sum, so float64 starts from it
    (total64,) = leaves64(total)
    zero = torch.zeros_like(total64)
    _, normed64 = in_float64(total64, zero, eps)
    (want,) = torch.autograd.grad(normed64, total64, grads[1].double().cpu())
    assert_matches("total", total.detach(), x.detach().double().cpu() + y.detach().double().cpu())
    assert_matches("normed", normed.detach(), normed64.detach())
    for name, grad in zip("xy", got, strict=True):
        assert_matches(f"grad_{name}", grad, want + grads[0].double().cpu())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rstd_and_strides(backend):
    x, y = torch.randn(4, 6, 100)[:, ::2].mT, torch.randn(4, 3, 100).mT
    assert not x.is_contiguous() and x.shape == y.shape
    total, normed, rstd = with_rstd(x, y, 1e-5, backend)
    total64, normed64 = in_float64(x.double(), y.double(), 1e-5)
    assert_matches("total", total, total64)
    assert_matches("normed", normed, normed64)
    assert_matches("rstd", rstd, (total64.var(-1, correction=0) + 1e-5).rsqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_round_as_torch_rounds(dtype):
    """All 65,536 numbers of a half, subnormal, infinite and not a number, plus a few others."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    chosen = _C.build_info()["cpu_isa"]
    try:
        for isa in ("scalar", "avx2", "avx512"):
            if _C.set_isa(isa):
                for other in (0.0, 1.0, 3.1e-3, -257.0, 6e4):
                    others = torch.full_like(every, other)
                    total, _ = add_layer_norm(every, others, backend="cpu")
                    torch.testing.assert_close(
                        total, every + others, rtol=0, atol=0, equal_nan=True, msg=isa
                    )
    finally:
        _C.set_isa(chosen)


def test_registered_correctly():
    args = [torch.randn(3, 20, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.pgn_fast.add_layer_norm.default, (*args, 1e-6, "auto"))
    wide = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(add_layer_norm, wide)


def test_transforms():
    x, y = torch.randn(2, 3, 5, 8).unbind()
    plain = lambda x, y: add_layer_norm(x, y, backend="reference")[1]
    by_kernel = lambda x, y: add_layer_norm(x, y)[1]
    for run in (plain, by_kernel):
        torch.testing.assert_close(torch.func.vmap(run)(x, y), plain(x, y))
        torch.func.jvp(run, (x, y), (x, y))


def test_one_gradient_alone():
    x, y = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    for wanted in (0, 1):
        out = add_layer_norm(x, y)[wanted]
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        x64, y64 = x.detach().double().requires_grad_(), y.double()
        out64 = in_float64(x64, y64, 1e-6)[wanted]
        (want,) = torch.autograd.grad(out64, x64, torch.ones_like(out64))
        assert (grad - want).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), "of one shape"),
        (torch.zeros(2, 0), torch.zeros(2, 0), "D >= 1"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), "of one dtype and device"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(x, y)
