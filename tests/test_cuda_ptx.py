"""The PTX that nvcc makes of the CUDA kernels, interpreted (tests/ptx_model) and held to float64.

tests/test_cuda_host.py runs the kernels' source; this runs what the compiler made of it, with the
inline instructions of tensor cores, background and tensor copies decoded from their own operands.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cuda_host
import numpy as np
import ptx_model
import pytest
import torch
from numerics import assert_matches
from ptx_model import program
from torch import Tensor

from pgn_fast import reference

pytestmark = pytest.mark.skipif(program.missing() is not None, reason=str(program.missing()))

DTYPES = [torch.bfloat16, torch.float16]
MANGLED = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
SEEDS = range(3)


class Device:
    """Global memory of the model that takes and gives tensors."""

    def __init__(self) -> None:
        self.memory = ptx_model.Memory()

    def put(self, tensor: Tensor, shift: int = 0) -> int:
        """A copy of the tensor's elements in the order of its memory."""
        flat = tensor.as_strided((tensor.numel(),), (1,))
        bits = flat if flat.dtype != torch.bfloat16 else flat.view(torch.int16)
        return self.memory.put(bits.numpy(), shift)

    def poison(self, *shape: int, dtype: torch.dtype) -> int:
        return self.put(torch.full(shape, torch.nan, dtype=dtype))

    def get(self, pointer: int, *shape: int, dtype: torch.dtype) -> Tensor:
        bits = np.int16 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(self.memory.get(pointer, bits, shape)).view(dtype)

    def launch(self, kernel: Any, *grid: int, **options: Any) -> int:
        blocks = (*grid, 1, 1)[:3]
        return ptx_model.launch(kernel, self.memory, grid=blocks, **options)


def arguments(kind: type, **values: Any) -> Any:
    """A launcher's struct of device pointers and numbers."""
    struct = kind.__new__(kind)
    cuda_host.ctypes.Structure.__init__(struct)
    for name, value in values.items():
        setattr(struct, name, value)
    return struct


SHARED = "attention.cuh"


def only(source: str, folder: Path, *changes: tuple[str, str]) -> dict[str, Any]:
    """The kernels of one file, changed there or in SHARED: fewer instances, or a seeded bug."""
    for file in cuda_host.CUDA.iterdir():
        if file.suffix in (".cu", ".cuh", ".h") and file.name != "host.h":
            shutil.copy(file, folder / file.name)
    path = folder / source
    texts = {file: file.read_text() for file in (path, folder / SHARED)}
    for right, wrong in changes:
        found = any(right in text for text in texts.values())
        assert found, f"{right!r} is not in {source} any more: write this change again"
        texts = {file: text.replace(right, wrong) for file, text in texts.items()}
    for file, text in texts.items():
        file.write_text(text)
    return ptx_model.compile_ptx(path, "sm_90a" if "sm90" in source else "sm_80")


def ceil(a: int, b: int) -> int:
    return -(-a // b)


# --- the patch embedding on Hopper -------------------------------------------------------------
def embed_on_hopper(
    kernels: dict[str, Any],
    dtype: torch.dtype,
    *,
    size: tuple[int, int] = (96, 64),
    B: int = 3,
    C: int = 1,
    patch: int = 32,
    D: int = 64,
    uint8: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches by the kernels, in float64, and by eager PyTorch in ``dtype``."""
    (H, W), device, first, spare = size, Device(), 1, 2
    N, K = (H // patch) * (W // patch), C * patch * patch
    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8)
    images = images if uint8 else torch.randn(B, C, H, W).to(dtype)
    weight = (torch.randn(D, C, patch, patch) * K**-0.5).to(dtype)
    bias, pos = torch.randn(D).to(dtype), torch.randn(N, D).to(dtype)
    std = 0.017 if uint8 else 1.0
    scale, shift = [std + 0.001 * c for c in range(C)], [-2.1 + 0.1 * c for c in range(C)]
    tokens = first + N + spare
    out = device.poison(B, tokens, D, dtype=dtype)
    args = arguments(
        cuda_host.PatchEmbed,
        images=device.put(images),
        weight=device.put(weight),
        bias=device.put(bias),
        pos=device.put(pos),
        out=out,
        **dict(zip(("stride_b", "stride_c", "stride_y", "stride_x"), images.stride(), strict=True)),
        B=B,
        C=C,
        H=H,
        W=W,
        p_h=patch,
        p_w=patch,
        D=D,
        tokens=tokens,
        first=first,
        uint8=uint8,
        normalize=True,
        scale=(cuda_host.single * 64)(*scale),
        shift=(cuda_host.single * 64)(*shift),
    )
    folded = device.poison(D, K, dtype=dtype)
    folded_bias = device.poison(D, dtype=torch.float32)
    name = MANGLED[dtype]
    prepare = ptx_model.find(kernels, f"prepare_kernelI{name}")
    device.launch(
        prepare, ceil(D, 4), threads=128, shared_bytes=0, arguments=[args, folded, folded_bias]
    )
    main = ptx_model.find(kernels, f"patch_embed_sm90_kernelI{name}{'h' if uint8 else 'S'}")
    device.launch(
        main,
        ceil(B * N, 128) * ceil(D, 128),
        threads=288,
        shared_bytes=4 * (128 * 64 * 2 + 16),
        arguments=[args, folded_bias, ptx_model.TensorMap(folded, D, K, 128)],
        seed=seed,
    )
    result = device.get(out, B, tokens, D, dtype=dtype)
    assert result[:, :first].isnan().all() and result[:, first + N :].isnan().all()
    pixels = reference.normalize(images, torch.float64, scale, shift)
    inputs = [weight.double(), bias.double(), pos.double()]
    patches = lambda x, w, b, p: torch.nn.functional.conv2d(x, w, b, patch).flatten(2).mT + p
    plain = patches(reference.normalize(images, dtype, scale, shift).double(), *inputs)
    return result[:, first : first + N], patches(pixels, *inputs), plain.to(dtype)


@pytest.fixture(scope="module")
def hopper_kernels():
    return ptx_model.compile_ptx(cuda_host.CUDA / "patch_embed_sm90.cu", "sm_90a")


def error_of(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="more-panels-than-stages"),
        pytest.param(
            {"size": (32, 32), "B": 2, "C": 3, "patch": 16, "D": 136}, id="two-blocks-of-columns"
        ),
    ],
)
def test_patch_embed_on_hopper(hopper_kernels, shape, uint8, dtype):
    got, expected, plain = embed_on_hopper(hopper_kernels, dtype, uint8=uint8, **shape)
    assert torch.isfinite(got).all()
    # as exact as eager PyTorch, which rounds the normalized pixels and not the folded weight
    assert error_of(got, expected) <= 1.15 * error_of(plain, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_order_of_warps_reuses_a_stage_too_soon(hopper_kernels, seed):
    got, expected, _ = embed_on_hopper(hopper_kernels, torch.bfloat16, seed=10 + seed)
    assert_matches("patches", got, expected)


HOPPER_BUGS = {
    "one warp releases a stage for its whole warpgroup": [
        ("barrier_init(empty + s, kThreads / 32 - 1)", "barrier_init(empty + s, 2)"),
        ("if (lane_id() == 0) barrier_arrive", "if (threadIdx.x % 128 == 0) barrier_arrive"),
    ],
    "centering is undone by the rounded weight": [
        ("128.0f * w * scale", "128.0f * to_float(from_float<T>(w * scale))")
    ],
    "the body is left out": [
        ("defined(PGN_FAST_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)", "0"),
        ("__trap();", ";"),
    ],
    "the body traps": [
        ("defined(PGN_FAST_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)", "0"),
    ],
    "products are not waited for": [("products_end();", ";")],
}


@pytest.mark.parametrize("bug", HOPPER_BUGS)
def test_seeded_bugs_of_the_hopper_kernel_are_seen(bug, tmp_path):
    kernels = only("patch_embed_sm90.cu", tmp_path, *HOPPER_BUGS[bug])
    with pytest.raises((AssertionError, ptx_model.Fault)):
        for seed in range(6):
            got, expected, plain = embed_on_hopper(kernels, torch.bfloat16, seed=seed)
            assert torch.isfinite(got).all()
            assert error_of(got, expected) <= 1.15 * error_of(plain, expected)


# --- the patch embedding on every other GPU ----------------------------------------------------
@pytest.fixture(scope="module")
def patch_kernels():
    return ptx_model.compile_ptx(cuda_host.CUDA / "prompted_patch_embed.cu", "sm_80")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, patch, D, uint8, channels_last",
    [
        pytest.param((28, 28), 14, 72, True, False, id="uint8"),
        pytest.param((16, 16), 8, 136, False, False, id="two-blocks-of-columns"),
        pytest.param((16, 8), 8, 40, True, True, id="channels-last"),
    ],
)
def test_patch_embed(patch_kernels, size, patch, D, uint8, channels_last, dtype):
    device, B, C, first, spare = Device(), 2, 3, 1, 2
    (H, W), K = size, C * patch * patch
    N = (H // patch) * (W // patch)
    tokens = first + N + spare
    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8)
    images = images if uint8 else torch.randn(B, C, H, W).to(dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(D, C, patch, patch) * K**-0.5).to(dtype)
    bias, pos = torch.randn(D).to(dtype), torch.randn(N, D).to(dtype)
    scale, shift = [0.017] * C, [-2.0] * C
    out = device.poison(B, tokens, D, dtype=dtype)
    args = arguments(
        cuda_host.PatchEmbed,
        images=device.put(images),
        weight=device.put(weight),
        bias=device.put(bias),
        pos=device.put(pos),
        out=out,
        **dict(zip(("stride_b", "stride_c", "stride_y", "stride_x"), images.stride(), strict=True)),
        B=B,
        C=C,
        H=H,
        W=W,
        p_h=patch,
        p_w=patch,
        D=D,
        tokens=tokens,
        first=first,
        uint8=uint8,
        normalize=True,
        scale=(cuda_host.single * 64)(*scale),
        shift=(cuda_host.single * 64)(*shift),
    )
    vectors = images.stride(3) == 1 and patch % 4 == 0
    kernel = ptx_model.find(
        patch_kernels, f"18patch_embed_kernelI{MANGLED[dtype]}{'h' if uint8 else 'S'}"
    )
    device.launch(
        kernel,
        ceil(B * N, 128) * ceil(D, 128),
        threads=256,
        shared_bytes=2 * 256 * 40 * 2,
        arguments=[args, int(vectors), int(K * 2 % 16 == 0)],
    )
    result = device.get(out, B, tokens, D, dtype=dtype)
    assert result[:, :first].isnan().all() and result[:, first + N :].isnan().all()
    pixels = reference.normalize(images, dtype, scale, shift).double()
    expected = torch.nn.functional.conv2d(pixels, weight.double(), bias.double(), patch)
    assert_matches("patches", result[:, first : first + N], expected.flatten(2).mT + pos.double())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_place_rows(patch_kernels, dtype):
    device, (B, count, D, tokens, first) = Device(), (2, 3, 40, 6, 2)
    rows, out = torch.randn(count, D).to(dtype), device.poison(B, tokens, D, dtype=dtype)
    values = {"rows": device.put(rows), "out": out, "B": B, "count": count, "D": D}
    args = arguments(cuda_host.PlaceRows, **values, tokens=tokens, first=first)
    kernel = ptx_model.find(patch_kernels, f"place_rows_kernelI{MANGLED.get(dtype, 'f')}E")
    device.launch(kernel, B * count, threads=256, shared_bytes=0, arguments=[args])
    result = device.get(out, B, tokens, D, dtype=dtype)
    assert torch.equal(result[:, first : first + count], rows.expand(B, -1, -1))
    assert result[:, :first].isnan().all() and result[:, first + count :].isnan().all()


# --- mix_prompts ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mix_kernels():
    return ptx_model.compile_ptx(cuda_host.CUDA / "mix_prompts.cu", "sm_80")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, P, K, D, softmax",
    [
        pytest.param(2, 9, 70, 136, True, id="two-blocks-of-columns"),
        pytest.param(1, 5, 33, 37, False, id="unaligned-rows"),
        pytest.param(1, 3, 530, 24, True, id="library-beyond-shared-memory"),
    ],
)
def test_mix_prompts(mix_kernels, B, P, K, D, softmax, dtype):
    device, R, first, splits = Device(), B * P, 1, 2
    tokens, activation = P + 3, "softmax" if softmax else "sigmoid"
    logits, library = (3 * torch.randn(B, P, K)).to(dtype), torch.randn(K, D).to(dtype)
    grad = torch.randn(B, P, D).to(dtype)
    aligned, kind = int(D * 2 % 16 == 0), f"{MANGLED[dtype]}Lb{int(softmax)}E"
    out = device.poison(B, tokens, D, dtype=dtype)
    at = {"logits": device.put(logits), "library": device.put(library)}
    forward = arguments(
        cuda_host.MixPrompts,
        **at,
        prompts=out + first * D * 2,
        **dict(zip("RKDP", (R, K, D, P), strict=True)),
        tokens=tokens,
        softmax=softmax,
    )
    device.launch(
        ptx_model.find(mix_kernels, f"mix_prompts_kernelI{kind}Li16E"),
        *(ceil(R, 16), ceil(D, 128)),
        threads=128,
        shared_bytes=(2 * 32 * 136 + 16 * 40) * 2 + 16 * 8,
        arguments=[forward, aligned],
    )
    grad_logits = device.poison(B, P, K, dtype=dtype)
    partial = device.poison(splits, K, D, dtype=torch.float32)
    backward = arguments(
        cuda_host.MixPromptsBackward,
        **at,
        grad_prompts=device.put(grad),
        grad_logits=grad_logits,
        grad_library=device.poison(K, D, dtype=dtype),
        statistics=device.poison(R, 2, dtype=torch.float32),
        partial=partial,
        R=R,
        rows_per_split=ceil(R, splits),
        K=K,
        D=D,
        splits=splits,
        softmax=softmax,
    )
    kept = ceil(K, 64) * 64 if K <= 512 else 64
    device.launch(
        ptx_model.find(mix_kernels, f"grad_logits_kernelI{kind}"),
        ceil(R, 16),
        threads=128,
        shared_bytes=80 * 72 * 2 + 128 + 16 * kept * 4,
        arguments=[backward, aligned],
    )
    device.launch(
        ptx_model.find(mix_kernels, f"grad_library_kernelI{kind}"),
        *(ceil(K, 64), ceil(D, 128), splits),
        threads=128,
        shared_bytes=32 * (136 + 72) * 2,
        arguments=[backward, aligned],
    )
    grad_library = device.poison(K, D, dtype=dtype)
    device.launch(
        ptx_model.find(mix_kernels, f"add_splits_kernelI{MANGLED[dtype]}E"),
        ceil(K * D, 256),
        threads=256,
        shared_bytes=0,
        arguments=[partial, grad_library, splits, K * D],
    )
    leaves = [x.double().requires_grad_() for x in (logits, library)]
    expected = reference.mix_prompts(*leaves, activation)
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())
    result = device.get(out, B, tokens, D, dtype=dtype)
    assert_matches("prompts", result[:, first : first + P], expected.detach())
    assert result[:, :first].isnan().all() and result[:, first + P :].isnan().all()
    grads = (
        device.get(grad_logits, B, P, K, dtype=dtype),
        device.get(grad_library, K, D, dtype=dtype),
    )
    for name, actual, wanted in zip(("logits", "library"), grads, expected_grads, strict=True):
        assert_matches(f"grad_{name}", actual, wanted)


# --- prompt_attention ----------------------------------------------------------------------------
ONE_WIDTH = [  # of the four: nvcc takes half a minute for all
    ("if (d <= 32) return function(std::integral_constant<int, 32>());\n", ""),
    ("if (d <= 96) return function(std::integral_constant<int, 96>());\n", ""),
    ("if (d <= 128) return function(std::integral_constant<int, 128>());\n", ""),
]


@pytest.fixture(scope="module")
def attention_kernels(tmp_path_factory):
    return attention_ptx(tmp_path_factory.mktemp("ptx"))


def attention_ptx(folder: Path, file: str | None = None, *bug: tuple[str, str]) -> dict[str, Any]:
    """The kernels of forward and backward, ``file`` of them with a seeded bug."""
    found: dict[str, Any] = {}
    for part in ("", "_grad_query", "_backward"):
        source = f"prompt_attention{part}.cu"
        found |= only(source, folder, *ONE_WIDTH, *(bug if source == file else ()))
    return found


def attention(
    kernels: dict[str, Any], dtype: torch.dtype, B: int, h: int, Q: int, T: int, P: int, d: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Forward and backward by the kernels, each result beside its float64 expectation."""
    device, warps = Device(), 1 if Q <= 16 else 4
    rows, stride, splits = warps * 16, 64 + 8, min(3, ceil(B * Q, 64))
    qkv, prompts = torch.randn(B, T, 3, h, d).to(dtype), torch.randn(P, 2, h, d).to(dtype)
    grad_out = torch.randn(B, Q, h, d).to(dtype)
    at, at_prompts = device.put(qkv), device.put(prompts)

    def heads(pointer: int, *strides: int) -> cuda_host.Heads:
        names = ("data", "batch", "head", "token")
        return arguments(cuda_host.Heads, **dict(zip(names, (pointer, *strides), strict=True)))

    dense = lambda n: heads(device.poison(B, n, h, d, dtype=dtype), n * h * d, d, h * d)
    packed = lambda i: heads(at + i * h * d * 2, T * 3 * h * d, d, 3 * h * d)
    shared = lambda i: heads(at_prompts + i * h * d * 2, 0, d, 2 * h * d)
    lse = device.poison(B, h, Q, dtype=torch.float32)
    forward = arguments(
        cuda_host.PromptAttention,
        q=packed(0),
        k=packed(1),
        v=packed(2),
        prompt_k=shared(0),
        prompt_v=shared(1),
        out=dense(Q),
        lse=lse,
        **dict(zip("BhQTPd", (B, h, Q, T, P, d), strict=True)),
        scale=d**-0.5,
    )
    aligned, of = int(d * 2 % 16 == 0), f"I{MANGLED[dtype]}Li64E"
    queries = {"threads": warps * 32, "arguments": [forward, aligned]}
    device.launch(
        ptx_model.find(kernels, f"16attention_kernel{of}Li{warps}ELb0E"),
        *(B * h, ceil(Q, rows)),
        **queries,
        shared_bytes=(rows + 128) * stride * 2,
    )
    partial = device.poison(2, splits, h, P, d, dtype=torch.float32)
    backward = arguments(
        cuda_host.PromptAttentionBackward,
        forward=forward,
        grad_out=heads(device.put(grad_out), Q * h * d, d, h * d),
        grad_q=dense(Q),
        grad_k=dense(T),
        grad_v=dense(T),
        grad_prompt_k=heads(at, 0, 0, 0),
        grad_prompt_v=heads(at, 0, 0, 0),
        delta=device.poison(B, h, Q, dtype=torch.float32),
        partial=partial,
        splits=splits,
        shared=True,
    )
    queries["arguments"] = [backward, aligned]
    device.launch(
        ptx_model.find(kernels, f"17grad_query_kernel{of}Li{warps}E"),
        *(B * h, ceil(Q, rows)),
        **queries,
        shared_bytes=2 * (rows + 64) * stride * 2 + rows * 4,
    )
    for of_prompts in (False, True):
        g, f = backward, forward
        own = (f.prompt_k, f.prompt_v, g.grad_prompt_k, g.grad_prompt_v)
        tensors = own if of_prompts else (f.k, f.v, g.grad_k, g.grad_v)
        count = P if of_prompts else T
        device.launch(
            ptx_model.find(kernels, f"16grad_keys_kernel{of}Lb{int(of_prompts)}E"),
            *((h, ceil(count, 64), splits) if of_prompts else (B * h, ceil(count, 64), 1)),
            threads=128,
            shared_bytes=4 * 64 * stride * 2 + 512,
            arguments=[backward, *tensors, count, aligned],
        )
    leaves = [x.double().requires_grad_() for x in (qkv, prompts)]
    q, k, v = leaves[0].permute(2, 0, 3, 1, 4)
    prompt_k, prompt_v = leaves[1].permute(1, 2, 0, 3)
    inputs = (q[:, :, :Q], k, v, prompt_k, prompt_v)
    out64, lse64 = reference.prompt_attention(*inputs, d**-0.5)
    grads64 = torch.autograd.grad(out64, inputs, grad_out.transpose(1, 2).double())
    result = lambda x, n: device.get(x.data, B, n, h, d, dtype=dtype).transpose(1, 2)
    shares = device.get(partial, 2, splits, h, P, d, dtype=torch.float32).sum(1)
    found = [
        *(result(forward.out, Q), device.get(lse, B, h, Q, dtype=torch.float32)),
        *(result(backward.grad_q, Q), result(backward.grad_k, T), result(backward.grad_v, T)),
        *shares.to(dtype),
    ]
    names = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_prompt_k", "grad_prompt_v")
    expected = [x.detach() for x in (out64, lse64, *grads64)]
    return {n: (x, y) for n, x, y in zip(names, found, expected, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, h, Q, T, P, d",
    [
        pytest.param(2, 1, 70, 70, 37, 64, id="two-tiles-of-tokens"),
        pytest.param(2, 1, 1, 20, 5, 64, id="class-token"),
        pytest.param(1, 2, 20, 33, 66, 36, id="unaligned-rows"),
    ],
)
def test_prompt_attention(attention_kernels, B, h, Q, T, P, d, dtype):
    results = attention(attention_kernels, dtype, B, h, Q, T, P, d)
    for name, (actual, expected) in results.items():
        if actual.dtype == torch.float32:  # of scores of 16-bit products, by the fast exponential
            torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)
        else:
            assert_matches(name, actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_prompt_attention(attention_kernels, dtype):
    """Images that see a range of the prompts' rows: two tiles, none, and a part of one."""
    device, (h, Q, T, P, d), ranges = Device(), (2, 20, 33, 90, 64), [[0, 70], [70, 70], [71, 76]]
    B, rows, stride = len(ranges), 64, 64 + 8
    q, k, v = torch.randn(3, B, h, max(Q, T), d).to(dtype).unbind(0)
    q, k, v = q[:, :, :Q].contiguous(), k[:, :, :T].contiguous(), v[:, :, :T].contiguous()
    prompts = torch.randn(2, h, P, d).to(dtype)
    prompts[:, :, 76:] = torch.nan  # nobody's

    def heads(pointer: int, n: int, batch: int) -> cuda_host.Heads:
        names = ("data", "batch", "head", "token")
        return arguments(
            cuda_host.Heads, **dict(zip(names, (pointer, batch, n * d, d), strict=True))
        )

    of_image = lambda x: heads(device.put(x), x.shape[2], h * x.shape[2] * d)
    out, lse = device.poison(B, h, Q, d, dtype=dtype), device.poison(B, h, Q, dtype=torch.float32)
    forward = arguments(
        cuda_host.PromptAttention,
        **{name: of_image(x) for name, x in (("q", q), ("k", k), ("v", v))},
        prompt_k=heads(device.put(prompts[0].contiguous()), P, 0),
        prompt_v=heads(device.put(prompts[1].contiguous()), P, 0),
        out=heads(out, Q, h * Q * d),
        lse=lse,
        **dict(zip("BhQTPd", (B, h, Q, T, P, d), strict=True)),
        scale=d**-0.5,
        ranges=device.put(torch.tensor(ranges)),
    )
    device.launch(
        ptx_model.find(attention_kernels, f"16attention_kernelI{MANGLED[dtype]}Li64ELi4ELb1E"),
        *(B * h, ceil(Q, rows)),
        threads=128,
        shared_bytes=(rows + 128) * stride * 2,
        arguments=[forward, 1],
    )
    inputs = [x.double() for x in (q, k, v, *prompts)]
    out64, lse64 = reference.prompt_attention_ragged(*inputs, torch.tensor(ranges), d**-0.5)
    assert_matches("out", device.get(out, B, h, Q, d, dtype=dtype), out64)
    found = device.get(lse, B, h, Q, dtype=torch.float32).double()
    torch.testing.assert_close(found, lse64, rtol=1e-3, atol=1e-3)


ATTENTION_BUGS = {
    "a wait for a background copy is left out": (
        "prompt_attention.cu",
        ("wait_copies<1>();", ";"),
    ),
    "the query of a row is not taken modulo": (
        "prompt_attention_backward.cu",
        ("kShared ? row - image * Q : row", "row"),
    ),
}


@pytest.mark.parametrize("bug", ATTENTION_BUGS)
def test_seeded_bugs_of_the_attention_kernels_are_seen(bug, tmp_path):
    kernels = attention_ptx(tmp_path, *ATTENTION_BUGS[bug])
    with pytest.raises((AssertionError, ptx_model.Fault)):
        for name, (actual, expected) in attention(
            kernels, torch.bfloat16, 2, 1, 70, 70, 37, 64
        ).items():
            if actual.dtype != torch.float32:
                assert_matches(name, actual, expected)
