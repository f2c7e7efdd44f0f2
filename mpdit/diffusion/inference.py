"""The model as a sampler runs it: in a precision, and on a GPU from CUDA graphs.

A sampler calls the model hundreds of times with the same shapes; for small batches a GPU then waits for Python and the
driver to launch the next kernel. A graph's kernels are recorded once for each shape, then launched all at once. This
has been tested with a stand-in for the graph, not yet on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from mpdit_kernels import dispatch
from mpdit_kernels.backends import attention_mode
from torch import Tensor, nn

from mpdit.core.errors import ConfigError, first_line
from mpdit.model.mpdit import MPDiT

Precision = Literal["fp32", "tf32", "bf16"]

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Any]], Replay]
"""Records a function of no arguments, that reads fixed tensors; the replay does the same work into the same results."""

_WARM = 3  # calls before the recording, for what is compiled, chosen by trial or allocated once
_SHAPES = 8

_log = logging.getLogger(__name__)


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision that `name` means on this device: "auto" is bf16 on a GPU, as models are trained, else fp32.

    ConfigError for an unknown name, for tf32 off a GPU, and for bf16 on a GPU without it.
    """
    gpu = device.type == "cuda"
    if name == "auto":
        return "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name not in get_args(Precision):
        raise ConfigError(f"precision is {name!r}: choose one of auto, {', '.join(get_args(Precision))}")
    if name == "tf32" and not gpu:
        raise ConfigError(f"precision tf32 needs a GPU and the device is {device}: choose fp32 or bf16")
    if name == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("precision bf16 needs a GPU of compute capability 8.0 or higher: choose fp32")
    return name  # type: ignore[return-value]  # checked against it above


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute products in this precision and the same bits every time: fp32 without TF32, TF32, or autocast to bf16.

    The autocast keeps no casts: those made outside a graph would be freed under it.
    """
    matmul, tf32 = torch.backends.cuda.matmul, precision == "tf32"
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False),
        ):
            yield
    finally:
        matmul.allow_tf32 = before


class SamplingModel(nn.Module):
    """Stands for the MPDiT it holds where `sample` is given a model; results are those of the MPDiT to rounding.

    For bf16 it holds a copy whose blocks' weights are in bf16, so that they aren't cast in every call.

    A graph is captured at the first call with its shapes and dtypes, so there is one for guided steps and one for those
    outside the interval. Arguments are copied into the graph's own tensors and the result out of it, so that neither is
    shared with the caller. Parameters may change in place, but must stay where they are. Eight shapes are kept; any
    others, and empty batches, run as they are.

    Args:
        model: an MPDiT, or a module with its config, prepare_time and velocity; its metadata, by which `sample` refuses
            what is no velocity, is this one's too.
        precision: what products are computed in, whatever autocast is on outside.
        graphed: replay CUDA graphs. As an attribute: False too once a capture has failed.
        strict: raise ConfigError when a capture fails, instead of logging it and running as it is from then on.
        capture: what makes graphs; CudaCapture unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision = "fp32",
        *,
        graphed: bool = False,
        strict: bool = False,
        capture: Capture | None = None,
    ) -> None:
        super().__init__()
        self.precision, self.graphed, self._strict = precision, graphed, strict
        self.config: Any = model.config
        self.metadata: Any = getattr(model, "metadata", {})
        self.inner: Any = model
        if precision == "bf16" and isinstance(model, MPDiT):
            self.inner = model = copy.deepcopy(model)
            for block in (block for stage in model.stages for block in stage.blocks):
                block.attention.to(torch.bfloat16)  # autocast would cast them in every call
                block.mlp.to(torch.bfloat16)
        self._capture = (capture or CudaCapture(next(model.parameters()).device)) if graphed else None
        self._graphs: dict[Any, tuple[tuple[Tensor, ...], Replay]] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Compute MPDiT.forward of latents of one size."""
        return self.velocity(x, self.prepare_time(t), y)

    def prepare_time(self, t: Tensor) -> Tensor:
        """Compute MPDiT.prepare_time."""
        with computing(self.precision, t.device):
            return self.inner.prepare_time(t)

    def velocity(self, x: Tensor, state: Tensor, y: Tensor) -> Tensor:
        """Compute MPDiT.velocity of latents of one size."""
        arguments = (x, state, y)
        if not self.graphed or not len(x):
            return self._compute(*arguments)
        key = (*((value.shape, value.dtype, value.device) for value in arguments), dispatch.mode(), attention_mode())
        if key not in self._graphs and len(self._graphs) < _SHAPES:
            self._record(key, arguments)
        if key not in self._graphs:
            return self._compute(*arguments)
        places, replay = self._graphs[key]
        for place, value in zip(places, arguments, strict=True):
            place.copy_(value)
        return replay().clone()

    def _record(self, key: Any, arguments: tuple[Tensor, ...]) -> None:
        """Capture a graph of the velocity of such arguments."""
        try:
            # A tensor of inference mode can't be written to outside of it, and no gradient is taken through a graph.
            with torch.inference_mode(False), torch.no_grad():
                places = tuple(value.clone() for value in arguments)
                self._graphs[key] = places, self._capture(lambda: self._compute(*places))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            message = f"no CUDA graph of the model can be captured ({first_line(error)}): "
            if self._strict:
                raise ConfigError(f"{message}leave it off") from error
            self.graphed = False
            _log.warning("%sit runs without", message)

    def _compute(self, x: Tensor, state: Tensor, y: Tensor) -> Tensor:
        with computing(self.precision, x.device):
            return self.inner.velocity(x, state, y)


class CudaCapture:
    """Captures by torch.cuda.CUDAGraph; graphs of one CudaCapture share their memory, as only one runs at a time.

    torch captures on the current GPU and in the current streams, whatever tensors a function takes: hence the device.

    Attributes:
        stream: what is captured runs there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> Replay:
        with torch.cuda.device(self._device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM):
                    function()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                result = function()

        def replay() -> Any:
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay


def for_sampling(model: Any, precision: str = "fp32", graphed: bool | None = None) -> Any:
    """Return the model as it is sampled from on its device: itself where that changes nothing, else a SamplingModel.

    precision as in choose_precision. graphed: None is yes on a GPU, where graphs can be captured. Callables that
    prepare no times as an MPDiT does stay as they are, in fp32. ConfigError for a precision or graphs that the device
    can't have.
    """
    if isinstance(model, SamplingModel):
        return model
    device = next(model.parameters()).device
    chosen = choose_precision(precision, device)
    gpu = device.type == "cuda"
    if graphed and not gpu:
        raise ConfigError(f"CUDA graphs need a GPU and the device is {device}: leave them off")
    if not hasattr(model, "prepare_time"):
        if chosen != "fp32":
            raise ConfigError(f"precision {chosen} needs an MPDiT, and this is a {type(model).__name__}: choose fp32")
        return model
    if not gpu and chosen == "fp32":
        return model
    return SamplingModel(model, chosen, graphed=gpu and graphed is not False, strict=graphed is True)
