"""What the measurements of bench/gpu.py share: times, errors beside them, and where they are kept.

Times are those of a CUDA graph with one call in it, so that a call's launch overhead on the host is
not mistaken for the kernel's work; before every sample the L2 cache is overwritten. Beside each
stands the error against float64 and whether two runs give the same bits.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rows
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

READY = "ready to be timed"
Truth = Sequence[Tensor] | None


class Bench:
    """Collects figures, and has them on disk at any time.

    Args:
        path: where they are kept; what an earlier process of the step left there stays.
        tiny: a rehearsal: small sizes, float32, on the CPU.
        waits: what takes time to compile is run once, beside other such processes, and timed when
            it is this process' turn (``take_turn``).
    """

    def __init__(self, path: Path, tiny: bool, waits: bool = False) -> None:
        self.path, self.tiny, self.waits = path, tiny, waits
        self._waiting: list[Callable[[], None]] = []
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.report: dict[str, Any] = {"figures": []}
        if path.is_file():
            self.report |= json.loads(path.read_text())

    def draw(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=grad)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, but for a rehearsal. A shape that Dynamo would run uncompiled, and that
        would be recorded as compiled, is an error."""
        if self.tiny:
            return function
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(function, dynamic=False)

    def save(self, **facts: Any) -> None:
        self.report.update(facts)
        self.path.write_text(json.dumps(self.report))

    def fail(self, what: str, error: Exception) -> None:
        text = f"{what}: {type(error).__name__}: {str(error)[:300]}"
        self.save(errors=[*self.report.get("errors", []), text])

    def truth(self, what: str, call: Callable[[], Any]) -> Truth:
        """The tensors that ``call``, in float64, returns; None where there is no memory for it."""
        try:
            return [t.detach() for t in tree_leaves(call())]
        except Exception as error:
            self.fail(f"{what}, float64", error)
            return None

    def record(
        self,
        group: str,
        name: str,
        call: Callable[[], Any],
        *,
        truth: Truth = None,
        check: Callable[[], Any] | None = None,
        flops: float = 0.0,
        bytes: float = 0.0,
        informs: str | None = None,
    ) -> None:
        """Time one call. One that cannot run leaves its error in the report, and no figure.

        Args:
            truth: what it should return.
            check: the call whose results are held against ``truth``; None: the timed one.
        """
        try:
            agreement = self.agreement(call, check or call, truth)
        except Exception as error:
            return self.fail(f"{group}, {name}", error)

        def take_time() -> None:
            try:
                times, graph = self.milliseconds(call)
            except Exception as error:
                return self.fail(f"{group}, {name}", error)
            told = agreement | {"cuda_graph": graph, "informs": informs}
            self.keep(group, name, times, flops=flops, bytes=bytes, **told)

        if self.waits:
            self._waiting.append(take_time)
        else:
            take_time()

    def take_turn(self) -> None:
        """Say "ready" and, once a line comes in, take the times that wait."""
        if not self.waits:
            return
        print(READY, flush=True)
        sys.stdin.readline()
        for take_time in self._waiting:
            take_time()

    def keep(self, group: str, name: str, times: Sequence[float], **told: Any) -> None:
        """Add a figure: the median of the times in milliseconds, and how far they are apart."""
        figure = {"group": group, "name": name, "ms": statistics.median(times), **told}
        figure |= {"spread": rows.spread(times), "rounds": len(times)}
        figure["dtype"] = str(self.dtype).removeprefix("torch.")
        self.report["figures"].append(figure)
        self.save()

    def agreement(
        self, call: Callable[[], Any], check: Callable[[], Any], truth: Truth
    ) -> dict[str, Any]:
        """ "error" against the truth, relative to its largest value, and "repeats": two runs give
        the same bits."""
        one, other = ([t.detach().clone() for t in tree_leaves(call())] for _ in range(2))
        repeats = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        if truth is None:
            return {"error": None, "repeats": repeats}
        found = one if check is call else [t.detach() for t in tree_leaves(check())]
        errors = []
        for a, b in zip(found, truth, strict=True):
            error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            errors.append(error if error == error else float("inf"))
        return {"error": max(errors), "repeats": repeats}

    def milliseconds(self, call: Callable[[], Any], samples: int = 25) -> tuple[list[float], bool]:
        """Times of a call, and whether it could be captured in a CUDA graph."""
        if self.tiny:
            return self.eager_milliseconds(call, 1), False
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
        return self.eager_milliseconds(run, samples), graph is not None

    def eager_milliseconds(self, call: Callable[[], Any], samples: int = 25) -> list[float]:
        """Times of a call as it is, its launches included."""
        if self.tiny:
            begin = time.perf_counter()
            call()
            return [(time.perf_counter() - begin) * 1e3]
        flush = torch.empty(2**28, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(samples):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return times


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
        # a constant would be nothing to a LayerNorm
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
        return torch.autograd.grad(out, wanted, ramp.view(out.shape) if out.ndim else ramp[0].neg())

    return both


def without_gradients(call: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return call(*inputs)

    return forward


def in_float64(inputs: list[Tensor]) -> list[Tensor]:
    """The same rounded inputs in float64 where they are; pixels stay bytes."""
    found = []
    for x in inputs:
        y = x.detach()
        y = y if y.dtype == torch.uint8 else y.double()
        found.append(y.requires_grad_(x.requires_grad))
    return found


def backends(bench: Bench, op: str, *tensors: Tensor, **sizes: int) -> list[str]:
    """The kernels of ``op`` that this machine runs; in a rehearsal all but the interpreted."""
    from pgn_fast.ops.dispatch import BACKENDS, unsupported_reason

    skipped = ("reference", "triton") if bench.tiny else ("reference",)
    return [
        b
        for b in BACKENDS
        if b not in skipped and unsupported_reason(b, op, *tensors, sizes=sizes) is None
    ]
