"""Builds the stand-in CUDA runtime (README.md), starts programs on it, and reads what it counted.

    python tests/cuda_standin/standin.py [--gpus N] [--trace FILE] [--hold] SCRIPT [ARGUMENTS]

runs a Python script under it, with this file importable as `standin`. It must be a Python with the CUDA build of torch.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

# Functions of CUDA's libraries that torch calls and no file here defines: what their stubs do, by name; the first that
# fits. Arguments are as in a call of C, so a stub may read the first of them and leave the rest.
STUBS = (
    (r"String$|Name$", 'const char *{name}(void) {{ return "the stand-in"; }}'),
    (r"^cudnnGetVersion$", "size_t {name}(void) {{ return 91900; }}"),
    (
        r"^(cublas|cudnn|cusparse|cusolver|cufft|curand)\w*Create",
        "int {name}(void **made) {{ *made = calloc(1, 4096); return 0; }}",
    ),
    (
        r"^cublas[A-Z]\w*(?i:gemm|gemv|dot|axpy|scal|nrm2|tr[sm]m|getr[fs]|syrk|ger)",
        'int {name}(void *handle) {{ return standin_blas(handle, "{name}"); }}',
    ),
    (r"^(cublas|cusparse|cusolver|cufft|curand|cudnn|cupti)", "int {name}(void) {{ return 0; }}"),
    (r"^(cuda|__cuda|nccl|cuFile|cu[A-Z])", 'int {name}(void) {{ tell(1, "unsupported\\t{name}"); return 801; }}'),
)


def unavailable() -> str | None:
    """Return why the stand-in can't be built here, in a few words; None if it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "it is for Linux on x86-64"
    if not shutil.which("gcc"):
        return "it needs gcc"
    if not _site().joinpath("torch/lib/libtorch_cuda.so").exists() or not _site().joinpath("nvidia/cu13").exists():
        return "it needs PyPI's build of torch for CUDA 13"
    return None


def _site() -> Path:
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parents[1] if found and found.origin else Path()


def build() -> Path:
    """Compile the library, if it isn't there yet, and return its path. Raises OSError or CalledProcessError."""
    site = _site()
    sources = [HERE / name for name in ("runtime.c", "driver.c", "nccl.c", "standin.h")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, Path(__file__)]) + str(site).encode())
    folder = Path(tempfile.gettempdir()) / f"mpdit-standin-{os.getuid()}" / key.hexdigest()[:16]
    library = folder / "libcuda.so.1"  # its file's and its own name: who looks for the driver finds it
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "libcuda.so.1"
        compile_ = [
            "gcc",
            "-std=gnu17",
            "-shared",
            "-fPIC",
            "-O1",
            "-fvisibility=hidden",
            "-Wl,-soname,libcuda.so.1",
            f"-I{HERE}",
        ]
        # CUDA's own headers, for the layout of its structures; triton has those that PyPI's leaves out.
        compile_ += [f"-I{site}/nvidia/cu13/include", f"-I{site}/triton/backends/nvidia/include"]
        files = [str(path) for path in sources if path.suffix == ".c"]
        subprocess.run([*compile_, *files, "-o", str(made), "-ldl", "-lpthread", "-lrt"], check=True)
        defined = set(_symbols("--defined-only", made))
        wanted = {
            name
            for path in sorted(site.glob("torch/lib/lib*.so"))
            for name in _symbols("--undefined-only", path)
            if name not in defined
        }
        stubs = Path(temporary) / "stubs.c"
        lines = ["#include <stdlib.h>\n#pragma GCC visibility push(default)", "int standin_blas(void *, const char *);"]
        lines.append("void tell(int, const char *, ...);")
        for name in sorted(wanted):
            text = next(
                (text for pattern, text in STUBS if re.search(pattern, name) and re.match("(__cu|cu|nccl)", name)), None
            )
            lines += [text.format(name=name)] if text else []
        stubs.write_text("\n".join(lines) + "\n")
        subprocess.run([*compile_, "-w", *files, str(stubs), "-o", str(made), "-ldl", "-lpthread", "-lrt"], check=True)
        made.rename(library)
    return library


def _symbols(which: str, path: Path) -> Iterator[str]:
    found = subprocess.run(["nm", "-D", which, str(path)], check=True, capture_output=True, text=True)
    for line in found.stdout.splitlines():
        yield line.split()[-1].partition("@")[0]


def environment(
    gpus: int = 1, *, trace: Path | None = None, hold: bool = False, gib: float | None = None
) -> dict[str, str]:
    """Return the environment of a process that is to see so many GPUs.

    trace: file that gets a line for whatever happens; "%d" in it is the process's number.
    hold: hold asynchronous copies back until they are waited for.
    gib: memory of each GPU; an H200's if it isn't said.
    """
    library = build()
    made = os.environ | {
        "LD_PRELOAD": str(library),
        "STANDIN_GPUS": str(gpus),
        "TRITON_LIBCUDA_PATH": str(library.parent),
    }
    # What is found out about this GPU, such as that no kernel passes its proof, isn't kept for a real one.
    made["XDG_CACHE_HOME"] = str(library.parent / "cache")
    made |= {"STANDIN_TRACE": str(trace)} if trace else {}
    made |= {"STANDIN_HOLD": "1"} if hold else {}
    made |= {"STANDIN_GIB": str(gib)} if gib else {}
    return made | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])}


# What follows is for a program that runs on it.


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.standin_names.restype = ctypes.c_char_p
    library.standin_read.restype = ctypes.c_long
    return library


def reset() -> None:
    """Set all counters to 0."""
    _library().standin_reset()


def counts(device: int | None = None) -> Counter[str]:
    """Return what was counted since the last reset, on one device or on all together: names of standin.h, above 0."""
    library = _library()
    names = library.standin_names().decode().split()
    devices = range(16) if device is None else [device]
    return Counter({name: n for i, name in enumerate(names) if (n := sum(library.standin_read(i, d) for d in devices))})


def phase(name: str) -> None:
    """Name what follows, in the trace."""
    _library().standin_phase(name.encode())


def trace(path: Path | str | None) -> None:
    """Write the trace there from now on; None ends it."""
    _library().standin_trace(str(path).encode() if path else None)


def hold(on: bool) -> None:
    """Hold asynchronous copies back until they are waited for, from now on, or no longer."""
    _library().standin_hold(on)


class Record(NamedTuple):
    """A line of the trace."""

    phase: str
    thread: str
    """main or other."""
    device: int
    """The thread's current one."""
    kind: str
    """launch, copy, stage, wait, allocate, pin, capture, replay, collective, context; refused, race, error."""
    text: str
    stack: tuple[str, ...]
    """Where Python was, innermost first, for those kinds that tell."""


def read(path: Path | str) -> list[Record]:
    """Return a trace's records."""
    records: list[Record] = []
    for line in Path(path).read_text(errors="replace").splitlines():
        if line.startswith("  File "):
            records[-1] = records[-1]._replace(stack=(*records[-1].stack, line.strip()))
        elif line.count("\t") >= 4:
            name, thread, device, kind, text = line.split("\t", 4)
            records.append(Record(name, thread, int(device), kind, text, ()))
    return records


def main() -> None:
    """Run a script on the stand-in."""
    parser = argparse.ArgumentParser(description="Run a Python script on the stand-in CUDA runtime.")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gib", type=float, help="memory of each GPU")
    parser.add_argument("--trace", type=Path, help="file for the trace; %%d in it is the process's number")
    parser.add_argument("--hold", action="store_true", help="hold asynchronous copies back until they are waited for")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if why := unavailable():
        sys.exit(f"error: no stand-in here: {why}")
    made = environment(args.gpus, trace=args.trace, hold=args.hold, gib=args.gib)
    os.execve(sys.executable, [sys.executable, *args.script], made)


if __name__ == "__main__":
    main()
