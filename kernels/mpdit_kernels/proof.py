"""Proves a kernel on the GPU at hand before "auto" takes it: forward and backward, at the shapes and dtypes asked for.

A kernel may be wrong on one GPU alone, with one version of Triton or a driver. So the first call of an operation on
tensors of new widths and dtypes first computes a small batch of random values of these by the kernel, by the reference,
and by the reference in float64. What passed is kept in the cache folder, by GPU, versions and source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOOR = 8
"""Roundings of a result's own dtype that are always allowed, as PyTorch can be exact by luck."""

Trial = Callable[[], tuple[Callable[..., Any], Sequence[Any]]]
"""Returns a call of an operation and arguments for it, small ones, of which tensors give shape, dtype and device."""

Use = Callable[[str], contextlib.AbstractContextManager[None]]

SAMPLES = 2
"""Samples of a batch that trials take."""


def allowed_error(usual: Tensor, exact: Tensor, rounding: float) -> float:
    """Return the greatest distance from `exact` that passes: twice that of PyTorch's result, and FLOOR roundings."""
    return 2 * distance(usual, exact) + FLOOR * rounding


def distance(x: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`; a NaN in x gives NaN, which passes no comparison."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp_min(1e-30))


def known(device: torch.device) -> dict[str, str]:
    """Return what was proved on a GPU: from operation, shape and dtypes to what is wrong, "" where nothing is."""
    return dict(_known(_cache_file(device)))


def forget(device: torch.device) -> None:
    """Have everything proved anew on a GPU."""
    _cache_file(device).unlink(missing_ok=True)
    _known.cache_clear()


def problem(operation: str, tensors: Sequence[Tensor], variant: object, trial: Trial, use: Use) -> str | None:
    """Return what is wrong with an operation's kernels for tensors like these on their GPU; None if nothing is.

    `variant` is what else decides what runs, `use` dispatch's. Tried once, and not while a CUDA graph is captured.
    Raises torch.OutOfMemoryError.
    """
    device = tensors[0].device
    found = _known(_cache_file(device))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    kinds = " ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape[1:])}" for x in tensors)
    key = f"{operation} {kinds} {variant} {dtype}"
    if key not in found:
        if _capturing(device):
            return None
        # A thread of its own has none of the caller's modes: no_grad, inference, fake tensors, a tracer.
        with ThreadPoolExecutor(1) as thread:
            found[key] = thread.submit(try_out, *trial(), use, device, dtype).result() or ""
        _keep(_cache_file(device), found)
    return found[key] or None


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def try_out(
    call: Callable[..., Any],
    arguments: Sequence[Any],
    use: Use,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> str | None:
    """Return what is wrong with `call` by the kernels, results or gradients, or how it failed; None if it is right.

    Args:
        call: takes `arguments` and returns a tensor or several.
        arguments: tensors are replaced by random values of their shapes, dtypes and device, that get gradients.
        use: chooses the implementation within a block, "triton" or "reference".
        device: of the tensors.
        autocast: dtype of the autocast that the kernels and the reference run under, if any.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        generator = torch.Generator(device).manual_seed(0)
        inputs = [_random(value, generator) if isinstance(value, Tensor) else value for value in arguments]
        doubles = [x.detach().double().requires_grad_() if _floats(x) else x for x in inputs]
        try:
            exact, incoming = _run(call, doubles, use("reference"), None, None)
            usual, _ = _run(call, inputs, use("reference"), incoming, autocast)
            ours, _ = _run(call, inputs, use("triton"), incoming, autocast)
        except torch.OutOfMemoryError:  # says nothing of the kernel
            raise
        except Exception as error:  # whatever a compiler or a driver may end with
            return f"it failed ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]})"
    for index, (mine, theirs, truth) in enumerate(zip(ours, usual, exact, strict=True)):
        rounding = torch.finfo(mine.dtype).eps
        for where, found, reached in zip(_WHERE, _errors(mine, truth), _errors(theirs, truth), strict=False):
            allowed = 2 * reached + (4 if where else 1) * rounding
            if not found <= allowed:  # a NaN is no pass
                what = f"tensor {index} of its results and gradients{where}"
                return f"{what} is {found:.2g} from float64, allowed {allowed:.2g}"
    return None


_WHERE = ("", *(f", by the worst slice of axis {axis}," for axis in range(8)))


def _errors(x: Tensor, exact: Tensor) -> list[float]:
    """Return the relative error of all of x, and of its worst slice along each axis.

    A slice's is relative to its size or, where that is small, to what is usual: a row that was not written, or a
    column that is another's, is little of a whole tensor.
    """
    x, exact = x.double(), exact.double()
    found, difference = [distance(x, exact)], x - exact
    for axis in range(exact.ndim):
        wrong, size = (v.movedim(axis, 0).reshape(v.shape[axis], -1).norm(dim=1) for v in (difference, exact))
        found.append(float((wrong / size.clamp_min(max(float(size.mean()), 1e-30))).max()) if len(size) else 0.0)
    return found


def _floats(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    if not _floats(x):
        return torch.randint(0, 1000, x.shape, generator=generator, device=x.device, dtype=x.dtype)
    drawn = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    # As small as trained weights are, so that products keep the sizes of values.
    return (drawn * (x.shape[-1] ** -0.5 if x.ndim > 1 else 1.0)).to(x.dtype).requires_grad_()


def _run(
    call: Callable[..., Any],
    inputs: Sequence[Any],
    using: contextlib.AbstractContextManager[None],
    incoming: list[Tensor] | None,
    autocast: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return results with the gradients of the inputs, and the gradients that came in: drawn unless given."""
    with using, torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        results = call(*inputs)
        results = [results] if isinstance(results, Tensor) else list(results)
        differentiable = [x for x in results if x.requires_grad]
        if incoming is None:
            incoming = [torch.randn_like(x) for x in differentiable]
        leaves = [x for x in inputs if _floats(x) and x.requires_grad] if differentiable else []
        came = [g.to(x.dtype) for g, x in zip(incoming, differentiable, strict=True)]
        found = torch.autograd.grad(differentiable, leaves, came, allow_unused=True) if leaves else ()
    # Judged on the CPU: what is wrong with a GPU could be wrong with a comparison there too.
    return [x.detach().cpu() for x in (*results, *found) if x is not None], incoming


@functools.cache
def _cache_file(device: torch.device) -> Path:
    """Return the file of what was proved on such a GPU with these versions of torch, CUDA, Triton and our code."""
    import triton

    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.glob("tuned/*.json")]):
        digest.update(path.read_bytes())
    of = (torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, triton.__version__)
    digest.update(repr(of).encode())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a user without a home, as in some containers
        home = tempfile.gettempdir()
    return Path(home) / "mpdit" / "kernels" / f"{digest.hexdigest()[:24]}.json"


@functools.cache
def _known(path: Path) -> dict[str, str]:
    """Return problems by operation, shapes and dtypes, "" where there is none."""
    return _read(path)


def _read(path: Path) -> dict[str, str]:
    """Read what a file of such keeps; nothing where it can't be read or is damaged."""
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _keep(path: Path, found: dict[str, str]) -> None:
    """Write what is known, beside what other processes wrote meanwhile; a folder that can't be written is no matter."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(_read(path) | found, indent=1))
        part.replace(path)
