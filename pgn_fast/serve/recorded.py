"""A frozen model's operations, recorded once and then run by torch without the interpreter.

Batches are computed in threads. Run from Python, every operation of a model ends by taking the
global interpreter lock, and there waits for whoever decodes an image or reads a socket at that
moment: on two cores such waits, and the switching between threads that they cause, cost the server
a fifth of its throughput. A recording is the same operations on the same weights in the same
order, and takes the lock once a batch.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def recorded(module: nn.Module, example: Tensor) -> nn.Module:
    """``module`` as a recording, where that gives its own numbers, to the bit; else ``module``.

    The recording shares the module's weights; a layer that is replaced later is not seen.

    Args:
        module: frozen, in eval mode; takes and returns one tensor, images first.
        example: what it takes, uint8 (B, C, H, W), of the size that all later inputs have, with
            any B.
    """
    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated in favor of torch.compile, which needs a C++ compiler where
            # the server runs, and torch.export, which runs from Python: without it the model runs
            # from Python, too. The tracer's doubts about branches are checked below.
            warnings.simplefilter("ignore")
            recording: Any = torch.jit.trace(module, example, check_trace=False)
        # other batch sizes, and more than one call: torch rewrites a recording after its first
        for batch in (1, len(example) + 1):
            images = torch.randint(0, 256, (batch, *example.shape[1:]), dtype=torch.uint8)
            if not torch.equal(recording(images), module(images)):
                raise ValueError("the recording computes other numbers.")
    except Exception as error:
        # a model that cannot be recorded, for whatever reason, is served all the same
        _logger.warning("the model runs from Python, which is slower: %s", error)
        return module
    return recording
