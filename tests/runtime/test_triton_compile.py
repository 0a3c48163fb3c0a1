"""The Triton kernels as machine code of NVIDIA GPUs, compiled and read without one: no spills, the matrix instructions that are meant to be
there, and few instructions for each weight of the loop that has to keep up with memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Groups of 128 in bfloat16, what has no groups, and heads of 128 channels; the rest differs in constants and takes minutes: make compile.
USUAL = r"^(?!.*(fp16|group 64|group 32|, 64 channels|, 256 channels))"
ALL = os.environ.get("SQPLUS_COMPILE") == "all"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100") if ALL else ("sm_80", "sm_90")

# Instructions of the tensor cores that an architecture has of its own. From 64 rows on; for fewer they are slower than the older ones, which
# wait less.
OWN = {("sm_90", "w4a16"): "HGMMA", ("sm_90", "w8a8"): "IGMMA", ("sm_100", "w8a8"): "UTCIMMA"}

# Integer and logic operations, shifts, permutations and conversions: what taking numbers out of words costs.
ALU = ("LOP3", "PRMT", "SHF", "I2F", "I2FP", "SEL", "ISETP", "VIADD", "IADD3")
# Instructions a weight in the loop of W4A16 for a few tokens, all and of these, by group size. Reading weights at full speed leaves time for 5.9
# and 3.0 on an H100, for 4.1 and 2.1 on an H200.
LARGEST = {128: (2.6, 1.1), 64: (3.0, 1.15), 32: (4.1, 1.25)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_kernels_become(architecture: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script, names = Path(__file__).parents[1] / "sass.py", "" if ALL else USUAL
    run = subprocess.run([sys.executable, "-W", "ignore", script, architecture, names], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"w4a16", "w8a8", "rms", "layer", "silu", "append", "attention", "merge"} <= {
        one["name"].replace(",", "").split()[0] for one in found
    }
    for one in found:
        print(summary(architecture, one))  # noqa: T201  pytest -rP shows it
        scheme, kernel = one["name"].replace(",", "").split()[:2]
        # Two registers outside the loop of attention for one token of 256 channels, where the compiler keeps to 128 for more threads at once.
        assert one["spilled"] <= (8 if (architecture, scheme) == ("sm_100", "attention") else 0), one["name"]
        if scheme == "attention":
            assert one["loop"].get(expected_instruction(architecture, "w8a8", int(kernel))), (one["name"], one["loop"])
        if kernel in ("fused", "scale_before", "scale_after"):
            assert one["loop"].get(expected_instruction(architecture, scheme, one["rows"])), (one["name"], one["loop"])
        if kernel == "scale_after":
            group = int(one["name"].split()[4])
            assert one["loop_per_weight"] <= LARGEST[group][0] and one["alu_per_weight"] <= LARGEST[group][1], one


def expected_instruction(architecture: str, scheme: str, rows: int) -> str:
    own = OWN.get((architecture, scheme)) if rows >= 64 else None
    return own or ("IMMA" if scheme == "w8a8" else "HMMA")


def summary(architecture: str, one: dict[str, Any]) -> str:
    """And what the loop takes for a weight, which is added to `one`."""
    loop, weights = one["loop"], one["weights"] or 1
    one["loop_per_weight"] = sum(loop.values()) / weights
    one["alu_per_weight"] = sum(loop.get(name, 0) for name in ALU) / weights
    per_weight = f", {one['loop_per_weight']:.2f} instructions a weight, {one['alu_per_weight']:.2f} ALU" if one["weights"] else ""
    return f"{architecture} {one['name']}: {one['registers']} registers, {one['spilled']} spilled, {one['shared']} bytes shared{per_weight}"
