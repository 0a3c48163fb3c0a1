"""Attention in INT8, as SmoothQuant has it (arXiv 2211.10438, section 4 and figure 6): both of its products, and the cache of keys and values,
which for heads of 64 or 128 channels takes little more than half the memory of one in 16 bits.

What the integers stand for is in kernels/reference.py; csrc/attention.cpp multiplies them. Here are transformers' sides of it: a function that its
models call for attention, and a cache that they keep keys and values in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
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
        self.cache: cpu.Cache | None = None
        self.length = 0
        self.channels = 0  # of values
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append keys (batch, KV heads, tokens, head_dim) and values. Returns this layer twice, which is what `attention` takes for them."""
        batch, heads, tokens, width = key_states.shape
        self.channels = value_states.shape[-1]
        needed, there = -(-(self.length + tokens) // cpu.PAGE), 0 if self.cache is None else self.cache[0].shape[2]
        if needed > there or self.cache is None:
            # A quarter more than there were, so that what is copied does not grow with the square of the length.
            cache = cpu.new_cache(max(needed, there + there // 4), batch, heads, width, self.channels)
            if self.cache is not None:
                keys, values, scales = self.cache
                cache[0][:, :, :there], cache[1][:, :, :there], cache[2][..., : there * cpu.PAGE] = keys, values, scales
            self.cache = cache
        cpu.cache_append(self.cache, key_states, value_states, self.length)
        self.length += tokens
        self.is_initialized = True
        return self, self

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.cache or ())

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
        if self.cache is not None:
            keys, values, scales = self.cache
            self.cache = keys[indices], values[indices], scales[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            keys, values, scales = self.cache
            self.cache = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), scales.repeat_interleave(repeats, 0)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Int8Layer,
    value: Tensor | Int8Layer,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(cap(query @ key.T * scaling) + mask) @ value, as transformers calls it: `query` (batch, heads, tokens, head_dim), `key` and `value`
    an `Int8Layer` or (batch, KV heads, positions, head_dim), which are rounded then; the mask bool (true: seen) or added, (batch, 1, tokens,
    positions); gives (batch, tokens, heads, head_dim). Raises InputError for what it does not compute."""
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None] + ["dropout"] * bool(dropout)
    if unknown:
        raise InputError(f"attention in int8 does not compute {', '.join(unknown)}: load this model without it.")
    if isinstance(key, Int8Layer):
        layer = key
    else:
        layer = Int8Layer()
        assert isinstance(value, Tensor)
        layer.update(key, value)
    assert layer.cache is not None
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    batch, heads, tokens, width = query.shape
    mask = None if attention_mask is None else attention_mask.expand(batch, heads, tokens, layer.length)
    scaling = width**-0.5 if scaling is None else scaling
    kept = (layer.cache, layer.length, layer.channels)
    return cpu.attention(query, *kept, scaling=scaling, softcap=softcap or 0.0, causal=causal, mask=mask), None


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
    layers = () if _is_latent(model) else DynamicCache(config=model.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise InputError(f"attention in int8: '{kind}' has layers that keep something other than keys and values. Load it without.")
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise InputError(f"attention in int8 does not compute the sinks of '{kind}'. Load it without.")


def use_int8(model: Any) -> None:
    """Let `model`, for which `check_attention` raises nothing, compute attention in INT8, with `Int8Layer`s in every cache that it makes or is given.

    Multi-head latent attention (DeepSeek) keeps a cache of its own: of what keys and values are made from, which is far smaller than they are.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if _is_latent(model):
        return
    decoder = model.get_decoder()
    signature, called = inspect.signature(decoder.forward), cache_argument(decoder)

    def with_cache(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A cache where one is wanted and none is given; the one that is given is made one of `Int8Layer`s."""
        given = signature.bind_partial(*inputs, **options).arguments
        cache, wanted = given.get(called, given.get("kwargs", {}).get("past_key_values")), given.get("use_cache")
        if cache is None and (decoder.config.use_cache if wanted is None else wanted):
            options = options | {called: int8_cache(DynamicCache())}
        elif cache is not None:
            int8_cache(cache)
        return inputs, options

    decoder.register_forward_pre_hook(with_cache, with_kwargs=True)


def int8_cache(cache: Cache) -> Cache:
    """`cache`, all of whose layers are, or will be, `Int8Layer`s. Raises InputError where it is of another kind, or has something else in it."""
    if cache.layer_class_to_replicate is not Int8Layer:
        if type(cache) is not DynamicCache or cache.get_seq_length():
            raise InputError(
                f"attention in int8 keeps keys and values itself: leave {type(cache).__name__} out, or give an empty DynamicCache."
            )
        cache.layers, cache.layer_class_to_replicate = [], Int8Layer
    return cache


def cache_argument(model: Any) -> str:
    """What `model`'s forward calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _is_latent(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is not None
