"""Greedy continuation of a prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from smoothquant_plus.errors import InputError
from smoothquant_plus.models.skeleton import check_positions, load_config
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import check_ids, load_tokenizer, tokenize


@torch.inference_mode()
def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    arithmetic: str | None = None,
    attention: str | None = None,
) -> str:
    """What the model in `directory`, quantized or not, continues `prompt` with. Raises InputError as `load` does, and for an empty prompt."""
    config = load_config(Path(directory)).get_text_config()
    tokenizer = load_tokenizer(Path(directory))
    ids = tokenize(prompt, tokenizer)
    if not ids:
        raise InputError("the prompt is empty: give --prompt TEXT.")
    check_ids(torch.tensor(ids), config.vocab_size, Path(directory))
    check_positions(config, len(ids) + max_new_tokens, f"--max-new-tokens {max_new_tokens} after the prompt's {len(ids)} tokens")
    model = load(directory, device=device, dtype=dtype, backend=backend, arithmetic=arithmetic, attention=attention)
    # Nothing else of what the model's author wants of `generate`: no beams, penalties or other kinds of caches.
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**kept)
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False)[0]
    # Decoded with the prompt: by themselves many tokenizers drop the space that the first new token begins with.
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (output[: len(ids)], output))
    return str(whole[len(before) :])
