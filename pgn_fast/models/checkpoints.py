"""State dicts of models on a frozen backbone: what is trained, and which backbone it stood beside.

Hugging Face's Trainer, accelerate, Lightning and timm save ``model.state_dict()`` and give it back
to ``load_state_dict``: what they save is the adapter alone, without a line in the user's script. In
the place of the frozen tensors stands the digest of their bytes.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.digest import known_digest
from ..errors import UserError, shown
from .heads import KeptHead

# torch's own name for what a module stores beside its tensors; here text as bytes, "dtype digest"
_BESIDE = "_extra_state"


class AdapterCheckpoints(nn.Module):
    """A model whose ``state_dict()`` is what is trained.

    ``load_state_dict`` takes such a state and whole ones, also with ``strict=True``. It raises a
    UserError where the state was saved beside other frozen weights of the same dtype; where a part
    of the backbone is trained, such as LoRA, that part is in the state and the digest is of the
    rest. Sharded weights (FSDP) have no digest of their own, and none is saved.
    """

    backbone: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_check_backbone)
        self.register_load_state_dict_post_hook(_expect_no_backbone)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """As of ``nn.Module``, without the frozen tensors of the backbone.

        Args:
            keep_vars: the parameters themselves, which torch asks for where it exports or records
                a model: all of them.
        """
        state = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if not keep_vars:
            for name in _frozen(self):
                state.pop(prefix + name, None)
            if (beside := _beside(self, state, prefix)) is not None:
                text = bytearray(" ".join(beside).encode())
                state[prefix + _BESIDE] = torch.frombuffer(text, dtype=torch.uint8)
        return state


def _frozen(model: AdapterCheckpoints) -> set[str]:
    """Names of the backbone's tensors that are not trained."""
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    return {f"backbone.{name}" for name in model.backbone.state_dict() if name not in trained}


def _beside(model: AdapterCheckpoints, state: Any, prefix: str) -> tuple[str, str] | None:
    """Dtype and digest of what a state does not hold of the backbone; None where it holds all, or
    where parts are on other devices."""
    names = set(model.backbone.state_dict())
    held = frozenset(name for name in names if f"{prefix}backbone.{name}" in state)
    parameters = dict(model.backbone.named_parameters())
    if any(hasattr(p, "device_mesh") or p.is_meta for p in parameters.values()):
        return None
    dtypes = [p.dtype for name, p in parameters.items() if name not in held]
    if not dtypes:
        return None
    digest = known_digest(model.backbone, isinstance(model.head, KeptHead), held)
    return str(dtypes[0]).removeprefix("torch."), digest


def _check_backbone(model: AdapterCheckpoints, state: Any, prefix: str, *_: Any) -> None:
    saved = state.pop(prefix + _BESIDE, None)
    # what is trained at the time of loading does not matter: the state tells what was
    if saved is None or (own := _beside(model, state, prefix)) is None:
        return
    if (words := _words(saved)) is None:
        warnings.warn(
            f"{prefix}{_BESIDE} of the checkpoint is no digest of a backbone any more, as after "
            "arithmetic on its tensors; whether this model's backbone is the same is not known",
            stacklevel=2,
        )
    elif words[0] == own[0] and words[1] != own[1]:
        start, known = f"{prefix}backbone.", set(model.backbone.state_dict())
        strange = (n for n in state if n.startswith(start) and n[len(start) :] not in known)
        if (name := next(strange, None)) is not None:
            raise UserError(
                f"the checkpoint holds {shown(name)}, for which this backbone has no place. Put "
                "the layers that were trained inside of it (LoRA) there first, as in that training"
            )
        raise UserError(
            f"the checkpoint was saved beside a frozen backbone with digest {words[1][:12]}; this "
            f"one has {own[1][:12]}, other weights. Build the model on the backbone of that "
            "training"
        )


def _words(saved: Tensor) -> tuple[str, str] | None:
    """(dtype, digest) out of a checkpoint, also where averaging made floats of the bytes."""
    text = "".join(chr(int(x)) if 0 <= x < 128 else "?" for x in saved.flatten().tolist())
    found = re.fullmatch(r"(\w+) ([0-9a-f]{64})", text)
    return None if found is None else (found[1], found[2])


def _expect_no_backbone(model: AdapterCheckpoints, keys: Any) -> None:
    """The frozen tensors of the backbone are not missed, whatever the prefix of their names."""
    frozen = _frozen(model)
    keys.missing_keys[:] = [
        name
        for name in keys.missing_keys
        if not any(name == f or name.endswith(f".{f}") for f in frozen)
    ]
