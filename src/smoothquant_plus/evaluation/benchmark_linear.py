"""How fast one linear layer is: every backend and what other libraries offer, against what the machine can do at best."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation import benchmark_fused
from smoothquant_plus.evaluation.benchmark_fused import FusedRow, bench_fused
from smoothquant_plus.evaluation.cpu_peers import CPU_PEERS
from smoothquant_plus.evaluation.gpu_peers import GPU_PEERS
from smoothquant_plus.evaluation.machine import Limits, describe, limits_of, summary
from smoothquant_plus.evaluation.peers import BF16, Product, Weights
from smoothquant_plus.evaluation.timing import Table, copies_for, microseconds, on, sampler, threads, turns
from smoothquant_plus.method.integers import QuantizedWeight, quantize_weight
from smoothquant_plus.method.scheme import SCHEMES, Quant, Scheme, find_scheme, with_arithmetic
from smoothquant_plus.models.blocks import check_device
from smoothquant_plus.progress import steps
from smoothquant_plus.runtime.kernels import BACKENDS, backends, cpu
from smoothquant_plus.runtime.linear import QuantLinear

# Output and input channels: on CPUs of the linear layers of Llama 7B, 13B and 70B, and of a small model; on GPUs of a few of these.
SHAPES = {
    "cpu": (
        *("4096x4096", "11008x4096", "4096x11008"),
        *("5120x5120", "13824x5120", "5120x13824"),
        *("8192x8192", "28672x8192", "8192x28672"),
        "2048x2048",
    ),
    "cuda": ("4096x4096", "8192x8192", "28672x8192", "8192x28672"),
}
TOKENS = {"cpu": "1,4,16,64,256", "cuda": "1,4,16,64,256,1024,4096"}

# A candidate is timed so many times, or for so long.
ROUNDS, SECONDS = 25, {"cpu": 3.0, "cuda": 0.5}
# Gaussian weights in 4 bits and groups of 128 give 0.10; what is further off is not this product.
LARGEST_ERROR = 0.25

# Not a scheme of checkpoints, but another way to multiply with w4a16's weights; measured as if it were one.
W4A8 = "w4a8"

NOT_INSTALLED = "not installed: "

PEERS = CPU_PEERS | GPU_PEERS


@dataclass(frozen=True)
class Row:
    """One candidate on x bfloat16 (m, k) and a weight (n, k), with so many `threads` of a CPU: the median time of a call.

    `ratio_to_bf16` is how many times faster than torch's bfloat16 product with as many threads it is, `gb_per_s` the bytes of the weight and its
    scales (as they are stored, however a library spreads them out) over the time, and `fraction_of_limit` the shortest time that this machine could
    need (reading those bytes, or doing the operations, whichever takes longer) over the time. A CPU's limits are measured in turns with the
    candidates, and their medians count, since its clock varies; of a GPU's, measured before each shape, the best of the run count.
    """

    scheme: str
    backend: str
    m: int
    n: int
    k: int
    threads: int
    microseconds: float
    ratio_to_bf16: float
    gb_per_s: float
    fraction_of_limit: float


@dataclass(frozen=True)
class LeftOut:
    """What was not timed, for a weight (n, k) and m tokens; 0 stands for all."""

    scheme: str
    backend: str
    reason: str
    m: int = 0
    n: int = 0
    k: int = 0


@dataclass(frozen=True)
class LinearBenchmark:
    machine: dict[str, Any]
    limits: Limits  # the best of the run
    rows: list[Row]
    left_out: list[LeftOut]
    fused: list[FusedRow]  # on CUDA, where w8a8 is measured


@dataclass(frozen=True)
class Candidate:
    """Something to time, with so many threads: a backend of ours, or a peer (see `Peer`)."""

    scheme: str
    name: str
    arithmetic: str
    build: Callable[[Weights], Product]
    threads: int


def bench_linear(
    scheme: str | None = None,
    shapes: Sequence[str] | None = None,
    tokens: str | None = None,
    numbers_of_threads: str | None = None,
    device: str = "cpu",
) -> LinearBenchmark:
    """Time `scheme` (a row of SCHEMES, or 'w4a8'; default: all) for weights of `shapes`, 'NxK' each, and batches of `tokens`,
    numbers with commas between, with as many threads as each of `numbers_of_threads` says, likewise; by default SHAPES and TOKENS of the device,
    and as many threads as torch takes.

    All candidates of a shape and a batch take turns in this process, on weights that no cache holds (see `sampler`); the times are medians.
    A candidate that fails, or whose product is wrong, is not timed and is in `left_out`. A GPU's limits are measured before each shape.
    Raises InputError for options that cannot be used, before anything is timed.
    """
    place = torch.device(check_device(device))
    integers = with_arithmetic(find_scheme("w4a16"), W4A8)
    schemes = [*SCHEMES.values(), integers] if scheme is None else [integers if scheme == W4A8 else find_scheme(scheme)]
    sizes = list(dict.fromkeys(read_shape(shape, schemes) for shape in shapes or SHAPES[place.type]))
    batches = read_numbers("--tokens", tokens or TOKENS[place.type])
    counts = read_numbers("--threads", numbers_of_threads or str(torch.get_num_threads()))
    candidates, left_out = find_candidates(schemes, place, counts)
    if place.type == "cpu":
        check_memory(candidates, schemes, sizes)
    limits: list[Limits] = []  # of each batch and number of threads
    # One of those, and: candidate, (m, n, k), seconds, bf16's, bytes of the weight.
    timed: list[tuple[Limits, tuple[Candidate, tuple[int, int, int], float, float, int]]] = []
    with on(place), torch.inference_mode(), steps("bench", len(sizes) * len(batches)) as progress:
        for n, k in sizes:
            limits_now = limits_of(place)
            weights = random_weights(n, k, schemes, place)
            nbytes = {"bf16": weights.floats.nbytes, **{name: stored_bytes(weight) for name, weight in weights.quantized.items()}}
            products, failed = build_products(candidates, weights, nbytes, place)
            left_out += [LeftOut(one.scheme, one.name, reason, n=n, k=k) for one, reason in failed.items()]
            for m in batches:
                seconds, failed, batch_limits = time_products(products, torch.randn(m, k, device=place).bfloat16(), limits_now)
                left_out += [LeftOut(one.scheme, one.name, reason, m, n, k) for one, reason in failed.items()]
                bf16 = {one.threads: seconds[one] for one in candidates if one.name == BF16}
                timed += [
                    (batch_limits[one.threads], (one, (m, n, k), time, bf16[one.threads], nbytes[one.scheme]))
                    for one, time in seconds.items()
                ]
                limits += batch_limits.values()
                progress.step(f"{n}x{k}, {m} tokens")
            del weights, products  # before the next shape's
        inputs = [(m, k) for k in dict.fromkeys(k for _, k in sizes) for m in batches]
        try:
            fused = list(bench_fused(inputs, place)) if place.type == "cuda" and "w8a8" in (one.name for one in schemes) else []
        except Exception as error:  # noqa: BLE001 (as above)
            fused = []
            left_out.append(LeftOut("w8a8", "fused operations", reason_of(error)))
    best = summary(limits, max)
    rows = [as_row(best if place.type == "cuda" else meanwhile, *measured) for meanwhile, measured in timed]
    left_out = list(dict.fromkeys(left_out))  # once for all numbers of threads
    return LinearBenchmark(describe(max(counts), place), best, rows, left_out, [benchmark_fused.as_row(best, one) for one in fused])


def check_memory(candidates: Sequence[Candidate], schemes: Sequence[Scheme], sizes: Sequence[tuple[int, int]]) -> None:
    """Raise InputError where the copies of a weight that all candidates need together would not fit in this machine's free memory."""
    bits = {"bf16": 16, **{scheme.name: scheme.weights.bits for scheme in schemes}}
    free = psutil.virtual_memory().available
    for n, k in sizes:
        each = {name: n * k * number // 8 for name, number in bits.items()}
        needed = sum(copies_for(each[one.scheme], torch.device("cpu")) * each[one.scheme] for one in candidates)
        if needed > 0.8 * free:
            raise InputError(
                f"--shape {n}x{k}: what is timed needs so many copies of the weight, which no cache may hold together, that they take "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: choose one --scheme, or a smaller --shape."
            )


def build_products(
    candidates: Sequence[Candidate], weights: Weights, nbytes: dict[str, int], device: torch.device
) -> tuple[dict[Candidate, list[Product]], dict[Candidate, str]]:
    """A product for each copy of the weight that a candidate needs, and why there is none. A copy that no candidate keeps is freed at once."""
    products: dict[Candidate, list[Product]] = {candidate: [] for candidate in candidates}
    failed: dict[Candidate, str] = {}
    wanted = {candidate: copies_for(nbytes[candidate.scheme], device) for candidate in candidates}
    for number in range(max(wanted.values())):
        copy = weights if number == 0 else weights.copy()
        for candidate in [one for one in products if number < wanted[one]]:
            try:
                with threads(candidate.threads):
                    products[candidate].append(candidate.build(copy))
            except Exception as error:  # noqa: BLE001 (whatever a library raises; it is shown)
                del products[candidate]
                failed[candidate] = reason_of(error)
    return products, failed


def as_row(limits: Limits, candidate: Candidate, size: tuple[int, int, int], seconds: float, bf16: float, nbytes: int) -> Row:
    m, n, k = size
    limit = limits.seconds(candidate.arithmetic, nbytes, 2 * m * n * k)
    return Row(
        candidate.scheme, candidate.name, m, n, k, candidate.threads, seconds * 1e6, bf16 / seconds, nbytes / seconds / 1e9, limit / seconds
    )


def read_shape(text: str, schemes: Sequence[Scheme]) -> tuple[int, int]:
    """(N, K) of 'NxK'. Raises InputError when that is not what it is, or when a scheme's groups do not divide K."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise InputError(f"--shape {text}: give output and input channels as NxK, for example 4096x4096.")
    n, k = int(found[1]), int(found[2])
    for scheme in schemes:
        size = scheme.weights.group_size
        if size and k % size:
            raise InputError(
                f"--shape {text}: {scheme.name} has groups of {size}, which do not divide {k} input channels: choose a K that they divide."
            )
    return n, k


def read_numbers(option: str, text: str) -> list[int]:
    """The numbers in '1,4,16', each once. Raises InputError, which names the option, for anything else."""
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) is None:
        raise InputError(f"{option} {text}: give positive numbers with commas between, for example 1,4,16.")
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def random_weights(n: int, k: int, schemes: Sequence[Scheme], device: torch.device) -> Weights:
    """A weight of normal numbers, quantized by each scheme; scales of groups in bfloat16, as a bfloat16 checkpoint has them."""
    floats = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    made: dict[Quant, QuantizedWeight] = {}  # w4a16 and w4a8 share theirs
    for scheme in schemes:
        if scheme.weights not in made:
            made[scheme.weights] = quantize_weight(floats, scheme.weights, scale_dtype(scheme))
    return Weights(floats, {scheme.name: made[scheme.weights] for scheme in schemes})


def scale_dtype(scheme: Scheme) -> torch.dtype:
    return torch.bfloat16 if scheme.weights.strategy == "group" else torch.float32


def stored_bytes(weight: QuantizedWeight) -> int:
    """Bytes of the integers and the zero points, packed, and of the scales."""
    zero_points = 0 if weight.zero_point is None else weight.zero_point.numel()
    return (weight.values.numel() + zero_points) * weight.quant.bits // 8 + weight.scale.nbytes


def find_candidates(schemes: Sequence[Scheme], device: torch.device, counts: Sequence[int]) -> tuple[list[Candidate], list[LeftOut]]:
    """What can be timed on `device`, with each number of threads in `counts`, torch's bfloat16 product first and our own before the peers of the
    same scheme, and the peers that are not installed."""
    found, left_out = [], []
    for scheme in (None, *schemes):
        here: dict[str, tuple[str, Callable[[Weights], Product]]] = {}  # arithmetic, and how it is built
        name_of_scheme = "bf16" if scheme is None else scheme.name
        if scheme is not None:
            arithmetic = "float" if scheme.inputs is None else "int8"
            here = {name: (arithmetic, backend_of(name, scheme)) for name in backends(device) if name != "reference"}
        for name, peer in PEERS.items():
            if peer.scheme == name_of_scheme and device.type in peer.devices:
                missing = peer.missing()
                if missing is None:
                    here[name] = (peer.arithmetic, peer.build)
                else:
                    left_out.append(LeftOut(peer.scheme, name, f"{NOT_INSTALLED}{missing}"))
        if scheme is None and device.type == "cpu":
            here["cpu, of heads"] = ("float", bfloat16_product)
        found += [Candidate(name_of_scheme, name, *how, count) for name, how in here.items() for count in counts]
    return found, left_out


def backend_of(name: str, scheme: Scheme) -> Callable[[Weights], Product]:
    """The backend `name` as a peer: the layer as a model has it. Building it raises InputError where the backend cannot run it."""

    def build(weights: Weights) -> Product:
        layer = QuantLinear(weights.quantized[scheme.name], scheme, backend=name)
        return lambda x: lambda: layer(x)

    return build


def bfloat16_product(weights: Weights) -> Product:
    """Our own product with a weight that stays in bfloat16, as a head does. Raises InputError where a model would use torch's."""
    if not cpu.multiplies_bfloat16():
        raise InputError("it needs AVX2, and where there is AMX the level that has it")
    packed = cpu.prepare_bfloat16(weights.floats)
    return lambda x: lambda: cpu.linear_bfloat16(x, packed, None, len(weights.floats))


def time_products(
    products: dict[Candidate, list[Product]], x: Tensor, limits_now: Callable[[int], Limits]
) -> tuple[dict[Candidate, float], dict[Candidate, str], dict[int, Limits]]:
    """The median seconds of each product of x (M, K), why the others have none, and the medians of the limits meanwhile, for each number of
    threads. A candidate has a product for each copy of the weight.

    Each is called once before: that sets things up, and shows whether it multiplies what the first one, torch's bfloat16 product, does.
    """
    samples: dict[Candidate, Callable[[], float]] = {}
    failed: dict[Candidate, str] = {}
    expected: Tensor | None = None
    for candidate, copies in products.items():
        try:
            with threads(candidate.threads):
                calls = [bind(x) for bind in copies]
                y = calls[0]().float()
                expected = y if expected is None else expected
                wrong = ((y - expected).norm() / expected.norm()).item()
                if wrong < LARGEST_ERROR:
                    samples[candidate] = sampler(calls, x.device)
                else:  # NaN too
                    failed[candidate] = f"its product is wrong (relative error {wrong:.2f})"
        except Exception as error:
            if candidate.name == BF16:
                raise  # without what all are compared with there is no benchmark
            failed[candidate] = reason_of(error)
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in samples}
    limits: dict[int, list[Limits]] = {candidate.threads: [] for candidate in samples}
    everyone: list[int | Candidate] = [*limits, *samples]
    for turn in turns(everyone, ROUNDS, SECONDS[x.device.type]):
        if isinstance(turn, int):
            with threads(turn):
                limits[turn].append(limits_now(turn))
        else:
            with threads(turn.threads):
                times[turn].append(samples[turn]())
    medians = {candidate: median(found) for candidate, found in times.items()}
    return medians, failed, {count: summary(found, median) for count, found in limits.items()}


def reason_of(error: Exception) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def tables(found: LinearBenchmark) -> Iterator[Table]:
    """One for each shape: a line for each candidate and number of threads, a column for each number of tokens, and the limits as lines of their
    own."""
    cells = {(row.n, row.k, row.scheme, row.backend, row.threads, row.m): row for row in found.rows}
    batches = list(dict.fromkeys(row.m for row in found.rows))
    counts = list(dict.fromkeys(row.threads for row in found.rows))
    for n, k in dict.fromkeys((row.n, row.k) for row in found.rows):
        lines: list[list[str]] = []
        for scheme in dict.fromkeys(row.scheme for row in found.rows):
            backends = list(dict.fromkeys(row.backend for row in found.rows if row.scheme == scheme))
            for backend in backends:
                name = f"{scheme} --backend {backend}" if backend in BACKENDS else backend if scheme == "bf16" else f"{scheme} {backend}"
                for count in counts:
                    rows = [
                        (cells.get((n, k, scheme, backend, count, m)), cells.get((n, k, scheme, backend, counts[0], m))) for m in batches
                    ]
                    lines.append([name + of_threads(count, counts), *(cell(row, first) for row, first in rows)])
            # The limit of the arithmetic that the scheme is defined in, which is the first one's.
            for count in counts:
                firsts = [cells.get((n, k, scheme, backends[0], count, m)) for m in batches]
                limits = (microseconds(row.microseconds * row.fraction_of_limit) if row else "-" for row in firsts)
                lines.append([f"{scheme} limit" + of_threads(count, counts), *limits])
        yield Table(f"{n}x{k}", ["", *(f"M={m}" for m in batches)], lines)
    yield from benchmark_fused.tables(found.fused)


def of_threads(count: int, counts: Sequence[int]) -> str:
    """What a line's name ends with, where there are several numbers of threads."""
    return "" if len(counts) == 1 else f", {count} thread{'s' * (count > 1)}"


def cell(row: Row | None, first: Row | None) -> str:
    """A time and what it compares with; `first` is the same with the first number of threads."""
    if row is None:
        return "-"
    text = f"{microseconds(row.microseconds)} ({row.ratio_to_bf16:.2f}x)\n{row.gb_per_s:.1f} GB/s, {row.fraction_of_limit:.0%} of limit"
    if first is None or first.threads == row.threads:
        return text
    return f"{text}\n{first.microseconds / row.microseconds:.2f}x as with {first.threads}"


def remarks(found: LinearBenchmark) -> Iterator[str]:
    """The machine, the limits, and what was left out, as lines."""
    yield ", ".join(f"{name} {value}" for name, value in found.machine.items())
    peaks = {
        "int8": found.limits.int8_gop_per_s,
        "bfloat16": found.limits.bfloat16_gflop_per_s,
        "float32": found.limits.float32_gflop_per_s,
    }
    known = ", ".join(f"{name} {'not known' if peak is None else f'{peak:.1f} Gop/s'}" for name, peak in peaks.items())
    yield f"limits at best: read {found.limits.read_gb_per_s:.1f} GB/s, {known} ({found.limits.source})"
    packages = dict.fromkeys(one.reason.removeprefix(NOT_INSTALLED) for one in found.left_out if one.reason.startswith(NOT_INSTALLED))
    if packages:
        yield f"{NOT_INSTALLED}{', '.join(packages)}"
    others = {(one.scheme, one.backend, one.reason): one for one in found.left_out if not one.reason.startswith(NOT_INSTALLED)}
    for scheme, backend, reason in others:
        yield f"not timed: {scheme} {backend}: {reason}"
