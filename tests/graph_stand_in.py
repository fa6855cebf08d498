"""A stand-in for CUDA graphs on the CPU: what would be recorded, under the rules of a recording.

A recording here is the list of operations that the step dispatched, with the very tensors that they
read and wrote. A replay runs them again on the same memory: Python does not run, numbers that stood
in Python are as they were, and random numbers are new ones. What a CUDA graph could not do is
refused while it records, and memory that is gone is found when it is replayed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pgn_fast.cuda_graphs import record


class CannotRecord(RuntimeError):
    """The step does something that a CUDA graph cannot hold."""


class _Outside:
    """Memory that the step did not make: read where it lay, whoever owns it, and never owned."""

    def __init__(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        self._alive = StorageWeakRef(storage)
        memory = (ctypes.c_byte * max(storage.nbytes(), 1)).from_address(storage.data_ptr())
        bytes_ = torch.frombuffer(memory, dtype=torch.uint8)[: storage.nbytes()]
        self.tensor = bytes_.view(t.dtype).as_strided(t.size(), t.stride(), t.storage_offset())

    def check(self) -> None:
        if self._alive.expired():
            raise RuntimeError("a replay would read memory that was freed")


class Tape(TorchDispatchMode):
    """Records operations; raises CannotRecord at one that needs the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.outside: dict[int, _Outside] = {}
        self._made: set[int] = set()  # storages that the recording owns, as graphs own a pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reason := _needs_host(func, args):
            raise CannotRecord(reason)
        outputs = func(*args, **kwargs)
        if any(not isinstance(x, Tensor) for x in tree_leaves(outputs) if x is not None):
            raise CannotRecord(f"{func} returns a number to the host")
        args, kwargs = tree_map_only(Tensor, self._seen, (args, kwargs))
        self.calls.append((func, args, kwargs, outputs))
        self._made |= {_storage(t) for t in tree_leaves(outputs) if isinstance(t, Tensor)} - {
            *self.outside
        }
        return outputs

    def _seen(self, t: Tensor) -> Tensor:
        """A tensor as a replay reads it."""
        key = _storage(t)
        if key in self._made or not t.numel():
            return t.detach()
        found = self.outside.setdefault(key, _Outside(t))
        view = found.tensor
        if (view.dtype, view.shape, view.stride()) == (t.dtype, t.shape, t.stride()):
            return view
        return _Outside(t).tensor


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _needs_host(func: Any, args: tuple[Any, ...]) -> str | None:
    name = func.name()
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} waits for a value on the device"
    if name == "aten::index.Tensor" or name == "aten::index_put_":
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return f"{name} by a mask has a size that depends on values" if masks else None
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"{name} has a size that depends on values"
    if name in ("aten::lift_fresh", "aten::lift"):
        return "a tensor is made of numbers in Python: memory that the recording does not own"
    return None


class _Played:
    def __init__(self, tape: Tape, outputs: Any) -> None:
        self.tape, self.outputs = tape, outputs

    @torch.no_grad()
    def replay(self) -> None:
        for outside in self.tape.outside.values():
            outside.check()
        for func, args, kwargs, outputs in self.tape.calls:
            if "empty" in func.name():
                continue  # memory that is there already
            for new, own in zip(
                tree_leaves(func(*args, **kwargs)), tree_leaves(outputs), strict=True
            ):
                if own is not None and own.numel() and new.data_ptr() != own.data_ptr():
                    own.detach().copy_(new)


class StandIn:
    """A ``Recorder`` on the CPU."""

    def __init__(self) -> None:
        self.recorded: list[_Played] = []
        self.beside_calls = 0

    def beside(self, step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        self.beside_calls += 1
        return step(*inputs)

    def record(self, run: Callable[[], Any]) -> record.Recorded:
        with Tape() as tape:
            outputs = run()
        played = _Played(tape, outputs)
        self.recorded.append(played)
        return played

    def random_state(self) -> Any:
        return torch.get_rng_state()

    def set_random_state(self, state: Any) -> None:
        torch.set_rng_state(state)

    def release(self) -> None:
        self.recorded.clear()
