"""Our own kernels for NVIDIA GPUs, in Triton: W8A8 and W4A16. docs/add-a-kernel.md says how they work.

Triton is imported when the first layer asks for them: not every machine has it. TRITON_INTERPRET=1, set before that, runs them on the CPU, in
Python, for tests; then they have to be asked for by name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import Scheme

# Keys, values and their scales (int8_attention.py).
Cache = tuple[Tensor, Tensor, Tensor]
# |x| <= 128 and |w| <= 127: more input channels than this could overflow the int32 sum.
LARGEST_K = (2**31 - 1) // (128 * 127)


@functools.cache
def missing() -> str | None:
    """Import the kernels, once: None, or the reason why there are none."""
    try:
        from smoothquant_plus.runtime.kernels.triton import int8_attention, w4a16, w8a8  # noqa: F401  registers the ops
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


def supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None:
    if scheme.name not in ("w8a8", "w4a16"):
        return "they multiply 8-bit integers, or floats with 4-bit weights"
    if scheme.name == "w8a8" and shape[1] > LARGEST_K:
        return f"their sums are exact for at most {LARGEST_K} input channels"
    reason = missing()
    if reason is not None:
        return reason
    from smoothquant_plus.runtime.kernels.triton.common import INTERPRETED

    if INTERPRETED.value:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs them on the CPU"
    if device.type != "cuda":
        return f"they run on NVIDIA GPUs, not on '{device.type}'"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
    return None


def prepare(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    from smoothquant_plus.runtime.kernels.triton import w4a16, w8a8

    return w8a8.pack(weight) if weight.quant.bits == 8 else w4a16.pack(weight)


def linear(x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float64:
        return linear(x.float(), prepared, scheme, input_scale, bias).double()
    ops = torch.ops.smoothquant_plus
    y: Tensor
    if scheme.inputs is None:
        y = ops.triton_w4a16(x, *prepared, bias)
    else:
        y = ops.triton_w8a8(x, *prepared, scheme.inputs.strategy == "token", input_scale, bias)
    return y


def product(values: Tensor, scale: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear` in W8A8 of activations that are quantized already (fused.py): values int8 (..., K filled up) and scale float32 (...)."""
    y: Tensor = torch.ops.smoothquant_plus.triton_w8a8_product(values, scale, *prepared, bias, dtype)
    return y


def new_cache(pages: int, batch: int, heads: int, key_channels: int, value_channels: int, device: torch.device) -> Cache:
    """Room for the keys and values of so many `pages` of PAGE tokens, of so many KV `heads`; not initialized."""
    from smoothquant_plus.runtime.kernels.triton import int8_attention

    return int8_attention.new_cache(pages, batch, heads, key_channels, value_channels, device)


def cache_append(cache: Cache, keys: Tensor, values: Tensor, at: int) -> None:
    """Write `keys` (batch, KV heads, tokens, channels) and `values`, rounded, as the tokens from `at` on into a `new_cache`."""
    torch.ops.smoothquant_plus.triton_cache_append(*cache, keys, values, at)


def attention(
    query: Tensor,
    cache: Cache,
    length: int,
    channels: int,
    *,
    scaling: float,
    softcap: float = 0.0,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.attention` of `query` (batch, heads, tokens, channels of keys) with the first `length` tokens of a cache; `channels` are those of
    values. Gives (batch, tokens, heads, channels)."""
    y: Tensor = torch.ops.smoothquant_plus.triton_attention(query, *cache, length, channels, scaling, softcap, causal, mask)
    return y
