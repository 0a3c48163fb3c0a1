"""The plugin for vLLM, which finds it by its entry point (pyproject.toml); docs/vllm.md says how it is used.

On a CPU, compressed-tensors checkpoints run on our own kernels (csrc/), mixtures of experts too; what those do not support is left to vLLM. On a
GPU vLLM's kernels come first. Either can be asked for the other. `--quantization sqplus` gives vLLM, on any device, what `sqplus quantize`
would write for a full-precision checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear import Int8ScaledMMLinearKernel, MPLinearKernel
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import compressed_tensors_moe_w8a8_int8 as vllm_int8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import compressed_tensors_moe_wna16 as vllm_int4
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme, find_scheme
from smoothquant_plus.models.blocks import Decoder, give_memory_back, take_memory_again
from smoothquant_plus.models.checkpoint import Checkpoint, quantization_config, unpack, wrong_layout
from smoothquant_plus.models.families import DEFAULT_ALPHA, SMOOTH, active_pairs, published_alpha
from smoothquant_plus.models.skeleton import declared_family, disk_names, head_paths, is_transposed, open_directory, quantized_linears
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS, read_statistics
from smoothquant_plus.models.transform import Pending, fold_block, quantize_pending, smooth_block, unquantized
from smoothquant_plus.models.vllm_limits import uneven
from smoothquant_plus.progress import note
from smoothquant_plus.runtime.kernels import BACKENDS, cpu
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.workspace import PLAN

log = init_logger("vllm.smoothquant_plus")  # below vLLM's own: others it does not show

# What asks for kernels in vLLM's `--additional-config`: ours, by the name of the backend ('cpu', 'triton'), or its own ('vllm').
KERNELS = "sqplus_kernels"

# What `--quantization` is given, and what may stand beside "quant_method" in the quantization_config of `hf_overrides`.
SQPLUS = "sqplus"
OPTIONS = ("scheme", "activations", "weights", "group_size", "symmetric", "smooth", "alpha")

# The load formats in which a directory with safetensors is read.
LOAD_FORMATS = ("auto", "hf", "safetensors")


def register() -> None:
    """What vLLM calls in each of its processes, in some more than once."""
    for kernels, kernel in ((vllm_kernels._POSSIBLE_INT8_KERNELS, Int8Kernel), (vllm_kernels._POSSIBLE_KERNELS, Int4Kernel)):
        for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
            preferred: list[Any] = kernels[platform]
            if kernel not in preferred:
                preferred.insert(0, kernel)  # register_linear_kernel would put it last, where it is never chosen
    register_quantization_config("compressed-tensors")(OnOurKernels)
    register_quantization_config(SQPLUS)(OnLoad)
    mla_attention.get_and_maybe_dequant_weights = float_weight
    for load_format in LOAD_FORMATS:
        _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = Loader  # register_model_loader would warn in every process


def backend() -> str:
    """Which of our backends runs here."""
    return "cpu" if current_platform.is_cpu() else "triton"


def asked() -> str | None:
    """The kernels that vLLM's additional config asks for, a part of its configuration that its cache of compiled models knows: None, our backend
    of this platform, or 'vllm'. Raises InputError for others."""
    config = get_current_vllm_config_or_none()
    kernels: str | None = None if config is None else config.additional_config.get(KERNELS)
    if kernels not in (None, backend(), "vllm"):
        raise InputError(f"unknown {KERNELS} '{kernels}' in vLLM's additional config: choose {backend()} or vllm.")
    return kernels


def ours_come_first() -> bool:
    """On a CPU, unless vLLM's are asked for; on a GPU where ours are."""
    return (asked() or ("cpu" if current_platform.is_cpu() else "vllm")) != "vllm"


def answer(reason: str | None) -> tuple[bool, str | None]:
    """What vLLM expects of a kernel's `can_implement`: whether ours runs a layer, or `reason` why it cannot. vLLM says nothing of a kernel that has
    another one behind it, so that is logged here, once for each reason. Raises InputError where ours were asked for, and cannot.
    """
    if not ours_come_first():
        return False, f"vLLM's own kernels come first here, unless its additional config says {KERNELS}: {backend()}"
    if reason is not None and asked():
        raise InputError(f"{KERNELS}: {asked()} cannot run this model: {reason}.")
    if reason is not None:
        log.warning_once("left to vLLM's own kernels: %s", reason)
    return reason is None, reason


def unsupported(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """None, or why our kernels cannot run a layer of this `shape` (N, K) here."""
    (kernels,) = BACKENDS[backend()]
    reason: str | None = kernels.supports(scheme, torch.device(current_platform.device_type), shape)
    return reason


class Int8Kernel(Int8ScaledMMLinearKernel):
    """W8A8 linear layers on our kernels."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return answer(unsupported(find_scheme("w8a8"), (1, 1)) if c.input_symmetric else "asymmetric activations")

    def process_weights_after_loading(self, layer: Any) -> None:
        values, scale, input_scale, *_ = self._get_layer_params(layer)
        if not self.config.is_channelwise:  # a scale for each of the layers that were fused
            scale = scale.repeat_interleave(torch.tensor(layer.logical_widths, device=scale.device))[:, None]
        scheme = find_scheme("w8a8", "static" if self.config.is_static_input_scheme else "token")
        weight = QuantizedWeight(values.data, scale.data, scheme.weights)
        keep(layer, weight, scheme, None if input_scale is None else input_scale.data)
        release(layer, self.layer_param_names)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.sqplus.multiply(x, bias)
        return y


class Int4Kernel(MPLinearKernel):
    """W4A16 linear layers on our kernels."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        channels, rows = c.partition_weight_shape
        if c.weight_type != (scalar_types.uint4 if c.zero_points else scalar_types.uint4b8):
            return answer(f"weights of type {c.weight_type}")
        if c.group_size not in GROUP_SIZES or channels % c.group_size:
            return answer(f"groups of {c.group_size} along {channels} input channels")
        return answer(unsupported(find_scheme("w4a16"), (rows, channels)))

    def process_weights_after_loading(self, layer: Any) -> None:
        sizes = layer.output_partition_sizes
        if self.config.zero_points and (len(sizes) > 1 or layer.tp_size > 1) and any(size % 8 for size in sizes):
            # vLLM cuts numbers of eight zero points each, and rounds down.
            raise InputError(
                f"{layer.prefix}: zero points of {sizes} output channels cannot be put together by eights: use symmetric, or fewer processes."
            )
        packed, scale, zero_point = self._get_weight_params(layer)
        rows_first = packed.output_dim == 0  # as in compressed-tensors; the layers of AWQ and GPTQ are transposed
        stored = [packed, scale, *([zero_point] if self.config.zero_points else [])]
        tensors = [(tensor.data if rows_first else tensor.data.t()).contiguous() for tensor in stored]
        scheme = find_scheme("w4a16", group_size=self.config.group_size, symmetric=not self.config.zero_points)
        keep(layer, unpack(tensors[0], tensors[1], tensors[2] if self.config.zero_points else None, scheme.weights), scheme)
        release(layer, (self.w_q_name, self.w_s_name, self.w_zp_name))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.sqplus.multiply(x, bias)
        return y


def keep(layer: nn.Module, weight: QuantizedWeight, scheme: Scheme, input_scale: Tensor | None = None) -> None:
    """Give `layer` its weight as our kernels want it."""
    layer.sqplus = QuantLinear(weight, scheme, input_scale=input_scale, backend=backend())


def float_weight(layer: Any, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K) of a quantized linear in floats, which DeepSeek's attention asks for.

    vLLM multiplies the layer with ones to find it; a static scale would round and clip those, and every token after the prompt be wrong.
    """
    kept = getattr(layer, "sqplus", None)
    if kept is None or not kept.scheme.static:
        weight: Tensor = get_and_maybe_dequant_weights(layer, out_dtype)
        return weight
    ones = torch.eye(kept.in_features, dtype=out_dtype, device=kept.prepared[0].device)
    (kernels,) = BACKENDS[kept.backend]
    return kernels.linear(ones, kept.prepared, find_scheme("w8a8"), None, None).t()


def release(layer: nn.Module, names: Any) -> None:
    """Let the memory of the parameters `names` go. They stay as empty ones: vLLM asks for a weight's device."""
    for name in names:
        if getattr(layer, name or "", None) is not None:
            old = getattr(layer, name)
            setattr(layer, name, nn.Parameter(old.new_empty(0), requires_grad=False))


class OnOurKernels(CompressedTensorsConfig):
    """vLLM's reading of compressed-tensors checkpoints, with experts on our kernels, whose own need a CPU with AMX, or a GPU; and a head that is
    not quantized."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        on_cpu = current_platform.is_cpu()
        if isinstance(layer, RoutedExperts) and on_cpu:
            self._add_fused_moe_to_target_scheme_map()
            declared = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_gate_proj_name}")
            if declared is not None:
                weights, inputs = declared["weights"], declared["input_activations"]
                reason = unsupported_experts(layer, weights, inputs)
                if answer(reason and f"experts: {reason}")[0]:
                    return (Int8Experts if weights.num_bits == 8 else Int4Experts)(weights, inputs, layer.moe_config)
        method = super().get_quant_method(layer, prefix)
        if method is None and isinstance(layer, ParallelLMHead) and on_cpu and ours_come_first() and cpu.multiplies_bfloat16():
            return Head()
        return method


class Head(UnquantizedEmbeddingMethod):
    """A head in bfloat16, which a token reads all of, on our product: it reads memory faster than the one that vLLM takes."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight.dtype != torch.bfloat16:
            super().process_weights_after_loading(layer)
            return
        packed, channels = cpu.prepare_bfloat16(layer.weight.data), len(layer.weight)
        layer.cpu_linear = lambda x, weight, bias: cpu.linear_bfloat16(x, packed, bias, channels)


ACTIVATIONS: dict[Any, Any] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


def unsupported_experts(layer: Any, weights: Any, inputs: Any) -> str | None:
    """None, or why our kernels cannot run experts with these compressed-tensors arguments."""
    if weights.type != "int" or (not weights.symmetric and weights.num_bits == 8):
        return "they are not 8-bit symmetric or 4-bit integers"
    if (weights.num_bits, weights.strategy, inputs is None) not in ((8, "channel", False), (4, "group", True)):
        return "8 bits go with a scale per channel and quantized activations, 4 bits with groups and activations as they are"
    if inputs is not None and not (
        inputs.num_bits == 8 and inputs.symmetric and inputs.strategy == ("token" if inputs.dynamic else "tensor")
    ):
        return "activations are per token and dynamic, or per tensor and static"
    if weights.num_bits == 4 and weights.group_size not in GROUP_SIZES:
        return f"groups of {weights.group_size}"
    moe = layer.moe_config
    if layer.activation not in ACTIVATIONS or moe.has_bias or layer.swiglu_limit is not None or layer.apply_router_weight_on_input:
        return f"they compute something else than down(act(gate) * up), or act is {layer.activation}"
    if moe.moe_parallel_config.use_ep:
        return "they are spread over processes (expert parallelism)"
    return cpu.missing()


class Experts(FusedMoEMethodBase):
    """down(act(gate) * up) for each expert, over the tokens that were routed to it.

    What the kernels' `prepare` made of all experts' gate and up lies in the layer's buffers `gate_up_0`, `gate_up_1`, ..., and of down in
    `down_0`, ..., each stacked (experts, ...); the static input scales in `gate_up_input_scale` and `down_input_scale`, float32 (experts, 1).
    """

    scheme: Scheme

    def weights_of(self, layer: Any, name: str) -> Iterable[QuantizedWeight]:
        """The weight of each expert, of vLLM's parameters that begin with `name`: 'w13' (gate and up, one below the other) or 'w2' (down)."""
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        for ours, theirs in (("gate_up", "w13"), ("down", "w2")):
            stacked: list[Tensor] = []
            for expert, weight in enumerate(self.weights_of(layer, theirs)):
                for index, tensor in enumerate(cpu.prepare(weight)):
                    if expert == 0:
                        stacked.append(tensor.new_empty(layer.local_num_experts, *tensor.shape))
                    stacked[index][expert] = tensor
            for index, tensor in enumerate(stacked):
                layer.register_buffer(f"{ours}_{index}", tensor)  # what is not persistent, vLLM puts back when it reloads weights
            input_scale = layer._parameters.get(f"{theirs}_input_scale")
            layer.register_buffer(f"{ours}_input_scale", None if input_scale is None else input_scale.data[:, None])
            release(layer, [name for name, _ in layer.named_parameters(recurse=False) if name.startswith(f"{theirs}_")])

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any, shared_experts_input: Any
    ) -> Tensor:
        gate_up, down = (
            [tensor for name, tensor in layer.named_buffers(recurse=False) if name.rpartition("_")[0] == ours and name[-1].isdecimal()]
            for ours in ("gate_up", "down")
        )
        scales = layer.gate_up_input_scale, layer.down_input_scale
        kind = self.scheme.name if self.scheme.inputs is None else "static" if self.scheme.static else "token"
        return run_experts(x, topk_weights, topk_ids, gate_up, down, *scales, kind, layer.activation.value)


@torch.library.custom_op("smoothquant_plus::cpu_experts", mutates_args=())
def run_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    gate_up_input_scale: Tensor | None,
    down_input_scale: Tensor | None,
    kind: str,
    activation: str,
) -> Tensor:
    """For each token the weighted sum of its experts, (tokens, hidden) in x's dtype; an op of its own, for how many tokens an expert has is
    known when it runs.

    x (tokens, hidden); `topk_weights` float and `topk_ids` int (tokens, experts per token); `gate_up` and `down` as `Experts` keeps them; the
    input scales float32 (experts, 1), None for dynamic activations; `kind` one of 'token', 'static' and 'w4a16'.
    """
    scheme = find_scheme("w4a16") if kind == "w4a16" else find_scheme("w8a8", kind)
    act = ACTIVATIONS[MoEActivation(activation)]

    def product(x: Tensor, prepared: list[Tensor], input_scale: Tensor | None, expert: int) -> Tensor:
        scale = None if input_scale is None else input_scale[expert]
        return cpu.linear(x, tuple(tensor[expert] for tensor in prepared), scheme, scale, None)

    output = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, place = torch.where(topk_ids == expert)
        gate, up = product(x[token], gate_up, gate_up_input_scale, expert).chunk(2, dim=-1)
        y = product(act(gate) * up, down, down_input_scale, expert) * topk_weights[token, place, None]
        output.index_add_(0, token, y.to(output.dtype))
    return output


@run_experts.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


class Int8Experts(Experts, vllm_int8.CompressedTensorsW8A8Int8MoEMethod):
    """W8A8 experts; the parameters are vLLM's, and for static activations the input scales that it does not have."""

    def __init__(self, weights: Any, inputs: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # past vLLM's choice of a kernel
        self.weight_quant, self.input_quant, self.static_input_scales = weights, inputs, False
        self.scheme = find_scheme("w8a8", "token" if inputs.dynamic else "static")

    def create_weights(self, layer: Any, num_experts: int, *args: Any, **attributes: Any) -> None:
        super().create_weights(layer, num_experts, *args, **attributes)
        for name in ("w13_input_scale", "w2_input_scale") if self.scheme.static else ():
            delattr(layer, name)
            scale = nn.Parameter(torch.ones(num_experts, dtype=torch.float32), requires_grad=False)
            layer.register_parameter(name, scale)
            set_weight_attrs(scale, {"weight_loader": attributes["weight_loader"], "quant_method": "tensor"})

    def weights_of(self, layer: Any, name: str) -> Iterable[QuantizedWeight]:
        values, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data
        return (QuantizedWeight(value, scale, self.scheme.weights) for value, scale in zip(values, scales, strict=True))


class Int4Experts(Experts, vllm_int4.CompressedTensorsWNA16MoEMethod):
    """W4A16 experts, in vLLM's parameters."""

    def __init__(self, weights: Any, inputs: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # past vLLM's choice of a kernel
        self.weight_quant, self.input_quant = weights, inputs
        self.symmetric, self.num_bits, self.strategy = weights.symmetric, weights.num_bits, weights.strategy
        self.packed_factor, self.group_size = Fraction(32, weights.num_bits), weights.group_size
        self.is_marlin = self.is_transposed = False
        self.scheme = find_scheme("w4a16", group_size=weights.group_size, symmetric=weights.symmetric)

    def weights_of(self, layer: Any, name: str) -> Iterable[QuantizedWeight]:
        packed, scales = getattr(layer, f"{name}_weight_packed").data, getattr(layer, f"{name}_weight_scale").data
        zero_points = [None] * len(packed) if self.symmetric else getattr(layer, f"{name}_weight_zero_point").data
        return (unpack(*tensors, self.scheme.weights) for tensors in zip(packed, scales, zero_points, strict=True))


class OnLoad(OnOurKernels):
    """`--quantization sqplus`: what config.json of the quantized checkpoint would say. It is known when the model's directory is."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__({}, [], "")
        self.options = dict(options or {})

    def get_name(self) -> Any:
        return SQPLUS

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        load_format = get_current_vllm_config().load_config.load_format
        if load_format not in (*LOAD_FORMATS, "dummy"):
            raise InputError(
                f"--load-format {load_format} does not quantize while loading: --quantization {SQPLUS} goes with auto and safetensors."
            )
        return super().get_quant_method(layer, prefix)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OnLoad:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        known = CompressedTensorsConfig.from_config(Quantizer(Path(model_name), self.options).config())
        self.target_scheme_map, self.ignore = known.target_scheme_map, known.ignore
        self.quant_format, self.config = known.quant_format, known.config


class Quantizer:
    """The full-precision checkpoint in `directory` as `sqplus quantize` would write it, and with its numbers: one linear in memory at a time.

    Smoothing comes from files beside it: the factors of a run of `quantize` (smoothing.safetensors), or else the maxima that `calibrate`
    measured (statistics.safetensors), with an alpha. Without them weights are rounded to nearest; static activations need the maxima.
    Raises InputError as `quantize` does, and for options that it has and that cannot be had while loading.
    """

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        given = {name: value for name, value in options.items() if name != "quant_method"}
        for name in given:
            if name not in OPTIONS:
                raise InputError(
                    f"unknown option '{name}' of --quantization {SQPLUS}: there are {', '.join(OPTIONS)}.{did_you_mean(name, OPTIONS)}"
                )
        smooth, alpha = given.pop("smooth", None), given.pop("alpha", None)
        self.scheme = find_scheme(given.pop("scheme", "w4a16"), **given)
        if self.scheme.inputs is not None and self.scheme.inputs.dynamic and self.scheme.inputs.strategy == "tensor":
            raise InputError("vLLM has no dynamic per-tensor activations: use 'token' or 'static'.")
        self.decoder = Decoder(Checkpoint(directory), declared=declared_family(directory))
        if found := uneven(8, packed=True)(self.decoder, self.scheme):
            raise InputError(f"vLLM's zero points are those of eight output channels together, and {found}: use symmetric.")
        self.factors: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.smooth, self.alpha = self._choose(smooth, alpha)

    def _choose(self, smooth: str | None, alpha: float | None) -> tuple[str, float | None]:
        """Which pairs are smoothed, and the alpha if the factors are not known; reads what lies beside the checkpoint."""
        directory = self.decoder.checkpoint.directory
        if smooth is not None and smooth not in SMOOTH:
            raise InputError(f"unknown smooth '{smooth}': choose one of {', '.join(SMOOTH)}.{did_you_mean(smooth, SMOOTH)}")
        measured = (directory / STATISTICS).is_file()
        if self.scheme.static and not measured:
            raise InputError(f"static activations need {directory / STATISTICS}: run `sqplus calibrate` first, or use activations 'token'.")
        if measured:
            self.statistics = read_statistics(directory / STATISTICS, self.decoder)
        if smooth != "none" and alpha is None and (directory / SMOOTHING).is_file():
            if smooth is not None:
                raise InputError(f"{directory / SMOOTHING} says what is smoothed: leave out smooth, or give an alpha too.")
            self.factors = read_factors(directory)
            return "all", None
        if smooth == "none" or not measured:
            if smooth in SMOOTH[1:] or alpha is not None:
                raise InputError(f"smoothing needs {directory / STATISTICS}: run `sqplus calibrate` first.")
            return "none", None
        published = published_alpha(self.decoder.family, self.decoder.config)
        alpha = float(alpha if alpha is not None else DEFAULT_ALPHA if published is None else published)
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha {alpha:g} is out of range: it must be between 0 and 1.")
        return smooth or "norms", alpha

    @property
    def smoothed(self) -> bool:
        return bool(self.factors) or self.alpha is not None

    def __str__(self) -> str:
        if self.factors:
            how = f"smoothed with the factors of {SMOOTHING}"
        elif self.alpha is not None:
            how = f"smoothed ({self.smooth}) with alpha {self.alpha:g}"
        else:
            how = f"rounded to nearest, not smoothed (no {SMOOTHING} and no {STATISTICS} with anything to smooth beside the model, or smooth is none)"
        return f"{self.decoder.checkpoint.directory} as {self.scheme.name}, {how}"

    def config(self) -> dict[str, Any]:
        """The quantization_config of the quantized checkpoint."""
        heads = head_paths(self.decoder.model, self.decoder.family)
        return quantization_config(self.scheme, unquantized(self.decoder, self.scheme), heads)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and content of every tensor of the quantized checkpoint."""
        decoder = self.decoder
        for names in (*decoder.outside, sorted(decoder.head_names)):
            for name in names:
                yield name, decoder.checkpoint.read(name, finite=name in decoder.parameter_names)
        unused = set(self.factors)
        for index in range(len(decoder)):
            yield from self._block(index, unused)
        for name in unused:
            raise InputError(
                f"'{name}' in {decoder.checkpoint.directory / SMOOTHING} is not of a norm or linear that can be smoothed here."
            )

    @torch.no_grad()
    def _block(self, index: int, unused: set[str]) -> Iterator[tuple[str, Tensor]]:
        decoder, path = self.decoder, self.decoder.path(index)
        maxima = {name: self.statistics[f"{path}.{name}"] for name in decoder.linears(index) if self.statistics}
        pending: Pending = {}
        with decoder.block(index, linears=False) as block:
            if self.factors:
                unused -= fold_block(decoder, index, block, self.factors, maxima, pending)
            elif self.alpha is not None:
                pairs = list(active_pairs(decoder.family, decoder.config, self.smooth))
                smooth_block(decoder, index, block, pairs, maxima, self.alpha, pending)
            yield from quantize_pending(decoder, index, block, self.scheme, maxima, pending)


def read_factors(directory: Path) -> dict[str, Tensor]:
    """The smoothing factors beside a model, {path of the source: s}."""
    try:
        return load_file(directory / SMOOTHING)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{directory / SMOOTHING} is damaged: {error}") from error


class Loader(DefaultModelLoader):
    """vLLM's loader, which takes the quantized tensors of `--quantization sqplus`, and refuses damaged checkpoints of ours by itself."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        quantized = model_config.quantization in (SQPLUS, "compressed-tensors")
        if quantized:
            if vllm_config.lora_config is not None:
                refuse_smoothed(model_config)
            if isinstance(vllm_config.additional_config, dict):
                # For vLLM's cache of compiled models, which does not know this package, nor whether its kernels are there.
                vllm_config.additional_config.setdefault(
                    "sqplus", f"{version('smoothquant-plus')}, {unsupported(find_scheme('w8a8'), (1, 1))}"
                )
            give_memory_back()  # each layer's repacking leaves as much behind as the layer has
        try:
            return super().load_model(vllm_config, model_config, prefix)
        finally:
            if quantized:
                take_memory_again()

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self.ours = is_checked(model_config)
        if self.ours:
            self.enable_weights_track = True  # a parameter that no tensor was loaded into is an error
        super().load_weights(model, model_config)

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        unread = {name for name, _ in model.named_parameters() if name.endswith("weight_shape")} if self.ours else set()
        super().track_weights_loading(model, None if loaded_weights is None else loaded_weights | unread, quantized)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        ours = is_checked(model_config)  # `reload_weights` calls nothing else, and may name another directory
        if model_config.quantization == SQPLUS:
            self.counter_before_loading_weights = time.perf_counter()
            quantizer = quantizer_of(model_config)
            note(f"{SQPLUS}: {quantizer}")
            tensors = quantizer.tensors()
        else:
            tensors = super().get_all_weights(model_config, model)
        for name, tensor in tensors:
            if ours and name.endswith("weight_shape"):
                continue  # is_ours has read it, no kernel does, and the loader of BLOOM fails on it
            if ours and name.endswith(("weight_scale", "input_scale")) and not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise InputError(f"'{name}' in {model_config.model} has scales that are not positive numbers: the checkpoint is damaged.")
            yield name, tensor


def quantizer_of(model_config: Any) -> Quantizer:
    return Quantizer(Path(model_config.model), getattr(model_config.hf_config, "quantization_config", None) or {})


def refuse_smoothed(model_config: Any) -> None:
    """Raises InputError for a model that is smoothed, on load or before: an adapter (LoRA) was trained on the inputs of the original's layers, which
    are others here."""
    directory = Path(model_config.model)
    if model_config.quantization == SQPLUS:
        smoothed = quantizer_of(model_config).smoothed
    else:
        smoothed = (directory / PLAN).is_file() and bool(read_factors(directory))
    if smoothed:
        raise InputError(
            f"{directory} is smoothed, and an adapter's layers are for the inputs of the original model: quantize with smooth 'none' for LoRA."
        )


def is_checked(model_config: Any) -> bool:
    """Whether this loader looks for damage in what it loads. Raises InputError for what is seen from the headers."""
    return model_config.quantization == SQPLUS or is_ours(Path(model_config.model))


def is_ours(directory: Path) -> bool:
    """Whether `directory` was written by `quantize`; other checkpoints are left to vLLM.

    Raises InputError, naming the tensors, for one of ours that is incomplete or whose tensors are not what its config.json says: vLLM serves
    that as if nothing were wrong. Only headers are read.
    """
    if not (directory / PLAN).is_file():
        return False
    checkpoint, family, model, scheme = open_directory(directory)
    if scheme is None:
        return False
    names = disk_names(model, checkpoint, family, scheme)
    problems = []
    for path, (linear, own) in quantized_linears(model, family, scheme).items():
        transposed = is_transposed(family, f"{path}.weight", linear.weight)
        disk = names[f"{path}.weight"].removesuffix(".weight")
        problems += wrong_layout(checkpoint, disk, own, linear.out_features, linear.in_features, transposed)
    if problems:
        raise InputError(f"{directory} is damaged or incomplete: {'; '.join(problems[:3])}. Copy it again, or `sqplus verify` it.")
    return True
