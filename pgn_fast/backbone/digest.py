"""A digest of a frozen backbone's weights: which weights an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# bytes that are copied to the host at a time
_CHUNK = 1 << 24

_digests: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def backbone_digest(
    backbone: nn.Module, *, head: bool = False, without: Collection[str] = ()
) -> str:
    """SHA-256 of a backbone's weights and persistent buffers, as 64 hexadecimal digits.

    Two backbones have the same digest where names, dtypes, shapes and bytes agree; the device, the
    order of the modules and the memory format do not matter. -0.0 and 0.0, or a weight and its
    half-precision copy, are different bytes.

    Args:
        backbone: any module.
        head: whether its own classifier (``head`` and ``head_dist``, by timm's names) counts. The
            models use it with ``head="keep"`` alone, and a backbone made with ``num_classes=0``
            has none.
        without: names of tensors that do not count, such as those of LoRA that is trained inside
            of it.

    Raises:
        ValueError: the weights are not in memory (device "meta"), or are of a type that does not
            show its bytes; the message names the tensor.
    """
    state = backbone.state_dict(keep_vars=True)
    names = sorted(
        name
        for name in state
        if (head or name.split(".")[0] not in ("head", "head_dist")) and name not in without
    )
    parts = [part for name in names for part in _parts(name, state[name])]
    # hashlib lets go of the interpreter's lock
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        digests = pool.map(lambda part: _digest(*part), parts)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the tensors inside of a subclass (quantized or distributed weights)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, whose bytes cannot be read")
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        if not hasattr(tensor, "__tensor_flatten__"):
            raise ValueError(f"{name} is a {type(tensor).__name__}, whose bytes cannot be read")
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner))
    elif tensor.device.type == "meta":
        raise ValueError(f"{name} is on the device meta; load the weights first")
    else:
        yield name, tensor.detach()


def _digest(name: str, tensor: Tensor) -> bytes:
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    for chunk in data.split(_CHUNK):
        found.update(chunk.cpu().numpy())
    return found.digest()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when a tensor is replaced or written, also through ``.data`` as a whole."""
    if hasattr(tensor, "__tensor_flatten__"):  # quantized, for one: its bytes are in other tensors
        return tuple(_state(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    version = 0 if tensor.is_inference() else tensor._version
    first = str(tensor.detach().reshape(-1)[:1].tolist())  # as text, in which NaN equals itself
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), first


def known_digest(backbone: nn.Module, head: bool, without: frozenset[str] = frozenset()) -> str:
    """``backbone_digest``, computed once for many adapters on one backbone."""
    tensors = (*backbone.named_parameters(), *backbone.named_buffers())
    key = head, without, tuple(_state(tensor) for name, tensor in tensors if name not in without)
    known = _digests.get(backbone)
    if known is None or known[0] != key:
        known = key, backbone_digest(backbone, head=head, without=without)
        _digests[backbone] = known
    return known[1]
