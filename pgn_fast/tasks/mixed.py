"""Images of different tasks through one frozen backbone, in one batch.

The GEMMs of a block do not care which task a token belongs to: they run once, over the rows of all
images packed one after the other. Attention runs once for every *group*: the images whose tasks put
the same number of prompts into every block, so that no row is padded to a longer one's length.

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
from ..backbone.schedule import Mixture, PromptSchedule
from ..backbone.weights import BlockWeights

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """What one task does in one block.

    Attributes:
        enters: something enters here, so that prompts in the sequence leave before the block.
        alone: what the block makes of prompts is not used: they enter as keys and values only.
        length: prompt tokens that enter; None: a function says it when it runs.
        keys: keys and values that come without tokens.
    """

    enters: bool
    alone: bool
    length: int | None
    keys: int


@dataclass
class Part:
    """The images of one task in a batch.

    Attributes:
        rows: their places in the batch.
        schedule: the task's prompts, for these images.
        reads: the task's head reads prompts that are left after the last block.
        outputs: how many leading tokens the head reads; None: all.
        ready: block -> keys and values (h, P, d) of prompts that enter it alone, made beforehand.
    """

    rows: list[int]
    schedule: PromptSchedule
    reads: bool = False
    outputs: int | None = None
    ready: Mapping[int, KeysValues] = field(default_factory=dict)

    def steps(self, depth: int) -> tuple[Step, ...]:
        """What happens in each block."""
        schedule, found = self.schedule, []
        for i in range(depth):
            tokens, keys = schedule.parts(i)
            length: int | None = 0
            if isinstance(tokens, Mixture):
                length = tokens.logits.shape[1]
            elif isinstance(tokens, Tensor):
                length = tokens.shape[-2]
            elif tokens is not None:
                length = None
            leaves = i + 1 in schedule.entries or (i == schedule.last and not schedule.keep)
            found.append(
                Step(
                    enters=i in schedule.entries,
                    alone=leaves or (i == depth - 1 and not self.reads),
                    length=length,
                    keys=0 if keys is None else keys.k.shape[-2],
                )
            )
        return tuple(found)


@dataclass
class Group:
    """Parts that do the same in every block, their images one after the other."""

    parts: list[Part]
    steps: tuple[Step, ...]
    reads: bool
    outputs: int | None
    first: int  # the block from which its tokens are its own

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
    for part in parts:
        steps = part.steps(depth)
        start = min(part.schedule.first, depth) if first is None else first
        # a function's number of prompts is open, so its part stays alone
        open_ = id(part) if any(step.length is None for step in steps) else None
        order = part.schedule.position if part.reads else None
        key = (steps, part.reads, part.outputs, order, start, open_)
        if key in found:
            found[key].parts.append(part)
        else:
            found[key] = Group([part], steps, part.reads, part.outputs, start)
    return list(found.values())


class MixedBackbone:
    """Runs groups of images by an engine's own blocks.

    Args:
        engine: of the backbone; its options and backend are used.
    """

    def __init__(self, engine: FastBackbone) -> None:
        self.engine = engine

    @property
    def backbone(self) -> Any:
        return self.engine.backbone

    @property
    def depth(self) -> int:
        """How many blocks the backbone has."""
        return len(self.backbone.blocks)

    def weights(self) -> list[BlockWeights]:
        """The blocks' weights as the engine uses them now; another list after they changed."""
        return self.engine.cache.weights(self._dtype())

    def ready(self, schedule: PromptSchedule, reads: bool) -> dict[int, KeysValues]:
        """Keys and values of a schedule's shared prompts, wherever they enter alone."""
        weights, made = self.weights(), {}
        for i, step in enumerate(Part([], schedule, reads).steps(self.depth)):
            tokens = schedule.parts(i).tokens
            if step.alone and isinstance(tokens, Tensor) and tokens.ndim == 2:
                entering = self._as_block_gets(i, tokens.to(self.engine.cache.dtype))
                made[i] = blocks.prompt_keys_values(weights[i], entering)
        return made

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images to tokens (B, T, D) as block 0 gets them, and the rotary embedding."""
        x, rope = self.engine.embed(images, PromptSchedule("append", {}))
        return self._norm_pre(x), rope

    def below(self, x: Tensor, rope: Tensor | None, starts: Sequence[int]) -> dict[int, Tensor]:
        """The tokens (B, T, D) that enter each of these blocks while no prompt has come yet."""
        kept, weights = {}, self.weights()
        bare = Part(list(range(x.shape[0])), PromptSchedule("append", {}), reads=True)
        (alone,) = group([bare], self.depth, first=0)
        active = {0: x}
        for i in range(max(starts) + 1):
            if i in starts:
                kept[i] = active[0]
            if i < max(starts):
                self._block(i, weights[i], [alone], active, rope)
        return kept

    def run(
        self,
        starts: Mapping[int, Tensor],
        rope: Tensor | None,
        groups: Sequence[Group],
    ) -> list[Tensor]:
        """Every group's tokens after the final norm.

        Args:
            starts: block -> tokens (B, T, D) of the whole batch that enter it.
            rope: as ``embed`` gives it.
            groups: of ``group``; each begins at a block in ``starts``.

        Returns:
            For each group (B, T, D), or its leading ``outputs`` of them; where prompts are read
            (B, S + P + N, D) in their schedule's order.
        """
        weights, active = self.weights(), {}
        num_tokens = next(iter(starts.values())).shape[1]
        with torch.autocast(self.engine.cache.device.type, enabled=False):
            for i in range(self.depth):
                for g, one in enumerate(groups):
                    if one.first == i:
                        active[g] = starts[i][one.rows]
                    if g in active:
                        active[g] = self._enter(i, one, active[g], num_tokens)
                if active:
                    self._block(i, weights[i], groups, active, rope)
            for g, one in enumerate(groups):
                x = active[g] if g in active else starts[self.depth][one.rows]
                active[g] = self._finish(one, x, num_tokens)
        return [active[g] for g in range(len(groups))]

    def _dtype(self) -> torch.dtype:
        device, dtype = self.engine.cache.device.type, self.engine.cache.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return dtype

    def _norm_pre(self, x: Tensor) -> Tensor:
        return self.engine.cache.family.norm_pre(self.backbone)(x)

    def _as_block_gets(self, i: int, prompts: Tensor) -> Tensor:
        return self._norm_pre(prompts) if i == 0 else prompts

    def _enter(self, i: int, one: Group, x: Tensor, num_tokens: int) -> Tensor:
        """Prompts leave the sequence, and others join it, before block ``i``."""
        step = one.steps[i]
        if step.enters:
            x = x[:, :num_tokens]
        if step.length == 0 or step.alone:
            return x
        prompts = [self._tokens(i, part, x[at]) for part, at in one.slices()]
        return torch.cat([x, torch.cat(prompts)], dim=1)

    def _tokens(self, i: int, part: Part, x: Tensor) -> Tensor:
        """The prompt tokens of one part that enter block ``i``: (B, P, D)."""
        tokens = part.schedule.parts(i).tokens
        assert tokens is not None
        prompts = prompt_tokens(i, tokens, x, self.engine.backend)
        return self._as_block_gets(i, prompts).expand(x.shape[0], -1, -1)

    def _block(
        self,
        i: int,
        w: BlockWeights,
        groups: Sequence[Group],
        active: dict[int, Tensor],
        rope: Tensor | None,
    ) -> None:
        """Block ``i`` on the tokens of every active group, in place of them."""
        rope = self.engine.cache.family.block_rope(self.backbone, rope, i)
        last = i == self.depth - 1
        kept, outputs = {}, {}
        whole = [g for g in active if not last or groups[g].outputs is None]
        if whole:
            packed = torch.cat([active[g].flatten(0, 1) for g in whole])[None]  # (1, R, D)
            projected = blocks.project(w, packed, packed.shape[1])  # (1, h, R, d) each
            begin = 0
            for g in whole:
                shape = active[g].shape[:2]
                end = begin + shape[0] * shape[1]
                own = [t[0, :, begin:end].unflatten(1, shape).transpose(0, 1) for t in projected]
                outputs[g] = self._attend(i, w, groups[g], active[g], own, rope)
                kept[g], begin = active[g], end
        for g in sorted(active.keys() - set(whole)):
            rows = groups[g].outputs
            assert rows is not None
            outputs[g] = self._attend_few(i, w, groups[g], active[g], rope, rows)
            kept[g] = active[g][:, :rows]
        x, o = (torch.cat([t[g].flatten(0, 1) for g in kept])[None] for t in (kept, outputs))
        y = recompute.finish_block(w, x, o, "fast")[0]
        begin = 0
        for g, x in kept.items():
            end = begin + x.shape[0] * x.shape[1]
            active[g] = y[begin:end].unflatten(0, x.shape[:2])
            begin = end

    def _attend(
        self,
        i: int,
        w: BlockWeights,
        one: Group,
        x: Tensor,
        projected: Sequence[Tensor],
        rope: Tensor | None,
    ) -> Tensor:
        """One group's attention: (B, h, M, d) queries to (B, M, A)."""
        q, k, v = projected
        start = self.backbone.num_prefix_tokens
        q, k = (blocks.rotate(t, rope, start, w.rotate_half) for t in (q, k))
        keys = self._keys(i, w, one, x)
        alone = keys is not None
        cache = self.engine.cache
        backend = self.engine.backend if alone else cache.backend_for("prompt_attention", q.dtype)
        return blocks.attend(w, q, k, v, keys, self.engine.fuses(q, alone), backend)

    def _attend_few(
        self, i: int, w: BlockWeights, one: Group, x: Tensor, rope: Tensor | None, rows: int
    ) -> Tensor:
        """The same of the last block, for the leading rows alone."""
        if self.engine.absorbs(i, rows) and one.steps[i].keys == 0:
            prompts = None
            if one.steps[i].enters and one.steps[i].length != 0:
                prompts = torch.cat([self._tokens(i, part, x[at]) for part, at in one.slices()])
            return blocks.attend_absorbed(w, x, rows, prompts)
        return self._attend(i, w, one, x, blocks.project(w, x, rows), rope)

    def _keys(self, i: int, w: BlockWeights, one: Group, x: Tensor) -> KeysValues | None:
        """Keys and values beside those of the sequence: (B, h, P, d), or (h, P, d) of one task."""
        step = one.steps[i]
        joins = step.enters and step.alone and step.length != 0
        if not joins and step.keys == 0:
            return None
        found = []
        for part, at in one.slices():
            own = None
            if joins and i in part.ready:
                own = part.ready[i]
            elif joins:
                own = blocks.prompt_keys_values(w, self._tokens(i, part, x[at]))
            free = part.schedule.parts(i).keys
            other = None if free is None else blocks.free_keys_values(w, free)
            pair = other if own is None else blocks.join(own, other)
            assert pair is not None
            found.append(pair)
        if len(found) == 1:
            return found[0]
        sizes = [len(part.rows) for part in one.parts]
        k, v = (
            torch.cat([t.expand(n, *t.shape[-3:]) for t, n in zip(side, sizes, strict=True)])
            for side in zip(*found, strict=True)
        )
        return k, v

    def _finish(self, one: Group, x: Tensor, num_tokens: int) -> Tensor:
        if one.reads and one.parts[0].schedule.position == "prepend":
            first = self.backbone.num_prefix_tokens
            x = torch.cat([x[:, :first], x[:, num_tokens:], x[:, first:num_tokens]], dim=1)
        elif not one.reads:
            x = x[:, :num_tokens]
        return self.backbone.norm(x)
