"""What a figure was measured on, as stored with every result."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Device, versions and threads, as stored with every result."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {
        "device": name,
        "device_type": DEVICE.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }
