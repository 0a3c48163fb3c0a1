"""W8A8 with the integer products that PyTorch itself ships: oneDNN on x86 CPUs, `torch._int_mm` on CUDA and elsewhere."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from smoothquant_plus.method.integers import QuantizedWeight, quantize_input
from smoothquant_plus.method.scheme import Quant, Scheme

# On CUDA `_int_mm` refuses 16 rows and fewer.
CUDA_ROWS = 32

# |x| <= 128 on both sides: sums of more input channels could overflow an int32.
LARGEST_K = (2**31 - 1) // (128 * 128)


def supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None:
    if scheme.name != "w8a8":
        return "it multiplies 8-bit integers"
    if shape[1] > LARGEST_K:
        return f"its sums are exact for at most {LARGEST_K} input channels"
    if device.type == "cuda" and (shape[0] % 8 or shape[1] % 8):
        return "torch._int_mm needs input and output channels that are multiples of 8 on CUDA"
    if device.type not in ("cpu", "cuda"):
        return f"there is no integer product for device type '{device.type}'"
    return None


def prepare(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    values = weight.values
    scale = weight.scale.reshape(-1).expand(len(values)).contiguous()
    if values.device.type == "cpu" and cpu_method() != "int_mm":
        return torch.ops.onednn.qlinear_prepack(values, None), scale
    return values, scale


def linear(x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    assert scheme.inputs is not None
    weight, scale = prepared
    return torch.ops.smoothquant_plus.torch_w8a8(x, weight, scale, scheme.inputs.strategy == "token", input_scale, bias)


@torch.library.custom_op("smoothquant_plus::torch_w8a8", mutates_args=())
def _w8a8(x: Tensor, weight: Tensor, weight_scale: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """As `reference_w8a8`; `weight` is what `prepare` gives, `weight_scale` float32 (N,)."""
    quant = Quant(bits=8, strategy="token" if per_token else "tensor", dynamic=input_scale is None)
    rows = x.reshape(-1, x.shape[-1])
    integers, scale = quantize_input(rows, quant, input_scale)
    y = _product(integers, weight, len(weight_scale)).mul_(scale).mul_(weight_scale)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight_scale))


@_w8a8.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, per_token: bool, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0])


def _product(x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """The integer product of x int8 (M, K) and the prepared weight: float32 (M, N)."""
    if len(x) == 0:
        return torch.empty(0, channels, device=x.device)
    if x.device.type == "cuda":
        padded = torch.nn.functional.pad(x, (0, 0, 0, max(0, CUDA_ROWS - len(x))))
        return torch._int_mm(padded, weight.t())[: len(x)].float()
    method = cpu_method()
    if method == "int_mm":
        return torch._int_mm(x, weight.t()).float()
    if method == "unsigned":
        return _onednn(x.to(torch.int16).add_(128).to(torch.uint8), 128, weight, channels)
    # Two digits of base 16, each in -8..8: x = 16 * high + low (see cpu_method).
    wide = x.to(torch.int16)
    low = torch.bitwise_and(wide + 8, 15) - 8
    high = (wide - low) >> 4
    both = _onednn(torch.cat([high, low]).add_(8).to(torch.uint8), 8, weight, channels)
    return both[: len(x)].mul_(16).add_(both[len(x) :])


def _onednn(x: Tensor, zero_point: int, weight: Tensor, channels: int) -> Tensor:
    """(x - zero_point) @ weight.T for unsigned x uint8 (M, K): float32 (M, N). Signed activations would fall on a slow reference path."""
    ones, zeros = _unit_scales(channels)
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, zero_point, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")


@functools.lru_cache(maxsize=256)
def _unit_scales(channels: int) -> tuple[Tensor, Tensor]:
    return torch.ones(channels), torch.zeros(channels, dtype=torch.int32)


@functools.lru_cache(maxsize=1)
def cpu_method() -> str:
    """How int8 products are made on this CPU: 'unsigned' (one oneDNN product), 'digits' (two) or 'int_mm'.

    Without VNNI oneDNN adds pairs of 8-bit products in 16 bits and saturates, silently: extreme values then give wrong sums. Whether this
    machine does is found out by multiplying extreme values. Activations cut into two digits of base 16 cannot saturate
    (2 * 16 * 127 < 2**15) and make two products instead of one, still faster than `_int_mm` there.
    """
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    x = torch.full((4, 256), 127, dtype=torch.int8)
    exact = float(256 * 127 * 127)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        once = _onednn(x.to(torch.int16).add_(128).to(torch.uint8), 128, packed, 64)
        if bool((once == exact).all()):
            return "unsigned"
        digits = _onednn(torch.full((4, 256), 16, dtype=torch.uint8), 8, packed, 64)  # 127 = 16 * 8 - 1: the high digit
        return "digits" if bool((digits == float(256 * 8 * 127)).all()) else "int_mm"
    except (RuntimeError, AttributeError):  # a torch that was built without oneDNN
        return "int_mm"
