"""Write a Llama model of a given shape with random weights, to measure memory and speed on shapes that need no download.

    python tools/make_random_model.py OUT --shape 1b|3b|7b [--layers N] [--dtype float16]

Writes OUT/config.json, a byte-level tokenizer padded to the vocabulary, one safetensors shard per decoder block (and one each for the
embedding and the output head), and the index. Only one shard is in memory at a time.

The values mean nothing. To be fast, every tensor is cut out of one buffer of normal random numbers, tiled, each from another offset;
the buffer's length is prime, so that the rows of a matrix differ. Matrices have standard deviation 1 / sqrt(input channels), norms are
near 1 and embeddings near unit size, so that hidden states stay finite. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "1b": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000},  # TinyLlama-1.1B
    "3b": {"hidden": 3200, "intermediate": 8640, "layers": 26, "heads": 32, "kv_heads": 32, "vocab": 32000},  # OpenLLaMA-3B
    "7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},  # Llama-2-7B
}
DTYPES = ("float16", "bfloat16", "float32")
BYTES = 257  # every byte, and the end of the sequence
POOL = 4_194_301  # numbers in the random buffer: a prime


def make(out: Path, shape: dict[str, int], dtype: torch.dtype = torch.float16) -> LlamaConfig:
    """Write the model directory `out`, which must not exist; `shape` has the keys of a row of SHAPES."""
    if shape["vocab"] < BYTES:
        raise ValueError(f"a byte-level tokenizer needs a vocabulary of at least {BYTES}, not {shape['vocab']}")
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=4096,
        bos_token_id=BYTES - 1,
        eos_token_id=BYTES - 1,
        pad_token_id=BYTES - 1,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    out.mkdir(parents=True)
    config.save_pretrained(out)
    make_tokenizer(shape["vocab"]).save_pretrained(out)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    weight_map, total, start = {}, 0, 0
    shards = list(plan_shards(config))
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for name, size in tensors.items():
            start = (start + 1_000_003) % POOL
            values[name] = random_tensor(pool, start, name, size).to(dtype)
            total += values[name].nbytes
        save_file(values, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return config


def plan_shards(config: LlamaConfig) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes of the tensors of each shard: the embedding and last norm, each block, the output head."""
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    in_blocks = [[name for name in sizes if name.startswith(f"model.layers.{index}.")] for index in range(config.num_hidden_layers)]
    for names in (["model.embed_tokens.weight", "model.norm.weight"], *in_blocks, ["lm_head.weight"]):
        yield {name: sizes[name] for name in names}


def random_tensor(pool: Tensor, start: int, name: str, size: torch.Size) -> Tensor:
    """Float32 values for the tensor `name`: `pool` repeated from `start` on, scaled to what such a tensor is like."""
    if len(size) == 1:
        return 1 + 0.1 * pool[: size.numel()]  # a norm's gain
    scaled = pool.roll(-start) * (1.0 if "embed" in name else size[-1] ** -0.5)
    return scaled.repeat(-(-size.numel() // POOL))[: size.numel()].reshape(size)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes as tokens, needs no training; the rest of the vocabulary are tokens that no text gives."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<|end|>", *(f"<|unused {number}|>" for number in range(vocabulary - BYTES))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="new model directory; must not exist")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="TinyLlama-1.1B, OpenLLaMA-3B or Llama-2-7B")
    for key in next(iter(SHAPES.values())):
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=int, metavar="N", help=f"another number than the shape's {key.replace('_', ' ')}"
        )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="what the weights are stored in (default: float16)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already: choose another OUT, or remove it.")
    shape = {key: value if (given := getattr(arguments, key)) is None else given for key, value in SHAPES[arguments.shape].items()}
    try:
        make(arguments.out, shape, getattr(torch, arguments.dtype))
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {shape}, {size / 1e9:.2f} GB in {arguments.dtype}")


if __name__ == "__main__":
    main()
