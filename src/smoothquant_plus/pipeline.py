"""The whole story: read a block, measure it, smooth it, prove that nothing changed, quantize it, write it, release it; then the next."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus.errors import InputError
from smoothquant_plus.files import write_bytes, write_json
from smoothquant_plus.method.scheme import Scheme, find_scheme
from smoothquant_plus.method.search import GRID
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.blocks import Decoder, Stream, head_paths
from smoothquant_plus.models.checkpoint import COMPANIONS, CONFIG, Checkpoint, quantization_config, read_config, write_index, write_shard
from smoothquant_plus.models.coverage import coverage, summary
from smoothquant_plus.models.experts import recorded, tokens_of_experts
from smoothquant_plus.models.families import FAMILY_FILE, Pair
from smoothquant_plus.models.sizes import quantized_bytes
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS, read_statistics
from smoothquant_plus.models.transform import (
    QuantizedLinear,
    SmoothedPair,
    block_tensors,
    head_tensors,
    prove_equivalent,
    quantize_block,
    quantize_head,
    smooth_block,
    unquantized,
)
from smoothquant_plus.preparation import (
    Calibration,
    check_calibration,
    check_groups,
    check_search,
    check_space,
    check_target,
    choose_alpha,
    choose_pairs,
    describe,
    environment,
    open_decoder,
    read_samples,
)
from smoothquant_plus.progress import Steps, note, peak_rss_mb, steps
from smoothquant_plus.search import FULL, Search, search_block, search_model
from smoothquant_plus.text import Samples
from smoothquant_plus.verification import MANIFEST, manifest, read_plan, verify
from smoothquant_plus.workspace import PLAN, Journal, Workspace

NO_TEXT = Calibration()
QUANTIZED = "quantized"  # the stream that runs through quantized blocks

# What a finished block keeps, by the beginning of the names: its inputs' maxima and its smoothing factors.
MAXIMA, FACTORS = "maxima/", "factors/"


@dataclass(frozen=True)
class Method:
    """What is done to every block; `alpha` is 'block' when each block searches its own."""

    scheme: Scheme
    smooth: str
    pairs: Sequence[Pair]
    alpha: float | str | None


@dataclass(frozen=True)
class Result:
    """What a finished run reports; `seconds` and `peak_rss_mb` are of this process alone (a resumed run did less)."""

    output: str
    scheme: str
    alpha: float | str | None
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
    activations: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    lm_head: str | None = None,
    smooth: str = "norms",
    alpha: str | float = "default",
    calibration: Calibration = NO_TEXT,
    search: Search = Search(),  # noqa: B008 (frozen)
    pairs: str | Path | None = None,
    target: str = "vllm",
) -> Result:
    """Smooth and quantize the model directory `model` into the new checkpoint directory `output`.

    `scheme` is 'w8a8' or 'w4a16'. For w8a8 `activations` is 'token' (O1), 'tensor' (O2) or 'static' (O3) and `weights` 'channel' or
    'tensor'; for w4a16 `group_size` is 128, 64 or 32, and `symmetric` leaves out zero points. `lm_head` is 'w8a8' or 'w4a16' to quantize the
    output head too, rounded to nearest and with dynamic activations whatever the blocks have; a head that is tied to the embedding then
    becomes one of its own, and the embedding stays as it is. `smooth` is 'none', 'norms' or 'all'.
    `alpha` is a number in 0..1; 'model', searched by the loss of the whole quantized model (SmoothQuant+); 'block', searched for each
    block by itself; or 'default', the family's published value for w8a8 and 'model' for w4a16. `pairs` is a file that declares
    the family of a model that has no row of its own (docs/add-a-family.md). `target` is 'vllm', which refuses what vLLM could not read, or
    'here', for this package's own runtime; it changes no byte of what is written. Killed at any moment, the same call continues where it was
    and gives the same bytes.
    Raises InputError for input that cannot be used, VerificationError when smoothing turned out to change the function.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    chosen = find_scheme(scheme, activations, weights, group_size, symmetric, lm_head)
    decoder = open_decoder(model, calibration, Path(pairs) if pairs else None)
    check_groups(decoder, chosen)
    remarks = check_target(decoder, chosen, target)
    notes: list[str] = []
    strength = choose_alpha(decoder, chosen, smooth, alpha, notes)
    active = choose_pairs(decoder, smooth)
    needs_maxima = smooth != "none" or chosen.static
    needs_runs = smooth != "none" or (needs_maxima and calibration.statistics is None)
    searched = 0  # streams of hidden states that a search keeps
    if isinstance(strength, str):
        check_search(calibration, search, strength)
        searched = 1 if strength == "block" else 1 + len(GRID)
    check_calibration(decoder, calibration, needs_maxima)
    recipe = {"scheme": chosen.model_dump(), "smooth": smooth, "alpha": strength, **describe(decoder, calibration)}
    if searched:
        recipe["samples_search"] = search.samples

    with Workspace(output, recipe, environment(decoder)) as work:
        if not work.complete:
            samples = read_samples(decoder, calibration) if needs_runs else None
            work.check_samples(samples.batches if samples else [])
            check_space(decoder, work, quantized_bytes(decoder, chosen), samples, search, 0 if work.search_result.is_file() else searched)
            copy_outside(decoder, work, chosen)  # before the long work: it reads, and so checks, the tables
            facts: dict[str, Any] = {"tokens": samples.tokens if samples and calibration.text else 0, "notes": notes}
            if strength == "model":
                assert samples is not None
                found = search_model(decoder, work, chosen, active, samples, search)
                facts["search"], strength = found, found["alpha"]
                notes.append(search_note(found))
            quantize_blocks(decoder, work, Method(chosen, smooth, active, strength), calibration, samples, search)
            notes += summary(work.blocks.records())
            if chosen.head:
                notes.append(head_note(decoder, chosen.head, json.loads(work.head_result.read_text())))
            finish(decoder, work, chosen, recipe, {"alpha": strength, **facts})
            verify(work.directory)
            work.publish(work.directory)

    plan = read_plan(output)
    remarks += plan["notes"]
    for remark in remarks:
        note(remark)
    return Result(
        output=str(output),
        scheme=chosen.name,
        alpha=plan["alpha"],
        blocks=len(decoder),
        bytes_before=decoder.checkpoint.nbytes,
        bytes_after=Checkpoint(output).nbytes,
        peak_rss_mb=round(peak_rss_mb(), 1),
        seconds=round(time.monotonic() - start, 3),
        tokens=plan["tokens"],
        equivalence_error=plan["equivalence_error"],
        notes=remarks,
    )


@dataclass
class Streams:
    """The hidden states that go into the next block: the original model's (None when nothing has to be run), and those of the blocks
    quantized so far, which a search for each block's own alpha needs."""

    full: Stream | None
    quantized: Stream | None

    def advance(self, journal: Journal) -> None:
        """To what the block that was just finished put out."""
        for name, states in ((FULL, self.full), (QUANTIZED, self.quantized)):
            if states is not None:
                states.hidden = journal.stream(name)


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder,
    work: Workspace,
    method: Method,
    calibration: Calibration,
    samples: Samples | None,
    search: Search,
) -> None:
    """Every block that is not done yet, one in memory at a time."""
    given = read_statistics(Path(calibration.statistics), decoder) if calibration.statistics else None
    streams = open_streams(decoder, work.blocks, method, samples, search)
    with steps("block", len(decoder), work.blocks.done) as progress:
        for index in range(work.blocks.done, len(decoder)):
            record = quantize_one(decoder, work, index, method, streams, given, progress)
            streams.advance(work.blocks)
            progress.step(f"equivalence error {record['equivalence_error']:.1e}" if record["pairs"] else "")


@dataclass
class Smoothed:
    """What one block went through until it is quantized; the block itself is smoothed in place, and if there are `pairs` in float32."""

    measured: dict[str, Tensor]  # the maxima of the linears' inputs
    maxima: dict[str, Tensor]  # the same after smoothing
    outputs: list[Tensor]  # of the original block; nothing without a stream
    pairs: list[SmoothedPair]
    equivalence_error: float
    alpha: Any
    search: list[dict[str, Any]] | None  # the candidates of the block's own search
    experts: dict[str, Any] | None

    def kept(self, path: str) -> dict[str, Tensor]:
        """The maxima and the factors of the block at `path`, as the journal keeps them."""
        maxima = {f"{MAXIMA}{path}.{name}": channels for name, channels in self.measured.items()}
        return maxima | {f"{FACTORS}{path}.{pair.source}": pair.s for pair in self.pairs}


def smooth_one(
    decoder: Decoder,
    block: nn.Module,
    work: Workspace,
    index: int,
    method: Method,
    streams: Streams,
    given: dict[str, Tensor] | None,
    progress: Steps,
) -> Smoothed:
    """Measure `block`, smooth it, and prove that its function has not changed."""
    error, smoothed, found, experts = 0.0, [], None, None
    alpha: Any = method.alpha
    stream = streams.full
    with recorded(block) as routing:
        measured, outputs = measure(decoder, block, index, stream, progress)
    maxima = {name: channels.maxima for name, channels in measured.items()}
    if given is not None:
        maxima = {name: given[f"{decoder.path(index)}.{name}"] for name in decoder.linears(index)}
    original = dict(maxima)
    if method.pairs and alpha is not None and stream is not None:
        reference = outputs
        if decoder.dtype != torch.float32:
            decoder.materialize(index, torch.float32)  # from the disk again: a tensor may be stored in more bits than were computed in
            with recorded(block) as routing:
                reference = decoder.run_all(block, index, stream, torch.float32)
        if streams.quantized is not None:
            alpha, found, after = search_block(decoder, block, index, method.scheme, method.pairs, maxima, streams.quantized, progress.part)
            work.blocks.keep_stream(index + 1, QUANTIZED, after)
            del after
        if alpha is not None:
            smoothed = smooth_block(decoder, index, block, method.pairs, maxima, alpha)
            part = halves(progress, 0.5, len(reference))
            error = prove_equivalent(decoder, block, index, stream, reference, routing, smoothed, part)
    if given is None and (tokens := tokens_of_experts(measured)):
        experts = {"tokens": tokens, "rerouted_tokens": routing.flipped}
    return Smoothed(original, maxima, outputs, smoothed, error, alpha, found, experts)


def quantize_one(
    decoder: Decoder, work: Workspace, index: int, method: Method, streams: Streams, given: dict[str, Tensor] | None, progress: Steps
) -> dict[str, Any]:
    """Block `index` from the model's weights to its shard: what plan.json says of it. All else that was made of it is on disk alone
    afterwards: its weights as integers, the maxima of its inputs, and the original block's outputs."""
    with decoder.block(index) as block:
        smoothed = smooth_one(decoder, block, work, index, method, streams, given, progress)
        if decoder.dtype != torch.float32 and not smoothed.pairs:
            decoder.materialize(index, torch.float32)  # as where it is smoothed
        quantized = quantize_block(decoder, index, block, method.scheme, smoothed.maxima)
        write_shard(work.directory / shard_names(decoder, method.scheme).blocks[index], block_tensors(decoder, index, block, quantized))
    record = record_of(smoothed, quantized)
    record["coverage"] = coverage(decoder, index, method.smooth, method.pairs, smoothed.alpha)
    if streams.full is not None:
        work.blocks.keep_stream(index + 1, FULL, smoothed.outputs)
    work.blocks.finish(index, record, smoothed.kept(decoder.path(index)))
    return record


def search_note(found: dict[str, Any]) -> str:
    """What the search over the whole model found, in a sentence."""
    losses = {candidate["alpha"]: candidate["mse"] for candidate in found["candidates"] if "mse" in candidate}
    unsmoothed = found["unsmoothed"].get("mse", math.inf)
    if found["alpha"] is None:
        return f"smoothing does not help this model: the smallest loss is {min(losses.values()):.4g}, without smoothing {unsmoothed:.4g}."
    return f"alpha {found['alpha']:g} has the smallest loss of the whole model: {losses[found['alpha']]:.4g}, without smoothing {unsmoothed:.4g}."


def open_stream(decoder: Decoder, journal: Journal, samples: Samples | None) -> Stream | None:
    """The hidden states that go into the first block that is not done, with every block's arguments; None when nothing has to be run."""
    if samples is None or journal.done == len(decoder):
        return None
    stream = decoder.embed(samples.batches)
    if journal.done:
        note(f"continuing at block {journal.done + 1} of {len(decoder)}")
    else:
        journal.keep_stream(0, FULL, stream.hidden)
    stream.hidden = journal.stream(FULL)
    return stream


def open_streams(decoder: Decoder, journal: Journal, method: Method, samples: Samples | None, search: Search) -> Streams:
    full = open_stream(decoder, journal, samples)
    return Streams(full, open_quantized_stream(journal, full, search) if method.alpha == "block" and full is not None else None)


def open_quantized_stream(journal: Journal, stream: Stream, search: Search) -> Stream:
    """The same for the stream that runs through quantized blocks, of the batches that are searched on."""
    chosen = search.choose(stream.hidden)
    if not journal.done:
        journal.keep_stream(0, QUANTIZED, [stream.hidden[batch] for batch in chosen])
    return Stream(journal.stream(QUANTIZED), [stream.calls[batch] for batch in chosen])


def measure(
    decoder: Decoder, block: nn.Module, index: int, stream: Stream | None, progress: Steps
) -> tuple[dict[str, ChannelMaxima], list[Tensor]]:
    """The input maxima of the block's linears and the original block's outputs per batch; nothing without a stream."""
    return decoder.measure(block, index, stream, halves(progress, 0.0, len(stream.hidden))) if stream is not None else ({}, [])


def halves(progress: Steps, offset: float, batches: int) -> Callable[[int], None]:
    """Progress through one of the two runs of a block, in batches done."""
    return lambda done: progress.part(offset + done / batches / 2)


def record_of(smoothed: Smoothed, quantized: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """What plan.json says of a block."""
    record: dict[str, Any] = {
        "alpha": smoothed.alpha,
        "equivalence_error": smoothed.equivalence_error,
        "pairs": [
            {
                "source": pair.source,
                "sinks": list(pair.sinks),
                "smallest_factor": pair.s.min().item(),
                "largest_factor": pair.s.max().item(),
                "dead_channels": pair.dead_channels,
            }
            for pair in smoothed.pairs
        ],
        "linears": {name: {"weight_error": linear.error, "sha256": linear.digest} for name, linear in quantized.items()},
    }
    return record | {key: value for key, value in (("search", smoothed.search), ("experts", smoothed.experts)) if value is not None}


@dataclass(frozen=True)
class Shards:
    """The files of an output: of what lies outside the blocks, one for each group of `Decoder.outside`; of the blocks; and last of all, if
    it has one of its own, of the output head."""

    outside: list[str]
    blocks: list[str]
    head: str | None


def shard_names(decoder: Decoder, scheme: Scheme) -> Shards:
    outside, blocks = len(decoder.outside), len(decoder)
    head = bool(decoder.head_names) or scheme.head is not None
    count = outside + blocks + head
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return Shards(names[:outside], names[outside : outside + blocks], names[-1] if head else None)


def copy_outside(decoder: Decoder, work: Workspace, scheme: Scheme) -> None:
    """Everything outside the blocks, as it is, one group of tensors in memory at a time; the output head quantized, if it is to be."""
    files = shard_names(decoder, scheme)
    groups = dict(zip(files.outside, decoder.outside, strict=True))
    if scheme.head is not None:
        if not work.head_result.is_file():
            write_head(decoder, work, scheme.head, files)
    elif files.head is not None:
        groups[files.head] = sorted(decoder.head_names)
    for file, names in groups.items():
        if not (work.directory / file).is_file():
            # What the model ignores may be infinite: the masks of old checkpoints are.
            write_shard(work.directory / file, {name: decoder.checkpoint.read(name, finite=name in decoder.known_names) for name in names})


def write_head(decoder: Decoder, work: Workspace, scheme: Scheme, files: Shards) -> None:
    """The quantized output head, then what plan.json says of it: when that is on disk, the head is done."""
    assert files.head is not None
    quantized = quantize_head(decoder, scheme)
    write_shard(work.directory / files.head, head_tensors(decoder, quantized))
    write_json(work.head_result, {"name": decoder.head_path, "weight_error": quantized.error, "sha256": quantized.digest})


def head_note(decoder: Decoder, scheme: Scheme, record: dict[str, Any]) -> str:
    """What became of the output head, in a sentence."""
    tied = "" if decoder.head_is_stored else "; the embedding that it was tied to stays as it is, and a head of its own is stored"
    return (
        f"output head quantized, not smoothed: {record['name']}, {scheme.name}, relative weight error {record['weight_error']:.1e}{tied}."
    )


def with_own_head(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json whose output head is not tied to the embedding, whatever was said or left to the default."""
    own = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        own["text_config"] = with_own_head(config["text_config"])
    return own


def finish(decoder: Decoder, work: Workspace, scheme: Scheme, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
    """What makes the shards a checkpoint: index, config, tokenizer, statistics, plan, and the manifest over all of them."""
    directory, source = work.directory, decoder.checkpoint.directory
    for name in COMPANIONS:
        if (source / name).is_file():
            write_bytes(directory / name, (source / name).read_bytes())
    if decoder.declared:
        write_bytes(directory / FAMILY_FILE, decoder.declared.read_bytes())
    config = with_own_head(read_config(source)) if scheme.head else read_config(source)
    declared = quantization_config(scheme, unquantized(decoder, scheme), head_paths(decoder.model, decoder.family))
    write_json(directory / CONFIG, {**config, "quantization_config": declared})
    write_index(directory)
    for kind, file in ((MAXIMA, STATISTICS), (FACTORS, SMOOTHING)):
        kept = {name.removeprefix(kind): tensor for name, tensor in work.blocks.tensors().items() if name.startswith(kind)}
        write_shard(directory / file, kept)
    blocks = work.blocks.records()
    plan = {
        "recipe": recipe,
        "family": decoder.family_name,
        "equivalence_error": max(block["equivalence_error"] for block in blocks),
        "blocks": blocks,
        **facts,
    }
    if scheme.head:
        plan["head"] = json.loads(work.head_result.read_text())
    write_json(directory / PLAN, plan)
    write_json(directory / MANIFEST, manifest(directory))


@torch.no_grad()
def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    calibration: Calibration,
    pairs: str | Path | None = None,
    alpha: str | float | None = None,
    scheme: str = "w4a16",
    activations: str | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    smooth: str = "norms",
    search: Search = Search(),  # noqa: B008 (frozen)
) -> Path:
    """Measure on the calibration text, and write one safetensors file: the per-channel maxima of every linear's input, or with `alpha` the
    smoothing factors, the same as `quantize` with these options folds (its smoothing.safetensors).

    All that comes after `alpha` is as in `quantize`, and counts with it alone. Resumes like `quantize`. Raises InputError as it does.
    """
    model, output = Path(model), Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: statistics are written as safetensors; give a name that ends in .safetensors.")
    if calibration.statistics:
        raise InputError("calibrate measures statistics: give it text.")
    chosen = find_scheme(scheme, activations, weights, group_size, symmetric)
    if alpha is None and (chosen != find_scheme("w4a16") or smooth != "norms"):
        raise InputError(
            "maxima do not depend on a scheme or on what is smoothed: give --alpha for smoothing factors, or leave those options out."
        )
    decoder = open_decoder(model, calibration, Path(pairs) if pairs else None)
    notes: list[str] = []
    active: Sequence[Pair] = ()
    strength: float | str | None = None
    if alpha is not None:
        if smooth == "none":
            raise InputError("--smooth none has no factors: choose norms or all.")
        check_groups(decoder, chosen)
        strength = choose_alpha(decoder, chosen, smooth, alpha, notes)
        active = choose_pairs(decoder, smooth)
    check_calibration(decoder, calibration, needed=True)
    recipe: dict[str, Any] = {"calibrate": True, **describe(decoder, calibration)}
    searched = 0
    if alpha is not None:
        recipe |= {"scheme": chosen.model_dump(), "smooth": smooth, "alpha": strength}
    if isinstance(strength, str):
        check_search(calibration, search, strength)
        searched = 1 if strength == "block" else 1 + len(GRID)
        recipe["samples_search"] = search.samples
    with Workspace(output, recipe, environment(decoder)) as work:
        if work.complete:
            return output
        samples = read_samples(decoder, calibration)
        work.check_samples(samples.batches)
        check_space(decoder, work, 0, samples, search, 0 if work.search_result.is_file() else searched)
        if strength == "model":
            found = search_model(decoder, work, chosen, active, samples, search)
            strength = found["alpha"]
            notes.append(search_note(found))
        calibrate_blocks(decoder, work, Method(chosen, smooth, active, strength), samples, search)
        kind = MAXIMA if alpha is None else FACTORS
        kept = {name.removeprefix(kind): tensor for name, tensor in work.blocks.tensors().items() if name.startswith(kind)}
        write_shard(work.directory / output.name, kept, {"recipe": json.dumps(work.recipe, sort_keys=True)})
        work.publish(work.directory / output.name)
    for remark in notes:
        note(remark)
    return output


def calibrate_blocks(decoder: Decoder, work: Workspace, method: Method, samples: Samples, search: Search) -> None:
    """The maxima and the factors of every block that is not done yet, one in memory at a time."""
    streams = open_streams(decoder, work.blocks, method, samples, search)
    with steps("block", len(decoder), work.blocks.done) as progress:
        for index in range(work.blocks.done, len(decoder)):
            with decoder.block(index) as block:
                smoothed = smooth_one(decoder, block, work, index, method, streams, None, progress)
            work.blocks.keep_stream(index + 1, FULL, smoothed.outputs)
            work.blocks.finish(index, {}, smoothed.kept(decoder.path(index)))
            del smoothed  # on disk now: not a second time in memory while the next block runs
            streams.advance(work.blocks)
            progress.step()
