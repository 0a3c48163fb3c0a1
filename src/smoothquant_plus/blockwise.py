"""One block after the other: read it, measure it, smooth it, prove that nothing changed, quantize it, write it, release it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_plus.method.integers import lost_channels
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.blocks import Decoder, Stream
from smoothquant_plus.models.checkpoint import write_shard
from smoothquant_plus.models.coverage import coverage
from smoothquant_plus.models.experts import recorded, tokens_of_experts
from smoothquant_plus.models.families import Pair
from smoothquant_plus.models.statistics import read_statistics
from smoothquant_plus.models.transform import QuantizedLinear, SmoothedPair, block_tensors, prove_equivalent, quantize_block, smooth_block
from smoothquant_plus.output import FACTORS, MAXIMA, shard_names
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.progress import Steps, note, steps
from smoothquant_plus.search import FULL, Search, search_block
from smoothquant_plus.text import Samples
from smoothquant_plus.workspace import Journal, Workspace

QUANTIZED = "quantized"  # the stream that runs through quantized blocks


@dataclass(frozen=True)
class Method:
    """What is done to every block; `alpha` is 'block' when each block searches its own."""

    scheme: Scheme
    smooth: str
    pairs: Sequence[Pair]
    alpha: float | str | None


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
    record = record_of(smoothed, quantized, method.scheme)
    record["coverage"] = coverage(decoder, index, method.smooth, method.pairs, smoothed.alpha)
    if streams.full is not None:
        work.blocks.keep_stream(index + 1, FULL, smoothed.outputs)
    work.blocks.finish(index, record, smoothed.kept(decoder.path(index)))
    return record


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


def record_of(smoothed: Smoothed, quantized: dict[str, QuantizedLinear], scheme: Scheme) -> dict[str, Any]:
    """What plan.json says of a block."""
    linears: dict[str, dict[str, Any]] = {
        name: {"weight_error": linear.error, "sha256": linear.digest} for name, linear in quantized.items()
    }
    if scheme.inputs is not None and scheme.inputs.strategy == "tensor":
        for name in linears.keys() & smoothed.maxima.keys():
            linears[name]["lost_channels"] = lost_channels(smoothed.maxima[name])
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
        "linears": linears,
    }
    return record | {key: value for key, value in (("search", smoothed.search), ("experts", smoothed.experts)) if value is not None}
