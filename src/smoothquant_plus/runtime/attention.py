"""Attention in INT8, as SmoothQuant has it (arXiv 2211.10438, section 4 and figure 6): both of its products, and the cache of keys and values,
which for heads of 64 or 128 channels takes little more than half the memory of one in 16 bits.

What the integers stand for is in kernels/reference.py; csrc/attention.cpp multiplies them on CPUs, kernels/triton/int8_attention.py on GPUs. Here
are transformers' sides of it: a function that its models call for attention, and a cache that they keep keys and values in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.runtime.kernels import cpu, triton
from smoothquant_plus.runtime.kernels.reference import PAGE

# What may be asked for, besides nothing.
INT8 = "int8"
# The name in transformers' tables of attention functions.
NAME = "smoothquant_plus_int8"


def kernels_for(device: torch.device) -> Any:
    """The file that computes attention in INT8 on `device`: `new_cache`, `cache_append` and `attention`."""
    return cpu if device.type == "cpu" else triton


class Int8Layer(DynamicLayer):
    """The keys and values of one layer in 8 bits, each token's of each head with a scale of its own, in pages of 64 tokens."""

    is_sliding = False

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self._forget()

    def _forget(self) -> None:
        self.cache: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values and their scales, as `kernels_for` its device has them
        self.length = 0
        self.channels = 0  # of values
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append keys (batch, KV heads, tokens, head_dim) and values. Returns this layer twice, which is what `attention` takes for them."""
        batch, heads, tokens, width = key_states.shape
        self.channels = value_states.shape[-1]
        kernels = kernels_for(key_states.device)
        needed, there = -(-(self.length + tokens) // PAGE), 0 if self.cache is None else self.cache[0].shape[2]
        if needed > there or self.cache is None:
            # A quarter more than there were, so that what is copied does not grow with the square of the length.
            cache = kernels.new_cache(max(needed, there + there // 4), batch, heads, width, self.channels, key_states.device)
            if self.cache is not None:
                keys, values, scales = self.cache
                cache[0][:, :, :there], cache[1][:, :, :there], cache[2][..., : there * PAGE] = keys, values, scales
            self.cache = cache
        kernels.cache_append(self.cache, key_states, value_states, self.length)
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
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return _attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap or 0.0, causal, attention_mask), None


def _attend(
    query: Tensor,
    key: Tensor | Int8Layer,
    value: Tensor | Int8Layer,
    scaling: float,
    softcap: float = 0.0,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`attention`, with a mask that can be expanded to (batch, heads, tokens, positions)."""
    if isinstance(key, Int8Layer):
        layer = key
    else:
        layer = Int8Layer()
        assert isinstance(value, Tensor)
        layer.update(key, value)
    assert layer.cache is not None
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).expand(*query.shape[:3], layer.length)
    kept = (layer.cache, layer.length, layer.channels)
    return kernels_for(query.device).attention(query, *kept, scaling=scaling, softcap=softcap, causal=causal, mask=mask)


def _bloom(
    module: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, layer_past: Any = None, **_: Any
) -> tuple[Tensor, None]:
    """The forward of transformers' BloomAttention. `alibi` (batch * heads, 1, positions) is added to scores, as the mask is."""
    batch, tokens, _width = hidden_states.shape
    query, key, value = module._reshape(module.query_key_value(hidden_states))  # (batch, heads, tokens, head_dim)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    mask = alibi.float().view(batch, module.num_heads, 1, -1)
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        mask = mask.masked_fill(~attention_mask, float("-inf")) if seen else mask + attention_mask
    y = _attend(query, key, value, module.inv_norm_factor, causal=attention_mask is None, mask=mask)
    return residual + module.dense(y.reshape(batch, tokens, -1)), None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The forward of transformers' FalconAttention, whose `alibi` is in the mask already. Heads that share keys and values are kept once."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    batch, tokens, _width = hidden_states.shape
    split = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in split)  # (batch, heads, tokens, head_dim)
    if module.new_decoder_architecture:  # there they are repeated
        key, value = (x[:, :: module.num_heads // module.num_kv_heads] for x in (key, value))
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    y, _none = attention(module, query, key, value, attention_mask)
    return module.dense(y.reshape(batch, tokens, -1)), None


# What computes attention in transformers' own code, by the name of its class.
OWN_CODE: dict[str, Callable[..., tuple[Tensor, None]]] = {"BloomAttention": _bloom, "FalconAttention": _falcon}


def check_attention(model: Any, asked: str, device: str) -> None:
    """Raise InputError where `model`, a skeleton of one of transformers', cannot compute attention as `asked`."""
    if asked != INT8:
        raise InputError(f"unknown attention '{asked}': choose {INT8}, or leave it to transformers.{did_you_mean(asked, [INT8])}")
    kind = model.config.model_type
    if torch.device(device).type != "cpu":
        if (reason := triton.supports(SCHEMES["w8a8"], torch.device(device), (1, 1))) is not None:
            raise InputError(f"attention in int8 has no kernels on '{device}': {reason}.")
    elif (missing := cpu.missing()) is not None:
        raise InputError(f"attention in int8 needs the CPU kernels of smoothquant-plus: {missing}.")
    if not model._can_set_attn_implementation() and not _own_code(model):
        raise InputError(
            f"attention in int8: transformers computes that of '{kind}' in its own code, which cannot be replaced. Load it without."
        )
    if any(getattr(module, "is_kv_shared_layer", False) for module in model.modules()):
        raise InputError(f"attention in int8: '{kind}' has layers that read the keys and values of earlier ones. Load it without.")
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
    if own := _own_code(model):
        for module in own:
            module.forward = MethodType(OWN_CODE[type(module).__name__], module)
    else:
        model.set_attn_implementation(NAME)
    if _is_latent(model):
        return
    decoder = model.get_decoder()
    signature, called = inspect.signature(decoder.forward), cache_argument(decoder)

    def with_cache(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A cache where one is wanted and none is given; the one that is given is made one of `Int8Layer`s."""
        given = signature.bind_partial(*inputs, **options).arguments  # "kwargs" has the old name, which newer versions still take
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


def _own_code(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in OWN_CODE]


def _is_latent(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is not None
