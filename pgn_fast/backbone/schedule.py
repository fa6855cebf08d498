"""Which prompts enter which block of a frozen ViT, in which form, where, and when they leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Size, Tensor

from ..ops import mix_prompts

Position = Literal["append", "prepend", "add"]


@dataclass(frozen=True)
class Mixture:
    """Prompt tokens of block 0 that are still to be mixed: activation(logits) @ token_library.

    The engine mixes them inside the patch embedding's op, so that they never exist on their own.

    Attributes:
        logits: unnormalized mixture coefficients (B, P, K).
        token_library: (K, D), in the dtype of the logits.
        activation: "softmax" or "sigmoid".
    """

    logits: Tensor
    token_library: Tensor
    activation: str = "softmax"

    def tokens(self, backend: str | None = None) -> Tensor:
        """The prompt tokens (B, P, D); ``backend`` is that of ``pgn_fast.ops.mix_prompts``."""
        return mix_prompts(self.logits, self.token_library, self.activation, backend=backend)


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one block without tokens (prefix tuning), as its attention uses them.

    The block's projections, its key norm and its rotary embedding do not touch them; the scores
    are scaled as those of the tokens.

    Attributes:
        k, v: (h, P, d) shared by the batch, or (B, h, P, d); h heads of width d.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class FrozenTokens:
    """What a frozen backbone makes of images before a block that is the first with prompts.

    It takes the images' place in ``encode`` and in the models, where the prompts do not depend on
    the images: nothing below the block changes in training, so it need be computed only once.

    Attributes:
        tokens: (B, S + N, D) that enter ``block``; pooled features (B, D) for a linear probe.
        block: from 1; the number of blocks where all have run.
    """

    tokens: Tensor
    block: int

    @property
    def shape(self) -> Size:
        """Of the tokens; B is its first number, as it is of images."""
        return self.tokens.shape

    def to(self, *args: Any, **kw: Any) -> FrozenTokens:
        """As ``Tensor.to``."""
        return FrozenTokens(self.tokens.to(*args, **kw), self.block)

    def is_floating_point(self) -> bool:
        """True: they are no pixels, which would have to be normalized."""
        return True


# called with the block's input tokens (B, S + N, D), prompts not among them: (B, P, D)
PromptFunction = Callable[[Tensor], Tensor]
Entry = Tensor | Mixture | KeyValues | PromptFunction | tuple[Any, KeyValues]


class Parts(NamedTuple):
    """An entry taken apart: prompt tokens (or what yields them) and keys and values."""

    tokens: Tensor | Mixture | PromptFunction | None
    keys: KeyValues | None


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of one forward pass. B images, P prompt tokens, S prefix tokens, N patches.

    Before block ``i`` in ``entries`` the prompts in the sequence are replaced by ``entries[i]``;
    the first entry inserts them. Blocks between two entries carry the prompt tokens along. An entry
    is one of

    * prompt tokens, (P, D) shared by the batch or (B, P, D);
    * ``Mixture(logits, token_library, activation)``, for block 0: tokens that are still to be
      mixed;
    * ``KeyValues(k, v)``, each (h, P, d) or (B, h, P, d): keys and values of this block alone. They
      add no token, and no prompt is left after the block;
    * a function of the block's input tokens (B, S + N, D), prompts not among them, that returns
      prompt tokens (B, P, D);
    * a pair ``(tokens, KeyValues)`` of prompt tokens, in any of the forms above, and keys and
      values beside them.

    P may differ from block to block, and may be 0. What enters block 0 joins the sequence after
    the position embedding and before the backbone's ``norm_pre`` (CLIP's ``ln_pre``), as in the
    official PGN code: a function for block 0 sees the tokens before ``norm_pre`` too, and its
    result is normalized with them. Prompts never get a position embedding.

    Attributes:
        position: "append" puts the prompts after the patches (PGN), "prepend" between the prefix
            tokens and the patches (VPT). "add" inserts no token: it adds ``entries[i]`` to the
            tokens that are there (VPT's ablations "add" and "add-1").
        entries: block index, from 0 -> entry. For "add" only tensors, with P = S + N, or P = 1 to
            add one vector to every token. Empty where the prompts are in the images already (VPT's
            ablations in pixel space).
        keep: after the last block in ``entries`` the prompts stay in the sequence; False: they
            leave after that block. Without meaning for "add".
        patch_weight: weight (D, C, p, p) and bias (D,) or None that stand in for the backbone's own
            patch projection (VPT's ablation "below", whose images have further channels).

    Raises:
        TypeError, ValueError: an entry is none of these; the message names the block.
    """

    position: Position
    entries: Mapping[int, Entry]
    keep: bool = True
    patch_weight: tuple[Tensor, Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.position not in get_args(Position):
            known = ", ".join(map(repr, get_args(Position)))
            raise ValueError(f"PromptSchedule: position={self.position!r}; known: {known}")
        for i, entry in self.entries.items():
            if isinstance(i, bool) or not isinstance(i, int) or i < 0:
                raise ValueError(f"PromptSchedule: entries has the key {i!r}; blocks count from 0")
            tokens, keys = self.parts(i)
            if not (isinstance(tokens, Tensor | Mixture) or tokens is None or callable(tokens)):
                raise TypeError(f"{_named(i)} is a {type(entry).__name__}; {_KINDS}")
            if isinstance(tokens, Mixture) and i > 0:
                raise ValueError(
                    f"{_named(i)} is a Mixture, which block 0 takes alone; give block {i} its "
                    "tokens: Mixture(...).tokens()"
                )
            if self.position == "add" and (keys or not isinstance(tokens, Tensor)):
                raise ValueError(
                    f"{_named(i)} is a {type(entry).__name__}; position='add' adds tensors to the "
                    "tokens, (S + N, D) or (1, D), with or without a batch dimension in front"
                )

    def parts(self, i: int) -> Parts:
        """What ``entries[i]`` holds: tokens, keys and values, or both; neither without an entry."""
        entry: Any = self.entries.get(i)
        if isinstance(entry, KeyValues):
            return Parts(None, entry)
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], KeyValues):
            return Parts(*entry)
        return Parts(entry, None)

    def check(
        self,
        *,
        depth: int,
        width: int,
        heads: Callable[[int], tuple[int, int]],
        batch_size: int,
    ) -> None:
        """Refuse entries that do not fit a backbone and a batch.

        Args:
            depth: number of blocks.
            width: D.
            heads: block index -> h and d of its attention.
            batch_size: B.

        Raises:
            ValueError: names the block, what its entry is, and what would fit.
        """
        for i in self.entries:
            if i >= depth:
                raise ValueError(
                    f"PromptSchedule: entries has block {i}, the backbone's last is {depth - 1}"
                )
            tokens, keys = self.parts(i)
            if isinstance(tokens, Tensor):
                check_tokens(i, tokens, width, batch_size)
            elif isinstance(tokens, Mixture):
                library = tuple(tokens.token_library.shape)
                if library[1:] != (width,) or tokens.logits.shape[0] != batch_size:
                    raise ValueError(
                        f"{_named(i)} mixes logits {tuple(tokens.logits.shape)} with a token "
                        f"library {library}; (B, P, K) and (K, D) with B={batch_size} and "
                        f"D={width} would fit"
                    )
            if keys is not None:
                k, v = tuple(keys.k.shape), tuple(keys.v.shape)
                h, d = heads(i)
                fits = len(k) in (3, 4) and (k[-3], k[-1]) == (h, d)
                fits = fits and k[:-3] in ((), (1,), (batch_size,))
                if k != v or not fits:
                    raise ValueError(
                        f"{_named(i)} has keys {k} and values {v}; both (h, P, d) or (B, h, P, d) "
                        f"of one shape with h={h}, d={d} and B={batch_size} would fit"
                    )

    @property
    def first(self) -> int:
        """The lowest block that gets prompts. Below it nothing needs a gradient, unless the images
        do (prompts in pixel space)."""
        return min(self.entries) if self.entries else 0

    @property
    def last(self) -> int:
        """The highest block that gets prompts."""
        return max(self.entries) if self.entries else -1

    @property
    def num_prompts_left(self) -> int:
        """Prompt tokens in the sequence after the last block.

        Raises:
            ValueError: a function makes them, and their number is known only once it has run.
        """
        if self.position == "add" or not self.keep:
            return 0
        tokens = self.parts(self.last).tokens
        if tokens is None:
            return 0
        if isinstance(tokens, Mixture):
            return tokens.logits.shape[1]
        if isinstance(tokens, Tensor):
            return tokens.shape[-2]
        raise ValueError(f"{_named(self.last)} is a function; how many prompts it makes is open")


NO_PROMPTS = PromptSchedule("append", {})


def check_tokens(i: int, tokens: Tensor, width: int, batch_size: int) -> Tensor:
    """Return prompt tokens of block ``i`` that are (P, D) or (B, P, D); refuse others."""
    shape = tuple(tokens.shape)
    fits = len(shape) in (2, 3) and shape[-1] == width and shape[:-2] in ((), (1,), (batch_size,))
    if not fits:
        raise ValueError(
            f"{_named(i)} has prompt tokens {shape}; (P, D) or (B, P, D) with B={batch_size} and "
            f"D={width} would fit"
        )
    return tokens


def call(i: int, function: PromptFunction, tokens: Tensor) -> Tensor:
    """The prompt tokens (B, P, D) that the function of block ``i`` makes from its input.

    Raises:
        TypeError, ValueError: it returned something else.
    """
    prompts = function(tokens)
    if not isinstance(prompts, Tensor):
        raise TypeError(
            f"{_named(i)} is a function that returned a {type(prompts).__name__}; prompt tokens "
            "(B, P, D) would fit"
        )
    return check_tokens(i, prompts, tokens.shape[2], tokens.shape[0]).to(tokens.dtype)


_KINDS = (
    "an entry is a tensor (P, D) or (B, P, D), a Mixture, KeyValues, a function of the block's "
    "tokens, or a pair (tokens, KeyValues)"
)


def _named(i: int) -> str:
    return f"PromptSchedule: the entry of block {i}"
