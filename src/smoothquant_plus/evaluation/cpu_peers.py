"""What other libraries multiply the same weights with on CPUs: a short function each, and a row in `CPU_PEERS`. All use as many threads as torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.ggml import ggml
from smoothquant_plus.evaluation.peers import BF16, Peer, Product, Weights, four_bits
from smoothquant_plus.method.integers import INT4_MIN, pack_int4, quantize_input
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.runtime.kernels.torch_int8 import cpu_method


def torch_bf16(weights: Weights) -> Product:
    return lambda x: lambda: torch.nn.functional.linear(x, weights.floats)


def torch_bf16_prepacked(weights: Weights) -> Product:
    """oneDNN's product as torch.compile calls it, on a weight in the layout that oneDNN chooses for so many tokens."""

    def bind(x: Tensor) -> Callable[[], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weights.floats, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return bind


def torch_int_mm(weights: Weights) -> Product:
    """The integer product that torch has everywhere, and eager code around it."""
    weight, inputs = weights.quantized["w8a8"], SCHEMES["w8a8"].inputs
    assert inputs is not None
    transposed, weight_scale = weight.values.t(), weight.scale.reshape(-1)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            integers, scale = quantize_input(x, inputs)
            return torch._int_mm(integers, transposed).float().mul_(scale).mul_(weight_scale).bfloat16()

        return call

    return bind


def torch_onednn(weights: Weights) -> Product:
    """oneDNN's integer product of unsigned activations (zero point 128), and eager code around it."""
    if cpu_method() != "unsigned":  # see there; without VNNI a product takes seconds, too
        raise InputError("this processor has no VNNI, without which the product saturates")
    weight, inputs = weights.quantized["w8a8"], SCHEMES["w8a8"].inputs
    assert inputs is not None
    packed, weight_scale = torch.ops.onednn.qlinear_prepack(weight.values, None), weight.scale.reshape(-1)
    zeros = torch.zeros(len(weight_scale), dtype=torch.int32)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            integers, scale = quantize_input(x, inputs)
            unsigned = integers.view(torch.uint8).bitwise_xor(128)  # 128 more, as the bits of two's complement have it
            product = torch.ops.onednn.qlinear_pointwise
            y = product(unsigned, 1.0, 128, packed, weight_scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            return y.mul_(scale).bfloat16()

        return call

    return bind


def torch_int4pack(weights: Weights) -> Product:
    """torch's 4-bit product: (q - 8) * scale + zero with unsigned q."""
    values, scale, zero_point = four_bits(weights)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((values - INT4_MIN).int(), 1)
    both = torch.stack((scale, -zero_point * scale), dim=-1).transpose(0, 1).contiguous()  # (groups, N, 2)
    size = values.shape[1] // scale.shape[1]
    return lambda x: lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, size, both)


def onnxruntime_int8(weights: Weights) -> Product:
    """Activations unsigned with one scale and zero point for all tokens, which is what the operator has."""
    from onnx import TensorProto, helper, numpy_helper

    if cpu_method() != "unsigned":
        raise InputError("this processor has no VNNI, without which the product saturates")
    weight = weights.quantized["w8a8"]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["integers", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["integers", "weight", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "weight_scale"], ["scales"]),
        helper.make_node("Mul", ["floats", "scales"], ["y"]),
    ]
    constants = {"weight": weight.values.t().contiguous(), "weight_scale": weight.scale.reshape(-1)}
    return _onnx(
        nodes,
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
        (len(weight.values), weight.values.shape[1]),
    )


def onnxruntime_int4(accuracy_level: int) -> Callable[[Weights], Product]:
    """`accuracy_level` 0: activations as they are; 4: as int8, in blocks."""

    def build(weights: Weights) -> Product:
        from onnx import helper, numpy_helper

        values, scale, zero_point = four_bits(weights)
        (channels, columns), groups = values.shape, scale.shape[1]
        if groups % 2:  # a row's zero points end at a whole byte
            zero_point = torch.nn.functional.pad(zero_point, (0, 1))
        attributes = {"N": channels, "K": columns, "bits": 4, "block_size": columns // groups, "accuracy_level": accuracy_level}
        node = helper.make_node("MatMulNBits", ["x", "weight", "scale", "zero"], ["y"], domain="com.microsoft", **attributes)
        constants = {"weight": pack_int4(values).reshape(channels, groups, -1), "scale": scale.float().reshape(-1)}
        constants["zero"] = pack_int4(zero_point).reshape(-1)
        tensors = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()]
        return _onnx([node], tensors, (len(values), values.shape[1]))

    return build


def _onnx(nodes: list[Any], constants: list[Any], shape: tuple[int, int]) -> Product:
    """The model of these nodes, with a weight of `shape` (N, K), from x float32 (M, K) to y float32 (M, N)."""
    import onnxruntime
    from onnx import TensorProto, helper

    channels, columns = shape
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size]) for name, size in (("x", columns), ("y", channels))]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would otherwise wait for work at full speed, while others are measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], Tensor]:
        inputs = {"x": x.float().numpy()}
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    return bind


def openvino_int8(weights: Weights) -> Product:
    import openvino.opset13 as ops

    weight = weights.quantized["w8a8"]
    integers = ops.convert(ops.constant(weight.values.numpy()), "f16")
    return _openvino(ops.multiply(integers, ops.constant(weight.scale.half().numpy())), (len(weight.values), weight.values.shape[1]))


def openvino_int4(weights: Weights) -> Product:
    import openvino
    import openvino.opset13 as ops

    values, scale, zero_point = four_bits(weights)
    shape = [len(values), scale.shape[1], values.shape[1] // scale.shape[1]]  # (N, groups, group size)

    def unsigned(integers: Tensor, shape: list[int]) -> Any:
        packed = pack_int4(torch.nn.functional.pad(integers.reshape(-1), (0, integers.numel() % 2)))
        owner = openvino.Tensor(openvino.Type.u4, shape)  # one that is made of an array does not keep it
        owner.data.reshape(-1)[:] = packed.numpy()
        return ops.convert(ops.constant(owner), "f16")

    shifted = ops.subtract(unsigned(values, shape), unsigned(zero_point, [*shape[:2], 1]))
    scaled = ops.multiply(shifted, ops.constant(scale.half()[..., None].numpy()))
    flat = ops.reshape(scaled, ops.constant([shape[0], shape[1] * shape[2]]), False)
    return _openvino(flat, (len(values), values.shape[1]))


def _openvino(weight_node: Any, shape: tuple[int, int]) -> Product:
    """The model that multiplies with `weight_node`, float16 of `shape` (N, K), from x float32 (M, K) to y float32 (M, N). Its CPU plugin
    sees integers behind the node; where it has kernels for that it quantizes the activations to int8, in groups, and elsewhere uses them as
    they are."""
    import openvino
    import openvino.opset13 as ops

    channels, columns = shape
    x = ops.parameter([-1, columns], openvino.Type.f32)
    model = openvino.Model([ops.matmul(x, ops.convert(weight_node, "f32"), False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        request = compiled.create_infer_request()
        floats, y = x.float().numpy(), torch.empty(len(x), channels)
        request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))

        def call() -> Tensor:
            request.infer([floats], share_inputs=True)
            return y

        return call

    return bind


def _vllm_operations() -> Any:
    """vLLM's operations, of the library that it has for this processor: another one's ends the process at an instruction that is not there."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.ops._C


def vllm_int8(weights: Weights) -> Product:
    """The product that vLLM takes where there is AMX, which has a path for VNNI; it quantizes per token."""
    if cpu_method() != "unsigned":
        raise InputError("this processor has no VNNI, without which the product saturates")
    ops = _vllm_operations()
    weight = weights.quantized["w8a8"]
    packed, scale = ops.convert_weight_packed(weight.values), weight.scale.reshape(-1)
    return lambda x: lambda: ops.int8_scaled_mm_with_quant(x, packed, scale, None, torch.bfloat16, True)


def vllm_onednn(weights: Weights) -> Product:
    """The product that vLLM takes elsewhere, quantized per token by its own operation."""
    if cpu_method() != "unsigned":
        raise InputError("this processor has no VNNI, without which the product saturates")
    ops = _vllm_operations()
    weight = weights.quantized["w8a8"]
    values, weight_scale = weight.values.t(), weight.scale.reshape(-1)  # which the handler reads, and does not keep
    handler = torch.tensor(ops.create_onednn_scaled_mm_handler(values, weight_scale, torch.bfloat16, True, False, 32))
    channels = values.shape[1]

    def bind(x: Tensor) -> Callable[[], Tensor]:
        def call(kept: object = (values, weight_scale)) -> Tensor:
            integers, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)
            ops.dynamic_scaled_int8_quant(integers, x, scale, None)
            y = x.new_empty(len(x), channels)
            ops.onednn_scaled_mm(y, integers, scale, None, None, None, handler)
            return y

        return call

    return bind


def vllm_int4(weights: Weights) -> Product:
    """vLLM's 4-bit product of bfloat16 activations: blocks of 16 channels, packed along the output channels. With AMX where vLLM takes that."""
    ops, instructions = _vllm_operations(), "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    values, scale, zero_point = four_bits(weights)
    packed = pack_int4(values.t().contiguous()).view(torch.int32)  # (K, N / 8)
    blocks = packed.reshape(len(packed), -1, 2).transpose(0, 1).reshape(-1, 2 * len(packed)).contiguous()
    zeros, scales = pack_int4(zero_point.t().contiguous()).view(torch.int32), scale.t().contiguous()

    def bind(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            y = x.new_empty(len(x), len(values))
            ops.cpu_gemm_wna16(x, blocks, y, scales, zeros, None, 8, instructions)
            return y

        return call

    return bind


CPU_PEERS: dict[str, Peer] = {
    BF16: Peer("bf16", "float", (), ("cpu", "cuda"), torch_bf16),
    "torch bf16 prepacked": Peer("bf16", "float", (), ("cpu",), torch_bf16_prepacked),
    "torch _int_mm": Peer("w8a8", "int8", (), ("cpu", "cuda"), torch_int_mm),
    "torch onednn": Peer("w8a8", "int8", (), ("cpu",), torch_onednn),
    "onnxruntime": Peer("w8a8", "int8", ("onnxruntime", "onnx"), ("cpu",), onnxruntime_int8),
    "openvino i8": Peer("w8a8", "int8", ("openvino",), ("cpu",), openvino_int8),
    "vllm sgl": Peer("w8a8", "int8", ("vllm",), ("cpu",), vllm_int8),
    "vllm onednn": Peer("w8a8", "int8", ("vllm",), ("cpu",), vllm_onednn),
    "ggml Q8_0": Peer("w8a8", "int8", ("llama_cpp",), ("cpu",), ggml("Q8_0")),
    "torch int4pack": Peer("w4a16", "float", (), ("cpu",), torch_int4pack),
    "onnxruntime level 0": Peer("w4a16", "float", ("onnxruntime", "onnx"), ("cpu",), onnxruntime_int4(0)),
    "vllm wna16": Peer("w4a16", "float", ("vllm",), ("cpu",), vllm_int4),
    # These round activations too.
    "onnxruntime level 4": Peer("w4a8", "int8", ("onnxruntime", "onnx"), ("cpu",), onnxruntime_int4(4)),
    "openvino u4": Peer("w4a8", "int8", ("openvino",), ("cpu",), openvino_int4),
    "ggml Q4_0": Peer("w4a8", "int8", ("llama_cpp",), ("cpu",), ggml("Q4_0")),
    "ggml Q4_K": Peer("w4a8", "int8", ("llama_cpp",), ("cpu",), ggml("Q4_K")),
}
