"""What a model is and what it would become, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smoothquant_plus.method.scheme import SCHEMES, find_scheme
from smoothquant_plus.models.blocks import build_skeleton, declared_family, decoder_blocks, load_config, open_family
from smoothquant_plus.models.families import active_pairs, published_alpha
from smoothquant_plus.models.sizes import fitting_group_sizes, largest_block, quantizing_bytes, stored_bytes


@dataclass(frozen=True)
class Inspection:
    """`sizes` are bytes of the weights, on disk and in memory to serve them: before ('float16', or the dtype of config.json) and per scheme,
    W4A16 with each group size that fits the model. `memory_to_quantize` is an estimated peak in bytes, for the samples and sequence length
    asked for, without a search for alpha."""

    family: str
    model_type: str
    blocks: int
    parameters: int
    alpha: float | None
    pairs: list[dict[str, Any]]
    sizes: dict[str, int]
    block_parameters: int
    memory_to_quantize: int


def inspect(model: str | Path, samples: int = 128, seq_len: int = 512) -> Inspection:
    """Family, pairs, sizes and memory of a model directory in which config.json is enough. Raises InputError as `open_family` does."""
    config = load_config(Path(model))
    name, family = open_family(config, declared_family(Path(model)))
    dtype = config.dtype or torch.float16
    skeleton: nn.Module = build_skeleton(config, dtype)
    active = list(active_pairs(family, config.get_text_config(), "all"))
    pairs = [{"source": pair.source, "sinks": list(pair.sinks), "smooth": pair.when} for pair in active]
    sizes = {str(dtype).removeprefix("torch."): stored_bytes(skeleton, family, None)}
    sizes |= {scheme: stored_bytes(skeleton, family, found) for scheme, found in SCHEMES.items() if found.weights.group_size is None}
    for size in fitting_group_sizes(skeleton, family):
        sizes[f"w4a16, groups of {size}"] = stored_bytes(skeleton, family, find_scheme("w4a16", group_size=size))
    return Inspection(
        family=name,
        model_type=config.model_type,
        blocks=len(decoder_blocks(skeleton, family)),
        parameters=sum(p.numel() for p in skeleton.parameters()),
        alpha=published_alpha(family, config.get_text_config()),
        pairs=pairs,
        sizes=sizes,
        block_parameters=largest_block(skeleton, family),
        memory_to_quantize=quantizing_bytes(skeleton, family, samples, seq_len),
    )
