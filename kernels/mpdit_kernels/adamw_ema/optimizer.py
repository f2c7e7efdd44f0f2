"""AdamW that also keeps the moving average of its weights, as state that is sharded and saved with the moments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from mpdit_kernels.adamw_ema.reference import Batch, Settings
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.dispatch import takes_triton


class AdamWEMA(torch.optim.Optimizer):
    """`torch.optim.AdamW` plus an exponential moving average (EMA) of the weights; reference.py is the definition.

    `state[param]` holds AdamW's "exp_avg" and "exp_avg_sq", the count of steps taken, "step", and the average, "ema",
    shaped like its parameter and a copy of it before the first step.
    Being optimiser state it follows the optimiser wherever that goes: under DeepSpeed's ZeRO the optimiser sees its
    rank's flat fp32 partition, so the average costs 4 bytes a parameter divided by the ranks, is checkpointed with
    the moments, and `deepspeed.utils.safe_get_full_optimizer_state(param, "ema")` gathers it.

    Weights and average are fp32 (fp64 works too) and never less: with a decay of 0.9999 the average moves by 1e-4 of
    the difference, which a bf16 sum rounds away. The learning rate is read from `param_groups` at every step.

    On a GPU a step of fp32 weights is one pass over memory in one Triton kernel per group and dtype of gradients and
    copies, for all tensors at once; on a CPU, and for fp64, torch's fused AdamW and multi-tensor functions.

    Clipping and the finite check share one more pass over the gradients, and never wait for the device. They are for
    use without DeepSpeed, whose ZeRO steps one group at a time, on this rank's partition, and clips by itself.

    CUDA graphs: a step can be captured once one was taken outside of the capture. Replays count the steps, correct
    the bias, clip and skip anew. Baked in are the tensors' addresses and every setting that is a Python number, so
    make the learning rate a tensor on the device (fp32 or fp64, one element) and change it in place.

    The state dict of a `torch.optim.AdamW` can be loaded, to warm-start from a run without average: each average then
    starts as a copy of its parameter as it is at its next step, and what the dict's groups lack, such as "ema_decay",
    stays as it was set here.

    Args:
        params: parameters or parameter groups; a group may have its own of the settings from lr to ema_decay.
        lr: learning rate, a number or a tensor of one element on the parameters' device.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, scaled by lr.
        ema_decay: share of the old average in the new one, in [0, 1].
        max_norm: the gradients, over all groups together, are scaled down to this norm as
            `torch.nn.utils.clip_grad_norm_` does, without being changed in memory; 0 does not clip.
        skip_nonfinite: a step changes nothing when the norm of the gradients is not finite, be it by an infinity or
            NaN among them or by an overflow of its fp32 square.

    Attributes:
        skip: None, or a tensor of one element: where it is not 0, a step changes nothing, not even its count. On the
            device it is read there, so that who judges the gradients elsewhere, as under DeepSpeed's ZeRO, writes it in
            place and doesn't wait. No state: it is neither saved nor copied.
        skipped: how many steps `skip_nonfinite` skipped, an int64 scalar, on the device from the first step on; part
            of the state dict of an optimiser that may skip.

    Raises:
        ValueError: a setting, of all or of one group, out of its range; at a step a parameter of less than fp32 or a
            sparse gradient; and from `load_state_dict` a state that isn't AdamW's. What is changed in `param_groups`
            later is not checked.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema_decay: float = 0.9999,
        *,
        max_norm: float = 0.0,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        _check_settings(defaults)
        _check_number("max_norm", max_norm, lambda x: x >= 0, "of at least 0")
        # torch reads "fused" when it loads a state: `step` then returns to its parameter's device.
        super().__init__(params, {**defaults, "fused": True})
        self.max_norm, self.skip_nonfinite = max_norm, skip_nonfinite
        self.skip: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64)  # moved to the device by the first step
        self._copies: dict[Tensor, Tensor] = {}
        self._uploads = Uploads()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as is done with those it is made with; ValueError for a setting out of its range."""
        if isinstance(param_group, Mapping):
            _check_settings({**self.defaults, **param_group})
        # torch (2.13) wraps the method for its compiler and would import all of that here: two seconds of CPU time.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def attach_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Keep low-precision copies of parameters up to date: written now, and by every step in its one pass.

        Copies are no state: attach them again after loading weights, and to an optimiser that was copied or unpickled.

        Args:
            copies: from a parameter to the tensor that receives its values, of the same shape and device and of any
                floating-point dtype; the kernel writes fp32, bf16 and fp16.

        Raises:
            ValueError: a parameter that isn't this optimiser's, or a copy that doesn't fit its parameter.
        """
        known = {param for group in self.param_groups for param in group["params"]}
        for param, copy in copies.items():
            if param not in known:
                raise ValueError(f"a parameter of shape {list(param.shape)} to copy is not among the optimiser's")
            if copy.shape != param.shape:
                raise ValueError(f"a copy has shape {list(copy.shape)}: expected {list(param.shape)}, its parameter's")
            if copy.device != param.device or not copy.is_floating_point() or copy.requires_grad:
                raise ValueError(
                    f"a copy is {copy.dtype} on {copy.device}{' with' if copy.requires_grad else ' without'} gradient: "
                    f"expected a floating-point type on {param.device} without gradient"
                )
        for param, copy in copies.items():
            copy.copy_(param.detach())
        self._copies.update(copies)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; no synchronisation with the device.

        Returns what `closure` returned, when one is given.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        # All is checked before anything is changed.
        work = [
            (Settings(**{name: group[name] for name in Settings.__annotations__}), batch)
            for group in self.param_groups
            for batch in self._batches([param for param in group["params"] if param.grad is not None])
        ]
        scalars = self._factor_and_skip([batch for _, batch in work])
        for settings, batch in work:
            device = batch.params[0].device
            factor, skip = (None if scalar is None else scalar.to(device) for scalar in scalars)
            update_batch_(batch, settings, factor, skip, self._uploads)
        return result

    def _factor_and_skip(self, batches: list[Batch]) -> tuple[Tensor | None, Tensor | None]:
        """Return (factor that clips the gradients, 1 where the step is skipped), fp32 device scalars or None."""
        if not batches:
            return None, None
        device = batches[0].params[0].device
        skip = None if self.skip is None else self.skip.to(device) != 0
        if not (self.max_norm or self.skip_nonfinite):
            return None, None if skip is None else skip.to(torch.float32)
        norms: list[Tensor] = []
        for batch in batches:
            dtype = torch.promote_types(batch.grads[0].dtype, torch.float32)
            norms += (norm.to(device, torch.float32) for norm in torch._foreach_norm(batch.grads, 2.0, dtype=dtype))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm else None
        if self.skip_nonfinite:
            nonfinite = ~norm.isfinite()
            self.skipped = self.skipped.to(device)  # DeepSpeed moves the weights after the optimiser is made
            self.skipped += nonfinite
            skip = nonfinite if skip is None else skip | nonfinite
        return factor, None if skip is None else skip.to(torch.float32)

    def _batches(self, params: list[Tensor]) -> list[Batch]:
        """Sort the parameters by device and by dtypes of parameter, gradient and copy."""
        kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for param in params:
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"a parameter is {param.dtype}: AdamWEMA needs fp32 master weights")
            state, copy = self.state[param], self._copies.get(param)
            if not state:
                state.update(initial_state(param))
            elif "ema" not in state:  # the first step after loading a state without average
                state["ema"] = param.detach().clone(memory_format=torch.preserve_format)
            assert param.grad is not None
            if param.grad.is_sparse:
                raise ValueError("a gradient is sparse: AdamWEMA needs dense ones")
            kind = (param.device, param.dtype, param.grad.dtype, None if copy is None else copy.dtype)
            states = (state[name] for name in ("exp_avg", "exp_avg_sq", "ema", "step"))
            kinds.setdefault(kind, []).append((param, param.grad, *states, copy))
        batches = []
        for kind, rows in kinds.items():
            params, grads, exp_avgs, exp_avg_sqs, emas, steps, copies = map(list, zip(*rows, strict=True))
            batches.append(
                Batch(params, grads, exp_avgs, exp_avg_sqs, emas, steps, None if kind[-1] is None else copies)
            )
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return every optimiser's state, with "skipped" where steps may be skipped."""
        extra = {"skipped": self.skipped} if self.skip_nonfinite else {}
        return {**super().state_dict(), **extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "skipped" in state_dict:
            self.skipped = state_dict["skipped"].to(self.skipped.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_norm", "skip_nonfinite", "skipped")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__:  # called by load_state_dict, not by unpickling
            _complete_loaded(state, self.param_groups)
        super().__setstate__(state)
        absent = {"max_norm": 0.0, "skip_nonfinite": False, "skipped": torch.zeros((), dtype=torch.int64)}
        for name, value in {**absent, "skip": None, "_copies": {}, "_uploads": Uploads()}.items():
            self.__dict__.setdefault(name, value)


def initial_state(param: Tensor) -> dict[str, Tensor]:
    """Return a parameter's state before its first step: the average is a copy of it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        "ema": param.detach().clone(memory_format=torch.preserve_format),
    }


def _check_settings(settings: Mapping[str, Any]) -> None:
    lr, betas = settings["lr"], settings["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {list(lr.shape)}: give a number, or a tensor of one element")
        lr = lr.item()
    for name, value in (("lr", lr), ("eps", settings["eps"]), ("weight_decay", settings["weight_decay"])):
        _check_number(name, value, lambda x: x >= 0, "of at least 0")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}: give two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        _check_number(f"betas[{index}]", beta, lambda x: 0 <= x < 1, "in [0, 1)")
    _check_number("ema_decay", settings["ema_decay"], lambda x: 0 <= x <= 1, "in [0, 1]")


def _check_number(name: str, value: object, fits: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, Real) or not fits(value):
        raise ValueError(f"{name} is {value!r}: give a number {expected}")


def _complete_loaded(state: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Complete, in place, the state of any AdamW that `load_state_dict` is about to take, by these groups' settings."""
    for loaded, own in zip(state["param_groups"], groups, strict=True):
        for name in ("amsgrad", "maximize"):
            if loaded.get(name):
                raise ValueError(f"{name} is {loaded[name]} in a loaded group: expected False, AdamWEMA has no {name}")
        for name in Settings.__annotations__:
            loaded.setdefault(name, own[name])
        loaded["fused"] = True
        for param in loaded["params"]:
            values = state["state"].get(param)
            if not values:
                continue
            if missing := {"step", "exp_avg", "exp_avg_sq"} - set(values):
                raise ValueError(f"a loaded state has {sorted(values)}: expected AdamW's, with {sorted(missing)}")
            # A number, or on the CPU, where the optimiser that left it was not fused.
            values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=param.device)


@torch.no_grad()
def update_batch_(
    batch: Batch, settings: Settings, factor: Tensor | None, skip: Tensor | None, uploads: Uploads
) -> None:
    """Update a batch in place, in one pass over memory where Triton is taken.

    Args:
        batch, settings: the tensors and what to do with them.
        factor: fp32 scalar on the device that the gradients are multiplied by; None is 1.
        skip: fp32 scalar on the device, 0, or 1 where nothing is to be written; None is 0.
        uploads: keeps the kernel's tables from step to step.
    """
    dense = _dense_alike(batch)
    kinds = (batch.params[0], batch.grads[0], batch.copies[0] if batch.copies else None)
    # As one partition, as the kernel takes them: their shapes don't matter.
    flat = [None if x is None else x.new_empty(0) for x in kinds]
    if takes_triton("adamw_ema", *flat, trial=functools.partial(_trial, flat)):
        from mpdit_kernels.adamw_ema import triton_impl

        triton_impl.update_(dense, settings, factor, skip, uploads)
    else:
        _update_by_torch(dense, settings, factor, skip)
    if dense is not batch:
        for name in ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies"):
            for target, source in zip(getattr(batch, name) or (), getattr(dense, name) or (), strict=True):
                if target is not source:
                    target.copy_(source)


def _trial(flat: list[Tensor | None]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Any]]:
    """Return what a proof calls: a step of a few thousand values."""
    param, grad, copy = (None if x is None else x.new_empty(5000) for x in flat)

    def call(*values: Tensor | None) -> tuple[Tensor, ...]:
        param, grad, exp_avg, exp_avg_sq, ema, *copies = [x.detach().clone() for x in values if x is not None]
        scalar = functools.partial(torch.full, (), device=param.device)
        batch = Batch([param], [grad], [exp_avg], [exp_avg_sq.square_()], [ema], [scalar(10.0)], copies or None)
        lr: Any = scalar(1e-3, dtype=torch.float64)
        settings = Settings(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema_decay=0.99)
        for skip in (0.0, 1.0):  # the second changes nothing
            update_batch_(batch, settings, scalar(0.5), scalar(skip), Uploads())
        return param, exp_avg, exp_avg_sq, ema, *copies

    return call, [param, grad, param, param, param, copy]


def _update_by_torch(batch: Batch, settings: Settings, factor: Tensor | None, skip: Tensor | None) -> None:
    """Do reference.adamw_ema_ for a batch, by torch's fused AdamW and multi-tensor functions: what CPUs train with.

    Where skip is 1 nothing changes, to the bit.
    """
    if skip is not None and skip.device.type == "cpu":  # nothing to wait for
        if skip:
            return
        skip = None
    dtype = batch.params[0].dtype
    grads = [grad.to(dtype) for grad in batch.grads]
    if factor is not None:
        grads = list(torch._foreach_mul(grads, factor))
    adamw(
        batch.params,
        grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        [],
        batch.steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        found_inf=skip,
    )
    share = 1 - settings.ema_decay  # ema <- ema_decay * ema + share * param
    if skip is None:
        torch._foreach_lerp_(batch.emas, batch.params, share)
    else:  # a share of 0 would turn an average of -0 into 0
        for ema, moved in zip(batch.emas, torch._foreach_lerp(batch.emas, batch.params, share), strict=True):
            torch.where(skip.bool(), ema, moved, out=ema)
    if batch.copies is not None:
        torch._foreach_copy_(batch.copies, batch.params)


def _dense_alike(batch: Batch) -> Batch:
    """Return the batch with contiguous copies where a parameter has gaps in memory or tensors of another order.

    Our kernel walks memory, and so does torch's fused AdamW, which would mix up the elements without a word.
    """

    def alike(param: Tensor, *others: Tensor) -> bool:
        if param.is_contiguous():
            return all(x.is_contiguous() for x in others)
        strides = param.stride()
        dense = torch.empty_like(param, device="meta").stride() == strides
        return dense and all(x.stride() == strides for x in others)

    others = (batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.emas, batch.copies or batch.params)
    odd = [index for index, tensors in enumerate(zip(batch.params, *others, strict=True)) if not alike(*tensors)]
    if not odd:
        return batch
    lists = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, tensors in lists.items():
        if tensors is not None:
            lists[name] = [x.contiguous() if index in odd else x for index, x in enumerate(tensors)]
    return Batch(**lists)
