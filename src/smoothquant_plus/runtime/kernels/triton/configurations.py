"""Which kernel runs, and in which tiles: data. Looked up for every call (or CUDA graph), never found out while serving.

First what `sqplus tune` wrote for this GPU, if it did; then `SHIPPED` for its architecture; then `ANYWHERE`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from smoothquant_plus.errors import InputError

# The most tiles that split their sum over programs: more of them fill any GPU as they are. Each layer has so many counters.
TILES = 1024

Op = Literal["w4a16", "w8a8"]
# w4a16: 'scale_after' multiplies integers and scales the sums of groups, 'scale_before' scales weights and multiplies those; 'matmul' writes them
# out for PyTorch's own product. w8a8: 'fused' is one kernel, 'matmul' is `torch._int_mm` and a kernel for the scales.
Kernel = Literal["scale_after", "scale_before", "fused", "matmul"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Configuration:
    """A kernel and its tiles: `rows` tokens times `channels` output channels, `depth` input channels at a time, in `dots` products (w8a8 only).

    The sum over input channels is split over `split` programs; 0 takes as many as fill the GPU.
    """

    kernel: Kernel
    rows: int = 64
    channels: int = 64
    depth: Literal[64, 128] = 128
    dots: Literal[1, 2] = 1
    split: int = 0
    warps: int = 4
    stages: int = 3


# The first row whose number of tokens is at least as many as there are; the last one is for all larger numbers.
Rows = tuple[tuple[int, Configuration], ...]
MANY = 1 << 30

# From counts of the instructions in the compiled loops, not from timings: no GPU has measured them yet. Timings will also tell shapes apart; these
# hold for all. Two warps keep the decode loop on Hopper from wgmma, which waits for each product; two products in a step keep Triton, before
# Hopper, from holding 8-bit operands of the next step in registers, byte by byte.
SHIPPED: dict[tuple[str, Op], Rows] = {
    ("sm_90", "w4a16"): (
        (8, Configuration("scale_after", rows=8, channels=64, warps=2, stages=4)),
        (16, Configuration("scale_after", rows=16, channels=64, warps=2, stages=4)),
        (32, Configuration("scale_before", rows=32, channels=64, warps=2, stages=4)),
        (64, Configuration("scale_before", rows=64, channels=128, warps=4, stages=4)),
        (256, Configuration("scale_before", rows=128, channels=128, warps=8, stages=3)),
        (MANY, Configuration("matmul")),
    ),
    ("sm_90", "w8a8"): (
        (16, Configuration("fused", rows=16, channels=64, dots=2, warps=4, stages=4)),
        (32, Configuration("fused", rows=32, channels=64, dots=2, warps=4, stages=4)),
        (64, Configuration("fused", rows=64, channels=128, warps=4, stages=4)),
        (MANY, Configuration("fused", rows=128, channels=256, warps=8, stages=3)),
    ),
    # Blackwell's own tensor cores take four warps and more, and then one product a step.
    ("sm_100", "w4a16"): (
        (8, Configuration("scale_after", rows=8, channels=64, warps=2, stages=4)),
        (16, Configuration("scale_after", rows=16, channels=64, warps=2, stages=4)),
        (32, Configuration("scale_before", rows=32, channels=64, warps=2, stages=4)),
        (256, Configuration("scale_before", rows=64, channels=64, warps=2, stages=3)),
        (MANY, Configuration("matmul")),
    ),
    ("sm_100", "w8a8"): (
        (16, Configuration("fused", rows=16, channels=64, dots=2, warps=4, stages=4)),
        (64, Configuration("fused", rows=64, channels=64, warps=4, stages=4)),
        (MANY, Configuration("fused", rows=128, channels=128, warps=8, stages=3)),
    ),
}
# For architectures without a table: small tiles, which fit the shared memory of all of them.
ANYWHERE: dict[Op, Rows] = {
    "w4a16": (
        (8, Configuration("scale_after", rows=8, channels=64, warps=2, stages=4)),
        (16, Configuration("scale_after", rows=16, channels=64, warps=2, stages=4)),
        (32, Configuration("scale_before", rows=32, channels=64, warps=2, stages=4)),
        (256, Configuration("scale_before", rows=64, channels=64, warps=4, stages=3)),
        (MANY, Configuration("matmul")),
    ),
    "w8a8": (
        (16, Configuration("fused", rows=16, channels=64, dots=2, warps=4, stages=4)),
        (64, Configuration("fused", rows=64, channels=64, dots=2, warps=4, stages=4)),
        (MANY, Configuration("fused", rows=128, channels=128, dots=2, warps=8, stages=3)),
    ),
}


def choose(op: Op, n: int, k: int, tokens: int, device: torch.device) -> Configuration:
    """How to multiply `tokens` with a weight (n, k) on `device`."""
    name, architecture, multiprocessors = device_of(device)
    rows = tuned(name).get(f"{op} {n}x{k}") or SHIPPED.get((architecture, op)) or ANYWHERE[op]
    found = next((configuration for most, configuration in rows if tokens <= most), rows[-1][1])
    return with_split(found, parts(found, n, k, tokens, multiprocessors))


@functools.cache
def with_split(how: Configuration, split: int) -> Configuration:
    """Kept, because making one checks its fields, which takes as long as all else before a launch."""
    return replace(how, split=split)


def parts(how: Configuration, n: int, k: int, tokens: int, multiprocessors: int) -> int:
    """How many programs share the sum of a tile, each with as many steps but the last, which may have fewer."""
    tiles = cdiv(tokens, how.rows) * cdiv(n, how.channels)
    if how.kernel == "matmul" or tiles > TILES:
        return 1
    steps = cdiv(k, how.depth)
    # Several programs of small tiles on each multiprocessor keep its memory busy; of large ones one fits, and one more than there are
    # multiprocessors would take as long as twice as many. And what programs hand over must be little beside what they read, so large tiles
    # take more steps.
    wanted = cdiv(4 * multiprocessors, tiles) if how.rows <= 32 else multiprocessors // tiles
    split = how.split or min(wanted, steps // max(2, how.rows // 16))
    return cdiv(steps, cdiv(steps, max(1, min(split, steps))))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def device_of(device: torch.device) -> tuple[str, str, int]:
    """Its name, its architecture and the number of its multiprocessors; of the CPU, on which kernels are interpreted, those of no GPU."""
    if device.type != "cuda":
        return "", "", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def tuned_file() -> Path:
    """What `sqplus tune` writes: SQPLUS_TUNED, or a file in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SQPLUS_TUNED") or cache / "smoothquant-plus" / "tuned.json")


@functools.cache
def tuned(name: str) -> dict[str, Rows]:
    """What was tuned for the GPU called `name`: rows of each "op NxK"; nothing without a file. Read once.

    The file is {GPU name: {"w4a16 4096x4096": [[largest number of tokens, {a Configuration}], ...]}}. InputError if it is not.
    """
    return read_tuned(tuned_file()).get(name, {})


def read_tuned(path: Path) -> dict[str, dict[str, Rows]]:
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, Rows]]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is not what sqplus tune writes ({where}: {first['msg']}): remove it, or run sqplus tune again."
        ) from error
