"""Attention in INT8: keys and values are quantized by one kernel as they enter the cache, and another multiplies both products.

The cache's pages hold PAGE tokens of a head, filled up to a multiple of WORDS channels:
    keys    int8 (batch, KV heads, pages, PAGE * channels): a token's channels next to each other
    values  int8 (batch, KV heads, pages, channels * PAGE): a channel's tokens next to each other
    scales  float32 (batch, KV heads, 2, pages * PAGE): of keys, then of values
So what a product adds up, channels of keys and tokens of values, lies next to each other in both, as matrix instructions of 8 bits want it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothquant_plus.runtime.kernels.reference import PAGE
from smoothquant_plus.runtime.kernels.triton.common import launch
from smoothquant_plus.runtime.kernels.triton.configurations import cdiv, device_of
from smoothquant_plus.runtime.kernels.triton.w8a8 import ROUND, round_to_int8, scale_of_token

WORDS = 16
# Programs that share a row's positions, at most, and programs that are wanted on each multiprocessor when a few rows alone would not fill them.
SPLITS, WANTED = 64, 2
# The bits of 2^-120: what is smaller is rounded as if this were the largest of its page, so that nothing is divided by a denormal number.
SMALLEST: tl.constexpr = tl.constexpr((127 - 120) << 23)


@triton.jit
def quantize_rows(x):
    """`quantize_input` per token of float32 (rows, channels), zeros beyond a row's end: int8 of that shape, and the scales float32 (rows,). An
    infinite number makes its row's scale NaN, as a NaN does, so that it stays visible."""
    scale = scale_of_token(tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1))
    return round_to_int8(x, scale[:, None]), scale + (scale - scale)


@triton.jit(do_not_specialize=["at", "tokens"])
def append_kernel(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    at,
    tokens,
    heads,
    pages,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    KEY_CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    KEY_STORED: tl.constexpr,
    VALUE_STORED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """TOKENS tokens of a head: key (batch, heads, tokens, KEY_CHANNELS) and value, rounded, into the places from `at` on of the cache. Grid:
    (tiles of tokens, batch * heads)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    of_head = tl.program_id(1).to(tl.int64)
    batch = of_head // heads
    head = of_head % heads
    place = at + token
    page = of_head * pages + place // PAGE
    token = token.to(tl.int64)
    k = tl.arange(0, KEYS)
    from_ptr = key_ptr + batch * key_batch + head * key_head + token[:, None] * key_token
    key = tl.load(from_ptr + k[None, :], mask=inside[:, None] & (k < KEY_CHANNELS)[None, :], other=0.0).to(tl.float32)
    integers, scale = quantize_rows(key)
    to = (page * PAGE + place % PAGE)[:, None] * KEY_STORED + k[None, :]
    tl.store(keys_ptr + to, integers, mask=inside[:, None] & (k < KEY_STORED)[None, :])
    tl.store(scales_ptr + of_head * 2 * pages * PAGE + place, scale, mask=inside)
    v = tl.arange(0, VALUES)
    from_ptr = value_ptr + batch * value_batch + head * value_head + token[:, None] * value_token
    value = tl.load(from_ptr + v[None, :], mask=inside[:, None] & (v < VALUE_CHANNELS)[None, :], other=0.0).to(tl.float32)
    integers, scale = quantize_rows(value)
    to = (page[:, None] * VALUE_STORED + v[None, :]) * PAGE + (place % PAGE)[:, None]
    tl.store(values_ptr + to, integers, mask=inside[:, None] & (v < VALUE_STORED)[None, :])
    tl.store(scales_ptr + (of_head * 2 + 1) * pages * PAGE + place, scale, mask=inside)


@triton.jit(do_not_specialize=["length", "tokens", "share"])
def attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    mask_ptr,
    y_ptr,
    extent_ptr,
    length,
    tokens,
    share,
    heads,
    group,
    pages,
    scaling,
    softcap,
    query_batch,
    query_head,
    query_token,
    mask_batch,
    mask_head,
    mask_token,
    mask_position,
    KEY_CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    KEY_STORED: tl.constexpr,
    VALUE_STORED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """`reference.attention` of ROWS rows, the tokens of the `group` query heads of a KV head, with `share` of the pages. `mask` is added, float32:
    with one of bytes Triton computes scores twice, in the layout of its loads too.

    y is (batch, tokens, heads, VALUE_CHANNELS). With SPLIT it is float32 with an axis of the parts before them, not divided by the sum of the weights
    yet; that and the largest score go to `extent` (parts, batch, tokens, heads, 2). Grid: (tiles of rows, batch * KV heads, parts).
    """
    of_head = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    batch = of_head // kv_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens * group
    row = tl.minimum(row, tokens * group - 1)  # rows beyond the last are the last once more, and not stored
    token = row // group
    head = of_head % kv_heads * group + row % group
    k = tl.arange(0, KEYS)
    at = batch * query_batch + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    query = tl.load(query_ptr + at[:, None] + k[None, :], mask=(k < KEY_CHANNELS)[None, :], other=0.0).to(tl.float32)
    integers, query_scale = quantize_rows(query)
    query_scale *= scaling

    place = length - tokens + token  # of a row's own token
    end = length
    if CAUSAL:
        end = tl.minimum(length, length - tokens + (tl.program_id(0) * ROWS + ROWS - 1) // group + 1)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, tl.cdiv(end, PAGE))
    inner = tl.arange(0, PAGE)
    v = tl.arange(0, VALUES)
    keys_at = keys_ptr + (of_head * pages + first) * PAGE * KEY_STORED + inner[None, :] * KEY_STORED + k[:, None]
    values_at = values_ptr + (of_head * pages + first) * PAGE * VALUE_STORED + v[None, :] * PAGE + inner[:, None]
    scales_at = scales_ptr + of_head * 2 * pages * PAGE
    if mask_ptr is not None:
        mask_at = mask_ptr + (batch * mask_batch + head.to(tl.int64) * mask_head + token.to(tl.int64) * mask_token)[:, None]

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, VALUES), tl.float32)
    for page in range(first, last):
        position = page * PAGE + inner
        there = position < length
        keys = tl.load(keys_at, mask=(k < KEY_STORED)[:, None], other=0)
        score = tl.dot(integers, keys, out_dtype=tl.int32).to(tl.float32) * query_scale[:, None]
        score *= tl.load(scales_at + position, mask=there, other=0.0)[None, :]
        if CAPPED:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0))
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (position[None, :] <= place[:, None])
        if mask_ptr is not None:
            given = tl.load(mask_at + position[None, :].to(tl.int64) * mask_position, mask=seen, other=float("-inf"))
            score = tl.where(given == float("-inf"), given, score + given)
        else:
            score = tl.where(seen, score, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        shrunk = tl.exp(before - base)
        weight = tl.exp(score - base[:, None])
        total = total * shrunk + tl.sum(weight, axis=1)
        # What has no weight leaves no trace, whatever its value is.
        weight = tl.where(
            score == float("-inf"), 0.0, weight * tl.load(scales_at + pages * PAGE + position, mask=there, other=0.0)[None, :]
        )
        bits = tl.maximum(tl.max(tl.abs(weight).to(tl.int32, bitcast=True), axis=1), SMALLEST)  # NaN has more than any number
        most = bits.to(tl.float32, bitcast=True)
        rounded = ((weight * (127.0 / most)[:, None] + ROUND) - ROUND).to(tl.int8)
        values = tl.load(values_at, mask=(v < VALUE_STORED)[None, :], other=0)
        part = tl.dot(rounded, values, out_dtype=tl.int32).to(tl.float32)
        y = y * shrunk[:, None] + part * (most / 127.0)[:, None]
        keys_at += PAGE * KEY_STORED
        values_at += PAGE * VALUE_STORED

    at = (batch * tokens + token) * heads + head
    if SPLIT:
        at += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // kv_heads) * tokens * heads
        tl.store(extent_ptr + at * 2, largest, mask=inside)
        tl.store(extent_ptr + at * 2 + 1, total, mask=inside)
    else:
        y = tl.where(total[:, None] == 0.0, 0.0, y / total[:, None])
    tl.store(
        y_ptr + at[:, None] * VALUE_CHANNELS + v[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=inside[:, None] & (v < VALUE_CHANNELS)[None, :],
    )


@triton.jit
def merge_kernel(part_ptr, extent_ptr, y_ptr, parts, CHANNELS: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr):
    """y (rows, CHANNELS) of the `part`s float32 (parts, rows, CHANNELS) that programs made of their positions. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    part = tl.arange(0, PARTS)
    at = part.to(tl.int64) * rows + row
    largest = tl.load(extent_ptr + at * 2, mask=part < parts, other=float("-inf"))
    total = tl.load(extent_ptr + at * 2 + 1, mask=part < parts, other=0.0)
    most = tl.max(largest, axis=0)
    weight = tl.exp(largest - tl.where(most == float("-inf"), 0.0, most))
    v = tl.arange(0, VALUES)
    y = tl.load(part_ptr + at[:, None] * CHANNELS + v[None, :], mask=(part < parts)[:, None] & (v < CHANNELS)[None, :], other=0.0)
    whole = tl.sum(total * weight, axis=0)
    y = tl.sum(y * weight[:, None], axis=0)
    y = tl.where(whole == 0.0, 0.0, y / whole)
    tl.store(y_ptr + row * CHANNELS + v, y.to(y_ptr.dtype.element_ty), mask=v < CHANNELS)


@torch.library.custom_op("smoothquant_plus::triton_cache_append", mutates_args=("keys", "values", "scales"))
def cache_append(keys: Tensor, values: Tensor, scales: Tensor, key: Tensor, value: Tensor, at: int) -> None:
    """Write `key` (batch, KV heads, tokens, channels) and `value`, rounded, as the tokens from `at` on into a cache."""
    batch, heads, tokens, width = key.shape
    room = (batch, heads, keys.shape[2])
    fits = keys.shape == (*room, _stored(width) * PAGE) and values.shape == (*room, _stored(value.shape[3]) * PAGE)
    fits = fits and keys.shape[2] * PAGE == scales.shape[-1] and 0 <= at <= scales.shape[-1] - tokens
    if not fits or key.shape[:3] != value.shape[:3]:
        raise ValueError("the cache does not fit the keys and values")
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    if key.numel():
        rows = tokens_at_once(tokens, max(width, value.shape[3]))
        arguments = (key, value, keys, values, scales, at, tokens, heads, keys.shape[2], *key.stride()[:3], *value.stride()[:3])
        sizes = widths(width, value.shape[3]) | {"TOKENS": rows, "PAGE": PAGE}
        launch(append_kernel, (cdiv(tokens, rows), batch * heads), *arguments, **sizes, warps=4 if rows > 1 else 1, stages=1)


@torch.library.custom_op("smoothquant_plus::triton_attention", mutates_args=())
def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: Tensor,
    length: int,
    channels: int,
    scaling: float,
    softcap: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """`reference.attention` of `query` (batch, heads, tokens, channels of keys) with the first `length` tokens of a cache; `channels` are those of
    values, `mask` bool or float32 (batch, heads, tokens, length), or None. Gives (batch, tokens, heads, channels)."""
    batch, heads, tokens, width = query.shape
    kv_heads = keys.shape[1]
    fits = keys.shape[0] == batch and heads % kv_heads == 0 and length <= scales.shape[-1]
    if not fits or _stored(width) * PAGE != keys.shape[3] or _stored(channels) * PAGE != values.shape[3]:
        raise ValueError("the cache does not fit the queries")
    if mask is not None and (mask.shape != (batch, heads, tokens, length) or mask.dtype not in (torch.bool, torch.float32)):
        raise ValueError("the mask does not fit")
    y = query.new_empty(batch, tokens, heads, channels)
    if y.numel() == 0:
        return y
    query = query if query.stride(3) == 1 else query.contiguous()
    group = heads // kv_heads
    rows, warps, stages = tile(tokens * group, max(width, channels))
    tiles = (cdiv(tokens * group, rows), batch * kv_heads)
    parts, share = shares(tiles[0] * tiles[1], cdiv(length, PAGE), query.device)
    to = y if parts == 1 else query.new_empty(parts, *y.shape, dtype=torch.float32)
    extent = query.new_empty(0 if parts == 1 else parts * batch * tokens * heads * 2, dtype=torch.float32)
    if mask is not None and mask.dtype == torch.bool:
        mask = added(mask)
    launch(
        attention_kernel,
        (*tiles, parts),
        *(query, keys, values, scales, mask, to, extent, length, tokens, share, heads, group, keys.shape[2], scaling, softcap),
        *query.stride()[:3],
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        **widths(width, channels),
        CAUSAL=causal,
        CAPPED=softcap != 0,
        SPLIT=parts > 1,
        ROWS=rows,
        PAGE=PAGE,
        warps=warps,
        stages=stages,
    )
    if parts > 1:
        blocks = {"VALUES": triton.next_power_of_2(channels), "PARTS": triton.next_power_of_2(parts)}
        launch(merge_kernel, (batch * tokens * heads,), to, extent, y, parts, CHANNELS=channels, **blocks, warps=4, stages=1)
    return y


@attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, scales: Tensor, length: int, channels: int, *others: Any) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, channels)


def new_cache(
    pages: int, batch: int, heads: int, key_channels: int, value_channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for so many `pages` of PAGE tokens, not initialized."""
    keys, values = (
        torch.empty(batch, heads, pages, PAGE * _stored(width), dtype=torch.int8, device=device) for width in (key_channels, value_channels)
    )
    return keys, values, torch.empty(batch, heads, 2, pages * PAGE, dtype=torch.float32, device=device)


def added(mask: Tensor) -> Tensor:
    """A bool mask as what is added to scores, as large as it is in memory: axes along which it is repeated stay so."""
    repeated = [axis for axis, stride in enumerate(mask.stride()) if stride == 0]
    once = mask[tuple(slice(1) if axis in repeated else slice(None) for axis in range(mask.ndim))]
    return torch.where(once, 0.0, float("-inf")).expand(mask.shape)


def _stored(channels: int) -> int:
    return cdiv(channels, WORDS) * WORDS


def widths(key_channels: int, value_channels: int) -> dict[str, int]:
    """The compile-time arguments that heads of so many channels have."""
    found = {"KEY_CHANNELS": key_channels, "VALUE_CHANNELS": value_channels}
    found |= {"KEY_STORED": _stored(key_channels), "VALUE_STORED": _stored(value_channels)}
    # Products of 8 bits add up 32 numbers at least.
    return found | {"KEYS": max(32, triton.next_power_of_2(key_channels)), "VALUES": max(16, triton.next_power_of_2(value_channels))}


def tokens_at_once(tokens: int, channels: int) -> int:
    """How many tokens a program appends."""
    return min(32 if channels <= 128 else 16, triton.next_power_of_2(tokens))


def tile(rows: int, channels: int) -> tuple[int, int, int]:
    """How many rows a program takes, which its registers have to hold; its warps and stages: what has few rows waits for memory."""
    taken = min(64 if channels <= 128 else 32, max(16, triton.next_power_of_2(rows)))
    return (taken, 8, 2) if taken > 16 else (taken, 4, 3 if channels <= 256 else 2)


def shares(programs: int, pages: int, device: torch.device) -> tuple[int, int]:
    """How many programs share the positions of a row, and how many pages each takes."""
    _, _, multiprocessors = device_of(device)
    share = max(1, cdiv(pages, max(1, min(SPLITS, WANTED * multiprocessors // programs))))
    return max(1, cdiv(pages, share)), share
