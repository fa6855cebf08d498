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
from .entering import mixed_rows, project_whole
from .fold import BlockWeights
from .inputs import mean_and_std
from .schedule import Entry, KeyValues, Mixture, PromptSchedule
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
        inside: they are in the sequence already, as its last rows (block 0).
        keys: keys and values beside those of the tokens.
        keys_only: the outputs of prompts are not used, neither of these nor of those before.
        rows: output rows of the tokens that are no prompts; None all.
    """

    replaces: bool = False
    prompts: Tensor | None = None
    inside: bool = False
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
        take: tuple[set[int], dict[int, Tensor]] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Images and prompts to tokens after the final norm; see ``encode_eager``.

        Args:
            images: normalized images (B, C, H, W), or uint8 ones.
            schedule: which prompts enter where.
            rows: return only the first ``rows`` tokens; None all.
            prompts_read: False: prompts that are left are not returned.
            take, stop: as for ``encode_eager``.

        Returns:
            (B, S + P + N, D), (B, S + N, D) without prompts, or (B, rows, D).
        """
        backbone, num_prefix = self.backbone, self.backbone.num_prefix_tokens
        self.cache.follow(images.shape[0])
        if self.cache.refused is not None:
            return encode_eager(
                backbone,
                images,
                schedule,
                rows=rows,
                prompts_read=prompts_read,
                backend=self.backend,
                take=take,
                stop=stop,
            )

        check_schedule(backbone, schedule, images.shape[0])
        norm_pre = getattr(backbone, "norm_pre", nn.Identity())
        reads = prompts_read and schedule.keep and self.reads_prompts(schedule, rows)
        inside = self.prompts_apart(schedule, reads, images.device.type) is None
        entering: Any
        if inside:
            x, num_tokens, entering = self._embed_with_prompts(images, schedule)
            rope = None
            entering = None if entering is None else norm_pre(entering)
        else:
            below = images.requires_grad or schedule.patch_weight is not None
            with torch.set_grad_enabled(torch.is_grad_enabled() and below):
                x, rope = self.embed(images, schedule)
            num_tokens = x.shape[1]
            entering = schedule.parts(0).tokens
            if entering is not None:
                entering = prompt_tokens(0, entering, x, self.backend)
                if schedule.position == "add":
                    x, entering = x + entering, None
                else:
                    entering = norm_pre(entering)
        x = norm_pre(x)
        x = self._run_blocks(
            x, rope, entering, inside, schedule, rows, reads, num_tokens, take, stop
        )
        if x.shape[1] > num_tokens and schedule.position == "prepend":
            prefix, patches, prompts = (
                x[:, :num_prefix],
                x[:, num_prefix:num_tokens],
                x[:, num_tokens:],
            )
            x = torch.cat([prefix, prompts, patches], dim=1)
        return backbone.norm(x[:, :rows])

    def reads_prompts(self, schedule: PromptSchedule, rows: int | None) -> bool:
        """Whether prompts are among the first ``rows`` tokens, where the schedule puts them."""
        if rows is None:
            return True
        # appended prompts come after all others, of which nobody asks for a number
        return schedule.position == "prepend" and rows > self.backbone.num_prefix_tokens

    def prompts_apart(self, schedule: PromptSchedule, reads: bool, device_type: str) -> str | None:
        """Why the prompts of block 0 are not written by the patch embedding's op; None where they
        are.

        Args:
            reads: prompts that are left after the last block are read.
        """
        tokens = schedule.parts(0).tokens
        if schedule.position == "add":
            return "nothing is inserted, the prompts are added to tokens or pixels"
        if not isinstance(tokens, Tensor | Mixture):
            return (
                "no prompt tokens enter block 0"
                if tokens is None
                else ("the prompts of block 0 are computed from the embedded tokens")
            )
        if self.options.kv_only and next(self._steps(schedule, None, reads)).keys_only:
            return "the prompts of block 0 are keys and values only"
        return self.embed_apart(schedule, device_type)

    def embed_apart(self, schedule: PromptSchedule, device_type: str) -> str | None:
        """Why timm's own code embeds the images; None where one op does."""
        if not self.options.embed:
            return "embed is switched off"
        if reason := self.cache.embed_refusal:
            return reason
        if schedule.patch_weight is not None:
            return "another patch projection stands in"
        if leaves_this_package() or transformed():
            return "a program that is exported or transformed runs in plain torch"
        if torch.is_autocast_enabled(device_type):
            return "under autocast timm adds its position embedding in float32"
        plain = self.cache.backend_for("prompted_patch_embed", self.cache.dtype) == "reference"
        if plain and torch.compiler.is_compiling():
            return "a compiler fuses plain torch itself"
        return None

    def embed(self, images: Tensor, schedule: PromptSchedule) -> tuple[Tensor, Tensor | None]:
        """What ``eager.embed`` returns."""
        if self.embed_apart(schedule, images.device.type) is not None:
            return embed(self.backbone, images, schedule.patch_weight)
        return self._op_embed(images), None

    def _op_embed(
        self, images: Tensor, mixture: Mixture | None = None, prompts: Tensor | None = None
    ) -> Tensor:
        """(B, S + N + P, D) by one op, prompts last."""
        backbone = self.backbone
        mean, std = (None, None) if images.is_floating_point() else mean_and_std(backbone)
        proj = backbone.patch_embed.proj
        prefix = [t for t in prefix_tokens(backbone) if t is not None]
        return prompted_patch_embed(
            images,
            proj.weight,
            proj.bias,
            backbone.pos_embed,
            torch.cat(prefix, dim=1) if prefix else None,
            None if mixture is None else mixture.logits,
            None if mixture is None else mixture.token_library,
            activation="softmax" if mixture is None else mixture.activation,
            prompts=prompts,
            mean=mean,
            std=std,
            backend=self.cache.backend_for("prompted_patch_embed", self.cache.dtype),
        )

    def _embed_with_prompts(
        self, images: Tensor, schedule: PromptSchedule
    ) -> tuple[Tensor, int, Tensor | None]:
        """The buffer (B, S + N + P, D), S + N, and what its last P rows hold.

        The gradient goes through the third, (P, D) or (B, P, D). Where the images have one too, or
        ``first`` is switched off, that is None and the gradient goes through the whole buffer.
        """
        tokens = schedule.parts(0).tokens
        assert isinstance(tokens, Tensor | Mixture)
        dtype = self.cache.dtype
        if isinstance(tokens, Mixture) and tokens.logits.dtype != dtype:
            tokens = tokens.tokens(self.backend)  # mixed in float32, rounded once
        mixture = tokens if isinstance(tokens, Mixture) else None
        prompts = None if isinstance(tokens, Mixture) else tokens.to(dtype)
        spread = images.requires_grad or not self.options.first
        # a compiler gets the op's own gradient
        tracked = torch.is_grad_enabled() and (spread or torch.compiler.is_compiling())
        with torch.set_grad_enabled(tracked):
            x = self._op_embed(images, mixture, prompts)
        P = prompts.shape[-2] if mixture is None else mixture.logits.shape[1]  # type: ignore[union-attr]
        num_tokens = x.shape[1] - P
        if spread:
            return x, num_tokens, None
        rows = x[:, num_tokens:]
        if torch.compiler.is_compiling():
            return x, num_tokens, rows
        if mixture is None:
            return x, num_tokens, prompts
        return (
            x,
            num_tokens,
            mixed_rows(mixture, rows, self.cache.backend_for("mix_prompts", dtype)),
        )

    def _run_blocks(
        self,
        x: Tensor,
        rope: Tensor | None,
        entering: Tensor | None,
        inside: bool,
        schedule: PromptSchedule,
        rows: int | None,
        reads: bool,
        num_tokens: int,
        take: tuple[set[int], dict[int, Tensor]] | None,
        stop: int | None,
    ) -> Tensor:
        """Tokens (B, S + N, D) to the rows that are read, prompts last of them.

        Args:
            entering: the prompt tokens of block 0, as the block gets them.
            inside: they are the last rows of x already.
            num_tokens: S + N.
            reads: prompts that are left after the last block are read.
        """
        device_type, dtype = x.device.type, x.dtype
        folds = self.cache.folds
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        weights = self.cache.weights(dtype)
        by_block = getattr(self.backbone, "rope_mixed", False)

        # folded weights are in autocast's dtype already; live ones are cast by autocast
        with torch.autocast(device_type, dtype, enabled=autocast and not folds):
            for i, step in enumerate(self._steps(schedule, rows, reads)):
                here = rope[i] if rope is not None and by_block else rope
                tokens = entering if i == 0 else schedule.parts(i).tokens
                if i == 0 and inside:
                    step, tokens = replace(step, prompts=entering, inside=True), None
                elif step.replaces:
                    x = x[:, :num_tokens]
                if tokens is not None:
                    prompts = prompt_tokens(i, tokens, x, self.backend)
                    if schedule.position == "add":
                        x = x + prompts
                    else:
                        step = replace(step, prompts=prompts)
                x = self._block(i, weights[i], x, here, step, num_tokens)
                if take is not None and i in take[0]:
                    take[1][i] = x[:, :num_tokens]
                if i == stop:
                    return x[:, :num_tokens]
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
            if step.inside:
                M = x.shape[1]
                if step.prompts is None:
                    q, k, v = blocks.project(w, x, M)
                else:
                    x, q, k, v = project_whole(w, x, step.prompts, num_tokens)
            elif step.prompts is None or (step.keys_only and self.options.kv_only):
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
