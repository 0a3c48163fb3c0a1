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
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.model_executor.models.transformers import base

import families
from smoothquant_plus.runtime.load import load

# Its transformers backend would change transformers' classes for good, and for this package's runtime too.
base.Base._decorate_cls_for_torch_compile = lambda *args, **options: None
# vLLM looks at each architecture in a process of its own, which takes half a minute for every one of them.
registry._run_in_subprocess = lambda function: function()

# Layers as wide as vLLM's kernels for CPUs take them: its attention wants heads of 32 channels and more, and latents of the size that DeepSeek has.
WIDE = {
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "word_embed_proj_dim",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "hidden_size_per_layer_input",
        ),
        128,
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 256),
    "ffn_hidden_size": 512,  # Falcon's, four times the hidden size
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar"), 32),
    "rotary_dim": 16,
    "global_head_dim": 64,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def widened(config: Any) -> Any:
    """The tiny configuration with wide layers."""
    options = {name: WIDE[name] if value is not None and name in WIDE else value for name, value in config.to_dict().items()}
    if options.get("text_config"):
        options |= {
            "text_config": widened(config.text_config).to_dict(),
            "vision_config": {**config.vision_config.to_dict(), "hidden_size": 64},
        }
    if config.model_type == "deepseek_v2":
        options |= {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    if config.model_type == "glm4_moe_lite":
        options |= {"first_k_dense_replace": 1}  # which its config.json has on the hub, beside mlp_layer_types
    if config.model_type.startswith("cohere2"):
        options |= {"sliding_window": 4096}  # vLLM's answers differ from transformers' beyond the window, unquantized, too
    if config.model_type == "deepseek_v3":
        options |= {"head_dim": WIDE["qk_rope_head_dim"], "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return type(config).from_dict(options)


families.TINY |= {f"wide-{name}": widened(config) for name, config in families.TINY.items()}

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
    """vLLM on the model in `directory`."""
    if AutoConfig.from_pretrained(directory).model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        options = {"compilation_config": {"custom_ops": ["none"]}, **options}  # docs/formats.md: its norm is wrong without
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
