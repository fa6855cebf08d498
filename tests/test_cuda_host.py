"""The CUDA kernels' own source, run on the host with a fiber for each thread (tests/cuda_host).

What is proved here: indexing, masks, fragment layouts, barriers and waits for background copies.
What is not: anything about a GPU's speed, its memory order, or code that only nvcc generates.
"""

from __future__ import annotations

import subprocess

import cuda_host
import pytest
import torch
from cuda_host import intact, poisoned
from numerics import assert_matches, leaves64

from pgn_fast import reference

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    return cuda_host.build()


def test_the_structs_here_are_those_of_the_header(tmp_path):
    """A field that moved in launch.h would otherwise be read from another one's place."""
    source = tmp_path / "layout.cpp"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof"]
    command += [f"-I{cuda_host.CUDA}", f"-isystem{cuda_host.cuda_include()}", str(source)]
    text = cuda_host.layout_assertions()
    for fields, holds in ((text, True), (text.replace(", tokens) ==", ", tokens) - 4 =="), False)):
        source.write_text(fields)
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == holds, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "R, K, D, splits",
    [
        pytest.param(16, 64, 128, 1, id="whole-tiles"),
        pytest.param(37, 33, 136, 2, id="nothing-divides-a-block"),
        pytest.param(5, 70, 19, 1, id="unaligned-rows"),
        pytest.param(1, 1, 1, 1, id="smallest"),
        pytest.param(3, 600, 16, 3, id="library-beyond-shared-memory"),
    ],
)
def test_mix_prompts(kernels, R, K, D, splits, activation, dtype):
    logits, library = torch.randn(1, R, K, dtype=dtype), torch.randn(K, D, dtype=dtype)
    grad_prompts = torch.randn(1, R, D, dtype=dtype)
    prompts, grad_logits = poisoned(R, D, dtype=dtype), poisoned(R, K, dtype=dtype)
    grad_library = poisoned(K, D, dtype=dtype)
    softmax = activation == "softmax"

    forward = cuda_host.MixPrompts(
        logits=logits,
        library=library,
        prompts=prompts,
        R=R,
        K=K,
        D=D,
        P=R,
        tokens=R,
        softmax=softmax,
    )
    kernels.launch("mix_prompts", forward, dtype)
    backward = cuda_host.MixPromptsBackward(
        grad_prompts=grad_prompts,
        logits=logits,
        library=library,
        grad_logits=grad_logits,
        grad_library=grad_library,
        statistics=torch.full((R, 2), torch.nan),
        partial=torch.full((splits, K, D), torch.nan),
        R=R,
        rows_per_split=-(-R // splits),
        K=K,
        D=D,
        splits=splits,
        softmax=softmax,
    )
    kernels.launch("mix_prompts_backward", backward, dtype)

    logits64, library64 = leaves64(logits, library)
    prompts64 = reference.mix_prompts(logits64, library64, activation)
    grads64 = torch.autograd.grad(prompts64, (logits64, library64), grad_prompts.double())
    assert_matches("prompts", prompts, prompts64[0].detach())
    assert_matches("grad_logits", grad_logits, grads64[0][0])
    assert_matches("grad_library", grad_library, grads64[1])
    assert intact(prompts) and intact(grad_logits) and intact(grad_library)


def test_mix_prompts_with_many_rows(kernels):
    """From 4096 rows on a block makes 64 of them."""
    logits, library = torch.randn(1, 4099, 8), torch.randn(8, 12)
    prompts = poisoned(4099, 12, dtype=torch.float32)
    args = cuda_host.MixPrompts(
        logits=logits,
        library=library,
        prompts=prompts,
        R=4099,
        K=8,
        D=12,
        P=1,
        tokens=1,
        softmax=True,
    )
    kernels.launch("mix_prompts", args, torch.float32)
    expected = reference.mix_prompts(logits.double(), library.double())[0]
    assert_matches("prompts", prompts, expected)
    assert intact(prompts)


def mixed(kernels, logits, library, seed=0):
    """Prompts (R, D) of one image by the host-run kernel."""
    (_, R, K), D = logits.shape, library.shape[1]
    prompts = poisoned(R, D, dtype=logits.dtype)
    args = cuda_host.MixPrompts(
        logits=logits, library=library, prompts=prompts, R=R, K=K, D=D, P=R, tokens=R, softmax=True
    )
    kernels.launch("mix_prompts", args, logits.dtype, seed)
    assert intact(prompts)
    return prompts


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(kernels, seed):
    logits, library = torch.randn(1, 33, 65).half(), torch.randn(65, 40).half()
    expected = mixed(kernels, logits, library)
    assert torch.equal(mixed(kernels, logits, library, seed), expected)


@pytest.mark.parametrize(
    "right, wrong",
    [
        pytest.param("if (r < rows && d < a.D)", "if (r <= rows && d < a.D)", id="a-mask-too-wide"),
        pytest.param(
            "__syncthreads();  // the tiles of the step before are read, and the statistics",
            ";  // ",
            id="a-barrier-left-out",
        ),
        pytest.param("wait_copies<1>();", ";", id="a-wait-left-out"),
        pytest.param("library + k * a.D, a.D", "library + k * a.D, a.K", id="a-stride-swapped"),
    ],
)
def test_seeded_bugs_are_seen(right, wrong, tmp_path):
    """The harness is worth something only if it turns red where a kernel is wrong."""
    for file in cuda_host.CUDA.iterdir():
        if file.suffix in (".cu", ".cuh", ".h"):
            (tmp_path / file.name).write_text(file.read_text())
    source = (tmp_path / "mix_prompts.cu").read_text()
    assert right in source, "the seeded bug's line has changed: write the bug again"
    (tmp_path / "mix_prompts.cu").write_text(source.replace(right, wrong, 1))
    broken = cuda_host.build(tmp_path, only="mix_prompts")
    logits, library = torch.randn(1, 33, 65).half(), torch.randn(65, 40).half()
    expected = reference.mix_prompts(logits.double(), library.double())[0]
    with pytest.raises(AssertionError):
        for seed in range(4):
            assert_matches("prompts", mixed(broken, logits, library, seed), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize(
    "B, h, Q, T, P, d",
    [
        pytest.param(2, 2, 70, 70, 10, 64, id="two-tiles-of-tokens"),
        pytest.param(3, 1, 19, 33, 65, 40, id="nothing-divides-a-block"),
        pytest.param(2, 2, 1, 20, 5, 32, id="class-token"),
        pytest.param(1, 1, 17, 3, 2, 9, id="unaligned-rows"),
        pytest.param(2, 1, 5, 4, 0, 128, id="no-prompts"),
        pytest.param(1, 1, 1, 1, 1, 1, id="smallest"),
    ],
)
def test_prompt_attention(kernels, B, h, Q, T, P, d, shared, dtype):
    q, k, v = (torch.randn(B, n, h, d, dtype=dtype).transpose(1, 2) for n in (Q, T, T))
    shape = (h, P, d) if shared else (B, h, P, d)
    prompt_k, prompt_v = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    grad_out = torch.randn(B, Q, h, d, dtype=dtype).transpose(1, 2)
    inputs, scale, splits = (q, k, v, prompt_k, prompt_v), d**-0.5, min(3, B * Q)
    out = poisoned(B, Q, h, d, dtype=dtype)
    lse = poisoned(B, h, Q, dtype=torch.float32)
    names = ("q", "k", "v", "prompt_k", "prompt_v")
    forward = cuda_host.PromptAttention(
        **{name: cuda_host.Heads(x) for name, x in zip(names, inputs, strict=True)},
        out=cuda_host.Heads(out.transpose(1, 2)),
        lse=lse,
        B=B,
        h=h,
        Q=Q,
        T=T,
        P=P,
        d=d,
        scale=scale,
    )
    kernels.launch("prompt_attention", forward, dtype)
    grads = [poisoned(*x.shape, dtype=dtype) for x in inputs]
    backward = cuda_host.PromptAttentionBackward(
        forward=forward,
        grad_out=cuda_host.Heads(grad_out),
        **{f"grad_{name}": cuda_host.Heads(x) for name, x in zip(names, grads, strict=True)},
        delta=torch.full((B, h, Q), torch.nan),
        partial=torch.full((2, splits, h, P, d), torch.nan),
        splits=splits,
        shared=shared,
    )
    kernels.launch("prompt_attention_backward", backward, dtype)

    inputs64 = leaves64(*inputs)
    out64, lse64 = reference.prompt_attention(*inputs64, scale)
    grads64 = torch.autograd.grad(out64, inputs64, grad_out.double())
    assert_matches("out", out.transpose(1, 2), out64.detach())
    assert_matches("lse", lse, lse64.detach())
    for name, grad, grad64 in zip(names, grads, grads64, strict=True):
        assert_matches(f"grad_{name}", grad, grad64)
    assert all(map(intact, (out, lse, *grads)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "h, Q, T, d, ranges",
    [
        pytest.param(2, 19, 33, 64, [[0, 70], [70, 70], [65, 75], [3, 4]], id="odd-and-empty"),
        pytest.param(1, 1, 20, 40, [[9, 9], [2, 9], [2, 9]], id="class-token"),
        pytest.param(1, 17, 3, 9, [[0, 0], [1, 2]], id="unaligned-rows"),
    ],
)
def test_ragged_prompt_attention(kernels, h, Q, T, d, ranges, dtype):
    """Rows that no image sees hold NaN: they must not show."""
    B, P = len(ranges), 80
    q, k, v = (torch.randn(B, n, h, d, dtype=dtype).transpose(1, 2) for n in (Q, T, T))
    prompts = torch.randn(2, h, P, d, dtype=dtype)
    seen = {row for begin, end in ranges for row in range(begin, end)}
    prompts[:, :, [row for row in range(P) if row not in seen]] = torch.nan
    inputs, chosen = (q, k, v, *prompts), torch.tensor(ranges)
    out, lse = poisoned(B, Q, h, d, dtype=dtype), poisoned(B, h, Q, dtype=torch.float32)
    names = ("q", "k", "v", "prompt_k", "prompt_v")
    forward = cuda_host.PromptAttention(
        **{name: cuda_host.Heads(x) for name, x in zip(names, inputs, strict=True)},
        out=cuda_host.Heads(out.transpose(1, 2)),
        lse=lse,
        **dict(zip("BhQTPd", (B, h, Q, T, P, d), strict=True)),
        scale=d**-0.5,
        ranges=chosen,
    )
    kernels.launch("prompt_attention", forward, dtype)
    inputs64 = [x.double() for x in inputs]
    out64, lse64 = reference.prompt_attention_ragged(*inputs64, chosen, d**-0.5)
    assert_matches("out", out.transpose(1, 2), out64)
    assert_matches("lse", lse, lse64)
    assert intact(out) and intact(lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "B, C, size, patch, D, bare",
    [
        pytest.param(3, 3, (32, 48), (16, 16), 136, False, id="two-tiles-of-columns"),
        pytest.param(2, 3, (28, 14), (14, 14), 19, False, id="unaligned-patches"),
        pytest.param(1, 1, (2, 3), (1, 3), 1, True, id="smallest"),
    ],
)
def test_prompted_patch_embed(kernels, B, C, size, patch, D, bare, channels_last, uint8, dtype):
    H, W = size
    N, S, P, K = (H // patch[0]) * (W // patch[1]), 2, 3, 5
    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8)
    images = images if uint8 else torch.randn(B, C, H, W, dtype=dtype)
    images = images.contiguous(
        memory_format=[torch.contiguous_format, torch.channels_last][channels_last]
    )
    weight, prefix = torch.randn(D, C, *patch, dtype=dtype), torch.randn(S, D, dtype=dtype)
    bias, pos = (
        (None, None) if bare else (torch.randn(D, dtype=dtype), torch.randn(N, D, dtype=dtype))
    )
    logits, library = torch.randn(B, P, K, dtype=dtype), torch.randn(K, D, dtype=dtype)
    scale = [0.01 * (c + 1) for c in range(C)] if uint8 else []
    shift = [0.1 * c - 1 for c in range(C)] if uint8 else []
    tokens = S + N + P
    out = poisoned(B, tokens, D, dtype=dtype)

    strides = dict(
        zip(("stride_b", "stride_c", "stride_y", "stride_x"), images.stride(), strict=True)
    )
    factors = [(cuda_host.single * 64)(*x) for x in (scale, shift)]
    embed = cuda_host.PatchEmbed(
        **{"images": images, "weight": weight, "bias": bias, "pos": pos, "out": out, **strides},
        B=B,
        C=C,
        H=H,
        W=W,
        p_h=patch[0],
        p_w=patch[1],
        D=D,
        tokens=tokens,
        first=S,
        uint8=uint8,
        normalize=bool(scale),
        scale=factors[0],
        shift=factors[1],
    )
    kernels.launch("patch_embed", embed, dtype)
    place = cuda_host.PlaceRows(
        rows=prefix, out=out, batch_stride=0, B=B, count=S, D=D, tokens=tokens, first=0
    )
    kernels.launch("place_rows", place, dtype)
    rows = out.view(-1, D)[S + N :]
    mix = cuda_host.MixPrompts(
        logits=logits,
        library=library,
        prompts=rows,
        R=B * P,
        K=K,
        D=D,
        P=P,
        tokens=tokens,
        softmax=True,
    )
    kernels.launch("mix_prompts", mix, dtype)

    inputs = [x if x is None else x.double() for x in (weight, bias, pos, prefix, logits, library)]
    # the pixel is rounded to the operand type once, as in the reference
    pixels = reference.normalize(images, dtype, scale, shift).double()
    expected = reference.prompted_patch_embed(pixels, *inputs, None, [], [], "softmax", "append")
    assert_matches("tokens", out, expected)
    assert intact(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize(
    "B, C, size, patch, D, bare",
    [
        pytest.param(2, 3, (32, 48), 16, 136, False, id="two-blocks-of-columns"),
        pytest.param(3, 1, (96, 256), 32, 24, False, id="more-panels-than-stages"),
        pytest.param(1, 4, (16, 16), 16, 8, True, id="smallest"),
    ],
)
def test_patch_embed_on_hopper(kernels, B, C, size, patch, D, bare, uint8, dtype):
    (H, W), first, spare = size, 2, 3
    N = (H // patch) * (W // patch)
    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8)
    images = images if uint8 else torch.randn(B, C, H, W).to(dtype)
    weight = torch.randn(D, C, patch, patch).to(dtype)
    bias, pos = (None, None) if bare else (torch.randn(D).to(dtype), torch.randn(N, D).to(dtype))
    scale, shift = [0.01 * (c + 1) for c in range(C)], [0.1 * c - 1 for c in range(C)]
    tokens = first + N + spare
    out = poisoned(B, tokens, D, dtype=dtype)
    args = cuda_host.PatchEmbed(
        images=images,
        weight=weight,
        bias=bias,
        pos=pos,
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
    kernels.launch_with_scratch("patch_embed_sm90", args, dtype)

    # the weight is rounded once after the normalization is folded in; pixels are exact
    factors = torch.tensor([scale, shift], dtype=torch.float64)[:, None, :, None, None]
    folded = (weight.float() * factors[0].float()).to(dtype).double()
    expected = torch.nn.functional.conv2d(images.double(), folded, stride=patch)
    expected = expected.flatten(2).mT + (weight.double() * factors[1]).sum((1, 2, 3))
    if not bare:
        expected = expected + bias.double() + pos.double()
    assert_matches("patches", out[:, first : first + N], expected)
    assert out[:, :first].isnan().all() and out[:, first + N :].isnan().all() and intact(out)
