"""The measurements of bench/gpu.py, each in a process of its own: gpu_steps.py STEP FILE."""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import Bench, backends, gradients, in_float64, without_gradients
from gpu_models import CASES, compiled_models, models
from torch import Tensor

# shares of the binding ceiling and rates that the design of the kernels assumed, never measured
ASSUMED_SHARES = {
    "gemm": 0.82,
    "gemm with gelu": 0.74,
    "attention forward": 0.36,
    "attention forward and backward": 0.30,
    "elementwise": 0.85,
}
ASSUMED_RATES = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}

# backbone: embedding width, heads, patch size, patches of a 224 x 224 image, prefix tokens
BACKBONES = {
    "B/32": (768, 12, 32, 49, 1),
    "B/16": (768, 12, 16, 196, 1),
    "L/14": (1024, 16, 14, 256, 1),
}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]  # of CLIP's images, about
SCALE = [1 / (255 * s) for s in STD]
SHIFT = [-m / s for m, s in zip(MEAN, STD, strict=True)]


def ceilings(bench: Bench) -> None:
    """What this machine can do at all: bytes a second in a copy, FLOP a second in a large GEMM."""
    size = 2**10 if bench.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times, _ = bench.milliseconds(lambda: target.copy_(source))
    ms, best = statistics.median(times), 0.0
    for n in (32,) if bench.tiny else (4096, 8192):
        a, b = bench.draw(n, n), bench.draw(n, n)
        times, _ = bench.milliseconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        best = max(best, 2 * n**3 / statistics.median(times) * 1e3)
    bench.save(bytes_per_second=2 * size / ms * 1e3, flops_per_second=best)


def gemm(bench: Bench) -> None:
    """The frozen blocks' products at the sizes of the benchmarks, by torch's own library."""
    sizes = {"B/16 64x197": (12608, 768), "B/32 128x66": (8448, 768), "L/14 64x257": (16448, 1024)}
    for name, (rows, D) in {"tiny": (8, 16)}.items() if bench.tiny else sizes.items():
        for what, k, n in (("qkv", D, 3 * D), ("proj", D, D), ("fc1", D, 4 * D), ("fc2", 4 * D, D)):
            inputs = [bench.draw(rows, k), bench.draw(n, k), bench.draw(n)]
            x, w, b = inputs
            wide = in_float64(inputs)
            cost = {"flops": 2 * rows * k * n, "bytes": x.itemsize * (rows * (k + n) + k * n)}
            group = f"gemm {what}, {name}"
            linear = lambda x=x, w=w, b=b: F.linear(x, w, b)
            truth = bench.truth(group, partial(F.linear, *wide))
            bench.record(group, "torch", linear, truth=truth, informs="gemm", **cost)
            if what == "fc1" and truth is not None:
                fused = lambda x=x, w=w, b=b: torch._addmm_activation(b, x, w.t(), use_gelu=True)
                # CUDA's epilogue is the tanh form, the CPU's the exact one
                kind = "none" if bench.tiny else "tanh"
                own, exact = ([F.gelu(truth[0], approximate=kind)], [F.gelu(truth[0])])
                informs = "gemm with gelu"
                bench.record(group, "gelu inside", fused, truth=own, informs=informs, **cost)
                apart = lambda x=x, w=w, b=b: F.gelu(F.linear(x, w, b))
                bench.record(group, "then gelu(erf)", apart, truth=exact, **cost)


def record_both(
    bench: Bench,
    group: str,
    calls: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    exact: Callable[..., Tensor],
    *,
    flops: float,
    bytes: float,
    backward_flops: float,
    informs: str | None = None,
) -> None:
    """Each call forward, and forward and backward, beside its error against ``exact``."""
    wide = in_float64(inputs)
    out = bench.truth(group, without_gradients(exact, wide))
    grads = bench.truth(group, gradients(exact, wide))
    for which, call in calls.items():
        forward, both = without_gradients(call, inputs), gradients(call, inputs)
        costs: dict[str, Any] = {"flops": flops, "bytes": bytes, "truth": out}
        part = "forward"
        bench.record(
            f"{group}, {part}", which, forward, informs=informs and f"{informs} {part}", **costs
        )
        costs = {"flops": backward_flops, "bytes": 3 * bytes, "truth": grads}
        part = "forward and backward"
        bench.record(
            f"{group}, {part}", which, both, informs=informs and f"{informs} {part}", **costs
        )


def mix_prompts(bench: Bench, compiled: bool = False) -> None:
    from pgn_fast import ops, reference

    cases = itertools.product(("B/16", "L/14"), (256, 4096), (64,) if compiled else (1, 64, 512))
    for name, K, B in [("B/16", 8, 2)] if bench.tiny else cases:
        P, D = 16, BACKBONES[name][0]
        inputs = [bench.draw(B, P, K, grad=True), bench.draw(K, D, grad=True)]
        traffic = inputs[0].itemsize * (B * P * (K + D) + K * D)
        calls: dict[str, Callable[..., Tensor]] = {"torch": reference.mix_prompts}
        for backend in backends(bench, "mix_prompts", *inputs):
            calls[backend] = lambda *x, b=backend: ops.mix_prompts(*x, backend=b)
        if compiled:
            calls = {"torch.compile": bench.compile(reference.mix_prompts)}
        flops = 2 * B * P * K * D
        record_both(
            *(bench, f"mix_prompts {name}, B={B}, K={K}", calls, inputs, reference.mix_prompts),
            flops=flops,
            bytes=traffic,
            backward_flops=3 * flops,
        )


def _plain_embed(*x: Any) -> Tensor:
    from pgn_fast import reference

    return reference.prompted_patch_embed(*x, None, SCALE, SHIFT, "softmax", "append")


def prompted_patch_embed(bench: Bench, compiled: bool = False) -> None:
    from pgn_fast import ops

    cases = itertools.product(("B/32", "B/16", "L/14"), (64,) if compiled else (1, 64, 512))
    for name, B in [("B/32", 1)] if bench.tiny else cases:
        inputs, cost = embed_inputs(bench, name, B)
        calls: dict[str, Callable[..., Tensor]] = {"torch": _plain_embed}
        for backend in backends(bench, "prompted_patch_embed", inputs[1], inputs[0]):
            calls[backend] = lambda *x, b=backend: ops.prompted_patch_embed(
                *x, mean=MEAN, std=STD, backend=b
            )
        if compiled:
            calls = {"torch.compile": bench.compile(_plain_embed)}
        group = f"prompted_patch_embed {name}, B={B}, uint8"
        truth = bench.truth(group, without_gradients(_plain_embed, in_float64(inputs)))
        for which, call in calls.items():
            bench.record(group, which, without_gradients(call, inputs), truth=truth, **cost)


def embed_inputs(bench: Bench, name: str, B: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs of the patch embedding with prompts at a backbone's sizes, and what it costs."""
    D, _, patch, N, S = BACKBONES[name]
    P, K, size = 16, 256, 224
    if bench.tiny:
        D, N, size = 16, 4, 2 * patch
    images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=bench.device)
    weight, bias = bench.draw(D, 3, patch, patch), bench.draw(D)
    rest = [bench.draw(N, D), bench.draw(S, D), bench.draw(B, P, K), bench.draw(K, D)]
    cost = {
        "flops": 2 * B * (N * 3 * patch**2 * D + P * K * D),
        "bytes": images.numel() + weight.itemsize * (weight.numel() + B * (S + N + P) * D),
    }
    return [images, weight, bias, *rest], cost


def prompt_attention(bench: Bench, compiled: bool = False) -> None:
    from pgn_fast import ops

    cases = [
        *itertools.product(("B/16", "B/32", "L/14"), (64,), (50, 200), (None,)),
        ("B/16", 64, 50, 1),
        ("B/16", 1, 50, None),
        ("B/16", 512, 50, None),
    ]
    if compiled:
        cases = [("B/32", 64, 50, None), ("B/16", 64, 50, None), ("L/14", 64, 50, None)]
    for name, B, P, queries in [("B/32", 1, 3, None)] if bench.tiny else cases:
        _, h, _, N, S = BACKBONES[name]
        T, d = N + S, 64
        if bench.tiny:
            h, T, d = 2, 5, 16
        qkv = bench.draw(B, T, 3, h, d, grad=True)
        prompts = bench.draw(2, h, P, d, grad=True)
        Q = queries or T
        fused = lambda qkv, prompts, attend, Q=Q: attend(
            qkv.permute(2, 0, 3, 1, 4)[0][:, :, :Q],
            *qkv.permute(2, 0, 3, 1, 4)[1:].unbind(0),
            *prompts.unbind(0),
        )
        attentions: dict[str, Callable[..., Tensor]] = {
            f"cat, {which}": beside_then(kernel)
            for which, kernel in sdpa_kernels(bench, compiled).items()
        }
        for backend in [] if compiled else backends(bench, "prompt_attention", qkv, prompts):
            attentions[backend] = lambda *x, b=backend: ops.prompt_attention(*x, backend=b)
        calls = {
            which: lambda qkv, prompts, f=fused, a=attention: f(qkv, prompts, a)
            for which, attention in attentions.items()
        }
        exact = beside_then(F.scaled_dot_product_attention)
        flops, size = 4 * B * h * Q * (T + P) * d, qkv.itemsize
        traffic = size * (B * h * d * (2 * Q + 2 * T) + 2 * h * P * d)
        record_both(
            *(bench, f"prompt_attention {name}, B={B}, P={P}, Q={Q}", calls, [qkv, prompts]),
            lambda qkv, prompts, f=fused, a=exact: f(qkv, prompts, a),
            flops=flops,
            bytes=traffic,
            backward_flops=3.5 * flops,
        )


def sdpa(bench: Bench, compiled: bool = False) -> None:
    """torch's attention kernels alone, at the sequence lengths of the backbones with prompts."""
    cases = [(64, 12, 247, 247), (64, 12, 197, 247), (128, 12, 66, 66), (64, 16, 257, 307)]
    for B, h, Q, T in [(1, 2, 5, 7)] if bench.tiny else cases:
        inputs = [bench.draw(B, n, h, 64).transpose(1, 2).requires_grad_() for n in (Q, T, T)]
        flops, traffic = 4 * B * h * Q * T * 64, 4 * B * h * 64 * (Q + T)
        record_both(
            *(bench, f"sdpa B={B}, h={h}, Q={Q}, T={T}", sdpa_kernels(bench, compiled), inputs),
            F.scaled_dot_product_attention,
            flops=flops,
            bytes=traffic,
            backward_flops=3.5 * flops,
            informs="attention",
        )


def beside_then(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Eager PyTorch's way: keys and values of the prompts copied beside those of every image."""

    def attention(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        k, v = (
            torch.cat([p.expand(len(x), -1, -1, -1), x], dim=2)
            for p, x in ((prompt_k, k), (prompt_v, v))
        )
        return attend(q, k, v)

    return attention


def sdpa_kernels(bench: Bench, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """torch's attention kernels, each by itself: the peer gets the best of them."""
    if bench.tiny:
        return {"sdpa": F.scaled_dot_product_attention}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    if compiled:
        return {"flex": bench.compile(flex_attention)}

    def only(backend: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    return {
        "flash": only(SDPBackend.FLASH_ATTENTION),
        "cudnn": only(SDPBackend.CUDNN_ATTENTION),
        "efficient": only(SDPBackend.EFFICIENT_ATTENTION),
    }


def other_ops(bench: Bench, compiled: bool = False) -> None:
    """Every op that has no measurement of its own above, by the first of its examples."""
    from pgn_fast.ops.dispatch import OPS
    from pgn_fast.ops.examples import Sizes, examples

    models = {"B/16": Sizes(B=64), "L/14": Sizes(B=64, D=1024, h=16, patch=14)}
    tiny = {"tiny": Sizes(B=2, D=16, h=2, patch=4, image=8, P=3, K=5)}
    known = {"mix_prompts", "prompted_patch_embed", "prompt_attention"}
    for op in [op for op, row in OPS.items() if row.timed and op not in known]:
        for name, sizes in (tiny if bench.tiny else models).items():
            example = examples(op, sizes, bench.dtype, bench.device)[0]
            calls: dict[str, Callable[..., Any]] = {"torch": _last(example.eager())}
            for backend in backends(bench, op, *example.tensors):
                calls[backend] = _last(example.call(backend))
            if compiled:
                calls = {"torch.compile": bench.compile(calls["torch"])}
            read = sum(x.numel() * x.itemsize for x in example.tensors)
            record_both(
                *(bench, f"{op} {name}, B={sizes.B}", calls, example.tensors),
                _last(example.eager()),
                flops=0.0,
                bytes=2 * read,  # it writes about as much as it reads
                backward_flops=0.0,
            )


def _last(call: Callable[..., Any]) -> Callable[..., Tensor]:
    """The last of a call's outputs, where it has several."""

    def run(*tensors: Tensor) -> Tensor:
        outputs = call(*tensors)
        return outputs[-1] if isinstance(outputs, tuple) else outputs

    return run


# every compiled peer has a process of its own: Dynamo's and Inductor's state, and a compiler that
# hangs or dies, cost no other measurement
_COMPILED: list[Callable[[Bench], None]] = [
    *(partial(compiled_models, index=i) for i in range(2 * len(CASES))),
    partial(prompt_attention, compiled=True),
    partial(prompted_patch_embed, compiled=True),
    partial(other_ops, compiled=True),
    partial(mix_prompts, compiled=True),
    partial(sdpa, compiled=True),
]


def full_size(bench: Bench) -> None:
    """Every kernel once at a backbone's own sizes, several tiles along every loop, Hopper's copies
    of whole tiles included; timed as well, since the call is there."""
    from pgn_fast import ops

    for name in ("B/32",) if bench.tiny else ("B/16", "B/32", "L/14"):
        inputs, cost = embed_inputs(bench, name, 4)
        group = f"full size: prompted_patch_embed {name}"
        truth = bench.truth(group, without_gradients(_plain_embed, in_float64(inputs)))
        for backend in backends(bench, "prompted_patch_embed", inputs[1], inputs[0]):
            call = lambda *x, b=backend: ops.prompted_patch_embed(*x, mean=MEAN, std=STD, backend=b)
            bench.record(group, backend, without_gradients(call, inputs), truth=truth, **cost)
            # pixels that no copy of whole rows can take
            sliced = [torch.stack([inputs[0]] * 2, dim=-1)[..., 0], *inputs[1:]]
            call_sliced = without_gradients(call, sliced)
            bench.record(f"{group}, sliced", backend, call_sliced, truth=truth, **cost)


def small(bench: Bench) -> None:
    """Small problems through every kernel of this machine, for compute-sanitizer to watch."""
    import triton_cases

    from pgn_fast.ops.devices import stem
    from pgn_fast.ops.dispatch import OPS, has_kernel
    from pgn_fast.ops.examples import Sizes, examples

    for op in sorted({stem(op) for op in OPS if has_kernel("triton", op)}):
        module = importlib.import_module(f"pgn_fast.kernels.{op}")
        triton_cases.check(op, module, bench.device, bench.dtype)
    own = "cpu" if bench.tiny else "cuda"  # the compiled kernels of this machine
    several_tiles = Sizes(B=3, D=192, h=3, patch=6, image=48, P=37, K=70)
    # sizes that Hopper's own kernel takes: whole panels, two blocks of columns, several tiles
    panels = Sizes(B=4, D=136, h=2, patch=16, image=96, P=7, K=70)
    for op, sizes in itertools.product(OPS, (several_tiles, panels)):
        for example in examples(op, sizes, bench.dtype, bench.device):
            if own not in backends(bench, op, *example.tensors):
                continue
            call = _last(example.call(own))
            if any(x.requires_grad for x in example.tensors):
                gradients(call, example.tensors)()
            else:
                without_gradients(call, example.tensors)()


def autotune(bench: Bench) -> None:
    """What ``pgn-fast autotune`` says of this device; kept in the report alone."""
    from pgn_fast.autotune import autotune
    from pgn_fast.ops.examples import Sizes

    sizes = Sizes(B=2, D=16, h=2, patch=4, image=8, P=3, K=5) if bench.tiny else Sizes(B=64)
    minutes = 0.02 if bench.tiny else 0.6
    found = autotune(torch.device(bench.device.type), sizes=sizes, minutes=minutes)
    bench.save(autotune=found)


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    f.__name__: f
    for f in (
        ceilings,
        gemm,
        mix_prompts,
        prompted_patch_embed,
        prompt_attention,
        sdpa,
        other_ops,
        models,
        full_size,
        small,
        autotune,
    )
} | {f"compiled-{i}": call for i, call in enumerate(_COMPILED)}
COMPILED = [name for name in MEASUREMENTS if name.startswith("compiled-")]


def measure(name: str, path: Path, tiny: bool = False, waits: bool = False) -> None:
    """Run one measurement; its results are in ``path``, as far as it came. See ``Bench``."""
    torch.manual_seed(0)
    bench = Bench(path, tiny, waits)
    MEASUREMENTS[name](bench)
    bench.take_turn()
    bench.save()


if __name__ == "__main__":
    flags = sys.argv[3:]
    measure(sys.argv[1], Path(sys.argv[2]), "--tiny" in flags, "--waits" in flags)
