"""The measurements of bench/gpu.py, each in a process of its own: gpu_steps.py STEP FILE.

Times are those of a CUDA graph with one call in it, so that a call's launch overhead on the host is
not mistaken for the kernel's work; before every sample the L2 cache is overwritten.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


class Bench:
    """Collects figures, and has them on disk at any time."""

    def __init__(self, path: Path, tiny: bool) -> None:
        self.path, self.tiny = path, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.report: dict[str, Any] = {"figures": []}

    def draw(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=grad)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.tiny else torch.compile(function, dynamic=False)

    def save(self, **facts: Any) -> None:
        self.report.update(facts)
        self.path.write_text(json.dumps(self.report))

    def record(
        self,
        group: str,
        name: str,
        call: Callable[[], Any],
        *,
        flops: float = 0.0,
        bytes: float = 0.0,
        informs: str | None = None,
    ) -> None:
        """Time one call. One that cannot run leaves its error in the report, and no figure."""
        try:
            ms, graph = self.milliseconds(call)
        except Exception as error:
            errors = [*self.report.get("errors", []), f"{group}, {name}: {str(error)[:300]}"]
            return self.save(errors=errors)
        self.report["figures"].append(
            {
                "group": group,
                "name": name,
                "ms": ms,
                "flops": flops,
                "bytes": bytes,
                "cuda_graph": graph,
                "informs": informs,
            }
        )
        self.save()

    def milliseconds(self, call: Callable[[], Any], samples: int = 25) -> tuple[float, bool]:
        """Median time of a call, and whether it could be captured in a CUDA graph."""
        if self.tiny:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3, False
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
            run = graph.replay
        except Exception:  # a call that cannot be captured is timed with its launches
            torch.cuda.synchronize()
            graph, run = None, call
        flush = torch.empty(2**28, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(samples):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[samples // 2], graph is not None


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """A call forward and backward, for all inputs that want a gradient."""
    wanted = [x for x in inputs if x.requires_grad]

    def both() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    return both


def without_gradients(call: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return call(*inputs)

    return forward


def ceilings(bench: Bench) -> None:
    """What this machine can do at all: bytes a second in a copy, FLOP a second in a large GEMM."""
    size = 2**10 if bench.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms, _ = bench.milliseconds(lambda: target.copy_(source))
    best = 0.0
    for n in (32,) if bench.tiny else (4096, 8192):
        a, b = bench.draw(n, n), bench.draw(n, n)
        gemm_ms, _ = bench.milliseconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        best = max(best, 2 * n**3 / gemm_ms * 1e3)
    bench.save(bytes_per_second=2 * size / ms * 1e3, flops_per_second=best)


def gemm(bench: Bench) -> None:
    """The frozen blocks' products at the sizes of the benchmarks, by torch's own library."""
    sizes = {"B/16 64x197": (12608, 768), "B/32 128x66": (8448, 768), "L/14 64x257": (16448, 1024)}
    for name, (rows, D) in {"tiny": (8, 16)}.items() if bench.tiny else sizes.items():
        for what, k, n in (("qkv", D, 3 * D), ("proj", D, D), ("fc1", D, 4 * D), ("fc2", 4 * D, D)):
            x, w, b = bench.draw(rows, k), bench.draw(n, k), bench.draw(n)
            cost = {"flops": 2 * rows * k * n, "bytes": x.itemsize * (rows * (k + n) + k * n)}
            group = f"gemm {what}, {name}"
            linear = lambda x=x, w=w, b=b: F.linear(x, w, b)
            bench.record(group, "torch", linear, informs="gemm", **cost)
            if what == "fc1":
                fused = lambda x=x, w=w, b=b: torch._addmm_activation(b, x, w.t(), use_gelu=True)
                bench.record(group, "gelu(tanh) inside", fused, informs="gemm with gelu", **cost)
                apart = lambda x=x, w=w, b=b: F.gelu(F.linear(x, w, b))
                bench.record(group, "then gelu(erf)", apart, **cost)


def mix_prompts(bench: Bench) -> None:
    from pgn_fast import ops, reference

    cases = itertools.product(("B/16", "L/14"), (256, 4096), (1, 64, 512))
    for name, K, B in [("B/16", 8, 2)] if bench.tiny else cases:
        P, D = 16, BACKBONES[name][0]
        inputs = [bench.draw(B, P, K, grad=True), bench.draw(K, D, grad=True)]
        traffic = inputs[0].itemsize * (B * P * (K + D) + K * D)
        calls = {"torch": reference.mix_prompts}
        if B == 64:
            calls["torch.compile"] = bench.compile(reference.mix_prompts)
        for backend in backends(bench, "mix_prompts", *inputs):
            calls[backend] = lambda *x, b=backend: ops.mix_prompts(*x, backend=b)
        group = f"mix_prompts {name}, B={B}, K={K}"
        for which, call in calls.items():
            flops = 2 * B * P * K * D
            forward = without_gradients(call, inputs)
            bench.record(f"{group}, forward", which, forward, flops=flops, bytes=traffic)
            both = gradients(call, inputs)
            costs = {"flops": 3 * flops, "bytes": 3 * traffic}
            bench.record(f"{group}, forward and backward", which, both, **costs)


def backends(bench: Bench, op: str, *tensors: Tensor, **sizes: int) -> list[str]:
    """The kernels of ``op`` that this machine runs; in a rehearsal all but the interpreted."""
    from pgn_fast.ops.dispatch import BACKENDS, refusal

    skipped = ("reference", "triton") if bench.tiny else ("reference",)
    return [
        b for b in BACKENDS if b not in skipped and refusal(b, op, *tensors, sizes=sizes) is None
    ]


def prompted_patch_embed(bench: Bench) -> None:
    from pgn_fast import ops, reference

    scale = [1 / (255 * s) for s in STD]
    shift = [-m / s for m, s in zip(MEAN, STD, strict=True)]
    plain = lambda *x: reference.prompted_patch_embed(*x, None, scale, shift, "softmax", "append")
    cases = itertools.product(("B/32", "B/16", "L/14"), (1, 64, 512))
    for name, B in [("B/32", 1)] if bench.tiny else cases:
        D, _, patch, N, S = BACKBONES[name]
        P, K, size = 16, 256, 224
        if bench.tiny:
            D, N, size = 16, 4, 2 * patch
        images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=bench.device)
        weight, bias = bench.draw(D, 3, patch, patch), bench.draw(D)
        rest = [bench.draw(N, D), bench.draw(S, D), bench.draw(B, P, K), bench.draw(K, D)]
        inputs = [images, weight, bias, *rest]
        calls = {"torch": plain}
        if B == 64:
            calls["torch.compile"] = bench.compile(plain)
        for backend in backends(bench, "prompted_patch_embed", weight, images):
            calls[backend] = lambda *x, b=backend: ops.prompted_patch_embed(
                *x, mean=MEAN, std=STD, backend=b
            )
        cost = {
            "flops": 2 * B * (N * 3 * patch**2 * D + P * K * D),
            "bytes": images.numel() + weight.itemsize * (weight.numel() + B * (S + N + P) * D),
        }
        for which, call in calls.items():
            forward = without_gradients(call, inputs)
            bench.record(f"prompted_patch_embed {name}, B={B}, uint8", which, forward, **cost)


def prompt_attention(bench: Bench) -> None:
    from pgn_fast import ops

    cases = [
        *itertools.product(("B/32", "B/16", "L/14"), (64,), (50, 200), (None, 1)),
        ("B/16", 1, 50, None),
        ("B/16", 512, 50, None),
    ]
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
            f"cat, {which}": beside_then(kernel) for which, kernel in sdpa_kernels(bench).items()
        }
        for backend in backends(bench, "prompt_attention", qkv, prompts):
            attentions[backend] = lambda *x, b=backend: ops.prompt_attention(*x, backend=b)
        flops, size = 4 * B * h * Q * (T + P) * d, qkv.itemsize
        traffic = size * (B * h * d * (2 * Q + 2 * T) + 2 * h * P * d)
        group = f"prompt_attention {name}, B={B}, P={P}, Q={Q}"
        for which, attention in attentions.items():
            call = lambda qkv, prompts, f=fused, a=attention: f(qkv, prompts, a)
            forward = without_gradients(call, [qkv, prompts])
            bench.record(f"{group}, forward", which, forward, flops=flops, bytes=traffic)
            both = gradients(call, [qkv, prompts])
            costs = {"flops": 3.5 * flops, "bytes": 3 * traffic}
            bench.record(f"{group}, forward and backward", which, both, **costs)


def sdpa(bench: Bench) -> None:
    """torch's attention kernels alone, at the sequence lengths of the backbones with prompts."""
    cases = [(64, 12, 247, 247), (64, 12, 197, 247), (128, 12, 66, 66), (64, 16, 257, 307)]
    for B, h, Q, T in [(1, 2, 5, 7)] if bench.tiny else cases:
        inputs = [bench.draw(B, n, h, 64).transpose(1, 2).requires_grad_() for n in (Q, T, T)]
        flops, traffic = 4 * B * h * Q * T * 64, 4 * B * h * 64 * (Q + T)
        for which, attend in sdpa_kernels(bench).items():
            group = f"sdpa B={B}, h={h}, Q={Q}, T={T}"
            forward = without_gradients(attend, inputs)
            costs = {"flops": flops, "bytes": traffic}
            bench.record(f"{group}, forward", which, forward, informs="attention forward", **costs)
            both, name = gradients(attend, inputs), "forward and backward"
            costs = {"flops": 3.5 * flops, "bytes": 3 * traffic}
            bench.record(f"{group}, {name}", which, both, informs=f"attention {name}", **costs)


def beside_then(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Plain torch's way: keys and values of the prompts copied beside those of every image."""

    def attention(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        k, v = (
            torch.cat([p.expand(len(x), -1, -1, -1), x], dim=2)
            for p, x in ((prompt_k, k), (prompt_v, v))
        )
        return attend(q, k, v)

    return attention


def sdpa_kernels(bench: Bench) -> dict[str, Callable[..., Tensor]]:
    """torch's attention kernels, each by itself: the peer gets the best of them."""
    if bench.tiny:
        return {"sdpa": F.scaled_dot_product_attention}
    torch.compiler.reset()  # each case compiles for its own shape
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    def only(backend: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    return {
        "flash": only(SDPBackend.FLASH_ATTENTION),
        "cudnn": only(SDPBackend.CUDNN_ATTENTION),
        "efficient": only(SDPBackend.EFFICIENT_ATTENTION),
        "flex": bench.compile(flex_attention),
    }


def add_layer_norm(bench: Bench) -> None:
    if bench.tiny:  # no launcher without a GPU but the interpreter's, which tests run
        return
    from pgn_fast.kernels import add_layer_norm as kernels

    for name, (B, T, D) in {"B/16": (64, 197, 768), "L/14": (64, 257, 1024)}.items():
        x, y, g = bench.draw(B, T, D), bench.draw(B, T, D), bench.draw(B, T, D)

        def plain(x: Tensor, y: Tensor, D: int = D) -> tuple[Tensor, Tensor]:
            total = x + y
            return total, F.layer_norm(total, (D,))

        group, traffic = f"add_layer_norm {name}, B={B}", 4 * x.numel() * x.itemsize
        record = lambda *a, group=group, b=traffic, **k: bench.record(group, *a, bytes=b, **k)
        record("torch", without_gradients(plain, [x, y]))
        record("torch.compile", without_gradients(bench.compile(plain), [x, y]))
        ours = lambda x, y: kernels.add_layer_norm(x, y, 1e-6)
        record("triton", without_gradients(ours, [x, y]), informs="elementwise")
        _, normed, rstd = ours(x, y)
        backward = lambda g, normed, rstd: kernels.add_layer_norm_backward(g, g, normed, rstd)
        bench.record(
            f"{group}, backward",
            "triton",
            without_gradients(backward, [g, normed, rstd]),
            bytes=traffic,
            informs="elementwise",
        )


def _prompted(bench: Bench, method: str, backbone: Any, P: int, backend: str | None) -> Any:
    import pgn_fast

    model = getattr(pgn_fast, method)(backbone, num_classes=100, num_prompts=P, backend=backend)
    return model.to(bench.device, bench.dtype)


def models(bench: Bench) -> None:
    """A training step and inference of whole models: this library against timm's own blocks."""
    import timm

    cases = [
        ("VPT", "vit_base_patch16_224", 64, 50),
        ("VPT", "vit_base_patch16_224", 64, 100),
        ("PGN", "vit_base_patch32_224", 128, 16),
        ("PGN", "vit_base_patch16_224", 64, 16),
    ]
    for method, name, B, P in [("VPT", "test_vit", 2, 3)] if bench.tiny else cases:
        backbone = timm.create_model(name, pretrained=False).to(bench.device, bench.dtype)
        build = partial(_prompted, bench, method, backbone, P)
        model = build(None)
        size = backbone.pretrained_cfg["input_size"][1]
        images = bench.draw(B, 3, size, size)
        calls = {"timm": (model, model.forward_reference), "pgn_fast": (model, model.forward)}
        for backend in backends(bench, "prompt_attention", images):
            named = build(backend)
            calls[f"pgn_fast, {backend}"] = named, named.forward
        calls |= {f"{k}, torch.compile": (m, bench.compile(f)) for k, (m, f) in calls.items()}
        for which, (own, call) in calls.items():
            loss = lambda *_, call=call, x=images: call(x).float().logsumexp(dim=1).mean()
            step = gradients(loss, list(own.trainable_parameters()))

            group = f"{method} {name}, B={B}, P={P}"
            bench.record(f"{group}, training step", which, step)
            bench.record(f"{group}, inference", which, without_gradients(call, [images]))
            if not bench.tiny:
                torch.cuda.reset_peak_memory_stats()
                step()
                peak = bench.report.get("peak_bytes", {})
                peak[f"{group}, {which}"] = torch.cuda.max_memory_allocated()
                bench.save(peak_bytes=peak)
                torch.compiler.reset()


def small(bench: Bench) -> None:
    """Small problems through every kernel of this machine, for compute-sanitizer to watch."""
    import triton_cases
    from pgn_fast.kernels import add_layer_norm, mix_prompts, prompt_attention, prompted_patch_embed

    from pgn_fast import ops

    dtype = torch.bfloat16
    triton_cases.check_mix_prompts(mix_prompts, bench.device, dtype)
    triton_cases.check_prompt_attention(prompt_attention, bench.device, dtype)
    triton_cases.check_prompted_patch_embed(prompted_patch_embed, bench.device, dtype)
    triton_cases.check_add_layer_norm(add_layer_norm, bench.device, dtype)
    logits, library = bench.draw(3, 7, 70, grad=True), bench.draw(70, 65, grad=True)
    q, prompts = bench.draw(2, 3, 70, 64, grad=True), bench.draw(3, 37, 64, grad=True)
    mix = lambda a, b: ops.mix_prompts(a, b, backend="cuda")
    attend = lambda a, b: ops.prompt_attention(a, a, a, b, b, backend="cuda")
    if "cuda" in backends(bench, "mix_prompts", logits, library):
        gradients(mix, [logits, library])()
    if "cuda" in backends(bench, "prompt_attention", q, prompts):
        gradients(attend, [q, prompts])()
    weight = bench.draw(65, 3, 6, 6)
    if "cuda" in backends(bench, "prompted_patch_embed", weight):
        images = torch.zeros(3, 3, 30, 18, dtype=torch.uint8, device=bench.device)
        ops.prompted_patch_embed(
            *(images, weight, None, None, None, logits.detach(), library.detach()), backend="cuda"
        )
        # sizes that Hopper's own kernel takes: whole panels, two blocks of columns, several tiles
        images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, device=bench.device)
        weight, library = bench.draw(136, 3, 16, 16), bench.draw(70, 136)
        logits = bench.draw(4, 7, 70)
        ops.prompted_patch_embed(
            *(images, weight, None, None, None, logits, library), backend="cuda"
        )


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    f.__name__: f
    for f in (
        ceilings,
        gemm,
        mix_prompts,
        prompted_patch_embed,
        prompt_attention,
        sdpa,
        add_layer_norm,
        models,
        small,
    )
}


def measure(name: str, path: Path, tiny: bool = False) -> None:
    """Run one measurement; its results are in ``path``, as far as it came."""
    torch.manual_seed(0)
    bench = Bench(path, tiny)
    if not tiny:
        # from the ninth shape on Dynamo would run a function uncompiled, and it would be recorded
        # as compiled: that is an error here
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    MEASUREMENTS[name](bench)
    bench.save()


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]))
