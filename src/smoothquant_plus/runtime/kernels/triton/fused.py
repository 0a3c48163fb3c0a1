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

from smoothquant_plus.runtime.kernels.triton.common import launch
from smoothquant_plus.runtime.kernels.triton.configurations import choose
from smoothquant_plus.runtime.kernels.triton.w8a8 import DEPTH, multiply, round_to_int8, scale_of_token

# A row is held by one program, in its registers: at most so many channels without spills (tests/runtime/test_triton_compile.py).
LARGEST_NORM, LARGEST_PRODUCT = 16384, 32768


@triton.jit
def quantize_row(y):
    """`quantize_input` per token for a row y, float32 (BLOCK,) with zeros beyond its end: int8 (BLOCK,) and the float32 scale."""
    scale = scale_of_token(tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=0))
    return round_to_int8(y, scale), scale + (scale - scale)  # NaN where it is infinite


@triton.jit
def norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    values_ptr,
    scale_ptr,
    K,
    filled,
    eps,
    x_stride,
    residual_stride,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of x (M, K): its sum with the residual, if there is one, stored to `sum`; LayerNorm or RMSNorm of that; values int8 (M, filled) with
    zeros after the Kth, and scale float32 (M,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * residual_stride + k, mask=mask, other=0.0).to(tl.float32)
        stored = y.to(dtype)
        tl.store(sum_ptr + row * K + k, stored, mask=mask)
        y = stored.to(tl.float32)
    if LAYER:
        y = tl.where(mask, y - tl.sum(y, axis=0) / K, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / K + eps)
    weight = tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if LAYER:
        y *= weight
        if bias_ptr is not None:
            y += tl.load(bias_ptr + k, mask=mask, other=0.0).to(tl.float32)
    else:
        y = y.to(dtype).to(tl.float32) * weight  # as Llama's norm does: its weight multiplies what was rounded already
    integers, scale = quantize_row(y.to(dtype).to(tl.float32))
    tl.store(values_ptr + row * filled + k, integers, mask=k < filled)
    tl.store(scale_ptr + row, scale)


@triton.jit
def silu_quantize_kernel(gate_ptr, up_ptr, values_ptr, scale_ptr, K, filled, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One row of SiLU(gate) * up, both (M, K): values int8 (M, filled) with zeros after the Kth, and scale float32 (M,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + k, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + k, mask=mask, other=0.0).to(tl.float32)
    y = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    integers, scale = quantize_row(y.to(dtype).to(tl.float32))
    tl.store(values_ptr + row * filled + k, integers, mask=k < filled)
    tl.store(scale_ptr + row, scale)


@torch.library.custom_op("smoothquant_plus::triton_norm_quantize", mutates_args=())
def norm_quantize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> tuple[Tensor, Tensor]:
    """The norm of x, quantized per token: values int8 (..., K filled up with zeros to a multiple of DEPTH) and scale float32 (...).

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
    """SiLU(gate) * up, both (..., K), rounded to their dtype after each; quantized as `triton_norm_quantize` does."""
    values, scale = _empty(gate)
    gate, up = _rows(gate), _rows(up)
    k, filled = gate.shape[1], values.shape[-1]
    if len(gate):
        arguments = (gate, up, values, scale, k, filled, gate.stride(0), up.stride(0))
        block, warps, stages = tile(filled)
        launch(silu_quantize_kernel, (len(gate),), *arguments, **block, warps=warps, stages=stages)
    return values, scale


@silu_quantize.register_fake
def _(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(gate)


@torch.library.custom_op("smoothquant_plus::triton_w8a8_product", mutates_args=())
def product(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, arrived: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`triton_w8a8` without its first half: y (..., N) in `dtype`, of activations that the ops above have quantized per token."""
    y = values.new_empty(*values.shape[:-1], len(weight), dtype=dtype)
    rows = values.view(-1, values.shape[-1])
    if y.numel():
        how = choose("w8a8", len(weight), rows.shape[1], len(rows), values.device)
        multiply(rows, scale.view(-1), weight, weight_scale, arrived, bias, y.view(len(rows), len(weight)), how)
    return y


@product.register_fake
def _(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, arrived: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=dtype)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    values, scale = _empty(x)
    x = _rows(x)
    residual_stride = 0
    if residual is not None:
        residual = _rows(residual)
        residual_stride = residual.stride(0)
    filled = values.shape[-1]
    if len(x):
        arguments = (x, residual, weight, bias, total, values, scale, x.shape[1], filled, eps, x.stride(0), residual_stride)
        block, warps, stages = tile(filled)
        launch(norm_quantize_kernel, (len(x),), *arguments, LAYER=layer, **block, warps=warps, stages=stages)
    return total, values, scale


def tile(filled: int) -> tuple[dict[str, int], int, int]:
    """The compile-time argument of both kernels for rows of `filled` values, the warps and the stages. A program holds all of a row, 16 or 32
    numbers a thread."""
    block = triton.next_power_of_2(filled)
    return {"BLOCK": block}, min(max(block // 512, 1), 32), 1


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K), whose rows may be apart but are contiguous themselves."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scale for x (..., K)."""
    filled = (x.shape[-1] + DEPTH - 1) // DEPTH * DEPTH
    return x.new_empty(*x.shape[:-1], filled, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
