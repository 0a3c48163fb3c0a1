"""Activation outliers for models that are too small to have them.

From about 6.7 billion parameters on, transformers grow a few channels whose activations are 100 times larger than the others', and those
are what breaks naive INT8 (SmoothQuant, Section 3). Models that can be shipped with a package or trained in a test have none. Planting them
is smoothing backwards: a few channels of a source are multiplied, the columns that read them divided. The function stays exactly the same,
and a quantizer finds what it would find in a large model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smoothquant_plus.models.families import active_pairs, find_family, pairs_in


@torch.no_grad()
def plant_outliers(model: Any, channels: int = 3, scale: float = 100.0, seed: int = 0, smooth: str = "norms") -> None:
    """Make `channels` channels of every source `scale` times larger, in place, without changing what the model computes.

    `smooth` chooses the sources as in `quantize`: 'norms', or 'all' for up_proj -> down_proj (fc1 -> fc2) as well. Value heads are left
    alone. The model is one that `load` gave, or a dense transformers model; which channels are chosen depends on `seed` alone.
    """
    _, family = find_family(model.config)
    pairs = list(active_pairs(family, model.config.get_text_config(), smooth))
    generator = torch.Generator().manual_seed(seed)
    for block in model.get_submodule(family.blocks).children():
        for pair in pairs_in(dict(block.named_modules()), pairs):
            if pair.rows != "each":
                continue
            source = block.get_submodule(pair.source)
            chosen = torch.randperm(len(source.weight), generator=generator)[:channels]
            offset = 0.0 if isinstance(source, nn.Linear) else family.norm_offset
            source.weight[chosen] = (source.weight[chosen] + offset) * scale - offset
            if getattr(source, "bias", None) is not None:
                source.bias[chosen] *= scale
            for sink in pair.sinks:
                block.get_submodule(sink).weight[:, chosen] /= scale
