"""Train the demo model that ships with the package: a small Llama on the text of Python's standard library.

    python tools/train_demo_model.py OUT [--steps 3400] [--seed 0] [--threads 2]

Writes OUT/model (float16 safetensors, tokenizer, model card README.md), OUT/held_out.txt and OUT/calibration.txt.
The files of the standard library are split once, by a seeded shuffle of their names, into training, held-out and calibration files:
no line of the last two is ever trained on. The same Python, torch, options and kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
SEQUENCE = 512
BATCH = 4
PEAK_RATE = 3e-3
HELD_OUT_BYTES = 200_000
CALIBRATION_BYTES = 320_000
SKIPPED_DIRECTORIES = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "turtledemo"}
END = "<|endoftext|>"


def standard_library(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Training, held-out and calibration texts: whole files, split by a seeded shuffle of their sorted relative names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(p.relative_to(root) for p in root.rglob("*.py") if not SKIPPED_DIRECTORIES & set(p.relative_to(root).parts))
    random.Random(seed).shuffle(names)
    train: list[str] = []
    held_out: list[str] = []
    calibration: list[str] = []
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="ignore")
        if not text.strip():
            continue
        if len(text) < 40_000 and sum(map(len, held_out)) < HELD_OUT_BYTES:
            held_out.append(text)
        elif len(text) < 40_000 and sum(map(len, calibration)) < CALIBRATION_BYTES:
            calibration.append(text)
        else:
            train.append(text)
    return train, held_out, calibration


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=2048, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    return torch.tensor(ids)


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean next-token loss (nats) over disjoint windows; what does not fill the last window is left out."""
    model.eval()
    windows = ids[: len(ids) // (SEQUENCE + 1) * (SEQUENCE + 1)].view(-1, SEQUENCE + 1)
    losses = [next_token_loss(model, batch).item() * len(batch) for batch in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(windows)


def batches(ids: torch.Tensor, generator: torch.Generator):
    """Endless (BATCH, SEQUENCE + 1) windows: each epoch cuts the stream at a new offset and shuffles the windows."""
    while True:
        offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
        count = (len(ids) - offset) // (SEQUENCE + 1)
        windows = ids[offset : offset + count * (SEQUENCE + 1)].view(count, SEQUENCE + 1)
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield windows[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3400, help="optimizer steps, about 0.9 s each on two AVX2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)

    train, held_out, calibration = standard_library(options.seed)
    tokenizer = train_tokenizer(train)
    stream, held_out_ids = encode(tokenizer, train), encode(tokenizer, held_out)
    print(f"{len(train)} files, {len(stream):,} training tokens, {len(held_out_ids):,} held-out tokens", flush=True)
    (options.out / "model").mkdir(parents=True, exist_ok=True)
    (options.out / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    (options.out / "calibration.txt").write_text("\n".join(calibration), encoding="utf-8")
    tokenizer.save_pretrained(options.out / "model")

    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    source = batches(stream, torch.Generator().manual_seed(options.seed))
    curve: list[tuple[int, float, float]] = []
    recent = 0.0
    start = time.perf_counter()
    warmup, cooldown = 100, max(1, options.steps // 3)
    for index in range(options.steps):
        # Linear warm-up, constant, then a linear decay over the last third.
        rate = min(1.0, (index + 1) / warmup, (options.steps - index) / cooldown)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        batch_loss = next_token_loss(model, next(source))
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = batch_loss.item()
        recent = loss if index == 0 else 0.95 * recent + 0.05 * loss
        if (index + 1) % max(1, options.steps // 12) == 0 or index + 1 == options.steps:
            curve.append((index + 1, recent, mean_loss(model, held_out_ids)))
            print(f"step {index + 1}: train {recent:.3f}, held-out {curve[-1][2]:.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    model.half().save_pretrained(options.out / "model")
    write_card(options, curve, len(stream), len(train), model.num_parameters())


def write_card(options: argparse.Namespace, curve: list[tuple[int, float, float]], tokens: int, files: int, parameters: int) -> None:
    rows = "\n".join(f"| {step} | {train:.3f} | {held_out:.3f} |" for step, train, held_out in curve)
    (options.out / "model" / "README.md").write_text(
        f"""---
license: apache-2.0
---
# smoothquant-plus demo model

A Llama with {parameters:,} parameters (hidden 256, 5 layers, 4 query heads, 2 key-value heads, byte-level BPE of {VOCABULARY}), trained from
scratch by `tools/train_demo_model.py` to show quantization on a model that can be shipped with a package. It is of no other use.

- Data: {files} files of the standard library of Python {platform.python_version()} (tests excluded), {tokens:,} tokens. That text is under the
  Python Software Foundation License version 2; so are `held_out.txt` and `calibration.txt`, whole files of it that were never trained on.
- Training: seed {options.seed}, {options.steps} steps of {BATCH} x {SEQUENCE} tokens ({options.steps * BATCH * SEQUENCE / 1e6:.1f} M tokens,
  {options.steps * BATCH * SEQUENCE / tokens:.1f} epochs), AdamW, float32, CPU, torch {torch.__version__}, {options.threads} threads.
  Repeat: `python tools/train_demo_model.py OUT --seed {options.seed} --steps {options.steps} --threads {options.threads}`.
- Held-out perplexity (windows of {SEQUENCE} tokens): {math.exp(curve[-1][2]):.2f}.

| step | training loss (nats, running mean) | held-out loss (nats) |
|---|---|---|
{rows}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
