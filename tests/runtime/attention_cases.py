"""What the tests of attention in INT8 share: shapes, random tensors, and how far results may be apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import families
from smoothquant_plus.runtime.attention import Int8Layer

# batch, heads, KV heads, tokens, positions, channels of keys, channels of values. A page has 64 positions, what is summed up together 512; 32 rows
# of queries go over a page together.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 4, 2, 1, 63, 16, 16),
    (2, 6, 6, 1, 64, 64, 64),
    (1, 8, 1, 1, 65, 80, 80),
    (1, 3, 3, 7, 7, 33, 65),
    (2, 4, 2, 17, 130, 40, 24),
    (1, 2, 1, 118, 700, 64, 128),
    (1, 40, 1, 3, 67, 8, 8),
    (1, 2, 2, 1, 1100, 128, 128),
    (0, 2, 2, 1, 3, 8, 8),
    (1, 2, 2, 0, 3, 8, 8),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Tiny models that it is refused for, and why.
REFUSED = {
    **dict.fromkeys(families.HYBRID, "has layers that keep something other than keys and values"),
    **dict.fromkeys(("gemma4-e2b", "gemma4-vision"), "has layers that read the keys and values of earlier ones"),
    "mimo-v2-flash": "does not compute the sinks",
}


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, some channels of the keys ten times as large as others."""
    batch, heads, kv_heads, tokens, positions, width, value_width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, heads, tokens, width, generator=generator)
    key = torch.randn(batch, kv_heads, positions, width, generator=generator)
    key[..., ::8] *= 10
    value = torch.randn(batch, kv_heads, positions, value_width, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def kept(key: Tensor, value: Tensor, *parts: int) -> Int8Layer:
    """What a cache is after it was given so many tokens at a time."""
    layer = Int8Layer()
    for some_keys, some_values in zip(key.split(parts or key.shape[2], dim=2), value.split(parts or key.shape[2], dim=2), strict=True):
        assert layer.update(some_keys, some_values) == (layer, layer)
    return layer


def close(got: Tensor, right: Tensor, value: Tensor) -> None:
    """Integers that were rounded otherwise, where float32 leaves it open, count for one in 127 of a value's weight; nearly none are."""
    assert got.dtype == right.dtype and got.shape == right.shape
    if got.numel():
        rounding = 2 * torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 1e-5
        off = (got.float() - right.float()).abs() / value.float().abs().max()
        assert off.max() < 0.01 and (off > rounding).float().mean() < 0.02, off.max()


NOT_FINITE = (1, 2, 2, 5, 70, 16, 16)


def check_not_finite(ours: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> None:
    """A NaN and an infinite number make NaN of what sees them, and of nothing else; the tensors are of the shape NOT_FINITE."""
    right = ours(query, kept(key, value), 0.2, causal=True)
    for bad in (float("nan"), float("inf")):
        for which, place in itertools.product((0, 1, 2), (0, 67)):
            tensors = [query.clone(), key.clone(), value.clone()]
            tensors[which][0, 1, min(place, tensors[which].shape[2] - 1), 3] = bad
            y = ours(tensors[0], kept(*tensors[1:]), 0.2, causal=True)
            assert torch.equal(y[:, :, 0], right[:, :, 0])  # the other head
            before = 0 if which == 0 else max(0, place - 65)
            assert torch.equal(y[:, :before], right[:, :before])
            hit = y[0, :, 1].isnan().any(dim=-1)
            first = min(place, 4) if which == 0 else max(0, place - 65)  # token t sees 66 + t positions
            assert not hit[:first].any() and (hit[first:].all() if which else hit.nonzero().flatten().tolist() == [first])
