"""W4A16: float activations times 4-bit weights in groups.

`pack` keeps a weight in blocks of 128 input channels, whatever the group size: word i (0..31) of a block and output channel has input channel
32 j + i in nibble j. So one mask gives a run of 32 neighbouring channels, a tile that can be multiplied. A block of all output channels is
contiguous.

A nibble n becomes a float without a conversion: under the exponent of 128 (bfloat16) or 1024 (float16) it is the number 128 + n or 1024 + n. The
offset goes away with the zero point: after the product, as a multiple of the sum of the group's activations, which is itself a product with
ones; or before it, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothquant_plus.method.integers import INT4_MIN, QuantizedWeight, pieces
from smoothquant_plus.runtime.kernels.triton.common import INTERPRETED, add_parts, counters, launch
from smoothquant_plus.runtime.kernels.triton.configurations import Configuration, choose

# Input channels of a block, and its 16-bit words; and the numbers of a float weight that are made at a time (32 MB in 16 bits, which the
# second-level cache of a large GPU holds), but of so many channels that a product with them fills the GPU. Of both the multiples that cuBLAS wants.
BLOCK: tl.constexpr = tl.constexpr(128)
WORDS: tl.constexpr = tl.constexpr(32)
PIECE, NARROWEST, MULTIPLE = 1 << 24, 2048, 256
# Channels that a program of `dequantize_kernel` takes.
DEQUANTIZED = 32


def assembly(exponent: str) -> tl.constexpr:
    """Two words $4 as four pairs of nibbles $0..$3 under an exponent. 0xEA is (a & b) | c: one instruction for two weights, after a shift."""
    return tl.constexpr(f"""{{
        .reg .b32 second, third, fourth;
        shr.u32 second, $4, 4;
        shr.u32 third, $4, 8;
        shr.u32 fourth, $4, 12;
        lop3.b32 $0, $4, 0x000F000F, {exponent}, 0xEA;
        lop3.b32 $1, second, 0x000F000F, {exponent}, 0xEA;
        lop3.b32 $2, third, 0x000F000F, {exponent}, 0xEA;
        lop3.b32 $3, fourth, 0x000F000F, {exponent}, 0xEA;
    }}""")


UNPACK_BFLOAT16: tl.constexpr = assembly("0x43004300")
UNPACK_FLOAT16: tl.constexpr = assembly("0x64006400")


def pack(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(packed int16 (blocks, N, 32), steps (groups, N, 2), `counters`). `steps` are the scale and the zero point, 0..15, side by side, as a
    kernel reads them, in the scale's dtype. K is filled up to whole blocks with groups of scale zero."""
    n, k = weight.values.shape
    blocks = -(-k // BLOCK.value)
    packed = weight.values.new_empty((blocks, n, WORDS.value), dtype=torch.int16)
    for rows in pieces(weight.values):
        unsigned = (weight.values[rows] - INT4_MIN).view(torch.uint8)
        unsigned = torch.nn.functional.pad(unsigned, (0, blocks * BLOCK.value - k))
        a, b, c, d = unsigned.reshape(len(unsigned), blocks, 4, WORDS.value).unbind(2)  # (rows, blocks, 32) each
        packed[:, rows] = torch.stack((a | b << 4, c | d << 4), dim=-1).view(torch.int16).squeeze(-1).transpose(0, 1)
    scale = weight.scale.float() if weight.scale.dtype == torch.float64 else weight.scale
    zero = torch.full_like(scale, -INT4_MIN) if weight.zero_point is None else (weight.zero_point - INT4_MIN).to(scale.dtype)
    steps = torch.stack((scale, zero), dim=-1).transpose(0, 1)  # (groups, N, 2)
    groups = blocks * BLOCK.value // (weight.quant.group_size or BLOCK.value)
    steps = torch.nn.functional.pad(steps, (0, 0, 0, 0, 0, groups - len(steps)))
    return packed, steps.contiguous(), counters(packed.device)


@triton.jit
def unpack(words, dtype: tl.constexpr, OFFSET: tl.constexpr):
    """int16 words as four tensors of their nibbles, plus OFFSET, in `dtype`; in the interpreter in float32."""
    if INTERPRETED or dtype == tl.float32:
        words = words.to(tl.int32)
        first = (words & 15).to(tl.float32) + OFFSET
        second = (words >> 4 & 15).to(tl.float32) + OFFSET
        third = (words >> 8 & 15).to(tl.float32) + OFFSET
        fourth = (words >> 12 & 15).to(tl.float32) + OFFSET
        runs = (first, second, third, fourth)
    elif dtype == tl.bfloat16:
        runs = tl.inline_asm_elementwise(
            UNPACK_BFLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        runs = tl.inline_asm_elementwise(
            UNPACK_FLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    return runs


@triton.jit(do_not_specialize=["M", "blocks"])  # one compilation for any number of tokens
def product_kernel(
    x_ptr,
    packed_ptr,
    steps_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    N,
    blocks,
    x_stride,
    GROUP: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (M, N) = x (M, blocks * 128) times the weight that `pack` made, plus the bias; x and y bfloat16 or float16.

    The operands are swapped: channels (of the weight) are the rows of a tile, of which there are always enough for a tensor core.
    Grid: (tiles, programs that share the sum of a tile).
    """
    OFFSET: tl.constexpr = 128.0 if x_ptr.dtype.element_ty == tl.bfloat16 else 1024.0
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x_ptr.dtype.element_ty
    RUNS: tl.constexpr = GROUP // WORDS  # runs of 32 channels in a group
    GROUPS: tl.constexpr = BLOCK // GROUP  # groups in a block
    ONCE: tl.constexpr = "evict_first" if SCALE_AFTER else ""  # all tokens are in one tile, so weights are not read again

    # Tiles of the same channels are neighbours: they share weights in the second-level cache.
    tiles_of_rows = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % tiles_of_rows * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) // tiles_of_rows * CHANNELS + tl.arange(0, CHANNELS)
    word = tl.arange(0, WORDS)
    length = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * length
    last = tl.minimum(first + length, blocks)

    # Rows and channels beyond the last are the last once more, and not stored.
    from_channel = tl.minimum(channel, N - 1)
    packed_at = packed_ptr + (first.to(tl.int64) * N + from_channel)[:, None] * WORDS + word[None, :]
    steps_at = steps_ptr + (first.to(tl.int64) * GROUPS * N + from_channel)[:, None] * 2 + tl.arange(0, 2)[None, :]
    x_at = x_ptr + tl.minimum(row, M - 1).to(tl.int64)[None, :] * x_stride + (first * BLOCK + word)[:, None]
    ones = tl.full((CHANNELS, WORDS), 1.0, dtype)
    y = tl.zeros((CHANNELS, ROWS), tl.float32)
    # With num_stages said here, scales are fetched ahead too, not only what is multiplied.
    for _ in tl.range(first, last, num_stages=STAGES):
        runs = unpack(tl.load(packed_at, eviction_policy=ONCE), x_ptr.dtype.element_ty, OFFSET)
        for group in tl.static_range(GROUPS):
            scale, zero = tl.split(tl.load(steps_at + group * N * 2))  # (CHANNELS,) each
            if SCALE_AFTER:
                product = tl.zeros((CHANNELS, ROWS), tl.float32)
                sums = tl.zeros((CHANNELS, ROWS), tl.float32)
                for run in tl.static_range(group * RUNS, group * RUNS + RUNS):
                    x = tl.load(x_at + run * WORDS).to(dtype)
                    product = tl.dot(runs[run], x, product)
                    sums = tl.dot(ones, x, sums)
                y += scale.to(tl.float32)[:, None] * (product - (zero.to(tl.float32) + OFFSET)[:, None] * sums)
            else:
                for run in tl.static_range(group * RUNS, group * RUNS + RUNS):
                    x = tl.load(x_at + run * WORDS).to(dtype)
                    weight = (runs[run] - (zero.to(dtype) + OFFSET)[:, None]) * scale.to(dtype)[:, None]
                    y = tl.dot(weight, x, y)
        packed_at += N * WORDS
        steps_at += GROUPS * N * 2
        x_at += BLOCK

    mask = (channel < N)[:, None] & (row < M)[None, :]
    if SPLIT:
        inside = tl.arange(0, ROWS)[None, :] * CHANNELS + tl.arange(0, CHANNELS)[:, None]
        y, done = add_parts(y, partial_ptr, arrived_ptr, inside, mask)
        if not done:
            return
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=channel < N, other=0.0).to(tl.float32)[:, None]
    y_at = y_ptr + row.to(tl.int64)[None, :] * N + channel[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["from_channel", "to_channel"])
def dequantize_kernel(packed_ptr, steps_ptr, weight_ptr, from_channel, to_channel, N, K, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels from_channel..to_channel of the weight that `pack` made: weight (channels, K) in any float dtype. Grid: (tiles, blocks)."""
    dtype: tl.constexpr = tl.float32 if INTERPRETED else weight_ptr.dtype.element_ty
    OFFSET: tl.constexpr = 128.0 if dtype == tl.bfloat16 else (1024.0 if dtype == tl.float16 else 0.0)
    RUNS: tl.constexpr = GROUP // WORDS
    block = tl.program_id(1)
    row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel = tl.minimum(from_channel + row, N - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    runs = unpack(tl.load(packed_ptr + (block * N + channel)[:, None] * WORDS + word[None, :]), dtype, OFFSET)
    for run in tl.static_range(4):
        group = block * (BLOCK // GROUP) + run // RUNS
        steps = tl.load(steps_ptr + (group * N + channel)[:, None] * 2 + tl.arange(0, 2)[None, :])
        scale, zero = tl.split(steps.to(dtype))
        weight = (runs[run] - (zero + OFFSET)[:, None]) * scale[:, None]
        k = block * BLOCK + run * WORDS + word
        mask = (from_channel + row < to_channel)[:, None] & (k < K)[None, :]
        tl.store(weight_ptr + row.to(tl.int64)[:, None] * K + k[None, :], weight.to(weight_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("smoothquant_plus::triton_w4a16", mutates_args=())
def w4a16(x: Tensor, packed: Tensor, steps: Tensor, arrived: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference_w4a16`, on what `pack` gives. x (..., K) is float16 or bfloat16; or float32, for which the weight is written out.

    `arrived` is all zero between calls, so it does not count as changed.
    """
    y = x.new_empty(*x.shape[:-1], packed.shape[1])
    if y.numel():
        rows = x.reshape(-1, x.shape[-1])
        how = choose("w4a16", packed.shape[1], x.shape[-1], len(rows), x.device)
        multiply(rows, packed, steps, arrived, bias, y.view(len(rows), -1), how)
    return y


@w4a16.register_fake
def _(x: Tensor, packed: Tensor, steps: Tensor, arrived: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[1])


def multiply(x: Tensor, packed: Tensor, steps: Tensor, arrived: Tensor, bias: Tensor | None, y: Tensor, how: Configuration) -> None:
    """y (M, N), contiguous, = x (M, K) times the weight that `pack` made, in the way `how`. M > 0."""
    blocks, n = packed.shape[:2]
    k = blocks * BLOCK.value
    if not k - BLOCK.value < x.shape[1] <= k:
        raise ValueError(f"x has {x.shape[1]} input channels, and the weight {k}, filled up to a multiple of {BLOCK.value}")
    group = BLOCK.value * blocks // len(steps)
    if how.kernel == "matmul" or x.dtype == torch.float32:
        multiply_by_matmul(x, packed, steps, bias, y, group)
        return
    if x.shape[1] < k:
        x = torch.nn.functional.pad(x, (0, k - x.shape[1]))
    elif x.stride(1) != 1:
        x = x.contiguous()
    tiles = triton.cdiv(len(x), how.rows) * triton.cdiv(n, how.channels)
    partial = x.new_empty(tiles * how.split * how.rows * how.channels if how.split > 1 else 0, dtype=torch.float32)
    launch(
        product_kernel,
        (tiles, how.split),
        *(x, packed, steps, bias, y, partial, arrived, len(x), n, blocks, x.stride(0)),
        **constants(how, group),
        warps=how.warps,
        stages=how.stages,
    )


def constants(how: Configuration, group: int) -> dict[str, Any]:
    """The compile-time arguments of `product_kernel`."""
    after = how.kernel == "scale_after"
    tile = {"ROWS": how.rows, "CHANNELS": how.channels, "STAGES": how.stages}
    return {"GROUP": group, "SCALE_AFTER": after, "SPLIT": how.split > 1, **tile}


def multiply_by_matmul(x: Tensor, packed: Tensor, steps: Tensor, bias: Tensor | None, y: Tensor, group: int) -> None:
    """y (M, N) = x (M, K) times the weight, of which a piece is written out at a time."""
    blocks, n = packed.shape[:2]
    k = x.shape[1]
    length = min(n, max(NARROWEST, PIECE // k // MULTIPLE * MULTIPLE))
    weight = x.new_empty(length, k)
    for start in range(0, n, length):
        stop = min(start + length, n)
        grid = (triton.cdiv(stop - start, DEQUANTIZED), blocks)
        tile = {"GROUP": group, "CHANNELS": DEQUANTIZED}
        launch(dequantize_kernel, grid, packed, steps, weight, start, stop, n, k, **tile, warps=4, stages=1)
        piece = weight[: stop - start].t()
        if bias is None:
            torch.mm(x, piece, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(x.dtype), x, piece, out=y[:, start:stop])
