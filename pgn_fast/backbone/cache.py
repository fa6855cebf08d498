"""What is made once from a frozen backbone's weights, and when it has to be made again.

When that is, ``watch`` knows. Folded and packed weights belong to the backbone: every model on it
that wants the same ones shares them, and they are freed with the last of these models. The prompts'
keys and values of the last call belong to one model.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops._register import leaves_this_package, transformed
from . import blocks, families, packed, quantized, support
from .families import Family
from .families.base import heads
from .fold import fold_block
from .options import FastOptions
from .packed import PackedLinear
from .watch import Watch, copies_unsupported_reason, foreign_code
from .weights import BlockWeights, FrozenLinear, from_timm, multiplied_by


class _Shared:
    """What all models on one backbone share: whether the engine can run it, and its weights."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.lock = threading.RLock()
        self.refresh()

    def refresh(self) -> None:
        """Forget everything that was made from the weights."""
        with self.lock:
            self.family = families.of(self.backbone)
            self.unsupported_reason = support.unsupported_reason(self.backbone) or foreign_code(
                self.backbone
            )
            self.copies_unsupported_reason = copies_unsupported_reason(self.backbone)
            # not asked of blocks that the engine knows nothing of
            self.biased = self.unsupported_reason is None and self.family.biases_scores(
                self.backbone
            )
            self.folded: dict[tuple[Any, ...], list[BlockWeights]] = {}
            self.backends: dict[tuple[str, torch.device, torch.dtype, str | None], str] = {}
            self.watch = Watch(self.backbone)
            self.look_at_all = False  # at the next forward, instead of a part of the bytes

    def follow(self, images: int) -> None:
        """Forget what was made from weights that have changed since; see ``watch``."""
        whole, self.look_at_all = self.look_at_all, False
        if not (self.watch.same_structure() and self.watch.same_bytes(images, whole)):
            self.refresh()

    def fold(
        self,
        options: FastOptions,
        dtype: torch.dtype,
        backends: dict[str, str],
        linear: type[FrozenLinear],
    ) -> list[BlockWeights]:
        """The blocks' weights in ``dtype``, made at the first call, for ``linear``."""
        folded = self.folded  # a refresh in another thread replaces the dictionary
        bare = (options.fold, options.biases, dtype, tuple(backends.items()))
        key = (*bare, linear)
        if key not in folded:
            with self.lock:
                if not folded:  # before anything is made from them
                    self.watch.take_bytes()
                if bare not in folded:
                    backend_for = backends.__getitem__
                    folded[bare] = [
                        fold_block(self.family, self.backbone, i, options, dtype, backend_for)
                        for i in range(len(self.backbone.blocks))
                    ]
                if key not in folded:
                    folded[key] = multiplied_by(linear, folded[bare])
        return folded[key]

    def extra_bytes(self) -> int:
        """Bytes of folded weights that are not the backbone's own tensors, each counted once."""
        own = {p.data_ptr() for p in self.backbone.parameters()}
        weights = (w for blocks_ in list(self.folded.values()) for w in blocks_)
        extra = {t.data_ptr(): t.nbytes for w in weights for t in w.tensors()}
        return sum(nbytes for pointer, nbytes in extra.items() if pointer not in own)


# by id: a _Shared keeps its backbone, so an id here is never that of another module
_shared: WeakValueDictionary[int, _Shared] = WeakValueDictionary()
_lock = threading.Lock()


def _shared_of(backbone: nn.Module) -> _Shared:
    with _lock:
        found = _shared.get(id(backbone))
        if found is None:
            found = _shared[id(backbone)] = _Shared(backbone)
        return found


class BackboneCache:
    """State of one engine.

    Args:
        backbone: as ``load_backbone`` returns it.
        options: which savings are on.
        backend: of the ops; None is the fastest.
    """

    def __init__(self, backbone: nn.Module, options: FastOptions, backend: str | None) -> None:
        self.backbone: Any = backbone
        self.options = options
        self.backend = backend
        self._shared = _shared_of(backbone)
        self._prompts: dict[int, tuple[Tensor, BlockWeights, tuple[Tensor, Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def family(self) -> Family:
        """What the backbone's class is made of."""
        return self._shared.family

    @property
    def unsupported_reason(self) -> str | None:
        """Why the eager path runs instead of the engine, by the backbone as it is now; or None."""
        self.follow()
        return self.refused

    @property
    def refused(self) -> str | None:
        """``unsupported_reason`` as ``follow`` saw it last."""
        return self._shared.unsupported_reason

    def follow(self, images: int = 1) -> None:
        """Notice what has changed in the backbone, before a forward of so many images."""
        # nothing is copied in what a compiler or torch.jit.trace records
        if not (torch.compiler.is_compiling() or leaves_this_package()):
            self._shared.follow(images)

    @property
    def embed_unsupported_reason(self) -> str | None:
        """Why timm's own code embeds the images; None where one op can."""
        # at every call: a replaced method or another size leaves no trace in the modules
        return self._shared.unsupported_reason or self._shared.family.embed_unsupported_reason(
            self.backbone
        )

    def look_at_all(self) -> None:
        """Let the next forward look at all bytes of the weights, not at a part of them."""
        self._shared.look_at_all = True

    def refresh(self) -> None:
        """Forget everything that was made from the weights, for all models on this backbone."""
        self._shared.refresh()
        self.forget_prompts()

    def forget_prompts(self) -> None:
        """Keep no keys and values of the last inference's prompts."""
        self._prompts.clear()

    @property
    def folds(self) -> bool:
        """Whether copies of the weights are made: not where a compiler or torch.jit.trace records
        what runs, nor where it could not be seen that the weights were written."""
        return self.casts and self.copies_unsupported_reason is None

    @property
    def casts(self) -> bool:
        """Whether the matrices come in the dtype that is asked for, cast again where no copies are
        kept: our own backward does not run under autocast. A compiler sees autocast instead."""
        return not (torch.compiler.is_compiling() or leaves_this_package())

    @property
    def copies_unsupported_reason(self) -> str | None:
        """Why no copies of the weights are made, outside of a compiler; None where they are."""
        return self._shared.copies_unsupported_reason

    def weights(self, dtype: torch.dtype) -> list[BlockWeights]:
        """One entry a block: folded in ``dtype``, or timm's own tensors where not ``folds``.

        Raises:
            RuntimeError: the options name weights in 8 bits, which cannot be used here.
        """
        return self._weights(dtype, self._linear(dtype))

    def _weights(self, dtype: torch.dtype, linear: type[FrozenLinear]) -> list[BlockWeights]:
        if not self.folds:
            backend_for = partial(self.backend_for, dtype=dtype)
            blocks_ = range(len(self.backbone.blocks))
            live = [from_timm(self.family, self.backbone, i, backend_for) for i in blocks_]
            if self.casts and dtype != self.dtype:
                live = [w.with_linears(partial(_cast, dtype=dtype)) for w in live]
            return multiplied_by(linear, live)
        backends = {op: self.backend_for(op, dtype) for op in ("frozen_linear", "add_layer_norm")}
        return self._shared.fold(self.options, dtype, backends, linear)

    def _linear(self, dtype: torch.dtype) -> type[FrozenLinear]:
        """What multiplies by the weights: in 8 bits where that is wanted, without gradients."""
        kind = self.options.weights
        recorded = torch.compiler.is_compiling() or leaves_this_package()
        if kind != "float" and not torch.is_grad_enabled() and not recorded:
            if reason := self.weights_unsupported_reason(dtype):
                raise RuntimeError(f"FastOptions(weights={kind!r}): {reason}. Use weights='float'")
            return quantized.LINEARS[kind]
        pack = self.options.packed and self.folds and self.packed_unsupported_reason(dtype) is None
        return PackedLinear if pack else FrozenLinear

    def weights_unsupported_reason(self, dtype: torch.dtype) -> str | None:
        """Why weights in 8 bits cannot be used, if they are wanted; None where they can."""
        kind = self.options.weights
        if kind == "float":
            return None
        if kind == "int8" and self.copies_unsupported_reason is not None:
            return self.copies_unsupported_reason
        return quantized.unsupported_reason(kind, self.device, dtype, self.backbone)

    def prompt_keys_values(self, i: int, w: BlockWeights, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values in block ``i``; in inference on CPU those of the last call
        where the prompts are still the same, which is cheaper to see than to compute."""
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed()
        if plain or not self.folds or prompts.ndim != 2:
            return blocks.prompt_keys_values(w, prompts)
        if i in self._prompts:
            seen, by, found = self._prompts[i]
            if by is w and seen.dtype == prompts.dtype and torch.equal(seen, prompts):
                return found
        found = blocks.prompt_keys_values(w, prompts)
        self._prompts[i] = prompts.clone(), w, found
        return found

    def backend_for(self, op: str, dtype: torch.dtype) -> str:
        """Which backend runs an op: the named one if it can, else the fastest with a kernel, else
        "reference": eager PyTorch, which compilers see through."""
        # a compiler looks at nothing that has changed: a backbone may have moved before it came
        known, key = self._shared.backends, (op, self.device, dtype, self.backend)
        if key not in known:
            sizes = self.sizes(op)
            known[key] = dispatch.resolve(op, self.device, (dtype,), sizes, self.backend)[0]
        return known[key]

    def sizes(self, op: str) -> dict[str, int]:
        """What ``dispatch.resolve`` wants to know of this backbone."""
        backbone = self.backbone
        if op.startswith("prompt_attention"):
            return {"head_width": heads(backbone.blocks[0])[1]}
        if op == "prompted_patch_embed":
            return {"channels": backbone.patch_embed.proj.in_channels}
        return {"columns": backbone.embed_dim} if op == "add_layer_norm" else {}

    @property
    def attention_unsupported_reason(self) -> str | None:
        """Why ``prompt_attention`` cannot be the attention of this backbone; None where it can."""
        return "a relative position bias is added to its scores" if self._shared.biased else None

    def fuses_attention(self, dtype: torch.dtype) -> bool:
        """Whether attention with prompts runs by a kernel; a named backend that cannot run is
        left to say why itself."""
        if self.attention_unsupported_reason is not None:
            return False
        named = self.backend not in (None, "reference")
        return named or self.backend_for("prompt_attention", dtype) != "reference"

    def packed_unsupported_reason(self, dtype: torch.dtype) -> str | None:
        """Why weights are not packed in this dtype, wanted or not; None where they can be."""
        if self.backend == "reference":
            return "backend='reference' names eager PyTorch"
        if self.copies_unsupported_reason is not None:
            return self.copies_unsupported_reason
        return packed.unsupported_reason(self.device, dtype)

    def matrix_bytes(self) -> int:
        """Bytes of the frozen matrices: what a packed copy of them takes."""
        return sum(
            t.nbytes
            for w in self._weights(self.dtype, FrozenLinear)
            for t in w.tensors()
            if t.ndim == 2
        )

    def extra_bytes(self) -> int:
        """Bytes of folded weights that are not the backbone's own tensors, for all models on it."""
        self._weights(self.dtype, FrozenLinear)
        return self._shared.extra_bytes()


def _cast(linear: FrozenLinear, dtype: torch.dtype) -> FrozenLinear:
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return FrozenLinear(linear.weight.to(dtype), bias, linear.backend)
