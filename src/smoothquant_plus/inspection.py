"""What a model is and what it would become, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.scheme import SCHEMES, find_scheme
from smoothquant_plus.models.checkpoint import read_config
from smoothquant_plus.models.families import active_pairs, published_alpha
from smoothquant_plus.models.sizes import fitting_group_sizes, largest_block, quantizing_bytes, stored_bytes
from smoothquant_plus.models.skeleton import build_skeleton, declared_family, decoder_blocks, load_config, open_family, quantized_linears
from smoothquant_plus.models.tensors import in_fp8


@dataclass(frozen=True)
class Inspection:
    """`sizes` are bytes of the weights, on disk and in memory to serve them: before ('float16', or the dtype of config.json) and per scheme,
    W4A16 with each group size that fits the model. `memory_to_quantize` is an estimated peak in bytes, for the samples and sequence length
    asked for, without a search for alpha. `quantized` is the method that config.json declares, None for a model in full precision: of one
    that is quantized already, everything here is said of what it was made of."""

    family: str
    model_type: str
    blocks: int
    parameters: int
    alpha: float | None
    pairs: list[dict[str, Any]]
    sizes: dict[str, int]
    block_parameters: int
    memory_to_quantize: int
    quantized: str | None


def inspect(model: str | Path, samples: int = 128, seq_len: int = 512, lm_head: str | None = None) -> Inspection:
    """Family, pairs, sizes and memory of a model directory in which config.json is enough; `lm_head` is what the output head becomes in the
    sizes. Raises InputError as `open_family` and `find_scheme` do, and for numbers that are not positive."""
    for option, number in (("--samples", samples), ("--seq-len", seq_len)):
        if number < 1:
            raise InputError(f"{option} {number}: give a positive number.")
    config = load_config(Path(model))
    name, family = open_family(config, declared_family(Path(model)))
    declared = read_config(Path(model))
    quantized = declared.get("quantization_config")
    dtype = config.dtype or torch.float16
    skeleton: nn.Module = build_skeleton(config, dtype)
    active = list(active_pairs(family, config.get_text_config(), "all"))
    pairs = [{"source": pair.source, "sinks": list(pair.sinks), "smooth": pair.when} for pair in active]
    sizes = {str(dtype).removeprefix("torch."): stored_bytes(skeleton, family, None)}
    for scheme in SCHEMES:
        grouped = find_scheme(scheme, lm_head=lm_head)
        fitting = fitting_group_sizes(quantized_linears(skeleton, family, grouped))
        if grouped.weights.group_size:
            for size in fitting:
                sizes[f"{scheme}, groups of {size}"] = stored_bytes(skeleton, family, find_scheme(scheme, group_size=size, lm_head=lm_head))
        elif grouped.head is None or grouped.head.weights.group_size is None:
            sizes[scheme] = stored_bytes(skeleton, family, grouped)
        elif fitting:  # the largest groups that fit the head
            sizes[scheme] = stored_bytes(skeleton, family, find_scheme(scheme, group_size=fitting[0], lm_head=lm_head))
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
        quantized=str(quantized.get("quant_method")) if isinstance(quantized, dict) and not in_fp8(declared) else None,
    )
