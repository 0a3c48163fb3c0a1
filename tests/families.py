"""Every family as a tiny model: random weights, or outliers planted in them, in a directory as a user has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, PreTrainedTokenizerFast

VOCABULARY = 257  # every byte, and the end of the sequence

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 256}

# One tiny configuration for each layout that a family's row must be right about.
TINY: dict[str, Any] = {
    "llama": LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **COMMON),
    "llama-mha-tied-biases": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        **COMMON,
    ),
    "mistral-sliding-window": MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        **COMMON,
    ),
    "opt": OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, **COMMON),
    "opt-gelu-untied": OPTConfig(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        activation_function="gelu",
        tie_word_embeddings=False,
        **COMMON,
    ),
}

TEXT = "".join(f"{i} times {i + 7} is {i * (i + 7)}; the square of {i} is {i * i}.\n" for i in range(400))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def build(name: str, seed: int = 0) -> Any:
    """The tiny model `name`, float32, with norm gains, biases and weights far from their initial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TINY[name]), dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in path:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return model


def write(name: str, directory: Path, dtype: torch.dtype = torch.float16, seed: int = 0, shard_size: str = "50KB") -> Path:
    """The tiny model `name` as a model directory of several shards, with a tokenizer."""
    build(name, seed).to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory
