"""Peak memory while quantizing, on shape-only models: each is made, quantized in a process of its own, and deleted.

python tools/bench_memory.py 1b 3b 7b --work DIR [--text FILE]       prints a markdown table (docs/benchmarks.md)
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from make_random_model import SHAPES, make
from smoothquant_plus.demo import CALIBRATION
from smoothquant_plus.inspection import inspect

SAMPLES, SEQ_LEN = 16, 256


def measure(shape: str, work: Path, text: Path) -> str:
    """One row of the table."""
    model, out = work / shape, work / f"{shape}-w8a8"
    make(model, SHAPES[shape])
    found = inspect(model)
    options = ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--text", str(text), "--json"]
    command = [sys.executable, "-m", "smoothquant_plus.cli", "quantize", str(model), str(out), *options]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    shutil.rmtree(model)
    shutil.rmtree(out)
    before, after = (result[key] / 1e9 for key in ("bytes_before", "bytes_after"))
    return (
        f"| {shape} | {found.parameters / 1e9:.2f} B | {result['blocks']} | {before:.2f} GB | {after:.2f} GB | "
        f"**{result['peak_rss_mb']:.0f} MB** | {found.block_parameters * 4 / 1e6:.0f} MB | {result['seconds']:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True, help="directory for the models; 7b needs 21 GB there")
    parser.add_argument("--text", type=Path, default=CALIBRATION)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(
        f"{SAMPLES} samples of {SEQ_LEN} tokens; {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )
    print(
        "| shape | parameters | blocks | float16 | W8A8 | peak resident | one block in float32 | time |\n|---|---|---|---|---|---|---|---|"
    )
    for shape in options.shapes:
        print(measure(shape, options.work, options.text), flush=True)


if __name__ == "__main__":
    main()
