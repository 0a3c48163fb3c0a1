"""What a run needs to know before it starts: its inputs, opened and checked, so that no long work begins with bad ones."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smoothquant_plus import __version__
from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.files import sha256
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.method.search import GRID
from smoothquant_plus.models.blocks import Decoder, check_device
from smoothquant_plus.models.checkpoint import Checkpoint, companions, read_config
from smoothquant_plus.models.families import DEFAULT_ALPHA, SMOOTH, Pair, active_pairs, published_alpha
from smoothquant_plus.models.sizes import fitting_group_sizes
from smoothquant_plus.models.skeleton import check_positions, declared_family, load_config, open_family, quantized_linears
from smoothquant_plus.models.statistics import read_statistics
from smoothquant_plus.models.tensors import in_fp8
from smoothquant_plus.models.vllm_limits import check_for_vllm
from smoothquant_plus.progress import note
from smoothquant_plus.search import Search
from smoothquant_plus.text import DATASET_PREFIX, Samples, as_texts, check_ids, check_texts, load_tokenizer, synthetic_samples, take_samples
from smoothquant_plus.workspace import Workspace

COMPUTE_DTYPES = ("float32", "checkpoint")

# What `--alpha` may search by: the loss of the whole quantized model (SmoothQuant+), or each block's own.
SEARCHES = ("model", "block")

# What a checkpoint is made for: vLLM, or this package's own runtime.
TARGETS = ("vllm", "here")


@dataclass(frozen=True)
class Calibration:
    """Where activation maxima come from: `text`, files or `hf:` addresses, of which `samples` windows of `seq_len` tokens are run; or the file of
    `statistics` that a tool has published. Neither is needed when nothing is smoothed and activations are quantized dynamically.

    Blocks run on `device` ('cpu', 'cuda', 'cuda:N'), in `compute_dtype`: 'float32', or 'checkpoint', what most weights are stored in.
    """

    text: str | Path | Sequence[str | Path] = ()
    statistics: str | Path | None = None
    samples: int = 128
    seq_len: int = 512
    compute_dtype: str = "float32"
    device: str = "cpu"

    @property
    def texts(self) -> list[str]:
        return as_texts(self.text)


def open_decoder(model: Path, calibration: Calibration, declared: Path | None) -> Decoder:
    """The model as a stream of blocks. Raises InputError for a quantized one, an unknown family, or a device that is not there."""
    if calibration.compute_dtype not in COMPUTE_DTYPES:
        raise InputError(f"unknown compute dtype '{calibration.compute_dtype}': choose {' or '.join(COMPUTE_DTYPES)}.")
    device = check_device(calibration.device)
    config = read_config(model)
    if config.get("quantization_config") is not None and not in_fp8(config):
        raise InputError(f"{model} is quantized already: start from the full-precision checkpoint.")
    if in_fp8(config):
        note(f"{model} is stored in FP8: its weights are read as what they stand for, which counts as full precision here.")
    declared = declared or declared_family(model)
    open_family(load_config(model), declared)  # the family before the weights: its message is the more useful one
    checkpoint = Checkpoint(model)
    double = next((name for name, info in checkpoint.tensors.items() if info.dtype == torch.float64), None)
    if double is not None:
        raise InputError(
            f"{model}: {double} is in float64, and smoothing is computed in float32: convert the checkpoint to float32 or less."
        )
    dtype = torch.float32
    if calibration.compute_dtype == "checkpoint":
        dtypes = [info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
        dtype = max(set(dtypes), key=dtypes.count)
    return Decoder(checkpoint, dtype, device, declared)


def choose_alpha(decoder: Decoder, scheme: Scheme, smooth: str, alpha: str | float, notes: list[str]) -> float | str | None:
    """The alpha to smooth with, or the search that will find it; None when nothing is smoothed."""
    if smooth not in SMOOTH:
        raise InputError(f"unknown --smooth '{smooth}': choose one of {', '.join(SMOOTH)}.{did_you_mean(smooth, SMOOTH)}")
    if alpha == "default" and smooth != "none" and scheme.name == "w4a16":
        alpha = "model"  # SmoothQuant+ always searches: the published values are for INT8 activations
    if alpha != "default" and smooth == "none":
        raise InputError(f"--alpha {alpha} says how to smooth, and --smooth none smooths nothing: leave one of them out.")
    if alpha in SEARCHES:
        return str(alpha)
    if alpha == "default":
        published = published_alpha(decoder.family, decoder.config)
        if published is None and smooth != "none":
            notes.append(f"no alpha was published for family '{decoder.family_name}': {DEFAULT_ALPHA} is used.")
        value = DEFAULT_ALPHA if published is None else published
    else:
        try:
            value = float(alpha)
        except ValueError as error:
            raise InputError(
                f"--alpha {alpha}: give 'default', 'model', 'block' or a number between 0 and 1."
                f"{did_you_mean(str(alpha), ('default', *SEARCHES))}"
            ) from error
        if not 0.0 <= value <= 1.0:
            raise InputError(f"--alpha {alpha} is out of range: it must be between 0 and 1.")
    return None if smooth == "none" else value


def choose_pairs(decoder: Decoder, smooth: str) -> list[Pair]:
    """The pairs to smooth. Raises InputError when there are none although smoothing was asked for."""
    pairs = list(active_pairs(decoder.family, decoder.config, smooth))
    if not pairs and smooth != "none":
        others = "--smooth all or --smooth none" if any(active_pairs(decoder.family, decoder.config, "all")) else "--smooth none"
        raise InputError(f"family '{decoder.family_name}' has no pair that --smooth {smooth} smooths here: use {others}.")
    return pairs


def check_calibration(decoder: Decoder, calibration: Calibration, needed: bool) -> None:
    if calibration.text and calibration.statistics:
        raise InputError("give either --text or --statistics, not both: statistics replace the calibration text.")
    if needed and not calibration.text and not calibration.statistics:
        raise InputError("calibration text is needed: give --text FILE (or --statistics FILE).")
    if calibration.samples < 1 or calibration.seq_len < 2:
        raise InputError(f"--samples {calibration.samples} --seq-len {calibration.seq_len}: at least 1 sample of 2 tokens is needed.")
    check_texts(calibration.texts)
    if calibration.statistics:
        read_statistics(Path(calibration.statistics), decoder)
    if calibration.text:
        check_positions(decoder.config, calibration.seq_len, f"--seq-len {calibration.seq_len}")


def check_search(calibration: Calibration, search: Search, alpha: float | str | None) -> int:
    """How many streams of hidden states the search for alpha keeps, 0 where it is not searched. Raises InputError for a search without text,
    and for options that it cannot have."""
    if not isinstance(alpha, str):
        return 0
    if not calibration.text:
        raise InputError(f"--alpha {alpha} measures the loss on calibration text: give --text FILE, or a number as --alpha.")
    if search.samples < 1:
        raise InputError(f"--samples-search {search.samples}: at least 1 sample is needed.")
    if search.memory is not None and not 0 <= search.memory < math.inf:
        raise InputError(f"--search-memory {search.memory / 1e9:g}: give a number of GB that is not negative.")
    return 1 if alpha == "block" else 1 + len(GRID)


def check_groups(decoder: Decoder, scheme: Scheme) -> None:
    """Raises InputError for a layer, the output head among them, whose input channels the group size of its scheme does not divide."""
    layers = quantized_linears(decoder.model, decoder.family, scheme)
    for path, (linear, own) in layers.items():
        size = own.weights.group_size
        if size and linear.in_features % size:
            would = " or ".join(map(str, fitting_group_sizes(layers)))
            instead = "--lm-head w8a8" if path == decoder.head_path else "--scheme w8a8"
            raise InputError(
                f"groups of {size} do not divide the {linear.in_features} input channels of {path}: "
                + (f"--group-size {would} would do." if would else f"no group size fits this model, use {instead}.")
            )


def check_target(decoder: Decoder, scheme: Scheme, target: str) -> list[str]:
    """What to know about the checkpoint where it is going to be run. Raises InputError when it could not be."""
    if target not in TARGETS:
        raise InputError(f"unknown --for '{target}': choose {' or '.join(TARGETS)}.{did_you_mean(target, TARGETS)}")
    return check_for_vllm(decoder, scheme) if target == "vllm" else []


def check_space(decoder: Decoder, work: Workspace, output: float, samples: Samples | None, search: Search, searched: int) -> None:
    """Raises InputError when the disk cannot hold what is still to be written: `output` bytes, and the hidden states that an interrupted run
    continues from, those of two blocks for a moment; so too those of the `searched` streams that a search keeps."""
    free = shutil.disk_usage(work.root).free
    tokens = 2 * samples.tokens if samples else 0
    if samples and searched:
        tokens += 2 * searched * sum(samples.batches[batch].numel() for batch in search.choose(samples.batches))
    streams = tokens * decoder.stream_channels * decoder.dtype.itemsize
    written = sum(path.stat().st_size for path in work.root.rglob("*") if path.is_file())
    needed = output + streams - written
    if free < needed:
        raise InputError(
            f"the disk of {work.output} has {free / 1e9:.2f} GB free, and this run needs about {needed / 1e9:.2f} GB: free some space or "
            "choose an output on another disk."
        )


def read_samples(decoder: Decoder, calibration: Calibration) -> Samples:
    if calibration.statistics:
        return synthetic_samples(decoder.config.vocab_size)
    samples = take_samples(calibration.texts, load_tokenizer(decoder.checkpoint.directory), calibration.samples, calibration.seq_len)
    check_ids(torch.cat(samples.batches, dim=1), decoder.config.vocab_size, decoder.checkpoint.directory)
    note(f"calibration: {len(samples.batches)} of the text's {samples.available} samples, {samples.tokens} tokens")
    return samples


def environment(decoder: Decoder) -> dict[str, Any]:
    """What must stay the same while a run is unfinished, besides its recipe: other kernels give other last bits, and a file that was
    modified is another file."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {**versions, "processor": torch.backends.cpu.get_cpu_capability(), "modified": decoder.checkpoint.modified()}


def describe(decoder: Decoder, calibration: Calibration) -> dict[str, Any]:
    """The part of a recipe that says what goes in. No path is in it: the same inputs give the same bytes wherever they lie."""
    options = asdict(calibration)
    options["text"] = [t if t.startswith(DATASET_PREFIX) else [Path(t).name, sha256(Path(t))] for t in calibration.texts]
    options["statistics"] = sha256(Path(calibration.statistics)) if calibration.statistics else None
    directory = decoder.checkpoint.directory
    return {
        "version": __version__,
        "model": decoder.checkpoint.fingerprint(),
        "family": sha256(decoder.declared) if decoder.declared else None,
        "companions": {name: sha256(directory / name) for name in companions(directory)},
        **options,
    }
