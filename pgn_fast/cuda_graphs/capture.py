"""A step of the user's own as one CUDA graph, taken as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .record import CudaRecorder, Recorded, signature

_ADVICE = "call the step itself instead; torch.compile needs no CUDA device"


@dataclass
class _Recording:
    """One graph, for inputs of one signature."""

    calls: int = 0
    recorded: Recorded | None = None
    inputs: tuple[Tensor, ...] = ()


class CapturedStep:
    """What ``capture`` returns; call it like the step."""

    def __init__(self, step: Callable[..., Any], warmup: int) -> None:
        self.step, self.warmup = step, warmup
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))

    def __call__(self, *inputs: Tensor) -> Any:
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor) or t.device.type != "cuda":
                what = f"a tensor on {t.device}" if isinstance(t, Tensor) else repr(t)
                raise ValueError(
                    f"a captured step takes CUDA tensors, argument {i} is {what}; move it there "
                    "first, and bind what is no tensor into the step"
                )
        recording = self._recordings.setdefault(signature(inputs), _Recording())
        recording.calls += 1
        if recording.calls <= self.warmup:
            return self._recorder.beside(self.step, inputs)
        if recording.recorded is None:
            recording.inputs = tuple(t.clone() for t in inputs)
            # recording runs nothing: the replay below is this call's step
            recording.recorded = self._recorder.record(partial(self.step, *recording.inputs))
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        recording.recorded.replay()
        return tree_map_only(Tensor, torch.clone, recording.recorded.outputs)


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
