"""The engine: a frozen ViT with prompts, without the work that no output and no gradient needs.

The same numbers as ``eager.encode_eager``, up to rounding. Attention does not depend on the order
of its keys, so prompts that stay in the sequence stand after the patches in here, wherever the
schedule puts them; the order is restored at the end if they are read.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops._register import leaves_this_package, transformed
from . import blocks, recompute, selfcheck, support
from .cache import BackboneCache
from .eager import check_schedule, encode_eager, prompt_tokens
from .embedding import Embedded, Embedding
from .entering import project_whole
from .options import FastOptions
from .readout import EVERYTHING, Readout
from .schedule import NO_PROMPTS, FrozenTokens, PromptSchedule
from .splitting import all_keys_values, is_host_bound, one_product_unsupported_reason
from .steps import BlockInput, BlockStep, block_steps
from .weights import BlockWeights

# rows up to which an absorbed last block is cheaper than its key and value projections: M h D
# against D^2 multiplications a token, with room for the smaller matrices
ABSORB_ROWS = 8


class FastBackbone:
    """Runs a frozen timm vision transformer with prompts.

    The backbone is only read. What is made from its weights is in ``cache``, which follows them;
    under ``torch.compile`` and ``torch.export`` its own weights are used and nothing is folded.

    Args:
        backbone: as ``load_backbone`` returns it.
        options: which savings are on.
        backend: of the ops: "reference", "cpu", "triton" or "cuda"; None is the fastest. An op of
            which the named one has no kernel runs by the fastest; attention with prompts raises.
    """

    def __init__(
        self,
        backbone: nn.Module,
        options: FastOptions | None = None,
        backend: str | None = None,
    ) -> None:
        self._set(backbone, options or FastOptions(), backend)
        if self.cache.unsupported_reason is None and selfcheck.is_cheap(backbone):
            self.check()

    def _set(self, backbone: nn.Module, options: FastOptions, backend: str | None) -> None:
        self.options, self.backend = options, backend
        self.cache = BackboneCache(backbone, options, backend)
        self.embedding = Embedding(self.cache, options, backend)

    @property
    def backbone(self) -> Any:
        return self.cache.backbone

    def __getstate__(self) -> dict[str, Any]:
        """Without the folded weights: a copy or a pickle makes its own."""
        return {name: getattr(self, name) for name in ("backbone", "options", "backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(**state)

    def check(self) -> None:
        """Run a random image here and by the eager path; see ``selfcheck.check``."""
        selfcheck.check(self.in_float())

    def in_float(self) -> FastBackbone:
        """The same engine with the weights as they are, which it is itself where it uses those."""
        if self.options.weights == "float":
            return self
        other = copy.copy(self)
        other._set(self.backbone, replace(self.options, weights="float"), self.backend)
        return other

    def encode(
        self,
        images: Tensor | FrozenTokens,
        schedule: PromptSchedule,
        readout: Readout = EVERYTHING,
        *,
        taken: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Images and prompts to tokens after the final norm.

        Args:
            images: normalized images (B, C, H, W), or uint8 ones; or the tokens that enter a block.
            schedule, readout, taken: as for ``encode_eager``.

        Returns:
            (B, S + P + N, D), (B, S + N, D) without prompts, or (B, rows, D).
        """
        backbone, num_prefix = self.backbone, self.backbone.num_prefix_tokens
        self.cache.follow(images.shape[0])
        if self.cache.refused is not None:
            return encode_eager(
                backbone, images, schedule, readout, backend=self.backend, taken=taken
            )
        check_schedule(backbone, schedule, images.shape[0])
        reads = readout.reads_prompts(schedule, num_prefix)
        rows = readout.rows if self.options.last_rows else None
        steps = block_steps(schedule, len(backbone.blocks), reads, rows)
        embedded = self.embedding(images, schedule, steps[0])
        x = self._run_blocks(embedded, schedule, readout, steps, taken)
        num_tokens = embedded.num_tokens
        if x.shape[1] > num_tokens and schedule.position == "prepend":
            prefix, patches = x[:, :num_prefix], x[:, num_prefix:num_tokens]
            x = torch.cat([prefix, x[:, num_tokens:], patches], dim=1)
        return backbone.norm(x[:, : readout.rows])

    def embed(self, images: Tensor, schedule: PromptSchedule) -> tuple[Tensor, Tensor | None]:
        """What ``eager.embed`` returns."""
        return self.embedding.tokens(images, schedule)

    def below(self, x: Tensor, rope: Tensor | None, begin: int, end: int) -> Tensor:
        """Tokens (B, S + N, D) that enter block ``begin`` to those that enter block ``end``, above
        it, without prompts; ``x`` and ``rope`` of block 0 as ``embed`` gives them."""
        entering = Embedded(x, x.shape[1], rope, None, inside=False, block=begin)
        readout = Readout(prompts=False, stop=end - 1)
        steps = block_steps(NO_PROMPTS, len(self.backbone.blocks), False)
        return self._run_blocks(entering, NO_PROMPTS, readout, steps, None)

    def _run_blocks(
        self,
        embedded: Embedded,
        schedule: PromptSchedule,
        readout: Readout,
        steps: list[BlockStep],
        taken: dict[int, Tensor] | None,
    ) -> Tensor:
        """Tokens before ``norm_pre`` to the rows that are read, prompts last of them."""
        backbone, family, casts = self.backbone, self.cache.family, self.cache.casts
        x, num_tokens, rope, prompts, inside, begin = embedded
        if begin == 0:
            norm_pre = family.norm_pre(backbone)
            x, prompts = norm_pre(x), None if prompts is None else norm_pre(prompts)
        device_type, dtype = x.device.type, x.dtype
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        weights = self.cache.weights(dtype)

        # the weights are in autocast's dtype already, but in what a compiler or a trace records
        with torch.autocast(device_type, dtype, enabled=autocast and not casts):
            ready = self._keys_values_at_once(x, weights, steps)
            for i, step in enumerate(steps[begin:], begin):
                if i > 0:
                    x = x[:, :num_tokens] if step.enters else x
                    prompts, inside = None, False
                    if i in ready:
                        prompts = step.tokens
                    elif step.tokens is not None:
                        prompts = prompt_tokens(i, step.tokens, x, self.backend)
                        if schedule.position == "add":
                            x, prompts = x + prompts, None
                here = family.block_rope(backbone, rope, i)
                x = self._block(
                    BlockInput(
                        i, weights[i], step, num_tokens, here, prompts, inside, ready.get(i)
                    ),
                    x,
                )
                if taken is not None and i in readout.after:
                    taken[i] = x[:, :num_tokens]
                if i == readout.stop:
                    return x[:, :num_tokens]
        return x

    def _block(self, block: BlockInput, x: Tensor) -> Tensor:
        """A block on tokens (B, T, D), prompts last of them: (B, M, D), likewise."""
        w, rows, num_tokens = block.weights, block.step.rows, block.num_tokens
        trade = "min" if self.backbone.grad_checkpointing else self.options.memory

        def run(x: Tensor) -> Tensor:
            if block.ready is None and rows is not None and self.absorbs(block.index, rows):
                own = x if block.prompts is None else x[:, :num_tokens]
                o = blocks.attend_absorbed(w, own, rows, block.prompts, block.step.keys)
                return recompute.finish_block(w, x[:, :rows], o, trade)
            x, o = self._attend(block, x)
            return recompute.finish_block(w, x, o, trade)

        again = trade == "min" and torch.is_grad_enabled()
        x = recompute.run_again(run, x) if again else run(x)
        return x[:, :num_tokens] if block.step.kv_only else x

    def _keys_values_at_once(
        self,
        x: Tensor,
        weights: list[BlockWeights],
        steps: list[BlockStep],
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the prompts of all blocks that use nothing else of them, in one
        product, by block; none where this saves no launch."""
        # where copies of the weights are made they are the host's own, and nothing is launched
        if self.cache.copies_unsupported_reason is None or not self.options.kv_only:
            return {}
        if torch.compiler.is_compiling() or leaves_this_package() or transformed():
            return {}
        few = is_host_bound(x)
        found: dict[int, Any] = {}
        normed = not isinstance(self.cache.family.norm_pre(self.backbone), nn.Identity)
        for i, step in enumerate(steps):
            absorbed = not few and step.rows is not None and self.absorbs(i, step.rows)
            if step.inserts and step.kv_only and not absorbed and not (i == 0 and normed):
                found[i] = step.tokens
        if one_product_unsupported_reason([weights[i] for i in found], list(found.values())):
            return {}
        tokens = torch.stack(list(found.values())).to(x.dtype)
        images = x.shape[0] if few and not self.fuses(x, True) else None
        made = all_keys_values([weights[i] for i in found], tokens, images)
        return dict(zip(found, made, strict=True))

    def _attend(self, block: BlockInput, x: Tensor) -> tuple[Tensor, Tensor]:
        """The M rows of x, or of x and the prompts that join it, whose outputs are wanted, and
        their attention output (B, M, A)."""
        w, step, prompts = block.weights, block.step, block.prompts
        num_tokens = block.num_tokens
        keys = None if step.keys is None else blocks.free_keys_values(w, step.keys)
        kv_only = step.kv_only and self.options.kv_only
        # outputs of prompts are computed, and thrown away, where kv_only is switched off
        M = x.shape[1] if step.rows is None else min(step.rows, num_tokens)
        if block.inside and prompts is not None:
            # every row: the gradient of the prompts' rows goes through the whole buffer
            M = x.shape[1]
            x, q, k, v = project_whole(w, x, prompts, num_tokens)
        elif block.inside:
            M = x.shape[1]
            q, k, v = blocks.project(w, x, M)
        elif prompts is None or kv_only:
            M = num_tokens if step.rows is None and kv_only else M
            if prompts is not None:
                own = block.ready or self.cache.prompt_keys_values(block.index, w, prompts)
                keys = blocks.join(own, keys)
            # few tokens: one product is worth more than the memory of the queries beside the keys
            copied = keys is not None and not self.fuses(keys[0], True) and not is_host_bound(x)
            q, k, v = blocks.project(w, x, M, separate=copied)
        else:
            together = torch.cat([x, prompts.expand(x.shape[0], -1, -1)], dim=1)
            M = together.shape[1] if step.rows is None else M
            if self.options.first and together.shape[1] == M:
                q, k, v = blocks.project_entering(w, x, prompts)
            else:
                q, k, v = blocks.project(w, together, M)
            x = together
        num_prefix = self.backbone.num_prefix_tokens
        q, k = (blocks.rotate(t, block.rope, num_prefix, w.rotate_half) for t in (q, k))
        alone = keys is not None
        backend = self.backend if alone else self.cache.backend_for("prompt_attention", q.dtype)
        return x[:, :M], blocks.attend(w, q, k, v, keys, self.fuses(q, alone), backend)

    def fuses(self, like: Tensor, prompts_alone: bool) -> bool:
        """Whether ``prompt_attention`` runs by a kernel, and pays where all tokens are alike."""
        # torch's own attention leaves this package, and has every transform
        if leaves_this_package() or transformed():
            return False
        if prompts_alone:
            return self.cache.fuses_attention(like.dtype)
        return (
            self.cache.attention_unsupported_reason is None
            and like.device.type in dispatch.PREFER_OVER_SDPA
            and self.cache.backend_for("prompt_attention", like.dtype) != "reference"
        )

    def absorbs(self, i: int, rows: int) -> bool:
        """Whether keys and values of the last block are never formed for so few rows."""
        return (
            self.options.absorb
            and rows <= ABSORB_ROWS
            and support.absorb_unsupported_reason(self.cache.family, self.backbone, i) is None
        )
