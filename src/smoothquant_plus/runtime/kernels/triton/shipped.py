"""Every kernel as it is compiled for the tables of configurations: for compiling ahead of time, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from smoothquant_plus.method.scheme import GROUP_SIZES
from smoothquant_plus.runtime.kernels.triton import w4a16, w8a8
from smoothquant_plus.runtime.kernels.triton.configurations import ANYWHERE, SHIPPED, Configuration, Op


class Compilation(NamedTuple):
    """What triton.compile takes. `signature` has Triton's names of types; a name in `aligned` is a multiple of 16 (a pointer's address too);
    `constants` has the arguments that are part of the code. `configuration` is None for kernels that have none."""

    name: str
    kernel: Any
    signature: dict[str, str]
    aligned: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    configuration: Configuration | None


def shipped(architecture: str) -> Iterator[Compilation]:
    """Everything for `architecture`, such as 'sm_90': each configuration for float16 and bfloat16, each group size, with and without split sums
    and bias. Shapes are those of real models: multiples of 16."""
    for how in configurations(architecture, "w4a16"):
        for dtype in ("bf16", "fp16"):
            for group in GROUP_SIZES:
                constants = {
                    "GROUP": group,
                    "SCALE_AFTER": how.kernel == "scale_after",
                    "SPLIT": True,
                    "ROWS": how.rows,
                    "CHANNELS": how.channels,
                    "STAGES": how.stages,
                }
                if how.kernel == "matmul":
                    yield dequantize(dtype, group)
                else:
                    yield product(f"w4a16 {name_of(how)} group {group} {dtype}", w4a16.product_kernel, dtype, constants, how)
    for how in configurations(architecture, "w8a8"):
        constants = {"SPLIT": how.kernel == "fused", "ROWS": how.rows, "CHANNELS": how.channels, "STEP": how.depth}
        for dtype in ("bf16", "fp16"):
            if how.kernel == "fused":
                yield product(f"w8a8 {name_of(how)} {dtype}", w8a8.product_kernel, dtype, constants, how)
