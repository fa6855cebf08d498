"""What ``pgn-fast autotune`` found on this device: it writes, and ``dispatch`` reads.

A file holds for one device, driver, torch, Triton and source of the kernels; with any other it is
not looked at, and the shipped preference counts. PGN_FAST_PREFERENCE=off ignores all files.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import _files, _native
from .devices import stem

FORMAT = 1


_FOLDER = Path("pgn_fast") / "autotune"


def _cache() -> Path:
    """The user's cache directory, in which results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def device_name(device: torch.device) -> str:
    """The device's own name; of a processor its vendor, instruction set and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = _native.build_info()
    parts = (platform.machine(), info.get("cpu_vendor"), info.get("cpu_isa"))
    return f"{' '.join(map(str, parts))}, {torch.get_num_threads()} threads"


def key(device: torch.device) -> dict[str, Any]:
    """All that a measurement depends on."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kernels": kernel_digest(),
    }
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["driver"] = _native.driver_version()
    return found


def path(device: torch.device, cache: Path | None = None) -> Path:
    """The file of a device; its name is made of the whole key."""
    digest = hashlib.sha256(json.dumps(key(device), sort_keys=True).encode()).hexdigest()[:16]
    return (cache or _cache()) / _FOLDER / f"{device.type}-{digest}.json"


@functools.cache
def kernel_digest() -> str:
    """A digest of the compiled libraries and the Triton kernels' text."""
    digest = hashlib.sha256()
    package = Path(_native.__file__).parent
    files = [*package.glob("_C*.so")]
    if spec := importlib.util.find_spec("pgn_fast.kernels"):
        for location in spec.submodule_search_locations or ():
            files += Path(location).glob("*.py")
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def save(device: torch.device, results: dict[str, Any], cache: Path | None = None) -> Path:
    """Keep results for later processes, in another cache directory where one is given.

    Raises:
        OSError: it cannot be written.
    """
    target = path(device, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"key": key(device), **results}, indent=1) + "\n"
    _files.write_files({target: content.encode()})
    _load.cache_clear()
    return target


def load(device: torch.device) -> dict[str, Any] | None:
    """What was measured on this very device, with these very kernels; None where nothing was."""
    ignored = os.environ.get("PGN_FAST_PREFERENCE", "").lower() == "off"
    if ignored or not (_cache() / _FOLDER).is_dir():
        return None
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else None
    return _load(torch.device(device.type, index) if index is not None else device)


@functools.cache
def _load(device: torch.device) -> dict[str, Any] | None:
    try:
        found = json.loads(path(device).read_text())
        whole = found["key"] == key(device) and isinstance(found["results"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def preference(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...] | None:
    """Backends that won here, the fastest first; None where this op and dtype were not measured, or
    a whole model was slower by what won."""
    found = load(device)
    if found is None or found.get("whole_model", {}).get("verdict") == "slower":
        return None
    rows = [r for r in found["results"] if _is(r, op, dtype)]
    if not any(r["verdict"] in ("preferred", "slower", "barred") for r in rows):
        return None
    winners = [r for r in rows if r["verdict"] == "preferred"]
    return tuple(r["backend"] for r in sorted(winners, key=lambda r: -r["speedup"]))


def barred(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why autotune bars a backend of an op here; None where it does not."""
    found = load(device)
    for r in found["results"] if found else []:
        if _is(r, stem(op), dtype) and r["backend"] == backend and r["verdict"] == "barred":
            return (
                f"pgn-fast autotune barred it on this device ({r['reason']}); "
                "PGN_FAST_PREFERENCE=off ignores what it found"
            )
    return None


def tiles(device: torch.device) -> dict[str, Any]:
    """The Triton tiles that were fastest here."""
    found = load(device)
    return dict(found.get("tiles", {})) if found else {}


def _is(result: dict[str, Any], op: str, dtype: torch.dtype) -> bool:
    of = op.removesuffix("_backward")
    return result["op"] == of and result["dtype"] == str(dtype).removeprefix("torch.")


def summary(device: torch.device) -> list[str]:
    """One line on each op that was measured on this device, or one that says that none was."""
    found = load(device)
    if found is None:
        return [f"{device.type}: {_NOTHING}"]
    lines = [f"{device.type}: measured {found['measured_at']} with {found['model']}"]
    for r in found["results"]:
        lines.append(f"  {r['op']} {r['dtype']} {r['backend']}: {_in_words(r)}")
    if whole := found.get("whole_model"):
        lines.append(f"  the whole model: {whole['reason']}")
    return [*lines, "  whatever is not listed: defaults"]


def note(device: torch.device, dtype: torch.dtype) -> str:
    """What was measured on this device in one dtype, in one line, and what is only a default."""
    found = load(device)
    if found is None:
        return _NOTHING
    rows = [r for r in found["results"] if _is(r, r["op"], dtype)]
    told = [f"{r['op']} {r['backend']}: {_in_words(r)}" for r in rows]
    if whole := found.get("whole_model"):
        told.append(f"the whole model: {whole['reason']}")
    return f"measured {found['measured_at']} with {found['model']}; " + "; ".join(
        [*told, "all others by default"]
    )


_NOTHING = "nothing measured here, defaults; run: pgn-fast autotune"


def _in_words(result: dict[str, Any]) -> str:
    speedup = result.get("speedup")
    return f"{result['verdict']} (" + (
        f"{speedup:.2f}x eager PyTorch)" if speedup else f"{result['reason']})"
    )
