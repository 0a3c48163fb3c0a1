"""Attention in INT8 by Triton's kernels against the reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import families
from attention_cases import DTYPES, NOT_FINITE, REFUSED, SHAPES, check_not_finite, close, kept, random
from smoothquant_plus.runtime import attention as module
from smoothquant_plus.runtime.attention import Int8Layer
from smoothquant_plus.runtime.kernels import reference, triton
from smoothquant_plus.runtime.kernels.triton import int8_attention
from smoothquant_plus.runtime.load import load

# numpy, in the interpreter, remarks on what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
OPS = torch.ops.smoothquant_plus
# The interpreter takes a tenth of a second for each page of each tile.
SMALL = [shape for shape in SHAPES if shape[0] * shape[2] * shape[4] < 400]
REAL = [(1, 32, 8, 1, 4097, 128, 128), (3, 32, 32, 1, 700, 64, 64), (1, 32, 8, 1000, 3000, 128, 128), (2, 16, 2, 130, 130, 256, 256)]


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, too. Memory that nothing was written to is NaN, or the largest integer."""
    monkeypatch.setattr(module, "kernels_for", lambda device: triton)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.to(DEVICE) for x in random(shape, dtype))
    return query, key, value


def ours(query: Tensor, layer: Int8Layer, scaling: float, **how: Any) -> Tensor:
    assert layer.cache is not None
    return triton.attention(query, layer.cache, layer.length, layer.channels, scaling=scaling, **how)


# Causal, softcap, and a mask by its name.
CASES = [(False, "none", 0.0), (True, "none", 5.0), (False, "seen", 0.0), (True, "added", 0.0), (False, "added", 20.0)]


def check(shape: tuple[int, ...], dtype: torch.dtype, cases: list[tuple[bool, str, float]] = CASES) -> None:
    batch, heads, _, tokens, positions, *_ = shape
    masks = {"seen": torch.rand(batch, 1, tokens, positions, generator=torch.Generator().manual_seed(0)) < 0.7}
    masks["added"] = torch.randn(1, heads, 1, positions)
    query, key, value = tensors(shape, dtype)
    layer = kept(key, value)
    for causal, name, softcap in cases:
        mask = None if name == "none" else masks[name].to(DEVICE).expand(batch, heads, tokens, positions)
        how = {"scaling": 0.3, "softcap": softcap, "causal": causal, "mask": mask}
        close(ours(query, layer, **how), reference.attention(query, key, value, **how), value if value.numel() else torch.ones(1))


@pytest.mark.parametrize("shape", SHAPES if GPU else SMALL, ids=str)
def test_it_is_the_reference(shape: tuple[int, ...]) -> None:
    check(shape, torch.float32)
    for dtype in DTYPES[1:] if GPU else (torch.float16,):  # in the interpreter bfloat16 results are truncated
        check(shape, dtype, CASES if GPU else CASES[1:2])


@pytest.mark.skipif(not GPU, reason="there is no GPU")
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes(shape: tuple[int, ...]) -> None:
    check(shape, torch.bfloat16)


@pytest.mark.parametrize(("multiprocessors", "parts"), [(1, 2), (3, 5)])
def test_positions_are_shared(multiprocessors: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several programs, some of which have nothing that a row sees."""
    monkeypatch.setattr(int8_attention, "device_of", lambda device: ("", "", multiprocessors))
    assert int8_attention.shares(1, 5, DEVICE)[0] == parts
    check((1, 2, 1, 3, 300, 32, 24), torch.float32, CASES[1:4])
    query, key, value = tensors((1, 2, 1, 3, 200, 16, 16))
    mask = torch.ones(1, 2, 3, 200, dtype=torch.bool, device=DEVICE)
    mask[:, :, 1] = False
    mask[:, :, 2, :150] = False
    y, right = ours(query, kept(key, value), 0.2, mask=mask), reference.attention(query, key, value, scaling=0.2, mask=mask)
    assert not y[:, 1].any()
    close(y, right, value)


def test_a_cache_is_the_same_however_it_was_filled() -> None:
    query, key, value = tensors((2, 2, 1, 3, 150, 40, 24))
    right = ours(query, kept(key, value), 0.2, causal=True)
    layer = kept(key, value, 1, 62, 3, 50, 34)
    assert torch.equal(ours(query, layer, 0.2, causal=True), right)
    layer.crop(100)
    # As transformers gives them: tokens before heads in memory.
    layer.update(*(x[:, :, 100:].transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)))
    assert torch.equal(ours(query, layer, 0.2, causal=True), right)
    layer.reorder_cache(torch.tensor([1, 0, 1], device=DEVICE))
    assert torch.equal(ours(query[[1, 0, 1]], layer, 0.2, causal=True), right[[1, 0, 1]])


def test_what_is_not_finite_stays_where_it_is() -> None:
    check_not_finite(ours, *tensors(NOT_FINITE))


def test_what_is_not_seen_leaves_no_trace() -> None:
    query, key, value = tensors((1, 2, 1, 3, 200, 32, 32))
    mask = torch.zeros(1, 2, 3, 200, dtype=torch.bool, device=DEVICE)
    mask[..., 70:150] = True
    right = ours(query, kept(key, value), 0.2, mask=mask)
    key[:, :, :70] = value[:, :, :70] = float("nan")
    key[:, :, 150:] = value[:, :, 150:] = float("nan")
    layer = kept(key, value)
    assert torch.equal(ours(query, layer, 0.2, mask=mask), right)
    added = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    value[:, :, 150:] = 1  # scores of NaN are seen, whatever is added
    key[:, :, :] = key.nan_to_num(1.0)
    close(
        ours(query, kept(key, value), 0.2, mask=added),
        reference.attention(query, key, value.nan_to_num(1.0), scaling=0.2, mask=added),
        value[:, :, 70:],
    )


def test_extreme_numbers() -> None:
    for size in (1e-30, 1e-3, 1e30):
        query, key, value = tensors((1, 2, 1, 2, 200, 32, 32))
        value *= size
        close(ours(query * 100, kept(key, value), 1.0), reference.attention(query * 100, key, value, scaling=1.0), value)
    tiny = value * 0 + 1e-38
    assert ours(query, kept(key, tiny), 1.0).isfinite().all()


def test_the_ops_refuse_what_does_not_fit() -> None:
    query, key, value = tensors((1, 2, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.cache is not None
    for mask in (torch.ones(1, 2, 3, 69, dtype=torch.bool), torch.ones(1, 2, 3, 70, dtype=torch.int), torch.ones(1, 1, 3, 70)):
        with pytest.raises(ValueError, match="the mask does not fit"):
            ours(query, layer, 0.2, mask=mask.to(DEVICE))
    for length, channels in ((129, 16), (70, 32)):
        with pytest.raises(ValueError, match="the cache does not fit"):
            triton.attention(query, layer.cache, length, channels, scaling=0.2)
    with pytest.raises(ValueError, match="the cache does not fit"):
        triton.attention(query[..., :12].repeat(1, 1, 1, 2), layer.cache, 70, 16, scaling=0.2)
    with pytest.raises(ValueError, match="the cache does not fit"):
        triton.attention(query.repeat(2, 1, 1, 1), layer.cache, 70, 16, scaling=0.2)
    for more_keys, more_values in (
        (key, value.repeat(1, 1, 1, 2)),
        (key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1)),
        (key[:, :1], value[:, :1]),
    ):
        with pytest.raises(ValueError, match="the cache does not fit"):
            triton.cache_append(layer.cache, more_keys, more_values, 0)
    for at in (59, -1):
        with pytest.raises(ValueError, match="the cache does not fit"):
            triton.cache_append(layer.cache, key, value, at)
    assert not triton.attention(query, layer.cache, 0, 16, scaling=0.2).any()  # of no positions


def test_ops_as_torch_wants_them() -> None:
    query, key, value = tensors((1, 4, 2, 3, 70, 16, 16))
    layer = kept(key, value)
    assert layer.cache is not None
    torch.library.opcheck(OPS.triton_attention.default, (query, *layer.cache, 70, 16, 0.25, 0.0, True, None))
    torch.library.opcheck(OPS.triton_cache_append.default, (*(tensor.clone() for tensor in layer.cache), key, value, 5))


@pytest.mark.parametrize(
    "name",
    [name for name in families.TINY if name not in (*REFUSED, "phimoe")] if GPU else ["llama", "bloom", "gemma2"],
)
@torch.no_grad()
def test_models(name: str, tiny: Callable[..., Path]) -> None:
    """At once and in parts, as in floats."""
    ids = families.make_tokenizer()(families.TEXT[:30], return_tensors="pt")["input_ids"].to(DEVICE)
    how: dict[str, Any] = {"dtype": torch.float32, "device": str(DEVICE)}
    floats, model = load(tiny(name), **how), load(tiny(name), **how, attention="int8")
    right, at_once = floats(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert 0 < (at_once - right).norm() / right.norm() < 0.05
    called = module.cache_argument(model)
    first = model(ids[:, :-2])
    second = model(ids[:, -2:-1], **{called: first[called]})
    torch.testing.assert_close(second.logits[:, 0], at_once[:, -2], rtol=0, atol=0.02 * at_once.abs().max().item())
