"""Our own CPU kernels (csrc/): W8A8 with the activations quantized inside the op, W4A16 with weights alone in integers, and W4A8; and products
with a weight that stays in bfloat16, as a model's head does.

One packed layout serves every instruction set; the fastest is found out when the library is loaded, and the environment variable SQPLUS_CPU
chooses another. A result depends neither on the number of threads nor on the other rows of x (but for W4A16 with AMX, whose last bits depend on
whether there are more than five rows). SQPLUS_LIBRARY names another build of the library, for tests.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

import smoothquant_plus
from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.progress import note
from smoothquant_plus.runtime.kernels.reference import PAGE

# From the lowest to the highest, as in csrc/levels.cpp.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
VARIABLE = "SQPLUS_CPU"
PANEL = 64

# Keys, values and scales, as csrc/attention.cpp has them. Pages of tokens are along the third dimension of the integers.
Cache = tuple[Tensor, Tensor, Tensor]

# |x| <= 128, and what its sums start from is -128 times all of them: more input channels than this could overflow an int32.
LARGEST_K = (2**31 - 1) // (128 * 128)


@functools.cache
def missing() -> str | None:
    """Load the library, once: None, or the reason why there is none, which is also said to the user."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in LEVELS:
        raise InputError(f"{VARIABLE}={wanted}: choose one of {', '.join(LEVELS)}.{did_you_mean(wanted, LEVELS)}")
    other = os.environ.get("SQPLUS_LIBRARY")
    found = [Path(other)] if other else sorted(Path(smoothquant_plus.__file__).parent.glob("_cpu*.so"))
    reason = None if found else "they were not built: install the package where PyTorch and a C++ compiler are (README.md, Install)"
    if found:
        try:
            torch.ops.load_library(found[0])
        except OSError as error:
            reason = f"{found[0]} cannot be loaded: {error}"
    if reason is not None:
        note(f"the CPU kernels of smoothquant-plus are not used, slower ones of PyTorch are: {reason}.")
        return reason
    torch.library.register_fake("smoothquant_plus::cpu_w8a8")(_fake_w8a8)
    torch.library.register_fake("smoothquant_plus::cpu_bfloat16")(_fake_bfloat16)
    torch.library.register_fake("smoothquant_plus::cpu_w4a16")(_fake_w4)
    torch.library.register_fake("smoothquant_plus::cpu_w4a8")(_fake_w4)
    torch.library.register_fake("smoothquant_plus::cpu_huge_pages")(lambda _: None)
    torch.library.register_fake("smoothquant_plus::cpu_cache_append")(lambda *_: None)
    torch.library.register_fake("smoothquant_plus::cpu_attention")(_fake_attention)
    if wanted is not None and torch.ops.smoothquant_plus.cpu_level(LEVELS.index(wanted)) != LEVELS.index(wanted):
        raise InputError(f"{VARIABLE}={wanted}: this processor has {level()} at most.")
    return None


def level() -> str:
    """The instruction set in use."""
    return LEVELS[torch.ops.smoothquant_plus.cpu_level(-1)]


def supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None:
    if device.type != "cpu":
        return f"they run on the CPU, not on '{device.type}'"
    if scheme.name not in ("w8a8", "w4a16", "w4a8"):
        return "they multiply 8-bit integers, and 4-bit weights"
    if scheme.name != "w4a16" and shape[1] > LARGEST_K:
        return f"their sums are exact for at most {LARGEST_K} input channels"
    return missing()


def prepare(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    ops = torch.ops.smoothquant_plus
    rows = len(weight.values)
    if weight.quant.bits == 8:
        return ops.cpu_pack_w8(weight.values), weight.scale.reshape(-1).expand(rows).contiguous()
    # A group whose weights are all zero adds nothing, whatever rounding its two sums leave.
    groups = weight.values.reshape(*weight.scale.shape, -1)
    zero = 0 if weight.zero_point is None else weight.zero_point[..., None]
    scale = weight.scale.float() if weight.scale.dtype == torch.float64 else weight.scale
    scale = scale.masked_fill((groups == zero).all(dim=-1), 0)
    # The first says how many channels there are: panels have more.
    prepared = (weight.values.new_empty(rows, 0), ops.cpu_pack_w4(weight.values), panels(scale))
    return prepared if weight.zero_point is None else (*prepared, panels(weight.zero_point))


def panels(per_group: Tensor) -> Tensor:
    """(N, groups) as (panels, groups, 64)."""
    padded = torch.nn.functional.pad(per_group.t(), (0, -len(per_group) % PANEL))  # (groups, panels * 64)
    return padded.reshape(len(padded), -1, PANEL).transpose(0, 1).contiguous()


def linear(x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float64:
        return linear(x.float(), prepared, scheme, input_scale, bias).double()
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    ops = torch.ops.smoothquant_plus
    y: Tensor
    if scheme.weights.bits == 8:
        assert scheme.inputs is not None
        weight, scale = prepared
        y = ops.cpu_w8a8(x, weight, scale, scheme.inputs.strategy == "token", input_scale, bias)
    else:
        rows, packed, scale, *zero_point = prepared
        product = ops.cpu_w4a16 if scheme.inputs is None else ops.cpu_w4a8
        y = product(x, packed, scale, zero_point[0] if zero_point else None, bias, len(rows))
    return y


def multiplies_bfloat16() -> bool:
    """Whether `linear_bfloat16` runs here, and PyTorch's product is not faster, which uses AMX where there is any."""
    return missing() is None and level() != "portable" and (level() == "amx" or not torch.cpu._is_amx_tile_supported())


def prepare_bfloat16(weight: Tensor) -> Tensor:
    """A bfloat16 weight (N, K), repacked."""
    packed: Tensor = torch.ops.smoothquant_plus.cpu_pack_bfloat16(weight)
    return packed


def linear_bfloat16(x: Tensor, packed: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    """x bfloat16 (..., K) times a weight of so many output `channels`, with sums in float32: bfloat16 (..., N)."""
    y: Tensor = torch.ops.smoothquant_plus.cpu_bfloat16(x, packed, bias, channels)
    return y


def new_cache(pages: int, batch: int, heads: int, key_channels: int, value_channels: int, device: torch.device) -> Cache:
    """Room for the keys and values of so many `pages` of PAGE tokens, of so many KV `heads`; not initialized."""
    keys = torch.empty(batch, heads, pages, PAGE * (-(-key_channels // 4) * 4), dtype=torch.uint8, device=device)
    values = torch.empty(batch, heads, pages, PAGE * (-(-value_channels // PANEL) * PANEL), dtype=torch.uint8, device=device)
    scales = torch.empty(batch, heads, 2, pages * PAGE, dtype=torch.float32, device=device)
    for tensor in (keys, values):
        torch.ops.smoothquant_plus.cpu_huge_pages(tensor)
    return keys, values, scales


def cache_append(cache: Cache, keys: Tensor, values: Tensor, at: int) -> None:
    """Write `keys` (batch, KV heads, tokens, channels) and `values`, rounded, as the tokens from `at` on into a `new_cache`."""
    if keys.dtype == torch.float64:
        keys, values = keys.float(), values.float()
    torch.ops.smoothquant_plus.cpu_cache_append(*cache, keys, values, at)


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
    if query.dtype == torch.float64:
        how = {"scaling": scaling, "softcap": softcap, "causal": causal, "mask": mask}
        return attention(query.float(), cache, length, channels, **how).double()  # type: ignore[arg-type]
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    y: Tensor = torch.ops.smoothquant_plus.cpu_attention(query, *cache, length, channels, scaling, softcap, causal, mask)
    return y


def _fake_attention(query: Tensor, keys: Tensor, values: Tensor, scales: Tensor, length: int, channels: int, *others: object) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, channels)


def _fake_w8a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    per_token: bool,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0])


def _fake_bfloat16(x: Tensor, packed: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], channels)


def _fake_w4(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, channels: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], channels)
