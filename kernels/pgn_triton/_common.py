"""What the Triton kernels share: GEMM and rounding, fixed-order sums, tile sizes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# Reductions over the batch are cut into fixed row ranges, about two programs for each of the 132
# multiprocessors of a Hopper GPU. A constant, and not the device's own count: the order of the
# sums, and with it every bit of the result, then depends on the sizes alone.
SPLIT_PROGRAMS = 264


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 to the nearest value of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates: round the bits first
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def rows_of(block, R, P, BLOCK: tl.constexpr):
    """Rows of block number ``block`` of (B, P) tensors, R = B * P rows in all.

    Returns, [BLOCK] each: the rows, int64; which of them are below R; image and row within it.
    Rows past the last have its image and row, so whoever does not store them needs no mask.

    Divided in 32 bits: the compiler has a function for each division of 64, and calls it. The row
    within an image stays that narrow; widen it where it meets a stride. From 2^31 rows on, R comes
    as int64, and all is counted in 64 bits: slower, and right.
    """
    first = tl.minimum(block, R - 1) * BLOCK  # the block's number, in R's type
    step = tl.arange(0, BLOCK)
    left = R - first  # not first + BLOCK, which may be past 2^31 where R is not
    row = first + tl.minimum(step, left - 1)
    return first.to(tl.int64) + step, step < left, (row // P).to(tl.int64), row % P


def dot_precision() -> str:
    """How kernels multiply float32: exactly, unless the user allowed torch itself TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_their_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the tensors: Triton by itself takes the current one."""

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launcher(*args)

    return launch


def unit_columns(x: Tensor) -> Tensor:
    """``x`` with its last dimension dense, copied only where it is not; other strides stay."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def bucket(size: int) -> int:
    """The power of two above ``size``: sizes of one bucket share a tuning result."""
    return triton.next_power_of_2(max(size, 1))


def split_rows(rows: int, block: int, other_programs: int) -> tuple[int, int]:
    """Cut ``rows`` into ranges of whole blocks: (number of ranges, rows in each)."""
    splits = max(1, min(triton.cdiv(rows, block), SPLIT_PROGRAMS // max(other_programs, 1)))
    per_split = triton.cdiv(triton.cdiv(rows, splits), block) * block
    return triton.cdiv(rows, per_split), per_split


def sum_splits(partial: Tensor) -> Tensor:
    """Add the float32 shares of all row ranges (splits, ...), in an order that never varies."""
    return partial[0] if len(partial) == 1 else partial.sum(0)


class Tile(NamedTuple):
    """One choice of tile sizes and of the program that works on a tile."""

    blocks: dict[str, int]
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch; Triton's own default for fusion changes with 3.10."""
        launch = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return {**self.blocks, **launch}


def tile(*, warps: int, stages: int, **blocks: int) -> Tile:
    return Tile(blocks, warps, stages)


# what `pgn-fast autotune` measured, by launch_key; and tiles that a device refused
_measured: dict[str, Tile] = {}
_refused: set[tuple[str, int]] = set()
_measuring = False

# a tile that asks for more than a device has, or that this Triton cannot compile for it
TILE_ERRORS = (OutOfResources, PTXASError, CompilationError)


def launch_key(key: Sequence[Hashable]) -> str:
    """The name under which a kernel's fastest tile is remembered."""
    return " ".join(str(part).removeprefix("torch.") for part in key)


def measured_tiles() -> dict[str, dict[str, Any]]:
    """The tiles that this process has measured or been given, as plain data."""
    return {name: found._asdict() for name, found in _measured.items()}


def use_tiles(tiles: Mapping[str, Mapping[str, Any]]) -> None:
    """Launch with these tiles from now on: ``measured_tiles`` of an earlier process."""
    _measured.update({name: Tile(**values) for name, values in tiles.items()})


@contextmanager
def measuring() -> Iterator[None]:
    """Within it the first launch of every kernel and size measures all of its tiles."""
    global _measuring
    _measuring = True
    try:
        yield
    finally:
        _measuring = False


def launch_tuned(
    configs: Sequence[Tile],
    key: Sequence[Hashable],
    device: torch.device,
    launch: Callable[[Tile], None],
) -> None:
    """Launch with the tile that was measured for ``key``, else with the first.

    Nothing is measured here unless ``measuring()`` says so: a training step must not stop for a
    minute of compiling. A tile that the device refuses is left out from then on and the next one
    runs.

    Args:
        configs: a handful of tile sizes, the safest first.
        key: kernel name, dtypes and (bucketed) sizes: whatever the fastest tile depends on.
        device: the device of the tensors.
        launch: launches the kernel with one configuration; may be called several times.

    Raises:
        RuntimeError: the device takes none of the tiles.
    """
    if INTERPRETED.value:
        return launch(configs[0])
    name = launch_key(key)
    if _measuring and name not in _measured and len(configs) > 1 and not _capturing():
        _measure(configs, name, launch)
    chosen = _measured.get(name)
    order = [chosen, *configs] if chosen in configs else list(configs)
    last: Exception | None = None
    for config in dict.fromkeys(map(configs.index, order)):
        if (f"{device} {name}", config) in _refused:
            continue
        try:
            return launch(configs[config])
        except TILE_ERRORS as error:
            last = error
            _refused.add((f"{device} {name}", config))
    raise RuntimeError(
        f"{key[0]}: this device takes none of the kernel's {len(configs)} tiles ({last}); "
        'backend="reference" runs eager PyTorch'
    )


def _measure(configs: Sequence[Tile], name: str, launch: Callable[[Tile], None]) -> None:
    """Remember the fastest of the tiles that run."""
    times = {}
    for config in configs:
        with suppress(*TILE_ERRORS):
            run = functools.partial(launch, config)
            times[configs.index(config)] = triton.testing.do_bench(run, warmup=2, rep=10)
    if times:
        _measured[name] = configs[min(times, key=times.__getitem__)]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
