"""What the engine does with a model, in words: each saving, on or off, and why it is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..ops import dispatch
from . import packed, support
from .engine import ABSORB_ROWS, FastBackbone
from .schedule import PromptSchedule

_NOT_WANTED = "switched off"


def explain(
    engine: FastBackbone | None, schedule: PromptSchedule, rows: int | None, prompts_read: bool
) -> str:
    """A short text about one model.

    Args:
        engine: the engine; None where the model was built without it.
        schedule: which prompts enter where; only the shapes are looked at.
        rows: how many leading tokens the head reads; None all.
        prompts_read: whether the head reads prompts.
    """
    if engine is None:
        return "Frozen backbone: timm's own blocks and torch.cat, no savings (fast=False)."
    backbone = engine.backbone
    refusal = engine.cache.refusal
    if refusal is not None:
        return (
            f"Frozen backbone: timm's own blocks and torch.cat, no savings, because "
            f"{refusal}; the engine takes nothing that it does not know to the last module."
        )
    lines = [f"Frozen backbone: {type(backbone).__name__} of {len(backbone.blocks)} blocks."]
    for name, does, reason in _savings(engine, schedule, rows, prompts_read):
        lines.append(f"  {'on ' if reason is None else 'off'}  {name:<10} {reason or does}")
    reads = prompts_read and schedule.keep and engine.reads_prompts(schedule, rows)
    if schedule.parts(0).tokens is not None and schedule.position != "add":
        apart = engine.prompts_apart(schedule, reads, engine.cache.device.type)
        where = (
            "written by the embedding's op into its buffer"
            if apart is None
            else (f"not written by the embedding's op: {apart}")
        )
        lines.append(f"  prompts of block 0: {where}")
    lines.append(f"  memory={engine.options.memory!r}: {_MEMORY[engine.options.memory]}")
    for op, what in _OPS.items():
        name = engine.cache.backend_for(op, engine.cache.dtype)
        lines.append(f"  {what}: {'plain torch' if name == 'reference' else f'backend {name}'}")
    cache = engine.cache
    sizes = cache.sizes("prompt_attention")
    runs = backend_of("prompt_attention", cache.device, cache.dtype, engine.backend, sizes)
    if engine.cache.device.type in dispatch.BEATS_PLAIN_ATTENTION:
        lines.append(f"  attention: {runs}")
    elif _keys_and_values_only(schedule, len(backbone.blocks)):
        lines.append(f"  attention with prompts: {runs}")
    lines += [
        "  torch.compile: the same without fold, biases and packed",
        "  torch.export: without these, and in plain torch",
    ]
    return "\n".join(lines)


_OPS = {
    "prompted_patch_embed": "embedding",
    "frozen_linear": "matrix products",
    "add_layer_norm": "residual and norm",
}
_MEMORY = {
    "fast": "backward keeps 10 D numbers a token and block",
    "balanced": "backward keeps 6 D numbers a token and block and runs fc1 again",
    "min": "backward keeps 1 D numbers a token and block and runs the block again",
}


def _savings(
    engine: FastBackbone, schedule: PromptSchedule, rows: int | None, prompts_read: bool
) -> Iterator[tuple[str, str, str | None]]:
    """Name, what it does here, and why it is off or None."""
    options, depth = engine.options, len(engine.backbone.blocks)
    off = lambda wanted, reason=None: reason if wanted else _NOT_WANTED
    tokens = schedule.position != "add" and bool(schedule.entries)

    alone = _keys_and_values_only(schedule, depth)
    shared = (isinstance(t, Tensor) and t.ndim == 2 for t in map(_tokens_of(schedule), alone))
    per_image = not all(shared)
    once = "for each image" if per_image else "once a batch"
    reason = None if alone else "every block reads what the prompts became before"
    yield (
        "kv_only",
        f"prompts of {len(alone)} blocks are keys and values only, computed {once}",
        off(options.kv_only, reason),
    )

    few = rows is not None and not (prompts_read and rows > engine.backbone.num_prefix_tokens)
    reason = None if few else "the pooling reads all tokens"
    yield "last_rows", f"block {depth - 1} computes {rows} row(s)", off(options.last_rows, reason)

    rope = getattr(engine.backbone, "rope", None) is not None
    reason = reason or support.absorb_refusal(engine.backbone.blocks[-1], rope)
    if reason is None and rows is not None and rows > ABSORB_ROWS:
        reason = f"{rows} rows are read, it pays up to {ABSORB_ROWS}"
    yield (
        "absorb",
        f"block {depth - 1} forms no keys and values",
        off(options.absorb and options.last_rows, reason),
    )

    reason = None if tokens else "every token gets a gradient from below"
    first = schedule.first if tokens else 0
    yield "first", f"no gradient below the prompts of block {first}", off(options.first, reason)

    extra = engine.cache.extra_bytes() / 1e6
    yield (
        "fold",
        f"norms, LayerScale and attention scale are in the weights (+{extra:.1f} MB)",
        off(options.fold, engine.cache.copies_refusal),
    )
    yield (
        "biases",
        "value biases are moved, dead key biases dropped",
        off(options.biases, engine.cache.copies_refusal),
    )
    copy = engine.cache.matrix_bytes() / 1e6
    yield (
        "packed",
        f"frozen weights are packed for {packed.library()}'s products (+{copy:.1f} MB for each "
        "direction)",
        off(options.packed, engine.cache.packed_refusal(engine.cache.dtype)),
    )
    reason = engine.cache.embed_refusal
    if engine.cache.backend_for("prompted_patch_embed", engine.cache.dtype) == "reference":
        reason = (
            reason or f"no kernel runs it in {engine.cache.dtype} on {engine.cache.device.type}"
        )
    yield (
        "embed",
        "patches, prefix and position embedding are computed in one op",
        off(options.embed, reason),
    )


def _keys_and_values_only(schedule: PromptSchedule, depth: int) -> set[int]:
    """Blocks whose prompt outputs are discarded."""
    if schedule.position == "add":
        return set()
    entries = schedule.entries
    blocks = {i for i in entries if i + 1 in entries or i == depth - 1}
    blocks |= set() if schedule.keep or not entries else {schedule.last}
    return {i for i in blocks if schedule.parts(i).tokens is not None}


def _tokens_of(schedule: PromptSchedule) -> Callable[[int], object]:
    return lambda i: schedule.parts(i).tokens


def backend_of(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    sizes: Mapping[str, int] | None = None,
) -> str:
    """Which backend runs an op on such tensors, in words; of a named one that cannot, why."""
    name, reason = dispatch.resolve(op, device, (dtype,), sizes, backend)
    if backend is not None and reason is not None:
        return reason
    return "plain torch" if name == "reference" else f"backend {name}"
