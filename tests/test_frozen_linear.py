"""frozen_linear: every backend, dtype, shape and layout, forward and gradient, against float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from numerics import assert_matches, leaves64
from small_world import tiny_vit
from timm.layers.activations import GELUTanh
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pgn_fast
from pgn_fast import reference
from pgn_fast.backbone import packed
from pgn_fast.backbone.packed import PackedLinear
from pgn_fast.backbone.weights import FrozenLinear
from pgn_fast.ops import frozen_linear
from pgn_fast.ops.dispatch import unsupported_reason

BACKENDS = ["reference", "cpu", None]
# the package's name for it is the function
module = importlib.import_module("pgn_fast.ops.frozen_linear")


def check_against_float64(x, weight, bias, run):
    y = run(x)
    assert y.is_contiguous()
    grad_y = torch.randn_like(y)
    (x64,) = leaves64(x)
    wide = weight.double().cpu(), None if bias is None else bias.double().cpu()
    y64 = reference.frozen_linear(x64, *wide)
    (grad64,) = torch.autograd.grad(y64, x64, grad_y.double().cpu())
    (grad,) = torch.autograd.grad(y, x, grad_y)
    assert_matches("y", y.detach(), y64.detach())
    assert_matches("grad_x", grad, grad64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape, out",
    [
        pytest.param((2, 197, 192), 768, id="an MLP of ViT-Tiny"),
        pytest.param((7, 33, 65), 129, id="nothing divides a block"),
        pytest.param((300, 70), 111, id="rows alone"),
        pytest.param((5, 1, 768), 3072, id="one row an image"),
        pytest.param((1, 1), 1, id="smallest"),
        pytest.param((0, 3, 8), 4, id="no image"),
        pytest.param((2, 3, 8), 0, id="no output"),
    ],
)
def test_matches_float64(shape, out, has_bias, dtype, backend, device):
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(out, shape[-1], dtype=dtype, device=device)
    bias = torch.randn(out, dtype=dtype, device=device) if has_bias else None
    if backend and (reason := unsupported_reason(backend, "frozen_linear", x, weight, bias)):
        pytest.skip(reason)
    check_against_float64(
        x, weight, bias, lambda x: frozen_linear(x, weight, bias, backend=backend)
    )


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, :1], id="first rows"),
        pytest.param(lambda t: t[:, 3:150:2], id="every other row"),
        pytest.param(lambda t: t.transpose(0, 1), id="transposed"),
        pytest.param(lambda t: t[:1].expand(9, -1, -1), id="expanded"),
        pytest.param(lambda t: t[..., 64:256], id="columns of a wider tensor"),
    ],
)
def test_strides_of_x_and_weight_are_free(view):
    x = view(torch.randn(40, 197, 320)).detach().requires_grad_()
    weight = torch.randn(x.shape[-1], 512).T  # a transpose, as the backward passes it
    assert x.numel() * 512 > 2**20  # large enough for oneDNN
    check_against_float64(x, weight, None, lambda x: frozen_linear(x, weight))
    rows = torch.randn(2048, x.shape[-1])[512:1024]  # keys and values of a fused projection
    check_against_float64(x, rows, None, lambda x: frozen_linear(x, rows))


def test_registered_correctly():
    weight, bias = torch.randn(40, 24), torch.randn(40)
    args = torch.randn(3, 5, 24, requires_grad=True), weight, bias, "auto"
    torch.library.opcheck(torch.ops.pgn_fast.frozen_linear.default, args)
    assert torch.autograd.gradcheck(
        lambda x: frozen_linear(x, weight.double(), bias.double(), backend="reference"),
        torch.randn(3, 24, dtype=torch.float64, requires_grad=True),
    )


def test_transforms():
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    plain = lambda x: frozen_linear(x, weight, backend="reference")
    for run in (plain, lambda x: frozen_linear(x, weight)):
        torch.testing.assert_close(torch.func.vmap(run)(x), plain(x))
        torch.func.jvp(run, (x,), (x,))


def test_compiles_whole_with_any_batch():
    weight, bias = torch.randn(300, 200), torch.randn(300)
    compiled = torch.compile(
        lambda x: frozen_linear(x, weight, bias).square().sum(), fullgraph=True, backend="aot_eager"
    )
    for rows in (50, 51):
        x = torch.randn(rows, 200, requires_grad=True)
        expected = frozen_linear(x, weight, bias).square().sum()
        torch.testing.assert_close(compiled(x), expected)
        for grad, want in zip(
            torch.autograd.grad(compiled(x), x), torch.autograd.grad(expected, x), strict=True
        ):
            # torch's product, which may stand in the place of ours here, rounds otherwise
            assert (grad - want).abs().max() <= 1e-5 * want.abs().max()


def test_follows_autocast_and_keeps_nothing_of_x():
    x = torch.randn(64, 256, requires_grad=True)
    weight = torch.randn(128, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, weight).dtype == torch.bfloat16
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear(x, weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


@pytest.mark.parametrize(
    "x, weight, bias, message",
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"x \(..., I\) and weight \(O, I\), got"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias is \(3,\), expected \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), None, "weight is torch.float64 on cpu"),
        (torch.zeros(2, 3), nn.Parameter(torch.zeros(4, 3)), None, "gives weight no gradient"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3).long(), None, "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        frozen_linear(x, weight, bias)


def test_named_backends_say_why_they_cannot():
    x, weight = torch.zeros(2, 3).half(), torch.zeros(4, 3).half()
    with pytest.raises(RuntimeError, match=r"take torch\.float32, got torch\.float16"):
        frozen_linear(x, weight, backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run"):
        frozen_linear(x, weight, backend="cuda")


@pytest.mark.parametrize("library", ["onednn", "mkl"])
def test_packed_weights_match_float64(library, monkeypatch):
    """Both libraries, whichever the processor would choose."""
    if library == "mkl" and not packed._has_mkl():
        pytest.skip("this build of torch has no MKL")
    monkeypatch.setattr(packed, "gemm_library", lambda: library)
    weight, bias = torch.randn(300, 200), torch.randn(300)
    linear = PackedLinear(weight, bias)
    for rows in (70, 128, 96, 3, 70):
        x = torch.randn(2, rows, 200, requires_grad=True)
        check_against_float64(x, weight, bias, linear)
    # two directions; MKL's copies serve the latest two numbers of rows
    assert len(linear.packed) == (2 if library == "onednn" else 4)
    x = torch.randn(2, 70, 200)
    assert_matches(
        "kv", linear.rows(100, 300)(x), FrozenLinear(weight, bias)(x)[..., 100:].double()
    )


# ---- GELU in the product ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_in_the_product_matches_float64(dtype, monkeypatch, device):
    """On CPU torch's call computes the other GELU; the model's own decides whether it is made."""
    kind = "tanh" if device.type == "cuda" else "none"
    monkeypatch.setitem(module.GELU_IN_PRODUCT, device.type, kind)
    x, bias = 2 * torch.randn(2, 50, 192, device=device), torch.randn(768, device=device)
    weight = torch.randn(768, 192, device=device) / 14
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    y = FrozenLinear(weight, bias).gelu(x, kind)
    wide = reference.frozen_linear(*(t.double().cpu() for t in (x, weight, bias)))
    assert_matches("y", y, nn.functional.gelu(wide, approximate=kind))
    other = {"tanh": "none", "none": "tanh"}[kind]
    assert FrozenLinear(weight, bias).gelu(x, other) is None
    assert FrozenLinear(weight).gelu(x, kind) is None
    assert FrozenLinear(weight.float(), bias.float()).gelu(x, kind) is None
    assert FrozenLinear(weight, bias).gelu(x.requires_grad_(), kind) is None


class Looks(TorchDispatchMode):
    """Sees every operation, as a counter of flops does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_models_take_it_in_inference_alone(monkeypatch):
    monkeypatch.setitem(module.GELU_IN_PRODUCT, "cpu", "none")
    taken, real = [], torch._addmm_activation
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda *given, **o: taken.append(1) or real(*given, **o)
    )
    images = torch.randn(2, 3, 16, 16).bfloat16()
    for act, calls in ((nn.GELU, 2), (GELUTanh, 0), (nn.SiLU, 0)):
        vit = tiny_vit(act_layer=act).bfloat16()
        for block in vit.blocks:  # without a bias there is no such call
            nn.init.normal_(block.mlp.fc1.bias)
        model = pgn_fast.VPT(vit, 3, num_prompts=1).eval()
        taken.clear()
        model(images).sum().backward()
        assert taken == []
        with torch.no_grad():
            found, expected = model(images), model.forward_reference(images)
        assert torch.allclose(found, expected, atol=0.05)
        assert len(taken) == calls
        with torch.no_grad(), Looks():
            model(images)
        assert len(taken) == calls
