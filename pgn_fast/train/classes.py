"""How many classes there are, and which of them a label means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import UserError
from .split import Relabeled, Split


def count_classes(split: Split, given: int | None) -> int:
    """The number of classes; all labels are below it.

    Raises:
        UserError: a label out of range, fewer than two classes, or not as many as the data name.
    """
    names, labels = split.class_names, split.images.labels
    count = given or (len(names) if names else 0)
    if labels is not None:
        used = [labels[i] for i in split.indices]
        count = count or max(used) + 1
        wrong = next(
            (i for i, label in zip(split.indices, used, strict=True) if not 0 <= label < count),
            None,
        )
        if wrong is not None:
            raise UserError(
                f"data: label {labels[wrong]} of {split.images.name(wrong)} is out of range for "
                f"{count} classes (0 ... {count - 1})."
            )
    if names and count != len(names):
        raise UserError(
            f"data: {split.origin} has {len(names)} classes, `num_classes` is {count}: leave it "
            "out, the data tell."
        )
    if count < 2:
        raise UserError(
            f"data: {split.origin} has {count} class(es); two are the least to tell apart"
            + ("." if count else ": give `num_classes`.")
        )
    return count


def match_classes(split: Split, names: Sequence[str] | None, whose: str) -> Split:
    """A split labeled by the place of its classes' names in another list, which may have more.

    Args:
        split: as it was read, labeled by its own classes.
        names: the classes in label order; None where they have no names: nothing is done.
        whose: where these are from, for messages.

    Raises:
        UserError: a class that is not among ``names``.
    """
    own = split.class_names
    if own is None or names is None or list(names) == own:
        return split
    if unknown := [name for name in own if name not in names]:
        odd = sorted(set(own) ^ set(names))
        raise UserError(
            f"data: {whose} and {split.origin} differ in their classes, such as "
            f"{', '.join(odd[:3])}: {unknown[0]!r} is none of the {len(names)} of the former."
        )
    images = Relabeled(split.images, [list(names).index(name) for name in own], len(names))
    notes = split.notes
    if missing := [name for name in names if name not in own]:
        notes += (
            f"{len(own)} of {len(names)} classes have images; none: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else ""),
        )
    return replace(split, images=images, class_names=list(names), notes=notes)


def streamed_classes(train: Split, given: int | None) -> int:
    """The number of classes of streamed data, whose labels are not known before they are read.

    Raises:
        UserError: neither the data nor ``given`` tell.
    """
    if given is None and train.class_names is None:
        raise UserError(
            f"data: {train.origin} is streamed and does not tell its classes: give `num_classes`."
        )
    return given or len(train.class_names or ())
