"""Random numbers that follow from a key, and leave the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's CPU generators follow from ``key``; afterwards they
    stand where they stood."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        # default_generator alone: torch.manual_seed would touch the accelerators' too
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
