"""Runs the PTX that nvcc writes for the CUDA kernels, in numpy: what the compiler made of the
source is tested without a GPU.

A warp is 32 lanes of arrays; warps of a block go on in a random order and drift apart as far as the
PTX ISA lets them. What is in flight is not there yet: a background copy (cp.async), a tensor copy
(TMA) and a warpgroup product (wgmma) take effect only where the program waits for them, and until
then their target is poison (NaN in every format). Each access to memory is checked against its
allocation and its alignment. Not modeled: time, caches, the order of memory between warps that do
not synchronize, and the rounding inside one tensor-core instruction.

    kernels = compile_ptx(source, "sm_80")        # {mangled name: Kernel}
    memory = Memory()
    out = memory.put(array)                       # a device pointer
    launch(kernel, memory, grid=(1, 1, 1), threads=128, shared_bytes=0, arguments=[out, 3])
    memory.get(out, dtype, shape)
"""

from .machine import Fault, Memory, TensorMap, launch
from .program import Kernel, compile_ptx, find

__all__ = ["Fault", "Kernel", "Memory", "TensorMap", "compile_ptx", "find", "launch"]
