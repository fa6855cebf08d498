"""Loads the compiled libraries once and remembers why one is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import torch

C: ModuleType | None = None
cpu_missing: str | None = None

try:
    from . import _C as C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    cpu_missing = f"pgn_fast._C did not load ({error}); rebuild with: pip install -e ."

# what the CUDA library says of itself, once it is loaded
_cuda_facts: dict[str, str] = {}


def _load_cuda(library: Path) -> str | None:
    """Load the CUDA kernels; why they cannot be used, or None."""
    if cpu_missing is not None:
        return cpu_missing
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not library.is_file():
        reason = library.with_suffix(".txt")  # setup.py leaves it where it built none
        why = reason.read_text().strip() if reason.is_file() else f"there is no {library.name}"
        return f"the CUDA kernels were not built: {why}"
    try:
        torch.ops.load_library(str(library))
        facts = ctypes.CDLL(str(library))
        facts.pgn_fast_cuda_archs.restype = ctypes.c_char_p
        built, driver = facts.pgn_fast_cuda_runtime_version(), facts.pgn_fast_cuda_driver_version()
        _cuda_facts["cuda"] = _version(built)
        _cuda_facts["driver"] = _version(driver)
        _cuda_facts["cuda_arch"] = facts.pgn_fast_cuda_archs().decode()
    except (OSError, AttributeError) as error:
        return f"{library.name} did not load ({error}); rebuild with: pip install -e ."
    return driver_unsupported_reason(built, driver)


def driver_unsupported_reason(built: int, driver: int) -> str | None:
    """Why a driver does not run a library; None where it does, or where there is no driver.

    Args:
        built: the CUDA version that the library was built with, as CUDART_VERSION: 13000 for 13.0.
        driver: the newest CUDA version that the driver runs, in the same form; 0 without one.
    """
    # within a major version a driver runs what later minor versions built
    if not driver or driver // 1000 >= built // 1000:
        return None
    return (
        f"the CUDA kernels were built with CUDA {_version(built)} and this machine's driver runs "
        f"CUDA up to {_version(driver)}: update the driver, or rebuild with the nvcc of a CUDA "
        f"{driver // 1000} toolkit (CUDA_HOME)"
    )


def driver_version() -> str | None:
    """The newest CUDA version that this machine's driver runs, where the CUDA library could ask."""
    return _cuda_facts.get("driver")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def build_info() -> dict[str, str | None]:
    """Compiler, processor's vendor and instruction set, CUDA version and architectures."""
    facts = {"cuda": _cuda_facts.get("cuda"), "cuda_arch": _cuda_facts.get("cuda_arch")}
    return facts if C is None else {**C.build_info(), **facts}


cuda_missing = _load_cuda(Path(__file__).with_name("_C_cuda.so"))
