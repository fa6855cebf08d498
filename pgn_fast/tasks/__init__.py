"""Many tasks on one frozen backbone: ``TaskBank``.

``mixed`` runs a batch of several tasks through the engine's blocks; ``residents``
holds the tasks, in memory or on disk; ``bank`` is what users call.
"""

from .bank import TaskBank
from .residents import UnknownTask

__all__ = ["TaskBank", "UnknownTask"]
