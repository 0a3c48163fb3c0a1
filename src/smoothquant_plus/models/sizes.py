"""How large a model is, before and after quantization, from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme
from smoothquant_plus.models.blocks import Decoder, stream_channels
from smoothquant_plus.models.checkpoint import SHAPE, linear_layout
from smoothquant_plus.models.families import Family
from smoothquant_plus.models.skeleton import decoder_blocks, quantized_linears


def stored_bytes(model: Any, family: Family, scheme: Scheme | None) -> int:
    """Bytes of all the tensors of the model on disk and in memory, tied ones once; with `scheme`, the linears that it quantizes as integers,
    a tied output head beside the embedding that it shared."""
    total = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    if scheme is not None:
        for path, (linear, own) in quantized_linears(model, family, scheme).items():
            total += linear_bytes(own, linear, linear.weight.dtype, not path.endswith(family.shapeless))
            if linear.weight is not model.get_input_embeddings().weight:
                total -= linear.weight.numel() * linear.weight.dtype.itemsize
    return total


def quantized_bytes(decoder: Decoder, scheme: Scheme) -> int:
    """Bytes of the checkpoint that quantizing the model of `decoder` gives."""
    total = decoder.checkpoint.nbytes
    for path, (linear, own) in quantized_linears(decoder.model, decoder.family, scheme).items():
        stored = decoder.checkpoint.tensors[decoder.disk_name(f"{path}.weight")]
        total += linear_bytes(own, linear, stored.dtype, not path.endswith(decoder.family.shapeless))
        if path != decoder.head_path or decoder.head_is_stored:
            total -= stored.nbytes
    return total


def linear_bytes(scheme: Scheme, linear: Any, dtype: torch.dtype, shaped: bool) -> int:
    """Bytes of a quantized linear layer whose weight was in `dtype`, without its bias; `shaped`: with its `weight_shape`."""
    layout = linear_layout(scheme, linear.out_features, linear.in_features, dtype)
    return sum(dtype.itemsize * math.prod(shape) for suffix, (dtype, shape) in layout.items() if shaped or suffix != SHAPE)


def fitting_group_sizes(layers: Mapping[str, tuple[nn.Linear, Scheme]]) -> list[int]:
    """The group sizes that divide the input channels of every one of these layers, by path and with their schemes, that is quantized in
    groups."""
    widths = {linear.in_features for linear, scheme in layers.values() if scheme.weights.group_size}
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]


def largest_block(model: Any, family: Family) -> int:
    """The number of parameters of the largest decoder block."""
    return max(sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model, family))


def quantizing_bytes(model: Any, family: Family, samples: int, seq_len: int) -> int:
    """Peak memory to quantize, estimated: the float32 block, its largest tensors once more while they are folded and quantized, two streams
    of hidden states, what Gemma 4 gives each block of each token, the largest table outside the blocks twice (read, and being written), and Python
    with its libraries."""
    block = largest_block(model, family) * 4
    largest = max(p.numel() for p in decoder_blocks(model, family).parameters()) * 4
    inside = {id(p) for p in decoder_blocks(model, family).parameters()}
    outside = max(p.numel() * p.dtype.itemsize for p in model.parameters() if id(p) not in inside)
    config, blocks = model.config.get_text_config(), decoder_blocks(model, family)
    of_tokens = len(blocks) * (getattr(config, "hidden_size_per_layer_input", None) or 0)
    streams = samples * seq_len * (2 * stream_channels(config, blocks) + of_tokens) * 4
    return max(block + 3 * largest, 2 * outside) + streams + 600_000_000
