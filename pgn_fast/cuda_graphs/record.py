"""What records a step and plays it again, and which models cannot be recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Recorded(Protocol):
    """A recorded step.

    Attributes:
        outputs: what the step returned; ``replay`` overwrites it.
    """

    outputs: Any

    def replay(self) -> None:
        """Run the step again on what its inputs' memory holds now."""


class Recorder(Protocol):
    """Records what a step does on the device. CUDA's is ``CudaRecorder``."""

    def beside(self, step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """An eager step, run as a recording wants its warm-up."""

    def record(self, run: Callable[[], Any]) -> Recorded:
        """Record ``run``, whose inputs stay where they are. Raises whatever keeps it from that."""

    def random_state(self) -> Any:
        """Of the generators that the step may draw from."""

    def set_random_state(self, state: Any) -> None:
        """Back to what ``random_state`` returned."""

    def release(self) -> None:
        """Give back the memory of recordings that are gone."""


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """CUDA graphs of one device, which share one memory pool: their outputs are read, or cloned,
    before another one is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def beside(self, step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            outputs = step(*inputs)
        current.wait_stream(self._side)
        return outputs

    def record(self, run: Callable[[], Any]) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that pin memory for the loader may go on meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        current = torch.cuda.current_stream(self._device)
        first: Exception | None = None
        try:
            # a capture that fails stays in its own stream
            with torch.cuda.stream(current), _made_outside_of_inference(capture):
                try:
                    outputs = run()
                except Exception as error:
                    first = error
                    raise
        except Exception as last:
            with suppress(AttributeError, RuntimeError):  # nor does it leave the pool
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            # the end of a capture that failed fails too, with less to say
            raise (first or last) from None
        finally:
            del first  # it holds this frame
        return _CudaGraph(graph, outputs)

    def random_state(self) -> Any:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Any) -> None:
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state(state[1], self._device)

    def release(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


@contextmanager
def _made_outside_of_inference(capture: torch.cuda.graph) -> Iterator[None]:
    """Inside of a capture, in the caller's mode. The first one makes what all graphs of a device
    draw random numbers by; made in inference mode, no graph of training could write it."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    with torch.inference_mode(False), capture:
        mode = torch.inference_mode() if inference else torch.set_grad_enabled(grad)
        with mode:
            yield


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder of steps on a device; None where it has none, or PGN_FAST_CUDA_GRAPHS=off."""
    if device.type != "cuda" or os.environ.get("PGN_FAST_CUDA_GRAPHS", "").lower() == "off":
        return None
    return CudaRecorder(device)


def signature(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What a recording is for: another layout, dtype or device of an input needs another one."""
    facts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    return torch.is_grad_enabled(), facts


def made_of(model: nn.Module) -> tuple[Any, ...]:
    """Where a model's tensors lie and its modules' modes: a recording reads these very places."""
    return tuple(
        (module.training, *((t.data_ptr(), t.dtype, t.requires_grad) for t in _own_tensors(module)))
        for module in model.modules()
    )


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        yield from (t for t in tensors.values() if t is not None)


def unsupported_reason(model: nn.Module) -> str | None:
    """Why a model's steps must not be replayed: Python that runs inside of each of them would not
    run. None where nothing is known against it; what CUDA cannot record, it says itself."""
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at every operation"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "a hook is registered on all modules"
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"a hook is registered on {name or 'the model'}"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"a hook is registered on {name}"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
