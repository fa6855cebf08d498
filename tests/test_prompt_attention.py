"""prompt_attention: every backend, dtype and shape, forward and five gradients, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TOLERANCE, assert_matches, leaves64
from torch.nn.functional import scaled_dot_product_attention

from pgn_fast import reference
from pgn_fast.ops import prompt_attention
from pgn_fast.ops.dispatch import unsupported_reason

BACKENDS = ["reference", "cpu", "triton", "cuda"]
NAMES = ("q", "k", "v", "prompt_k", "prompt_v")


def inputs(B, h, Q, T, P, d, shared=True, dtype=torch.float32, device="cpu"):
    """q, k, v as views of one fused buffer, as a transformer block makes them."""
    qkv = torch.randn(B, max(Q, T), 3, h, d, dtype=dtype, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prompts = torch.randn(P, 2, h, d, dtype=dtype, device=device).permute(1, 2, 0, 3)
    if not shared:
        prompts = prompts.unsqueeze(1).expand(2, B, h, P, d)
    tensors = (q[:, :, :Q], k[:, :, :T], v[:, :, :T], *prompts.unbind(0))
    return tuple(t.detach().requires_grad_() for t in tensors)


def check_against_float64(tensors, backend, scale=None):
    """Forward and all gradients; skips with the dispatcher's own sentence."""
    if reason := unsupported_reason(backend, "prompt_attention", *tensors):
        pytest.skip(reason)
    out = prompt_attention(*tensors, scale, backend=backend)
    grad_out = torch.randn_like(out)

    tensors64 = leaves64(*tensors)
    scale64 = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    out64 = reference.prompt_attention(*tensors64, scale64)[0]
    grads64 = torch.autograd.grad(out64, tensors64, grad_out.double().cpu())
    assert_matches("out", out.detach(), out64.detach())
    if reason := unsupported_reason(backend, "prompt_attention_backward", *tensors):
        pytest.skip(reason)
    grads = torch.autograd.grad(out, tensors, grad_out)
    for name, grad, grad64, x in zip(NAMES, grads, grads64, tensors64, strict=True):
        # a score's gradient is a difference of terms as large as grad_out . v; where they cancel
        # (one key: its weight is always 1) nothing but their rounding is left
        cancelled = (
            min(grad64.numel(), grad_out.numel()) > 0
            and grad64.abs().max() < 1e-3 * x.detach().abs().max()
        )
        if cancelled and name in ("q", "k", "prompt_k"):
            largest = max((v.detach().abs().max() for v in tensors64[2::2] if v.numel()), default=0)
            terms = grad_out.shape[-1] * grad_out.double().abs().max().cpu() * largest
            scores = scale64 * max(t.detach().abs().max() for t in tensors64[:2] if t.numel())
            assert grad.double().abs().max().cpu() <= TOLERANCE[grad.dtype] * terms * scores
        else:
            assert_matches(f"grad_{name}", grad, grad64)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_scores_far_below_zero(backend, device):
    """The key bias may shift every score: a padded key's score of 0 must not outweigh them.

    exp(14) times a gradient is beyond float16. Eager PyTorch is left out: it rounds the scores.
    """
    tensors = inputs(2, 2, 5, 5, 2, 32, True, torch.float16, device)
    with torch.no_grad():
        tensors[0][..., 0] = 20.0
        for keys in (tensors[1], tensors[3]):
            keys[..., 0] = -4.0
    check_against_float64(tensors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each-its-own"])
@pytest.mark.parametrize(
    "B, h, Q, T, P, d",
    [
        pytest.param(2, 2, 50, 50, 16, 64, id="paper-sizes"),
        pytest.param(3, 2, 21, 21, 7, 40, id="nothing-divides-a-block"),
        pytest.param(2, 2, 1, 50, 10, 64, id="class-token-alone"),
        pytest.param(1, 1, 1, 1, 0, 32, id="smallest"),
        pytest.param(0, 2, 4, 4, 3, 32, id="no-image"),
        pytest.param(2, 1, 17, 17, 0, 32, id="no-prompt"),
        pytest.param(1, 1, 9, 9, 3, 128, id="wide-head"),
    ],
)
def test_matches_float64(B, h, Q, T, P, d, shared, dtype, backend, device):
    check_against_float64(inputs(B, h, Q, T, P, d, shared, dtype, device), backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_more_images_than_ranges_and_more_queries_than_a_block(backend, device):
    check_against_float64(inputs(19, 1, 3, 5, 2, 32, device=device), backend)
    check_against_float64(inputs(1, 1, 101, 130, 9, 32, device=device), backend)
    check_against_float64(inputs(2, 1, 66, 66, 0, 64, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_odd_strides(backend, device):
    q, _, _, prompt_k, prompt_v = inputs(2, 2, 6, 6, 3, 32, device=device)
    crooked = torch.randn(2, 2, 32, 6, device=device).mT.requires_grad_()  # last stride is not 1
    expanded = torch.randn(1, 2, 6, 32, device=device).expand(2, -1, -1, -1)
    tensors = (q, crooked, expanded.detach().requires_grad_(), prompt_k, prompt_v)
    check_against_float64(tensors, backend, scale=0.3)


@pytest.mark.parametrize("backend", ["cpu"])
def test_only_wanted_gradients(backend):
    tensors = inputs(2, 2, 7, 9, 4, 32)
    if reason := unsupported_reason(backend, "prompt_attention_backward", *tensors):
        pytest.skip(reason)
    grad_out = torch.randn(2, 2, 7, 32)
    every = torch.autograd.grad(prompt_attention(*tensors, backend=backend), tensors, grad_out)
    for wanted in itertools.product([False, True], repeat=5):
        if not any(wanted):
            continue
        some = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        prompt_attention(*some, backend=backend).backward(grad_out)
        for tensor, expected, want in zip(some, every, wanted, strict=True):
            assert (tensor.grad is not None) == want
            if want:
                torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=2e-6)


def test_a_query_that_is_not_a_number_shows_and_spoils_no_other():
    tensors = inputs(1, 2, 19, 19, 3, 32)
    with torch.no_grad():
        tensors[0][0, 1, 4, 7] = torch.nan
    spoilt = prompt_attention(*tensors, backend="cpu").isnan()
    assert spoilt[0, 1, 4].all()
    assert spoilt.sum() == 32


def test_heads_join_without_a_copy():
    tensors = inputs(2, 3, 5, 5, 2, 32)
    for backend in (None, "cpu"):
        out = prompt_attention(*tensors, backend=backend)
        assert out.transpose(1, 2).is_contiguous()


def test_equals_torch_attention_over_all_keys():
    q, k, v, prompt_k, prompt_v = inputs(2, 3, 11, 11, 4, 32)
    keys = torch.cat([prompt_k.expand(2, -1, -1, -1), k], dim=2)
    values = torch.cat([prompt_v.expand(2, -1, -1, -1), v], dim=2)
    expected = scaled_dot_product_attention(q.double(), keys.double(), values.double())
    assert_matches("out", prompt_attention(q, k, v, prompt_k, prompt_v).detach(), expected.detach())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    h=st.integers(1, 3),
    Q=st.integers(0, 60),
    T=st.integers(1, 60),
    P=st.integers(0, 20),
    # in narrower heads a gradient may be the small difference of large numbers, in any kernel; the
    # table above has such heads with numbers that are not. With one query or key it may be that in
    # wider ones, too, in one draw of ten thousand: hence always the same draws
    d=st.integers(8, 70),
    shared=st.booleans(),
)
def test_random_shapes_on_cpu(B, h, Q, T, P, d, shared):
    check_against_float64(inputs(B, h, Q, T, P, d, shared), "cpu")


RANGES = [[0, 7], [7, 7], [7, 12], [0, 7], [3, 20], [20, 20]]


def ragged_inputs(h=2, Q=9, T=9, d=40, P=23, dtype=torch.float32, device="cpu", ranges=RANGES):
    """As ``inputs``; the rows that no image sees hold NaN, which must not show."""
    B = len(ranges)
    chosen = torch.tensor(ranges, dtype=torch.int64, device=device).view(-1, 2)
    tensors = inputs(B, h, Q, T, P, d, dtype=dtype, device=device)
    seen = {row for begin, end in ranges for row in range(begin, end)}
    nobody = [row for row in range(P) if row not in seen]
    with torch.no_grad():
        for prompts in tensors[3:]:
            prompts[:, nobody] = torch.nan
    return tuple(t.requires_grad_(False) for t in tensors), chosen


def image_by_image(tensors, ranges):
    """The definition: every image beside its own rows, in float64."""
    q, k, v, prompt_k, prompt_v = (t.double().cpu() for t in tensors)
    results = [
        reference.prompt_attention(
            *(t[b : b + 1] for t in (q, k, v)),
            *(t[:, begin:end] for t in (prompt_k, prompt_v)),
            q.shape[-1] ** -0.5,
        )[0]
        for b, (begin, end) in enumerate(ranges.tolist())
    ]
    return torch.cat(results) if results else q


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="odd-and-empty"),
        pytest.param({"Q": 1, "T": 50, "d": 64}, id="class-token-alone"),
        pytest.param({"Q": 101, "T": 130, "d": 32}, id="more-queries-than-a-block"),
        pytest.param({"ranges": []}, id="no-image"),
        pytest.param({"P": 0, "ranges": [[0, 0], [0, 0]]}, id="no-prompt"),
        pytest.param({"ranges": [[2, 9]] * 19, "h": 1}, id="one-range-for-all"),
    ],
)
def test_ragged_matches_float64(sizes, dtype, backend, device):
    tensors, ranges = ragged_inputs(**sizes, dtype=dtype, device=device)
    if reason := unsupported_reason(backend, "prompt_attention_ragged", *tensors):
        pytest.skip(reason)
    out = prompt_attention(*tensors, ranges=ranges, backend=backend)
    assert_matches("out", out, image_by_image(tensors, ranges))
    if backend != "reference":
        assert out.transpose(1, 2).is_contiguous()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    order=st.randoms(use_true_random=False),
    h=st.integers(1, 3),
    Q=st.integers(0, 40),
    T=st.integers(1, 40),
    d=st.integers(8, 70),
)
def test_random_ranges_on_cpu(lengths, order, h, Q, T, d):
    ends = list(itertools.accumulate(lengths))
    ranges = [[end - length, end] for end, length in zip(ends, lengths, strict=True)]
    order.shuffle(ranges)
    P = ends[-1] if ends else 0
    tensors, ranges = ragged_inputs(h, Q, T, d, P, ranges=ranges)
    out = prompt_attention(*tensors, ranges=ranges, backend="cpu")
    assert_matches("out", out, image_by_image(tensors, ranges))


def test_a_range_gives_the_bits_of_its_prompts_alone():
    tensors, ranges = ragged_inputs(Q=70, T=70)
    q, k, v, prompt_k, prompt_v = tensors
    out = prompt_attention(*tensors, ranges=ranges, backend="cpu")
    for b, (begin, end) in enumerate(ranges.tolist()):
        own = prompt_k[:, begin:end], prompt_v[:, begin:end]
        alone = prompt_attention(*(t[b : b + 1] for t in (q, k, v)), *own, backend="cpu")
        assert torch.equal(out[b], alone[0])


def test_ranges_with_a_gradient_are_plain_torch():
    tensors, ranges = ragged_inputs(2, 3, 4, 3, 5, torch.float64, ranges=[[0, 2], [1, 5], [3, 3]])
    leaves = [t.contiguous().requires_grad_() for t in tensors]
    torch.autograd.gradcheck(lambda *t: prompt_attention(*t, ranges=ranges), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    assert prompt_attention(*single, ranges=ranges).requires_grad
    with pytest.raises(RuntimeError, match="no backward, and a gradient is wanted"):
        prompt_attention(*single, ranges=ranges, backend="cpu")
    with torch.no_grad():
        plain = prompt_attention(*single, ranges=ranges, backend="reference")
        assert torch.allclose(prompt_attention(*single, ranges=ranges), plain, atol=1e-6)


def test_ranges_under_compile_and_vmap():
    tensors, ranges = ragged_inputs()
    expected = prompt_attention(*tensors, ranges=ranges)
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, ranges=ranges), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="ranges must lie in the 23 prompts"):
        compiled(*tensors, ranges=ranges + 10)
    mapped = torch.func.vmap(lambda q: prompt_attention(q, *tensors[1:], ranges=ranges))
    assert torch.allclose(mapped(tensors[0][None])[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r + 4, r"0 <= begin <= end <= 23, got \[7, 24\]"),
        (lambda r: r - 1, r"got \[-1, 6\]"),
        (lambda r: r.flip(1), r"got \[7, 0\]"),
        (lambda r: r[:-1], r"takes ranges \(6, 2\)"),
        (lambda r: r.int(), "got .* of torch.int32"),
    ],
)
def test_bad_ranges_are_named(change, message):
    tensors, ranges = ragged_inputs()
    with pytest.raises(ValueError, match=message):
        prompt_attention(*tensors, ranges=change(ranges))


def test_ranges_of_prompts_that_images_do_not_share_are_refused():
    tensors = inputs(2, 2, 5, 5, 3, 16, shared=False)
    with pytest.raises(ValueError, match="lie one after the other"):
        prompt_attention(*tensors, ranges=torch.zeros(2, 2, dtype=torch.int64))


def test_gradients_of_the_reference():
    for shared in (True, False):
        tensors = inputs(2, 2, 3, 4, 2, 3, shared, torch.float64)
        leaves = [t.detach().contiguous().requires_grad_() for t in tensors]
        torch.autograd.gradcheck(prompt_attention, leaves)


def test_op_is_registered_correctly():
    tensors = inputs(2, 2, 5, 5, 3, 16)
    torch.library.opcheck(torch.ops.pgn_fast.prompt_attention.default, (*tensors, 0.25, "auto"))
    tensors, ranges = ragged_inputs(P=20)
    tensors = [torch.nan_to_num(t) for t in tensors]
    ragged = torch.ops.pgn_fast.prompt_attention_ragged.default
    torch.library.opcheck(ragged, (*tensors, ranges, 0.25, "auto"))


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(2, 3, 5), (2, 3, 5), (2, 3, 5), (3, 4, 8), (3, 4, 8)], "From a fused projection"),
        ([(2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 6, 8), (3, 4, 8), (3, 4, 8)], "From a fused"),
        ([(2, 3, 5, 8)] * 3 + [(4, 3, 8), (4, 3, 8)], r"shared by the batch"),
        ([(2, 3, 5, 8)] * 3 + [(1, 3, 4, 8), (1, 3, 4, 8)], r"\(2, 3, P, 8\)"),
        ([(2, 3, 0, 8)] * 3 + [(3, 4, 8), (3, 4, 8)], "at least one token"),
    ],
)
def test_bad_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        prompt_attention(*(torch.zeros(s) for s in shapes))


def test_bad_dtype_is_named():
    q, k, v, prompt_k, prompt_v = inputs(1, 1, 2, 2, 1, 4)
    with pytest.raises(ValueError, match=r"prompt_k is torch.float16.*prompt_k\.to\(q\)"):
        prompt_attention(q, k, v, prompt_k.half(), prompt_v.half())
    with pytest.raises(ValueError, match="floating-point"):
        prompt_attention(*(t.int() for t in (q, k, v, prompt_k, prompt_v)))
