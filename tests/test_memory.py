"""One decoder block in memory: a model with three times the layers takes no more memory to quantize."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "make_random_model.py"))["make"]
SHAPE = {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 16, "vocab": 2048}

# Between equal runs the peak moves by some 15 MB (how the allocator happens to place tensors). Six blocks more, kept in memory, would be
# 75 MB as integers, 150 MB in float16 and 300 MB in float32.
NOISE_MB = 40


def peak_mb(layers: int, text: Path, directory: Path) -> float:
    MAKE(directory / "model", {**SHAPE, "layers": layers})
    arguments = [directory / "model", directory / "out", "--samples", "4", "--seq-len", "128", "--text", text, "--json"]
    command = [sys.executable, "-m", "smoothquant_plus.cli", "quantize", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["peak_rss_mb"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(text_file: Path, tmp_path: Path) -> None:
    few, many = (peak_mb(layers, text_file, tmp_path / str(layers)) for layers in (3, 9))
    assert many <= few + NOISE_MB, f"{few} MB with 3 layers, {many} MB with 9"
