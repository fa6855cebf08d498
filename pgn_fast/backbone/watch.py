"""Whether a frozen backbone is still the one that something was made from.

Seen at the next forward, always: another module, class, hook (also global ones), attribute (eps,
num_heads, scale), forward or mode; a weight replaced, moved, cast, reshaped or unfrozen; and a
write that autograd counts (in-place ops, ``torch._foreach_*``, load_state_dict).

Writes that leave no trace (through ``parameter.data``, a NumPy view, DLPack) are seen by the bytes:
each forward sums ``_LINES`` cache lines of every weight, the whole of a small one, so a write to
all of a weight (a merge, an average, a swap, a scaling) is seen at the next forward, but for a
chance of 2^-32. A write to a few elements may lie between these lines. For it, each forward also
sums a range that wanders over all weights, by ``1 / _IMAGES_A_ROUND`` of them an image and at least
``_LEAST`` chunks of a MiB: backbones up to that size are seen whole each time, others after at most
``_IMAGES_A_ROUND`` images; the first forward after the model changes between training and
evaluation looks at all of them. ``model.refresh()`` needs no noticing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import _native

_LINES = 16
_CHUNK = 1 << 17  # words of 8 bytes: 1 MiB
_LEAST = 2
_IMAGES_A_ROUND = 256

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
# hooks by which torch itself looks on and changes nothing
_LOOKS_ON = ("torch.utils.module_tracker",)


class Watch:
    """A picture of a backbone, and whether the backbone still looks like it."""

    def __init__(self, backbone: nn.Module) -> None:
        self._modules = list(backbone.modules())
        self._pictures = [(type(m), _picture(m)) for m in self._modules]
        self._classes = list({type(m) for m in self._modules})
        self._class_forwards = self._forwards()
        self._hooks = _global_hooks()
        self._tensors = [*backbone.parameters(), *backbone.buffers()]
        self._facts = list(map(_facts, self._tensors))
        self._bytes: list[Tensor] = []
        self._prefixes: list[int] = []
        self._sample = self._position = 0

    def _forwards(self) -> list[Any]:
        return [cls.forward for cls in self._classes]

    def same_structure(self) -> bool:
        """Whether modules, attributes, hooks and tensors are those of the picture, and no counted
        write has happened."""
        try:
            for module, (cls, picture) in zip(self._modules, self._pictures, strict=True):
                # dictionaries compare by identity first: 0.4 us a module
                if type(module) is not cls or module.__dict__ != picture:
                    return False
        except Exception:  # two tensors that differ do not compare to a bool
            return False
        return (
            self._hooks == _global_hooks()
            and self._class_forwards == self._forwards()
            and self._facts == list(map(_facts, self._tensors))
        )

    def take_bytes(self) -> None:
        """Sum all weights as they are now; ``same_bytes`` compares with this."""
        self._bytes = [_as_bytes(t) for t in self._tensors if t.numel()]
        words = sum(-(-t.numel() // 8) for t in self._bytes)
        sums = [self._sum(0, start, start + _CHUNK) for start in range(0, words, _CHUNK)]
        self._prefixes = [0]
        for part in sums:
            self._prefixes.append((self._prefixes[-1] + part) % 2**64)
        self._sample = self._sum(_LINES, 0, 0)

    def same_bytes(self, images: int = 1, whole: bool = False) -> bool:
        """Whether the weights have the bytes that ``take_bytes`` saw, as far as is looked.

        Args:
            images: of the forward that asks; the more there are, the more is looked at.
            whole: look at all.
        """
        if not self._bytes:
            return True
        if self._sum(_LINES, 0, 0) != self._sample:
            return False
        chunks = len(self._prefixes) - 1
        count = max(_LEAST, -(-chunks * images // _IMAGES_A_ROUND))
        start = 0 if whole or count >= chunks else self._position % chunks
        stop = chunks if whole else min(start + count, chunks)
        self._position = stop
        found = self._sum(0, start * _CHUNK, stop * _CHUNK)
        return found == (self._prefixes[stop] - self._prefixes[start]) % 2**64

    def _sum(self, lines: int, begin: int, end: int) -> int:
        op = torch.ops.pgn_fast_C.weights_fingerprint.default
        return op(self._bytes, lines, begin, end) % 2**64


def copies_unsupported_reason(backbone: nn.Module) -> str | None:
    """Why no copies of a backbone's weights are kept: it could not be seen that they are written.
    None where it can."""
    if _native.cpu_missing is not None:
        return _native.cpu_missing
    if not torch._C._dispatch_has_kernel("pgn_fast_C::weights_fingerprint"):
        return "pgn_fast._C is older than these sources; rebuild with: pip install -e ."
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if tensor.device.type != "cpu":
            return f"writes to {name} on {tensor.device.type} could not be seen without waiting"
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"{name} is a {type(tensor).__name__}, whose writes could not be seen"
        if tensor.is_inference():
            return f"{name} is an inference tensor, whose writes are not counted"
        if not _is_dense(tensor):
            return f"{name} is part of another tensor, with gaps between its elements"
    return None


def foreign_code(backbone: nn.Module) -> str | None:
    """Who changes what the modules compute without a trace in them: a hook on all modules, or a
    class whose forward was replaced. None where there is none."""
    for name, hooks in zip(_GLOBAL_HOOKS, _global_hooks(), strict=True):
        if any(getattr(hook, "__module__", None) not in _LOOKS_ON for hook in hooks):
            return f"a hook is registered on all modules ({name.removeprefix('_')})"
    for cls in {type(m) for m in backbone.modules()}:
        owner = next(base for base in cls.__mro__ if "forward" in vars(base))
        # where a function was defined shows in its globals, whatever names a wrapper gives it
        home = getattr(vars(owner)["forward"], "__globals__", {}).get("__name__")
        if owner is not nn.Module and home != owner.__module__:
            return f"the forward of the class {owner.__name__} was replaced"
    return None


def _global_hooks() -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(getattr(torch_module, name).values()) for name in _GLOBAL_HOOKS)


def _picture(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, with copies of the containers among them."""
    return dict(_copied(module.__dict__))


def _copied(own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in own.items():
        if isinstance(value, dict | list | set):
            value = value.copy()
        yield name, value


def _facts(t: Tensor) -> tuple[Any, ...]:
    version = 0 if t.is_inference() else t._version
    return t.data_ptr(), version, t.requires_grad, t.dtype, t.shape, t.stride()


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a range of memory, in whatever order."""
    order = sorted(range(t.ndim), key=lambda dim: (t.stride(dim), t.shape[dim]), reverse=True)
    return t.permute(order).is_contiguous()


def _as_bytes(t: Tensor) -> Tensor:
    """The memory of a dense tensor, (bytes,) uint8."""
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)
