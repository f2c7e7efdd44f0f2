"""Compile recorded launches ahead of time, without a GPU, and read what the binary uses."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from mpdit_kernels.launch import Launch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

_MOVES = re.compile(r"\b(ld|st)(?:\.[\w:]+)*?\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](\d+)\b")
_ASYNC_LOADS = re.compile(r"\bcp\.async\.c[ag]\.shared\S*\.global\S*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-fA-F]+|\d+)")


@dataclass(frozen=True)
class Usage:
    """The resources of one compiled kernel, and how it moves and multiplies.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory and stack of a thread.
        shared: bytes of shared memory of a program.
        loads, stores: how many instructions for global memory there are of each width in bytes, from the PTX:
            of a thread, and of asynchronous copies to shared memory.
        products: how many "wgmma" and "mma" instructions there are, from the PTX.
    """

    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    products: dict[str, int]


def compile_ahead(recorded: Launch, target: str) -> CompiledKernel:
    """Compile a recorded launch for a target such as "sm_90", specialised as Triton would for these arguments.

    Tensors may be meta: their storage is taken to begin at a multiple of 16 bytes, as torch's allocations do. The
    binary stays in Triton's cache, where a launch of these arguments finds it.
    """
    signature, constants, attributes, options = _specialization(recorded, target)
    source = ASTSource(recorded.kernel, signature, constants, attributes)
    return triton.compile(source, target=_gpu(target), options=options)


def usages(jobs: Sequence[tuple[Launch, str]]) -> list[Usage | str]:
    """Compile each (launch, target), in one process per core; what differs in nothing is compiled once.

    Returns:
        In the order of `jobs`: a Usage, or the first line of the error that compiling ended with.
    """
    keys = [(job.kernel, target, form(job, target)) for job, target in jobs]
    distinct = {key: partial(_usage_or_error, *job) for key, job in zip(keys, jobs, strict=True)}
    found = dict(zip(distinct, _in_processes(list(distinct.values())), strict=True))
    return [found[key] for key in keys]


def _usage_or_error(recorded: Launch, target: str) -> Usage | str:
    try:
        return usage(compile_ahead(recorded, target))
    except Exception as error:  # whatever a compiler may end with
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {next((line for line in lines if 'error' in line.lower()), lines[0]).strip()}"


_tasks: list[Callable[[], Any]] = []


def _run_task(index: int) -> Any:
    return _tasks[index]()


def _in_processes(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run the tasks, which the processes inherit: kernels and tensors need no pickling."""
    global _tasks
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    if workers < 2:
        return [task() for task in tasks]
    _tasks = tasks
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            try:
                return list(pool.map(_run_task, range(len(tasks))))
            except BaseException:  # who interrupts does not wait for what is being compiled
                for process in multiprocessing.active_children():
                    process.kill()
                raise
    finally:
        _tasks = []


def usage(compiled: CompiledKernel) -> Usage:
    """Read registers and spills from the cubin, widths and matrix instructions from the PTX."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    resources = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    loads, stores = widths(ptx)
    counts = {"wgmma": ptx.count("wgmma.mma_async"), "mma": len(re.findall(r"(?<!wg)\bmma\.sync", ptx))}
    return Usage(
        registers=resources["REG"],
        spills=resources["LOCAL"] + resources["STACK"],
        shared=compiled.metadata.shared,
        loads=loads,
        stores=stores,
        products={kind: count for kind, count in counts.items() if count},
    )


def widths(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    """Count loads from and stores to global memory in the PTX, by width in bytes."""
    found: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for what, vector, bits in _MOVES.findall(ptx):
        found[what][int(vector or 1) * int(bits) // 8] += 1
    for size in _ASYNC_LOADS.findall(ptx):
        found["ld"][int(size, 0)] += 1
    loads, stores = ({width: n for width, n in sorted(counter.items()) if n} for counter in found.values())
    return loads, stores


def form(recorded: Launch, target: str) -> str:
    """Return a text that launches of a kernel share when they run the same binary."""
    return repr(_specialization(recorded, target))


@dataclass(frozen=True)
class _Pointer:
    """A tensor as Triton sees it."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def pointer(x: Tensor) -> _Pointer:
    """Return what Triton's launcher takes for a tensor, which may be meta."""
    return _Pointer(x.dtype, int(x.storage_offset() * x.element_size()) if x.is_meta else x.data_ptr())


def _specialization(recorded: Launch, target: str) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any], Any]:
    """Return (signature, constants, attributes, options) of a launch by what Triton's launcher itself runs.

    That is private (the same in 3.6.0 and 3.7.1), but a cached binary is found by all of its details: by an empty
    attribute, for example, of each number that is not divisible by 16.
    """
    kernel, backend = recorded.kernel, make_backend(_gpu(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    args = [pointer(x) if isinstance(x, Tensor) else x for x in recorded.args]
    modes = {"debug": knobs.runtime.debug, "instrumentation_mode": knobs.compilation.instrumentation_mode}
    constants = recorded.constants | modes
    options, signature, constants, attributes = kernel._pack_args(backend, constants, *bind(*args, **constants))
    return signature, constants, attributes, options.__dict__


def _gpu(target: str) -> GPUTarget:
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
