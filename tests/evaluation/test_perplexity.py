from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.perplexity import evaluate, perplexity
from smoothquant_plus.runtime.load import load

IDS = families.make_tokenizer()(families.TEXT[:100], return_tensors="pt")["input_ids"][0]


@torch.no_grad()
def one_by_one(model: torch.nn.Module, ids: torch.Tensor, context: Callable[[int], int]) -> float:
    """Mean loss with each token predicted alone, from the tokens since context(position)."""
    losses = []
    for position in range(1, len(ids)):
        logits = model(ids[None, context(position) : position]).logits[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[position]).item())
    return sum(losses) / len(losses)


def test_every_token_but_the_first_is_predicted_once(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"), dtype=torch.float32)
    whole = perplexity(model, IDS, seq_len=200, stride=200)
    assert whole.tokens == 99 and whole.loss == pytest.approx(one_by_one(model, IDS, lambda position: 0), rel=1e-4)
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    # Disjoint windows of 16: position p is predicted from the window that begins at a multiple of 16 below it.
    disjoint = perplexity(model, IDS, seq_len=16, stride=16)
    assert disjoint.tokens == 99 and disjoint.loss == pytest.approx(one_by_one(model, IDS, lambda p: (p - 1) // 16 * 16), rel=1e-4)
    sliding = perplexity(model, IDS, seq_len=16, stride=1)
    assert sliding.tokens == 99 and sliding.loss == pytest.approx(one_by_one(model, IDS, lambda p: max(0, p - 16)), rel=1e-4)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 33])
@pytest.mark.parametrize("stride", [1, 7, 16])
def test_short_and_odd_lengths(length: int, stride: int, tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"), dtype=torch.float32)
    assert perplexity(model, IDS[:length], seq_len=16, stride=stride).tokens == length - 1


def test_evaluate_reads_a_directory(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(families.TEXT[:100])
    result = evaluate(tiny("opt"), [str(tmp_path / "text.txt")], seq_len=32, dtype=torch.float32)
    assert result.tokens == 100  # the document's end is predicted too


def test_logits_that_are_not_numbers_are_an_error(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"), dtype=torch.float32)
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"the loss is nan.*--dtype float32"):
        perplexity(model, IDS, seq_len=16, stride=16)
