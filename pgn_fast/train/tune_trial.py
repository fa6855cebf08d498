"""One trial of a search, and the order of trials.

Trials are ordered by the metric that the user asked for, and where that is equal by the validation
loss. Top-1 on n images has n + 1 values only, so that with a few hundred of them many trials tie,
and whichever came first would win. The loss is not put in the metric's place: it grows with too
much confidence in the few wrong answers, which says nothing of how many there are.

The best few are held against each other by their mean over two seeds: the first of many noisy
scores is high by luck, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# percent that the loss weighs at most: less than one image of a hundred million
TIE = 1e-6
# trials that are repeated with another seed, where the budget allows
FINALISTS = 3


@dataclass
class Trial:
    """What is known of one trial.

    Attributes:
        given: the fields of ``TrainConfig`` that it tries.
        scores: epochs, as a string -> the best validation score by then, larger is better.
        losses: the same -> the validation loss of the epoch that has this score.
        seconds: that these took.
        failed: why it could not be trained to its end; None otherwise.
        again: a seed, as a string -> score, loss and seconds of the whole run with it.
    """

    number: int
    given: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None
    again: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds, with what the repeats took."""
        return self.seconds + sum(run["seconds"] for run in self.again.values())

    @property
    def best(self) -> float:
        """The score at the end of what was trained."""
        return max(self.scores.values(), default=float("-inf"))

    def rank(self, epochs: int | None = None) -> float:
        """What trials are ordered by, larger is better: the score after so many epochs (None: at
        the end), then the loss.

        It is one number because that is what Optuna takes; its sampler and its halving look at the
        order of these numbers only.
        """
        at = str(epochs or max(map(int, self.scores)))
        return _as_number(self.scores[at], self.losses[at])

    def mean_rank(self) -> float:
        """The mean of the ranks over the seeds that it has had."""
        ranks = [_as_number(run["score"], run["loss"]) for run in self.again.values()]
        return (self.rank() + sum(ranks)) / (1 + len(ranks))


def affordable(trials: Sequence[Trial], seed: int, seconds: float | None) -> list[Trial]:
    """The first of these that can be repeated with ``seed`` in so many seconds, or have been; none
    where it is one alone, which has nothing to be held against."""
    found, cost = list[Trial](), 0.0
    for trial in trials:
        cost += 0.0 if str(seed) in trial.again else trial.seconds
        if seconds is not None and cost > max(seconds, 0.0):
            break
        found.append(trial)
    return found if len(found) > 1 else []


def _as_number(score: float, loss: float) -> float:
    return score - TIE * (loss / (1 + loss) if math.isfinite(loss) else 1)
