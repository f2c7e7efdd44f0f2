"""One step on lists of tensors: choice of implementation. The optimiser in optimizer.py is the public form."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from mpdit_kernels.adamw_ema import reference
from mpdit_kernels.adamw_ema.reference import Batch, Settings
from mpdit_kernels.adamw_ema.uploads import Uploads
from mpdit_kernels.dispatch import takes_triton


@torch.no_grad()
def step_(
    batch: Batch,
    settings: Settings,
    factor: Tensor | None = None,
    taken: Tensor | None = None,
    uploads: Uploads | None = None,
) -> None:
    """Update a batch in place, in one pass over memory where Triton is taken.

    Args:
        batch, settings: the tensors and what to do with them.
        factor: fp32 scalar on the device that the gradients are multiplied by; None is 1.
        taken: fp32 scalar on the device, 1, or 0 where nothing is to be written; None is 1.
        uploads: keeps the kernel's tables from step to step.
    """
    fitting = _laid_out_alike(batch)
    if takes_triton("adamw_ema", batch.params[0], batch.grads[0], batch.copies[0] if batch.copies else None):
        from mpdit_kernels.adamw_ema import triton_impl

        triton_impl.step_(fitting, settings, factor, taken, uploads or Uploads())
    else:
        reference.step_(fitting, settings, factor, taken)
    if fitting is not batch:
        for target, source in zip(_written(batch), _written(fitting), strict=True):
            if target is not source:
                target.copy_(source)


def _laid_out_alike(batch: Batch) -> Batch:
    """Return the batch or, where a parameter has gaps in memory or company of another order, one of contiguous copies.

    Our kernel walks memory, and so does torch's fused AdamW, which would mix up the elements without a word.
    """
    companions = (batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.emas, batch.copies or batch.params)
    odd = [index for index, tensors in enumerate(zip(batch.params, *companions, strict=True)) if not _fit(*tensors)]
    if not odd:
        return batch
    lists = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, tensors in lists.items():
        if tensors is not None:
            lists[name] = [x.contiguous() if index in odd else x for index, x in enumerate(tensors)]
    return Batch(**lists)


def _fit(param: Tensor, *others: Tensor) -> bool:
    if param.is_contiguous():
        return all(x.is_contiguous() for x in others)
    strides = param.stride()
    dense = torch.empty_like(param, device="meta").stride() == strides
    return dense and all(x.stride() == strides for x in others)


def _written(batch: Batch) -> list[Tensor]:
    return [*batch.params, *batch.exp_avgs, *batch.exp_avg_sqs, *batch.emas, *(batch.copies or [])]
