"""Greedy continuation of a prompt."""

from __future__ import annotations

from pathlib import Path

import torch

from smoothquant_plus.errors import InputError
from smoothquant_plus.models.blocks import check_positions, load_config
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import check_ids, load_tokenizer


@torch.inference_mode()
def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> str:
    """What the model in `directory`, quantized or not, continues `prompt` with. Raises InputError as `load` does, and for an empty prompt."""
    config = load_config(Path(directory))
    tokenizer = load_tokenizer(Path(directory))
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = inputs["input_ids"].numel()
    if tokens == 0:
        raise InputError("the prompt is empty: give --prompt TEXT.")
    check_ids(inputs["input_ids"], config.vocab_size, Path(directory))
    check_positions(config, tokens + max_new_tokens, f"--max-new-tokens {max_new_tokens} after the prompt's {tokens} tokens")
    model = load(directory, device=device, dtype=dtype, backend=backend)
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
