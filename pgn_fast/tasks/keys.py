"""Keys and values beside the tokens' own: those of many tasks in one tensor, or by length.

Letters: n images of a part, P prompt tokens, h heads of width d, R rows in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


def rows_of(pair: KeysValues) -> Tensor:
    """Keys and values (h, P, d) or (n, h, P, d) each as rows (P, 2, h, d) or (n, P, 2, h, d)."""
    return torch.stack(pair, dim=-4).movedim(-2, -4)


class Rows(NamedTuple):
    """The keys and values of one part.

    Attributes:
        rows: (R, 2, h, d); R is P where the part's images share them, else n P.
        length: P.
    """

    rows: Tensor
    length: int

    @classmethod
    def of(cls, pair: KeysValues) -> Rows:
        """Of keys and values (h, P, d) or (n, h, P, d)."""
        rows = rows_of(pair)
        return cls(rows if rows.ndim == 4 else rows.flatten(0, 1), pair[0].shape[-2])

    def of_images(self, count: int) -> Tensor:
        """(n, P, 2, h, d), a view."""
        shared = self.rows.shape[0] == self.length
        if shared:
            return self.rows.expand(count, *self.rows.shape)
        return self.rows.unflatten(0, (count, self.length))


def join(one: Rows | None, other: Rows, images: int) -> Rows:
    """Two sets of keys and values of the same images as one."""
    if one is None:
        return other
    length = one.length + other.length
    if one.rows.shape[0] == one.length and other.rows.shape[0] == other.length:
        return Rows(torch.cat([one.rows, other.rows.to(one.rows.dtype)]), length)
    parts = [r.of_images(images).to(one.rows.dtype) for r in (one, other)]
    return Rows(torch.cat(parts, dim=1).flatten(0, 1), length)


def side_by_side(
    found: Sequence[Rows | None], sizes: Sequence[int], known: dict[Any, Tensor], like: Tensor
) -> tuple[KeysValues, Tensor]:
    """All parts' rows one after the other, and which of them each image sees.

    Copied once a batch and block: 1 MB for 16 tasks of 10 prompts on ViT-B, against 10 MB of
    tokens. A task then owns its memory: it is added and removed without a look at the others, and
    nothing has to be moved where tasks come and go.

    Args:
        sizes: images of each part.
        known: ranges by lengths, filled here: most blocks have the same.
        like: a tensor on their device.

    Returns:
        Keys and values (h, R, d) each, and ranges (B, 2) as ``prompt_attention`` takes them.
    """
    rows = torch.cat([one.rows for one in found if one is not None])
    key = tuple((0, 0) if one is None else (one.rows.shape[0], one.length) for one in found)
    if key not in known:
        ranges, begin = [], 0
        for (count, length), images in zip(key, sizes, strict=True):
            step = length if count != length else 0
            starts = [begin + n * step for n in range(images)]
            ranges += [(start, start + length) for start in starts]
            begin += count
        known[key] = torch.tensor(ranges, device=like.device)
    k, v = rows.permute(1, 2, 0, 3).unbind(0)
    return (k, v), known[key]


def of_equal_length(
    found: Sequence[Rows | None], slices: Sequence[slice]
) -> Iterator[tuple[slice, KeysValues | None]]:
    """Parts beside each other that have equally many keys, as one: (n, h, P, d) each."""
    if len(found) == 1 and found[0] is not None and found[0].rows.shape[0] == found[0].length:
        k, v = found[0].rows.permute(1, 2, 0, 3).unbind(0)  # shared by all images
        yield slices[0], (k, v)
        return
    length = lambda n: None if found[n] is None else found[n].length  # type: ignore[union-attr]
    for size, members in groupby(range(len(found)), length):
        chosen = list(members)
        at = slice(slices[chosen[0]].start, slices[chosen[-1]].stop)
        if size is None:
            yield at, None
            continue
        rows = [found[n].of_images(slices[n].stop - slices[n].start) for n in chosen]  # type: ignore[union-attr]
        k, v = torch.cat(rows).permute(2, 0, 3, 1, 4).unbind(0)
        yield at, (k, v)


def runs(
    tokens: Sequence[Tensor | None], slices: Sequence[slice]
) -> Iterator[tuple[slice, Tensor | None]]:
    """Prompt tokens of parts beside each other that have equally many, as one (n, P, D)."""
    if len(tokens) == 1:
        yield slices[0], tokens[0]
        return
    length = lambda n: None if tokens[n] is None else tokens[n].shape[-2]  # type: ignore[union-attr]
    for size, members in groupby(range(len(tokens)), length):
        chosen = list(members)
        at = slice(slices[chosen[0]].start, slices[chosen[-1]].stop)
        if size is None:
            yield at, None
            continue
        expanded = [
            tokens[n].expand(slices[n].stop - slices[n].start, -1, -1)  # type: ignore[union-attr]
            for n in chosen
        ]
        yield at, torch.cat(expanded)
