"""What a machine is, and what it can do at best: how fast it reads memory and how fast it multiplies."""

from __future__ import annotations

import mmap
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothquant_plus.evaluation.timing import replayed, seconds_of, turns
from smoothquant_plus.runtime.kernels import cpu

READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # more than the caches hold
TRIES, SECONDS = 5, 0.5  # of each of torch's calls that stand for a limit; the best counts: nothing makes a machine faster than it is
SIDE = {"cpu": 512, "cuda": 8192}  # matrices that stay in a CPU core's share of the cache, and that fill a GPU
PEAK_ITERATIONS = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bytes read (by a GPU's copy: read and written) in 1e9 a second, and operations in 1e9 a second, a multiplication and an addition counted
    as two; None where the machine has no such arithmetic, or where it could not be measured. `source` says how they were measured."""

    source: str
    read_gb_per_s: float
    int8_gop_per_s: float | None
    bfloat16_gflop_per_s: float | None
    float32_gflop_per_s: float | None

    def seconds(self, arithmetic: str, nbytes: int, operations: int) -> float:
        """The shortest time in which `nbytes` can be read and, meanwhile, `operations` be done in `arithmetic`: 'int8', or 'float', which is
        the faster of bfloat16 and float32. An arithmetic whose limit is not known sets none."""
        peaks = (self.int8_gop_per_s,) if arithmetic == "int8" else (self.bfloat16_gflop_per_s, self.float32_gflop_per_s)
        peak = max((peak for peak in peaks if peak is not None), default=None)
        reading = nbytes / (self.read_gb_per_s * 1e9)
        return reading if peak is None else max(reading, operations / (peak * 1e9))


def summary(found: Sequence[Limits], of: Callable[[Iterable[float]], float]) -> Limits:
    """One for all of `found`, such as `of` the median, or the max."""
    values: dict[str, Any] = {}
    for field in fields(Limits)[1:]:
        known = [value for value in (getattr(one, field.name) for one in found) if value is not None]
        values[field.name] = of(known) if known else None
    return Limits(found[0].source, **values)


def limits_of(device: torch.device) -> Callable[[int], Limits]:
    """What says the limits of this machine for so many threads, as many as torch takes when it is called. A CPU's are measured then, since its
    clock varies: by the package's own kernels where they are built, otherwise an estimate by what torch can do, which is lower. A GPU's are
    measured here, by what torch can do."""
    if device.type == "cuda":
        measured = _measure_cuda(device)
        return lambda threads: measured
    buffer = _read_buffer(device)
    return partial(_estimate, buffer) if extension() is None else partial(_measure_cpu, buffer)


def describe(number: int, device: torch.device) -> dict[str, Any]:
    """Where it was measured, as a benchmark's JSON file says it; `number` threads were used."""
    kernels = extension()
    level = torch.backends.cpu.get_cpu_capability() if kernels is None else kernels.level()
    found = {"cpu": cpu_name(), "instruction_set": level, "threads": number, "torch": torch.__version__}
    return found | {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else found


def cpu_name() -> str:
    """The processor's name with its family and model, which tell processors apart whose names a virtual machine hides."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in pairs}
    if "model name" not in values:  # not x86
        return platform.processor() or platform.machine()
    return f"{values['model name']} (family {values.get('cpu family')}, model {values.get('model')})"


def extension() -> Any:
    """The module of the package's own CPU kernels, or None where they are not built."""
    return cpu if cpu.missing() is None else None


def _measure_cpu(buffer: Tensor, threads: int) -> Limits:
    peaks = {what: _peak_of_one_thread(what) * threads / 1e9 or None for what in ("int8", "bfloat16", "float32")}
    return Limits(
        "the package's CPU kernels; a peak is that of one thread times the threads, an upper bound",
        buffer.nbytes / seconds_of(lambda: torch.ops.smoothquant_plus.cpu_read(buffer), buffer.device) / 1e9,
        peaks["int8"],
        peaks["bfloat16"],
        peaks["float32"],
    )


def _peak_of_one_thread(what: str) -> float:
    """Operations a second in registers; 0 when the processor has no such instruction."""
    start = time.perf_counter()
    operations = torch.ops.smoothquant_plus.cpu_peak(what, PEAK_ITERATIONS)
    return float(operations / (time.perf_counter() - start))


def _estimate(buffer: Tensor, _: int) -> Limits:
    """What torch's own sum and matrix products reach. On a CPU it has no integer product that is near to any peak."""
    numbers = buffer.view(torch.int64)
    side = SIDE["cpu"]
    peaks = {dtype: _peak_of_product(torch.randn(side, side).to(dtype)) for dtype in (torch.bfloat16, torch.float32)}
    read = buffer.nbytes / _best(numbers.sum, buffer.device) / 1e9
    return Limits("an estimate: torch's sum and matrix products", read, None, peaks[torch.bfloat16], peaks[torch.float32])


def _measure_cuda(device: torch.device) -> Limits:
    """What torch's copy and matrix products reach, by graph replay. The numbers are random: a GPU multiplies constant ones faster, since
    they take less power."""
    buffer = _read_buffer(device)
    other = torch.empty_like(buffer)
    copy = 2 * buffer.nbytes / _best(lambda: other.copy_(buffer), device) / 1e9
    floats = torch.randn(SIDE["cuda"], SIDE["cuda"], device=device)
    integers = (floats * 40).clamp_(-127, 127).to(torch.int8)
    peaks = (_peak_of_product(integers), _peak_of_product(floats.bfloat16()), _peak_of_product(floats))
    return Limits("torch's copy and matrix products", copy, *peaks)


def _peak_of_product(square: Tensor) -> float:
    """Operations in 1e9 a second of `square` (S, S) times its transpose."""
    product = torch._int_mm if square.dtype == torch.int8 else torch.mm
    return 2 * len(square) ** 3 / 1e9 / _best(lambda: product(square, square.t()), square.device)


def _read_buffer(device: torch.device) -> Tensor:
    """READ_BYTES as uint8, all of them written once so that they are really there; on huge pages where the system gives them, which can
    be read faster than others."""
    nbytes = READ_BYTES[device.type]
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(nbytes, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones would be small pages
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest time, in seconds, that a call took."""
    call()
    sample = replayed([call], device) if device.type == "cuda" else lambda: seconds_of(call, device)
    return min(sample() for _ in turns(["call"], TRIES, SECONDS))
