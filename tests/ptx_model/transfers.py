"""Loads, stores, background copies and tensor copies of the PTX model."""

from __future__ import annotations

import re

import numpy as np

from .instructions import TYPES, Operation, Reader, elements, read, whole, write
from .machine import GLOBAL, PARAMETERS, POISON, CountingBarrier, Fault, TensorMap, Warp
from .program import Kernel


def address(kernel: Kernel, operand: str) -> Reader:
    """[register or name + offset] as 32 addresses."""
    base, offset = re.fullmatch(  # type: ignore[union-attr]
        r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand
    ).groups()
    x = read(kernel, base, np.dtype(f"u{kernel.width(base)}" if base.startswith("%") else "u8"))
    return lambda w: x(w).astype(np.int64) + int(offset or 0)


def _space(warp: Warp, kind: str, addresses: np.ndarray, size: int, what: str):
    """The bytes of a memory space and offsets into them, checked."""
    if kind.startswith("shared"):
        data, offsets = warp.block.shared, addresses
    elif kind == "param":
        data, offsets = warp.block.parameters, addresses - PARAMETERS
    else:
        data, offsets = warp.block.memory.bytes, addresses - GLOBAL
    if (offsets % size).any():
        raise Fault(f"misaligned {what} of {size} bytes in {kind} memory")
    if (offsets < 0).any() or (offsets + size > len(data)).any():
        raise Fault(f"{what} beyond {kind} memory")
    if data is warp.block.memory.bytes:
        warp.block.memory.check(offsets, size, what)
    return data, offsets


def _load(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    dtype, names, where = TYPES[parts[-1]], elements(arguments[0]), address(kernel, arguments[1])
    size = len(names) * dtype.itemsize

    def load(warp: Warp, lanes: np.ndarray) -> None:
        data, offsets = _space(warp, parts[1], where(warp)[lanes], size, "load")
        values = np.zeros((32, len(names)), dtype)
        rows = data[offsets[:, None] + np.arange(size)]
        values[lanes] = np.ascontiguousarray(rows).view(dtype)
        for name, column in zip(names, values.T, strict=True):
            write(warp, name, lanes, np.ascontiguousarray(column))

    return load


def _store(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    dtype, names, where = TYPES[parts[-1]], elements(arguments[1]), address(kernel, arguments[0])
    readers, size = [read(kernel, name, dtype) for name in names], len(names) * dtype.itemsize

    def store(warp: Warp, lanes: np.ndarray) -> None:
        data, offsets = _space(warp, parts[1], where(warp)[lanes], size, "store")
        values = np.stack([x(warp)[lanes] for x in readers], axis=1)
        data[offsets[:, None] + np.arange(size)] = values.view(np.uint8)

    return store


# --- cp.async ------------------------------------------------------------------------------------
def _copy(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    to, source, size = *(address(kernel, a) for a in arguments[:2]), int(arguments[2], 0)
    count = read(kernel, arguments[3] if len(arguments) > 3 else arguments[2], np.uint32)

    def copy(warp: Warp, lanes: np.ndarray) -> None:
        shared, targets = _space(warp, "shared", to(warp)[lanes], size, "cp.async")
        sources, counts = source(warp)[lanes] - GLOBAL, count(warp)[lanes].astype(np.int64)
        if (sources[counts > 0] % size).any():
            raise Fault("misaligned cp.async")
        for n in np.unique(counts[counts > 0]):
            warp.block.memory.check(sources[counts == n], int(n), "cp.async")
        each = targets[:, None] + np.arange(size)
        shared[each] = POISON
        valid = np.arange(size) < counts[:, None]
        columns = np.where(valid, sources[:, None] + np.arange(size), 0)

        def land() -> None:
            shared[each] = np.where(valid, warp.block.memory.bytes[columns], 0)

        warp.copies.append(land)

    return copy


def _commit_copies(
    kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]
) -> Operation:
    def commit(warp: Warp, lanes: np.ndarray) -> None:
        warp.copy_groups.append(warp.copies)
        warp.copies = []

    return commit


def _wait_copies(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    pending = int(arguments[0])

    def wait(warp: Warp, lanes: np.ndarray) -> None:
        while len(warp.copy_groups) > pending:
            for land in warp.copy_groups.pop(0):
                land()

    return wait


# --- mbarriers and tensor copies -----------------------------------------------------------------
def _init(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    where, count = address(kernel, arguments[0]), read(kernel, arguments[1], np.uint32)

    def init(warp: Warp, lanes: np.ndarray) -> None:
        for at, n in zip(where(warp)[lanes], count(warp)[lanes], strict=True):
            warp.block.barriers[int(at)] = CountingBarrier(int(n), int(n))

    return init


def _arrive(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    where = address(kernel, arguments[1])
    expected = read(kernel, arguments[2], np.uint32) if "expect_tx" in parts else None

    def arrive(warp: Warp, lanes: np.ndarray) -> None:
        for lane in np.flatnonzero(lanes):
            barrier = warp.block.counting_barrier(int(where(warp)[lane]))
            barrier.bytes += int(expected(warp)[lane]) if expected else 0
            barrier.arrive()

    return arrive


def _try_wait(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    where, parity = address(kernel, arguments[1]), read(kernel, arguments[2], np.uint32)

    def wait(warp: Warp, lanes: np.ndarray) -> bool | None:
        at, phases = np.unique(where(warp)[lanes]), np.unique(parity(warp)[lanes])
        if len(at) != 1 or len(phases) != 1:
            raise Fault("lanes of a warp wait for different mbarriers")
        barrier, phase = warp.block.counting_barrier(int(at[0])), int(phases[0])
        if barrier.phase % 2 == phase:
            # rather than let it spin: the warp is left alone until the phase is over
            warp.waits_for = lambda: barrier.phase % 2 != phase
            return False
        write(warp, arguments[0], lanes, np.ones(32, bool))
        return None

    return wait


def _copy_box(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    to, barrier_at = address(kernel, arguments[0]), address(kernel, arguments[2])
    names = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{\s*(%?\w+)\s*,\s*(%?\w+)\s*\}\s*\]", arguments[1])
    map_at, column, row = (
        read(kernel, name, dtype)
        for name, dtype in zip(names.groups(), (np.uint64, np.int32, np.int32), strict=True)  # type: ignore[union-attr]
    )

    def copy(warp: Warp, lanes: np.ndarray) -> None:
        for lane in np.flatnonzero(lanes):
            at = lambda reader, lane=lane: int(reader(warp)[lane])
            _start_box(
                *(warp, warp.block.maps[at(map_at)], at(to), at(row), at(column)),
                warp.block.counting_barrier(at(barrier_at)),
            )

    return copy


def _start_box(
    warp: Warp, tensor: TensorMap, to: int, row: int, column: int, barrier: CountingBarrier
) -> None:
    size, shared = tensor.box_rows * 128, warp.block.shared
    if to % 1024:
        raise Fault("a tensor copy to a box that is no multiple of 1024 bytes")
    shared[to : to + size] = POISON

    def land() -> None:
        for r in range(tensor.box_rows):
            for chunk in range(8):
                line, first = row + r, column + chunk * 8
                swizzled = to + r * 128 + (chunk ^ r % 8) * 16
                if line < tensor.rows and first < tensor.columns:
                    source = tensor.pointer - GLOBAL + (line * tensor.columns + first) * 2
                    data = warp.block.memory.bytes[source : source + 16]
                else:
                    data = np.zeros(16, np.uint8)
                shared[swizzled : swizzled + 16] = data
        barrier.bytes -= size  # rows outside the matrix count as well
        if barrier.bytes < 0:
            raise Fault("more bytes at an mbarrier than it expects")
        barrier.turn()

    warp.block.in_flight.append(land)


def _nothing(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    return lambda warp, lanes: None


# --- ldmatrix ------------------------------------------------------------------------------------
def _load_matrices(
    kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]
) -> Operation:
    names, where, transposed = (
        elements(arguments[0]),
        address(kernel, arguments[1]),
        "trans" in parts,
    )
    lane = np.arange(32)

    def load(warp: Warp, lanes: np.ndarray) -> None:
        whole(warp, lanes, "ldmatrix")
        shared, offsets = _space(warp, "shared", where(warp), 16, "ldmatrix")
        rows = np.ascontiguousarray(shared[offsets[:, None] + np.arange(16)]).view(np.uint16)
        for i, name in enumerate(names):
            matrix = rows[8 * i : 8 * i + 8]
            matrix = matrix.T if transposed else matrix
            low, high = (matrix[lane // 4, lane % 4 * 2 + j].astype(np.uint32) for j in (0, 1))
            write(warp, name, lanes, low | high << 16)

    return load


OPERATIONS = {
    "cp.async.bulk.tensor.2d": _copy_box,
    "cp.async.commit_group": _commit_copies,
    "cp.async.wait_group": _wait_copies,
    "cp.async": _copy,
    "mbarrier.init": _init,
    "mbarrier.arrive": _arrive,
    "mbarrier.try_wait": _try_wait,
    "fence": _nothing,
    "ldmatrix": _load_matrices,
    "ld": _load,
    "st": _store,
}
