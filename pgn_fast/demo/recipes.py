"""The four methods of the demonstration, how each is trained, and what one run reports.

Nothing here needs torch: the process that prints the table reads only this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How one method is trained; everything else is ``pgn-fast train``'s default.

    Attributes:
        label: the method's name in table and plots.
        lr: peak learning rate of AdamW, after a tenth of the epochs of warm-up, cosine to zero.
        weight_decay: AdamW's, on everything that is trained but biases.
        epochs: passes over the training images.
        options: for the model's constructor.
        batch_size: images a step.
        head_init: see ``pgn-fast train --head-init``.
    """

    label: str
    lr: float
    weight_decay: float
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    head_init: str = "probe"


# chosen on validation images, see docs/demo.md
RECIPES = {
    "linear": Recipe("Linear probe", lr=1e-2, weight_decay=1e-4, epochs=20),
    "vpt-shallow": Recipe(
        "VPT-Shallow", lr=1.5e-2, weight_decay=1e-4, epochs=20, options={"num_prompts": 8}
    ),
    "vpt-deep": Recipe(
        "VPT-Deep", lr=1.5e-2, weight_decay=1e-4, epochs=20, options={"num_prompts": 32}
    ),
    "pgn": Recipe(
        "PGN",
        lr=3e-3,
        weight_decay=1e-4,
        epochs=20,
        options={
            "num_prompts": 8,
            "library_size": 64,
            "resolution": 32,
            "generator_kwargs": {"max_pool": False},
        },
    ),
}


@dataclass(frozen=True)
class Result:
    """One run: how good, how large, how long, how much memory.

    Attributes:
        method, seed: a key of ``RECIPES``; what initial values, order and augmentation came from.
        correct, images: rightly named images, of how many (the split is the report's).
        trained_parameters: numbers that the optimizer changed.
        seconds: wall-clock of ``fit``: the probe that starts the head, every step, the score.
        peak_bytes: growth of the process's resident memory from the loaded libraries to its peak,
            data and frozen backbone included; None where the system does not tell.
        threads: that torch computed with.
        losses: mean training loss of each epoch.
    """

    method: str
    seed: int
    correct: int
    images: int
    trained_parameters: int
    seconds: float
    peak_bytes: int | None
    threads: int
    losses: list[float]

    @property
    def top1(self) -> float:
        """Rightly named images, in percent."""
        return 100 * self.correct / self.images
