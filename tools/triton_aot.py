"""Compile every Triton kernel without a GPU and read what it costs: registers, spills, memory.

    python tools/triton_aot.py [--all] [--op NAME] [--update] [--table FILE] [--gates]

The launchers themselves run, on tensors without memory ("meta") at the paper's sizes, and each
launch is caught with the very arguments that the GPU would get, once for every tile that tuning
may choose. It is compiled to a cubin for sm_80 and sm_90, whose resources are held to a committed
table: a kernel that begins to spill or to divide in 64 bits, loses its tensor-core instructions or
grows is an error.
``--gates`` compiles for every architecture that people have (Ada, Blackwell) and asks only that the
first tile of each kernel, the one that runs where nothing was measured, fits the card.
Must run without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from pgn_fast.kernels import _common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pgn_fast.ops import devices, dispatch
from pgn_fast.ops.examples import Sizes, examples

TABLE = Path(__file__).parents[1] / "tests/resources/triton.json"
ARCHITECTURES = (80, 90)
# shared memory that a block may ask for, in bytes, on the smallest card of each architecture
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# how much a figure may grow over the table before it is an error
GROWTH = {"registers": 1.1, "shared": 1.1, "stack": 1.0, "spills": 1.0, "long_divisions": 1.0}
_CUOBJDUMP = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _by_examples(module: Any, dtype: torch.dtype, ones: bool) -> None:
    """The op's examples, forward and backward, by the launchers of ``module``."""
    op = module.__name__.rpartition(".")[2]
    public = importlib.import_module(f"pgn_fast.ops.{op}")
    sizes = Sizes(1, 1, 1, 1, 1, 1, 1) if ones else Sizes(B=64)
    with mock.patch.object(public, "select_kernel", lambda name, *_, **__: getattr(module, name)):
        for example in examples(op, sizes, dtype, torch.device("meta")):
            outputs = example.call("triton")(*example.tensors)
            leaves = [x for x in example.tensors if x.requires_grad]
            if leaves:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])


def _prompted_patch_embed(module: Any, dtype: torch.dtype, ones: bool) -> None:
    B, C, size, patch, D = (1, 1, 1, 1, 1) if ones else (64, 3, 224, 16, 768)
    weight, bias = _empty(D, C, patch, patch, dtype=dtype), _empty(D, dtype=dtype)
    pos_embed, prefix = _empty((size // patch) ** 2, D, dtype=dtype), _empty(1, D, dtype=dtype)
    images = _empty(B, C, size, size, dtype=torch.uint8)
    for pixels in (images, images.to(memory_format=torch.channels_last), images.to(dtype)):
        module.prompted_patch_embed(
            *(pixels, weight, bias, pos_embed, prefix, None, None, prefix),
            *([0.017] * C, [-2.1] * C, "softmax", "append"),
        )


def _prompt_attention(module: Any, dtype: torch.dtype, ones: bool) -> None:
    paper, no_power_of_two = (64, 197, 50, 12, 64), (64, 257, 50, 16, 80)
    for B, T, P, H, d in [(1, 1, 1, 1, 2)] if ones else [paper, no_power_of_two]:
        qkv, prompts = _empty(B, T, 3, H, d, dtype=dtype), _empty(P, 2, H, d, dtype=dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        prompt_k, prompt_v = prompts.permute(1, 2, 0, 3).unbind(0)
        for queries in (q, q[:, :, :1]):
            arguments = (queries, k, v, prompt_k, prompt_v)
            out, lse = module.prompt_attention(*arguments, 0.125)
            module.prompt_attention_ragged(*arguments, _empty(B, 2, dtype=torch.int64), 0.125)
            module.prompt_attention_backward(out, *arguments, out, lse, 0.125, True, True, True)


def _add_layer_norm(module: Any, dtype: torch.dtype, ones: bool) -> None:
    shape = (1, 1, 1) if ones else (64, 197, 768)
    x = _empty(*shape, dtype=dtype)
    for other in (x, None):
        _, normed, rstd = module.add_layer_norm(x, other, 1e-6)
        module.add_layer_norm_backward(other, x, normed, rstd)


# What runs an op forward and backward, at the sizes that its resources are held at, or with every
# size one, which the compiler turns into constants. Here stand ops whose launchers have more
# branches than the op's examples reach.
CASES: dict[str, Callable[[Any, torch.dtype, bool], None]] = {
    "prompted_patch_embed": _prompted_patch_embed,
    "prompt_attention": _prompt_attention,
    "add_layer_norm": _add_layer_norm,
}
NAMES = sorted({devices.stem(op) for op in dispatch.OPS if dispatch.has_kernel("triton", op)})


class Launch(NamedTuple):
    """One launch of a kernel as the launcher made it."""

    kernel: JITFunction
    arguments: dict[str, Any]  # by name, options such as num_warps included
    first_tile: bool  # made with the first of its configurations, or the only one

    def name(self, op: str, arch: int) -> str:
        """Everything that tells compiled kernels apart: the key in the table."""
        types = [_POINTERS[a.dtype][1:] for a in self.arguments.values() if isinstance(a, Tensor)]
        flags = [f"{p.name}={self.arguments[p.name]}" for p in self.kernel.params if _shown(p)]
        ones = [
            p for p in self.kernel.params if not p.is_constexpr and _is_one(self.arguments[p.name])
        ]
        warps = [f"warps={self.arguments['num_warps']}"]
        kernel = self.kernel.__name__.strip("_").removesuffix("_kernel")
        parts = [op, kernel, "+".join(dict.fromkeys(types)), f"sm_{arch}", *flags, *warps]
        return " ".join([*parts, f"ones={len(ones)}"] if ones else parts)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _shown(parameter: Any) -> bool:
    return parameter.is_constexpr and parameter.name not in ("PRECISION", "FACTORS", "SHIFTS")


def launches(op: str, dtype: torch.dtype, ones: bool = False) -> list[Launch]:
    """Every kernel launch of an op, once for each configuration that tuning may choose."""
    module = importlib.import_module(f"pgn_fast.kernels.{op}")
    caught: list[Launch] = []
    first_tile = True

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        caught.append(Launch(self, named, first_tile))

    def launch_all(configs: Any, key: Any, device: Any, launch: Callable[..., None]) -> None:
        nonlocal first_tile
        for config in configs:
            first_tile = config is configs[0]
            launch(config)
        first_tile = True

    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(JITFunction, "run", catch))
        for name, other in sys.modules.items():  # the op's own file, and that of its backward
            if name.startswith(module.__name__) and hasattr(other, "launch_tuned"):
                patched.enter_context(mock.patch.object(other, "launch_tuned", launch_all))
        CASES.get(op, _by_examples)(module, dtype, ones)
    return caught


def compile_launch(launch: Launch, arch: int) -> dict[str, int]:
    """Compile one launch for ``sm_<arch>``; registers, bytes of stack and shared memory, and the
    numbers of spill and tensor-core instructions and of 64-bit divisions."""
    kernel, arguments, _ = launch
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        # as the JIT specializes: ones are constants, pointers and multiples of 16 are marked
        if parameter.is_constexpr or value is None or _is_one(value):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in arguments.items() if k not in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = [str(_CUOBJDUMP), "--dump-resource-usage", "--dump-sass", cubin.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    count = lambda *names: sum(len(re.findall(rf"\b{name}\b", text)) for name in names)
    return {
        "registers": int(re.search(r"REG:(\d+)", text).group(1)),  # type: ignore[union-attr]
        "stack": int(re.search(r"STACK:(\d+)", text).group(1)),  # type: ignore[union-attr]
        "spills": count("LDL", "STL"),
        "shared": compiled.metadata.shared,
        "tensor_cores": count("HMMA", "HGMMA"),
        "wgmma": count("HGMMA"),
        "long_divisions": len(re.findall(r"\b(?:div|rem)\.[su]64", compiled.asm["ptx"])),
    }


def wanted(op: str, everything: bool) -> dict[str, tuple[Launch, int]]:
    """The launches and architectures to compile, by name.

    A part of them holds the table in CI: bfloat16 on sm_90, the first tile of each kernel.
    """
    found = [
        (launch, arch)
        for dtype in (DTYPES if everything else (torch.bfloat16,))
        for launch in launches(op, dtype)
        for arch in (ARCHITECTURES if everything else (90,))
        if everything or launch.first_tile
    ]
    ones = launches(op, torch.bfloat16, ones=True)
    found += [(launch, 90) for launch in ones if launch.first_tile]
    return {launch.name(op, arch): (launch, arch) for launch, arch in found}


def unfit(name: str, figures: dict[str, int], arch: int) -> list[str]:
    """What keeps a kernel's first tile from running on a card of this architecture, or well."""
    found = []
    if figures["shared"] > SHARED_LIMIT[arch]:
        offered = SHARED_LIMIT[arch]
        found.append(f"{name}: {figures['shared']} bytes of shared memory, {offered} are offered")
    if figures["long_divisions"]:
        found.append(f"{name}: {figures['long_divisions']} divisions of 64 bits, each a function")
    return found


def gates(ops: list[str], archs: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[str]:
    """Compile the first tile of every kernel for ``archs``; what is wrong, one sentence each."""
    found = []
    for op in ops:
        kernels = {
            launch.name(op, arch): (launch, arch)
            for dtype in dtypes
            for launch in launches(op, dtype)
            for arch in archs
            if launch.first_tile
        }
        for name, (launch, arch) in kernels.items():
            figures = compile_launch(launch, arch)
            print(name, figures, flush=True)
            found += unfit(name, figures, arch)
    return found


def complaints(measured: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What is worse than the committed table, one sentence each."""
    found = []
    same_compiler = table["triton"] == triton.__version__
    for name, figures in measured.items():
        known = table["kernels"].get(name)
        if known is None:
            found.append(f"{name}: not in the table; add it with --all --update")
            continue
        for what, allowed in GROWTH.items():
            # register allocation differs between compilers; a new spill counts in any
            if not same_compiler and what in ("registers", "shared"):
                continue
            if figures[what] > known[what] * allowed:
                found.append(f"{name}: {what} {known[what]} -> {figures[what]}")
        for what in ("tensor_cores", "wgmma"):
            if known[what] and not figures[what]:
                found.append(f"{name}: lost its {what} instructions")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/triton_aot.py")
    parser.add_argument("--all", action="store_true", help="every dtype, architecture and tile")
    parser.add_argument("--op", choices=NAMES, help="one op only")
    parser.add_argument("--update", action="store_true", help="write what is measured")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--gates", action="store_true", help="every architecture, no table")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=[])
    arguments = parser.parse_args(argv)
    if _common.INTERPRETED.value:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    measured, ops = {}, [arguments.op] if arguments.op else NAMES
    if arguments.gates:
        # a subset of architectures is CI's: half precision, where the tiles are largest
        dtypes = (torch.bfloat16,) if arguments.arch else DTYPES
        found = gates(ops, arguments.arch or list(SHARED_LIMIT), dtypes)
        print("\n".join(found) or "every kernel fits every card")
        return 1 if found else 0
    for op in ops:
        for name, (launch, arch) in wanted(op, arguments.all).items():
            measured[name] = compile_launch(launch, arch)
            print(name, measured[name], flush=True)
    table = {"triton": triton.__version__, "kernels": {}}
    if arguments.table.exists():
        table = json.loads(arguments.table.read_text())
    if arguments.update:
        # a complete run of an op replaces what the table knew of it
        stale = tuple(f"{op} " for op in ops) if arguments.all else ()
        kept = {k: v for k, v in table["kernels"].items() if not k.startswith(stale)}
        table = {"triton": triton.__version__, "kernels": dict(sorted((kept | measured).items()))}
        arguments.table.parent.mkdir(exist_ok=True)
        arguments.table.write_text(json.dumps(table, indent=1) + "\n")
    found = complaints(measured, table)
    print("\n".join(found) or f"{len(measured)} kernels as in the table")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
