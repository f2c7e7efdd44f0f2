"""CUDA graphs of a function of tensors: its kernels recorded once for each shape, then launched all at once.

A sampler calls the model hundreds of times with the same shapes; for small batches a GPU then waits for Python and
the driver to launch the next kernel. This has been tested with a stand-in for the graph, not yet on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from mpdit_kernels import dispatch
from mpdit_kernels.backends import attention_mode
from torch import Tensor

from mpdit.core.errors import ConfigError

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Records a function of no arguments, that reads fixed tensors; the replay does the same work into the same result."""

_WARM = 3  # calls before the recording, for what is compiled, chosen by trial or allocated once
_SHAPES = 8

_log = logging.getLogger(__name__)


class Graphed:
    """`function` of tensors, replayed from a graph that is captured at the first call with these shapes and dtypes.

    Arguments are copied into the graph's own tensors and the result out of it, so that neither is shared with the
    caller. The function must do the same work whatever the values, wait for nothing and hold no state; parameters may
    change in place, but must stay where they are. Eight shapes are kept; any others, and calls on empty tensors, run
    as they are. A capture that fails is logged, and the function runs as it is from then on; with `strict` it is a
    ConfigError.
    """

    def __init__(
        self, function: Callable[..., Tensor], capture: Capture | None = None, *, strict: bool = False
    ) -> None:
        self._function = function
        self._capture = capture or CudaCapture()
        self._strict = strict
        self.broken = False
        self._graphs: dict[Any, tuple[tuple[Tensor, ...], Replay]] = {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.broken or any(not value.numel() for value in arguments):
            return self._function(*arguments)
        key = (*((value.shape, value.dtype, value.device) for value in arguments), dispatch.mode(), attention_mode())
        if key not in self._graphs:
            if len(self._graphs) == _SHAPES:
                return self._function(*arguments)
            places = tuple(value.clone() for value in arguments)
            try:
                self._graphs[key] = places, self._capture(lambda: self._function(*places))
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if self._strict:
                    raise ConfigError(f"no CUDA graph of the model can be captured ({reason}): leave it off") from error
                self.broken = True
                _log.warning("no CUDA graph of the model can be captured (%s): it runs without", reason)
                return self._function(*arguments)
        places, replay = self._graphs[key]
        for place, value in zip(places, arguments, strict=True):
            place.copy_(value)
        return replay().clone()


class CudaCapture:
    """A Capture by torch.cuda.CUDAGraph; graphs of one CudaCapture share their memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
