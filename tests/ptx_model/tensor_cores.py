"""Products of a warp (mma) and of a warpgroup (wgmma) in the PTX model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .instructions import Operation, elements, read, to_float, whole
from .machine import Fault, Warp
from .program import Kernel

_LANE, _HALF = np.arange(32)[:, None, None], np.arange(2)
# where element (lane, register, half) of a left operand stands in its 16 x 16 block
_LEFT = (
    _LANE // 4 + 8 * (np.arange(4)[:, None] % 2),
    _LANE % 4 * 2 + _HALF + 8 * (np.arange(4)[:, None] // 2),
)
# of a right operand in its 16 x 8
_RIGHT = (_LANE % 4 * 2 + _HALF + 8 * np.arange(2)[:, None], _LANE // 4 + 0 * _HALF)
# and (lane, element) of an accumulator in its 16 x 8
_SUM = (
    _LANE[:, :, 0] // 4 + 8 * (np.arange(4) // 2),
    _LANE[:, :, 0] % 4 * 2 + np.arange(4) % 2,
)


def _matrix(warp: Warp, names: list[str], kind: str, places: Any, shape: Any) -> np.ndarray:
    """The matrix that registers of two 16-bit numbers hold over a warp, in float64."""
    bits = np.stack([warp.register(name) for name in names], axis=1)
    matrix = np.zeros(shape)
    matrix[places] = to_float(bits.view(np.uint16), kind).reshape(32, len(names), 2)
    return matrix


def _multiply(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    kind = parts[-2]
    to, left, right, sums = map(elements, arguments)
    readers = [read(kernel, name, np.float32) for name in sums]

    def multiply(warp: Warp, lanes: np.ndarray) -> None:
        whole(warp, lanes, "mma")
        a = _matrix(warp, left, kind, _LEFT, (16, 16))
        b = _matrix(warp, right, kind, _RIGHT, (16, 8))
        product = (a @ b)[_SUM]
        added = [(product[:, i] + x(warp)).astype(np.float32) for i, x in enumerate(readers)]
        for name, values in zip(to, added, strict=True):
            warp.register(name).view(np.float32)[:] = values

    return multiply


# --- warpgroup products --------------------------------------------------------------------------
def _box(shared: np.ndarray, descriptor: int, columns: int, kind: str) -> np.ndarray:
    """The right operand [columns, 16] that a shared-memory descriptor names.

    Its bits as the PTX ISA lays them down: start, stride of 8 rows, base offset, 128-byte swizzle.
    """
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise Fault(f"a descriptor that is not modeled: {descriptor:#x}")
    n, k = np.arange(columns)[:, None], np.arange(16)
    at = start + n // 8 * stride + n % 8 * 128 + k * 2
    at ^= (at >> 7 & 7) << 4
    if at.max() + 2 > len(shared):
        raise Fault("a warpgroup product reads beyond shared memory")
    bits = shared[at].astype(np.uint16) | shared[at + 1].astype(np.uint16) << 8
    return to_float(bits, kind).astype(np.float64)


@dataclass(eq=False)
class _Product:
    """A warp's share of a product under way: its accumulators are poison until it is waited for."""

    warp: Warp
    to: list[str]
    left: list[str]
    descriptor: int
    kind: str
    keep: bool  # adds to what the accumulators hold
    sums: np.ndarray  # [32, accumulators]; products that follow each other share them

    def finish(self) -> None:
        # operands are read as late as they may be: what was reused too soon is seen
        columns = len(self.to) * 2
        a = _matrix(self.warp, self.left, self.kind, _LEFT, (16, 16))
        product = a @ _box(self.warp.block.shared, self.descriptor, columns, self.kind).T
        for block in range(columns // 8):
            part = product[:, 8 * block : 8 * block + 8][_SUM]
            own = self.sums[:, 4 * block : 4 * block + 4]
            own[:] = part + own if self.keep else part
        for i, name in enumerate(self.to):
            self.warp.register(name).view(np.float32)[:] = self.sums[:, i]


def _warpgroup(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    columns = int(re.search(r"m64n(\d+)k16", opcode).group(1))  # type: ignore[union-attr]
    kind, to, left = parts[-1], elements(arguments[0]), elements(arguments[1])
    descriptor, keeps = read(kernel, arguments[2], np.uint64), read(kernel, arguments[3], bool)
    # signs of both operands, and whether the right one is transposed
    if arguments[4:6] != ["1", "1"] or arguments[6] != "0" or len(to) != columns // 2:
        raise ValueError("a form of wgmma that is not modeled")

    def multiply(warp: Warp, lanes: np.ndarray) -> None:
        whole(warp, lanes, "wgmma")
        where = np.unique(descriptor(warp))
        if len(where) != 1:
            raise Fault("lanes of a warp disagree on a descriptor")
        under_way = [p for group in (*warp.product_groups, warp.products) for p in group]
        same = [p for p in under_way if p.to == to]
        if same:
            sums = same[-1].sums
        else:
            sums = np.stack([warp.register(n).view(np.float32).copy() for n in to], axis=1)
        warp.products.append(
            _Product(warp, to, left, int(where[0]), kind, bool(keeps(warp)[0]), sums)
        )
        for name in to:
            warp.register(name).view(np.float32)[:] = np.nan

    return multiply


def _commit(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    def commit(warp: Warp, lanes: np.ndarray) -> None:
        warp.product_groups.append(warp.products)
        warp.products = []

    return commit


def _wait(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    """Completes the products of this very warp and of no other: that is all that PTX promises."""
    pending = int(arguments[0])

    def wait(warp: Warp, lanes: np.ndarray) -> None:
        while len(warp.product_groups) > pending:
            for product in warp.product_groups.pop(0):
                product.finish()

    return wait


OPERATIONS = {
    "mma.sync.aligned.m16n8k16": _multiply,
    "wgmma.fence": lambda kernel, opcode, parts, arguments: lambda warp, lanes: None,
    "wgmma.commit_group": _commit,
    "wgmma.wait_group": _wait,
    "wgmma.mma_async": _warpgroup,
}
