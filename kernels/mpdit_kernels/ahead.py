"""Compile recorded launches ahead of time, without a GPU, and read what the binary uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mpdit_kernels.launch import INTERPRETING, Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_WIDTHS = re.compile(r"\b(ld|st)\.global\S*?(?:\.(v\d))?\.[bsuf](\d+)\b")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor, and how it moves and multiplies.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory and stack of a thread.
        shared: bytes of shared memory of a program.
        loads, stores: how many instructions there are of each width in bytes, from the PTX.
        matrix: "wgmma", "mma" or "", the matrix instructions found.
    """

    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: str


def compile_ahead(recorded: Launch, target: str) -> CompiledKernel:
    """Compile a recorded launch for a target such as "sm_90", specialised as Triton would for these arguments.

    Tensors may be meta: their storage is taken to begin at a multiple of 16 bytes, as torch's allocations do.

    Raises:
        RuntimeError: in a process that runs Triton's interpreter, which has nothing to compile.
    """
    if INTERPRETING:
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET")
    kernel = recorded.kernel
    options = {name: value for name, value in recorded.constants.items() if name in _OPTIONS}
    values = dict(zip(kernel.arg_names, recorded.args, strict=False))
    values |= {name: value for name, value in recorded.constants.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif _divisible(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)


def usage(compiled: CompiledKernel) -> Usage:
    """Read registers and spills from the cubin, widths and matrix instructions from the PTX."""
    ptx = compiled.asm["ptx"]
    found: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for what, vector, bits in _WIDTHS.findall(ptx):
        found[what][int(vector.removeprefix("v") or 1) * int(bits) // 8] += 1
    resources = _resources(compiled.asm["cubin"])
    return Usage(
        registers=resources["REG"],
        spills=resources["LOCAL"] + resources["STACK"],
        shared=compiled.metadata.shared,
        loads=dict(sorted(found["ld"].items())),
        stores=dict(sorted(found["st"].items())),
        matrix="wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "",
    )


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
