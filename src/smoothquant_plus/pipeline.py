"""The whole story: read a block, measure it, smooth it, prove that nothing changed, quantize it, write it, release it; then the next."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus import __version__
from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.files import sha256, write_bytes, write_json
from smoothquant_plus.method.scheme import Scheme, find_scheme
from smoothquant_plus.models.blocks import Decoder, Stream, check_device, check_positions, linears, load_config
from smoothquant_plus.models.checkpoint import (
    COMPANIONS,
    CONFIG,
    Checkpoint,
    quantization_config,
    read_config,
    write_index,
    write_shard,
)
from smoothquant_plus.models.families import DEFAULT_ALPHA, SMOOTH, Pair, active_pairs, published_alpha
from smoothquant_plus.models.sizes import stored_bytes
from smoothquant_plus.models.statistics import read_statistics
from smoothquant_plus.models.transform import QuantizedLinear, SmoothedPair, block_tensors, prove_equivalent, quantize_block, smooth_block
from smoothquant_plus.progress import Steps, note, peak_rss_mb, steps
from smoothquant_plus.text import DATASET_PREFIX, Samples, check_ids, check_texts, load_tokenizer, synthetic_samples, take_samples
from smoothquant_plus.verification import MANIFEST, STATISTICS, manifest, read_plan, verify
from smoothquant_plus.workspace import PLAN, Workspace

COMPUTE_DTYPES = ("float32", "checkpoint")


@dataclass(frozen=True)
class Calibration:
    """Where activation maxima come from: text, or the file of `statistics` that a tool has published. Neither is needed when nothing is
    smoothed and activations are quantized dynamically."""

    text: Sequence[str] = ()
    statistics: Path | None = None
    samples: int = 128
    seq_len: int = 512
    compute_dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """What a finished run reports; `seconds` and `peak_rss_mb` are of this process alone (a resumed run did less)."""

    output: str
    scheme: str
    alpha: float | None
    blocks: int
    bytes_before: int
    bytes_after: int
    peak_rss_mb: float
    seconds: float
    tokens: int
    equivalence_error: float
    notes: list[str] = field(default_factory=list)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str = "w8a8",
    activations: str = "token",
    weights: str = "channel",
    smooth: str = "norms",
    alpha: str | float = "default",
    calibration: Calibration = Calibration(),
) -> Result:
    """Smooth and quantize the model directory `model` into the new checkpoint directory `output`.

    `activations` is 'token' (O1), 'tensor' (O2) or 'static' (O3); `smooth` is 'none', 'norms' or 'all'; `alpha` is 'default', the family's
    published value, or a number in 0..1. Killed at any moment, the same call continues where it was and gives the same bytes.
    Raises InputError for input that cannot be used, VerificationError when smoothing turned out to change the function.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    chosen = find_scheme(scheme, activations, weights)
    decoder = open_decoder(model, calibration)
    notes: list[str] = []
    strength = choose_alpha(decoder, smooth, alpha, notes)
    needed = smooth != "none" or not chosen.inputs.dynamic
    check_calibration(decoder, calibration, needed)
    recipe = {"scheme": chosen.model_dump(), "smooth": smooth, "alpha": strength, **describe(decoder, calibration)}

    with Workspace(output, recipe, {"modified": decoder.checkpoint.modified()}) as work:
        if not work.complete:
            check_space(decoder, work, chosen, calibration)
            samples = read_samples(decoder, calibration) if needed else None
            copy_outside(decoder, work.directory)  # before the long work: it reads, and so checks, the tables
            quantize_blocks(decoder, work, chosen, smooth, strength, calibration, samples)
            finish(decoder, work, chosen, recipe, {"alpha": strength, "tokens": samples.tokens if samples else 0, "notes": notes})
            verify(work.directory)
            work.publish(work.directory)

    plan = read_plan(output)
    return Result(
        output=str(output),
        scheme=chosen.name,
        alpha=strength,
        blocks=len(decoder),
        bytes_before=decoder.checkpoint.nbytes,
        bytes_after=Checkpoint(output).nbytes,
        peak_rss_mb=round(peak_rss_mb(), 1),
        seconds=round(time.monotonic() - start, 3),
        tokens=plan["tokens"],
        equivalence_error=plan["equivalence_error"],
        notes=plan["notes"],
    )


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder, work: Workspace, scheme: Scheme, smooth: str, alpha: float | None, calibration: Calibration, samples: Samples | None
) -> None:
    """Every block that is not done yet, one in memory at a time."""
    pairs = list(active_pairs(decoder.family, decoder.config, smooth))
    given = read_statistics(calibration.statistics, decoder) if calibration.statistics else None
    stream = open_stream(decoder, work, samples)
    with steps("block", len(decoder), work.blocks_done) as progress:
        for index in range(work.blocks_done, len(decoder)):
            shard = work.directory / shard_name(decoder, index + 1)
            record, statistics, outputs = quantize_one(decoder, index, shard, scheme, pairs, alpha, stream, given, progress)
            if stream is not None:
                stream.hidden = outputs
            work.finish_block(index, record, statistics, outputs)
            progress.step(f"equivalence error {record['equivalence_error']:.1e}" if record["pairs"] else "")


def quantize_one(
    decoder: Decoder,
    index: int,
    shard: Path,
    scheme: Scheme,
    pairs: Sequence[Pair],
    alpha: float | None,
    stream: Stream | None,
    given: dict[str, Tensor] | None,
    progress: Steps,
) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """Block `index` from the model's weights to its `shard`: what plan.json says of it, its input maxima, and the original block's outputs
    per batch. None of its weights, as floats or as integers, are in memory afterwards."""
    error, smoothed = 0.0, []
    with decoder.block(index) as block:
        maxima, outputs = measure(decoder, block, index, stream, given, progress)
        statistics = {f"{decoder.path(index)}.{name}": channels for name, channels in maxima.items()}
        block.float()
        if pairs and alpha is not None and stream is not None:
            reference = outputs if decoder.dtype == torch.float32 else decoder.run_all(block, index, stream, torch.float32)
            smoothed = smooth_block(decoder, index, block, pairs, maxima, alpha)
            error = prove_equivalent(decoder, block, index, stream, reference, halves(progress, 0.5, len(reference)))
        quantized = quantize_block(decoder, index, block, scheme, maxima)
        write_shard(shard, block_tensors(decoder, index, block, quantized))
    return record_of(smoothed, quantized, error), statistics, outputs


def open_stream(decoder: Decoder, work: Workspace, samples: Samples | None) -> Stream | None:
    """The hidden states that go into the first block that is not done, with every block's arguments; None when nothing has to be run."""
    if samples is None or work.blocks_done == len(decoder):
        return None
    stream = decoder.embed(samples.batches)
    if work.blocks_done:
        note(f"continuing at block {work.blocks_done + 1} of {len(decoder)}")
        stream.hidden = work.stream()
    return stream


def measure(
    decoder: Decoder, block: nn.Module, index: int, stream: Stream | None, given: dict[str, Tensor] | None, progress: Steps
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The input maxima of the block's linears, measured or given, and the original block's outputs per batch."""
    maxima: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    if stream is not None:
        measured, outputs = decoder.measure(block, index, stream, halves(progress, 0.0, len(stream.hidden)))
        maxima = {name: channels.maxima for name, channels in measured.items()}
    if given is not None:
        maxima = {name: given[f"{decoder.path(index)}.{name}"] for name in linears(block)}
    return maxima, outputs


def halves(progress: Steps, offset: float, batches: int) -> Callable[[int], None]:
    """Progress through one of the two runs of a block, in batches done."""
    return lambda done: progress.part(offset + done / batches / 2)


def record_of(smoothed: list[SmoothedPair], quantized: dict[str, QuantizedLinear], error: float) -> dict[str, Any]:
    """What plan.json says of a block."""
    return {
        "equivalence_error": error,
        "pairs": [
            {
                "source": pair.source,
                "sinks": list(pair.sinks),
                "smallest_factor": pair.s.min().item(),
                "largest_factor": pair.s.max().item(),
                "dead_channels": pair.dead_channels,
            }
            for pair in smoothed
        ],
        "linears": {name: {"weight_error": linear.error, "sha256": linear.digest} for name, linear in quantized.items()},
    }


def shard_name(decoder: Decoder, number: int) -> str:
    """Shard 0 is what lies outside the blocks, 1 to len(decoder) are the blocks; an output head of its own is the last one."""
    return f"model-{number + 1:05d}-of-{len(decoder) + 1 + bool(decoder.head_names):05d}.safetensors"


def copy_outside(decoder: Decoder, directory: Path) -> None:
    """Everything outside the blocks, as it is: the output head in a shard of its own, so that no two large tables are in memory at once."""
    in_blocks = {name for index in range(len(decoder)) for name in decoder.block_tensors(index)}
    outside = [name for name in decoder.checkpoint.tensors if name not in in_blocks]
    head = decoder.head_names
    for number, names in ((0, [n for n in outside if n not in head]), (len(decoder) + 1, [n for n in outside if n in head])):
        if names and not (directory / shard_name(decoder, number)).is_file():
            write_shard(directory / shard_name(decoder, number), {name: decoder.checkpoint.read(name) for name in names})


def finish(decoder: Decoder, work: Workspace, scheme: Scheme, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
    """What makes the shards a checkpoint: index, config, tokenizer, statistics, plan, and the manifest over all of them."""
    directory, source = work.directory, decoder.checkpoint.directory
    for name in COMPANIONS:
        if (source / name).is_file():
            write_bytes(directory / name, (source / name).read_bytes())
    config = read_config(source)
    ignore = [name for name, module in decoder.model.named_modules() if isinstance(module, nn.Linear) and not decoder.in_blocks(name)]
    write_json(directory / CONFIG, {**config, "quantization_config": quantization_config(scheme, ignore)})
    write_index(directory)
    write_shard(directory / STATISTICS, work.statistics())
    blocks = work.records()
    plan = {
        "recipe": recipe,
        "family": decoder.family_name,
        "equivalence_error": max(block["equivalence_error"] for block in blocks),
        "blocks": blocks,
        **facts,
    }
    write_json(directory / PLAN, plan)
    write_json(directory / MANIFEST, manifest(directory))


def calibrate(model: str | Path, output: str | Path, *, calibration: Calibration) -> Path:
    """Measure the per-channel maxima of every linear's input on the calibration text and write them alone, as one safetensors file.

    Resumes like `quantize`. Raises InputError as it does.
    """
    model, output = Path(model), Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: statistics are written as safetensors; give a name that ends in .safetensors.")
    if calibration.statistics:
        raise InputError("calibrate measures statistics: give it text.")
    decoder = open_decoder(model, calibration)
    check_calibration(decoder, calibration, needed=True)
    recipe = {"calibrate": True, **describe(decoder, calibration)}
    with Workspace(output, recipe, {"modified": decoder.checkpoint.modified()}) as work:
        if work.complete:
            return output
        stream = open_stream(decoder, work, read_samples(decoder, calibration))
        with steps("block", len(decoder), work.blocks_done) as progress:
            for index in range(work.blocks_done, len(decoder)):
                assert stream is not None
                with decoder.block(index) as block:
                    maxima, stream.hidden = decoder.measure(block, index, stream, lambda done: progress.part(done / len(stream.hidden)))
                named = {f"{decoder.path(index)}.{name}": channels.maxima for name, channels in maxima.items()}
                work.finish_block(index, {}, named, stream.hidden)
                progress.step()
        write_shard(work.directory / output.name, work.statistics(), {"recipe": json.dumps(work.recipe, sort_keys=True)})
        work.publish(work.directory / output.name)
    return output


# What is checked before any long work starts.


def open_decoder(model: Path, calibration: Calibration) -> Decoder:
    """The model as a stream of blocks. Raises InputError for a quantized one, an unknown family, or a device that is not there."""
    if calibration.compute_dtype not in COMPUTE_DTYPES:
        raise InputError(f"unknown compute dtype '{calibration.compute_dtype}': choose {' or '.join(COMPUTE_DTYPES)}.")
    device = check_device(calibration.device)
    config = read_config(model)
    if "quantization_config" in config:
        raise InputError(f"{model} is quantized already: start from the full-precision checkpoint.")
    load_config(model)  # the family before the weights: its message is the more useful one
    checkpoint = Checkpoint(model)
    dtype = torch.float32
    if calibration.compute_dtype == "checkpoint":
        dtypes = [info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
        dtype = max(set(dtypes), key=dtypes.count)
    return Decoder(checkpoint, dtype, device)


def choose_alpha(decoder: Decoder, smooth: str, alpha: str | float, notes: list[str]) -> float | None:
    """The alpha to smooth with; None when nothing is smoothed."""
    if smooth not in SMOOTH:
        raise InputError(f"unknown --smooth '{smooth}': choose one of {', '.join(SMOOTH)}.{did_you_mean(smooth, SMOOTH)}")
    if alpha == "default":
        published = published_alpha(decoder.family, decoder.config)
        if published is None and smooth != "none":
            notes.append(f"no alpha was published for family '{decoder.family_name}': {DEFAULT_ALPHA} is used.")
            note(notes[-1])
        value = DEFAULT_ALPHA if published is None else published
    else:
        try:
            value = float(alpha)
        except ValueError as error:
            raise InputError(f"--alpha {alpha}: give 'default' or a number between 0 and 1.") from error
        if not 0.0 <= value <= 1.0:
            raise InputError(f"--alpha {alpha} is out of range: it must be between 0 and 1.")
    return None if smooth == "none" else value


def check_calibration(decoder: Decoder, calibration: Calibration, needed: bool) -> None:
    if calibration.text and calibration.statistics:
        raise InputError("give either --text or --statistics, not both: statistics replace the calibration text.")
    if needed and not calibration.text and not calibration.statistics:
        raise InputError("calibration text is needed: give --text FILE (or --statistics FILE).")
    if calibration.samples < 1 or calibration.seq_len < 2:
        raise InputError(f"--samples {calibration.samples} --seq-len {calibration.seq_len}: at least 1 sample of 2 tokens is needed.")
    check_texts(calibration.text)
    if calibration.statistics:
        read_statistics(calibration.statistics, decoder)
    if calibration.text:
        check_positions(decoder.config, calibration.seq_len, f"--seq-len {calibration.seq_len}")


def check_space(decoder: Decoder, work: Workspace, scheme: Scheme, calibration: Calibration) -> None:
    """Raises InputError when the disk cannot hold what is still to be written: the output and the hidden states of an interrupted run."""
    free = shutil.disk_usage(work.root).free
    streams = 2 * calibration.samples * calibration.seq_len * decoder.config.hidden_size * 4
    written = sum(path.stat().st_size for path in work.root.rglob("*") if path.is_file())
    needed = stored_bytes(decoder.model, decoder.family, scheme) + streams - written
    if free < needed:
        raise InputError(
            f"the disk of {work.output} has {free / 1e9:.2f} GB free, and this run needs about {needed / 1e9:.2f} GB: free some space or "
            "choose an output on another disk."
        )


def read_samples(decoder: Decoder, calibration: Calibration) -> Samples:
    if calibration.statistics:
        return synthetic_samples(decoder.config.vocab_size)
    samples = take_samples(calibration.text, load_tokenizer(decoder.checkpoint.directory), calibration.samples, calibration.seq_len)
    check_ids(torch.cat(samples.batches, dim=1), decoder.config.vocab_size, decoder.checkpoint.directory)
    note(f"calibration: {len(samples.batches)} of the text's {samples.available} samples, {samples.tokens} tokens")
    return samples


def describe(decoder: Decoder, calibration: Calibration) -> dict[str, Any]:
    """The part of a recipe that says what goes in. No path is in it: the same inputs give the same bytes wherever they lie."""
    options = asdict(calibration)
    options["text"] = [t if t.startswith(DATASET_PREFIX) else [Path(t).name, sha256(Path(t))] for t in calibration.text]
    options["statistics"] = sha256(calibration.statistics) if calibration.statistics else None
    files = [path for name in COMPANIONS if (path := decoder.checkpoint.directory / name).is_file()]
    return {
        "version": __version__,
        "model": decoder.checkpoint.fingerprint(),
        "companions": {path.name: sha256(path) for path in files},
        **options,
    }
