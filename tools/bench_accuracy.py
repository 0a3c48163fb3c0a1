"""Perplexity of the demo model on all of its held-out text: float16, naive quantization, SmoothQuant and SmoothQuant+, with and without
outliers planted. Or of a model of yours, as it is.

    python tools/bench_accuracy.py            prints the markdown tables of docs/benchmarks.md; about 20 minutes
    python tools/bench_accuracy.py MODEL --calibration FILE --text FILE [--samples 64] [--group-size 128]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL
from smoothquant_plus.demo.run import CHANNELS, SCALE, SEQ_LEN, write_planted
from smoothquant_plus.evaluation.perplexity import evaluate
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.models.checkpoint import Checkpoint, linear_layout
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration

W8A8: dict[str, dict[str, Any]] = {
    "naive, per-token dynamic": {"activations": "token", "smooth": "none"},
    "naive, per-tensor dynamic": {"activations": "tensor", "smooth": "none", "target": "here"},
    "naive, per-tensor static": {"activations": "static", "smooth": "none"},
    "SmoothQuant O1, per-token dynamic": {"activations": "token"},
    "SmoothQuant O2, per-tensor dynamic": {"activations": "tensor", "target": "here"},
    "SmoothQuant O3, per-tensor static": {"activations": "static"},
    "SmoothQuant O3, `--smooth all`": {"activations": "static", "smooth": "all"},
    "SmoothQuant O3, weights per tensor": {"activations": "static", "weights": "tensor"},
}
W4A16: dict[str, dict[str, Any]] = {
    "round to nearest": {"smooth": "none"},
    "SmoothQuant+, `--alpha model`": {"alpha": "model"},
    "SmoothQuant+, `--alpha block`": {"alpha": "block"},
}
GROUPS: dict[str, dict[str, Any]] = {
    "128": {},
    "64": {"group_size": 64},
    "32": {"group_size": 32},
    "128, symmetric": {"symmetric": True},
}
HEADS: dict[str, dict[str, Any]] = {
    "SmoothQuant O1": {"activations": "token"},
    "SmoothQuant+, `--alpha model`": {"scheme": "w4a16", "alpha": "model"},
}
ATTENTION = HEADS | {"SmoothQuant O3": {"activations": "static"}}
COUNTS = (0, 1, 3, CHANNELS, 16)
TEXT = Calibration(text=(str(CALIBRATION),), samples=64, seq_len=SEQ_LEN)


def score(directory: Path, attention: str | None = None, text: Path = HELD_OUT) -> float:
    return evaluate(directory, [str(text)], seq_len=SEQ_LEN, dtype=torch.float32, attention=attention).perplexity


def quantized(source: Path, directory: Path, calibration: Calibration = TEXT, text: Path = HELD_OUT, **options: Any) -> tuple[float, Any]:
    """Perplexity of the quantized model, and the alpha that it was smoothed with."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        found = quantize(source, Path(name) / "out", calibration=calibration, **options)
        return score(Path(found.output), text=text), found.alpha


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a model directory; by default the demo model")
    parser.add_argument("--calibration", type=Path, help="text that the model is calibrated on")
    parser.add_argument("--text", type=Path, help="text that it is evaluated on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    if not options.model:
        demo()
    elif options.calibration and options.text:
        of_model(
            options.model,
            Calibration(text=(str(options.calibration),), samples=options.samples, seq_len=SEQ_LEN),
            options.text,
            options.group_size,
        )
    else:
        parser.error("a model of yours needs --calibration and --text")


def of_model(model: Path, calibration: Calibration, text: Path, group_size: int) -> None:
    """Each row as soon as it is known."""
    print(f"\n| {model.name} | alpha | perplexity |\n|---|---|---|\n| as it is | | {score(model, text=text):.3f} |", flush=True)
    rows = {f"W8A8, {row}": how for row, how in W8A8.items()}
    rows |= {f"W4A16, groups of {group_size}, {row}": how | {"scheme": "w4a16", "group_size": group_size} for row, how in W4A16.items()}
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        for row, how in rows.items():
            value, alpha = quantized(model, Path(name), calibration, text, **how)
            print(f"| {row} | {alpha if isinstance(alpha, float) else ''} | {value:.3f} |", flush=True)


def demo() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sources = {}
        for count in COUNTS:
            sources[count] = MODEL if count == 0 else directory / f"planted-{count}"
            if count:
                write_planted(sources[count], channels=count)
        print(f"windows of {SEQ_LEN} tokens; planted: channels of each norm x {SCALE:g}")
        full = {count: score(source) for count, source in sources.items()}

        rows = {"float16": [f"{full[count]:.3f}" for count in (0, CHANNELS)]}
        for row, options in W8A8.items():
            rows[row] = [f"{quantized(sources[count], directory, **options)[0]:.3f}" for count in (0, CHANNELS)]
        table("W8A8", ["as trained", f"{CHANNELS} channels planted"], rows)

        found = {
            row: {count: quantized(sources[count], directory, scheme="w4a16", **options) for count in COUNTS}
            for row, options in W4A16.items()
        }
        rows = {"float16": [f"{full[count]:.3f}" for count in COUNTS]}
        for row, columns in found.items():
            rows[row] = [f"{value:.3f}" + (f" ({alpha:g})" if isinstance(alpha, float) else "") for value, alpha in columns.values()]
        for row in list(W4A16)[1:]:
            rows[f"of the loss, {row} closes"] = [closed(full[c], found["round to nearest"][c][0], found[row][c][0]) for c in COUNTS]
        table("W4A16, groups of 128", ["as trained", *(f"{count} planted" for count in COUNTS[1:])], rows)

        rows = {}
        for group, options in GROUPS.items():
            naive, _ = quantized(sources[CHANNELS], directory, scheme="w4a16", smooth="none", **options)
            plus, alpha = quantized(sources[CHANNELS], directory, scheme="w4a16", alpha="model", **options)
            rows[group] = [f"{naive:.3f}", f"{plus:.3f} ({alpha:g})", closed(full[CHANNELS], naive, plus)]
        table(f"groups, {CHANNELS} channels planted", ["round to nearest", "SmoothQuant+, `--alpha model`", "of the loss closed"], rows)
        heads(sources[CHANNELS], directory)
        attention(sources[CHANNELS], directory)


def attention(source: Path, directory: Path) -> None:
    """What attention in INT8 costs."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        models = {"float16": source}
        for index, (row, options) in enumerate(ATTENTION.items()):
            models[row] = Path(quantize(source, Path(name) / str(index), calibration=TEXT, **options).output)
        rows = {row: [f"{score(model, how):.3f}" for how in (None, "int8")] for row, model in models.items()}
    table(f"linear layers, {CHANNELS} channels planted", ["attention in floats", "in INT8"], rows)


def heads(source: Path, directory: Path) -> None:
    """What an output head of fewer bits costs, and saves."""
    rows = {}
    for row, options in HEADS.items():
        found = [quantized(source, directory, lm_head=head, **options) for head in (None, *SCHEMES)]
        rows[row] = [f"{value:.3f}" for value, _ in found]
    weight = Checkpoint(source).tensors["lm_head.weight"]
    stored = [linear_layout(scheme, *weight.shape, weight.dtype).values() for scheme in SCHEMES.values()]
    sizes = [weight.nbytes, *(sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout) for layout in stored)]
    rows["the head, MB"] = [f"{size / 1e6:.2f}" for size in sizes]
    table(f"output head, {CHANNELS} channels planted", ["float16", *SCHEMES], rows)


def closed(full: float, naive: float, plus: float) -> str:
    return f"{(naive - plus) / (naive - full):.0%}"


if __name__ == "__main__":
    main()
