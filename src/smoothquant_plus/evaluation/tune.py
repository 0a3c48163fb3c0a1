"""Which kernels and tiles of the backend `triton` are the fastest on this GPU, found out by timing them; kept in the user's file, which
runtime/kernels/triton/configurations.py reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.benchmark_linear import SHAPES, random_weights, read_numbers, read_shape
from smoothquant_plus.evaluation.timing import Table, copies_for, microseconds, on, sampler, turns
from smoothquant_plus.files import write_json
from smoothquant_plus.method.integers import QuantizedWeight
from smoothquant_plus.method.scheme import SCHEMES, Scheme, find_scheme
from smoothquant_plus.models.blocks import check_device
from smoothquant_plus.progress import steps
from smoothquant_plus.runtime.kernels import reference, triton
from smoothquant_plus.runtime.kernels.triton.configurations import (
    MANY,
    Configuration,
    Kernel,
    Op,
    Rows,
    choose,
    device_of,
    parts,
    read_tuned,
    tuned,
    tuned_file,
)

TOKENS = "1,8,16,32,64,128,256,512,1024,4096"
# Every tile is timed a few times, then the best ones in more ways to split their sums, taking turns.
SAMPLES, ROUNDS, SECONDS, BEST = 5, 20, 0.5, 3
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# The order of summation, and weights that are rounded before the product, change this much less.
LARGEST_ERROR = 0.01


@dataclass(frozen=True)
class Choice:
    """What is the fastest for up to `tokens` tokens, and what it takes, beside what would have run without it; microseconds."""

    op: str
    n: int
    k: int
    tokens: int
    configuration: Configuration
    microseconds: float
    microseconds_before: float


@dataclass(frozen=True)
class Tuned:
    file: Path
    device: str
    choices: list[Choice]


def tune(shapes: Sequence[str] | None = None, tokens: str = TOKENS, scheme: str | None = None, device: str = "cuda") -> Tuned:
    """Time the kernels of `scheme` (default: w8a8 and w4a16) for weights of `shapes`, 'NxK' each, and batches of `tokens`, numbers with commas
    between, and write what is fastest to the user's file (`tuned_file`), whose other shapes stay. The largest batch stands for all larger ones.

    Raises InputError for options that cannot be used, and where there is no GPU for these kernels, before anything is timed.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("sqplus tune times kernels on an NVIDIA GPU, and torch finds none here: run it on the machine that has it.")
    place = torch.device(check_device(device))
    schemes = [*SCHEMES.values()] if scheme is None else [find_scheme(scheme)]
    sizes = list(dict.fromkeys(read_shape(shape, schemes) for shape in shapes or SHAPES["cuda"]))
    batches = sorted(read_numbers("--tokens", tokens))
    for one in schemes:
        reason = triton.supports(one, place, sizes[0])
        if reason is not None:
            raise InputError(f"nothing to tune on {place}: {reason}.")
    name, path = device_of(place)[0], tuned_file()
    known = read_tuned(path)
    choices: list[Choice] = []
    with on(place), torch.inference_mode(), steps("tune", len(schemes) * len(sizes) * len(batches)) as progress:
        for one, (n, k) in itertools.product(schemes, sizes):
            op: Op = "w4a16" if one.weights.bits == 4 else "w8a8"
            weight = random_weights(n, k, [one], place).quantized[one.name]
            prepared = triton.prepare(weight)
            copies = [tuple(each.clone() for each in prepared) for _ in range(copies_for(prepared[0].nbytes, place))]
            rows: list[tuple[int, Configuration]] = []
            for m in batches:
                choices.append(fastest(op, n, k, m, copies, partial(true_product, weight, one)))
                rows.append((MANY if m == batches[-1] else m, choices[-1].configuration))
                progress.step(f"{op} {n}x{k}, {m} tokens")
            known.setdefault(name, {})[f"{op} {n}x{k}"] = tuple(rows)
            save(path, known)  # each shape as soon as it is done
    return Tuned(path, name, choices)


def save(path: Path, known: dict[str, dict[str, Rows]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: {key: [[m, asdict(how)] for m, how in rows] for key, rows in shapes.items()} for name, shapes in known.items()})
    tuned.cache_clear()


def true_product(weight: QuantizedWeight, scheme: Scheme, x: Tensor) -> Tensor:
    """What every configuration has to give, from the reference: one that is wrong on this GPU must not decide about the others."""
    return reference.linear(x, reference.prepare(weight), scheme, None, None)


def fastest(op: Op, n: int, k: int, m: int, copies: Sequence[tuple[Tensor, ...]], true_product: Callable[[Tensor], Tensor]) -> Choice:
    """The fastest configuration for `m` tokens and a weight of which there are `copies`, as the backend prepared it. Raises InputError when none
    is right here."""
    device = copies[0][0].device
    multiprocessors = device_of(device)[2]
    x = torch.randn(m, k, device=device).bfloat16()
    before = choose(op, n, k, m, device)
    expected = true_product(x)
    tiles = [replace(each, split=parts(each, n, k, m, multiprocessors)) for each in candidates(op, n, m)]
    first: dict[Configuration, float] = {}
    for how in tiles:
        sample = sampler_of(op, x, copies, how, expected)
        if sample is not None:
            first[how] = min(sample() for _ in range(SAMPLES))
    finalists = dict.fromkeys([before])
    for how in sorted(first, key=first.__getitem__)[:BEST]:
        splits = {parts(replace(how, split=split), n, k, m, multiprocessors) for split in (how.split, *SPLITS)}
        finalists |= dict.fromkeys(replace(how, split=split) for split in sorted(splits))
    samples = {how: sampler_of(op, x, copies, how, expected) for how in finalists}
    times: dict[Configuration, list[float]] = {how: [] for how, sample in samples.items() if sample is not None}
    for how in turns(times, ROUNDS, SECONDS):
        sample = samples[how]
        assert sample is not None
        times[how].append(sample())
    if not times:
        raise InputError(
            f"no kernel multiplies {m} tokens with {op} {n}x{k} rightly on this GPU: run `make test-gpu`, and report what it says."
        )
    medians = {how: median(found) for how, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    return Choice(op, n, k, m, best, medians[best] * 1e6, medians.get(before, math.nan) * 1e6)


def candidates(op: Op, n: int, m: int) -> list[Configuration]:
    """What may be good for `m` tokens and `n` output channels; some may not fit a GPU."""
    rows = [each for each in (8, 16, 32, 64, 128) if each >= min(m, 128) / 2 and each < max(4 * m, 9)]
    found: list[Configuration] = []
    if m >= 32 and (op == "w4a16" or n % 8 == 0):  # which is what torch._int_mm wants
        found.append(Configuration("matmul"))
    if op == "w4a16":
        for tall, channels, warps, stages in itertools.product(rows, (32, 64, 128), (2, 4, 8), (3, 4, 5)):
            if channels // warps in (16, 32):  # at least one tile of a tensor core for each warp
                kernels: tuple[Kernel, ...] = ("scale_after", "scale_before") if tall <= 32 else ("scale_before",)
                found += [Configuration(kernel, tall, channels, warps=warps, stages=stages) for kernel in kernels]
        return found
    # At least 16 rows: a tensor core's for activations.
    pieces: tuple[Literal[1, 2], ...] = (1, 2)
    for tall, channels, dots, warps, stages in itertools.product(
        {max(each, 16) for each in rows}, (32, 64, 128, 256), pieces, (4, 8), (3, 4)
    ):
        if 16 <= tall * channels // (warps * 32) <= 128:  # accumulators of a thread
            found.append(Configuration("fused", tall, channels, dots=dots, warps=warps, stages=stages))
    return found


def product_of(op: Op, x: Tensor, prepared: tuple[Tensor, ...], how: Configuration) -> Callable[[], Tensor]:
    """The product of x (M, K) in the way `how`, with activations that are quantized already: how does not matter to that."""
    from smoothquant_plus.runtime.kernels.triton import w4a16, w8a8

    if op == "w4a16":
        packed, small, arrived = prepared
        y = x.new_empty(len(x), packed.shape[1])
        run = partial(w4a16.multiply, x, packed, small, arrived, None, y, how)
    else:
        weight, small, arrived = prepared
        y = x.new_empty(len(x), len(weight))
        run = partial(w8a8.multiply, *w8a8.quantize(x, per_token=True), weight, small, arrived, None, y, how)

    def call() -> Tensor:
        run()
        return y

    return call


def sampler_of(op: Op, x: Tensor, copies: Sequence[tuple[Tensor, ...]], how: Configuration, expected: Tensor) -> Callable[[], float] | None:
    """What measures `how` once, in seconds; None when it does not fit this GPU, or when its product is not the expected one."""
    from smoothquant_plus.runtime.kernels.triton.common import DOES_NOT_FIT

    calls = [product_of(op, x, prepared, how) for prepared in copies]
    try:
        y = calls[0]().float()
        wrong = (y - expected.float()).norm() / expected.float().norm()
        return sampler(calls, x.device) if wrong < LARGEST_ERROR else None
    except DOES_NOT_FIT:
        return None


def tables(found: Tuned) -> list[Table]:
    def line(one: Choice) -> list[str]:
        how = one.configuration
        tile = "" if how.kernel == "matmul" else f" {how.rows}x{how.channels}, split {how.split}, {how.warps} warps, {how.stages} stages"
        return [f"{one.tokens} tokens", how.kernel + tile, microseconds(one.microseconds), microseconds(one.microseconds_before)]

    kinds = dict.fromkeys((one.op, one.n, one.k) for one in found.choices)
    columns = ["", "kernel", "time", "before"]
    return [
        Table(f"{op} {n}x{k}", columns, [line(one) for one in found.choices if (one.op, one.n, one.k) == (op, n, k)]) for op, n, k in kinds
    ]
