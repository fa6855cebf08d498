"""The one split of scikit-learn's handwritten digits, whoever trains or scores on them."""

from __future__ import annotations

from collections.abc import Sequence

TRAIN_SIZE = 1000
_SEED = 0


def split_digits(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The indices of the 1,000 training digits and of the 797 test digits, stratified.

    The same whatever seed a run has, so that no adapter is scored on images it was trained on.

    Args:
        labels: of all 1,797 digits, as ``sklearn.datasets.load_digits`` orders them.

    Returns:
        (train, test), each in the order of the shuffle.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        range(len(labels)), train_size=TRAIN_SIZE, stratify=labels, random_state=_SEED
    )
    return train, test
