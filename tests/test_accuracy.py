"""What quantization costs, on models that were trained, with activation outliers planted in them.

The shipped model and the one trained here are far smaller than the models that grow outliers by themselves, so three channels of each norm
are made 100 times larger by an exactly equivalent rewrite (demo/outliers.py). Perplexity is on text that neither training nor calibration saw.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL
from smoothquant_plus.demo.outliers import plant_outliers
from smoothquant_plus.evaluation.perplexity import perplexity
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import encode, load_tokenizer

TOKENS = 4096
SEQ_LEN = 512


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return encode((str(HELD_OUT),), load_tokenizer(MODEL))[:TOKENS]


def save(model: Any, directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    model.to(dtype).save_pretrained(directory)
    load_tokenizer(MODEL).save_pretrained(directory)
    return directory


def train_opt(directory: Path) -> Path:
    """A small OPT-layout model, trained for half a minute on the first half of the calibration text (this test calibrates on the rest)."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODEL)
    text = CALIBRATION.read_text()
    (directory / "train.txt").write_text(text[: len(text) // 2])
    (directory / "rest.txt").write_text(text[len(text) // 2 :])
    ids = encode((str(directory / "train.txt"),), tokenizer)
    end = tokenizer.eos_token_id
    shape = {
        "hidden_size": 128,
        "ffn_dim": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 128,
        "dropout": 0.0,
    }
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            init_std=0.05,
            **shape,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps, windows = 600, ids[: len(ids) // 129 * 129].view(-1, 129)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 10, (steps - step) / 50)
        batch = windows[torch.randint(len(windows), (8,))]
        logits = model(batch[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(model.eval(), directory / "opt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Calibration]]:
    """The trained model called 'llama' (shipped) or 'opt' (trained here), and text to calibrate it on."""
    directory = tmp_path_factory.mktemp("trained")

    def get(name: str) -> tuple[Path, Calibration]:
        if name == "llama":
            return MODEL, Calibration(text=(str(CALIBRATION),), samples=16, seq_len=SEQ_LEN)
        if not (directory / "opt").exists():
            train_opt(directory)
        return directory / "opt", Calibration(text=(str(directory / "rest.txt"),), samples=16, seq_len=SEQ_LEN)

    return get


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smoothquant_saves_what_naive_int8_loses(
    name: str, plain: Callable[[str], tuple[Path, Calibration]], held_out: torch.Tensor, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    source, calibration = plain(name)
    trained = load(source, dtype=torch.float32)
    before = perplexity(trained, held_out, SEQ_LEN, SEQ_LEN).perplexity
    assert before < len(load_tokenizer(source)) / 8, "it has learned something"
    plant_outliers(trained, channels=3, scale=100.0)
    planted = save(trained, tmp_path / "planted")

    def score(directory: Path) -> float:
        return perplexity(load(directory, dtype=torch.float32), held_out, SEQ_LEN, SEQ_LEN).perplexity

    full = score(planted)
    assert full == pytest.approx(before, rel=2e-3), "planting changes nothing but what quantization meets"
    quantize(planted, tmp_path / "naive", activations="static", smooth="none", calibration=calibration)
    naive = score(tmp_path / "naive")
    found = {}
    for activations in ("token", "tensor", "static"):
        quantize(planted, tmp_path / activations, activations=activations, calibration=calibration)
        found[activations] = score(tmp_path / activations)
    print(f"{name}: float {full:.3f}, naive {naive:.3f}, SmoothQuant {found}")  # noqa: T201
    assert naive > 2 * full
    assert all(abs(value / full - 1) < 0.01 for value in found.values()), found
    torch.set_num_threads(1)


def test_all_pairs_save_outliers_that_the_norms_alone_do_not(held_out: torch.Tensor, tmp_path: Path) -> None:
    """Outliers in up_proj's output too: `--smooth norms` cannot reach those, `--smooth all` does."""
    model = load(MODEL, dtype=torch.float32)
    plant_outliers(model, channels=3, scale=100.0, smooth="all")
    planted = save(model, tmp_path / "planted", torch.float32)
    calibration = Calibration(text=(str(CALIBRATION),), samples=16, seq_len=SEQ_LEN)
    scores = {}
    for smooth in ("norms", "all"):
        quantize(planted, tmp_path / smooth, activations="static", smooth=smooth, calibration=calibration)
        scores[smooth] = perplexity(load(tmp_path / smooth), held_out, SEQ_LEN, SEQ_LEN).perplexity
    full = perplexity(load(planted), held_out, SEQ_LEN, SEQ_LEN).perplexity
    print(f"float {full:.3f}, {scores}")  # noqa: T201
    assert scores["all"] - full < 0.1 * (scores["norms"] - full), (full, scores)
