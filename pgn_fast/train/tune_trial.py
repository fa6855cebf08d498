"""One trial of a search, and the order of trials.

Trials are ordered by the metric that the user asked for, and where that is equal by the validation
loss. Top-1 on n images has n + 1 values only, so that with a few hundred of them many trials tie,
and whichever came first would win. The loss is not put in the metric's place: it grows with too
much confidence in the few wrong answers, which says nothing of how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# percent that the loss weighs at most: less than one image of a hundred million
TIE = 1e-6


@dataclass
class Trial:
    """What is known of one trial.

    Attributes:
        given: the fields of ``TrainConfig`` that it tries.
        scores: epochs, as a string -> the best validation score by then, larger is better.
        losses: the same -> the validation loss of the epoch that has this score.
        failed: why it could not be trained to its end; None otherwise.
    """

    number: int
    given: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None

    @property
    def best(self) -> float:
        """The score at the end of what was trained."""
        return max(self.scores.values(), default=float("-inf"))

    def note(self, epochs: int, score: float, row: Mapping[str, Any]) -> None:
        """Keep what so many epochs have come to: the best epoch's score, and its row of history."""
        self.scores[str(epochs)], self.losses[str(epochs)] = score, row["validation_loss"]

    def rank(self, epochs: int | None = None) -> float:
        """What trials are ordered by, larger is better: the score after so many epochs (None: at
        the end), then the loss.

        It is one number because that is what Optuna takes; its sampler and its halving look at the
        order of these numbers only.
        """
        at = str(epochs or max(map(int, self.scores)))
        loss = self.losses[at]
        return self.scores[at] - TIE * (loss / (1 + loss) if math.isfinite(loss) else 1)
