"""Attention in INT8: the kernels against the reference at every instruction set that this machine has, and models that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
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


def ours(query: Tensor, layer: Int8Layer, scaling: float, **how: Any) -> Tensor:
    assert layer.pages is not None
    return cpu.attention(query, layer.pages, layer.length, layer.channels, scaling=scaling, **how)


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
        for causal, mask, softcap in ((False, None, 0.0), (True, None, 5.0), (False, seen, 0.0), (True, bias, 0.0), (False, bias, 20.0)):
            mask = None if mask is None else mask.expand(batch, heads, tokens, positions)
            how = {"scaling": 0.3, "softcap": softcap, "causal": causal, "mask": mask}
            right = reference.attention(query, key, value, **how)
            close(ours(query, layer, **how), right, value if value.numel() else torch.ones(1))


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
        cpu.attention(query, layer.pages, 129, 16, scaling=0.2)
    with pytest.raises(RuntimeError, match="the cache does not fit"):
        cpu.cache_append(layer.pages, key, value, 59)


def test_ops_as_torch_wants_them() -> None:
    query, key, value = random((1, 4, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.pages is not None
    torch.library.opcheck(OPS.cpu_attention.default, (query, layer.pages, 70, 16, 0.25, 0.0, True, None))
    torch.library.opcheck(OPS.cpu_cache_append.default, (layer.pages.clone(), key, value, 5))


# transformers' models of these compute attention in their own code.
OWN_CODE = ("bloom", "falcon-7b", "falcon-40b", "falcon-one-norm", "falcon-rw")
IDS = families.make_tokenizer()(families.TEXT[:60], return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("name", families.TINY)
@torch.no_grad()
def test_every_family_says_what_it_says_in_floats(name: str, tiny: Callable[..., Path]) -> None:
    """At once and token by token, with a cache in 8 bits and without one; or it is refused before a weight is read."""
    if name in OWN_CODE:
        with pytest.raises(InputError, match=f"of '{name.split('-')[0]}' in its own code"):
            load(tiny(name), attention="int8")
        return
    floats, model = load(tiny(name), dtype=torch.float32), load(tiny(name), dtype=torch.float32, attention="int8")
    right, at_once = floats(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    assert 0 < (at_once - right).norm() / right.norm() < 0.05
    called = module.cache_argument(model)
    output = model(IDS[:, :40])
    cache, steps = output[called], []
    for index in range(40, IDS.shape[1]):
        output = model(IDS[:, index : index + 1], **{called: cache})
        steps.append(output.logits)
    # Float32 products of many tokens and of one are summed in another order: a few integers are rounded otherwise.
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once[:, 40:], rtol=0, atol=0.02 * at_once.abs().max().item())
    if not name.startswith("deepseek"):  # which keep what keys are made from
        assert isinstance(cache, Int8Cache) and cache.get_seq_length() == IDS.shape[1]
        assert all(isinstance(layer, Int8Layer) and layer.pages is not None and layer.pages.dtype == torch.uint8 for layer in cache.layers)


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Any:
    return load(tiny("llama"), dtype=torch.float32, attention="int8")


def test_generate(llama: Any) -> None:
    """Padded batches as single prompts; beams, whose caches are exchanged, as without a cache; drafts that are taken back as without any."""
    how = {"max_new_tokens": 8, "do_sample": False}
    single = llama.generate(IDS[:, 4:12], **how)[0, 8:]
    padded = torch.cat([IDS[:, :12], torch.nn.functional.pad(IDS[:, 4:12], (4, 0), value=256)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    assert torch.equal(llama.generate(padded, attention_mask=mask, **how)[1, 12:], single)
    beams, without = (llama.generate(IDS[:, :12], num_beams=3, use_cache=use_cache, **how) for use_cache in (True, False))
    assert torch.equal(beams, without)
    drafted = llama.generate(IDS[:, :40], prompt_lookup_num_tokens=3, **how)
    assert torch.equal(drafted, llama.generate(IDS[:, :40], **how))


def test_every_product_of_a_quantized_model_is_of_integers(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "out", activations="static", lm_head="w8a8", calibration=calibration)
    floats, model = (load(tmp_path / "out", dtype=torch.bfloat16, attention=how) for how in (None, "int8"))
    with torch.no_grad():
        right, got = floats(IDS, use_cache=False).logits.float(), model(IDS).logits.float()
    assert (got - right).norm() / right.norm() < 0.05


def test_what_a_cache_keeps() -> None:
    """A little more than a byte a number; what was cropped is written over."""
    query, key, value = random((2, 4, 2, 1, 200, 64, 64))
    layer = kept(key, value)
    numbers = 2 * 2 * layer.pages.shape[0] * 64 * (64 + 64)  # type: ignore[union-attr]
    assert layer.pages is not None and numbers < layer.pages.nbytes < 1.07 * numbers and layer.pages.shape[0] == 4
    right = ours(query, layer, 0.2)
    layer.update(key[:, :, :30], value[:, :, :30])
    assert layer.get_seq_length() == 230
    layer.crop(-30)
    layer.crop(0)
    assert torch.equal(ours(query, layer, 0.2), right)
    layer.crop(150)
    layer.update(key[:, :, 150:], value[:, :, 150:])
    assert torch.equal(ours(query, layer, 0.2), right)
    layer.reorder_cache(torch.tensor([1, 0, 1]))
    assert torch.equal(ours(query[[1, 0, 1]], layer, 0.2), right[[1, 0, 1]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(ours(query[[1, 1, 0, 0, 1, 1]], layer, 0.2), right[[1, 1, 0, 0, 1, 1]])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.pages is None


def test_what_cannot_be_used_is_refused(llama: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown attention 'int9'.*Did you mean 'int8'"):
        load(tiny("llama"), attention="int9")
    called = module.cache_argument(llama)
    filled = DynamicCache(config=llama.config)
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    for cache in (filled, StaticCache(config=llama.config, max_cache_len=8)):
        with pytest.raises(InputError, match=f"leave {type(cache).__name__} out"):
            llama(IDS, **{called: cache})
    one = torch.zeros(1, 1, 1, 8)
    with pytest.raises(InputError, match="does not compute sinks"):
        module.attention(torch.nn.Identity(), one, one, one, None, s_aux=one)
    with pytest.raises(InputError, match="does not compute dropout"):
        module.attention(torch.nn.Identity(), one, one, one, None, dropout=0.1)
    with pytest.raises(InputError, match="runs on the CPU, not on 'cuda'"):
        module.check_attention(llama, "int8", "cuda")
    monkeypatch.setattr(cpu, "missing", lambda: "they were not built")
    with pytest.raises(InputError, match="needs the CPU kernels of smoothquant-plus: they were not built"):
        load(tiny("llama"), attention="int8")
