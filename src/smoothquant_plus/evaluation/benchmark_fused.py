"""How fast the fused operations between W8A8 layers are on a GPU, against torch's separate ones and what a copy reaches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from smoothquant_plus.evaluation.machine import Limits
from smoothquant_plus.evaluation.timing import Table, copies_for, microseconds, sampler, turns
from smoothquant_plus.method.integers import quantize_input
from smoothquant_plus.method.scheme import SCHEMES

ROUNDS, SECONDS = 25, 0.5
EPSILON = 1e-6
# Integers may be a step off where a sum rounded the other way: so far off are their values then, relative to all.
LARGEST_ERROR = 0.02

# x and the other input, both bfloat16 (M, K), and the norm's weight (K,) -> int8 values (M, K) and a float32 scale for each token.
Operation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FusedRow:
    """One operation on bfloat16 (m, k): the median time of a call, how many times faster than torch's separate kernels that is, the bytes that
    have to be read and written (each number once) over the time, and that as a share of what a copy reaches."""

    operation: str
    m: int
    k: int
    microseconds: float
    ratio_to_separate: float
    gb_per_s: float
    fraction_of_limit: float


def separate_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers has it for Llama."""
    floats = (x + residual).float()
    return _quantize(weight * (floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + EPSILON)).bfloat16())


def fused_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _, values, scale = torch.ops.smoothquant_plus.triton_add_norm_quantize(x, residual, weight, None, EPSILON, False)
    return values[:, : x.shape[1]], scale[:, None]


def separate_silu(gate: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize(torch.nn.functional.silu(gate) * up)


def fused_silu(gate: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = torch.ops.smoothquant_plus.triton_silu_quantize(gate, up)
    return values[:, : gate.shape[1]], scale[:, None]


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    inputs = SCHEMES["w8a8"].inputs
    assert inputs is not None
    return quantize_input(x, inputs)


# The separate operations, the fused one, and how many bytes it moves for each number: two inputs in, the integers out, and the sum.
OPERATIONS: dict[str, tuple[Operation, Operation, int]] = {
    "add, RMSNorm, quantize": (separate_norm, fused_norm, 7),
    "SiLU, multiply, quantize": (separate_silu, fused_silu, 5),
}


@dataclass(frozen=True)
class Timed:
    """Median seconds of an operation on (m, k), fused and separate."""

    operation: str
    m: int
    k: int
    fused: float
    separate: float


def bench_fused(sizes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[Timed]:
    """Every operation at each of `sizes` (m, k) whose rows it can hold, on inputs that no cache holds unless they are small. Raises RuntimeError when
    its results are not those of the separate ones."""
    from smoothquant_plus.runtime.kernels.triton import fused as kernels

    largest = dict(zip(OPERATIONS, (kernels.LARGEST_NORM, kernels.LARGEST_PRODUCT), strict=True))
    for m, k in sizes:
        for name, (separate, fused, nbytes) in OPERATIONS.items():
            if k <= largest[name]:
                copies = [random_inputs(m, k, device) for _ in range(copies_for(nbytes * m * k, device))]
                expected, y = (values * scale for values, scale in (separate(*copies[0]), fused(*copies[0])))
                wrong = ((y - expected).norm() / expected.norm()).item()
                if not wrong < LARGEST_ERROR:
                    raise RuntimeError(f"{name} of {m}x{k} is wrong (relative error {wrong:.3f})")
                samples = [sampler([functools.partial(operation, *one) for one in copies], device) for operation in (fused, separate)]
                times: list[list[float]] = [[], []]
                for index in turns(range(2), ROUNDS, SECONDS):
                    times[index].append(samples[index]())
                yield Timed(name, m, k, *map(median, times))


def random_inputs(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x, other = torch.randn(2, m, k, device=device).bfloat16()
    return x, other, torch.rand(k, device=device).bfloat16()


def as_row(limits: Limits, timed: Timed) -> FusedRow:
    gb_per_s = OPERATIONS[timed.operation][2] * timed.m * timed.k / timed.fused / 1e9
    ratio = timed.separate / timed.fused
    return FusedRow(timed.operation, timed.m, timed.k, timed.fused * 1e6, ratio, gb_per_s, gb_per_s / limits.read_gb_per_s)


def tables(rows: Sequence[FusedRow]) -> Iterator[Table]:
    """One for each number of channels: a line for each operation, a column for each number of tokens."""
    cells = {(row.operation, row.k, row.m): row for row in rows}
    batches = list(dict.fromkeys(row.m for row in rows))
    for k in dict.fromkeys(row.k for row in rows):
        lines = [[name, *(cell(cells.get((name, k, m))) for m in batches)] for name in OPERATIONS]
        yield Table(f"{k} channels", ["", *(f"M={m}" for m in batches)], lines)


def cell(row: FusedRow | None) -> str:
    if row is None:
        return "-"
    return f"{microseconds(row.microseconds)} ({row.ratio_to_separate:.2f}x)\n{row.gb_per_s:.0f} GB/s, {row.fraction_of_limit:.0%} of limit"
