"""Whether vLLM answers as this package's own runtime does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.models.skeleton import load_config
from smoothquant_plus.progress import note
from smoothquant_plus.runtime.load import load
from smoothquant_plus.runtime.serve import usable_memory

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 16
LIKELIEST = 20  # how many log-probabilities vLLM gives at each position

# Nats. In small models roundings that fall the other way cost less than 0.02 (docs/formats.md), bfloat16 less than 0.05; a scale that is wrong
# costs more than 1. In a real model of 30 blocks with massive activations one rounding leads to others: adding up attention in another order moves
# its answers by 0.05. So what that does to a model here, times ORDERS, is allowed too, up to LARGEST.
TOLERANCE, ORDERS, LARGEST = 0.1, 3.0, 0.5


@dataclass(frozen=True)
class Agreement:
    """Log-probabilities in nats, of the likeliest tokens at `positions` positions of random prompts, in vLLM and here; and how many of the
    `tokens` that vLLM chose, greedily, are those that this package's runtime chooses there. `own_difference`: in the mean, how far the answers here
    move when attention is added up in another order; 0 where transformers has one alone."""

    positions: int
    mean_difference: float
    largest_difference: float
    own_difference: float
    tokens: int
    same_tokens: int


def compare_with_vllm(directory: Path) -> Agreement:
    """Run random prompts in vLLM and here, on the GPU where there is one, and in float32 on a CPU. Raises InputError as `load` does, and
    VerificationError when the answers differ by more than rounding."""
    config = load_config(directory)
    cuda = torch.cuda.is_available()
    dtype = (config.dtype or torch.float16) if cuda else torch.float32
    vocabulary = config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    answers = ask_vllm(directory, prompts, dtype, {} if cuda else {"gpu_memory_utilization": usable_memory()})
    note(f"{directory} in this package's runtime:")
    model = load(directory, device="cuda" if cuda else "cpu", dtype=dtype)
    whole = [torch.cat([prompt, torch.tensor(answer.outputs[0].token_ids)]) for prompt, answer in zip(prompts, answers, strict=True)]
    logits = logits_of(model, whole)
    other = logits
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
        other = logits_of(model, whole)
    differences, moved, same = [], [], []
    for tokens, found, again, answer in zip(whole, logits, other, answers, strict=True):
        here, there = found.log_softmax(dim=-1), again.log_softmax(dim=-1)  # (tokens, vocabulary): row t is of token t + 1
        for position, likeliest in enumerate(answer.prompt_logprobs[1:]):
            differences += [abs(one.logprob - here[position, token].item()) for token, one in likeliest.items()]
            moved += [(there - here)[position, list(likeliest)].abs()]
        same.append(found[PROMPT_TOKENS - 1 : -1].argmax(dim=-1) == tokens[PROMPT_TOKENS:])
    errors, chosen = torch.tensor(differences), torch.cat(same)
    agreement = Agreement(
        positions=PROMPTS * (PROMPT_TOKENS - 1),
        mean_difference=errors.mean().item(),
        largest_difference=errors.max().item(),
        own_difference=torch.cat(moved).mean().item(),
        tokens=len(chosen),
        same_tokens=int(chosen.sum()),
    )
    check(agreement, directory)
    return agreement


def check(agreement: Agreement, directory: Path) -> None:
    """Raises VerificationError where vLLM's answers differ by more than rounding."""
    allowed = max(TOLERANCE, min(LARGEST, ORDERS * agreement.own_difference))
    if not agreement.mean_difference <= allowed:
        raise VerificationError(
            f"vLLM does not answer as this package does: the log-probabilities of {directory} differ by {agreement.mean_difference:.3g} in the "
            f"mean, and {allowed:.2g} is more than rounding does."
        )


@torch.inference_mode()
def logits_of(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Float32 (tokens, vocabulary) for each sequence of token ids."""
    return [model(tokens[None].to(model.device)).logits[0].float().cpu() for tokens in sequences]


def ask_vllm(directory: Path, prompts: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> list[Any]:
    """vLLM's answers to the prompts, one each; `options` are more of its own. The engine runs in a process of its own and ends here: its
    transformers backend changes transformers' classes."""
    for name, value in (("VLLM_WORKER_MULTIPROC_METHOD", "spawn"), ("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    try:
        engine = LLM(
            str(directory),
            dtype=str(dtype).removeprefix("torch."),
            enforce_eager=True,
            max_model_len=PROMPT_TOKENS + NEW_TOKENS,
            max_num_seqs=PROMPTS,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"vLLM cannot load {directory}: {error}") from error
    try:
        how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=LIKELIEST)
        return list(engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], how, use_tqdm=False))
    finally:
        engine.llm_engine.engine_core.shutdown()
