"""``pgn-fast env``: versions, devices, backends, and why one is missing."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys

HELP = "versions, devices and backends, and why a backend is missing"
EPILOG = """\
Send its output with a bug report.

example:
  pgn-fast env
"""
_PACKAGES = ("torch", "timm", "torchvision", "triton", "safetensors", "numpy", "PIL", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the command tells everything."""


def run(args: argparse.Namespace) -> int:
    from .. import __version__

    rows = [
        ("pgn_fast", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in _PACKAGES),
        *_devices(),
    ]
    for name, value in rows:
        print(f"{name:<12} {value}")

    from .. import backends

    print("backends")
    for name, value in backends().items():
        print(f"  {name:<10} {value}")
    print("kernels measured on this machine")
    for line in _measured():
        print(f"  {line}")
    return 0


def _measured() -> list[str]:
    """What autotune found on each device, and where nothing but defaults is known."""
    import torch

    from ..ops import measured

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [line for device in devices for line in measured.summary(device)]


def _version(name: str) -> str:
    """A package's version, or in one line why it cannot be imported."""
    try:
        return str(importlib.import_module(name).__version__)
    # a torchvision that does not belong to this torch fails with a RuntimeError, others differ
    except Exception as error:
        return f"missing: {' '.join(str(error).split())}"


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gib = properties.total_memory / 2**30
        rows.append((f"cuda:{i}", f"{properties.name}, {gib:.0f} GiB, CUDA {torch.version.cuda}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "available"))
    return rows
