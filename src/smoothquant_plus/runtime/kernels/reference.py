"""The meaning of a quantized linear layer, and of attention in integers, in plain torch, exact in the integers. Every other backend is tested
against it."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_plus.method.integers import QuantizedWeight, pack_int4, quantize_input, stands_for, unpack_int4
from smoothquant_plus.method.scheme import Quant, Scheme

PAGE = 64  # positions whose weights are rounded with one scale in attention


def supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None:
    return None if scheme.name in ("w8a8", "w4a16", "w4a8") else "it has no meaning for this scheme"


def prepare(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    if weight.quant.bits == 8:
        return weight.values, weight.scale.reshape(-1)
    packed = pack_int4(weight.values), weight.scale
    return packed if weight.zero_point is None else (*packed, weight.zero_point)


def linear(x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scheme.weights.bits == 4:
        packed, scale, *zero_point = prepared
        if scheme.inputs is not None:
            integers, input_scale = quantize_input(x, scheme.inputs)
            dtype, x = x.dtype, integers.float() * input_scale
        y = torch.ops.smoothquant_plus.reference_w4a16(x, packed, scale, zero_point[0] if zero_point else None, bias)
        return y if scheme.inputs is None else y.to(dtype)
    assert scheme.inputs is not None
    values, scale = prepared
    return torch.ops.smoothquant_plus.reference_w8a8(x, values, scale, scheme.inputs.strategy == "token", input_scale, bias)


@torch.library.custom_op("smoothquant_plus::reference_w8a8", mutates_args=())
def _w8a8(x: Tensor, weight: Tensor, weight_scale: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = (int(x) @ weight.T) * input_scale * weight_scale + bias.

    x (..., K) in any float dtype; weight int8 (N, K); weight_scale float32 (N,) or (1,); input_scale float32 (1,), or None for scales taken
    from x, per token or over all of x; bias (N,). The sum over K is exact, scales and bias are applied in float32, y (..., N) is in x's dtype.
    """
    quant = Quant(bits=8, strategy="token" if per_token else "tensor", dynamic=input_scale is None)
    integers, scale = quantize_input(x, quant, input_scale)
    # float64 holds every sum of int8 products exactly (up to 2**53), and unlike integer products it is fast everywhere.
    total = integers.double() @ weight.double().t()
    y = total.float() * scale * weight_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@_w8a8.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("smoothquant_plus::reference_w4a16", mutates_args=())
def _w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = x @ ((int(weight) - zero_point) * weight_scale).T + bias, the activations as they are.

    x (..., K) in any float dtype; weight uint8 (N, K / 2) as `pack_int4` makes it; weight_scale (N, groups) in any float dtype; zero_point
    int8 (N, groups), None when symmetric; bias (N,). All is computed in float32, y (..., N) is in x's dtype.
    """
    y = x.float() @ stands_for(unpack_int4(weight), weight_scale, zero_point).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@_w4a16.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, softcap: float = 0.0, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(cap(query @ key.T * scaling) + mask) @ value with both products in INT8; cap(x) is softcap * tanh(x / softcap), or x if that is 0.

    query (batch, heads, tokens, channels), key (batch, KV heads, positions, channels), value (batch, KV heads, positions, channels of its own), in
    any float dtype; gives (batch, tokens, heads, channels of values) in the query's. `causal`: the last token is at the last position, and each sees
    the positions up to its own. `mask` bool (true: seen) or added, (batch, heads, tokens, positions).

    Queries, keys and values are rounded with a scale for each token and head. In the second product what is added up are positions, whose values have
    scales of their own: softmax's weights are multiplied with them first, and are rounded then, with a scale for each PAGE of positions. The sum
    that softmax divides by is that of the weights as they were.
    """
    per_token = Quant(bits=8, strategy="token", dynamic=True)
    group = query.shape[1] // key.shape[1]
    (q, q_scale), (k, k_scale), (v, v_scale) = (quantize_input(x.float(), per_token) for x in (query, key, value))
    k, k_scale, v, v_scale = (x.repeat_interleave(group, dim=1) for x in (k, k_scale, v, v_scale))  # (batch, heads, positions, ...)
    scores = (q.double() @ k.double().transpose(-1, -2)).float() * (q_scale * scaling) * k_scale.transpose(-1, -2)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    tokens, positions = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(tokens, positions, dtype=torch.bool, device=scores.device).tril(positions - tokens), float("-inf")
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == float("-inf"), 0)).exp()
    y = scores.new_zeros(*scores.shape[:-1], value.shape[-1])
    for start in range(0, positions, PAGE):
        here = slice(start, start + PAGE)
        integers, scale = quantize_input(weights[..., here] * v_scale[:, :, here].transpose(-1, -2), per_token)
        y += (integers.double() @ v[:, :, here].double()).float() * scale
    total = weights.sum(dim=-1, keepdim=True)
    return (y / total).masked_fill(total == 0, 0).transpose(1, 2).to(query.dtype)
