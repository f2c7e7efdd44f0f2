"""What GPUs do at best, from NVIDIA's datasheets: SXM boards, dense rates (half of what is printed "with sparsity")."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU's limits.

    Attributes:
        key: what commands call it.
        name: for people.
        memory: bytes that a process can allocate at most: what the driver reports, a little less than the label says.
        bandwidth: of its memory, bytes a second.
        flops: dense bf16 FLOP a second on tensor cores, summed in fp32.
        flops32: fp32 FLOP a second outside of them.
        capability: CUDA compute capability.
        link: bytes a second to its neighbours, in one direction: NVLink, or PCIe where there is none.
        source: the datasheet.
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    flops: float
    flops32: float
    capability: tuple[int, int]
    link: float
    source: str


_GIB = 2**30

# fmt: off
_ALL = (
    #   key           name          memory        bandwidth flops    flops32  capability link    source
    Gpu("a100-40gb", "A100 40 GB",  39.4 * _GIB,  1.555e12, 312e12,  19.5e12, (8, 0),  300e9, "NVIDIA A100 Tensor Core GPU datasheet (SXM4)"),
    Gpu("a100-80gb", "A100 80 GB",  79.2 * _GIB,  2.039e12, 312e12,  19.5e12, (8, 0),  300e9, "NVIDIA A100 Tensor Core GPU datasheet (SXM4)"),
    Gpu("h100",      "H100",        79.1 * _GIB,  3.35e12,  989e12,  67e12,   (9, 0),  450e9, "NVIDIA H100 Tensor Core GPU datasheet (SXM5)"),
    Gpu("h200",      "H200",        139.8 * _GIB, 4.8e12,   989e12,  67e12,   (9, 0),  450e9, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    Gpu("b200",      "B200",        178.4 * _GIB, 8.0e12,   2250e12, 75e12,   (10, 0), 900e9, "NVIDIA DGX B200 datasheet, an eighth of the system"),
    Gpu("rtx4090",   "RTX 4090",    23.5 * _GIB,  1.008e12, 165.2e12, 82.6e12, (8, 9), 32e9,  "NVIDIA Ada GPU architecture whitepaper; PCIe 4.0 x16"),
)
# fmt: on

GPUS: dict[str, Gpu] = {gpu.key: gpu for gpu in _ALL}


_NAMES = {
    "a100-40gb": r"a100( sxm4)?[ -]?40( ?gb)?",
    "a100-80gb": r"a100( sxm4)?[ -]?80( ?gb)?",
    "h100": r"h100( sxm5?)?( 80 ?gb)?( hbm3)?",
    "h200": r"h200( sxm)?( 141 ?gb)?",
    "b200": r"b200",
    "rtx4090": r"(geforce )?(rtx ?)?4090",
}
"""Patterns of names as people and the driver write them, after "nvidia", in lower case, spaces for hyphens."""


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU of a key ("h200"), or of a name as torch.cuda.get_device_name() gives it; None for one not listed.

    PCIe and other slower boards of the same chip, such as "NVIDIA H100 PCIe", are not listed: their peaks differ.
    """
    words = name.lower().replace("-", " ").replace("_", " ").removeprefix("nvidia ").strip()
    return next((GPUS[key] for key, pattern in _NAMES.items() if re.fullmatch(pattern, words)), None)
