"""Many tasks on one frozen backbone: ``TaskBank``.

``mixed`` runs a batch of several tasks through the engine's blocks; ``bank`` holds the tasks.
"""

from .bank import TaskBank, UnknownTask

__all__ = ["TaskBank", "UnknownTask"]
