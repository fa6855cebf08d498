"""The handwritten digits that come with the package: the offline default, and the demonstration.

1,797 images of 8 × 8 pixels, levels 0 to 16, from the test set of the UCI Machine Learning
Repository's "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0),
in the order of ``sklearn.datasets.load_digits``. ``digits.npz`` also fixes the one split: whoever
trains or scores on digits uses the same 1,000 and 797 images, whatever the seed of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

LEVELS = 16


class Digits(NamedTuple):
    """All digits and the indices of both sides of their split.

    Attributes:
        images: (1797, 8, 8) uint8, 0 (paper) to 16 (ink).
        labels: (1797,) int64, 0 to 9.
        train, test: 1,000 and 797 indices, stratified by label and shuffled.
    """

    images: np.ndarray
    labels: np.ndarray
    train: list[int]
    test: list[int]


def load_digits() -> Digits:
    """Read the packaged file."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        return Digits(
            stored["images"],
            stored["labels"].astype(np.int64),
            stored["train"].tolist(),
            stored["test"].tolist(),
        )


def stratified_split(
    labels: np.ndarray, indices: list[int], held_out: int, seed: int
) -> tuple[list[int], list[int]]:
    """Keep ``held_out`` of the indices back, in the proportions of their labels.

    Args:
        labels: of all images.
        indices: those to divide.
        held_out: how many to keep back.
        seed: of the shuffle.

    Returns:
        (the rest, those kept back), both shuffled.
    """
    order = np.random.default_rng(seed).permutation(np.asarray(indices))
    # every class's images spread evenly over [0, 1); the lowest places are kept back
    places = np.empty(len(order))
    for label in np.unique(labels[order]):
        own = np.flatnonzero(labels[order] == label)
        places[own] = (np.arange(len(own)) + 0.5) / len(own)
    chosen = np.zeros(len(order), dtype=bool)
    chosen[np.argsort(places, kind="stable")[:held_out]] = True
    return order[~chosen].tolist(), order[chosen].tolist()
