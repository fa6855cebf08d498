"""What the engine does with a model, in words: each saving, on or off, and why it is off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..ops import dispatch, measured
from . import packed, selfcheck, support
from .engine import ABSORB_ROWS, FastBackbone
from .readout import Readout
from .schedule import PromptSchedule
from .splitting import HOST_BOUND_TOKENS
from .steps import block_steps

_NOT_WANTED = "switched off"
_OPS = {
    "prompted_patch_embed": "embedding",
    "frozen_linear": "linear layers",
    "add_layer_norm": "residual and norm",
}
_MEMORY = {
    "fast": "backward keeps 10 D numbers a token and block",
    "balanced": "backward keeps 6 D numbers a token and block and runs fc1 again",
    "min": "backward keeps 1 D numbers a token and block and runs the block again",
}


def explain(engine: FastBackbone | None, schedule: PromptSchedule, readout: Readout) -> str:
    """A short text about one model.

    Args:
        engine: the engine; None where the model was built without it.
        schedule: which prompts enter where; only kinds, shapes and dtypes are looked at.
        readout: which tokens the head reads.
    """
    if engine is None:
        return "Frozen backbone: timm's own blocks and torch.cat, no savings (fast=False)."
    backbone, cache = engine.backbone, engine.cache
    if (reason := cache.unsupported_reason) is not None:
        return (
            f"Frozen backbone: timm's own blocks and torch.cat, no savings: {reason}; "
            "the fast path only runs block types that it recognizes."
        )
    reads = readout.reads_prompts(schedule, backbone.num_prefix_tokens)
    lines = [f"Frozen backbone: {type(backbone).__name__} of {len(backbone.blocks)} blocks."]
    for name, does, reason in _savings(engine, schedule, readout, reads):
        lines.append(f"  {'on ' if reason is None else 'off'}  {name:<10} {reason or does}")
    if schedule.parts(0).tokens is not None and schedule.position != "add":
        lines.append(f"  prompts of block 0: {_prompts_of_block_0(engine, schedule, reads)}")
    lines.append(f"  memory={engine.options.memory!r}: {_MEMORY[engine.options.memory]}")
    for op, what in _OPS.items():
        lines.append(f"  {what}: {_in_words(cache.backend_for(op, cache.dtype))}")
    if cache.attention_unsupported_reason is not None:
        lines.append(f"  attention: eager PyTorch, because {cache.attention_unsupported_reason}")
    else:
        sizes = cache.sizes("prompt_attention")
        runs = backend_of("prompt_attention", cache.device, cache.dtype, engine.backend, sizes)
        if cache.device.type in dispatch.PREFER_OVER_SDPA:
            lines.append(f"  attention: {runs}")
        elif _kv_only_blocks(engine, schedule, reads):
            lines.append(f"  attention with prompts: {runs}")
    lines += [
        f"  kernels: {measured.note(cache.device, cache.dtype)}",
        "  torch.compile: the same without fold, biases, packed and weights",
        "  torch.export: without these, and in PyTorch's own ops",
    ]
    return "\n".join(lines)


def _prompts_of_block_0(engine: FastBackbone, schedule: PromptSchedule, reads: bool) -> str:
    embedding = engine.embedding
    first = block_steps(schedule, len(engine.backbone.blocks), reads)[0]
    if apart := embedding.prompts_apart(schedule, first, engine.cache.device.type):
        return f"not written by the embedding's op: {apart}"
    written = "written by the embedding's op into its buffer"
    mixed = embedding.mixed_apart(schedule)
    return written if mixed is None else f"{written}, not mixed by it: {mixed}"


def _savings(
    engine: FastBackbone, schedule: PromptSchedule, readout: Readout, reads: bool
) -> Iterator[tuple[str, str, str | None]]:
    """Name, what it does here, and why it is off or None."""
    options, depth, rows = engine.options, len(engine.backbone.blocks), readout.rows
    off = lambda wanted, reason=None: reason if wanted else _NOT_WANTED
    tokens = schedule.position != "add" and bool(schedule.entries)

    alone = _kv_only_blocks(engine, schedule, reads)
    own = (schedule.parts(i).tokens for i in alone)
    shared = all(isinstance(t, Tensor) and t.ndim == 2 for t in own)
    once = "once a batch" if shared else "for each image"
    reason = None if alone else "every block reads what the prompts became before"
    yield (
        "kv_only",
        f"prompts of {len(alone)} blocks are keys and values only, computed {once}",
        off(options.kv_only, reason),
    )

    reason = None if rows is not None and not reads else "the pooling reads all tokens"
    yield "last_rows", f"block {depth - 1} computes {rows} row(s)", off(options.last_rows, reason)

    family = engine.cache.family
    reason = reason or support.absorb_unsupported_reason(family, engine.backbone, depth - 1)
    if reason is None and rows is not None and rows > ABSORB_ROWS:
        reason = f"{rows} rows are read, it pays up to {ABSORB_ROWS}"
    above = (
        ""
        if engine.cache.copies_unsupported_reason is None
        else f" above {HOST_BOUND_TOKENS} tokens"
    )
    yield (
        "absorb",
        f"block {depth - 1} forms no keys and values{above}",
        off(options.absorb and options.last_rows, reason),
    )

    reason = None if tokens else "every token gets a gradient from below"
    first = schedule.first if tokens else 0
    yield "first", f"no gradient below the prompts of block {first}", off(options.first, reason)

    extra = engine.cache.extra_bytes() / 1e6
    yield (
        "fold",
        f"norms, LayerScale and attention scale are in the weights (+{extra:.1f} MB)",
        off(options.fold, engine.cache.copies_unsupported_reason),
    )
    yield (
        "biases",
        "value biases are moved, dead key biases dropped",
        off(options.biases, engine.cache.copies_unsupported_reason),
    )
    copy = engine.cache.matrix_bytes() / 1e6
    yield (
        "packed",
        f"frozen weights are packed for {packed.gemm_library()}'s products (+{copy:.1f} MB for "
        "each direction)",
        off(options.packed, engine.cache.packed_unsupported_reason(engine.cache.dtype)),
    )
    reason = engine.cache.weights_unsupported_reason(engine.cache.dtype)
    wanted = options.weights != "float"
    error = selfcheck.weights_error(engine) if wanted and reason is None else 0.0
    yield (
        "weights",
        f"{options.weights} in inference, float where gradients are enabled; the first token of a "
        f"random image changes by {error:.1e} of its norm",
        off(wanted, reason),
    )
    reason = engine.cache.embed_unsupported_reason
    if engine.cache.backend_for("prompted_patch_embed", engine.cache.dtype) == "reference":
        reason = (
            reason or f"no kernel runs it in {engine.cache.dtype} on {engine.cache.device.type}"
        )
    yield (
        "embed",
        "patches, prefix and position embedding are computed in one op",
        off(options.embed, reason),
    )


def _kv_only_blocks(engine: FastBackbone, schedule: PromptSchedule, reads: bool) -> list[int]:
    """Blocks whose prompt outputs are discarded."""
    steps = block_steps(schedule, len(engine.backbone.blocks), reads)
    return [i for i, step in enumerate(steps) if step.kv_only and step.inserts]


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
    return _in_words(name)


def _in_words(backend: str) -> str:
    return "eager PyTorch" if backend == "reference" else f"backend {backend}"
