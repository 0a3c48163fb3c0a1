"""Where tensors lie on disk, and what they are there: in FP8 with scales beside them, or a part of one that holds all experts of a block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoothquant_plus.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}

FP8 = torch.float8_e4m3fn

SCALES = ("_scale_inv", "_scale")  # what a weight in FP8 is multiplied by, behind its name

# How names of two tensors that hold all experts of a block end, and what their path ends with where each has its own.
FUSED_EXPERTS = (
    (".experts.gate_up_proj", ".experts.down_proj", ".experts"),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its bytes begin at `offset` of the file `shard`. With `columns` (first, all) a matrix with so many columns begins
    there, and the tensor are some of those, from the first on, transposed. With `scales` it lies there in FP8, to be multiplied by those, each
    for a block of `block` rows and columns; `dtype` is then what it counts as."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    columns: tuple[int, int] | None = None
    scales: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.dtype if self.scales is None else FP8

    @property
    def nbytes(self) -> int:
        """As what it counts as, in memory and when it is written again."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt"):  # raises for a header that is not one, or that does not fit the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}): download it again.") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"'{name}' in {path} has dtype {entry['dtype']}, which is not supported ({', '.join(DTYPES)} are).")
    return {
        name: TensorInfo(path.name, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def in_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are stored in FP8, as DeepSeek-V3's, MiniMax-M2's and others are published. What they are multiplied
    by counts as the full-precision model."""
    declared = config.get("quantization_config")
    return isinstance(declared, dict) and declared.get("quant_method") == "fp8"


def with_scales(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], directory: Path) -> dict[str, TensorInfo]:
    """The same tensors, those in FP8 with the scales beside them, which are no tensors of their own then; static scales of their inputs are left
    out. Raises InputError for scales that are missing or do not fit."""
    stored = {name: info for name, info in tensors.items() if info.dtype == FP8}
    if not stored:
        return dict(tensors)
    if not in_fp8(config):
        raise InputError(
            f"'{next(iter(stored))}' in {directory} is in FP8, and config.json has no quant_method fp8 that says how: use a checkpoint in 16 bits."
        )
    block = config["quantization_config"].get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise InputError(f"{directory / 'config.json'} has weight_block_size {block!r}, which is not two numbers of channels.")
    dtype = torch.float16 if (config.get("dtype") or config.get("torch_dtype")) == "float16" else torch.bfloat16
    beside = {name + scales for name in stored for scales in (*SCALES, "_activation_scale")}
    beside |= {name.removesuffix(".weight") + of_inputs for name in stored for of_inputs in (".activation_scale", ".input_scale")}
    found = {name: info for name, info in tensors.items() if name not in beside}
    for name, info in stored.items():
        scales = next((tensors[name + each] for each in SCALES if name + each in tensors), None)
        if scales is None or len(info.shape) < 2:
            raise InputError(
                f"'{name}' in {directory / info.shard} is in FP8, and there is no '{name}{SCALES[0]}' that it is multiplied by: the checkpoint is "
                "incomplete, or use one in 16 bits."
            )
        rows, columns = info.shape[-2:]
        size = (block[0], block[1]) if block else (rows, columns)
        blocks = (-(-rows // size[0]), -(-columns // size[1]))
        matrices, count = torch.Size(info.shape[:-2]).numel(), torch.Size(scales.shape).numel()
        if not block and len(info.shape) == 3 and count == 2 * matrices and rows % 2 == 0:
            size, blocks = (rows // 2, columns), (2, 1)  # one for the gates of an expert, one for its ups
        if not block and count == blocks[0] * matrices:
            scales = replace(scales, shape=(*info.shape[:-2], *blocks))
        if scales.shape != (*info.shape[:-2], *blocks):
            raise InputError(
                f"the scales of '{name}' in {directory / scales.shard} have shape {scales.shape}, and it has {info.shape} in blocks of {size}: "
                "config.json (weight_block_size) belongs to another checkpoint."
            )
        found[name] = replace(info, dtype=dtype, scales=scales, block=size)
    return found


def multiply(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """Multiply each `block` of the matrices `weight` (..., N, K) by its number in `scales` (..., N / n, K / k), in place."""
    height, width = block
    for matrix, its in zip(weight.view(-1, *weight.shape[-2:]), scales.view(-1, *scales.shape[-2:]), strict=True):
        for rows, of_columns in zip(matrix.split(height), its, strict=True):
            rows *= of_columns.repeat_interleave(width)[: rows.shape[1]]


def separate_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, and in place of two that hold all experts of a block a matrix of each: `experts.3.up_proj.weight` is a part of
    `experts.gate_up_proj`. They lie there as linear layers have them, (E, 2 * intermediate, hidden) and (E, hidden, intermediate), or
    transposed; the two shapes together tell which. Others stay as they are."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for first, last, path in FUSED_EXPERTS:
        for name, gate_up in tensors.items():
            base = name.removesuffix(first)
            down = tensors.get(base + last) if base != name else None
            if down is None or not (len(gate_up.shape) == len(down.shape) == 3 and gate_up.shape[0] == down.shape[0]):
                continue
            hidden, intermediate = down.shape[1:]
            transposed = gate_up.shape[1:] == (intermediate, 2 * hidden)
            if transposed:
                hidden, intermediate = intermediate, hidden
            # The last of the gates must not be in one block of FP8 with the first up, unless all are.
            block = gate_up.block[transposed]
            if (intermediate % block == 0 or block == 2 * intermediate) and (transposed or gate_up.shape[1:] == (2 * intermediate, hidden)):
                parts[name] = _matrices(gate_up, base + path, ("gate_proj", "up_proj"), transposed)
                parts[base + last] = _matrices(down, base + path, ("down_proj",), transposed)
    return {new: part for name, info in tensors.items() for new, part in parts.get(name, {name: info}).items()}


def _matrices(fused: TensorInfo, path: str, projections: Sequence[str], transposed: bool) -> dict[str, TensorInfo]:
    """The weight of each expert's `projections`, which `fused` holds next to each other, one expert after the other."""
    count, height, width = fused.shape
    scales = {} if fused.scales is None else _matrices(fused.scales, path, projections, transposed)
    matrices = {}
    long = width if transposed else height
    for number in range(count):
        for place, projection in enumerate(projections):
            size = max(1, long // len(projections))
            first = place * size if long > 1 else 0  # the scale of one block is that of all projections
            matrices[f"{path}.{number}.{projection}.weight"] = replace(
                fused,
                shape=(size, height if transposed else width),
                offset=fused.offset + fused.stored_dtype.itemsize * width * (number * height + (0 if transposed else first)),
                columns=(first, width) if transposed else None,
                scales=scales.get(f"{path}.{number}.{projection}.weight"),
                block=fused.block[::-1] if transposed else fused.block,
            )
    return matrices
