"""Kernels of the time embedding: one launch forward, two backward. All is fp32; products on tiles are "ieee".

Forward, one program per sample: the table of the first layer (made anew by every program, from weights that the L2
cache holds), GELU, transform, the middle layer's mixing and back, GELU, mean, last layer, projection.

Backward, first one program per sample for the gradients of its signals, then programs that sum over samples, each
owning the weights' gradients it writes: no atomics, no partial sums. Without atomics one launch would need every
program that sums to repeat all samples' work, of which the product with the projection alone, 2*B*D*W FLOP, takes one
multiprocessor 21 us by count (XL, fp32 outside of tensor cores, H200).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpdit_kernels.fno import reference
from mpdit_kernels.fno.fourier import first_layer, fold, gelu, make_tables, mix, on_grid, transform
from mpdit_kernels.fno.sums import middle_layer, outer_layers, projection
from mpdit_kernels.launch import Config, Tunable, launch
from mpdit_kernels.rows import rows_of


def _default(channels: int) -> Config:
    return {"BLOCK": 256 // channels, "ROWS": 128, "STAGES": 3, "num_warps": 8, "num_stages": 1}


def _candidates(channels: int) -> list[Config]:
    return [
        {"BLOCK": block, "ROWS": rows, "STAGES": stages, "num_warps": warps, "num_stages": 1}
        for warps in (4, 8, 16)
        for block in (2, 4, 8, 16)
        for rows in (64, 128)
        for stages in (2, 3)
        if 16 * warps <= block * channels <= min(32 * warps, 256)
    ]


def _default_weights(channels: int) -> Config:
    return {"BATCH": 256 // channels, "OUT": 16, "ROWS": 32, "STAGES": 3, "num_warps": 8, "num_stages": 1}


def _candidates_weights(channels: int) -> list[Config]:
    return [
        {"BATCH": batch, "OUT": out, "ROWS": 32, "STAGES": stages, "num_warps": warps, "num_stages": 1}
        for warps in (4, 8)
        for batch in (4, 8, 16)
        for out in (16, 32, 64)
        for stages in (2, 3)
        if out <= channels and 16 * warps <= batch * channels <= 64 * warps
    ]


FORWARD = Tunable("fno.forward", _default, _candidates)
BACKWARD_SAMPLES = Tunable("fno.backward_samples", _default, _candidates)
BACKWARD_WEIGHTS = Tunable("fno.backward_weights", _default_weights, _candidates_weights)


@triton.jit
def _forward(
    t, lift_weight, lift_bias, real0, imag0, point0, bias0, real1, imag1, point1, bias1, real2, point2, bias2,
    project_weight, project_bias,  # the inputs
    tables,  # [34, 32], as make_tables gives it
    out,  # [B, D]
    spectrum,  # out [B, W, 32]: of the first layer's signals after GELU
    derivative,  # out [B, W, 32]: of GELU, where the second layer's signals meet it
    means,  # out [2, B, W]: the last layer's input and output
    start,  # out [W, 32]: the first layer at t = 0, before GELU
    slope,  # out [W]: what one more t adds to it
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    o, j = tl.arange(0, W)[:, None], tl.arange(0, 32)[None, :]
    at_zero, steep = first_layer(lift_weight, lift_bias, real0, imag0, point0, bias0, tables, W, BLOCK, STAGES)
    if tl.program_id(0) == 0:
        tl.store(start + o * 32 + j, at_zero)
        tl.store(slope + o, steep)
    x, _ = gelu(at_zero + tl.load(t + b) * steep)
    signal = (b * W + o) * 32 + j
    tl.store(spectrum + signal, transform(x, tables))
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(spectrum + b * W * 32, real1, imag1, W * 16, 16, 1, W, BLOCK, STAGES)
    folds = fold(tl.arange(0, 16)[None, :])
    x = tl.dot(tl.load(point1 + o * W + tl.arange(0, W)[None, :]), x, input_precision="ieee")
    x, slant = gelu(x + on_grid(real * folds, imag * folds, tables) + tl.load(bias1 + o))
    tl.store(derivative + signal, slant)
    mean = tl.sum(x, 1, keep_dims=True) * 0.03125
    tl.store(means + b * W + o, mean)
    p = tl.arange(0, W)[None, :]
    last = tl.load(real2 + (o * W + p) * 16) + tl.load(point2 + p * W + o)
    z = tl.sum(mean * last, 0, keep_dims=True) + tl.load(bias2 + p)
    tl.store(means + (tl.num_programs(0).to(tl.int64) + b) * W + p, z)
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)
        weight = tl.load(project_weight + d[:, None] * W + p, mask=d[:, None] < D, other=0)
        y = tl.sum(weight * z, 1) + tl.load(project_bias + d, mask=d < D, other=0)
        tl.store(out + b * D + d, y, mask=d < D)


@triton.jit
def _backward_samples(
    d_out,  # [B, D], rows d_out_batch apart
    t, real1, imag1, point1, real2, point2, project_weight,  # inputs of the forward
    derivative, start, slope,  # outputs of the forward
    tables,
    d_t,  # out [B], where TIME
    d_z,  # out [B, W]: gradient of the last layer's output
    d_mixed,  # out [B, W, 32]: spectrum of the gradient of the second layer's output, weighed by fold
    d_lifted,  # out [B, W, 32]: gradient of the first layer's output
    d_out_batch,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TIME: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % BLOCK == 0)
    b = tl.program_id(0).to(tl.int64)
    o, p, j = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :], tl.arange(0, 32)[None, :]
    products = tl.zeros([ROWS, W], tl.float32)
    for first in tl.range(0, D, ROWS, num_stages=STAGES):
        d = first + tl.arange(0, ROWS)[:, None]
        gradient = tl.load(d_out + b * d_out_batch + d, mask=d < D, other=0)
        products += gradient * tl.load(project_weight + d * W + p, mask=d < D, other=0)
    dz = tl.sum(products, 0, keep_dims=True)
    tl.store(d_z + b * W + p, dz)
    last = tl.load(real2 + (o * W + p) * 16) + tl.load(point2 + p * W + o)
    d_mean = tl.sum(last * dz, 1, keep_dims=True)
    signal = (b * W + o) * 32 + j
    mixed = tl.load(derivative + signal) * (d_mean * 0.03125)
    tl.store(d_mixed + signal, transform(mixed, tables) * fold(j))
    tl.debug_barrier()  # the mixing reads what other threads of this program stored
    real, imag = mix(d_mixed + b * W * 32, real1, imag1, 16, W * 16, -1, W, BLOCK, STAGES)
    back = tl.dot(tl.load(point1 + p * W + o), mixed, input_precision="ieee") + on_grid(real, imag, tables)
    steep = tl.load(slope + o)
    _, slant = gelu(tl.load(start + o * 32 + j) + tl.load(t + b) * steep)
    lifted = back * slant
    tl.store(d_lifted + signal, lifted)
    if TIME:
        tl.store(d_t + b, tl.sum(tl.sum(lifted * steep, 1), 0))


@triton.jit
def _backward_weights(
    d_out,  # [B, D], rows d_out_batch apart
    t, lift_weight, lift_bias, real0, imag0, point0,  # inputs of the forward
    spectrum, means,  # outputs of the forward
    tables,
    d_z, d_mixed, d_lifted,  # outputs of _backward_samples
    d_lift_weight, d_lift_bias, d_real0, d_imag0, d_point0, d_bias0, d_real1, d_imag1, d_point1, d_bias1, d_real2,
    d_imag2, d_point2, d_bias2, d_project_weight, d_project_bias,  # out, each as its weight
    d_out_batch,
    B,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BATCH: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(W % OUT == 0)
    program = tl.program_id(0)
    if program < W:
        outer_layers(
            t, lift_weight, lift_bias, real0, imag0, point0, tables, means, d_z, d_mixed, d_lifted, d_lift_weight,
            d_lift_bias, d_real0, d_imag0, d_point0, d_bias0, d_bias1, d_real2, d_imag2, d_point2, d_bias2, program, B,
            LIMIT, W, BATCH, STAGES,
        )  # fmt: skip
    elif program < W + W * (W // OUT):
        part = program - W
        out = part % (W // OUT) * OUT
        middle_layer(
            spectrum, d_mixed, d_real1, d_imag1, d_point1, part // (W // OUT), out, B, LIMIT, W, BATCH, OUT, STAGES
        )
    else:
        z = means + B * W
        row = (program - W - W * (W // OUT)) * ROWS
        projection(d_out, z, d_project_weight, d_project_bias, d_out_batch, row, B, LIMIT, D, W, ROWS, STAGES)


def forward(t: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [B,D], spectrum and derivative [B,W,32], means [2,B,W], start [W,32], slope [W]), as _forward says; fp32."""
    t, weights = t.contiguous(), [value.contiguous() for value in weights]
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    per_sample = (batch, channels, reference.GRID)
    shapes = ((batch, width), per_sample, per_sample, (2, batch, channels), (channels, reference.GRID), (channels,))
    allocate = torch.empty if batch else torch.zeros  # without samples nothing runs that writes start and slope
    outputs = [allocate(shape, dtype=torch.float32, device=t.device) for shape in shapes]
    config = FORWARD.pick(channels=channels)
    tables = make_tables(t.device, torch.float32)
    acting = [value for name, value in zip(reference.names(3), weights, strict=True) if name != "conv2.weights_imag"]
    launch(_forward, (batch,), t, *acting, *tables, *outputs, D=width, W=channels, **config)
    return tuple(outputs)  # type: ignore[return-value]


def backward(
    d_out: Tensor,
    t: Tensor,
    weights: Sequence[Tensor],
    spectrum: Tensor,
    derivative: Tensor,
    means: Tensor,
    start: Tensor,
    slope: Tensor,
    of_t: bool = True,
    of_weights: bool = True,
) -> list[Tensor]:
    """Gradients of t and of the weights, fp32, from what the forward returned; empty where not asked for."""
    d_out, t, weights = rows_of(d_out), t.contiguous(), [value.contiguous() for value in weights]
    batch, channels, width = t.shape[0], weights[0].shape[0], weights[-1].shape[0]
    d_t = torch.empty_like(t) if of_t else t.new_empty(0)
    d_z, d_mixed, d_lifted = torch.empty_like(means[0]), torch.empty_like(spectrum), torch.empty_like(spectrum)
    lift_weight, lift_bias, real0, imag0, point0, _, real1, imag1, point1, _, real2, _, point2, _, project, _ = weights
    tables = make_tables(t.device, torch.float32)
    launch(
        _backward_samples,
        (batch,),
        *(d_out, t, real1, imag1, point1, real2, point2, project, derivative, start, slope, *tables),
        *(d_t, d_z, d_mixed, d_lifted, d_out.stride(0)),
        D=width,
        W=channels,
        TIME=of_t,
        **BACKWARD_SAMPLES.pick(channels=channels),
    )
    if not of_weights:
        return [d_t, *(t.new_empty(0) for _ in weights)]
    gradients = [torch.empty_like(value) for value in weights]
    config = BACKWARD_WEIGHTS.pick(channels=channels)
    programs = channels + channels * (channels // config["OUT"]) + triton.cdiv(width, config["ROWS"])
    launch(
        _backward_weights,
        (programs,),
        *(d_out, t, lift_weight, lift_bias, real0, imag0, point0, spectrum, means, *tables, d_z, d_mixed, d_lifted),
        *(*gradients, d_out.stride(0), batch),
        LIMIT=triton.next_power_of_2(batch),
        D=width,
        W=channels,
        **config,
    )
    return [d_t, *gradients]
