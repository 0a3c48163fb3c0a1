"""Tiny models that vLLM serves, and what it and this package's own runtime answer. The engine runs in this process, in a few seconds."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
)

import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Qwen2Config, Qwen3MoeConfig
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

import families
from smoothquant_plus.runtime.load import load

# vLLM looks at each architecture in a process of its own, which takes half a minute for every one of them.
registry._run_in_subprocess = lambda function: function()

# vLLM's attention on CPUs wants heads of 32 channels and more.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2_NAMES = {name: value for name, value in families.COMMON.items() if "position" not in name}
families.TINY |= {
    "wide-llama": LlamaConfig(**SHAPE, num_key_value_heads=2, **families.COMMON),
    "wide-qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, **families.COMMON),  # biases
    "wide-opt": OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=128, **families.COMMON
    ),
    "wide-gpt2": GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=256, **GPT2_NAMES),  # Conv1D
    "wide-mixtral": MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **families.COMMON),
    "wide-qwen3-moe": Qwen3MoeConfig(
        **SHAPE, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, **families.COMMON
    ),
}

SCHEMES: dict[str, dict[str, Any]] = {
    "token": {"scheme": "w8a8"},
    "static": {"scheme": "w8a8", "activations": "static"},
    "asymmetric": {"scheme": "w4a16", "group_size": 32},
    "symmetric": {"scheme": "w4a16", "group_size": 64, "symmetric": True},
}
NEW_TOKENS = 8
Answer = tuple[torch.Tensor, list[int]]


@torch.no_grad()
def ours(directory: Path) -> Answer:
    """What this package's own runtime answers: log-probabilities (tokens, vocabulary), and the tokens that follow, greedily."""
    model = load(directory, dtype=torch.float32)
    prompt = families.IDS
    chosen = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, **chosen)
    return model(prompt).logits[0].float().log_softmax(dim=-1), tokens[0, prompt.shape[1] :].tolist()


def open_engine(directory: Path, **options: Any) -> LLM:
    small = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 256, "gpu_memory_utilization": 0.2}
    kept = {"max_logprobs": families.VOCABULARY, "enable_prefix_caching": False, "disable_log_stats": True}
    return LLM(str(directory), **{"dtype": "float32", "enforce_eager": True, **small, **kept, **options})


def ask(llm: LLM) -> Answer:
    """The same of vLLM; the first token's log-probabilities it does not give."""
    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=families.VOCABULARY)
    answer = llm.generate([{"prompt_token_ids": families.IDS[0].tolist()}], how, use_tqdm=False)[0]
    rows = [[row[token].logprob for token in range(families.VOCABULARY)] for row in answer.prompt_logprobs[1:]]
    return torch.tensor(rows), list(answer.outputs[0].token_ids)


def stop(running: list[LLM]) -> None:
    while running:
        running.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()
