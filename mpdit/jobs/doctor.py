"""Looks at what a run would find on this machine: versions, GPUs, kernels, what the hardware reaches, disk."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from mpdit_kernels import AdamWEMA, proof, use
from mpdit_kernels.hardware import Gpu, find_gpu

from mpdit.core import rng
from mpdit.core.errors import UserError, first_line
from mpdit.core.gpu import gpu_problem, too_old
from mpdit.model.mpdit import create_model
from mpdit.model.presets import PRESETS

if TYPE_CHECKING:
    from mpdit.data.latents import LatentDataset

TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.7"),
    "deepspeed": ("0.19", "0.19"),
    "numpy": ("2.0", "2.5"),
    "nvidia-dali-cuda130": ("2.4", "2.4"),
    "diffusers": ("0.42", "0.42"),
}
"""Oldest and newest version, but for the last figure, that the tests are run with."""
OPTIONAL = {"flash-attn": "flash_attn", "xformers": "xformers", "apex": "apex"}
"""Packages and modules that are used where they are installed."""
_MODULES = {"deepspeed": "deepspeed", "nvidia-dali-cuda130": "nvidia.dali", "diffusers": "diffusers"}
"""Those of TESTED that may be there and not work."""

WORTH = 0.6
"""Share of the datasheet's rate below which something is wrong: a power limit, heat, another process."""

Status = Literal["ok", "note", "bad", "-"]


class Row(NamedTuple):
    """Says what was found of one thing, and what to do where it is bad."""

    part: str
    status: Status
    name: str
    found: str
    remedy: str = ""


def examine(model: str, dataset: LatentDataset | None) -> Iterator[Row]:
    """Yield what is found, in the order that a run meets it.

    Args:
        model: the preset whose step the kernels are proved with.
        dataset: latents to be read, if any.
    """
    yield from _versions()
    problem = gpu_problem()
    if problem:
        yield Row("GPU", "bad", "driver", problem.partition(": ")[0], problem.partition(": ")[2])
    if not torch.cuda.is_available():
        if not problem:
            yield Row("GPU", "-", "GPU", "none: everything runs on the CPU, the kernels' references among it")
    else:
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        yield Row("GPU", "ok", "driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}")
        for index in range(torch.cuda.device_count()):
            yield from _gpu(index)
        yield from _kernels(model, torch.device("cuda", torch.cuda.current_device()))
        yield from _network()
    if dataset is not None:
        yield from _disk(dataset)


def _versions() -> Iterator[Row]:
    yield Row("versions", "-", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name, (oldest, newest) in TESTED.items():
        found = _version(name)
        if not found:
            yield Row("versions", "-", name, "not installed")
            continue
        if name == "torch":
            cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
            found = f"{torch.__version__} ({', '.join([cuda, *([f'NCCL {nccl}'] if nccl else [])])})"
        if problem := _import_problem(_MODULES.get(name, "")):
            yield Row("versions", "bad", name, f"{found} can't be imported ({problem})", "install it again")
            continue
        near = tuple(map(int, found.split("+")[0].split(".")[:2]))
        low, high = (tuple(map(int, bound.split("."))) for bound in (oldest, newest))
        range_ = oldest if oldest == newest else f"{oldest} to {newest}"
        if low <= near <= high:
            yield Row("versions", "ok", name, found)
        elif near < low:
            yield Row("versions", "bad", name, found, f"tested with {range_}: pip install '{name}>={oldest}'")
        else:
            yield Row("versions", "note", name, found, f"newer than what was tested, {range_}")
    for name, module in OPTIONAL.items():
        if not (found := _version(name)):
            yield Row("versions", "-", name, "not installed")
            continue
        if problem := _import_problem(module):
            remedy = f"build it for torch {torch.__version__}, or remove it: nothing needs it"
            yield Row("versions", "bad", name, f"{found} can't be imported ({problem})", remedy)
        else:
            yield Row("versions", "ok", name, found)


def _import_problem(module: str) -> str:
    """Return why a module can't be imported, as one that was built for another torch or CUDA; "" if it can."""
    try:
        if module == "deepspeed":
            from mpdit.training.engine import import_deepspeed

            import_deepspeed()
        elif module:
            importlib.import_module(module)
    except Exception as error:
        return first_line(error)
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu(index: int) -> Iterator[Row]:
    """Yield the device's rows: what it is, and how fast it copies and multiplies."""
    properties = torch.cuda.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    label = f"GPU {index}"
    found = f"{properties.name}, sm_{major}{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    old = too_old(index)
    if old:
        yield Row("GPU", "bad", label, found, old)
    elif free < 0.9 * total:
        yield Row("GPU", "note", label, found, "something else is in its memory: nvidia-smi tells what")
    else:
        yield Row("GPU", "ok", label, found)
    device, datasheet = torch.device("cuda", index), find_gpu(properties.name)
    try:
        copied, multiplied = _ceilings(device)
    except torch.OutOfMemoryError:
        yield Row("GPU", "note", f"{label} speed", "not measured: its memory is in use")
        return
    yield _speed(f"{label} copy", copied, 1e12, "TB/s", datasheet, lambda gpu: gpu.bandwidth)
    yield _speed(f"{label} bf16 products", multiplied, 1e12, "TFLOP/s", datasheet, lambda gpu: gpu.flops)


def _speed(name: str, rate: float, unit: float, text: str, gpu: Gpu | None, limit: Callable[[Gpu], float]) -> Row:
    if gpu is None:
        return Row("GPU", "note", name, f"{rate / unit:.2f} {text}", "no datasheet of this GPU is at hand")
    share = rate / limit(gpu)
    found = f"{rate / unit:.2f} {text}, {share:.0%} of the datasheet's"
    if share >= WORTH:
        return Row("GPU", "ok", name, found)
    return Row(
        "GPU", "bad", name, found, "look for other processes, a power limit or heat: nvidia-smi -q -d CLOCK,POWER"
    )


def _ceilings(device: torch.device) -> tuple[float, float]:
    """Return (bytes a second of a copy, read and written; FLOP a second of an 8192 x 8192 bf16 product)."""
    with torch.cuda.device(device), torch.no_grad():
        source = torch.empty(1 << 28, device=device)  # 1 GiB, beyond any cache
        target = torch.empty_like(source)
        seconds = _seconds(lambda: target.copy_(source))
        rate = 2 * source.numel() * source.element_size() / seconds
        n = 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        return rate, 2 * n**3 / _seconds(lambda: a @ b)


def _seconds(work: Callable[[], Any], rounds: int = 10) -> float:
    """Return the median time of some work on the current device, by its own clock."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _kernels(model: str, device: torch.device) -> Iterator[Row]:
    """Yield the verdict on each kernel: one step of the preset, in bf16, has every one proved anew at its shapes."""
    proof.forget(device)
    started = time.perf_counter()
    with use("auto"), torch.device("meta"):
        network = create_model(model)
    network.to_empty(device=device)
    config = PRESETS[model]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    images = 2
    positions = torch.arange(images, device=device)
    latents = rng.normal(0, rng.Stream.NOISE, positions, (config.channels, config.input_size, config.input_size))
    try:
        with use("auto"):
            with torch.autocast("cuda", torch.bfloat16):
                out = network(latents, torch.full((images,), 0.5, device=device), torch.zeros_like(positions))
            out.float().square().mean().backward()
            AdamWEMA(network.parameters(), lr=0.0).step()
    except torch.OutOfMemoryError:
        yield Row("kernels", "note", "kernels", "not all were proved: the GPU's memory is in use")
    except Exception as error:  # a kernel that passed its proof and failed in the step
        yield Row("kernels", "bad", "a step", first_line(error), "MPDIT_KERNELS=reference goes on without our kernels")
    verdicts: dict[str, list[str]] = {}
    for key, reason in proof.known(device).items():
        verdicts.setdefault(key.split(" ", 1)[0], []).append(reason)
    for operation, reasons in sorted(verdicts.items()):
        wrong = next(filter(None, reasons), "")
        found = wrong or f"right, forward and backward, at {len(reasons)} shape{'s' if len(reasons) > 1 else ''}"
        remedy = "its reference is taken instead; please report this with the versions above" if wrong else ""
        yield Row("kernels", "bad" if wrong else "ok", operation, found, remedy)
    yield Row("kernels", "-", "time", f"{time.perf_counter() - started:.0f} s for a step of {model}")


def _network() -> Iterator[Row]:
    """Yield how fast NCCL sums between this machine's GPUs, where there are several."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return
    context = torch.multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_all_reduce, args=(rank, gpus, port, results)) for rank in range(gpus)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 90
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [process for process in ranks if process.is_alive()]
    for process in stuck:
        process.kill()
    remedy = "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 tells whether the links between the GPUs are at fault"
    if stuck or any(process.exitcode for process in ranks):
        how = "did not end in 90 s" if stuck else "failed"
        yield Row("network", "bad", "NCCL all-reduce", f"{how} between {gpus} GPUs", remedy)
        return
    rate = results.get()
    datasheet = find_gpu(torch.cuda.get_device_name(0))
    found = f"{rate / 1e9:.0f} GB/s a GPU and direction between {gpus} GPUs"
    slow = datasheet is not None and rate < 0.4 * datasheet.link
    yield Row("network", "bad" if slow else "ok", "NCCL all-reduce", found, remedy if slow else "")


def _all_reduce(rank: int, gpus: int, port: int, results: Any) -> None:
    """Time sums of 256 MiB as one of `gpus` ranks; rank 0 puts the bytes a second of a ring into `results`."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=gpus)
    values = torch.ones(1 << 26, device="cuda")
    seconds = _seconds(lambda: torch.distributed.all_reduce(values))
    if rank == 0:
        results.put(2 * (gpus - 1) / gpus * values.numel() * values.element_size() / seconds)
    torch.distributed.destroy_process_group()


def _disk(dataset: LatentDataset) -> Iterator[Row]:
    """Yield how many samples a second are read in random order, each once, for at most three seconds."""
    order = rng.bits(0, rng.Stream.ORDER, torch.tensor([0]), min(len(dataset), 1 << 20))[0].numpy() % len(dataset)
    read, begun = 0, time.perf_counter()
    try:
        while read < len(order) and time.perf_counter() - begun < 3:
            dataset.read(order[read : read + 256])
            read = min(read + 256, len(order))
    except (UserError, OSError) as error:
        yield Row("disk", "bad", "data", first_line(error), "`mpdit verify` reads all of it")
        return
    rate = read / (time.perf_counter() - begun)
    yield Row("disk", "ok", "data", f"{rate:,.0f} samples/s in random order, one reader (what is cached is fast)")
