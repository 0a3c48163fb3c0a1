"""Attention in INT8, as SmoothQuant has it (arXiv 2211.10438, section 4 and figure 6): both of its products, and the cache of keys and values,
which takes a little more than half the memory of one in 16 bits.

What the integers stand for is in kernels/reference.py; csrc/attention.cpp multiplies them. Here are transformers' sides of it: a function that its
models call for attention, and a cache that they keep keys and values in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.runtime.kernels import cpu

# What may be asked for, besides nothing.
INT8 = "int8"
# The name in transformers' tables of attention functions.
NAME = "smoothquant_plus_int8"


class Int8Layer(DynamicLayer):
    """The keys and values of one layer in 8 bits, each token's of each head with a scale of its own, in pages of 64 tokens."""

    is_sliding = False

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self._forget()

    def _forget(self) -> None:
        self.pages: Tensor | None = None  # as csrc/attention.cpp has them
        self.length = 0
        self.channels = 0  # of values
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append keys (batch, KV heads, tokens, head_dim) and values. Returns this layer twice, which is what `attention` takes for them."""
        batch, heads, tokens, width = key_states.shape
        self.channels = value_states.shape[-1]
        needed, there = -(-(self.length + tokens) // cpu.PAGE), 0 if self.pages is None else len(self.pages)
        if needed > there or self.pages is None:
            # A quarter more than there were, so that what is copied does not grow with the square of the length.
            pages = cpu.cache_pages(max(needed, there + there // 4), batch, heads, width, self.channels)
            if self.pages is not None:
                pages[:there] = self.pages
            self.pages = pages
        cpu.cache_append(self.pages, key_states, value_states, self.length)
        self.length += tokens
        self.is_initialized = True
        return self, self

    @property
    def nbytes(self) -> int:
        return 0 if self.pages is None else self.pages.nbytes

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self._forget()

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or, where that is not positive, all but so many of the last: transformers has had it both ways."""
        self.length = max(0, min(self.length, max_length if max_length > 0 else self.length + max_length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pages is not None:
            self.pages = self.pages[:, indices].contiguous()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pages is not None:
            self.pages = self.pages.repeat_interleave(repeats, dim=1)


class Int8Cache(Cache):
    """One `Int8Layer` for each layer of a model. Layers with a sliding window keep what is before it, too."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Int8Layer)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Int8Layer,
    value: Tensor | Int8Layer,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(cap(query @ key.T * scaling) + mask) @ value, as transformers calls it: `query` (batch, heads, tokens, head_dim), `key` and `value`
    an `Int8Layer` or (batch, KV heads, positions, head_dim), which are rounded then; the mask bool (true: seen) or added, (batch, 1, tokens,
    positions), and `position_bias` added, (1, heads, tokens, positions); gives (batch, tokens, heads, head_dim). Raises InputError for what it
    does not compute."""
    if others.get("s_aux") is not None or dropout:
        raise InputError(f"attention in int8 does not compute {'dropout' if dropout else 'sinks'}: load this model without it.")
    if isinstance(key, Int8Layer):
        layer = key
    else:
        layer = Int8Layer()
        assert isinstance(value, Tensor)
        layer.update(key, value)
    assert layer.pages is not None
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    if position_bias is not None:
        bias = position_bias.float()
        if attention_mask is None:
            attention_mask = bias
        else:
            seen = attention_mask.dtype == torch.bool
            attention_mask = bias.masked_fill(~attention_mask, float("-inf")) if seen else bias + attention_mask
    batch, heads, tokens, width = query.shape
    mask = None if attention_mask is None else attention_mask.expand(batch, heads, tokens, layer.length)
    scaling = width**-0.5 if scaling is None else scaling
    pages = (layer.pages, layer.length, layer.channels)
    return cpu.attention(query, *pages, scaling=scaling, softcap=softcap or 0.0, causal=causal, mask=mask), None


def check_attention(model: Any, asked: str, device: str) -> None:
    """Raise InputError where `model`, a skeleton of one of transformers', cannot compute attention as `asked`."""
    if asked != INT8:
        raise InputError(f"unknown attention '{asked}': choose {INT8}, or leave it to transformers.{did_you_mean(asked, [INT8])}")
    kind = model.config.model_type
    if torch.device(device).type != "cpu":
        raise InputError(f"attention in int8 runs on the CPU, not on '{device}'.")
    if (missing := cpu.missing()) is not None:
        raise InputError(f"attention in int8 needs the CPU kernels of smoothquant-plus: {missing}.")
    if not model._can_set_attn_implementation():
        raise InputError(
            f"attention in int8: transformers computes that of '{kind}' in its own code, which cannot be replaced. Load it without."
        )


def use_int8(model: Any) -> None:
    """Let `model`, for which `check_attention` raises nothing, compute attention in INT8, with an `Int8Cache` wherever it makes a cache.

    Multi-head latent attention (DeepSeek) keeps a cache of its own: of what keys and values are made from, which is far smaller than they are.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if getattr(model.config.get_text_config(), "kv_lora_rank", None) is None:
        model.register_forward_pre_hook(_with_cache, with_kwargs=True)


def cache_argument(model: Any) -> str:
    """What `model`'s forward calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _with_cache(model: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An Int8Cache in place of none, where one is wanted, and of the empty one that `generate` makes."""
    name = next((name for name in ("past_key_values", "cache") if options.get(name) is not None), cache_argument(model))
    given, wanted = options.get(name), options.get("use_cache")
    if isinstance(given, Int8Cache) or (given is None and not (model.config.get_text_config().use_cache if wanted is None else wanted)):
        return inputs, options
    if given is not None and (type(given) is not DynamicCache or given.get_seq_length()):
        raise InputError(f"attention in int8 has a cache of its own: leave {type(given).__name__} out, or give an empty DynamicCache.")
    return inputs, options | {name: Int8Cache()}
