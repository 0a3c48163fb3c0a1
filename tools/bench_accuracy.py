"""Perplexity of the demo model on all of its held-out text: float16, naive INT8, SmoothQuant, with and without outliers planted.

python tools/bench_accuracy.py            prints a markdown table (docs/benchmarks.md)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL
from smoothquant_plus.demo.run import CHANNELS, SCALE, SEQ_LEN, write_planted
from smoothquant_plus.evaluation.perplexity import evaluate
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration

ROWS = {
    "naive, per-token dynamic": {"activations": "token", "smooth": "none"},
    "naive, per-tensor dynamic": {"activations": "tensor", "smooth": "none"},
    "naive, per-tensor static": {"activations": "static", "smooth": "none"},
    "SmoothQuant O1, per-token dynamic": {"activations": "token"},
    "SmoothQuant O2, per-tensor dynamic": {"activations": "tensor"},
    "SmoothQuant O3, per-tensor static": {"activations": "static"},
    "SmoothQuant O3, `--smooth all`": {"activations": "static", "smooth": "all"},
    "SmoothQuant O3, weights per tensor": {"activations": "static", "weights": "tensor"},
}


def main() -> None:
    calibration = Calibration(text=(str(CALIBRATION),), samples=64, seq_len=SEQ_LEN)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_planted(directory / "planted")
        sources = {"as trained": MODEL, "planted": directory / "planted"}
        scores: dict[str, list[float]] = {}
        for kind, source in sources.items():
            results = {"float16": source}
            for row, options in ROWS.items():
                results[row] = directory / f"{kind}-{len(results)}"
                quantize(source, results[row], calibration=calibration, **options)
            for row, path in results.items():
                found = evaluate(path, [str(HELD_OUT)], seq_len=SEQ_LEN, dtype=torch.float32)
                scores.setdefault(row, []).append(found.perplexity)
    print(f"{found.tokens} held-out tokens, windows of {SEQ_LEN}; planted: {CHANNELS} channels of each norm x {SCALE:g}\n")
    print("| W8A8 | as trained | outliers planted |\n|---|---|---|")
    for row, (trained, planted) in scores.items():
        print(f"| {row} | {trained:.3f} | {planted:.3f} |")


if __name__ == "__main__":
    main()
