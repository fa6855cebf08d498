"""What the shared tests of the ops cannot see of the Triton kernels: tiles, memory, tuning."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
import triton_cases as cases

pytest.importorskip("triton", reason="the Triton kernels need Triton")

import triton
import triton.language as tl
from pgn_fast.kernels import (
    _common,
    add_layer_norm,
    mix_prompts,
    prompt_attention,
    prompted_patch_embed,
)

from pgn_fast.ops.devices import stem
from pgn_fast.ops.dispatch import OPS, has_kernel

MODULES = {
    op: importlib.import_module(f"pgn_fast.kernels.{op}")
    for op in sorted({stem(op) for op in OPS if has_kernel("triton", op)})
}
TILES = [
    pytest.param(op, table, kind, index, id=f"{op}-{table}-{kind}-{index}")
    for op, module in MODULES.items()
    for table in vars(module)
    if table.endswith("_CONFIGS")
    for kind, configs in getattr(module, table).items()
    for index in range(len(configs))
]


@pytest.mark.parametrize("op, table, kind, index", TILES)
def test_every_tile_computes_the_same(op, table, kind, index, device, monkeypatch):
    """Whatever tuning may choose on some GPU is right, also a tile larger than the problem."""
    module = MODULES[op]
    configs = getattr(module, table)[kind]
    monkeypatch.setitem(getattr(module, table), kind, [configs[index]])
    dtype = torch.float32 if kind == "float" else torch.float16
    variant = {"one-query": {"queries": 1}, "wide": {"d": 72}}.get(kind, {})
    cases.check(op, module, device, dtype, **variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", MODULES)
def test_every_dtype(op, dtype, device):
    """bfloat16 also in the interpreter: ``dot`` and ``cast`` stand in for what is wrong there."""
    cases.check(op, MODULES[op], device, dtype)


def test_variants(device):
    cases.check_mix_prompts(mix_prompts, device, activation="sigmoid")
    cases.check_prompt_attention(prompt_attention, device, shared=False)
    for dtype, queries in ((torch.float32, None), (torch.float16, None), (torch.bfloat16, 1)):
        cases.check_ragged_attention(prompt_attention, device, dtype, queries)
    cases.check_prompted_patch_embed(prompted_patch_embed, device, channels_last=True)
    cases.check_prompted_patch_embed(prompted_patch_embed, device, uint8=False)
    cases.check_add_layer_norm(add_layer_norm, device, add=False)


@pytest.fixture
def guarded(monkeypatch):
    """Give launchers memory full of NaN, between guards; afterwards the guards must be NaN still.

    What a kernel forgets to write is then NaN in the result, and what it writes outside shows.
    """
    guards, margin, empty = [], 64, torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        if count == 0 or not options.get("dtype", self.dtype).is_floating_point:
            return empty(self, *size, **options)  # the interpreter's own, not a launcher's
        buffer = empty(self, count + 2 * margin, **options).fill_(float("nan"))
        guards.extend([buffer[:margin], buffer[margin + count :]])
        return buffer[margin : margin + count].view(*shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **o: x.new_empty(x.shape, **o))
    yield
    assert guards
    for guard in guards:
        assert guard.isnan().all()


@pytest.mark.parametrize("op", MODULES)
def test_memory_around_tensors_is_left_alone(op, device, guarded):
    """Inputs lie inside buffers of NaN, see triton_cases; outputs and scratch are guarded here."""
    cases.check(op, MODULES[op], device)


def test_library_tokens_with_no_weight_at_all(device):
    """Logits of -inf, as a user masks tokens with, also through the whole first tile."""
    logits, library = torch.randn(1, 3, 200, device=device), torch.randn(200, 8, device=device)
    logits[:, 0, :150] = float("-inf")
    logits[:, 1, 50:] = float("-inf")
    prompts = mix_prompts.mix_prompts(logits, library, "softmax")
    torch.testing.assert_close(prompts, logits.softmax(-1) @ library)
    grad_logits, _ = mix_prompts.mix_prompts_backward(prompts, logits, library, "softmax")
    assert grad_logits[:, 0, :150].abs().max() == 0 and grad_logits.isfinite().all()


def test_gradients_that_sum_over_the_batch_repeat_bit_for_bit(device):
    logits, library = torch.randn(24, 4, 9, device=device), torch.randn(9, 8, device=device)
    grad = torch.randn(24, 4, 8, device=device)
    first, second = (
        mix_prompts.mix_prompts_backward(grad, logits, library, "softmax")[1] for _ in range(2)
    )
    assert torch.equal(first, second)
    q = torch.randn(24, 1, 4, 32, device=device)
    prompts = torch.randn(2, 1, 3, 32, device=device).unbind(0)
    out, lse = prompt_attention.prompt_attention(q, q, q, *prompts, 0.2)
    first, second = (
        torch.stack(
            prompt_attention.prompt_attention_backward(
                *(out, q, q, q, *prompts, out, lse, 0.2, False, False, True)
            )[3:]
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_sums_over_the_batch_are_cut_by_sizes_alone():
    assert _common.split_rows(1024, 32, 48) == (5, 224)
    assert _common.split_rows(10, 32, 48) == (1, 32)
    assert _common.split_rows(1, 16, 10**6) == (1, 16)
    for rows, block, programs in ((12608, 64, 12), (77, 16, 1), (264 * 16 + 1, 16, 1)):
        splits, per_split = _common.split_rows(rows, block, programs)
        assert (splits - 1) * per_split < rows <= splits * per_split and per_split % block == 0


def test_offsets_beyond_two_to_the_31(device):
    """Strides whose product with an index overflows 32 bits, in 4 GiB that are barely touched."""
    far = 2**31 + 64
    try:
        memory = torch.empty(far + 2**16, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("4 GiB of memory could not be reserved")
    place = lambda *shape: memory.as_strided(shape, (far, *torch.empty(shape[1:]).stride()))
    library = torch.randn(9, 16, dtype=torch.float16, device=device)
    logits = place(2, 3, 9).copy_(torch.randn(2, 3, 9))
    expected = logits.float().softmax(-1) @ library.float()
    prompts = mix_prompts.mix_prompts(logits, library, "softmax")
    torch.testing.assert_close(prompts.float(), expected, rtol=0, atol=4e-3)
    mix_prompts.mix_prompts_into(place(2, 3, 16), logits.clone(), library, "softmax")
    torch.testing.assert_close(place(2, 3, 16).float(), expected, rtol=0, atol=4e-3)

    q = place(2, 1, 5, 32).copy_(torch.randn(2, 1, 5, 32))
    near = q.clone()
    prompt = torch.randn(1, 2, 32, dtype=torch.float16, device=device)
    results = []
    for tensor in (q, near):
        tensors = tensor, tensor, tensor, prompt, prompt
        out, lse = prompt_attention.prompt_attention(*tensors, 0.2)
        flags = True, True, True
        results.append(
            (
                out,
                *prompt_attention.prompt_attention_backward(
                    tensor, *tensors, out, lse, 0.2, *flags
                ),
            )
        )
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@triton.jit
def _rows_kernel(row_ptr, inside_ptr, b_ptr, p_ptr, block, R, P, BLOCK: tl.constexpr):
    r, inside, b, p = _common.rows_of(block, R, P, BLOCK)
    step = tl.arange(0, BLOCK)
    tl.store(row_ptr + step, r)
    tl.store(inside_ptr + step, inside)
    tl.store(b_ptr + step, b)
    tl.store(p_ptr + step, p)


@pytest.mark.parametrize(
    "B, P",
    [(1, 1), (3, 7), (2**31 - 1, 1), (715827882, 3), (1, 2**31 - 20), (2**28, 8), (2**29, 9)],
)
def test_rows_are_told_apart_on_both_sides_of_two_to_the_31(B, P, device):
    """Images and rows within them, in 32 bits as far as these hold the number of rows."""
    R, BLOCK = B * P, 32
    for block in {0, (R - 1) // BLOCK // 2, (R - 1) // BLOCK}:
        found = [torch.zeros(BLOCK, dtype=torch.int64, device=device) for _ in range(4)]
        _rows_kernel[(1,)](*found, block, R, P, BLOCK=BLOCK)
        r, inside, b, p = (x.cpu() for x in found)
        rows = block * BLOCK + torch.arange(BLOCK)
        assert torch.equal(r, rows) and torch.equal(inside.bool(), rows < R)
        clamped = rows.clamp(max=R - 1)
        assert torch.equal(b, clamped // P) and torch.equal(p, clamped % P)


@pytest.fixture
def tuner(monkeypatch):
    """launch_tuned as on a GPU: three tiles, of which the second is the fastest."""
    configs = [_common.tile(BLOCK=b, warps=4, stages=1) for b in (1, 2, 3)]
    launched, refused = [], set()
    times = {1: 5.0, 2: 1.0, 3: 2.0}

    def do_bench(launch, **_):
        launch()
        return times[launched[-1]]

    monkeypatch.setattr(_common, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(_common, "_measured", {})
    monkeypatch.setattr(_common, "_refused", set())
    monkeypatch.setattr(_common.triton.testing, "do_bench", do_bench)

    def record(config):
        if config.blocks["BLOCK"] in refused:
            raise _common.OutOfResources(120_000, 101_376, "shared memory")
        launched.append(config.blocks["BLOCK"])

    def launch(key=("op", 1), refuse=()):
        launched.clear()
        refused.clear()
        refused.update(refuse)
        _common.launch_tuned(configs, key, torch.device("cpu"), record)
        return list(launched)

    return launch


def test_a_training_step_measures_nothing(tuner):
    assert tuner() == [1]
    assert tuner() == [1]


def test_measuring_runs_every_tile_once_for_every_key(tuner):
    with _common.measuring():
        assert tuner() == [1, 2, 3, 2]
        assert tuner() == [2]
        assert tuner(key=("op", 2)) == [1, 2, 3, 2]
    assert tuner() == [2]
    assert tuner(key=("op", 3)) == [1]


def test_measuring_waits_while_a_graph_is_captured(tuner, monkeypatch):
    monkeypatch.setattr(_common, "_capturing", lambda: True)
    with _common.measuring():
        assert tuner() == [1]


def test_what_was_measured_is_used_by_another_process(tuner, monkeypatch):
    with _common.measuring():
        tuner()
    kept = json.loads(json.dumps(_common.measured_tiles()))
    monkeypatch.setattr(_common, "_measured", {})
    assert tuner() == [1]
    _common.use_tiles(kept)
    assert tuner() == [2]


def test_a_tile_that_the_kernel_no_longer_has_is_ignored(tuner):
    _common.use_tiles({"op 1": _common.tile(BLOCK=64, warps=4, stages=1)._asdict()})
    assert tuner() == [1]


def test_a_refused_tile_is_left_out_and_the_next_one_runs(tuner):
    assert tuner(refuse={1}) == [2]
    assert tuner() == [2]  # which is remembered
    with _common.measuring():
        assert tuner(key=("op", 2), refuse={2}) == [1, 3, 3]


def test_a_device_that_takes_no_tile_is_one_sentence(tuner):
    with pytest.raises(RuntimeError, match=r"none of the kernel's 3 tiles .*shared memory"):
        tuner(refuse={1, 2, 3})
