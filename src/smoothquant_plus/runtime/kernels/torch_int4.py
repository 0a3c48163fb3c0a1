"""W4A16 with what PyTorch itself ships: its 4-bit product for a few bfloat16 tokens on CPUs, dequantization and a float product otherwise.

The weight is kept packed, once. For bfloat16 scales on a CPU that is the layout of `_weight_int4pack_mm_for_cpu`, which is also unpacked for
larger batches; otherwise `pack_int4`'s.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from smoothquant_plus.method.integers import INT4_MIN, QuantizedWeight, pack_int4, pieces, stands_for, unpack_int4
from smoothquant_plus.method.scheme import Scheme

# Up to so many tokens the 4-bit product is faster than dequantizing for the float one.
SMALL_BATCH = 4


def supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> str | None:
    return None if scheme.name == "w4a16" else "it multiplies with 4-bit weights"


def prepare(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    """(packed, scale[, zero_point]), or (packed, scales and zeros) for the 4-bit product, which computes (q - 8) * scale + zero with unsigned
    q."""
    values, scale, zero_point = weight.values, weight.scale, weight.zero_point
    if values.device.type != "cpu" or scale.dtype != torch.bfloat16 or len(values) % 16 or block_layout() is None:
        packed = pack_int4(values), scale
        return packed if zero_point is None else (*packed, zero_point)
    zero = torch.zeros_like(scale) if zero_point is None else -zero_point * scale
    # (groups, N, 2)
    return _pack((values - INT4_MIN).int()), torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def linear(x: Tensor, prepared: tuple[Tensor, ...], scheme: Scheme, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    packed, scale, *zero_point = prepared
    return torch.ops.smoothquant_plus.torch_w4a16(x, packed, scale, zero_point[0] if zero_point else None, bias)


@torch.library.custom_op("smoothquant_plus::torch_w4a16", mutates_args=())
def _w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    """As `reference_w4a16`, on what `prepare` gives; computed in x's dtype, or as PyTorch's product does."""
    rows, channels = x.reshape(-1, x.shape[-1]), len(weight)
    for_product = weight_scale.ndim == 3
    if for_product and 0 < len(rows) <= SMALL_BATCH and x.dtype == torch.bfloat16:
        size = x.shape[-1] // len(weight_scale)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight, size, weight_scale)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], channels)
    if for_product:
        weight_scale, zero = weight_scale.transpose(0, 1).float().unbind(-1)  # (N, groups)
        zero_point = torch.round(-zero / weight_scale).to(torch.int8)  # what it was made of, before bfloat16 rounded it
        values = _unpack(weight)
    y = x.new_empty(len(rows), channels)
    for some in pieces(weight):  # one piece of the float weight at a time
        integers = values[some] if for_product else unpack_int4(weight[some])
        piece = stands_for(integers, weight_scale[some], None if zero_point is None else zero_point[some])
        y[:, some] = torch.nn.functional.linear(rows, piece.to(x.dtype), None if bias is None else bias[some].to(x.dtype))
    return y.reshape(*x.shape[:-1], channels)


@_w4a16.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _pack(unsigned: Tensor) -> Tensor:
    """int32 (N, K) of 0..15 in PyTorch's layout for the 4-bit product: uint8 (N, K / 2), of which `_unpack` knows more."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)


def _unpack(packed: Tensor) -> Tensor:
    """`_pack` undone: int8 (N, K) of -8..7."""
    layout = block_layout()
    assert layout is not None  # `prepare` packs nothing that cannot be unpacked
    return _unpack_blocks(packed, *layout)


def _unpack_blocks(packed: Tensor, block: int, halves: bool) -> Tensor:
    """Rows lie in blocks of `block`; for each column of a block there are block / 2 bytes, each of two rows: of the first and the second half
    of the block (`halves`), or neighbours. A last block that is smaller always has neighbours."""
    channels, columns = packed.shape[0], packed.shape[1] * 2
    full = channels // block
    parts: list[Tensor] = []
    for rows, count, split in ((block, full, halves), (channels - full * block, 1, False)):
        if rows * count:
            tile = packed[len(parts) * full * block :].view(-1)[: rows * count * columns // 2].view(count, columns, rows // 2)
            two = torch.stack((tile & 15, tile >> 4), dim=-2 if split else -1)  # (blocks, K, 2, rows / 2) or (blocks, K, rows / 2, 2)
            parts.append(two.flatten(-2).transpose(1, 2).reshape(-1, columns))
    return torch.cat(parts).view(torch.int8) + INT4_MIN


@functools.lru_cache(maxsize=1)
def block_layout() -> tuple[int, bool] | None:
    """How PyTorch packs on this CPU, `_unpack_blocks`' arguments, found out by packing random numbers; None when that is not recognized.

    It depends on the instruction set and is not documented.
    """
    unsigned = torch.randint(0, 16, (112, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        packed = _pack(unsigned)
    except (RuntimeError, AttributeError):  # a torch that was built without it
        return None
    expected = (unsigned + INT4_MIN).to(torch.int8)
    tried = [(block, halves) for block in (64, 32, 16) for halves in (True, False)]
    return next((layout for layout in tried if torch.equal(_unpack_blocks(packed, *layout), expected)), None)
