"""Devices and sizes that a backend's kernels do not take, on machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cuda_host
import pytest
import torch

from pgn_fast import _native
from pgn_fast.ops import devices, dispatch

GPUS = {  # name, compute capability, shared memory that a block may ask for
    "A100": ((8, 0), 163 * 1024),
    "L4": ((8, 9), 99 * 1024),
    "H100": ((9, 0), 227 * 1024),
    "T4": ((7, 5), 64 * 1024),
}


def forget() -> None:
    for cached in (devices._capability, devices._name, dispatch._resolve, dispatch._select):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A machine with these GPUs and a library built for sm_80 and sm_90a."""

    def with_gpus(*names: str) -> None:
        forget()
        index = lambda d=None: (torch.device(d).index if not isinstance(d, int) else d) or 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda d=None: GPUS[names[index(d)]][0]
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: names[index(d)])
        properties = lambda d: SimpleNamespace(
            shared_memory_per_block_optin=GPUS[names[index(d)]][1]
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(_native, "cuda_missing", None)
        monkeypatch.setattr(devices, "built_archs", lambda: archs)
        monkeypatch.setattr(dispatch, "has_kernel", lambda backend, op: True)
        monkeypatch.setattr(dispatch, "_interpreted", lambda: False)

    archs = devices._cuda_archs.parse("80-real 90a-real")[0]
    yield with_gpus
    forget()


def unsupported_reason(backend: str, device: str, dtype: torch.dtype = torch.float32, **sizes: int):
    tensor = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return dispatch.unsupported_reason(backend, "prompt_attention", tensor, sizes=sizes)


def test_each_gpu_of_a_mixed_machine_is_asked_for_itself(machine):
    machine("H100", "T4", "L4")
    assert unsupported_reason("cuda", "cuda:0") is None
    assert "compute capability 7.5" in unsupported_reason("cuda", "cuda:1")
    assert unsupported_reason("cuda", "cuda:2") is None
    assert unsupported_reason("triton", "cuda:0") is None
    assert "T4 has 7.5" in unsupported_reason("triton", "cuda:1")


def test_a_device_without_code_in_the_library_says_how_to_build_it(machine, monkeypatch):
    machine("H100")
    monkeypatch.setattr(devices, "built_archs", lambda: devices._cuda_archs.parse("80-real")[0])
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in unsupported_reason("cuda", "cuda:0")


@pytest.mark.parametrize(
    "gpu, dtype, head_width, taken",
    [
        ("L4", torch.bfloat16, 128, True),
        ("L4", torch.float32, 64, True),
        ("L4", torch.float32, 80, False),  # padded to 96
        ("L4", torch.float32, 128, False),
        ("A100", torch.float32, 128, True),
        ("H100", torch.float32, 128, True),
        ("H100", torch.bfloat16, 160, False),
    ],
)
def test_cards_with_less_shared_memory_fall_back(machine, gpu, dtype, head_width, taken):
    machine(gpu)
    reason = unsupported_reason("cuda", "cuda:0", dtype, head_width=head_width)
    assert (reason is None) == taken, reason
    if not taken and head_width <= 128:
        assert "KiB of shared memory" in reason and gpu in reason
        with pytest.raises(RuntimeError, match="shared memory"):
            tensor = SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)
            dispatch.select_kernel("prompt_attention", "cuda", tensor, head_width=head_width)


def test_the_first_backend_of_a_preference_that_takes_the_sizes_runs(machine, monkeypatch):
    machine("L4")
    row = replace(dispatch.OPS["prompt_attention"], preference={"sm_89": ("cuda", "triton")})
    monkeypatch.setitem(dispatch.OPS, "prompt_attention", row)
    monkeypatch.setattr(dispatch, "_kernel", lambda backend, op: backend)
    monkeypatch.setattr(devices, "launcher_missing", lambda: None)
    monkeypatch.setattr(dispatch, "HALF", (torch.float32,))  # whose tiles are the largest
    tensor = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    chosen = lambda width: dispatch.select_kernel(
        "prompt_attention", "auto", tensor, head_width=width
    )
    assert [chosen(64), chosen(128)] == ["cuda", "triton"]


def test_what_was_measured_on_a_hopper_is_its_default_alone(machine, monkeypatch):
    machine("H100", "A100")
    launcher = [None]
    monkeypatch.setattr(devices, "launcher_missing", lambda: launcher[0])

    def runs(op, device, dtype):
        forget()
        return dispatch.resolve(op, torch.device(device), (dtype,))

    for op in ("prompt_attention", "prompted_patch_embed", "add_layer_norm"):
        for dtype in (torch.bfloat16, torch.float16):
            assert runs(op, "cuda:0", dtype) == ("triton", None)
            assert runs(op, "cuda", dtype)[0] == "triton"
        assert runs(op, "cuda:0", torch.float32)[0] == "reference"
        assert runs(op, "cuda:1", torch.bfloat16)[0] == "reference"
    assert runs("mix_prompts", "cuda:0", torch.bfloat16)[0] == "reference"
    launcher[0] = "no C compiler"
    found = runs("prompt_attention", "cuda:0", torch.bfloat16)
    assert found == ("reference", "no C compiler")
    named = dispatch.resolve(
        "prompt_attention", torch.device("cuda:0"), (torch.half,), {}, "triton"
    )
    assert named == ("triton", None)


def test_what_triton_needs_to_compile_its_launchers(monkeypatch):
    missing = devices.launcher_missing.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert "install gcc or set CC" in missing()
    monkeypatch.setenv("CC", "clang-19")
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python.h is not in /nowhere" in missing()


@pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
@pytest.mark.parametrize("gpu", ["A100", "L4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [9, 64, 96, 128])
def test_limits_are_those_of_the_launchers(d, dtype, gpu):
    """The arithmetic is what the launchers ask for, and they are refused beyond a card's offer."""
    kernels, offered = cuda_host.build(), GPUS[gpu][1]
    tensor = lambda *shape: torch.zeros(shape, dtype=dtype)
    names = ("q", "k", "v", "prompt_k", "prompt_v", "out")
    heads = {name: cuda_host.Heads(tensor(1, 1, 17, d)) for name in names}
    sizes = {"B": 1, "h": 1, "Q": 17, "T": 17, "P": 17, "d": d, "scale": 1.0}
    forward = cuda_host.PromptAttention(**heads, lse=torch.zeros(17), **sizes)
    grads = {f"grad_{name}": cuda_host.Heads(tensor(1, 1, 17, d)) for name in names}
    backward = cuda_host.PromptAttentionBackward(
        forward=forward,
        **grads,
        delta=torch.zeros(17),
        partial=torch.zeros(2, 17, d),
        splits=1,
        shared=True,
    )
    for op, args in (("prompt_attention", forward), ("prompt_attention_backward", backward)):
        asked = kernels.shared_bytes(op, args, dtype, offered)
        expected = devices.attention_shared_bytes(d, dtype, op.endswith("_backward"))
        assert asked == (expected if expected <= offered else None)
