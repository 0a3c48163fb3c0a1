"""What transformers does slowly on a CPU once linears are fast: attention of a single token, and the head after a prompt.

PyTorch's attention of one token in 16 bits takes 5 to 20 times as long as the two products that it is made of (torch 2.13, 260 to 1024
positions): most of the time that a block's linears in 4 bits take. And its product with a bfloat16 weight reads memory at a third to a half of the
speed that it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smoothquant_plus.runtime.kernels import cpu
from smoothquant_plus.runtime.linear import Bfloat16Linear

# The name in transformers' tables of attention functions.
NAME = "smoothquant_plus"


def multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies in `dtype` with instructions that this processor has for it."""
    mkldnn = torch.ops.mkldnn
    known = {torch.bfloat16: mkldnn._is_mkldnn_bf16_supported, torch.float16: mkldnn._is_mkldnn_fp16_supported}
    return bool(known[dtype]()) if dtype in known else True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(query @ key.T * scaling + mask) @ value, as transformers calls it: `query` (batch, heads, tokens, head_dim), `key` and `value`
    (batch, KV heads, positions, head_dim), the mask bool (true: seen) or added, (batch, 1, tokens, positions); gives (batch, tokens, heads,
    head_dim).

    One token of 16-bit numbers is multiplied here: scores and their softmax in float32, and, as in PyTorch's own, weights and values in 16 bits. All
    else is PyTorch's.
    """
    here = query.shape[2] == 1 and query.dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu" and not dropout
    if not here or others.get("position_bias") is not None or (attention_mask is not None and attention_mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # (batch, KV heads, heads that share one, head_dim)
    scores = grouped.float() @ key.float().transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, float("-inf")) if seen else scores + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    if value.dtype == torch.bfloat16 and heads > key.shape[1] and not multiplies(value.dtype):
        # Without instructions for it, PyTorch's product of several rows of bfloat16 numbers takes three to six times as long as this.
        y = (weights.float() @ value.float()).to(value.dtype)
    else:
        y = weights @ value
    return y.reshape(batch, 1, heads, -1), None


def speed_up(model: Any) -> None:
    """Let `model`, one of transformers' whose tensors are on a CPU, use `attention` where it would use PyTorch's, and our product for its head.

    A head that is the embedding too, or not in bfloat16, stays PyTorch's, and is spared a copy.
    """
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        tied = head.weight is model.get_input_embeddings().weight
        if not tied and head.weight.dtype == torch.bfloat16 and cpu.multiplies_bfloat16():
            model.set_output_embeddings(Bfloat16Linear(head))
        else:
            head.register_forward_pre_hook(compact)


def compact(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last token's hidden states are a view of the prompt's, with its strides: for those PyTorch multiplies in batches, and copies the whole
    weight before it does, which takes longer than the product."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])
