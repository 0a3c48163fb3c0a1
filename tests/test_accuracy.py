"""What quantization costs, on models that were trained, with activation outliers planted in them.

The shipped model and the one trained here are far smaller than the models that grow outliers by themselves, so some channels of each norm
are made 100 times larger by an exactly equivalent rewrite (demo/outliers.py). Perplexity is on text that neither training nor calibration saw.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import families
from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL
from smoothquant_plus.demo.outliers import plant_outliers
from smoothquant_plus.evaluation.perplexity import perplexity
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import encode, load_tokenizer

TOKENS = 4096
SEQ_LEN = 512
RATE, STEPS = 2e-3, 400


@dataclass(frozen=True)
class Trained:
    """A trained model, text to calibrate it on, and token ids to judge it by that it never saw."""

    directory: Path
    calibration: Calibration
    held_out: torch.Tensor


def save(model: Any, directory: Path, tokenizer: Any, dtype: torch.dtype = torch.float16) -> Path:
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def shipped() -> Trained:
    held_out = encode((str(HELD_OUT),), load_tokenizer(MODEL))[:TOKENS]
    return Trained(MODEL, Calibration(text=(str(CALIBRATION),), samples=16, seq_len=SEQ_LEN), held_out)


def train_opt(directory: Path) -> Trained:
    """A small OPT-layout model, trained for some seconds on sentences about sums, byte by byte; each sentence is in one of the three texts."""
    sentences = [f"{a} and {b} make {a + b}, so {b} is {a + b} less {a}. " for a in range(60) for b in range(60)]
    random.Random(0).shuffle(sentences)
    for name, part in (("train", sentences[:3000]), ("calibration", sentences[3000:3300]), ("held_out", sentences[3300:])):
        (directory / f"{name}.txt").write_text("".join(part))
    tokenizer = families.make_tokenizer()
    ids = encode((str(directory / "train.txt"),), tokenizer)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=128,
        ffn_dim=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=128,
        max_position_embeddings=128,
        dropout=0.0,
        init_std=0.05,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, (STEPS - step) / (STEPS / 3))
        starts = torch.randint(len(ids) - 129, (8,))
        batch = torch.stack([ids[start : start + 129] for start in starts])
        logits = model(batch[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    source = save(model.eval(), directory / "opt", tokenizer)
    calibration = Calibration(text=(str(directory / "calibration.txt"),), samples=32, seq_len=128)
    return Trained(source, calibration, encode((str(directory / "held_out.txt"),), tokenizer)[:TOKENS])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smoothquant_saves_what_naive_int8_loses(name: str, tmp_path: Path) -> None:
    trained = shipped() if name == "llama" else train_opt(tmp_path)
    seq_len, calibration = trained.calibration.seq_len, trained.calibration

    def score(directory: Path) -> float:
        return perplexity(load(directory, dtype=torch.float32), trained.held_out, seq_len, seq_len).perplexity

    model = load(trained.directory, dtype=torch.float32)
    plant_outliers(model, channels=3, scale=100.0)
    planted = save(model, tmp_path / "planted", load_tokenizer(trained.directory))
    full = score(planted)
    assert full == pytest.approx(score(trained.directory), rel=2e-3), "planting changes nothing but what quantization meets"
    quantize(planted, tmp_path / "naive", activations="static", smooth="none", calibration=calibration)
    naive = score(tmp_path / "naive")
    found = {}
    for activations in ("token", "tensor", "static"):
        quantize(planted, tmp_path / activations, activations=activations, calibration=calibration, target="here")
        found[activations] = score(tmp_path / activations)
    print(f"{name}: float {full:.3f}, naive {naive:.3f}, SmoothQuant {found}")  # noqa: T201
    both = load(tmp_path / "static", dtype=torch.float32, attention="int8")
    found["static, and attention"] = perplexity(both, trained.held_out, seq_len, seq_len).perplexity
    assert naive > 2 * full
    assert all(abs(value / full - 1) < 0.01 for value in found.values()), found


def test_all_pairs_save_outliers_that_the_norms_alone_do_not(tmp_path: Path) -> None:
    """Outliers in up_proj's output too: `--smooth norms` cannot reach those, `--smooth all` does."""
    trained = shipped()
    model = load(trained.directory, dtype=torch.float32)
    plant_outliers(model, channels=3, scale=100.0, smooth="all")
    planted = save(model, tmp_path / "planted", load_tokenizer(trained.directory), torch.float32)
    scores = {}
    for smooth in ("norms", "all"):
        quantize(planted, tmp_path / smooth, activations="static", smooth=smooth, calibration=trained.calibration)
        scores[smooth] = perplexity(load(tmp_path / smooth), trained.held_out, SEQ_LEN, SEQ_LEN).perplexity
    full = perplexity(load(planted), trained.held_out, SEQ_LEN, SEQ_LEN).perplexity
    print(f"float {full:.3f}, {scores}")  # noqa: T201
    assert scores["all"] - full < 0.1 * (scores["norms"] - full), (full, scores)
