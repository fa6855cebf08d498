"""feedback_round: every backend against float64 by token error, never by pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgn_fast import _native, reference
from pgn_fast.inversion.rounding import FeedbackRounding
from pgn_fast.ops import feedback_round
from pgn_fast.ops.dispatch import unsupported_reason


def problem(D: int, n: int, R: int) -> tuple[Tensor, FeedbackRounding, Tensor]:
    """A random token map (D, n), its rounding, and R prompts well inside the gamut."""
    A = torch.randn(D, n, dtype=torch.float64)
    return A, FeedbackRounding.from_map(A), 20 + 215 * torch.rand(R, n)


def token_error(A: Tensor, rounded: Tensor, levels: Tensor) -> Tensor:
    return ((rounded.cpu().double() - levels.cpu().double()) @ A.T).norm(dim=1)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize(
    "R, D, n",
    [
        pytest.param(96, 96, 192, id="p8"),
        pytest.param(33, 40, 75, id="nothing-divides-a-block"),
        pytest.param(1, 1, 3, id="smallest"),
        pytest.param(0, 4, 12, id="no-prompt"),
    ],
)
def test_token_error_matches_float64(R, D, n, backend, device):
    A, rounding, levels = problem(D, n, R)
    inputs = levels.to(device), rounding.feedback.to(device), rounding.order.to(device)
    if reason := unsupported_reason(backend, "feedback_round", *inputs[:2]):
        pytest.skip(reason)
    rounded = feedback_round(*inputs, backend=backend)
    assert rounded.dtype == torch.uint8 and rounded.shape == (R, n)
    exact = reference.feedback_round(levels.double(), rounding.feedback.double(), rounding.order)
    # rounding ties fall either way in float32, and all later pixels follow: most rows are equal
    # pixel by pixel, and where one is not, its token is as near as before
    differs = (rounded.cpu() != exact).any(dim=1)
    assert differs.double().mean() <= 0.35 if R else not differs.any()
    error, error64 = token_error(A, rounded, levels), token_error(A, exact, levels)
    assert error.sum() <= 1.03 * error64.sum()


def test_the_definition_pixel_by_pixel():
    """The blocked reference against the two lines of the docstring."""
    _, rounding, levels = problem(20, 70, 3)
    w, errors = levels.double()[:, rounding.order], torch.zeros(3, 70, dtype=torch.float64)
    expected = torch.zeros(3, 70, dtype=torch.uint8)
    for j in range(70):
        level = w[:, j] - errors @ rounding.feedback[j].double()
        expected[:, rounding.order[j]] = level.round().clamp(0, 255).to(torch.uint8)
        errors[:, j] = level - level.round().clamp(0, 255)
    actual = feedback_round(levels.double(), rounding.feedback.double(), rounding.order)
    assert torch.equal(actual, expected)


def test_clips_and_feeds_the_clipped_part_on():
    """A pixel that cannot go below 0 leaves its share to the next one."""
    feedback = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    levels = torch.tensor([[-10.0, 100.0], [265.0, 100.0], [100.4, 100.0]])
    rounded = feedback_round(levels, feedback, torch.tensor([0, 1]))
    assert rounded.tolist() == [[0, 110], [255, 90], [100, 100]]
    swapped = feedback_round(levels.flip(1), feedback, torch.tensor([1, 0]))
    assert torch.equal(swapped.flip(1), rounded)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if _native.C is None:
        pytest.skip(_native.cpu_missing or "")
    chosen = _native.C.build_info()["cpu_isa"]
    if not _native.C.set_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        A, rounding, levels = problem(40, 75, 70)
        rounded = feedback_round(levels, rounding.feedback, rounding.order, backend="cpu")
    finally:
        _native.C.set_isa(chosen)
    exact = reference.feedback_round(levels.double(), rounding.feedback.double(), rounding.order)
    assert (rounded == exact).double().mean() > 0.98
    assert token_error(A, rounded, levels).sum() <= 1.02 * token_error(A, exact, levels).sum()


def test_prediction_and_swing():
    """The closed-form error is the measured one, and pixels stay within the margin."""
    A, rounding, levels = problem(96, 192, 400)
    rounded = rounding(levels)
    rms = token_error(A, rounded, levels).square().mean().sqrt()
    assert rms == pytest.approx(rounding.token_error, rel=0.04)
    nearest = token_error(A, levels.round(), levels).square().mean().sqrt()
    assert nearest == pytest.approx(rounding.nearest_token_error, rel=0.04)
    moved = rounded.double() - levels.double()
    assert moved.abs().max() <= rounding.margin + 2
    assert moved.square().mean(dim=0).max().sqrt() == pytest.approx(
        (rounding.swing**2 + 1 / 12) ** 0.5, rel=0.15
    )


def test_op_is_registered_correctly():
    _, rounding, levels = problem(4, 12, 5)
    inputs = levels, rounding.feedback, rounding.order, "auto"
    torch.library.opcheck(torch.ops.pgn_fast.feedback_round.default, inputs)


@pytest.mark.parametrize(
    "levels, feedback, order, message",
    [
        (torch.zeros(2, 5), torch.zeros(4, 4), torch.arange(5), r"n is the number of values"),
        (torch.zeros(5), torch.zeros(5, 5), torch.arange(5), r"takes levels \(R, n\)"),
        (torch.zeros(2, 5).byte(), torch.zeros(5, 5), torch.arange(5), "before rounding"),
        (torch.zeros(2, 5), torch.zeros(5, 5), torch.arange(5).int(), "int64 order"),
    ],
)
def test_refuses_what_does_not_fit(levels, feedback, order, message):
    with pytest.raises(ValueError, match=message):
        feedback_round(levels, feedback, order)


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_compiled_kernel_refuses_a_wrong_order(order):
    """A bad index must not write outside the output."""
    levels, feedback = torch.zeros(2, 3), torch.zeros(3, 3)
    if reason := unsupported_reason("cpu", "feedback_round", levels, feedback):
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="not a permutation"):
        feedback_round(levels, feedback, torch.tensor(order), backend="cpu")
