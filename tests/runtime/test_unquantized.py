"""Attention of single tokens on a CPU, against PyTorch's in float64, and the head."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.runtime import unquantized as module
from smoothquant_plus.runtime.kernels import cpu
from smoothquant_plus.runtime.linear import Bfloat16Linear
from smoothquant_plus.runtime.load import load

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def exactly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """(batch, tokens, heads, head_dim) in float64."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(repeat, dim=1) for tensor in (key, value))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    y = torch.nn.functional.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask, scale=scaling)
    return y.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("bfloat16", [True, False], ids=("instructions", "none"))
def test_one_token_is_what_pytorch_gives_in_float64(
    bfloat16: bool, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not there are instructions for bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(module, "sdpa_attention_forward", None)  # so that nothing else answers
    for batch, positions, width, value_width in ((1, 1, 16, 16), (3, 37, 64, 64), (2, 130, 48, 32)):
        query = torch.randn(batch, 6, 1, width).to(dtype)
        key = torch.randn(batch, kv_heads, positions, width).to(dtype)
        value = torch.randn(batch, kv_heads, positions, value_width).to(dtype)
        seen = torch.rand(batch, 1, 1, positions) < 0.7
        seen[..., -1] = True
        added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        for mask, scaling in itertools.product((None, seen, added), (None, 0.3)):
            y, weights = module.attention(torch.nn.Identity(), query, key, value, mask, scaling=scaling)
            assert weights is None and y.dtype == dtype and y.shape == (batch, 1, 6, value_width)
            right = exactly(query, key, value, mask, scaling)
            assert (y.double() - right).abs().max() <= 2 * ROUNDING[dtype] * value.abs().max()


def test_all_else_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *args, **others: calls.append(others) or (args[1], None))
    one, heads = torch.nn.Identity(), torch.zeros(1, 2, 1, 5, dtype=torch.bool)
    for query, mask, others in (
        (torch.randn(1, 2, 3, 8).bfloat16(), None, {}),
        (torch.randn(1, 2, 1, 8), None, {}),
        (torch.randn(1, 2, 1, 8).bfloat16(), None, {"dropout": 0.1}),
        (torch.randn(1, 2, 1, 8).bfloat16(), None, {"position_bias": torch.zeros(1, 2, 1, 5)}),
        (torch.randn(1, 2, 1, 8).bfloat16(), heads, {}),
    ):
        module.attention(one, query, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), mask, is_causal=False, **others)
        assert calls.pop()["is_causal"] is False


def test_the_head_gets_hidden_states_without_strides() -> None:
    last = torch.randn(1, 7, 16)[:, -1:]
    (compact,) = module.compact(torch.nn.Identity(), (last,))
    assert compact.stride() == (16, 16, 1) and torch.equal(compact, last) and last.stride() != compact.stride()


@pytest.mark.parametrize("name", ["llama", "mistral-sliding-window", "opt", "deepseek-v3", "llava"])
def test_a_model_says_the_same(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A quantized model decodes with it, in padded batches too, and the other attention gives the same; one that is not quantized does not use it."""
    directory = tiny(name)
    out = tmp_path / "out"
    quantize(directory, out, smooth="none", target="here")
    model: Any = load(out, dtype=torch.bfloat16)
    ids = families.make_tokenizer()(families.TEXT[:24], return_tensors="pt")["input_ids"]
    mask = torch.ones(2, ids.shape[1] + 1, dtype=torch.long)
    mask[1, :4] = 0
    batch = torch.cat([ids, ids])

    def decode(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(batch, attention_mask=mask[:, :-1], use_cache=True).past_key_values
            return model(batch[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True).logits.float()

    assert model.config._attn_implementation == module.NAME
    ours, right = decode(module.NAME), decode("sdpa")
    assert families.relative(ours, right) < 0.05  # both round to 8 bits, and quantized inputs flip
    assert load(directory, dtype=torch.bfloat16).config._attn_implementation == "sdpa"


def test_the_head_of_a_bfloat16_model(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On our product where there is one, with nothing kept of its weight; not one that is the embedding too, or in another dtype."""
    quantize(tiny("llama"), tmp_path / "out", smooth="none")
    quantize(tiny("llama-mha-tied-biases"), tmp_path / "tied", smooth="none")
    ids = torch.arange(12).reshape(2, 6)
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    with torch.no_grad():
        right = load(tmp_path / "out", dtype=torch.bfloat16)(ids).logits
    monkeypatch.undo()
    model: Any = load(tmp_path / "out", dtype=torch.bfloat16)
    others = load(tmp_path / "out", dtype=torch.float32), load(tmp_path / "tied", dtype=torch.bfloat16)
    assert all(isinstance(other.get_output_embeddings(), torch.nn.Linear) for other in others)
    assert isinstance(model.get_output_embeddings(), Bfloat16Linear) == cpu.multiplies_bfloat16()
    with torch.no_grad():
        assert families.relative(model(ids).logits.float(), right.float()) < 2.0**-8
    if cpu.multiplies_bfloat16():
        assert not list(model.get_output_embeddings().parameters())


def test_models_with_another_attention_keep_it() -> None:
    head = torch.nn.Embedding(3, 3)  # not a linear
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"), get_output_embeddings=lambda: head)
    module.speed_up(model)
    assert not head._forward_pre_hooks
