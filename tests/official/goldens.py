"""Read golden tensors and compare with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"

# Allowed error as a fraction of a tensor's largest magnitude. float32 itself is off by about 1e-6,
# gradients by up to 2e-5; a wrong LayerNorm eps, the smallest mistake there is, by 1e-4 and more.
OUTPUT = 2e-5
GRADIENT = 1e-4


def load(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``fixtures/<path>.safetensors`` and its settings."""
    with safe_open(FIXTURES / f"{path}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float = OUTPUT) -> None:
    """Same shape, and no element further off than ``tolerance`` of the largest expected one."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error = (got.detach().double() - want.double()).abs().max().item()
    scale = want.double().abs().max().item()
    assert error <= tolerance * scale, (
        f"{name}: off by {error:.2e}, {error / max(scale, 1e-300):.1e} of its largest"
    )
