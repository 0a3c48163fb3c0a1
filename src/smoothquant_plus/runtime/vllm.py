"""The plugin for vLLM, which finds it by its entry point (pyproject.toml).

On a CPU, compressed-tensors checkpoints run on our own kernels (csrc/), which come before vLLM's; what they do not support is left to vLLM, and
so is every other device.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear import Int8ScaledMMLinearKernel, MPLinearKernel
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme, find_scheme
from smoothquant_plus.models.checkpoint import unpack
from smoothquant_plus.runtime.kernels import cpu
from smoothquant_plus.runtime.linear import QuantLinear

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
BACKEND = "cpu"


def register() -> None:
    """What vLLM calls in each of its processes, in some more than once."""
    for kernels, kernel in ((vllm_kernels._POSSIBLE_INT8_KERNELS, Int8Kernel), (vllm_kernels._POSSIBLE_KERNELS, Int4Kernel)):
        preferred: list[Any] = kernels[PlatformEnum.CPU]
        if kernel not in preferred:
            preferred.insert(0, kernel)  # register_linear_kernel would put it last, where it is never chosen


def declined(reason: str | None) -> tuple[bool, str | None]:
    """What vLLM expects of a kernel's `can_implement`. It says nothing of a kernel that has another one behind it, so that is logged here."""
    if reason is not None:
        log.info("left to vLLM's own kernels: %s", reason)
    return reason is None, reason


class Int8Kernel(Int8ScaledMMLinearKernel):
    """W8A8 linear layers on our kernels."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return declined(cpu.missing() if c.input_symmetric else "asymmetric activations")

    def process_weights_after_loading(self, layer: Any) -> None:
        values, scale, input_scale, *_ = self._get_layer_params(layer)
        if not self.config.is_channelwise:  # a scale for each of the layers that were fused
            scale = scale.repeat_interleave(torch.tensor(layer.logical_widths))[:, None]
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
            return declined(f"weights of type {c.weight_type}")
        if c.group_size not in GROUP_SIZES or channels % c.group_size:
            return declined(f"groups of {c.group_size} along {channels} input channels")
        return declined(cpu.supports(find_scheme("w4a16"), CPU, (rows, channels)))

    def process_weights_after_loading(self, layer: Any) -> None:
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
    layer.sqplus = QuantLinear(weight, scheme, input_scale=input_scale, backend=BACKEND)


def release(layer: nn.Module, names: Any) -> None:
    """Let the memory of the parameters `names` go. They stay as empty ones: vLLM asks for a weight's device."""
    for name in names:
        if getattr(layer, name or "", None) is not None:
            old = getattr(layer, name)
            setattr(layer, name, nn.Parameter(old.new_empty(0), requires_grad=False))
