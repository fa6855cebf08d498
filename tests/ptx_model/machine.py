"""Memory, blocks and warps of the PTX model, and the order in which warps go on."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .program import Kernel

GLOBAL, PARAMETERS, SHARED = 1 << 28, 7 << 40, 1024  # where the spaces begin
LANES = np.arange(32, dtype=np.uint32)
POISON = 0xFF  # every byte of what has not been written: NaN in float32, float16 and bfloat16


class Fault(Exception):
    """What a GPU would punish: a wrong access, a deadlock, a divergence where none may be."""


class Memory:
    """Global memory: arrays with poison between them."""

    def __init__(self, size: int = 1 << 23) -> None:
        self.bytes = np.full(size, POISON, np.uint8)
        self.begins, self.ends = [0], [0]

    def put(self, array: np.ndarray, shift: int = 0) -> int:
        """Copy an array to the device; its pointer is ``shift`` bytes past a multiple of 256."""
        array = np.ascontiguousarray(array)
        begin = -(-(self.ends[-1] + 256) // 256) * 256 + shift
        self.bytes[begin : begin + array.nbytes] = array.view(np.uint8).ravel()
        self.begins.append(begin)
        self.ends.append(begin + array.nbytes)
        return GLOBAL + begin

    def get(self, pointer: int, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        begin, size = pointer - GLOBAL, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[begin : begin + size].view(dtype).reshape(shape).copy()

    def check(self, offsets: np.ndarray, size: int, what: str) -> None:
        """Every access of ``size`` bytes lies inside one array."""
        index = np.searchsorted(self.begins, offsets, side="right") - 1
        outside = offsets + size > np.array(self.ends)[index]
        if (index < 1).any() or outside.any():
            raise Fault(f"{what} of {size} bytes outside every allocation")


class TensorMap(NamedTuple):
    """A row-major matrix of 16-bit numbers that tensor copies read in boxes, 128-byte swizzle."""

    pointer: int
    rows: int
    columns: int
    box_rows: int


class Warp:
    def __init__(self, block: Block, index: int, lanes: int) -> None:
        self.block, self.index = block, index
        self.registers: dict[str, np.ndarray] = {}
        self.active = lanes > LANES
        self.pcs = np.zeros(32, np.int64)
        self.waits_for: Callable[[], bool] | None = None
        self.thread = LANES + np.uint32(32 * index)
        # background copies and warpgroup products: not committed, then the groups that are
        self.copies: list[Any] = []
        self.copy_groups: list[list[Any]] = []
        self.products: list[Any] = []
        self.product_groups: list[list[Any]] = []

    def register(self, name: str) -> np.ndarray:
        """The bits of a register in 32 lanes; poison until it is written."""
        found = self.registers.get(name)
        if found is None:
            width = self.block.kernel.width(name)
            if width == 1:
                found = np.zeros(32, bool)
            else:
                found = np.full(32, (1 << 8 * width) - 1, f"u{width}")
            self.registers[name] = found
        return found

    def runnable(self) -> bool:
        if self.waits_for is not None and self.waits_for():
            self.waits_for = None
        return self.waits_for is None

    def step(self) -> bool:
        """One instruction of the lanes that are furthest behind; False where the warp must wait."""
        if not self.runnable() or not self.active.any():
            return False
        pc = int(self.pcs[self.active].min())
        lanes = self.active & (self.pcs == pc)
        self.pcs[lanes] = pc + 1
        self.block.executed += 1
        if self.block.kernel.operations[pc](self, lanes) is False:
            self.pcs[lanes] = pc  # again, once what it waits for is there
            return False
        return True


@dataclass
class CountingBarrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that it expects are there."""

    arrivals: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending < 0:
            raise Fault("more arrivals at an mbarrier than it counts")
        self.turn()

    def turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals


class Block:
    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        parameters: np.ndarray,
        maps: dict[int, TensorMap],
        index: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        seed: int,
    ) -> None:
        self.kernel, self.memory, self.parameters, self.maps = kernel, memory, parameters, maps
        self.index, self.random = index, random.Random(seed)
        self.shared = np.full(SHARED + shared_bytes, POISON, np.uint8)
        self.warps = [Warp(self, i, min(32, threads - 32 * i)) for i in range(-(-threads // 32))]
        self.barriers: dict[int, CountingBarrier] = {}
        self.in_flight: list[Callable[[], None]] = []  # tensor copies
        self.executed = 0
        self._arrived: dict[int, set[int]] = {}
        self._generation: dict[int, int] = {}

    def run(self) -> None:
        while live := [w for w in self.warps if w.active.any()]:
            ready = [w for w in live if w.runnable()]
            # a tensor copy lands at any time, and at the latest when all wait
            if self.in_flight and (not ready or self.random.random() < 0.02):
                self.in_flight.pop(self.random.randrange(len(self.in_flight)))()
            elif not ready:
                raise Fault("deadlock: every warp waits")
            else:
                warp = self.random.choice(ready)
                for _ in range(self.random.choice((1, 7, 50, 400))):
                    if not warp.step():
                        break
        if self.in_flight:
            raise Fault("a tensor copy is under way at the end of the block")

    def at_barrier(self, warp: Warp, number: int, threads: int | None) -> None:
        """``warp`` arrives at bar.sync; it goes on once as many have as the barrier counts."""
        arrived = self._arrived.setdefault(number, set())
        arrived.add(warp.index)
        generation = self._generation.setdefault(number, 0)

        def passed() -> bool:
            live = sum(1 for w in self.warps if w.active.any())
            if self._generation[number] == generation and len(arrived) == (
                threads // 32 if threads else live
            ):
                arrived.clear()
                self._generation[number] += 1
            return self._generation[number] != generation

        if not passed():
            warp.waits_for = passed

    def counting_barrier(self, address: int) -> CountingBarrier:
        if address not in self.barriers:
            raise Fault("an mbarrier that was not initialized")
        return self.barriers[address]


def launch(
    kernel: Kernel,
    memory: Memory,
    *,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Any],
    seed: int = 0,
) -> int:
    """Run every block of a grid, one after the other; the number of warp instructions.

    Args:
        kernel: of ``compile_ptx``.
        memory: global memory, read and written.
        grid: blocks in x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: in the kernel's order: pointers and numbers, ctypes structs, TensorMaps.
        seed: of the order in which warps go on and copies land.
    """
    from .instructions import translate

    if not kernel.operations:
        kernel.operations = [translate(kernel, statement) for statement in kernel.statements]
    parameters, maps = bytearray(kernel.parameter_bytes), {}
    slots = list(kernel.parameters.values())
    assert len(slots) == len(arguments), f"{kernel.name} takes {len(slots)} arguments"
    for (offset, size), value in zip(slots, arguments, strict=True):
        if isinstance(value, TensorMap):
            maps[PARAMETERS + offset] = value
        elif isinstance(value, int):
            parameters[offset : offset + size] = struct.pack("<q", value)[:size]
        else:
            packed = bytes(value)
            assert len(packed) == size, f"{kernel.name}: {len(packed)} bytes for {size}"
            parameters[offset : offset + size] = packed
    read_only = np.frombuffer(bytes(parameters), np.uint8)
    executed = 0
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                own = seed + 7 * x + 131 * y + 1009 * z
                block = Block(
                    *(kernel, memory, read_only, maps, (x, y, z), threads, shared_bytes, own)
                )
                with np.errstate(all="ignore"):  # poison and infinities are part of the program
                    block.run()
                executed += block.executed
    return executed
