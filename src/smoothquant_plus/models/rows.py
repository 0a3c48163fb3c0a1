"""Which output channels of a source feed a sink: what `Pair.rows` may say."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Rows = Literal["each", "values", "fused_values", "last_values", "latent_values", "last_half"]


def source_rows(rows: Rows, config: Any, total: int, channels: int) -> Tensor:
    """The source's output channels that feed the sink, int64, in the sink's order; `total` it has, and the sink reads `channels`.

    `each`: all of them. `values`: all of v_proj. `fused_values`: the values in a query_key_value whose heads lie together, for each group
    its query heads, a key head and a value head (BLOOM and GPT-NeoX, where a group is one head; Falcon, all of whose layouts this is).
    `last_values`: those at the end of queries, keys and values (Phi-3). `latent_values`: those of kv_b_proj, which makes keys and values of a
    latent, head by head (DeepSeek). `last_half`: up_proj in a gate_up_proj.
    """
    every = torch.arange(total)
    if rows == "last_half":
        return every[total // 2 :]
    head_dim = channels // config.num_attention_heads
    if rows == "fused_values":
        return every.reshape(kv_heads(config), -1, head_dim)[:, -1].flatten()  # (groups, query heads + 2, head_dim)
    if rows == "last_values":
        return every[-kv_heads(config) * head_dim :]
    if rows == "latent_values":
        return every.reshape(config.num_attention_heads, -1)[:, -head_dim:].flatten()  # (heads, keys without rotary part + values)
    return every


def kv_heads(config: Any) -> int:
    """How many key and value heads attention has."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads  # whatever num_kv_heads says
    return next(
        found
        for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
        if (found := getattr(config, name, None)) is not None
    )
