"""One backend of one op in a process of its own: verified, then timed.

    python -m pgn_fast.autotune.worker OP BACKEND DTYPE DEVICE SIZES

Prints one JSON line: {"error", "plain_error", "ms", "plain_ms", "tiles"} or {"wrong": reason}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cases

ROUNDS = 12


def verify(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The largest errors of the backend and of eager PyTorch against float64, relative.

    Raises:
        ArithmeticError: an error above twice eager PyTorch's, a run that differs from the one
            before, or a replayed graph that does.
    """
    worst, worst_plain = 0.0, 0.0
    for sizes in (cases.Sizes(B=2), cases.ODD):
        case = cases.case(op, sizes, dtype, device)
        own, plain, tensors = case.call(backend), case.eager(), case.tensors
        expected = cases.results(plain, cases.in_float64(tensors))
        allowed = _error(cases.results(plain, tensors), expected)
        for layout in (tensors, cases.strided(tensors)):
            _poison(expected, dtype, device)
            got = cases.results(own, layout)
            error = _error(got, expected)
            # below a rounding of the largest value nothing can be told apart
            if not error <= max(2 * allowed, torch.finfo(dtype).eps):
                raise ArithmeticError(
                    f"wrong numbers: error {error:.1e}, eager PyTorch {allowed:.1e}"
                )
            again = cases.results(own, layout)
            if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
                raise ArithmeticError("two runs on the same inputs differ")
            if device.type == "cuda" and not _replays(own, layout, got):
                raise ArithmeticError("a replayed CUDA graph gives other numbers")
            worst, worst_plain = max(worst, error), max(worst_plain, allowed)
    return worst, worst_plain


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a fraction of the largest expected value; infinite for a NaN."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        largest = b.abs().max().clamp_min(1e-30)
        error = ((a.cpu().double() - b).abs().max() / largest).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _poison(like: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in the memory that the next outputs are likely to get."""
    for _ in range(2):
        held = [torch.full(x.shape, torch.nan, dtype=dtype, device=device) for x in like]
        del held


def _replays(function: cases.Call, tensors: list[Tensor], expected: list[Tensor]) -> bool:
    side = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            function(*tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for out in outputs:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
    return all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=False))


def measure(
    op: str, backend: str, dtype: torch.dtype, device: torch.device, sizes: cases.Sizes
) -> tuple[float, float]:
    """Median milliseconds of forward and backward: by the backend and by eager PyTorch."""
    case = cases.case(op, sizes, dtype, device)
    times: tuple[list[float], list[float]] = ([], [])
    calls = case.call(backend), case.eager()
    for _ in range(ROUNDS + 2):
        for call, found in zip(calls, times, strict=True):
            found.append(milliseconds(partial(cases.results, call, case.tensors), device))
    ours, plain = (sorted(t[2:])[ROUNDS // 2] for t in times)
    return ours, plain


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, of all that it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def main(arguments: list[str]) -> int:
    op, backend, dtype_name, device_name, sizes = arguments
    dtype, device = getattr(torch, dtype_name), torch.device(device_name)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from ..kernels import _common

            stack.enter_context(_common.measuring())
        try:
            found["error"], found["plain_error"] = verify(op, backend, dtype, device)
            times = measure(op, backend, dtype, device, cases.Sizes(**json.loads(sizes)))
            found["ms"], found["plain_ms"] = times
        except ArithmeticError as error:
            found = {"wrong": str(error)}
        if backend == "triton":
            found["tiles"] = _common.measured_tiles()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
