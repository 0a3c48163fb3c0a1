"""Attention in INT8: the kernels against the reference at every instruction set that this machine has, and models that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.runtime import attention as module
from smoothquant_plus.runtime.attention import Int8Cache, Int8Layer
from smoothquant_plus.runtime.kernels import cpu, reference
from smoothquant_plus.runtime.load import load

assert cpu.missing() is None, f"the tests need the CPU kernels: {cpu.missing()}"
OPS = torch.ops.smoothquant_plus
HIGHEST = OPS.cpu_level(len(cpu.LEVELS) - 1)

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


@pytest.fixture(params=range(HIGHEST + 1), ids=lambda level: cpu.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    assert OPS.cpu_level(request.param) == request.param
    yield cpu.LEVELS[request.param]
    OPS.cpu_level(HIGHEST)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


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


def ours(query: Tensor, layer: Int8Layer, scaling: float, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    assert layer.pages is not None
    return cpu.attention(query, layer.pages, layer.length, layer.channels, scaling, causal, mask)


def close(got: Tensor, right: Tensor, value: Tensor) -> None:
    """Integers that were rounded otherwise, where float32 leaves it open, count for one in 127 of a value's weight; nearly none are."""
    assert got.dtype == right.dtype and got.shape == right.shape
    if got.numel():
        rounding = 2 * torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 1e-5
        off = (got.float() - right.float()).abs() / value.float().abs().max()
        assert off.max() < 0.01 and (off > rounding).float().mean() < 0.02, off.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape: tuple[int, ...], level: str) -> None:
    batch, heads, _, tokens, positions, *_ = shape
    seen = torch.rand(batch, 1, tokens, positions, generator=torch.Generator().manual_seed(0)) < 0.7
    bias = torch.randn(1, heads, 1, positions)
    for dtype in DTYPES:
        query, key, value = random(shape, dtype)
        layer = kept(key, value)
        for causal, mask in ((False, None), (True, None), (False, seen), (True, bias), (False, bias)):
            mask = None if mask is None else mask.expand(batch, heads, tokens, positions)
            right = reference.attention(query, key, value, scaling=0.3, causal=causal, mask=mask)
            close(ours(query, layer, 0.3, causal, mask), right, value if value.numel() else torch.ones(1))


def test_it_is_nearly_attention_in_float32(level: str) -> None:
    """What 8 bits of each operand cost, where some channels of the keys are ten times as large as others."""
    for shape in SHAPES[5:9]:
        query, key, value = random(shape)
        repeated = (x.repeat_interleave(shape[1] // shape[2], dim=1) for x in (key, value))
        right = torch.nn.functional.scaled_dot_product_attention(query, *repeated, scale=0.1).transpose(1, 2)
        error = (ours(query, kept(key, value), 0.1) - right).norm() / right.norm()
        assert error < 0.05, error


def test_results_depend_neither_on_threads_nor_on_what_is_beside(level: str) -> None:
    """The same bits for a prompt at once and token by token, in a batch and alone, with one thread and two; however the cache was filled."""
    shape = (2, 4, 2, 90, 1300, 64, 48)
    query, key, value = random(shape)
    layer = kept(key, value)
    whole = ours(query, layer, 0.2, causal=True)
    again = kept(key, value, 1, 62, 3, 1200, 34)
    assert torch.equal(ours(query, again, 0.2, causal=True), whole)
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(ours(query, layer, 0.2, causal=True), whole)
            alone = ours(query[1:], kept(key[1:], value[1:]), 0.2, causal=True)
            assert torch.equal(alone, whole[1:])
            for token in (0, 33, 89):
                layer.length = 1300 - 89 + token
                assert torch.equal(ours(query[:, :, token : token + 1], layer, 0.2, causal=True), whole[:, token : token + 1])
            layer.length = 1300
        finally:
            torch.set_num_threads(before)


def test_what_is_not_finite_stays_where_it_is(level: str) -> None:
    shape = (1, 2, 2, 5, 70, 16, 16)
    query, key, value = random(shape)
    right = ours(query, kept(key, value), 0.2, causal=True)
    for bad in (float("nan"), float("inf")):
        for which, place in itertools.product((0, 1, 2), (0, 67)):
            tensors = [query.clone(), key.clone(), value.clone()]
            tensors[which][0, 1, min(place, tensors[which].shape[2] - 1), 3] = bad
            y = ours(tensors[0], kept(*tensors[1:]), 0.2, causal=True)
            assert torch.equal(y[:, :, 0], right[:, :, 0])  # the other head
            hit = y[0, :, 1].isnan().any(dim=-1)
            first = min(place, 4) if which == 0 else max(0, place - 65)  # token t sees 66 + t positions
            assert not hit[:first].any() and (hit[first:].all() if which else hit.nonzero().flatten().tolist() == [first])


def test_rows_that_see_nothing_are_zero(level: str) -> None:
    query, key, value = random((1, 2, 2, 3, 70, 16, 16))
    mask = torch.ones(1, 2, 3, 70, dtype=torch.bool)
    mask[:, :, 1] = False
    y = ours(query, kept(key, value), 0.2, mask=mask)
    assert not y[:, 1].any() and torch.equal(y[:, ::2], ours(query, kept(key, value), 0.2)[:, ::2])


def test_extreme_numbers(level: str) -> None:
    """Scores far apart, and values of any size."""
    for size in (1e-30, 1e-3, 1e30):
        query, key, value = random((1, 2, 1, 2, 200, 32, 32))
        value *= size
        right = reference.attention(query * 100, key, value, scaling=1.0)
        close(ours(query * 100, kept(key, value), 1.0), right, value)
    _, key, value = random((1, 2, 1, 2, 200, 32, 32))
    mean = ours(torch.zeros(1, 2, 1, 32), kept(key * 0, value), 1.0)
    torch.testing.assert_close(mean[0, 0], value[0].mean(dim=1).expand(2, -1), rtol=0, atol=2e-3)


def test_the_ops_refuse_what_does_not_fit() -> None:
    query, key, value = random((1, 2, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.pages is not None
    for bad in (query[0], query[:, :, :, :12], query.double(), query.expand(2, 2, 3, 16)):
        with pytest.raises(RuntimeError):
            ours(bad, layer, 0.2)
    for mask in (torch.ones(1, 2, 3, 69, dtype=torch.bool), torch.ones(1, 2, 3, 70, dtype=torch.int), torch.ones(1, 1, 3, 70)):
        with pytest.raises(RuntimeError, match="the mask does not fit"):
            ours(query, layer, 0.2, mask=mask)
    with pytest.raises(RuntimeError, match="the cache does not fit"):
        cpu.attention(query, layer.pages, 129, 16, 0.2, False, None)
    with pytest.raises(RuntimeError, match="the cache does not fit"):
        cpu.cache_append(layer.pages, key, value, 59)


def test_ops_as_torch_wants_them() -> None:
    query, key, value = random((1, 4, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.pages is not None
    torch.library.opcheck(OPS.cpu_attention.default, (query, layer.pages, 70, 16, 0.25, True, None))
    torch.library.opcheck(OPS.cpu_cache_append.default, (layer.pages.clone(), key, value, 5))
