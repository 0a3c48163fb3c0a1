"""Activation maxima as a file, `{linear's name: per-channel max|X|}`: ours, and the activation scales that other tools publish."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.experts import share_with_unreached
from smoothquant_plus.models.families import active_pairs
from smoothquant_plus.progress import note

# Files of an output, or beside a model: the maxima, and the smoothing factors, `{path of the source: s}`.
STATISTICS = "statistics.safetensors"
SMOOTHING = "smoothing.safetensors"


def read_statistics(path: Path, decoder: Decoder) -> dict[str, Tensor]:
    """Maxima for every linear of every block, float32 (K,), from a .safetensors file or a .pt file (read with weights_only).

    Raises InputError when the file cannot be read, a linear is missing, a shape is wrong, a value is negative or not finite, or linears
    that read the same input have different maxima.
    """
    if not path.is_file():
        raise InputError(f"no such statistics file: {path}.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(f"{path}: statistics are read from .safetensors and .pt files.")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as statistics: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        # torch's own message is either empty or advises to run the code.
        raise InputError(
            f"{path} cannot be read as statistics: it is damaged, or it holds more than tensors, and pickled code is never run. Save a "
            "dictionary of tensors, best as .safetensors."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a dictionary of per-channel maxima.")
    statistics = {}
    for index in range(len(decoder)):
        for name, linear in decoder.linears(index).items():
            full = f"{decoder.path(index)}.{name}"
            spellings = [spelling.removesuffix(".weight") for spelling in decoder.family.spellings(f"{full}.weight")]
            stored = next((spelling for spelling in spellings if spelling in found), full)
            statistics[full] = _checked(path, stored, found, linear.in_features)
        for pair in decoder.pairs(index, list(active_pairs(decoder.family, decoder.config, "all"))):
            # All that read one input, but for experts, which see some of its tokens each.
            sinks = [f"{decoder.path(index)}.{sink}" for sink in pair.sinks]
            first, *others = [name for name in sinks if name in statistics and ".experts." not in name] or [""]
            for other in others:
                together = not pair.multiplied or first.rpartition(".")[0] == other.rpartition(".")[0]
                if together and not torch.equal(statistics[first], statistics[other]):
                    raise InputError(f"{path}: '{first}' and '{other}' read the same input, but their maxima differ.")
    _give_unreached_their_share(path, statistics)
    return statistics


def _give_unreached_their_share(path: Path, statistics: dict[str, Tensor]) -> None:
    """Experts that the file's text did not reach have maxima of zero in it: they get those of the others, as when measured here."""
    experts = {name: ChannelMaxima(maxima, int((maxima > 0).any())) for name, maxima in statistics.items() if ".experts." in name}
    unreached = {re.sub(r"(\.experts\.\d+)\..*", r"\1", name) for name, found in experts.items() if found.tokens == 0}
    if unreached:
        note(f"{path}: {len(unreached)} experts have maxima of zero, they get those of the other experts of their block.")
        share_with_unreached(experts)
        statistics |= {name: found.maxima for name, found in experts.items()}


def _checked(path: Path, name: str, found: dict[str, Tensor], channels: int) -> Tensor:
    value = found.get(name)
    if not isinstance(value, Tensor):
        raise InputError(f"{path} has no maxima for '{name}'.{did_you_mean(name, map(str, found))}")
    if value.shape != (channels,):
        raise InputError(f"{path}: '{name}' has shape {tuple(value.shape)}, and the layer has {channels} input channels.")
    value = value.float()
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise InputError(f"{path}: '{name}' has maxima that are negative, NaN or infinite.")
    return value
