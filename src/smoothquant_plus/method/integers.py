"""Scales, rounding and integers. The meaning of every scheme is defined here; kernels are tested against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant_plus.method.scheme import Quant

# A symmetric scale maps the largest magnitude to 127, so that it has a negative of its own. Only activations beyond a static scale reach
# -128: they saturate at the ends of int8, as in vLLM's kernels and in compressed-tensors.
INT8_MAX = 127

# How many numbers of a weight are worked on at a time. Weights are large: whole temporary copies would decide the peak of memory.
PIECE = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: `values` int8 (N, K); `scale` float32 (N, 1) per output channel, or (1,) per tensor.

    The weight it stands for is `values * scale`.
    """

    values: Tensor
    scale: Tensor
    quant: Quant


def quantize_weight(weight: Tensor, quant: Quant) -> QuantizedWeight:
    """Round-to-nearest quantization of `weight` (N, K), symmetric: scale = max|w| / 127 over a channel or over the tensor.

    A channel that is all zero gets scale 1. Raises ValueError when the weight is not 2-D or not finite.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight must be 2-D (output channels, input channels), not {tuple(weight.shape)}")
    weight = weight.float()
    maximum = absolute_maximum(weight, dim=1).reshape(-1, 1)
    if quant.strategy == "tensor":
        maximum = maximum.amax().reshape(1)
    if not torch.isfinite(maximum).all():
        raise ValueError("the weight has values that are NaN or infinite")
    scale = scale_of(maximum)
    scale_of_row = scale.expand(len(weight), 1)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in pieces(weight):
        values[rows] = round_to_int8(weight[rows] / scale_of_row[rows])
    return QuantizedWeight(values, scale, quant)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The float32 weight (N, K) that the integers stand for."""
    return weight.values.float() * weight.scale


def dequantized_pieces(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """`dequantize` some rows at a time: which ones, and their float32 values."""
    scale_of_row = weight.scale.expand(len(weight.values), 1)
    for rows in pieces(weight.values):
        yield rows, weight.values[rows].float() * scale_of_row[rows]


def pieces(weight: Tensor) -> Iterator[slice]:
    """The rows of `weight` (N, K) in slices of about PIECE numbers."""
    step = max(1, PIECE // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def absolute_maximum(weight: Tensor, dim: int) -> Tensor:
    """max|w| along `dim`, without a copy of |w|. NaN stays NaN."""
    return torch.maximum(weight.amax(dim=dim), -weight.amin(dim=dim))


def scale_of(maximum: Tensor) -> Tensor:
    """The symmetric int8 scale, float32, for absolute maxima of any shape: maximum / 127, and 1 where that is zero."""
    scale = maximum.float() / INT8_MAX
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # a NaN or infinite maximum stays visible in every result


def quantize_input(x: Tensor, quant: Quant, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Activations `x` (..., K) as int8 (..., K) and their float32 scale: (..., 1) per token, (1,) per tensor.

    Dynamic scales are taken from x itself; for a static one pass `scale` (1,): values beyond it saturate.
    """
    x = x.float()
    if not quant.dynamic:
        if scale is None:
            raise ValueError("static activation quantization needs the calibrated scale")
    elif quant.strategy == "token":
        scale = scale_of(x.abs().amax(dim=-1, keepdim=True))
    else:
        scale = scale_of(x.abs().amax().reshape(1)) if x.numel() else torch.ones(1, device=x.device)
    return round_to_int8(x / scale), scale


def round_to_int8(x: Tensor) -> Tensor:
    return x.round_().clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8)
