"""What stands between two W8A8 layers, in one pass over each row: add, normalize and quantize; multiply by SiLU and quantize.

Each row is read once and stays in registers; its int8 values and its scale are what the next product takes, so the float activations are
never written. Every rounding of the separate operations is kept: a sum, a norm or a product is rounded to its dtype as the model would have
stored it, and integers are those of `quantize_input`. Only the order in which a norm adds up its row differs, and the last bit of exp and
of the inverse square root.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothquant_plus.method.integers import INT8_MAX

# A row is held by one program, in its registers: at most so many channels without spills (tests/runtime/test_triton_compile.py).
LARGEST_NORM, LARGEST_PRODUCT = 16384, 32768

MAXIMUM = tl.constexpr(float(INT8_MAX))
# Added to a small float32 and taken away again, this leaves the nearest integer, halves to even.
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def quantize_row(y):
    """`quantize_input` per token for a row y, float32 (BLOCK,) with zeros beyond its end: int8 (BLOCK,) and the float32 scale."""
    # Without their signs, floats are ordered as the integers of the same bits are; and NaN is above infinity, so that it is not lost.
    magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.div_rn(tl.max(magnitude, axis=0).to(tl.float32, bitcast=True), MAXIMUM)
    scale = tl.where(scale == 0.0, 1.0, scale)
    ratio = tl.div_rn(y, scale)
    rounded = (ratio + ROUNDER) - ROUNDER
    return tl.minimum(tl.maximum(rounded, -MAXIMUM - 1), MAXIMUM).to(tl.int8), scale


@triton.jit
def norm_quantize_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    values,
    scales,
    channels,
    eps,
    x_stride,
    residual_stride,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of x (M, channels): with ADD its sum with the residual, stored to `total`; its norm, LAYER's or RMS; int8 values and a scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < channels
    dtype: tl.constexpr = x.dtype.element_ty
    y = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        stored = y.to(dtype)
        tl.store(total + row * channels + at, stored, mask=inside)
        y = stored.to(tl.float32)
    if LAYER:
        y = tl.where(inside, y - tl.sum(y, axis=0) / channels, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / channels + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        y *= w
        if BIAS:
            y += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    else:
        y = y.to(dtype).to(tl.float32) * w  # as Llama's norm does: its weight multiplies what was rounded already
    integers, scale = quantize_row(y.to(dtype).to(tl.float32))
    tl.store(values + row * channels + at, integers, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def silu_quantize_kernel(gate, up, values, scales, channels, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One row of SiLU(gate) * up, both (M, channels), as int8 values and a scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < channels
    dtype: tl.constexpr = gate.dtype.element_ty
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    y = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32) * u
    integers, scale = quantize_row(y.to(dtype).to(tl.float32))
    tl.store(values + row * channels + at, integers, mask=inside)
    tl.store(scales + row, scale)


def launch(channels: int) -> dict[str, int]:
    """The block and the warps for rows of `channels`."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}


@torch.library.custom_op("smoothquant_plus::triton_norm_quantize", mutates_args=())
def norm_quantize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> tuple[Tensor, Tensor]:
    """The norm of x, quantized per token: int8 (..., K) and the float32 scale (..., 1).

    x (..., K) in float16, bfloat16 or float32. `layer` False: Llama's RMSNorm, x / rms(x) rounded to x's dtype, times `weight` (K,); `bias`
    is not used. True: LayerNorm with `weight` and `bias` (K,), None for no bias.
    """
    _, values, scale = _norm_quantize(x, None, weight, bias, eps, layer)
    return values, scale


@norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> tuple[Tensor, Tensor]:
    return _empty(x)


@torch.library.custom_op("smoothquant_plus::triton_add_norm_quantize", mutates_args=())
def add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, both (..., K), in x's dtype, which is the new residual; and what `triton_norm_quantize` makes of it."""
    return _norm_quantize(x, residual, weight, bias, eps, layer)


@add_norm_quantize.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_empty(x)


@torch.library.custom_op("smoothquant_plus::triton_silu_quantize", mutates_args=())
def silu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU(gate) * up, both (..., K), rounded to their dtype after each, quantized per token: int8 (..., K) and the float32 scale (..., 1)."""
    values, scale = _empty(gate)
    gate, up = _rows(gate), _rows(up)
    if len(gate):
        how = launch(gate.shape[1])
        silu_quantize_kernel[(len(gate),)](gate, up, values, scale, gate.shape[1], gate.stride(0), up.stride(0), **how)
    return values, scale


@silu_quantize.register_fake
def _(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(gate)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if residual is not None else 0)
    values, scale = _empty(x)
    rows, added = _rows(x), _rows(x if residual is None else residual)
    flags = {"ADD": residual is not None, "LAYER": layer, "BIAS": bias is not None}
    if len(rows):
        norm_quantize_kernel[(len(rows),)](
            rows, added, weight, weight if bias is None else bias, total, values, scale,
            rows.shape[1], eps, rows.stride(0), added.stride(0), **flags, **launch(rows.shape[1]),
        )  # fmt: skip
    return total, values, scale


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K), whose rows may be apart but are contiguous themselves."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
