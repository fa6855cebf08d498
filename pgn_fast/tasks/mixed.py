"""Images of different tasks through one frozen backbone, in one batch.

The GEMMs of a block do not care which task a token belongs to: they run once, over the rows of all
images packed one after the other. Attention runs once for every *group*: the images with the same
number of tokens in the sequence of every block. Prompts whose outputs are discarded (VPT-Deep) are
no tokens of the sequence but keys and values beside it, so that tasks with any numbers of them
share a group: ``keys`` lays their rows one after the other, and ``prompt_attention`` is told which
rows each image sees. Nothing is padded to the longest task's length.

Letters: B images of a part or group, T tokens that are no prompts, P prompt tokens, D width,
h heads of width d, A = h d, R rows of all images together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backbone import blocks, recompute
from ..backbone.eager import prompt_tokens
from ..backbone.engine import FastBackbone
from ..backbone.schedule import NO_PROMPTS, PromptSchedule
from . import keys
from .steps import Step, sequence_of


@dataclass
class Part:
    """The images of one task in a batch.

    Attributes:
        rows: their places in the batch.
        schedule: the task's prompts, for these images.
        steps: ``steps_of`` the schedule.
        reads: the task's head reads prompts that are left after the last block.
        outputs: how many leading tokens the head reads; None: all.
        ready: block -> keys and values (P, 2, h, d) of prompts that enter it alone, if they are
            made beforehand.
    """

    rows: list[int]
    schedule: PromptSchedule
    steps: tuple[Step, ...]
    reads: bool = False
    outputs: int | None = None
    ready: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass
class Group:
    """Parts with equally long sequences in every block, their images one after the other."""

    parts: list[Part]
    sequence: tuple[tuple[bool, int | None], ...]  # sequence_of every part's steps
    reads: bool
    outputs: int | None
    first: int  # the block from which its tokens are its own
    ranges: dict[Any, Tensor] = field(default_factory=dict)  # see keys.side_by_side

    @property
    def rows(self) -> list[int]:
        """The places of its images in the batch."""
        return [row for part in self.parts for row in part.rows]

    def slices(self) -> Iterator[tuple[Part, slice]]:
        """Each part, and where its images stand in the group."""
        begin = 0
        for part in self.parts:
            yield part, slice(begin, begin + len(part.rows))
            begin += len(part.rows)


def group(parts: Iterable[Part], depth: int, first: int | None = None) -> list[Group]:
    """Put parts together that can share attention.

    Args:
        depth: blocks of the backbone.
        first: the block from which all tokens are run; None: each from its first prompt.
    """
    found: dict[Any, Group] = {}
    # parts of one length beside each other: where no kernel takes ragged rows, they run together
    for part in sorted(parts, key=lambda part: [step.length or 0 for step in part.steps]):
        start = first
        if start is None:
            start = min(part.schedule.first, depth) if part.schedule.entries else depth
        sequence = sequence_of(part.steps)
        # a function's number of prompts is open, so where they join the sequence it stays alone
        open_ = id(part) if any(length is None for _, length in sequence) else None
        order = part.schedule.position if part.reads else None
        key = (sequence, part.reads, part.outputs, order, start, open_)
        if key in found:
            found[key].parts.append(part)
        else:
            found[key] = Group([part], sequence, part.reads, part.outputs, start)
    return list(found.values())


class MixedBackbone:
    """Runs groups of images by an engine's own blocks, with the weights as they are now.

    Args:
        engine: of the backbone; its options and backend are used.

    Attributes:
        weights: of every block, as the engine uses them.
    """

    def __init__(self, engine: FastBackbone) -> None:
        self.engine = engine
        self.backbone: Any = engine.backbone
        self.depth = len(self.backbone.blocks)
        device, dtype = engine.cache.device.type, engine.cache.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        self.weights = engine.cache.weights(dtype)

    def ready(self, schedule: PromptSchedule, steps: Sequence[Step]) -> dict[int, Tensor]:
        """Keys and values (P, 2, h, d) of a schedule's shared prompts where they enter alone."""
        made = {}
        for i, step in enumerate(steps):
            tokens = schedule.parts(i).tokens
            if step.alone and isinstance(tokens, Tensor) and tokens.ndim == 2:
                entering = self._as_block_gets(i, tokens.to(self.engine.cache.dtype))
                pair = blocks.prompt_keys_values(self.weights[i], entering)
                made[i] = keys.rows_of(pair).contiguous()
        return made

    def run(
        self,
        starts: Mapping[int, Tensor],
        rope: Tensor | None,
        groups: Sequence[Group],
    ) -> list[Tensor]:
        """Every group's tokens after the final norm.

        Args:
            starts: block -> tokens (B, T, D) of the whole batch that enter it.
            rope: as the engine's ``embed`` gives it.
            groups: of ``group``; each begins at a block in ``starts``.

        Returns:
            For each group (B, T, D), or its leading ``outputs`` of them; where prompts are read
            (B, S + P + N, D) in their schedule's order.
        """
        active: dict[int, Tensor] = {}
        num_tokens = next(iter(starts.values())).shape[1]
        with torch.autocast(self.engine.cache.device.type, enabled=False):
            for i in range(self.depth):
                for g, one in enumerate(groups):
                    if one.first == i:
                        active[g] = _chosen(starts[i], one.rows)
                    if g in active:
                        active[g] = self._enter(i, one, active[g], num_tokens)
                if active:
                    self._block(i, groups, active, rope)
            for g, one in enumerate(groups):
                if g not in active:  # no prompts at all
                    active[g] = _chosen(starts[self.depth][:, : one.outputs], one.rows)
                active[g] = self._finish(one, active[g], num_tokens)
        return [active[g] for g in range(len(groups))]

    def _norm_pre(self, x: Tensor) -> Tensor:
        return self.engine.cache.family.norm_pre(self.backbone)(x)

    def _as_block_gets(self, i: int, prompts: Tensor) -> Tensor:
        return self._norm_pre(prompts) if i == 0 else prompts

    def _enter(self, i: int, one: Group, x: Tensor, num_tokens: int) -> Tensor:
        """Prompts leave the sequence, and others join it, before block ``i``."""
        joins, length = one.sequence[i]
        if joins or length == 0:
            x = x[:, :num_tokens]
        if not joins:
            return x
        prompts = [
            self._tokens(i, part, x[at]).expand(len(part.rows), -1, -1) for part, at in one.slices()
        ]
        return torch.cat([x, torch.cat(prompts)], dim=1)

    def _tokens(self, i: int, part: Part, x: Tensor) -> Tensor:
        """The prompt tokens of one part that enter block ``i``: (P, D) or (B, P, D)."""
        tokens = part.schedule.parts(i).tokens
        assert tokens is not None
        return self._as_block_gets(i, prompt_tokens(i, tokens, x, self.engine.backend))

    def _block(
        self, i: int, groups: Sequence[Group], active: dict[int, Tensor], rope: Tensor | None
    ) -> None:
        """Block ``i`` on the tokens of every active group, in place of them."""
        rope = self.engine.cache.family.block_rope(self.backbone, rope, i)
        w, last = self.weights[i], i == self.depth - 1
        kept, outputs = {}, {}
        whole = [g for g in active if not last or groups[g].outputs is None]
        if whole:
            packed = _packed([active[g] for g in whole])[None]  # (1, R, D)
            projected = blocks.project(w, packed, packed.shape[1])  # (1, h, R, d) each
            begin = 0
            for g in whole:
                shape = active[g].shape[:2]
                end = begin + shape[0] * shape[1]
                own = [t[0, :, begin:end].unflatten(1, shape).transpose(0, 1) for t in projected]
                outputs[g] = self._attend(i, groups[g], active[g], own, rope)
                kept[g], begin = active[g], end
        for g in sorted(active.keys() - set(whole)):
            rows = groups[g].outputs
            assert rows is not None
            outputs[g] = self._attend_few(i, groups[g], active[g], rope, rows)
            kept[g] = active[g][:, :rows]
        x, o = (_packed([t[g] for g in kept])[None] for t in (kept, outputs))
        y = recompute.finish_block(w, x, o, "fast")[0]
        begin = 0
        for g, x in kept.items():
            end = begin + x.shape[0] * x.shape[1]
            active[g] = y[begin:end].unflatten(0, x.shape[:2])
            begin = end

    def _attend(
        self, i: int, one: Group, x: Tensor, projected: Sequence[Tensor], rope: Tensor | None
    ) -> Tensor:
        """One group's attention: (B, h, M, d) queries to (B, M, A)."""
        w, engine, (q, k, v) = self.weights[i], self.engine, projected
        start = self.backbone.num_prefix_tokens
        q, k = (blocks.rotate(t, rope, start, w.rotate_half) for t in (q, k))
        found = self._keys(i, one, x)
        if all(rows is None for rows in found):
            backend = engine.cache.backend_for("prompt_attention", q.dtype)
            return blocks.attend(w, q, k, v, None, engine.fuses(q, False), backend)
        fused = engine.fuses(q, True)
        ragged = engine.cache.backend_for("prompt_attention_ragged", q.dtype) != "reference"
        if len(found) > 1 and fused and ragged:
            # on a CPU as fast as a call for each P (bench/bench_tasks.py), to the same bits, and
            # nothing is put together afterwards; where no kernel is preferred, that is below
            sizes = [len(part.rows) for part in one.parts]
            prompts, ranges = keys.side_by_side(found, sizes, one.ranges, q)
            return blocks.attend(w, q, k, v, prompts, fused, engine.backend, ranges)
        done = []
        for at, pair in keys.of_equal_length(found, [at for _, at in one.slices()]):
            done.append(blocks.attend(w, q[at], k[at], v[at], pair, fused, engine.backend))
        return done[0] if len(done) == 1 else torch.cat(done)

    def _attend_few(self, i: int, one: Group, x: Tensor, rope: Tensor | None, rows: int) -> Tensor:
        """The same of the last block, for the leading rows alone."""
        w = self.weights[i]
        absorbed = self.engine.absorbs(i, rows)
        if not absorbed or any(part.steps[i].keys for part in one.parts):
            return self._attend(i, one, x, blocks.project(w, x, rows), rope)
        entering = [
            self._tokens(i, part, x[at]) if part.steps[i].beside else None
            for part, at in one.slices()
        ]
        done = []
        for at, prompts in keys.runs(entering, [at for _, at in one.slices()]):
            done.append(blocks.attend_absorbed(w, x[at], rows, prompts))
        return done[0] if len(done) == 1 else torch.cat(done)

    def _keys(self, i: int, one: Group, x: Tensor) -> list[keys.Rows | None]:
        """Of each part, keys and values beside those of the sequence; None where there are none."""
        w = self.weights[i]
        found: list[keys.Rows | None] = [None] * len(one.parts)
        entering: dict[int, Tensor] = {}
        for n, (part, at) in enumerate(one.slices()):
            if part.steps[i].beside and i in part.ready:
                found[n] = keys.Rows(part.ready[i], part.ready[i].shape[0])
            elif part.steps[i].beside:
                entering[n] = self._tokens(i, part, x[at])
        if entering:  # projected together, whoever they belong to
            together = torch.cat([t.flatten(0, -2) for t in entering.values()])
            rows = keys.rows_of(blocks.prompt_keys_values(w, together))
            counts = [t.shape[:-1].numel() for t in entering.values()]
            for (n, t), own in zip(entering.items(), rows.split(counts), strict=True):
                found[n] = keys.Rows(own, t.shape[-2])
        for n, part in enumerate(one.parts):
            if (free := part.schedule.parts(i).keys) is not None:
                own = keys.Rows.of(blocks.free_keys_values(w, free))
                found[n] = keys.join(found[n], own, len(part.rows))
        return found

    def _finish(self, one: Group, x: Tensor, num_tokens: int) -> Tensor:
        if one.reads and one.parts[0].schedule.position == "prepend":
            first = self.backbone.num_prefix_tokens
            x = torch.cat([x[:, :first], x[:, num_tokens:], x[:, first:num_tokens]], dim=1)
        elif not one.reads:
            x = x[:, :num_tokens]
        return self.backbone.norm(x)


class Below:
    """The tokens of some images that enter each block while no prompt has come, made once each.

    Attributes:
        starts: block -> tokens (B, T, D), of the blocks that were reached.
        rope: the rotary embedding, as the engine's ``embed`` gives it.
    """

    def __init__(self, engine: FastBackbone, images: Tensor) -> None:
        self._engine = engine
        self._embedded, self.rope = engine.embed(images, NO_PROMPTS)
        norm_pre = engine.cache.family.norm_pre(engine.backbone)
        self.starts = {0: norm_pre(self._embedded)}

    def reach(self, firsts: Iterable[int]) -> None:
        """Run up to each of these blocks, from the highest below them that was reached."""
        for i in sorted(set(firsts) - set(self.starts)):
            begin = max(known for known in self.starts if known < i)
            x = self.starts[begin] if begin else self._embedded
            self.starts[i] = self._engine.below(x, self.rope, begin, i)


def _chosen(x: Tensor, rows: list[int]) -> Tensor:
    """x[rows], without a copy where that is x."""
    return x if rows == list(range(x.shape[0])) else x[rows]


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of tensors (B, T, D) one after the other, (R, D); those that lie so already, as the
    block before left them, are not copied."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.flatten(0, 1)
    begin, width = first.storage_offset(), first.shape[-1]
    end = begin
    for x in tensors:
        same = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (x.is_contiguous() and same and x.storage_offset() == end):
            return torch.cat([x.flatten(0, 1) for x in tensors])
        end += x.numel()
    return first.as_strided(((end - begin) // width, width), (width, 1), begin)
