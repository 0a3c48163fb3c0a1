"""W8A8: activations are quantized by one kernel, and multiplied with 8-bit weights by another, which also applies scales and bias."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothquant_plus.method.integers import QuantizedWeight, scale_of
from smoothquant_plus.runtime.kernels.triton.common import add_parts, counters, launch
from smoothquant_plus.runtime.kernels.triton.configurations import Configuration, choose

# Rows of integers are filled up with zeros to a multiple of this, so that no step of a sum needs a mask.
DEPTH = 128
# A float32 number in -2**22..2**22 plus this has no place for a fraction: it was rounded, ties to even, as torch.round does.
ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)
# Tiles of rows that go over the channels together, so that what they share stays in the second-level cache.
SUPER: tl.constexpr = tl.constexpr(8)
# Numbers of a row that `quantize_kernel` has at a time, and channels that a program of `scale_kernel` takes.
QUANTIZED = 4096
SCALED = 1024


def pack(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(values int8 (N, K filled up), scale float32 (N,), `counters`)."""
    values, scale = weight.values, weight.scale.reshape(-1).expand(len(weight.values)).contiguous()
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % DEPTH)) if values.shape[1] % DEPTH else values.contiguous()
    return values, scale, counters(values.device)


@triton.jit
def scale_of_token(largest):
    """The scale, float32, of a token whose |x| has `largest` as its largest bits. As integers, the bits of |x| are in the order of the numbers, and
    NaN comes last: a maximum that keeps it."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def round_to_int8(x, scale):
    """x / scale, float32, as `quantize_input` rounds it."""
    x = tl.minimum(tl.maximum(tl.div_rn(x, scale), -128.0), 127.0)
    return ((x + ROUND) - ROUND).to(tl.int8)


@triton.jit
def quantize_kernel(x_ptr, given_ptr, values_ptr, scale_ptr, K, filled, x_stride, LENGTH: tl.constexpr):
    """`quantize_input` of one token a program: values int8 (M, filled), the last ones zero, and scale float32 (M,). `given_ptr` is a scale
    float32 (1,), or None for one from the token itself. A NaN makes its token's scale NaN, so that it stays visible."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    largest = tl.zeros((LENGTH,), tl.int32)
    for start in range(0, K, LENGTH):
        k = start + tl.arange(0, LENGTH)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
    largest = tl.max(largest, axis=0)
    scale = scale_of_token(largest) if given_ptr is None else tl.load(given_ptr)
    maximum = largest.to(tl.float32, bitcast=True)
    stored = tl.where(maximum == maximum, scale, maximum)
    tl.store(scale_ptr + row, stored + (stored - stored))  # NaN where it is infinite: not finite results with wrong signs
    for start in range(0, filled, LENGTH):
        k = start + tl.arange(0, LENGTH)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(values_ptr + row * filled + k, round_to_int8(x, scale), mask=k < filled)


@triton.jit(do_not_specialize=["M"])  # one compilation for any number of tokens
def product_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    N,
    K,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    DOTS: tl.constexpr,
):
    """y (M, N) = x int8 (M, K) @ weight.T int8 (N, K), times the scales float32 (M,) and (N,), plus the bias. K is a multiple of STEP, which
    is multiplied in DOTS pieces.

    Grid: (tiles, programs that share the sum of a tile).
    """
    PIECE: tl.constexpr = STEP // DOTS
    tiles_of_rows = tl.cdiv(M, ROWS)
    tiles_of_channels = tl.cdiv(N, CHANNELS)
    first_row = tl.program_id(0) // (SUPER * tiles_of_channels) * SUPER
    together = tl.minimum(tiles_of_rows - first_row, SUPER)
    tile = tl.program_id(0) % (SUPER * tiles_of_channels)
    row = (first_row + tile % together) * ROWS + tl.arange(0, ROWS)
    channel = tile // together * CHANNELS + tl.arange(0, CHANNELS)

    length = tl.cdiv(K // STEP, tl.num_programs(1))
    first = tl.program_id(1) * length
    last = tl.minimum(first + length, K // STEP)
    k = first * STEP + tl.arange(0, PIECE)
    # Rows and channels beyond the last are the last once more, and not stored.
    x_at = x_ptr + tl.minimum(row, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + tl.minimum(channel, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, CHANNELS), tl.int32)
    for _ in range(first, last):
        for piece in tl.static_range(0, STEP, PIECE):
            total = tl.dot(tl.load(x_at + piece), tl.load(weight_at + piece), total, out_dtype=tl.int32)
        x_at += STEP
        weight_at += STEP

    mask = (row < M)[:, None] & (channel < N)[None, :]
    if SPLIT:
        inside = tl.arange(0, ROWS)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        total, done = add_parts(total, partial_ptr, arrived_ptr, inside, mask)
        if not done:
            return
    x_scale = tl.load(x_scale_ptr + row, mask=row < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + channel, mask=channel < N, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * N + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(total_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, y_ptr, N, CHANNELS: tl.constexpr):
    """y (M, N) = total int32 (M, N), times the scales, plus the bias. Grid: (M, tiles of channels)."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < N
    y = tl.load(total_ptr + row * N + channel, mask=mask, other=0).to(tl.float32) * tl.load(x_scale_ptr + row)
    y *= tl.load(weight_scale_ptr + channel, mask=mask, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + channel, y.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("smoothquant_plus::triton_w8a8", mutates_args=())
def w8a8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, arrived: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """As `reference_w8a8`, on what `pack` gives. `arrived` is all zero between calls, so it does not count as changed."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    if y.numel() == 0:
        return y
    values, scale = quantize(x.reshape(-1, x.shape[-1]), per_token, input_scale)
    how = choose("w8a8", len(weight), x.shape[-1], len(values), x.device)
    multiply(values, scale, weight, weight_scale, arrived, bias, y.view(len(values), len(weight)), how)
    return y


@w8a8.register_fake
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, arrived: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def quantize(x: Tensor, per_token: bool, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (M, K), M > 0, as int8 (M, K filled up to a multiple of DEPTH) and a float32 scale (M,) for each token, whatever the strategy."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if not per_token and input_scale is None:
        input_scale = scale_of(x.abs().amax().reshape(1))
    filled = triton.cdiv(x.shape[1], DEPTH) * DEPTH
    values = x.new_empty((len(x), filled), dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    length = min(QUANTIZED, triton.next_power_of_2(filled))
    launch(quantize_kernel, (len(x),), x, input_scale, values, scale, x.shape[1], filled, x.stride(0), LENGTH=length, warps=8, stages=2)
    return values, scale


def multiply(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    arrived: Tensor,
    bias: Tensor | None,
    y: Tensor,
    how: Configuration,
) -> None:
    """y (M, N), contiguous, = x int8 (M, K) times the weight that `pack` made, in the way `how`. x_scale float32 (M,)."""
    (m, k), n = x.shape, len(weight)
    if k != weight.shape[1]:
        raise ValueError(f"x has {k} input channels, and the weight {weight.shape[1]}, each filled up to a multiple of {DEPTH}")
    if how.kernel == "matmul":
        # PyTorch's product wants more than 16 rows on CUDA.
        total = torch._int_mm(torch.nn.functional.pad(x, (0, 0, 0, max(0, 32 - m))), weight.t())
        launch(scale_kernel, (m, triton.cdiv(n, SCALED)), total, x_scale, weight_scale, bias, y, n, CHANNELS=SCALED, warps=4, stages=1)
        return
    tiles = triton.cdiv(m, how.rows) * triton.cdiv(n, how.channels)
    partial = x.new_empty(tiles * how.split * how.rows * how.channels if how.split > 1 else 0, dtype=torch.int32)
    launch(
        product_kernel,
        (tiles, how.split),
        *(x, x_scale, weight, weight_scale, bias, y, partial, arrived, m, n, k),
        **constants(how),
        warps=how.warps,
        stages=how.stages,
    )


def constants(how: Configuration) -> dict[str, Any]:
    """The compile-time arguments of `product_kernel`."""
    return {"SPLIT": how.split > 1, "ROWS": how.rows, "CHANNELS": how.channels, "STEP": how.depth, "DOTS": how.dots}
