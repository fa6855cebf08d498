"""Loads the compiled libraries once and remembers why one is missing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

C: ModuleType | None = None
cpu_missing: str | None = None
cuda_missing: str | None = None

try:
    from . import _C as C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    cpu_missing = f"pgn_fast._C did not load ({error}); rebuild with: pip install -e ."

_cuda_library = Path(__file__).with_name("_C_cuda.so")
if cpu_missing is not None:
    cuda_missing = cpu_missing
elif torch.version.cuda is None:
    cuda_missing = f"this torch ({torch.__version__}) is built without CUDA"
elif not _cuda_library.is_file():
    cuda_missing = "the CUDA kernels were not built: no nvcc was found, or PGN_FAST_CUDA=off"
else:
    try:
        torch.ops.load_library(str(_cuda_library))
    except OSError as error:
        cuda_missing = f"_C_cuda.so did not load ({error}); rebuild with: pip install -e ."


def build_info() -> dict[str, str | None]:
    """Compiler, processor's vendor and instruction set, CUDA version and architectures."""
    return {} if C is None else C.build_info()
