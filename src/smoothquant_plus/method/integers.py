"""Scales, rounding and integers. The meaning of every scheme is defined here; kernels are tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant_plus.method.scheme import Quant

# A symmetric scale maps the largest magnitude to 127, so that it has a negative of its own. Only activations beyond a static scale reach
# -128: they saturate at the ends of int8, as in vLLM's kernels and in compressed-tensors.
INT8_MAX = 127

# 4-bit integers are kept signed, as in compressed-tensors; packed, they are stored with 8 added.
INT4_MIN, INT4_MAX = -8, 7

# How many numbers of a weight are worked on at a time. Weights are large: whole temporary copies would decide the peak of memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers, int8 (N, K), and what they stand for: `(values - zero_point) * scale`.

    8 bits: `values` -127..127; `scale` float32 (N, 1) per output channel, or (1,) per tensor. 4 bits: `values` -8..7; `scale` (N, K / group
    size) in the dtype it is stored in, `zero_point` int8 (N, K / group size) -8..7. `zero_point` is None when symmetric.
    """

    values: Tensor
    scale: Tensor
    quant: Quant
    zero_point: Tensor | None = None

    def to(self, device: str | torch.device) -> QuantizedWeight:
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedWeight(self.values.to(device), self.scale.to(device), self.quant, zero_point)


def lost_channels(maxima: Tensor) -> float:
    """Of channels with these absolute `maxima`, the share that one scale for all of them rounds to 0 wherever they are: those that stay below half a
    step of it. Channels that are always 0 lose nothing."""
    step = scale_of(maxima.amax())
    return ((maxima > 0) & (maxima < step / 2)).float().mean().item()


def quantize_weight(weight: Tensor, quant: Quant, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Round-to-nearest quantization of `weight` (N, K).

    8 bits (SmoothQuant): symmetric, scale = max|w| / 127 over a channel or over the tensor. 4 bits (SmoothQuant+, Section 3): over each
    group of input channels, asymmetric: scale = (max w - min w) / 15, zero point = round(-min w / scale), where the range includes zero;
    symmetric: the smallest scale whose range -8..7 holds the group. Scales of groups are rounded up to `scale_dtype` before they are used,
    so that every weight comes back within half a step of the scale that is stored. What is all zero gets scale 1.
    Raises ValueError when the weight is not 2-D or not finite, when the groups do not fit K, or when a scale overflows `scale_dtype`.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight must be 2-D (output channels, input channels), not {tuple(weight.shape)}")
    weight = weight.float()
    maximum = absolute_maximum(weight, dim=1).reshape(-1, 1)
    if not torch.isfinite(maximum).all():
        raise ValueError("the weight has values that are NaN or infinite")
    if quant.strategy == "group":
        return _quantize_groups(weight, quant, scale_dtype)
    if quant.strategy == "tensor":
        maximum = maximum.amax().reshape(1)
    scale = scale_of(maximum)
    scale_of_row = scale.expand(len(weight), 1)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in pieces(weight):
        values[rows] = round_to_int8(weight[rows] / scale_of_row[rows])
    return QuantizedWeight(values, scale, quant)


def _quantize_groups(weight: Tensor, quant: Quant, scale_dtype: torch.dtype) -> QuantizedWeight:
    size = quant.group_size
    if not size or weight.shape[1] % size:
        raise ValueError(f"groups of {size} do not divide {weight.shape[1]} input channels")
    groups = weight.reshape(len(weight), -1, size)  # (N, groups, group size)
    low, high = groups.amin(dim=-1).clamp_(max=0), groups.amax(dim=-1).clamp_(min=0)
    scale = round_up(
        torch.maximum(divide(high, INT4_MAX), divide(low, INT4_MIN)) if quant.symmetric else divide(high - low, 15), scale_dtype
    )
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"the scale of a group overflows {str(scale_dtype).removeprefix('torch.')}: convert the checkpoint to bfloat16, or choose another --alpha"
        )
    steps = scale.float()
    zero_point = None if quant.symmetric else (torch.round(-low / steps) + INT4_MIN).to(torch.int8)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in pieces(weight):
        q = (groups[rows] / steps[rows, :, None]).round_()
        if zero_point is not None:
            q += zero_point[rows, :, None]
        values[rows] = q.clamp_(INT4_MIN, INT4_MAX).to(torch.int8).flatten(1)
    return QuantizedWeight(values, scale, quant, zero_point)


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Non-negative `scale` (float32) in `dtype`, never smaller than it was; 1 where it is zero."""
    rounded = scale.to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        # The next number up, of a positive one, is its bits plus one.
        rounded = torch.where(rounded.float() < scale, (rounded.view(torch.int16) + 1).view(dtype), rounded)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight (N, K) of parts (n, K) of its rows that were quantized by themselves, per channel or in groups."""
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedWeight(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scale for part in parts]),
        parts[0].quant,
        torch.cat(zero_points) if zero_points else None,
    )


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The float32 weight (N, K) that the integers stand for."""
    return stands_for(weight.values, weight.scale, weight.zero_point)


def dequantized_pieces(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """`dequantize` some rows at a time: which ones, and their float32 values."""
    scale = weight.scale.expand(len(weight.values), -1)  # a scale per tensor too has its rows now
    for rows in pieces(weight.values):
        yield rows, stands_for(weight.values[rows], scale[rows], None if weight.zero_point is None else weight.zero_point[rows])


def stands_for(values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(values - zero_point) * scale in float32, for `values` int8 (N, K) and scales that are shared by equal groups of columns: (N, groups),
    (N, 1), or (1,)."""
    if scale.ndim == 1:
        return values.float() * scale
    groups = values.reshape(*scale.shape, -1)  # (N, groups, group size)
    shifted = groups.float() if zero_point is None else (groups - zero_point[..., None]).float()  # in int8: within -15..15
    return shifted.mul_(scale.float()[..., None]).reshape(values.shape)


def pack_int4(values: Tensor) -> Tensor:
    """4-bit integers -8..7, int8 (..., K) with K even, two a byte: uint8 (..., K / 2), stored with 8 added, the first of each two in the low
    half. Viewed as little-endian int32 these are the bytes of compressed-tensors' pack-quantized format."""
    unsigned = (values - INT4_MIN).view(torch.uint8)
    # A clone, not contiguous(): that returns a tensor with a dimension of one as it is, whatever strides that has, and no view as int32
    # could be taken of it.
    return (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).clone(memory_format=torch.contiguous_format)


def unpack_int4(packed: Tensor) -> Tensor:
    """`pack_int4` undone: int8 (..., K)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).view(torch.int8).add_(INT4_MIN)


def pieces(weight: Tensor) -> Iterator[slice]:
    """The rows of `weight` (N, K) in slices of about PIECE numbers."""
    step = max(1, PIECE // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def absolute_maximum(weight: Tensor, dim: int) -> Tensor:
    """max|w| along `dim`, without a copy of |w|. NaN stays NaN."""
    return torch.maximum(weight.amax(dim=dim), -weight.amin(dim=dim))


def scale_of(maximum: Tensor) -> Tensor:
    """The symmetric int8 scale, float32, for absolute maxima of any shape: maximum / 127, and 1 where that is zero."""
    scale = divide(maximum.float(), INT8_MAX)
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # a NaN or infinite maximum stays visible in every result


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once. On GPUs PyTorch multiplies by the reciprocal of a Python number, which rounds twice: scales, and so integers, would
    not be those of a CPU."""
    return x / torch.full_like(x, by)


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
