"""Generate with a quantized checkpoint, as with any transformers model: python generate.py OUT "a prompt" """

import sys

import torch
from transformers import AutoTokenizer

import smoothquant_plus as sq


def main(out: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = sq.load(out, dtype=torch.float32)
    print(model.model.layers[0])  # QuantLinear, and the backend chosen for each
    inputs = tokenizer(prompt, return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
