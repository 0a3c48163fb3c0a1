"""What the kernels of both schemes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from smoothquant_plus.runtime.kernels.triton.configurations import TILES

# With TRITON_INTERPRET=1 kernels run in Python, on the CPU: no inline assembly, and bfloat16 as bits that nothing may be computed with.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


def counters(device: torch.device) -> Tensor:
    """`arrived` of a layer, int32 (TILES,): how many programs of a tile are done; zero between calls.

    Each layer has its own, so that different layers may run at once, on streams of their own. One layer may not.
    """
    return torch.zeros(TILES, dtype=torch.int32, device=device)


# What is raised for tiles that are too large for a GPU.
DOES_NOT_FIT = (OutOfResources, PTXASError)


@triton.jit
def add_parts(part, partial_ptr, arrived_ptr, inside, mask):
    """Add up a tile's `part`s of the programs along grid axis 1: (sum, whether this program has it).

    The program that is done last does it, always in the same order, so results do not depend on which one that is. `inside` are the places of
    the tile's numbers in an array of its own size, and `mask` says which of them matter.
    """
    parts = tl.num_programs(1)
    size: tl.constexpr = part.shape[0] * part.shape[1]
    at = partial_ptr + tl.program_id(0).to(tl.int64) * parts * size + inside
    # Not through the first-level cache, which other multiprocessors do not see.
    tl.store(at + tl.program_id(1) * size, part, mask=mask, cache_modifier=".cg")
    tl.debug_barrier()  # all threads' numbers are there before one of them says so
    last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == parts - 1
    total = tl.zeros_like(part)
    if last:
        for index in range(parts):
            total += tl.load(at + index * size, mask=mask, other=0, cache_modifier=".cg")
        tl.store(arrived_ptr + tl.program_id(0), 0)
    return total, last


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument. Multiplications and additions are fused, whatever Triton's default."""
    with torch.cuda.device_of(arguments[0]):  # Triton takes the current device
        kernel[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
