"""What a device has to offer for a backend's kernels: its code, and the sizes that they take.

The one place that knows the limits of a backend. ``dispatch`` asks ``missing`` and ``limit`` before
anything runs, so what is said here is what a user, ``explain()`` and a benchmark read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import _native

# the largest size of each name that the kernels of a backend hold, by op
_LARGEST: dict[tuple[str, str], dict[str, int]] = {
    ("cpu", "prompt_attention"): {"head_width": 256},
    ("triton", "prompt_attention"): {"head_width": 256},
    ("cuda", "prompt_attention"): {"head_width": 128},
    ("cuda", "prompted_patch_embed"): {"channels": 64},
    ("triton", "add_layer_norm"): {"columns": 16384},  # of one program
}
_SAID = {"head_width": "head widths", "channels": "channels", "columns": "columns"}


def missing(backend: str, device: torch.device) -> str | None:
    """Why no kernel of ``backend`` runs on this CUDA device; None where they run.

    A machine may hold GPUs of several kinds: cuda:1 may run what cuda:0 does not. Without an index
    the answer is about torch's current device.
    """
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if backend != "cuda":
        return None
    if _native.cuda_missing:
        return _native.cuda_missing
    major, minor = torch.cuda.get_device_capability(device)
    archs = (_native.build_info().get("cuda_arch") or "").split()
    for arch in archs:
        number, _, real = arch.partition("-")
        built_major, built_minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
        if number.endswith("a"):  # runs on this one architecture
            fits = (major, minor) == (built_major, built_minor)
        elif real:  # machine code runs on later devices of its own major version
            fits = major == built_major and minor >= built_minor
        else:  # PTX is compiled for any later device
            fits = (major, minor) >= (built_major, built_minor)
        if fits:
            return None
    return (
        f"the CUDA kernels were built for {', '.join(archs)}, this device is sm_{major}{minor}; "
        f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def limit(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]
) -> str | None:
    """Which of a problem's sizes the kernels of ``backend`` do not take; None where they take all.

    Args:
        backend: "cpu", "triton" or "cuda".
        op: the op's name, with or without "_backward".
        device: the tensors' device.
        dtype: of the op's operands.
        sizes: what is known of "head_width", "channels", "columns" and "rows" (B * Q queries).
    """
    for name, largest in _LARGEST.get((backend, op.removesuffix("_backward")), {}).items():
        if sizes.get(name, 0) > largest:
            return f"its kernels take {_SAID[name]} up to {largest}, got {sizes[name]}"
    return None
