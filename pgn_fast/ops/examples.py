"""The calls by which an op is verified, timed and compiled ahead of time.

An op names them once, in its own file: a function of ``Sizes`` and ``Draw`` that yields the public
function's arguments. ``pgn-fast autotune``, the GPU script, the ahead-of-time compiler of the
Triton kernels and the tests that hold for every op read them from ``dispatch.OPS``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import devices, dispatch


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in the letters of ``reference``; h heads of D / h."""

    B: int = 8
    D: int = 768
    h: int = 12
    patch: int = 16
    image: int = 224
    P: int = 16
    K: int = 256

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


ODD = Sizes(B=3, D=36, h=3, patch=6, image=18, P=5, K=7)  # divides no block, aligned to nothing


class Draw:
    """Random tensors of one dtype and device, the same in every process; none on "meta"."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        """Normal numbers, which get a gradient where the op gives one."""
        return self._to(torch.randn, shape, self.dtype).requires_grad_(grad)

    def pixels(self, *shape: int) -> Tensor:
        """uint8, from 0 to 255."""
        return self._to(functools.partial(torch.randint, 0, 256), shape, torch.uint8)

    def permutation(self, n: int) -> Tensor:
        return self._to(lambda shape, **rest: torch.randperm(*shape, **rest), (n,), torch.int64)

    def _to(
        self, make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return make(shape, generator=self.generator).to(self.device, dtype)


@dataclass(frozen=True)
class Example:
    """One call of an op's public function.

    Attributes:
        op: the op's name.
        arguments: of the public function, by name, without the backend.
        tensors: those arguments that are tensors, in their order: what ``call`` is a function of.
    """

    op: str
    arguments: Mapping[str, Any]
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors = [x for x in self.arguments.values() if isinstance(x, Tensor)]
        object.__setattr__(self, "tensors", tensors)

    def call(self, backend: str | None) -> Callable[..., Any]:
        """The public function by a backend, of ``tensors`` or others in their place."""
        from .. import ops

        function = getattr(ops, devices.stem(self.op))
        return functools.partial(self._by_name, functools.partial(function, backend=backend))

    def eager(self) -> Callable[..., Any]:
        """The same as a user without this library would write it, with torch's own autograd."""
        own = dispatch.row(self.op).eager
        return self.call("reference") if own is None else functools.partial(self._by_name, own)

    def _by_name(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        given = iter(tensors)
        named = {
            name: next(given) if isinstance(x, Tensor) else x for name, x in self.arguments.items()
        }
        return function(**named)


def examples(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Example]:
    """The calls of an op at these sizes; the first is the one that is timed."""
    row = dispatch.row(op)
    return [Example(op, arguments) for arguments in row.examples(sizes, Draw(dtype, device))]
