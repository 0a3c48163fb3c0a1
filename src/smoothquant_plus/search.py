"""The search for alpha: by the loss of the whole quantized model, in one pass over its weights (SmoothQuant+), or block by block.

For each block all candidates are made from one copy of its weights: smoothed, quantized, and run on the hidden states that this candidate's
own earlier blocks gave, so that errors accumulate as they do in the finished model.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from smoothquant_plus.errors import InputError
from smoothquant_plus.files import write_json
from smoothquant_plus.method.integers import dequantize
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.method.search import GRID, SquaredError, best_alpha
from smoothquant_plus.models.blocks import Decoder, Stream, assign
from smoothquant_plus.models.families import Pair
from smoothquant_plus.models.skeleton import linears
from smoothquant_plus.models.transform import quantize_linear, smooth_block
from smoothquant_plus.progress import note, steps
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.text import Samples
from smoothquant_plus.workspace import Journal, Workspace

FULL = "full"  # the stream of the full-precision model


@dataclass(frozen=True)
class Search:
    """What the search for alpha may use: how many of the calibration samples it runs, and how many bytes of memory its streams of hidden
    states may take (None: a quarter of what is free); those beyond it are memory-mapped files."""

    samples: int = 16
    memory: float | None = None

    def choose(self, batches: Sequence[Any]) -> list[int]:
        """Which of the calibration batches the search runs, evenly spread."""
        count = min(self.samples, len(batches))
        return [number * len(batches) // count for number in range(count)]

    def budget(self) -> float:
        return psutil.virtual_memory().available // 4 if self.memory is None else self.memory


def search_model(
    decoder: Decoder, work: Workspace, scheme: Scheme, pairs: Sequence[Pair], samples: Samples, search: Search
) -> dict[str, Any]:
    """The loss of the whole quantized model for each alpha of the grid: what plan.json says of the search, `alpha` the best one.

    Runs through the model once, reading each block once. `mse` is the mean squared error of the final hidden states (what the output head
    reads) against the full-precision model's, and decides; `cross_entropy` is the next-token loss in nats, through the full-precision head
    even where that is quantized too. 'unsmoothed' is the model that is quantized without smoothing; when nothing on the grid is better,
    `alpha` is None. Continues where an interrupted search was.
    Raises InputError when no alpha can be used.
    """
    if work.search_result.is_file():
        shutil.rmtree(work.search.directory)
        found: dict[str, Any] = json.loads(work.search_result.read_text())
        return found
    chosen = search.choose(samples.batches)
    streams = run_candidates(decoder, work.search, scheme, pairs, samples, chosen, search.budget())
    found = losses(decoder, [samples.batches[batch] for batch in chosen], chosen, streams)
    refused = {reason for record in work.search.records() for reason in record["refused"].items()}
    found["candidates"] += [{"alpha": float(name), "refused": reason} for name, reason in refused]
    found["candidates"].sort(key=lambda candidate: candidate["alpha"])
    usable = {c["alpha"]: c["mse"] for c in found["candidates"] if "mse" in c}
    if not usable:
        raise InputError(f"no alpha can be used: {found['candidates'][0]['refused']}")
    found["alpha"] = best_alpha(usable, found[UNSMOOTHED].get("mse", math.inf))
    write_json(work.search_result, found)
    shutil.rmtree(work.search.directory)
    return found


def run_candidates(
    decoder: Decoder, journal: Journal, scheme: Scheme, pairs: Sequence[Pair], samples: Samples, chosen: list[int], budget: float
) -> Streams:
    """Take the full-precision stream and one stream for each candidate through all blocks."""
    stream = decoder.embed(samples.batches)
    calls = [stream.calls[batch] for batch in chosen]
    if journal.done:
        note(f"continuing the search at block {journal.done + 1} of {len(decoder)}")
    else:
        journal.keep_stream(0, FULL, stream.hidden)
    bytes_of_one = sum(samples.batches[batch].numel() for batch in chosen) * decoder.stream_channels * decoder.dtype.itemsize
    streams = Streams(journal, chosen, int(budget // max(1, bytes_of_one)))
    with steps("search block", len(decoder), journal.done) as progress:
        for index in range(journal.done, len(decoder)):
            with decoder.block(index, torch.float32) as block:
                stream.hidden = journal.stream(FULL)
                measured, outputs = decoder.measure(in_compute_dtype(decoder, block), index, stream)
                journal.keep_stream(index + 1, FULL, outputs)
                del outputs
                maxima = {name: channels.maxima for name, channels in measured.items()}
                refused: dict[str, str] = {}
                for number, name in enumerate(streams.names):
                    progress.part((number + 1) / (len(streams.names) + 1))
                    hidden = streams.read(name)
                    try:
                        quantized = candidate(decoder, index, block, scheme, pairs, maxima, alpha_of(name))
                    except InputError as error:
                        if name == UNSMOOTHED:
                            raise
                        refused[name] = str(error)
                        continue
                    streams.write(index + 1, name, decoder.run_all(quantized, index, Stream(hidden, calls), decoder.dtype))
                    del quantized
                journal.finish(index, {"refused": refused}, {})
                streams.drop(refused)
            progress.step()
    return streams


UNSMOOTHED = "unsmoothed"


def alpha_of(name: str) -> float | None:
    """The alpha of the stream `name`."""
    return None if name == UNSMOOTHED else float(name)


class Streams:
    """The candidates' hidden states for the block that comes next, per batch: all of them on disk, to be continued from, and the first
    `resident` of them in memory too."""

    def __init__(self, journal: Journal, chosen: list[int], resident: int) -> None:
        refused = {name for record in journal.records() for name in record["refused"]}
        self.names = [name for name in (UNSMOOTHED, *map(str, GRID)) if name not in refused]
        self._journal, self._chosen = journal, chosen
        self._resident = set(self.names[:resident])
        self._memory: dict[str, Sequence[Tensor]] = {}

    def full(self) -> Sequence[Tensor]:
        """The full-precision model's hidden states, of the batches that are searched on."""
        stream = self._journal.stream(FULL)
        return Chosen(stream, self._chosen)

    def read(self, name: str) -> Sequence[Tensor]:
        if self._journal.done == 0:
            return self.full()  # nothing is quantized yet
        return self._memory.get(name) or self._journal.stream(name)

    def write(self, index: int, name: str, hidden: Sequence[Tensor]) -> None:
        self._journal.keep_stream(index, name, hidden)
        if name in self._resident:
            self._memory[name] = hidden

    def drop(self, names: Any) -> None:
        """Candidates that turned out not to be usable."""
        self.names = [name for name in self.names if name not in names]
        self._memory = {name: hidden for name, hidden in self._memory.items() if name not in names}


@dataclass(frozen=True)
class Chosen(Sequence[Tensor]):
    """Some batches of a stream, each read when it is asked for."""

    stream: Sequence[Tensor]
    batches: list[int]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.stream[self.batches[index]]


def candidate(
    decoder: Decoder, index: int, block: nn.Module, scheme: Scheme, pairs: Sequence[Pair], maxima: dict[str, Tensor], alpha: float | None
) -> nn.Module:
    """A copy of the float32 `block`, smoothed with `alpha` (None: not at all) and with linears that compute as the quantized ones do."""
    quantized = copy.deepcopy(block)
    maxima = dict(maxima)
    if alpha is not None:
        smooth_block(decoder, index, quantized, pairs, maxima, alpha)
    for name, linear in linears(quantized, decoder.family).items():
        weight, input_scale = quantize_linear(decoder, f"{decoder.path(index)}.{name}", linear.weight, scheme, maxima.get(name))
        if scheme.inputs is None:
            # What a kernel for 4-bit weights computes, without unpacking them again for each batch.
            assign(linear, "weight", dequantize(weight))
        else:
            input_scale = None if input_scale is None else input_scale.to(decoder.device)
            quantized.set_submodule(name, QuantLinear(weight, scheme, input_scale=input_scale, bias=linear.bias))
    return in_compute_dtype(decoder, quantized, copied=True)


def in_compute_dtype(decoder: Decoder, block: nn.Module, copied: bool = False) -> nn.Module:
    """The float32 `block` with its parameters in the dtype that the decoder computes in: in a copy, unless it is one."""
    if decoder.dtype == torch.float32:
        return block
    block = block if copied else copy.deepcopy(block)
    for name, parameter in list(block.named_parameters()):
        assign(block, name, parameter.to(decoder.dtype))
    return block


@torch.no_grad()
def losses(decoder: Decoder, batches: Sequence[Tensor], chosen: list[int], streams: Streams) -> dict[str, Any]:
    """What the candidates lost: 'full_precision', 'unsmoothed', and 'candidates' by alpha."""
    squared = {name: SquaredError() for name in streams.names}
    entropy = dict.fromkeys([FULL, *streams.names], 0.0)
    full = streams.full()
    with decoder.head() as head, steps("search loss", len(batches)) as progress:
        for batch, ids in enumerate(batches):
            expected, logits = head(full[batch])
            entropy[FULL] += next_token_loss(logits, ids)
            for name in streams.names:
                final, logits = head(streams.read(name)[batch])
                squared[name].update(final, expected)
                entropy[name] += next_token_loss(logits, ids)
            progress.step()
    predicted = sum(ids.shape[1] - 1 for ids in batches)
    found: dict[str, Any] = {
        "loss": "mse",
        "samples": len(batches),
        "tokens": sum(ids.numel() for ids in batches),
        "full_precision": {"cross_entropy": entropy[FULL] / predicted},
        "candidates": [],
    }
    for name in streams.names:
        loss: dict[str, Any] = {"mse": squared[name].mean, "cross_entropy": entropy[name] / predicted}
        if not all(map(math.isfinite, loss.values())):
            loss = {"refused": "its hidden states are not finite"}
        if name == UNSMOOTHED:
            found[UNSMOOTHED] = loss
        else:
            found["candidates"].append({"alpha": float(name), **loss})
    return found


PIECE = 128  # tokens whose probabilities are in memory at once, beside the logits: with a vocabulary of 262,144 that is 134 MB


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Summed cross-entropy in nats of predicting ids[0, 1:], int64 (1, tokens), from `logits` (1, tokens, vocabulary)."""
    pieces = zip(logits[0, :-1].split(PIECE), ids[0, 1:].to(logits.device).split(PIECE), strict=True)
    return sum(torch.nn.functional.cross_entropy(piece.float(), following, reduction="sum").item() for piece, following in pieces)


@torch.no_grad()
def search_block(
    decoder: Decoder,
    block: nn.Module,
    index: int,
    scheme: Scheme,
    pairs: Sequence[Pair],
    maxima: dict[str, Tensor],
    stream: Stream,
    progress: Callable[[float], None],
) -> tuple[float | None, list[dict[str, Any]], list[Tensor]]:
    """The alpha with which the quantized `block` (given in float32) errs least on the `stream` that the quantized blocks before it gave.

    Returns it (None: no alpha of the grid is better than no smoothing), the mean squared error of the block's output for each candidate, and
    the outputs with the best one. Raises InputError when no alpha can be used.
    """
    expected = decoder.run_all(in_compute_dtype(decoder, block), index, stream, decoder.dtype)
    found: list[dict[str, Any]] = []
    for number, alpha in enumerate((None, *GRID)):
        progress(number / (1 + len(GRID)))
        error = SquaredError()
        try:
            quantized = candidate(decoder, index, block, scheme, pairs, maxima, alpha)
        except InputError as refusal:
            if alpha is None:
                raise
            found.append({"alpha": alpha, "refused": str(refusal)})
            continue
        for batch, output in enumerate(expected):
            error.update(decoder.run(quantized, index, stream, batch), output)
        del quantized
        finite = math.isfinite(error.mean)
        found.append({"alpha": alpha, "mse": error.mean} if finite else {"alpha": alpha, "refused": "its outputs are not finite"})
    usable = {c["alpha"]: c["mse"] for c in found if "mse" in c}
    unsmoothed = usable.pop(None, math.inf)
    if not usable:
        raise InputError(f"no alpha can be used for {decoder.path(index)}: {found[-1]['refused']}")
    best = best_alpha(usable, unsmoothed)
    quantized = candidate(decoder, index, block, scheme, pairs, maxima, best)
    return best, found, decoder.run_all(quantized, index, stream, decoder.dtype)
