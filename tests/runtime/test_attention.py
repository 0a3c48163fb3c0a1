"""Attention in INT8: the kernels against the reference at every instruction set that this machine has, and models that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPTJForCausalLM, GptOssConfig, Lfm2Config, StaticCache

import families
from attention_cases import DTYPES, NOT_FINITE, REFUSED, SHAPES, check_not_finite, close, kept, random
from smoothquant_plus.errors import InputError
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime import attention as module
from smoothquant_plus.runtime.attention import Int8Layer
from smoothquant_plus.runtime.kernels import cpu, reference
from smoothquant_plus.runtime.load import load

assert cpu.missing() is None, f"the tests need the CPU kernels: {cpu.missing()}"
pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.smoothquant_plus
CPU = torch.device("cpu")


def ours(query: Tensor, layer: Int8Layer, scaling: float, **how: Any) -> Tensor:
    assert layer.cache is not None
    return cpu.attention(query, layer.cache, layer.length, layer.channels, scaling=scaling, **how)


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0}, {"scaling": 0.05}, {"is_causal": False}], ids=str)
def test_what_transformers_asks_for_is_computed(how: dict[str, Any]) -> None:
    """By tensors and by a cache; whatever is not asked for is as in PyTorch's attention."""
    query, key, value = random((2, 4, 2, 17, 130, 16, 24))
    meant = {"scaling": how.get("scaling", 0.25), "softcap": how.get("softcap", 0.0), "causal": how.get("is_causal", True)}
    right, layer = reference.attention(query, key, value, **meant), kept(key, value)
    for both in ((key, value), (layer, layer)):
        y, none = module.attention(torch.nn.Identity(), query, *both, None, **how)
        assert none is None
        close(y, right, value)


def test_double_precision_is_rounded_first() -> None:
    query, key, value = random((1, 4, 2, 3, 70, 16, 16))
    y = ours(query.double(), kept(key.double(), value.double()), 0.3)
    assert y.dtype == torch.float64 and torch.equal(y.float(), ours(query, kept(key, value), 0.3))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16 is needed"):
        OPS.cpu_cache_append(*cpu.new_cache(2, 1, 2, 16, 16, CPU), key.double(), value.double(), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cache_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    query, key, value = random((1, 4, 2, 3, 70, 16, 16))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        y = ours(query, kept(key, value), 0.3)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, ours(query, kept(key, value), 0.3))


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
    check_not_finite(ours, *random(NOT_FINITE))


def test_what_is_not_seen_leaves_no_trace(level: str) -> None:
    """Nor costs anything: a window's pages are the only ones that are multiplied."""
    query, key, value = random((1, 4, 2, 40, 700, 32, 32))
    places = torch.arange(700)
    window = (places <= 660 + torch.arange(40)[:, None]) & (places > 560 + torch.arange(40)[:, None])
    mask = window.expand(1, 4, 40, 700)
    right = ours(query, kept(key, value), 0.2, mask=mask)
    close(right, reference.attention(query, key, value, scaling=0.2, mask=mask), value)
    assert torch.equal(ours(query[:, :, 7:8], kept(key, value), 0.2, mask=mask[:, :, 7:8]), right[:, 7:8])
    key[:, :, :500] = value[:, :, :500] = float("nan")
    key[:, :, 561] = value[:, :, 561] = float("nan")  # in a page of which most is seen
    y = ours(query, kept(key, value), 0.2, mask=mask)
    assert y[:, 0].isnan().all() and torch.equal(y[:, 1:], right[:, 1:])


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
    assert layer.cache is not None
    for bad in (query[0], query[:, :, :, :12], query.int(), query.expand(2, 2, 3, 16)):
        with pytest.raises(RuntimeError):
            ours(bad, layer, 0.2)
    for mask in (torch.ones(1, 2, 3, 69, dtype=torch.bool), torch.ones(1, 2, 3, 70, dtype=torch.int), torch.ones(1, 1, 3, 70)):
        with pytest.raises(RuntimeError, match="the mask does not fit"):
            ours(query, layer, 0.2, mask=mask)
    with pytest.raises(RuntimeError, match="the cache does not fit"):
        cpu.attention(query, layer.cache, 129, 16, scaling=0.2)
    with pytest.raises(RuntimeError, match="the cache does not fit"):
        cpu.cache_append(layer.cache, key, value, 59)
    seen = torch.rand(1, 2, 70, 3).transpose(2, 3) < 0.5  # a mask in another order fits
    assert torch.equal(ours(query, layer, 0.2, mask=seen), ours(query, layer, 0.2, mask=seen.contiguous()))


def test_ops_as_torch_wants_them() -> None:
    query, key, value = random((1, 4, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.cache is not None
    torch.library.opcheck(OPS.cpu_attention.default, (query, *layer.cache, 70, 16, 0.25, 0.0, True, None))
    torch.library.opcheck(OPS.cpu_cache_append.default, (*(tensor.clone() for tensor in layer.cache), key, value, 5))


IDS = families.make_tokenizer()(families.TEXT[:60], return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("name", families.TINY)
@torch.no_grad()
def test_every_family_says_what_it_says_in_floats(name: str, tiny: Callable[..., Path]) -> None:
    """At once and token by token, with a cache in 8 bits and without one, and with padding."""
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            load(tiny(name), attention="int8")
        return
    if name == "gptj" and not GPTJForCausalLM._can_set_attn_implementation():  # as in transformers 5.19
        with pytest.raises(InputError, match="of 'gptj' in its own code"):
            load(tiny(name), attention="int8")
        return
    floats, model = load(tiny(name), dtype=torch.float32), load(tiny(name), dtype=torch.float32, attention="int8")
    close = 0.1 if name == "phimoe" else 0.05  # its router takes an expert or leaves it, and a token goes elsewhere here
    right, at_once = floats(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    assert 0 < (at_once - right).norm() / right.norm() < close
    called = module.cache_argument(model)
    output = model(IDS[:, :40])
    cache, steps = output[called], []
    for index in range(40, IDS.shape[1]):
        output = model(IDS[:, index : index + 1], **{called: cache})
        steps.append(output.logits)
    # Float32 products of many tokens and of one are summed in another order: a few integers are rounded otherwise.
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once[:, 40:], rtol=0, atol=0.02 * at_once.abs().max().item())
    padded = torch.nn.functional.pad(IDS[:, :40], (7, 0), value=256)
    mask, positions = (padded != 256).long(), torch.arange(47)[None] - 7
    how = {"attention_mask": mask, "position_ids": positions.clamp(min=0), "use_cache": False}
    if name in ("bloom", "falcon-rw"):
        del how["position_ids"]  # they have none
    right, shifted = (each(padded, **how).logits[:, 7:] for each in (floats, model))
    assert 0 < (shifted - right).norm() / right.norm() < close
    if name not in families.LATENTS:
        assert cache.get_seq_length() == IDS.shape[1]
        assert all(
            isinstance(layer, Int8Layer) and layer.cache is not None and layer.cache[0].dtype == torch.uint8 for layer in cache.layers
        )


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Any:
    return load(tiny("llama"), dtype=torch.float32, attention="int8")


@torch.no_grad()
def test_caches(llama: Any) -> None:
    """One that is given is filled, by name or in its place, in parts; a decoder alone makes one too; and none is made where none is wanted."""
    called, right = module.cache_argument(llama), llama(IDS, use_cache=False)
    assert right.get(called) is None
    cache = DynamicCache(config=llama.config)
    first, second = llama(IDS[:, :30], **{called: cache}), llama(IDS[:, 30:], **{called: cache})
    assert first[called] is cache and cache.get_seq_length() == IDS.shape[1] and isinstance(cache.layers[0], Int8Layer)
    both = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(both, right.logits, rtol=0, atol=0.02)
    in_place = DynamicCache()
    llama(IDS, None, None, in_place)
    assert in_place.get_seq_length() == IDS.shape[1] and isinstance(in_place.layers[-1], Int8Layer)
    alone = llama.model(IDS, use_cache=True)[called]
    assert alone.layers[0].nbytes == in_place.layers[0].nbytes
    generated = DynamicCache()
    llama.generate(IDS[:, :9], max_new_tokens=3, do_sample=False, **{called: generated})
    assert generated.get_seq_length() == 11 and isinstance(generated.layers[0], Int8Layer)


@torch.no_grad()
def test_compiled(llama: Any) -> None:
    """A token after another, without a new compilation for each."""
    torch.compiler.reset()
    called, compiled = module.cache_argument(llama), torch.compile(llama, backend="eager")
    right = llama(IDS, use_cache=False).logits
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        output = compiled(IDS[:, :40])
        for index in range(40, IDS.shape[1]):
            output = compiled(IDS[:, index : index + 1], **{called: output[called]})
            torch.testing.assert_close(output.logits[:, -1], right[:, index], rtol=0, atol=0.02)


def test_generate(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches as single prompts; beams, whose caches are exchanged, as without a cache; drafts that are taken back as without any."""
    how = {"max_new_tokens": 8, "do_sample": False}
    single = llama.generate(IDS[:, 4:12], **how)[0, 8:]
    padded = torch.cat([IDS[:, :12], torch.nn.functional.pad(IDS[:, 4:12], (4, 0), value=256)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    assert torch.equal(llama.generate(padded, attention_mask=mask, **how)[1, 12:], single)
    beams, without = (llama.generate(IDS[:, :12], num_beams=3, use_cache=use_cache, **how) for use_cache in (True, False))
    assert torch.equal(beams, without)
    cropped: list[int] = []
    crop = Int8Layer.crop
    monkeypatch.setattr(Int8Layer, "crop", lambda layer, tokens: cropped.append(tokens) or crop(layer, tokens))
    drafted = llama.generate(IDS[:, :40], prompt_lookup_num_tokens=3, **how)
    assert cropped and torch.equal(drafted, llama.generate(IDS[:, :40], **how))


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
    numbers = 2 * 2 * 4 * 64 * (64 + 64)  # four pages
    assert numbers < layer.nbytes < 1.07 * numbers
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
    assert layer.get_seq_length() == 0 and layer.cache is None and layer.nbytes == 0


KINDS = ["full_attention", "conv"]
SMALL: dict[str, Any] = {"vocab_size": 99, "num_key_value_heads": 2, "num_local_experts": 2, **families.LLAMA_SHAPE}


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
    with pytest.raises(InputError, match="does not compute s_aux"):
        module.attention(torch.nn.Identity(), one, one, one, None, s_aux=one)
    with pytest.raises(InputError, match="does not compute dropout"):
        module.attention(torch.nn.Identity(), one, one, one, None, dropout=0.1)
    with pytest.raises(InputError, match="does not compute position_bias"):
        module.attention(torch.nn.Identity(), one, one, one, None, position_bias=one)
    sinks, hybrid = (AutoModelForCausalLM.from_config(config) for config in (GptOssConfig(**SMALL), Lfm2Config(**SMALL, layer_types=KINDS)))
    with pytest.raises(InputError, match="does not compute the sinks of 'gpt_oss'"):
        module.check_attention(sinks, "int8", "cpu")
    with pytest.raises(InputError, match="'lfm2' has layers that keep something other"):
        module.check_attention(hybrid, "int8", "cpu")
    with pytest.raises(InputError, match="has no kernels on 'cuda': "):
        module.check_attention(llama, "int8", "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(type(hybrid), "_can_set_attn_implementation", lambda *_: False)
        with pytest.raises(InputError, match="of 'lfm2' in its own code"):
            module.check_attention(hybrid, "int8", "cpu")
    monkeypatch.setattr(cpu, "missing", lambda: "they were not built")
    with pytest.raises(InputError, match="needs the CPU kernels of smoothquant-plus: they were not built"):
        load(tiny("llama"), attention="int8")
