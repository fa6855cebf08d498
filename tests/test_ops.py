"""What holds for all fused ops: compilation, transforms, autocast, threads, memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pgn_fast import _C, _native
from pgn_fast.ops import mix_prompts, prompt_attention, prompted_patch_embed
from pgn_fast.ops.dispatch import refusal

ROOT = Path(__file__).parents[1]
needs_cpu_kernels = pytest.mark.skipif(
    _native.cpu_missing is not None, reason=f"no CPU kernels: {_native.cpu_missing}"
)


def mix_case(dtype=torch.float32):
    return mix_prompts, (torch.randn(3, 5, 33, dtype=dtype), torch.randn(33, 70, dtype=dtype))


def attention_case(dtype=torch.float32):
    tensors = [torch.randn(19, 2, 21, 40, dtype=dtype) for _ in range(3)]
    prompts = [torch.randn(2, 7, 40, dtype=dtype) for _ in range(2)]
    return prompt_attention, (*tensors, *prompts)


def embed_case(dtype=torch.float32):
    images = torch.randn(3, 3, 8, 12, dtype=dtype)
    weight, bias = torch.randn(24, 3, 4, 4, dtype=dtype), torch.randn(24, dtype=dtype)
    pos_embed, prefix = torch.randn(7, 24, dtype=dtype), torch.randn(1, 24, dtype=dtype)
    logits, library = torch.randn(3, 5, 9, dtype=dtype), torch.randn(9, 24, dtype=dtype)
    return prompted_patch_embed, (images, weight, bias, pos_embed, prefix, logits, library)


CASES = [mix_case, attention_case, embed_case]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__.removesuffix("_case"))


def forward_and_gradients(op, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = op(*leaves, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


class Together(nn.Module):
    """All three ops in one graph, every tensor differentiable."""

    def forward(self, embed, attention, mix):
        tokens = prompted_patch_embed(*embed, mean=(0.5,) * 3, std=(0.2,) * 3)
        return tokens.sum() + prompt_attention(*attention).sum() + mix_prompts(*mix).square().sum()


@pytest.mark.slow
def test_compiles_into_one_graph():
    arguments = [case()[1] for case in (embed_case, attention_case, mix_case)]
    results = []
    for module in (Together(), torch.compile(Together(), fullgraph=True)):
        leaves = [[t.detach().requires_grad_() for t in group] for group in arguments]
        loss = module(*leaves)
        loss.backward()
        results.append([loss.detach(), *(t.grad for group in leaves for t in group)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@needs_cpu_kernels
@every_op
def test_the_short_way_equals_the_op(case):
    op, tensors = case()
    expected = forward_and_gradients(op, tensors, backend="cpu")
    with FlopCounterMode(display=False):  # a dispatch mode looks on
        observed = forward_and_gradients(op, tensors, backend="cpu")
    for a, b in zip(expected, observed, strict=True):
        assert torch.equal(a, b)


@every_op
def test_autocast(case):
    op, tensors = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = forward_and_gradients(op, tensors)
    rounded = forward_and_gradients(op, [t.bfloat16() for t in tensors])
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(results[0], rounded[0])
    for grad, expected in zip(results[1:], rounded[1:], strict=True):
        assert grad.dtype == torch.float32  # the leaves' own
        assert torch.equal(grad, expected.float())


@needs_cpu_kernels
@every_op
def test_transforms_that_are_refused(case):
    op, tensors = case()
    with pytest.raises(NotImplementedError, match=r"no rule for torch.func.vmap.*'reference'"):
        torch.func.vmap(op)(*(torch.stack([t, t]) for t in tensors))
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*'reference'"):
        torch.func.jvp(op, tensors, tuple(torch.ones_like(t) for t in tensors))
    first = tensors[0].detach().requires_grad_()
    out = op(first, *tensors[1:], backend="cpu").square().sum()
    (grad,) = torch.autograd.grad(out, first, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        grad.sum().backward()


@every_op
def test_reference_takes_every_transform(case):
    op, tensors = case(torch.float64)
    rows = op(*tensors, backend="reference")
    stacked = torch.func.vmap(lambda *t: op(*t, backend="reference"))(*(t[None] for t in tensors))
    torch.testing.assert_close(stacked[0], rows)
    first = tensors[0].detach().requires_grad_()
    out = op(first, *tensors[1:], backend="reference").square().sum()
    (grad,) = torch.autograd.grad(out, first, create_graph=True)
    grad.square().sum().backward()
    assert first.grad is not None


@needs_cpu_kernels
@every_op
def test_runs_are_bitwise_equal(case):
    op, tensors = case()
    first = forward_and_gradients(op, tensors, backend="cpu")
    second = forward_and_gradients(op, tensors, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cpu_kernels
def test_attention_does_not_depend_on_the_threads():
    op, tensors = attention_case()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(forward_and_gradients(op, tensors, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpu_kernels
@every_op
def test_nothing_beside_the_inputs_is_read(case):
    """NaN stands directly before and behind each input: one read of it would spread."""
    op, tensors = case()
    expected = forward_and_gradients(op, tensors, backend="cpu")
    guarded = []
    for t in tensors:
        buffer = torch.full((t.numel() + 128,), torch.nan)
        buffer[64:-64] = t.flatten()
        guarded.append(buffer[64:-64].view(t.shape))
    results = forward_and_gradients(op, guarded, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_cpu_kernels
def test_offsets_beyond_32_bits():
    """Two images 2^31 elements apart, in memory that is reserved and never touched in between."""
    far = 2**31 + 64
    bytes_ = torch.empty(far + 4096, dtype=torch.uint8)
    images = bytes_.as_strided((2, 3, 4, 4), (far, 16, 4, 1))
    images.copy_(torch.randint(0, 256, images.shape, dtype=torch.uint8))
    weight, prefix = torch.randn(5, 3, 2, 2), torch.randn(1, 5)
    arguments = (weight, None, None, prefix, None, None, None, [0.01] * 3, [0.0] * 3)
    kernel = torch.ops.pgn_fast_C.prompted_patch_embed.default
    assert torch.equal(
        kernel(images, *arguments, "softmax", "append"),
        kernel(images.contiguous(), *arguments, "softmax", "append"),
    )
    halves = torch.empty(far + 4096, dtype=torch.float16)
    q = halves.as_strided((2, 1, 3, 32), (far, 96, 32, 1))
    q.copy_(torch.randn(q.shape))
    prompts = torch.randn(1, 2, 32).half()
    near = q.contiguous()
    for a, b in zip(
        forward_and_gradients(prompt_attention, (q, q, q, prompts, prompts), backend="cpu"),
        forward_and_gradients(
            prompt_attention, (near, near, near, prompts, prompts), backend="cpu"
        ),
        strict=True,
    ):
        assert torch.equal(a, b)


@needs_cpu_kernels
@every_op
def test_every_instruction_set_agrees(case):
    chosen, results = _C.build_info()["cpu_isa"], {}
    try:
        for isa in ("scalar", "avx2", "avx512"):
            if _C.set_isa(isa):
                torch.manual_seed(0)
                op, tensors = case()
                results[isa] = forward_and_gradients(op, tensors, backend="cpu")
    finally:
        _C.set_isa(chosen)
    assert "scalar" in results
    for isa, other in results.items():
        for a, b in zip(results["scalar"], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=isa)


def test_instruction_set_objects_hold_no_weak_symbols():
    """Else the linker could merge an AVX-512 copy of a function into code that always runs."""
    objects = [o for o in ROOT.glob("build/*/CMakeFiles/pgn_*.dir/*.o") if "pgn_cpu" not in str(o)]
    if not objects:
        pytest.skip("no build tree beside the sources: this is an installed package")
    symbols = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True)
    weak = [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu" and line[17:18]]
    assert not weak, weak[:5]


@every_op
def test_named_backend_that_cannot_run_says_why(case):
    op, tensors = case()
    with pytest.raises(RuntimeError, match="no backend named 'cudnn'; known: reference, cpu"):
        op(*tensors, backend="cudnn")
    _, doubles = case(torch.float64)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run.*float64.*backend=None"):
        op(*doubles, backend="cpu")
    if reason := refusal("cuda", op.__name__, *tensors):
        with pytest.raises(RuntimeError) as raised:
            op(*tensors, backend="cuda")
        assert str(raised.value) == reason
