"""A step as one CUDA graph: one launch in place of hundreds.

At small batches the GPU waits for the launches of an eager step; the numbers are those of the eager
step. ``capture`` is for a step of your own and trusts it; training, prediction and serving use
``graphed``, which trusts nothing: what is captured is held against eager steps first.
"""

from .capture import CapturedStep, capture
from .proved import CALLS_TO_PROVE, GraphedStep, graphed, graphed_forward
from .record import Recorded, Recorder, recorder_for

__all__ = [
    "CALLS_TO_PROVE",
    "CapturedStep",
    "GraphedStep",
    "Recorded",
    "Recorder",
    "capture",
    "graphed",
    "graphed_forward",
    "recorder_for",
]
