"""Perplexity on text, with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.models.skeleton import check_positions, load_config
from smoothquant_plus.progress import steps
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import as_texts, check_ids, check_texts, encode, load_tokenizer

LARGEST_LOSS = 700.0  # its exponential is still a number


@dataclass(frozen=True)
class Perplexity:
    """`loss` is the mean negative log-likelihood in nats over the `tokens` that were predicted; perplexity is its exponential."""

    perplexity: float
    loss: float
    tokens: int


def evaluate(
    model: str | Path,
    text: str | Path | Sequence[str | Path],
    *,
    seq_len: int = 512,
    stride: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    arithmetic: str | None = None,
    attention: str | None = None,
) -> Perplexity:
    """Perplexity of the model in directory `model` on `text` (see `perplexity`).

    Raises InputError for a model, text or window that cannot be used.
    """
    stride = seq_len if stride is None else stride
    if seq_len < 1 or not 1 <= stride <= seq_len:
        raise InputError(f"--seq-len {seq_len} --stride {stride}: the stride must be between 1 and the sequence length.")
    texts = as_texts(text)
    check_texts(texts)
    if not texts:
        raise InputError("text to evaluate on is needed: give --text FILE.")
    config = load_config(Path(model)).get_text_config()
    check_positions(config, seq_len, f"--seq-len {seq_len}")
    ids = encode(texts, load_tokenizer(Path(model)))
    check_ids(ids, config.vocab_size, Path(model))
    if len(ids) < 2:
        raise InputError(f"the text is too short: {', '.join(texts)} has {len(ids)} token, and at least 2 are needed.")
    loaded = load(model, device=device, dtype=dtype, backend=backend, arithmetic=arithmetic, attention=attention)
    return perplexity(loaded, ids, seq_len, stride)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, seq_len: int, stride: int) -> Perplexity:
    """Perplexity of `ids`, int64 (tokens,): a window of `seq_len` tokens moves by `stride`, and every token but the first is predicted once,
    in the first window that has it.

    With stride = seq_len windows do not overlap: the first prediction of each has a context of one token (the papers' scripts leave that
    prediction out). A smaller stride gives every prediction at least seq_len - stride tokens of context.
    """
    total, predicted = 0.0, 1  # ids[0] has nothing to be predicted from
    starts = list(range(0, len(ids) - 1, stride))
    with steps("window", len(starts)) as progress:
        for start in starts:
            end = min(start + seq_len + 1, len(ids))
            fresh = end - predicted
            if fresh > 0:
                window = ids[None, start : end - 1].to(model.device)
                logits = model(input_ids=window, use_cache=False).logits[0, -fresh:]
                targets = ids[end - fresh : end].to(logits.device)
                total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
                predicted = end
            progress.step()
    loss = total / (predicted - 1)
    if not loss < LARGEST_LOSS:  # NaN too
        raise InputError(f"the loss is {loss}: the model's logits are not usable in {model.dtype}; use --dtype float32.")
    return Perplexity(math.exp(loss), loss, predicted - 1)
