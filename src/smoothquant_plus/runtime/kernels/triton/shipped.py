"""Every kernel as it is compiled for the tables of configurations: for compiling ahead of time, which needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from smoothquant_plus.method.scheme import GROUP_SIZES
from smoothquant_plus.runtime.kernels.reference import PAGE
from smoothquant_plus.runtime.kernels.triton import fused, int8_attention, w4a16, w8a8
from smoothquant_plus.runtime.kernels.triton.configurations import ANYWHERE, SHIPPED, Configuration, Op

# Triton's names of types for the arguments of the kernels; FLOAT stands for the dtype of the activations.
W4A16 = {"x_ptr": "*FLOAT", "packed_ptr": "*i16", "steps_ptr": "*FLOAT", "partial_ptr": "*fp32", "blocks": "i32", "x_stride": "i32"}
W8A8 = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32", "partial_ptr": "*i32", "K": "i32"}
BOTH = {"bias_ptr": "*FLOAT", "y_ptr": "*FLOAT", "arrived_ptr": "*i32", "M": "i32", "N": "i32"}
DEQUANTIZE = W4A16 | {"weight_ptr": "*FLOAT", "from_channel": "i32", "to_channel": "i32", "N": "i32", "K": "i32"}
QUANTIZE = {"x_ptr": "*FLOAT", "values_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "filled": "i32", "x_stride": "i32"}
SCALE = W8A8 | BOTH | {"total_ptr": "*i32"}
NORM = QUANTIZE | {"residual_ptr": "*FLOAT", "weight_ptr": "*FLOAT", "bias_ptr": "*FLOAT", "sum_ptr": "*FLOAT"}
NORM |= {"residual_stride": "i32", "eps": "fp32"}
SILU = QUANTIZE | {"gate_ptr": "*FLOAT", "up_ptr": "*FLOAT", "gate_stride": "i32", "up_stride": "i32"}
CACHE = {"keys_ptr": "*i8", "values_ptr": "*i8", "scales_ptr": "*fp32", "tokens": "i32", "heads": "i32", "pages": "i32"}
APPEND = CACHE | {"key_ptr": "*FLOAT", "value_ptr": "*FLOAT", "at": "i32"}
APPEND |= {f"{which}_{axis}": "i32" for which in ("key", "value") for axis in ("batch", "head", "token")}
ATTENTION = CACHE | {"query_ptr": "*FLOAT", "mask_ptr": "*fp32", "extent_ptr": "*fp32", "length": "i32", "share": "i32", "group": "i32"}
ATTENTION |= {f"{which}_{axis}": "i32" for which in ("query", "mask") for axis in ("batch", "head", "token", "position")}
ATTENTION |= {"scaling": "fp32", "softcap": "fp32"}
MERGE = {"part_ptr": "*fp32", "extent_ptr": "*fp32", "y_ptr": "*FLOAT", "parts": "i32"}
# What is not a multiple of 16 in general; all else is, addresses too, in the shapes of real models.
ANY = (
    "M",
    "blocks",
    "from_channel",
    "to_channel",
    "eps",
    "at",
    "tokens",
    "heads",
    "group",
    "pages",
    "length",
    "share",
    "parts",
    "scaling",
    "softcap",
)


class Compilation(NamedTuple):
    """What `triton.compile` takes.

    `signature` has the type of every argument, 'constexpr' for `constants`; `aligned` names those that are multiples of 16. `configuration`
    is the row of the table, or None for a kernel that always runs alike.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    aligned: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    configuration: Configuration | None


def shipped(architecture: str) -> Iterator[Compilation]:
    """Everything that runs on `architecture` ('sm_90'): each row of its tables for each group size and dtype, with a split sum and a bias."""
    for dtype in ("bf16", "fp16"):
        for how in rows(architecture, "w4a16"):
            for group in GROUP_SIZES:
                name = f"w4a16 {how.kernel} {how.rows}x{how.channels} group {group} {dtype}"
                if how.kernel == "matmul":
                    tile = {"GROUP": group, "CHANNELS": w4a16.DEQUANTIZED}
                    yield compilation(name, w4a16.dequantize_kernel, DEQUANTIZE, dtype, tile, 4, 1)
                else:
                    constants = w4a16.constants(how, group) | {"SPLIT": True}
                    yield compilation(name, w4a16.product_kernel, W4A16 | BOTH, dtype, constants, how.warps, how.stages, how)
        for how in rows(architecture, "w8a8"):
            name = f"w8a8 {how.kernel} {how.rows}x{how.channels} {dtype}"
            if how.kernel == "matmul":
                yield compilation(name, w8a8.scale_kernel, SCALE, dtype, {"CHANNELS": w8a8.SCALED}, 4, 1)
            else:
                constants = w8a8.constants(how) | {"SPLIT": True}
                yield compilation(name, w8a8.product_kernel, W8A8 | BOTH, dtype, constants, how.warps, how.stages, how)
        length = {"LENGTH": w8a8.QUANTIZED}
        yield compilation(f"w8a8 quantize per token {dtype}", w8a8.quantize_kernel, QUANTIZE, dtype, {"given_ptr": None} | length, 8, 2)
        given = QUANTIZE | {"given_ptr": "*fp32"}
        yield compilation(f"w8a8 quantize given {dtype}", w8a8.quantize_kernel, given, dtype, length, 8, 2)
        for k in (8192, fused.LARGEST_NORM):
            tile, warps, stages = fused.tile(k)
            for layer in (False, True):
                name = f"{'layer' if layer else 'rms'} norm {k} {dtype}"
                yield compilation(name, fused.norm_quantize_kernel, NORM, dtype, {"LAYER": layer} | tile, warps, stages)
        for k in (11008, fused.LARGEST_PRODUCT):
            tile, warps, stages = fused.tile(k)
            yield compilation(f"silu {k} {dtype}", fused.silu_quantize_kernel, SILU, dtype, tile, warps, stages)
        yield from attention(dtype)


def attention(dtype: str) -> Iterator[Compilation]:
    """Tokens after a prompt, of which each program has some positions, and prompts; without a mask, and with one."""
    for channels in (64, 128, 256):
        widths = int8_attention.widths(channels, channels)
        for tokens in (1, 4096):
            constants = widths | {"TOKENS": int8_attention.tokens_at_once(tokens, channels), "PAGE": PAGE}
            name = f"append {constants['TOKENS']} tokens, {channels} channels {dtype}"
            yield compilation(name, int8_attention.append_kernel, APPEND, dtype, constants, 4 if tokens > 1 else 1, 1)
        for rows in (1, 4096):
            tile, warps, stages = int8_attention.tile(rows, channels)
            constants = widths | {"CAUSAL": rows > 1, "CAPPED": False, "SPLIT": rows == 1, "ROWS": tile, "PAGE": PAGE}
            types = ATTENTION | {"y_ptr": "*fp32" if rows == 1 else "*FLOAT"}
            for mask, masked in (("", {"mask_ptr": None}), (" masked", {"mask_position": 1})):
                name = f"attention {tile} rows{mask}, {channels} channels {dtype}"
                yield compilation(name, int8_attention.attention_kernel, types, dtype, constants | masked, warps, stages)
        constants = {"CHANNELS": channels, "VALUES": widths["VALUES"], "PARTS": int8_attention.SPLITS}
        yield compilation(f"merge, {channels} channels {dtype}", int8_attention.merge_kernel, MERGE, dtype, constants, 4, 1)


def rows(architecture: str, op: Op) -> Iterator[Configuration]:
    return (configuration for _, configuration in SHIPPED.get((architecture, op)) or ANYWHERE[op])


def compilation(
    name: str,
    kernel: Any,
    types: dict[str, str],
    dtype: str,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    configuration: Configuration | None = None,
) -> Compilation:
    signature = {each: "constexpr" if each in constants else types[each].replace("FLOAT", dtype) for each in kernel.arg_names}
    aligned = tuple(each for each in kernel.arg_names if each not in constants and each not in ANY)
    return Compilation(name, kernel, signature, aligned, constants, warps, stages, configuration)
