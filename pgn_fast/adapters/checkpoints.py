"""Checkpoints of other people's trainers that hold what is trained, and not the frozen backbone."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from .identity import known_digest
from .save import unwrapped

_Model = TypeVar("_Model", bound=nn.Module)
# in the place of the frozen tensors: SHA-256 of them, 32 bytes
_DIGEST = "backbone.digest"


def adapter_checkpoints(model: _Model) -> _Model:
    """Make a model's ``state_dict()`` what is trained, so that every trainer saves that alone.

    Hugging Face's Trainer, accelerate, Lightning and timm save ``model.state_dict()`` and give it
    back to ``load_state_dict``. From here on it has no frozen tensor of the backbone, and in their
    place the digest of their bytes; ``load_state_dict`` takes such a state, also with
    ``strict=True``, and whole ones as before.

    Args:
        model: a PGN, a VPT, a ``LinearProbe`` or a model of a registered method; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: all of its backbone is trained (``FineTuned``), so that nothing could be left
            out.

    Loading a state of other frozen weights raises a UserError that names both digests. Sharded
    weights (FSDP) have no digest of their own, and none is saved.
    """
    inner: Any = unwrapped(model)
    if all(p.requires_grad for p in inner.backbone.parameters()):
        raise ValueError("the whole backbone is trained; its checkpoints must hold all of it")
    if _leave_out not in inner._state_dict_hooks.values():
        inner._register_state_dict_hook(_leave_out)
        inner.register_load_state_dict_pre_hook(_check_digest)
        inner.register_load_state_dict_post_hook(_expect_no_backbone)
    return model


def _frozen(model: nn.Module) -> set[str]:
    """Names of the backbone's tensors that are not trained."""
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    return {f"backbone.{name}" for name in backbone.state_dict() if name not in trained}


def _digest(model: nn.Module) -> Tensor | None:
    """The digest of the frozen backbone, (32,) uint8; None where parts of it are elsewhere."""
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    parameters = list(backbone.parameters())
    if any(p.requires_grad or hasattr(p, "device_mesh") or p.is_meta for p in parameters):
        return None
    return torch.frombuffer(bytearray.fromhex(known_digest(backbone, False)), dtype=torch.uint8)


def _leave_out(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(model):
        state.pop(prefix + name, None)
    digest = _digest(model)
    if digest is not None:
        state[prefix + _DIGEST] = digest


def _check_digest(model: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    saved = state.pop(prefix + _DIGEST, None)
    own = None if saved is None else _digest(model)
    if own is not None and not torch.equal(saved.cpu(), own):
        raise UserError(
            f"the checkpoint was saved beside a frozen backbone with digest {_hex(saved)}; this "
            f"one has {_hex(own)}, other weights. Build the model on the backbone of that training"
        )


def _expect_no_backbone(model: nn.Module, keys: Any) -> None:
    """The frozen tensors of the backbone are not missed, whatever the prefix of their names."""
    frozen = _frozen(model)
    keys.missing_keys[:] = [
        name
        for name in keys.missing_keys
        if not any(name == f or name.endswith(f".{f}") for f in frozen)
    ]


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]
