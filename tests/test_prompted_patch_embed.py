"""prompted_patch_embed: every backend, dtype, layout and way of giving prompts, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_matches, leaves64

from pgn_fast.ops import mix_prompts, prompted_patch_embed
from pgn_fast.ops.dispatch import unsupported_reason

BACKENDS = ["reference", "cpu", "triton", "cuda"]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def inputs(B, size, patch, D, S=1, P=3, K=9, dtype=torch.float32, device="cpu", pixels="uint8"):
    """Keyword arguments of the op; the prompts are mixed."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)

    if pixels == "uint8":
        images = torch.randint(0, 256, (B, 3, *size), dtype=torch.uint8, device=device)
    else:
        images = torch.rand(B, 3, *size, device=device).to(dtype)
    N = (size[0] // patch[0]) * (size[1] // patch[1])
    return {
        "images": images,
        "weight": draw(D, 3, *patch),
        "bias": draw(D),
        "pos_embed": draw(S + N, D),
        "prefix": draw(S, D),
        "logits": draw(B, P, K),
        "token_library": draw(K, D),
        "mean": MEAN,
        "std": STD,
    }


def in_float64(arguments):
    return {
        name: leaves64(x)[0] if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    } | {"images": arguments["images"].cpu().to(_pixels64(arguments["images"]))}


def _pixels64(images):
    return torch.uint8 if images.dtype == torch.uint8 else torch.float64


def check_against_float64(arguments, backend):
    """Forward and all gradients; skips with the dispatcher's own sentence."""
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    if reason := unsupported_reason(backend, "prompted_patch_embed", *tensors):
        pytest.skip(reason)
    tokens = prompted_patch_embed(**arguments, backend=backend)
    assert tokens.is_contiguous()
    arguments64 = in_float64(arguments)
    tokens64 = prompted_patch_embed(**arguments64, backend="reference")
    assert_matches("tokens", tokens.detach(), tokens64.detach())
    leaves = {n: x for n, x in arguments.items() if getattr(x, "requires_grad", False)}
    if not leaves or unsupported_reason(backend, "mix_prompts_backward", arguments["weight"]):
        return
    grad = torch.randn_like(tokens)
    grads = torch.autograd.grad(tokens, list(leaves.values()), grad, allow_unused=True)
    grads64 = torch.autograd.grad(
        tokens64, [arguments64[n] for n in leaves], grad.double().cpu(), allow_unused=True
    )
    # the gradients of what is added are sums over rows, of one sign for a gradient of one sign
    added = [n for n in leaves if n in ("bias", "pos_embed", "prefix")]
    again = prompted_patch_embed(**arguments64, backend="reference")
    terms = torch.autograd.grad(
        again, [arguments64[n] for n in added], grad.double().cpu().abs(), allow_unused=True
    )
    sums = dict(zip(added, terms, strict=True))
    for name, actual, expected in zip(leaves, grads, grads64, strict=True):
        assert_matches(f"grad_{name}", actual, expected, sums.get(name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize(
    "B, size, patch, D, S",
    [
        pytest.param(2, (32, 48), (16, 16), 64, 1, id="patch-16"),
        pytest.param(3, (28, 14), (14, 14), 33, 5, id="nothing-divides-a-block"),
        pytest.param(1, (1, 1), (1, 1), 1, 0, id="smallest"),
        pytest.param(0, (8, 8), (4, 4), 16, 1, id="no-image"),
        pytest.param(1, (6, 8), (2, 4), 8, 2, id="oblong-patch"),
    ],
)
def test_matches_float64(B, size, patch, D, S, position, pixels, dtype, backend, device):
    arguments = inputs(B, size, patch, D, S, dtype=dtype, device=device, pixels=pixels)
    check_against_float64({**arguments, "position": position}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompts", ["shared", "each-its-own", "none"])
def test_ready_prompts(prompts, backend, device):
    arguments = inputs(2, (8, 12), (4, 4), 24, device=device) | {
        "logits": None,
        "token_library": None,
        "position": "prepend",
    }
    shape = {"shared": (5, 24), "each-its-own": (2, 5, 24)}.get(prompts)
    if shape:
        arguments["prompts"] = torch.randn(*shape, device=device, requires_grad=True)
    check_against_float64(arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("layout", ["channels_last", "cropped"])
def test_layout_of_images(layout, pixels, backend, device):
    arguments = inputs(2, (16, 40), (8, 8), 24, device=device, pixels=pixels)
    images = arguments["images"]
    if layout == "channels_last":
        arguments["images"] = images.to(memory_format=torch.channels_last)
    else:
        arguments["images"] = torch.nn.functional.pad(images, (3, 5, 2, 1))[:, :, 2:-1, 3:-5]
    assert not arguments["images"].is_contiguous()
    check_against_float64(arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_may_be_left_out(backend, device):
    arguments = inputs(2, (8, 8), (4, 4), 24, device=device)
    for absent in (("bias",), ("pos_embed",), ("prefix",), ("mean", "std"), ("mean",)):
        left = {**arguments, **dict.fromkeys(absent)}
        if "prefix" in absent:
            left["pos_embed"] = arguments["pos_embed"][1:].detach()
        check_against_float64(left, backend)


def test_more_images_than_a_chunk():
    check_against_float64(inputs(7, (48, 48), (4, 4), 8), "cpu")


def test_gradients_to_images_and_weights():
    arguments = inputs(2, (6, 4), (2, 2), 5, pixels="float", dtype=torch.float64)
    arguments["images"].requires_grad_()
    names = [n for n, x in arguments.items() if isinstance(x, torch.Tensor)]
    rest = {n: x for n, x in arguments.items() if n not in names}

    def run(*tensors):
        return prompted_patch_embed(**dict(zip(names, tensors, strict=True)), **rest)

    torch.autograd.gradcheck(run, [arguments[n] for n in names])


@torch.no_grad()
def test_prompt_rows_are_mix_prompts():
    arguments = inputs(2, (8, 8), (4, 4), 24)
    expected = mix_prompts(arguments["logits"], arguments["token_library"])
    assert torch.equal(prompted_patch_embed(**arguments)[:, -3:], expected)
    assert torch.equal(prompted_patch_embed(**arguments, position="prepend")[:, 1:4], expected)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    D=st.integers(1, 40),
    S=st.integers(0, 4),
    P=st.integers(0, 5),
    pixels=st.sampled_from(["uint8", "float"]),
)
def test_random_shapes_on_cpu(B, rows, columns, patch, D, S, P, pixels):
    size = (rows * patch[0], columns * patch[1])
    check_against_float64(inputs(B, size, patch, D, S, P, pixels=pixels), "cpu")


def test_op_is_registered_correctly():
    a = inputs(2, (8, 8), (4, 4), 8)
    tensors = [a[n] for n in ("images", "weight", "bias", "prefix", "logits", "token_library")]
    tensors.insert(3, a["pos_embed"][1:].detach())
    options = (None, [0.1] * 3, [0.2] * 3, "softmax", "append", "auto")
    torch.library.opcheck(torch.ops.pgn_fast.prompted_patch_embed.default, (*tensors, *options))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(3, 8, 8)}, r"takes images \(B, C, H, W\)"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "C is the number of channels"),
        ({"images": torch.zeros(2, 3, 9, 8)}, "not whole patches of 4x4"),
        ({"images": torch.zeros(2, 3, 8, 8).half()}, "Pass uint8 images, or cast"),
        ({"bias": torch.zeros(7)}, r"bias is \(7,\), expected \(8,\)"),
        ({"pos_embed": torch.zeros(3, 8)}, r"pos_embed is \(3, 8\), expected \(4, 8\) or \(5, 8\)"),
        ({"prefix": torch.zeros(1, 8).half()}, "prefix is torch.float16"),
        ({"prefix": torch.zeros(1, 8, device="meta")}, "prefix is on meta"),
        ({"logits": torch.zeros(1, 3, 9)}, "logits is"),
        ({"token_library": None}, "logits and token_library together"),
        ({"prompts": torch.zeros(3, 8)}, "or prompts alone"),
        ({"mean": (0.5,)}, "mean and std need 3 values each"),
        ({"std": (0.5, 0.0, 1.0)}, "none of them 0"),
        ({"position": "behind"}, "known: append, prepend"),
        ({"activation": "tanh"}, "known: softmax, sigmoid"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        prompted_patch_embed(**(inputs(2, (8, 8), (4, 4), 8) | change))
