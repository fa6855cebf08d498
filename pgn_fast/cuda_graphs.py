"""A whole training step as one CUDA graph: one launch in place of hundreds.

At small batches the GPU waits for the launches of an eager step (a ViT-B/32 step at batch 8 is
about four times faster in a graph); the numbers are those of the eager step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_ADVICE = "call the step itself instead; torch.compile needs no CUDA device"


@dataclass
class _Recording:
    """One graph, for inputs of one signature."""

    calls: int = 0
    graph: Any = None
    inputs: tuple[Tensor, ...] = ()
    outputs: Any = None


class CapturedStep:
    """What ``capture`` returns; call it like the step."""

    def __init__(self, step: Callable[..., Any], warmup: int) -> None:
        self.step, self.warmup = step, warmup
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Any:
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor) or t.device.type != "cuda":
                what = f"a tensor on {t.device}" if isinstance(t, Tensor) else repr(t)
                raise ValueError(
                    f"a captured step takes CUDA tensors, argument {i} is {what}; move it there "
                    "first, and bind what is no tensor into the step"
                )
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        recording = self._recordings.setdefault(key, _Recording())
        recording.calls += 1
        if recording.calls <= self.warmup:
            return self._run_beside(inputs)
        if recording.graph is None:
            recording.inputs = tuple(t.clone() for t in inputs)
            graph = torch.cuda.CUDAGraph()
            # capturing records the kernels and runs none: the replay below is this call's step
            with torch.cuda.graph(graph, pool=self._pool):
                recording.outputs = self.step(*recording.inputs)
            recording.graph = graph
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        recording.graph.replay()
        return tree_map_only(Tensor, torch.clone, recording.outputs)

    def _run_beside(self, inputs: tuple[Tensor, ...]) -> Any:
        """An eager step on the side stream, as CUDA graphs want their warm-up."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self._side)
        return outputs


def capture(step: Callable[..., Any], *, warmup: int = 3) -> CapturedStep:
    """Turn a training (or inference) step into one that replays a CUDA graph.

    The first ``warmup`` calls for each shape of inputs run the step eagerly, the next one records
    it; every call is a real step on its own batch, so training goes as it would without. The step
    must do the same on the GPU each time: no ``.item()``, no branch on a tensor's value, the
    optimizer built with ``capturable=True``, ``zero_grad(set_to_none=True)`` inside the step, and
    a learning rate that changes kept in a tensor. Frozen weights must not change any more.

        def step(images, labels):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = pgn_fast.capture(step)

    Args:
        step: a function of CUDA tensors that returns tensors (or tuples, lists, dicts of them).
        warmup: eager calls before recording; kernels are chosen and buffers made in them.

    Returns:
        A function of the same arguments. A batch of another shape gets a graph of its own; all
        share one memory pool.

    Raises:
        RuntimeError: torch sees no CUDA device.
        ValueError: ``warmup`` below 1; or, when called, an argument is no CUDA tensor.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"capture records CUDA graphs, and torch sees no CUDA device here; {_ADVICE}"
        )
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}: kernels are chosen in it")
    return CapturedStep(step, warmup)
