"""Statements of PTX as functions of a warp and its lanes: control flow and arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import LANES, PARAMETERS, SHARED, Fault, Warp
from .program import Kernel

Operation = Callable[[Warp, np.ndarray], Any]
Reader = Callable[[Warp], np.ndarray]

TYPES: dict[str, Any] = {
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "ub" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    "f32": np.dtype(np.float32),
    "pred": np.dtype(bool),
}
_SPECIAL: dict[str, Reader] = {
    "%tid.x": lambda w: w.thread,
    **{
        f"%ctaid.{axis}": lambda w, i=i: np.full(32, w.block.index[i], np.uint32)  # type: ignore
        for i, axis in enumerate("xyz")
    },
}


def translate(kernel: Kernel, statement: str) -> Operation:
    """A statement as a function that returns False where the warp has to wait before it."""
    predicate = re.match(r"@(!?)(%?\w+)\s+(.*)", statement)
    if predicate:
        statement = predicate.group(3)
    opcode, _, rest = statement.partition(" ")
    parts, arguments = opcode.split("."), operands(rest)
    try:
        operation = _find(kernel, opcode, parts, arguments)
    except (KeyError, IndexError, ValueError) as error:
        raise NotImplementedError(f"{statement!r}: {error!r}") from error
    if not predicate:
        return operation
    negated, name = bool(predicate.group(1)), predicate.group(2)

    def guarded(warp: Warp, lanes: np.ndarray) -> Any:
        taken = lanes & (warp.register(name) != negated)
        return operation(warp, taken) if taken.any() else None

    return guarded


def operands(text: str) -> list[str]:
    """Operands apart, those in braces and brackets whole."""
    found, depth = [""], 0
    for letter in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def read(kernel: Kernel, operand: str, dtype: Any) -> Reader:
    """An operand as 32 values of ``dtype``."""
    dtype = np.dtype(dtype)
    if operand in _SPECIAL:
        special = _SPECIAL[operand]
        return lambda w: special(w).view(dtype)
    if operand.startswith("%") or operand in kernel.registers:
        width = kernel.width(operand)
        if width == dtype.itemsize:
            return lambda w: w.register(operand).view(dtype)
        bits = np.dtype(f"u{dtype.itemsize}")  # the low part of a wider register
        return lambda w: w.register(operand).astype(bits).view(dtype)
    if operand.startswith("0f"):
        value = np.full(32, int(operand[2:], 16), np.uint32).view(dtype)
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
        mask = (1 << 8 * dtype.itemsize) - 1
        number = int(operand, 0)
        value = (
            np.full(32, bool(number))
            if dtype.kind == "b"
            else (np.full(32, number & mask, f"u{dtype.itemsize}").view(dtype))
        )
    elif operand in kernel.parameters:
        value = np.full(32, PARAMETERS + kernel.parameters[operand][0], np.uint64).astype(dtype)
    elif operand.endswith("bytesE"):  # the one array of dynamic shared memory
        value = np.full(32, SHARED, np.uint64).astype(dtype)
    else:
        raise ValueError(f"operand {operand}")
    return lambda w: value


def write(warp: Warp, name: str, lanes: np.ndarray, values: np.ndarray) -> None:
    """Values into a register: their bits, or a narrower number extended by its sign."""
    if name == "_":
        return
    register = warp.register(name)
    if register.dtype != values.dtype:
        if values.dtype.itemsize == register.dtype.itemsize:
            values = values.view(register.dtype)
        else:
            signed = values.dtype.kind == "i"
            values = values.astype(f"{'i' if signed else 'u'}{register.dtype.itemsize}")
            values = values.view(register.dtype)
    np.copyto(register, values, where=lanes)


def elements(operand: str) -> list[str]:
    """The registers of {a, b, ...}, or the one there is."""
    return operands(operand[1:-1]) if operand.startswith("{") else [operand]


def _find(kernel: Kernel, opcode: str, parts: list[str], arguments: list[str]) -> Operation:
    from . import tensor_cores, transfers

    for table in (transfers.OPERATIONS, tensor_cores.OPERATIONS):
        for prefix, make in table.items():
            if opcode == prefix or opcode.startswith(prefix + "."):
                return make(kernel, opcode, parts, arguments)
    if parts[0] in _MAKERS:
        return _MAKERS[parts[0]](kernel, parts, arguments)
    return _arithmetic(kernel, parts, arguments)


# --- control -------------------------------------------------------------------------------------
def _branch(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    target = kernel.labels[arguments[0]]

    def branch(warp: Warp, lanes: np.ndarray) -> None:
        warp.pcs[lanes] = target

    return branch


def _return(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    def leave(warp: Warp, lanes: np.ndarray) -> None:
        warp.active = warp.active & ~lanes

    return leave


def whole(warp: Warp, lanes: np.ndarray, what: str) -> None:
    """All lanes that still run are here together."""
    if (lanes != warp.active).any():
        raise Fault(f"{what} in a part of a warp")


def _barrier(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    if parts[1] == "warp":
        return lambda warp, lanes: whole(warp, lanes, "bar.warp.sync")
    number = int(arguments[0])
    threads = int(arguments[1]) if len(arguments) > 1 else None

    def barrier(warp: Warp, lanes: np.ndarray) -> None:
        whole(warp, lanes, "bar.sync")
        warp.block.at_barrier(warp, number, threads)

    return barrier


def _trap(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    def trap(warp: Warp, lanes: np.ndarray) -> None:
        raise Fault("trap")

    return trap


# --- arithmetic ----------------------------------------------------------------------------------
def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // b
    if a.dtype.kind == "i":  # toward zero
        quotient = quotient + ((quotient < 0) & (quotient * b != a))
    return (a - quotient * b if remainder else quotient).astype(a.dtype)


def _shift(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    by = np.minimum(by.astype(np.int64), bits)
    inside = np.minimum(by, bits - 1).astype(a.dtype)
    if left:
        return np.where(by < bits, a << inside, 0).astype(a.dtype)
    return np.where((by < bits) | (a.dtype.kind == "i"), a >> inside, 0).astype(a.dtype)


def _exp2(x: np.ndarray, flush: bool) -> np.ndarray:
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(np.abs(y) < np.float32(2.0**-126), np.float32(0), y) if flush else y


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": lambda a, b: (np.fmin if a.dtype.kind == "f" else np.minimum)(a, b),
    "max": lambda a, b: (np.fmax if a.dtype.kind == "f" else np.maximum)(a, b),
    "div": lambda a, b: _divide(a, b, False),
    "rem": lambda a, b: _divide(a, b, True),
}
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "not": np.invert,
    "neg": np.negative,
    "rcp": lambda x: np.float32(1) / x,
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(np.float32),
}


def _arithmetic(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    name, to, dtype = parts[0], arguments[0], TYPES[parts[-1]]
    x = read(kernel, arguments[1], dtype)
    if name == "ex2":
        flush = "ftz" in parts
        return lambda w, m: write(w, to, m, _exp2(x(w), flush))
    if name in _UNARY:
        unary = _UNARY[name]
        return lambda w, m: write(w, to, m, unary(x(w)))
    if name in ("shl", "shr"):
        by, left = read(kernel, arguments[2], np.uint32), name == "shl"
        return lambda w, m: write(w, to, m, _shift(x(w), by(w), left))
    binary, y = _BINARY[name], read(kernel, arguments[2], dtype)
    return lambda w, m: write(w, to, m, binary(x(w), y(w)))


def _multiply(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    """mul, mad and fma: of floats, or the low, high or both halves of an integer product."""
    to, dtype = arguments[0], TYPES[parts[-1]]
    x, y = (read(kernel, a, dtype) for a in arguments[1:3])
    added = len(arguments) > 3
    if dtype.kind == "f":
        if not added:
            return lambda w, m: write(w, to, m, x(w) * y(w))
        z = read(kernel, arguments[3], dtype)
        exact = lambda w: x(w).astype(np.float64) * y(w) + z(w)
        return lambda w, m: write(w, to, m, exact(w).astype(np.float32))
    half = parts[1]
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if dtype.itemsize < 8 else dtype
    if half == "hi":
        shift = 8 * dtype.itemsize
        if dtype.itemsize == 8:
            raise ValueError("mul.hi of 64 bits")
        return lambda w, m: write(
            w, to, m, ((x(w).astype(wide) * y(w).astype(wide)) >> shift).astype(dtype)
        )
    result = wide if half == "wide" else dtype
    z = read(kernel, arguments[3], result) if added else lambda w: result.type(0)
    return lambda w, m: write(
        w, to, m, (x(w).astype(result) * y(w).astype(result) + z(w)).astype(result)
    )


def _compare(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    dtype = TYPES[parts[-1]]
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }[parts[1][:2]]
    unordered = len(parts[1]) == 3  # true where one is NaN
    x, y = (read(kernel, a, dtype) for a in arguments[1:3])

    def setp(warp: Warp, lanes: np.ndarray) -> None:
        a, b = x(warp), y(warp)
        result = compare(a, b)
        if dtype.kind == "f":
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if unordered else result & ~nan
        write(warp, arguments[0], lanes, result)

    return setp


def _select(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    dtype = TYPES[parts[-1]]
    x, y = (read(kernel, a, dtype) for a in arguments[1:3])
    chosen = read(kernel, arguments[3], bool)
    return lambda w, m: write(w, arguments[0], m, np.where(chosen(w), x(w), y(w)))


def _move(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    """A register, or one packed of several, or several unpacked of one."""
    to, source = elements(arguments[0]), elements(arguments[1])
    width = sum(1 if kernel.width(name) == 1 else kernel.width(name) for name in to)
    if len(to) == len(source) == 1:
        x = read(kernel, source[0], bool if width == 1 else f"u{width}")
        return lambda w, m: write(w, to[0], m, x(w))
    readers = [read(kernel, name, f"u{width // len(source)}") for name in source]

    def move(warp: Warp, lanes: np.ndarray) -> None:
        packed = np.stack([x(warp) for x in readers], axis=1).view(f"u{width // len(to)}")
        for name, values in zip(to, packed.reshape(32, len(to)).T, strict=True):
            write(warp, name, lanes, np.ascontiguousarray(values))

    return move


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of float16 or bfloat16 as float32."""
    if kind.startswith("bf"):
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def from_float(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 rounded to float16 or bfloat16, as patterns of 16 bits."""
    if not kind.startswith("bf"):
        return np.ascontiguousarray(x, np.float32).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _convert(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    halves = ("f16", "bf16", "f16x2", "bf16x2")
    target, source = [p for p in parts[1:] if p in TYPES or p in halves]
    to = arguments[0]
    if source in halves:
        bits = read(kernel, arguments[1], np.uint16)
        return lambda w, m: write(w, to, m, to_float(bits(w), source))
    x = read(kernel, arguments[1], TYPES[source])
    if target in halves[:2]:
        return lambda w, m: write(w, to, m, from_float(x(w), target))
    if target in halves[2:]:  # the first operand becomes the upper half
        y = read(kernel, arguments[2], np.float32)
        pair = lambda w: (
            (from_float(x(w), target).astype(np.uint32) << 16) | (from_float(y(w), target))
        )
        return lambda w, m: write(w, to, m, pair(w))
    dtype = TYPES[target]

    def convert(warp: Warp, lanes: np.ndarray) -> None:
        values = x(warp)
        if values.dtype.kind == "f" and dtype.kind != "f":
            values = np.where(np.isnan(values), 0, np.trunc(values))
        write(warp, to, lanes, values.astype(dtype))

    return convert


def _address_of_space(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    x = read(kernel, arguments[1], np.uint64)
    return lambda w, m: write(w, arguments[0], m, x(w))


def _insert_bits(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    field, base, first, count = (read(kernel, a, np.uint32) for a in arguments[1:5])

    def insert(warp: Warp, lanes: np.ndarray) -> None:
        at, size = first(warp).astype(np.uint64), count(warp).astype(np.uint64)
        mask = ((np.uint64(1) << size) - np.uint64(1)) << at
        kept = base(warp).astype(np.uint64) & ~mask
        inserted = (field(warp).astype(np.uint64) << at) & mask
        write(warp, arguments[0], lanes, (kept | inserted).astype(np.uint32))

    return insert


def _shuffle(kernel: Kernel, parts: list[str], arguments: list[str]) -> Operation:
    if parts[2] != "bfly":
        raise ValueError("shfl." + parts[2])
    to = arguments[0].split("|")[0]
    x, mask = read(kernel, arguments[1], np.uint32), read(kernel, arguments[2], np.uint32)

    def shuffle(warp: Warp, lanes: np.ndarray) -> None:
        whole(warp, lanes, "shfl.sync")
        write(warp, to, lanes, x(warp)[(LANES ^ mask(warp)) & 31])

    return shuffle


_MAKERS: dict[str, Callable[[Kernel, list[str], list[str]], Operation]] = {
    "bra": _branch,
    "ret": _return,
    "exit": _return,
    "trap": _trap,
    "bar": _barrier,
    "barrier": _barrier,
    **dict.fromkeys(("mul", "mad", "fma"), _multiply),
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": _address_of_space,
    "bfi": _insert_bits,
    "shfl": _shuffle,
}
