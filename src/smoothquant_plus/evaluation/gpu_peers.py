"""What other libraries multiply the same weights with on NVIDIA GPUs: one short function each, and a row in `GPU_PEERS`.

W8A8 peers quantize the activations per token, W4A16 peers take the same groups and zero points unless it is said otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from smoothquant_plus.evaluation.peers import Peer, Product, Weights, four_bits
from smoothquant_plus.method.integers import INT4_MIN, pack_int4


def tinygemm(weights: Weights) -> Product:
    """torch's own 4-bit product: (q - 8) * scale + zero with unsigned q, the first of each two in the high half of a byte."""
    values, scale, zero_point = four_bits(weights)
    unsigned = (values - INT4_MIN).view(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(unsigned[:, 0::2] << 4 | unsigned[:, 1::2], 8)
    both = torch.stack((scale, -zero_point * scale), dim=-1).transpose(0, 1).contiguous()  # (groups, N, 2)
    size = values.shape[1] // scale.shape[1]
    return lambda x: lambda: torch.ops.aten._weight_int4pack_mm(x, packed, size, both)


def gemlite_int4(weights: Weights) -> Product:
    from gemlite.helper import A16Wn

    values, scale, zero_point = four_bits(weights)
    unsigned, zero = ((integers - INT4_MIN).view(torch.uint8) for integers in (values, zero_point))
    layer = A16Wn(device=str(values.device), dtype=torch.bfloat16).from_weights(unsigned, scale, zero, 4, values.shape[1] // scale.shape[1])
    return lambda x: lambda: layer(x)


def gemlite_int8(weights: Weights) -> Product:
    from gemlite.helper import A8W8_INT8_dynamic

    weight = weights.quantized["w8a8"]
    layer = A8W8_INT8_dynamic(device=str(weight.values.device), dtype=torch.bfloat16).from_weights(weight.values, scales=weight.scale)
    return lambda x: lambda: layer(x)


def torchao_int4(weights: Weights) -> Product:
    """It rounds the weight itself, in groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig

    weight = _torchao(weights.floats, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return lambda x: lambda: torch.nn.functional.linear(x, weight)


def torchao_int8(weights: Weights) -> Product:
    """It rounds the weight itself, and leaves the quantization of the activations to torch.compile."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    weight, linear = _torchao(weights.floats, Int8DynamicActivationInt8WeightConfig()), _compiled_linear()
    return lambda x: lambda: linear(x, weight)


def _torchao(floats: Tensor, config: object) -> Tensor:
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(floats.shape[1], floats.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(floats, requires_grad=False)
    quantize_(layer, config)
    return layer.weight


@functools.cache
def _compiled_linear() -> Callable[[Tensor, Tensor], Tensor]:
    """One for all: it would be compiled for each weight otherwise."""
    return torch.compile(torch.nn.functional.linear, dynamic=True)


def bitsandbytes_int4(weights: Weights) -> Product:
    """Its own 4-bit floats (nf4) in blocks of 128."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weights.floats, blocksize=128, quant_type="nf4")
    return lambda x: lambda: matmul_4bit(x, packed.t(), quant_state=state)


def bitsandbytes_int8(weights: Weights) -> Product:
    """LLM.int8() without its outliers in float16, which is W8A8; it computes in float16."""
    from bitsandbytes import functional

    weight = weights.quantized["w8a8"]
    column_maxima = weight.scale.reshape(-1) * 127

    def bind(x: Tensor) -> Callable[[], Tensor]:
        half = x.half()

        def call() -> Tensor:
            integers, row_maxima, _ = functional.int8_vectorwise_quant(half)
            return functional.int8_mm_dequant(functional.int8_linear_matmul(integers, weight.values), row_maxima, column_maxima)

        return call

    return bind


def conch_int4(weights: Weights) -> Product:
    from conch.ops.quantization.gemm import mixed_precision_gemm

    values, scale, zero_point = four_bits(weights)
    packed, transposed, size = gptq(values), scale.t().contiguous(), values.shape[1] // scale.shape[1]
    zero = (zero_point - INT4_MIN).view(torch.uint8).t().contiguous()
    return lambda x: lambda: mixed_precision_gemm(x, packed, transposed, zero, 4, 0, size)


def humming_int4(weights: Weights) -> Product:
    """It rounds the weight itself, in the same groups, with zero points."""
    return _humming(weights.floats, {"dtype": "uint4", "group_size": 128, "has_zero_point": True}, None)


def humming_int8(weights: Weights) -> Product:
    """It rounds the weight itself."""
    return _humming(weights.floats, {"dtype": "int8"}, {"dtype": "int8"})


def _humming(floats: Tensor, weight_config: dict[str, object], input_config: dict[str, object] | None) -> Product:
    from humming.layer import HummingLayer

    n, k = floats.shape
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=weight_config, input_config=input_config, torch_dtype=torch.bfloat16)
    layer = layer.to(floats.device)
    layer.load_from_unquantized(floats)
    layer.transform()
    return lambda x: lambda: layer(x)


def vllm_marlin(weights: Weights) -> Product:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    values, scale, zero_point = four_bits(weights)
    (n, k), groups = values.shape, scale.shape[1]
    packed = ops.gptq_marlin_repack(gptq(values), size_k=k, size_n=n, num_bits=4)
    permuted = marlin_utils.marlin_permute_scales(scale.t().contiguous(), size_k=k, size_n=n, group_size=k // groups)
    zero = marlin_utils.marlin_zero_points((zero_point.int() - INT4_MIN).t().contiguous(), size_k=groups, size_n=n, num_bits=4)
    locks = marlin_utils.marlin_make_workspace_new(values.device)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        atomic = marlin_utils.should_use_atomic_add_reduce(m=len(x), n=n, k=k, device=x.device, dtype=x.dtype)
        how = {"use_atomic_add": atomic, "use_fp32_reduce": True}  # as vLLM's layers call it
        kind, size = scalar_types.uint4, (len(x), n, k)
        return lambda: ops.marlin_gemm(x, None, packed, None, permuted, None, None, zero, locks, kind, *size, **how)

    return bind


def vllm_machete(weights: Weights) -> Product:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    values, scale, zero_point = four_bits(weights)
    kind, size = scalar_types.uint4, values.shape[1] // scale.shape[1]
    packed = ops.machete_prepack_B(gptq(values).t().contiguous().t(), torch.bfloat16, kind, torch.bfloat16)
    scales = scale.t().contiguous()
    zeros = (-(zero_point.bfloat16() - INT4_MIN) * scale).t().contiguous()
    return lambda x: lambda: ops.machete_mm(x, packed, kind, b_group_scales=scales, b_group_zeros=zeros, b_group_size=size)


def vllm_cutlass(weights: Weights) -> Product:
    from vllm import _custom_ops as ops

    weight = weights.quantized["w8a8"]

    def bind(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            integers, scale, _ = ops.scaled_int8_quant(x)
            y: Tensor = ops.cutlass_scaled_mm(integers, weight.values.t(), scale, weight.scale, torch.bfloat16)
            return y

        return call

    return bind


def gptq(values: Tensor) -> Tensor:
    """4-bit integers, int8 (N, K), as GPTQ packs them: int32 (K / 8, N), eight of a column a word, the first in the lowest bits."""
    return pack_int4(values).view(torch.int32).t().contiguous()


CUDA = ("cuda",)

GPU_PEERS: dict[str, Peer] = {
    "vllm cutlass": Peer("w8a8", "int8", ("vllm",), CUDA, vllm_cutlass),
    "gemlite int8": Peer("w8a8", "int8", ("gemlite",), CUDA, gemlite_int8),
    "torchao int8": Peer("w8a8", "int8", ("torchao",), CUDA, torchao_int8),
    "bitsandbytes int8": Peer("w8a8", "int8", ("bitsandbytes",), CUDA, bitsandbytes_int8),
    "humming int8": Peer("w8a8", "int8", ("humming",), CUDA, humming_int8),
    "tinygemm": Peer("w4a16", "float", (), CUDA, tinygemm),
    "vllm marlin": Peer("w4a16", "float", ("vllm",), CUDA, vllm_marlin),
    "vllm machete": Peer("w4a16", "float", ("vllm",), CUDA, vllm_machete),
    "gemlite int4": Peer("w4a16", "float", ("gemlite",), CUDA, gemlite_int4),
    "torchao int4": Peer("w4a16", "float", ("torchao",), CUDA, torchao_int4),
    "bitsandbytes nf4": Peer("w4a16", "float", ("bitsandbytes",), CUDA, bitsandbytes_int4),
    "conch": Peer("w4a16", "float", ("conch",), CUDA, conch_int4),
    "humming int4": Peer("w4a16", "float", ("humming",), CUDA, humming_int4),
}
