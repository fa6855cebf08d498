"""The engine: a frozen ViT with prompts, without the work that no output and no gradient needs.

The same numbers as ``reference.encode_eager``, up to rounding. Attention does not depend on
the order of its keys, so prompts that stay in the sequence stand behind the patches in here,
wherever the schedule puts them; the order is restored at the end if anybody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dispatch, prompted_patch_embed
from ..ops._register import leaves_this_package, transformed
from . import blocks, recompute, support
from .cache import BackboneCache
from .eager import check_schedule, embed, encode_eager, prefix_tokens, prompt_tokens
from .fold import BlockWeights
from .inputs import mean_and_std
from .schedule import Entry, KeyValues, PromptSchedule
from .support import FastOptions

# rows up to which an absorbed last block is cheaper than its key and value projections: M h D
# against D^2 multiplications a token, with room for the smaller matrices
ABSORB_ROWS = 8

# up to which an engine checks itself when it is built: some tenths of a second at most
_CHEAP_FLOPS_CPU, _CHEAP_FLOPS = 2e10, 1e12


@dataclass(frozen=True)
class BlockStep:
    """What one block has to do.

    Attributes:
        replaces: prompts that are in the sequence leave before this block.
        prompts: the prompt tokens that enter here, (P, D) or (B, P, D).
        keys: keys and values beside those of the tokens.
        keys_only: the outputs of prompts are not used, neither of these nor of those before.
        rows: output rows of the tokens that are no prompts; None all.
    """

    replaces: bool = False
    prompts: Tensor | None = None
    keys: KeyValues | None = None
    keys_only: bool = False
    rows: int | None = None


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
        self.options = options or FastOptions()
        self.backend = backend
        self.cache = BackboneCache(backbone, self.options, backend)
        if self.cache.refusal is None and self._is_cheap():
            self.check()

    @property
    def backbone(self) -> Any:
        return self.cache.backbone

    def __getstate__(self) -> dict[str, Any]:
        """Without the folded weights: a copy or a pickle makes its own."""
        return {name: getattr(self, name) for name in ("backbone", "options", "backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options, self.backend = state["options"], state["backend"]
        self.cache = BackboneCache(state["backbone"], self.options, self.backend)

    def _is_cheap(self) -> bool:
        """Whether one more image costs less than loading a backbone does."""
        if self.cache.device.type == "meta":
            return False
        tokens = self.backbone.num_prefix_tokens + self.backbone.patch_embed.num_patches
        flops = 2 * tokens * sum(p.numel() for p in self.backbone.blocks.parameters())
        return flops < (_CHEAP_FLOPS_CPU if self.cache.device.type == "cpu" else _CHEAP_FLOPS)

    def check(self) -> None:
        """Run a random image here and by the reference, with prompts that come, change and stay.

        Raises:
            RuntimeError: the results disagree; that would be an error of this package, or of a
                backbone whose own code differs from its class's.
        """
        backbone, random = self.backbone, torch.Generator().manual_seed(0)
        size = backbone.in_chans, *backbone.patch_embed.img_size
        like = next(backbone.parameters())
        images = torch.randn(1, *size, generator=random).to(like)
        entries: dict[int, Entry] = {
            i: torch.randn(2, backbone.embed_dim, generator=random).to(like)
            for i in range(min(2, len(backbone.blocks)))
        }
        schedule = PromptSchedule("append", entries)
        with torch.no_grad(), torch.autocast(self.cache.device.type, enabled=False):
            expected = encode_eager(backbone, images, schedule, rows=1).double()
            actual = self.encode(images, schedule, rows=1).double()
        error = float((actual - expected).abs().max() / expected.abs().max())
        if error > min(1000 * torch.finfo(self.cache.dtype).eps, 0.2):
            raise RuntimeError(
                f"the fast path of {type(backbone).__name__} differs from timm's own blocks by "
                f"{error:.1e} of the largest value. Use fast=False, and please report the backbone"
            )

    def encode(
        self,
        images: Tensor,
        schedule: PromptSchedule,
        *,
        rows: int | None = None,
        prompts_read: bool = True,
    ) -> Tensor:
        """Images and prompts to tokens after the final norm; see ``encode_eager``.

        Args:
            images: normalized images (B, C, H, W), or uint8 ones.
            schedule: which prompts enter where.
            rows: return only the first ``rows`` tokens; None all.
            prompts_read: False: nobody reads the prompts that are left; they are not returned.

        Returns:
            (B, S + P + N, D), (B, S + N, D) without prompts, or (B, rows, D).
        """
        backbone, num_prefix = self.backbone, self.backbone.num_prefix_tokens
        if self.cache.refusal is not None:
            return encode_eager(
                backbone,
                images,
                schedule,
                rows=rows,
                prompts_read=prompts_read,
                backend=self.backend,
            )

        check_schedule(backbone, schedule, images.shape[0])
        below = images.requires_grad or schedule.patch_weight is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and below):
            x, rope = self.embed(images, schedule)
        norm_pre = getattr(backbone, "norm_pre", nn.Identity())
        entering = schedule.parts(0).tokens
        if entering is not None:
            entering = prompt_tokens(0, entering, x, self.backend)
            if schedule.position == "add":
                x, entering = x + entering, None
            else:
                entering = norm_pre(entering)
        x = norm_pre(x)

        # are prompts among the rows that are read, where the schedule puts them?
        num_tokens = x.shape[1]
        before = num_prefix if schedule.position == "prepend" else num_tokens
        reads = prompts_read and schedule.keep and (rows is None or rows > before)
        x = self._run_blocks(x, rope, entering, schedule, rows, reads)
        if x.shape[1] > num_tokens and schedule.position == "prepend":
            prefix, patches, prompts = (
                x[:, :num_prefix],
                x[:, num_prefix:num_tokens],
                x[:, num_tokens:],
            )
            x = torch.cat([prefix, prompts, patches], dim=1)
        return backbone.norm(x[:, :rows])

    def embed(self, images: Tensor, schedule: PromptSchedule) -> tuple[Tensor, Tensor | None]:
        """What ``reference.embed`` returns."""
        backbone = self.backbone
        backend = self.cache.backend_for("prompted_patch_embed", self.cache.dtype)
        if (
            not self.options.embed
            or self.cache.embed_refusal is not None
            or schedule.patch_weight is not None
            or backend == "reference"
            or leaves_this_package()
            or transformed()
            # timm adds a float32 position embedding to what autocast computed
            or torch.is_autocast_enabled(images.device.type)
        ):
            return embed(backbone, images, schedule.patch_weight)
        mean, std = (None, None) if images.is_floating_point() else mean_and_std(backbone)
        proj = backbone.patch_embed.proj
        prefix = [t for t in prefix_tokens(backbone) if t is not None]
        x = prompted_patch_embed(
            images,
            proj.weight,
            proj.bias,
            backbone.pos_embed,
            torch.cat(prefix, dim=1) if prefix else None,
            None,
            None,
            mean=mean,
            std=std,
            backend=backend,
        )
        return x, None

    def _run_blocks(
        self,
        x: Tensor,
        rope: Tensor | None,
        entering: Tensor | None,
        schedule: PromptSchedule,
        rows: int | None,
        reads: bool,
    ) -> Tensor:
        """Tokens (B, S + N, D) to the rows that are read, prompts last of them.

        Args:
            entering: the prompt tokens of block 0, as the block gets them.
            reads: prompts that are left after the last block are read.
        """
        device_type, dtype = x.device.type, x.dtype
        folds = not (torch.compiler.is_compiling() or leaves_this_package())
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        weights = self.cache.weights(dtype)
        by_block = getattr(self.backbone, "rope_mixed", False)

        num_tokens = x.shape[1]
        # folded weights are in autocast's dtype already; live ones are cast by autocast
        with torch.autocast(device_type, dtype, enabled=autocast and not folds):
            for i, step in enumerate(self._steps(schedule, rows, reads)):
                here = rope[i] if rope is not None and by_block else rope
                tokens = entering if i == 0 else schedule.parts(i).tokens
                if step.replaces:
                    x = x[:, :num_tokens]
                if tokens is not None:
                    prompts = prompt_tokens(i, tokens, x, self.backend)
                    if schedule.position == "add":
                        x = x + prompts
                    else:
                        step = replace(step, prompts=prompts)
                x = self._block(i, weights[i], x, here, step, num_tokens)
        return x

    def _steps(
        self, schedule: PromptSchedule, rows: int | None, reads: bool
    ) -> Iterator[BlockStep]:
        depth = len(self.backbone.blocks)
        for i in range(depth):
            end = i == depth - 1
            leave = i + 1 in schedule.entries or (i == schedule.last and not schedule.keep)
            yield BlockStep(
                replaces=i in schedule.entries and schedule.position != "add",
                keys=schedule.parts(i).keys,
                keys_only=leave or (end and not reads),
                rows=rows if end and not reads and self.options.last_rows else None,
            )

    def _block(
        self,
        i: int,
        w: BlockWeights,
        x: Tensor,
        rope: Tensor | None,
        step: BlockStep,
        num_tokens: int,
    ) -> Tensor:
        """Block ``i`` on tokens (B, T, D), prompts last of them: (B, M, D), likewise."""
        trade = "min" if self.backbone.grad_checkpointing else self.options.memory

        def run(x: Tensor) -> Tensor:
            if step.rows is not None and self.absorbs(i, step.rows, rope):
                o = blocks.attend_absorbed(w, x, step.rows, step.prompts, step.keys)
                return recompute.finish_block(w, x[:, : step.rows], o, trade)
            keys = None if step.keys is None else blocks.free_keys_values(w, step.keys)
            if step.prompts is None or (step.keys_only and self.options.kv_only):
                M = self._rows_out(step, x.shape[1], num_tokens)
                if step.prompts is not None:
                    own = self.cache.prompt_keys_values(i, w, step.prompts)
                    keys = blocks.join(own, keys)
                copied = keys is not None and not self.fuses(keys[0], True)
                q, k, v = blocks.project(w, x, M, separate=copied)
            else:
                M = self._rows_out(step, num_tokens + step.prompts.shape[-2], num_tokens)
                together = torch.cat([x, step.prompts.expand(x.shape[0], -1, -1)], dim=1)
                if self.options.first and together.shape[1] == M:
                    q, k, v = blocks.project_entering(w, x, step.prompts)
                else:
                    q, k, v = blocks.project(w, together, M)
                x = together
            num_prefix = self.backbone.num_prefix_tokens
            q, k = (blocks.rotate(t, rope, num_prefix, w.rotate_half) for t in (q, k))
            alone = keys is not None
            backend = self.backend if alone else self.cache.backend_for("prompt_attention", q.dtype)
            o = blocks.attend(w, q, k, v, keys, self.fuses(q, alone), backend)
            return recompute.finish_block(w, x[:, :M], o, trade)

        again = trade == "min" and torch.is_grad_enabled()
        x = recompute.run_again(run, x) if again else run(x)
        return x[:, :num_tokens] if step.keys_only else x

    def fuses(self, like: Tensor, prompts_alone: bool) -> bool:
        """Whether ``prompt_attention`` runs by a kernel, and pays where all tokens are alike."""
        # where this package is not, or a transform wants plain torch, torch's own attention is it
        if leaves_this_package() or transformed():
            return False
        if prompts_alone:
            return self.cache.fuses_attention(like.dtype)
        return (
            like.device.type in dispatch.BEATS_PLAIN_ATTENTION
            and self.cache.backend_for("prompt_attention", like.dtype) != "reference"
        )

    def _rows_out(self, step: BlockStep, all_rows: int, num_tokens: int) -> int:
        if step.rows is not None:
            return min(step.rows, num_tokens)
        return num_tokens if step.keys_only and self.options.kv_only else all_rows

    def absorbs(self, i: int, rows: int, rope: Tensor | None) -> bool:
        block = self.backbone.blocks[i]
        return (
            self.options.absorb
            and rows <= ABSORB_ROWS
            and support.absorb_refusal(block, rope is not None) is None
        )
