"""The demonstration: full precision, naive quantization, SmoothQuant and SmoothQuant+ on the shipped model, executed by integer kernels."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL, PROBLEMS, PROSE
from smoothquant_plus.demo.outliers import plant_outliers
from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.perplexity import perplexity
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.progress import note
from smoothquant_plus.runtime.load import load
from smoothquant_plus.search import Search
from smoothquant_plus.text import encode, load_tokenizer

CHANNELS, SCALE = 8, 100.0
SEQ_LEN = 512
HELD_OUT_TOKENS = 16 * SEQ_LEN
PROMPT = "def read_lines(path):\n    with open(path) as"
NEW_TOKENS = 32

CODE = Calibration(text=(str(CALIBRATION),), samples=32, seq_len=SEQ_LEN)
DOMAINS = {
    name: {
        "scheme": "w4a16",
        "alpha": "model",
        "search": Search(samples=4),
        "calibration": Calibration((str(text),), samples=12, seq_len=SEQ_LEN),
    }
    for name, text in (("problems", PROBLEMS), ("prose", PROSE))
}
RECIPES: dict[str, dict[str, Any]] = {
    "naive W8A8, per-tensor static": {"activations": "static", "smooth": "none", "calibration": CODE},
    "SmoothQuant O1, per-token dynamic": {"activations": "token", "calibration": CODE},
    "SmoothQuant O2, per-tensor dynamic": {"activations": "tensor", "target": "here", "calibration": CODE},
    "SmoothQuant O3, per-tensor static": {"activations": "static", "calibration": CODE},
    "naive W4A16, groups of 128": {"scheme": "w4a16", "smooth": "none"},
    "SmoothQuant+, calibrated on code problems": DOMAINS["problems"],
    "SmoothQuant+, calibrated on prose": DOMAINS["prose"],
}

INTRODUCTION = f"""
A Llama with 5 million parameters, trained on Python's standard library, on text that neither training nor calibration saw. A model this
small lacks the activation outliers of models from 6.7 billion parameters on, so {CHANNELS} channels of each norm were made {SCALE:g} times larger
by an exactly equivalent rewrite first: the float16 row is the model after that. SmoothQuant+ chose alpha by the loss of the whole model,
once on text of the model's domain and once on other text. Its layers are so small that tokens/s shows what a call costs, not what the
arithmetic does."""

CLOSING = """
The same on a model of your own (a directory with safetensors) and text of its domain:
  sqplus inspect MODEL
  sqplus quantize MODEL OUT --scheme w8a8 --text calibration.txt
  sqplus quantize MODEL OUT --scheme w4a16 --alpha model --text calibration.txt
  sqplus verify OUT --against MODEL
  sqplus eval OUT --text held_out.txt
  sqplus generate OUT --prompt "..."
"""


@dataclass(frozen=True)
class Row:
    name: str
    alpha: float | None
    perplexity: float
    megabytes: float
    tokens_per_second: float
    text: str


@dataclass(frozen=True)
class Demo:
    introduction: str
    prompt: str
    rows: list[Row]
    closing: str


def run(output: Path | None = None) -> Demo:
    """Quantize and compare. The models are kept in the new directory `output`, or removed at the end when it is None."""
    with _directory(output) as directory:
        planted = directory / "planted"
        write_planted(planted)
        rows = [measure("float16, outliers planted", None, planted)]
        for number, (name, options) in enumerate(RECIPES.items()):
            note(f"{name}:")
            found = quantize(planted, directory / f"quantized-{number}", **options)
            assert not isinstance(found.alpha, str)  # none of the recipes searches by block
            rows.append(measure(name, found.alpha, Path(found.output)))
        return Demo(INTRODUCTION, PROMPT, rows, CLOSING)


def write_planted(directory: Path, channels: int = CHANNELS) -> None:
    """The shipped model with outliers planted, as a model directory of its own."""
    model = load(MODEL, dtype=torch.float32)
    plant_outliers(model, channels, SCALE)
    model.half().save_pretrained(directory)
    load_tokenizer(MODEL).save_pretrained(directory)


@torch.inference_mode()
def measure(name: str, alpha: float | None, directory: Path) -> Row:
    """Perplexity, size, decoding speed and a continuation, computed in float32 around the integer products."""
    model, tokenizer = load(directory, dtype=torch.float32), load_tokenizer(directory)
    ids = encode((str(HELD_OUT),), tokenizer)[:HELD_OUT_TOKENS]
    score = perplexity(model, ids, SEQ_LEN, SEQ_LEN)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    generate = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(**inputs, max_new_tokens=2, do_sample=False)  # the first call sets things up
    start = time.perf_counter()
    continued = model.generate(**inputs, **generate)
    speed = NEW_TOKENS / (time.perf_counter() - start)
    text = tokenizer.decode(continued[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Row(name, alpha, score.perplexity, Checkpoint(directory).nbytes / 1e6, speed, text)


@contextmanager
def _directory(output: Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="sqplus-demo-") as directory:
            yield Path(directory)
    elif output.exists():
        raise InputError(f"{output} exists already: choose another --out, or remove it.")
    else:
        output.mkdir(parents=True)
        yield output
