"""The same model quantized by this package and by llm-compressor, on the same windows of text: perplexity, time and peak memory. Prints markdown
tables (docs/benchmarks.md).

    python tools/bench_peers.py MODEL --calibration FILE --text FILE [--samples 24] [--group-size 128] [--only PATTERN]
    python tools/bench_peers.py --families        what smoothing alone does to the tiny models of the tests, in float32

Needs llm-compressor beside this package (`pip install llmcompressor`). Each checkpoint is made in a process of its own, whose peak resident
memory and time are given, and each is evaluated by `evaluate`: its integers, multiplied by the same kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench_accuracy import SEQ_LEN, score
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.text import load_tokenizer, take_samples

# What `quantize` is given; W4A16 rows also the group size.
OURS: dict[str, dict[str, Any]] = {
    "W8A8, per token: rounded to nearest": {"smooth": "none"},
    "W8A8, per token: SmoothQuant": {},
    "W8A8, static: SmoothQuant": {"activations": "static"},
    "W8A8, static: SmoothQuant, `--smooth all`": {"activations": "static", "smooth": "all"},
    "W4A16: rounded to nearest": {"scheme": "w4a16", "smooth": "none"},
    "W4A16: SmoothQuant+": {"scheme": "w4a16", "alpha": "model"},
    "W4A16: SmoothQuant+, `--smooth all`": {"scheme": "w4a16", "alpha": "model", "smooth": "all"},
    "W4A16: SmoothQuant+, `--alpha block`": {"scheme": "w4a16", "alpha": "block"},
}
# Names of llm-compressor's modifiers, in the order of its recipe; the row's name says what is quantized, and to what.
THEIRS: dict[str, tuple[str, ...]] = {
    "W8A8, per token: rounded to nearest": ("QuantizationModifier",),
    "W8A8, per token: SmoothQuant": ("SmoothQuantModifier", "QuantizationModifier"),
    "W8A8, per token: SmoothQuant, GPTQ": ("SmoothQuantModifier", "GPTQModifier"),
    "W8A8, static: SmoothQuant": ("SmoothQuantModifier", "QuantizationModifier"),
    "W4A16: rounded to nearest": ("QuantizationModifier",),
    "W4A16: AWQ": ("AWQModifier", "QuantizationModifier"),
    "W4A16: GPTQ": ("GPTQModifier",),
}


def recipe(row: str, group_size: int) -> list[Any]:
    """llm-compressor's modifiers. SmoothQuant has the strength of its own examples."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if row.startswith("W4A16"):
        weights, inputs = QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=False), None
    else:
        static = "static" in row
        weights = QuantizationArgs(num_bits=8, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, strategy="tensor" if static else "token", dynamic=not static)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    modifiers = {
        "SmoothQuantModifier": lambda: SmoothQuantModifier(smoothing_strength=0.8),
        "AWQModifier": AWQModifier,
        "QuantizationModifier": lambda: QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        "GPTQModifier": lambda: GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
    }
    return [modifiers[name]() for name in THEIRS[row]]


def make_theirs(row: str, model: Path, out: Path, calibration: Calibration, group_size: int) -> None:
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_args, **_options: None  # AWQ's, which fails without an accelerator
    tokenizer = load_tokenizer(model)
    batches = take_samples(calibration.text, tokenizer, calibration.samples, calibration.seq_len).batches
    loader = DataLoader([{"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])} for ids in batches], batch_size=1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(model=loaded, tokenizer=tokenizer, recipe=recipe(row, group_size), dataset=loader, output_dir=str(out))


def of_families() -> None:
    """How far the logits of each tiny model move, relatively, when it is smoothed and nothing is rounded; only rounding errors should be left."""
    os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"  # it writes on stdout; and its GPTQ fails with this
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils.data import DataLoader

    import families

    tokenizer = families.make_tokenizer()
    ids = tokenizer(families.TEXT[:2048], return_tensors="pt")["input_ids"]
    windows = [{"input_ids": window[0], "attention_mask": torch.ones_like(window[0])} for window in ids.split(128, dim=1)]
    print("| layout | llm-compressor | here |\n|---|---|---|")
    for name, config in families.TINY.items():
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            source = families.write(name, Path(directory) / name, torch.float32)
            ours = families.change_by_smoothing(source, torch.float32, "all")
            model = families.auto_class(config).from_pretrained(source)
            before, logits = {key: tensor.clone() for key, tensor in model.state_dict().items()}, model(families.IDS).logits
            recipe = [SmoothQuantModifier(smoothing_strength=0.8)]
            try:
                oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=DataLoader(windows, batch_size=1))
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                theirs = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            else:
                changed = any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)
                theirs = f"{families.relative(model(families.IDS).logits, logits):.1e}" if changed else "nothing is smoothed"
        print(f"| {name} | {theirs} | {ours:.1e} |", flush=True)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MB of a command, whose output goes to stderr. Raises SystemExit when it fails."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--calibration", type=Path, help="text that the model is calibrated on")
    parser.add_argument("--text", type=Path, help="text that it is evaluated on")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--only", default="", help="rows whose name, such as 'theirs, W4A16: GPTQ', this pattern is found in")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)  # whose, row, output
    options = parser.parse_args()
    if options.families:
        of_families()
        return
    if not (options.model and options.calibration and options.text):
        parser.error("give MODEL, --calibration and --text, or --families")
    calibration = Calibration(text=(str(options.calibration),), samples=options.samples, seq_len=SEQ_LEN)
    if options.make:
        whose, row, out = options.make
        if whose == "theirs":
            make_theirs(row, options.model, Path(out), calibration, options.group_size)
        else:
            group = {"group_size": options.group_size} if row.startswith("W4A16") else {}
            quantize(options.model, out, calibration=calibration, **OURS[row], **group)
        return
    print(f"| {options.model.name} | perplexity | seconds | peak MB |\n|---|---|---|---|")
    print(f"| as it is | {score(options.model, text=options.text):.3f} | | |", flush=True)
    with tempfile.TemporaryDirectory(dir=options.model.parent) as name:
        for whose, rows in {"ours": OURS, "theirs": THEIRS}.items():
            for index, row in enumerate(rows):
                if not re.search(options.only, f"{whose}, {row}"):
                    continue
                out = Path(name) / f"{whose}-{index}"
                seconds, peak = measured([sys.executable, *sys.argv, "--make", whose, row, str(out)])
                value = score(out, text=options.text)
                print(f"| {whose}, {row} | {value:.3f} | {seconds:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
