"""What holds for all fused ops: compilation, transforms, autocast, threads, memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from pgn_fast import _C, _native
from pgn_fast.ops import dispatch, mix_prompts, prompt_attention, prompted_patch_embed
from pgn_fast.ops._register import Op
from pgn_fast.ops.dispatch import unsupported_reason
from pgn_fast.ops.examples import Sizes, examples

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
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.view(out.shape))]


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


@every_op
@pytest.mark.parametrize("strict", [None, True, False], ids=["compiled", "strict", "not-strict"])
def test_compiled_programs_call_the_op_and_exported_ones_plain_torch(case, strict):
    op, tensors = case()
    if strict is None:
        graphs = []
        compiled = torch.compile(op, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
        assert torch.equal(compiled(*tensors), op(*tensors))
        (graph,) = (g.graph for g in graphs)
    else:

        class Program(nn.Module):
            def forward(self, *tensors):
                return op(*tensors)

        graph = torch.export.export(Program(), tensors, strict=strict).graph
    called = any("pgn_fast" in str(node.target) for node in graph.nodes)
    assert called == (strict is None)


def registered_ops():
    """Every call of an op or a backward that an op's examples lead to: (op, arguments)."""
    found = []

    def record(self, *arguments, backend):
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        found.append((self, detached))
        return run(self, *arguments, backend=backend)

    run, through = Op.run, lambda self, *a, backend: self.run(*a, backend="auto")
    small = Sizes(B=3, D=24, h=2, patch=4, image=8, P=4, K=9)
    with mock.patch.object(Op, "run", record), mock.patch.object(Op, "__call__", through):
        for name in dispatch.OPS:
            for example in examples(name, small, torch.float32, torch.device("cpu")):
                outputs = example.call(None)(*example.tensors)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                leaves = [t for t in example.tensors if t.requires_grad]
                if leaves:
                    torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)
    return found


REGISTERED = registered_ops()


def test_the_table_of_ops_is_whole():
    names = torch._C._dispatch_get_all_op_names()
    known = {n.removeprefix("pgn_fast::") for n in names if n.startswith("pgn_fast::")}
    assert known == {op.name for op, _ in REGISTERED}
    assert {name.removesuffix("_backward") for name in known} == set(dispatch.OPS)


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("op, arguments", [pytest.param(*r, id=r[0].name) for r in REGISTERED])
def test_three_ways_through_an_op_give_the_same_bits(op, arguments, backend):
    """The kernel directly, the autograd function, and torch.ops through the dispatcher."""
    name, floats = op.name, [a for a in arguments if is_float(a)]
    if backend == "cpu" and (reason := unsupported_reason("cpu", name, *floats)):
        pytest.skip(reason)
    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)
    kernel = as_tuple(op.kernel(*arguments, backend))
    bare = as_tuple(op.op(*arguments, backend))
    assert all(torch.equal(a, b) for a, b in zip(kernel, bare, strict=True))
    if op.function is None:
        return
    frozen = name == "frozen_linear"
    results = []
    for way in (op.function.apply, op.op):
        tensors = [
            a.clone().requires_grad_(i == 0 or not frozen) if is_float(a) else a
            for i, a in enumerate(arguments)
        ]
        outputs = as_tuple(way(*tensors, backend))
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs[:2])
        if name == "prompt_attention":  # its second output has no gradient
            loss = (
                outputs[0] * torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
            ).sum()
        leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = torch.autograd.grad(loss, leaves)
        results.append((*(x.detach() for x in outputs), *grads))
    assert all(torch.equal(a, b) for a, b in zip(kernel, results[0], strict=False))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_resolve_knows_sizes():
    cpu, single = torch.device("cpu"), (torch.float32,)
    name, reason = dispatch.resolve("prompt_attention", cpu, single, {"head_width": 320}, "cpu")
    assert name == "reference" and "head widths up to 256, got 320" in reason
    q = torch.randn(1, 1, 3, 320)
    expected = prompt_attention(q, q, q, q[0], q[0], backend="reference")
    assert torch.equal(prompt_attention(q, q, q, q[0], q[0]), expected)
    with pytest.raises(RuntimeError) as raised:
        prompt_attention(q, q, q, q[0], q[0], backend="cpu")
    assert str(raised.value) == reason
    for op, size in (("prompt_attention", {"head_width": 129}), ("mix_prompts", {})):
        limited = dispatch.limit("cuda", op, torch.device("cuda"), torch.float16, size)
        assert (limited is None) == (not size)
    limited = dispatch.limit(
        "cuda", "prompted_patch_embed", torch.device("cuda"), torch.float16, {"channels": 65}
    )
    assert "channels up to 64, got 65" in limited


@needs_cpu_kernels
def test_resolve_names_backend_and_reason():
    cpu = torch.device("cpu")
    assert dispatch.resolve("mix_prompts", cpu, (torch.float32,)) == ("cpu", None)
    assert dispatch.resolve("mix_prompts", cpu, (torch.float32,), None, "reference") == (
        "reference",
        None,
    )
    name, reason = dispatch.resolve("mix_prompts", cpu, (torch.float64,))
    assert name == "reference" and "got torch.float64" in reason
    name, reason = dispatch.resolve("mix_prompts", cpu, (torch.float32,), None, "cudnn")
    assert name == "cpu" and "no backend named 'cudnn'" in reason
    name, reason = dispatch.resolve("mix_prompts", torch.device("meta"), (torch.float32,))
    assert name == "reference" and "no backend is faster than eager PyTorch on meta" in reason


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


@every_op
def test_tensors_without_memory(case):
    """On "meta", where shapes are planned: shapes of the output and of every gradient."""
    op, tensors = case()
    expected = forward_and_gradients(op, tensors)
    found = forward_and_gradients(op, [t.to("meta") for t in tensors])
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert all(x.is_meta for x in found)


@every_op
@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_every_transform_is_plain_torch(case, backend):
    op, tensors = case()
    expected = op(*tensors, backend="reference")
    stacked = torch.func.vmap(lambda *t: op(*t, backend=backend))(*(t[None] for t in tensors))
    torch.testing.assert_close(stacked[0], expected)
    ones = tuple(torch.ones_like(t) for t in tensors)
    out, tangent = torch.func.jvp(lambda *t: op(*t, backend=backend), tensors, ones)
    assert torch.equal(out, expected)
    _, plain = torch.func.jvp(lambda *t: op(*t, backend="reference"), tensors, ones)
    assert torch.equal(tangent, plain) and tangent.abs().max() > 0
    grad = torch.func.grad(lambda t: op(t, *tensors[1:], backend=backend).square().sum())
    leaf = tensors[0].clone().requires_grad_()
    op(leaf, *tensors[1:], backend="reference").square().sum().backward()
    torch.testing.assert_close(grad(tensors[0]), leaf.grad, rtol=1e-4, atol=1e-4)


@every_op
def test_the_bare_op_under_vmap_says_what_to_call(case):
    op, tensors = case()
    bare = getattr(torch.ops.pgn_fast, op.__name__)
    embedding = (None, [], [], "softmax", "append")
    rest = {"mix_prompts": ("softmax",), "prompt_attention": (0.5,)}.get(op.__name__, embedding)
    with pytest.raises(NotImplementedError, match=r"no rule for torch.func.vmap. Call the func"):
        torch.func.vmap(lambda *t: bare(*t, *rest, "auto"))(*(t[None] for t in tensors))


@every_op
def test_traced_programs_are_plain_torch(case):
    op, tensors = case()
    traced = torch.jit.trace(lambda *t: op(*t), tensors)
    spaces = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert spaces <= {"aten", "prim"}
    torch.testing.assert_close(traced(*tensors), op(*tensors, backend="reference"))


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
    weak = re.findall(r"^[0-9a-f ]{16} [WVu] .*", symbols.stdout, flags=re.M)
    assert not weak, weak[:5]


@every_op
def test_named_backend_that_cannot_run_says_why(case):
    op, tensors = case()
    with pytest.raises(RuntimeError, match="no backend named 'cudnn'; known: reference, cpu"):
        op(*tensors, backend="cudnn")
    _, doubles = case(torch.float64)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run.*float64.*backend=None"):
        op(*doubles, backend="cpu")
    if reason := unsupported_reason("cuda", op.__name__, *tensors):
        with pytest.raises(RuntimeError) as raised:
            op(*tensors, backend="cuda")
        assert str(raised.value) == reason
