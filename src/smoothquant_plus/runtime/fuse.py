"""W8A8 blocks like Llama's whose norms and SiLU hand integers on: the operations of kernels/triton/fused.py in place of the separate ones.

In a block, instead of 11 kernels between the products (two norms, a sum, SiLU, a product, and six quantizations), there are three. Results are
the same but for the order in which a norm adds up, and the last bits of exp and the inverse square root, before anything is rounded.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus.runtime.linear import QuantizedInput, QuantLinear

# Blocks of transformers that are just two RMSNorms, attention that does nothing with its input but multiply it, and a gated MLP.
LIKE_LLAMA = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class FusedNorm(nn.Module):
    """RMSNorm and the quantization of what it gives."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> QuantizedInput:
        values, scale = torch.ops.smoothquant_plus.triton_norm_quantize(x, self.weight, None, self.variance_epsilon, False)
        return QuantizedInput(values, scale, x.dtype)

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[QuantizedInput, Tensor]:
        """Of x + residual, which is returned too."""
        norm = torch.ops.smoothquant_plus.triton_add_norm_quantize
        total, values, scale = norm(x, residual, self.weight, None, self.variance_epsilon, False)
        return QuantizedInput(values, scale, x.dtype), total


class FusedMLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: QuantizedInput) -> Tensor:
        values, scale = torch.ops.smoothquant_plus.triton_silu_quantize(self.gate_proj(x), self.up_proj(x))
        y: Tensor = self.down_proj(QuantizedInput(values, scale, x.dtype))
        return y


def fuse(blocks: Iterable[nn.Module]) -> int:
    """Fuse what can be in `blocks`, in place; how many they are. A block that is not like Llama's, or whose layers are not all W8A8 with scales per
    token on the backend 'triton', stays as it is."""
    fused = [block for block in blocks if _can_be_fused(block)]
    for block in fused:
        block.input_layernorm = FusedNorm(block.input_layernorm)
        block.post_attention_layernorm = FusedNorm(block.post_attention_layernorm)
        block.mlp = FusedMLP(block.mlp)
        block.forward = types.MethodType(_forward, block)
    return len(fused)


def _forward(block: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """A block's, with its first sum in the second norm."""
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **options)
    x, residual = block.post_attention_layernorm.after_sum(attended, hidden_states)
    y: Tensor = residual + block.mlp(x)
    return y


def _can_be_fused(block: Any) -> bool:
    if type(block).__name__ not in LIKE_LLAMA or type(block.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    attention, mlp = block.self_attn, block.mlp
    readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(isinstance(layer, QuantLinear) and layer.takes_integers for layer in readers):
        return False
    from smoothquant_plus.runtime.kernels.triton import fused  # registers the ops

    return mlp.gate_proj.in_features <= fused.LARGEST_NORM and mlp.down_proj.in_features <= fused.LARGEST_PRODUCT
