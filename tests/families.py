"""Every family as a tiny model: random weights, or outliers planted in them, in a directory as a user has it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2MoeConfig,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    Glm4vConfig,
    Glm4vMoeConfig,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    InternVLConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MiMoV2FlashConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    Mistral4Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SeedOssConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    SolarOpenConfig,
    Starcoder2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.models.families import active_pairs, find_family
from smoothquant_plus.models.skeleton import is_transposed, linears
from smoothquant_plus.models.transform import smooth_block
from smoothquant_plus.runtime.load import load

VOCABULARY = 257  # every byte, and the end of the sequence

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 256}

LLAMA_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Of Ministral 3: longer than it was trained, and queries that grow with their position.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SEEN = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
MULTIMODAL = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # time, height and width of a position

GLM4V = {"rope_parameters": {**MULTIMODAL, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
GEMMA4 = {
    **LLAMA_SHAPE,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

# Something of each token for each block, and blocks that read the keys and values of earlier ones.
E2B = {
    **GEMMA4,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
}

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
    "qwen2": Qwen2Config(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "qwen3": Qwen3Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=32, **COMMON),
    "gemma": GemmaConfig(**LLAMA_SHAPE, num_key_value_heads=1, head_dim=16, **COMMON),
    "gemma2": Gemma2Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, **COMMON),
    "gemma3": Gemma3TextConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, **COMMON),
    "olmo2": Olmo2Config(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "cohere": CohereConfig(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "phi3": Phi3Config(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "glm": GlmConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, attention_bias=True, **COMMON),
    "glm4": Glm4Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, attention_bias=True, **COMMON),
    "starcoder2": Starcoder2Config(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, **COMMON),
    "gpt_neox": GPTNeoXConfig(**LLAMA_SHAPE, tie_word_embeddings=False, **COMMON),
    "gptj": GPTJConfig(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8, **{k: COMMON[k] for k in COMMON if "position" not in k}
    ),
    "falcon-7b": FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **COMMON),
    "falcon-40b": FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, **COMMON
    ),
    "falcon-one-norm": FalconConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        **COMMON,
    ),
    "falcon-rw": FalconConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=False,
        parallel_attn=False,
        alibi=True,
        bias=True,
        **COMMON,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **{k: COMMON[k] for k in COMMON if "position" not in k}),
    "mixtral": MixtralConfig(**LLAMA_SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **COMMON),
    "qwen2-moe": Qwen2MoeConfig(
        **LLAMA_SHAPE, num_key_value_heads=2, num_experts=4, shared_expert_intermediate_size=64, mlp_only_layers=[1], **MIXTURE, **COMMON
    ),
    "qwen3-moe": Qwen3MoeConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=32, num_experts=4, **MIXTURE, **COMMON),
    "deepseek-v2-lite": DeepseekV2Config(
        **LLAMA_SHAPE,
        num_key_value_heads=4,
        q_lora_rank=None,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **LATENT,
        **MIXTURE,
        **COMMON,
    ),
    "deepseek-v3": DeepseekV3Config(
        **LLAMA_SHAPE,
        num_key_value_heads=4,
        q_lora_rank=32,
        n_routed_experts=4,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        **LATENT,
        **MIXTURE,
        **COMMON,
    ),
    # With layers that have no positions, multipliers, and biases where the family has them.
    "smollm3": SmolLM3Config(**LLAMA_SHAPE, num_key_value_heads=2, no_rope_layers=[1, 0], **COMMON),
    "granite": GraniteConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
        **COMMON,
    ),
    "seed-oss": SeedOssConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, attention_out_bias=True, mlp_bias=True, **COMMON),
    "ernie4-5": Ernie4_5Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, **COMMON),
    "hunyuan": HunYuanDenseV1Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, **COMMON),
    "ministral": MinistralConfig(
        **LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **COMMON
    ),
    "ministral3": Ministral3Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, rope_parameters=dict(ROPE), **COMMON),
    "olmo3": Olmo3Config(**LLAMA_SHAPE, num_key_value_heads=2, sliding_window=8, **COMMON),
    "exaone4": Exaone4Config(
        **LLAMA_SHAPE, num_key_value_heads=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **COMMON
    ),
    "cohere2": Cohere2Config(**LLAMA_SHAPE, num_key_value_heads=2, sliding_window=8, **COMMON),
    "nemotron": NemotronConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, **COMMON),
    "apertus": ApertusConfig(**LLAMA_SHAPE, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **COMMON),
    "phi": PhiConfig(**LLAMA_SHAPE, num_key_value_heads=2, qk_layernorm=True, **COMMON),
    "olmoe": OlmoeConfig(**LLAMA_SHAPE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, **COMMON),
    "minimax-m2": MiniMaxM2Config(
        **LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, rotary_dim=8, **COMMON
    ),
    "glm4-moe": Glm4MoeConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        head_dim=16,
        use_qk_norm=True,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        **MIXTURE,
        **COMMON,
    ),
    **{
        f"ernie4-5-moe-{shared}-shared": Ernie4_5_MoeConfig(
            **LLAMA_SHAPE,
            num_key_value_heads=2,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=32,
            moe_num_shared_experts=shared,
            moe_layer_start_index=1,
            **COMMON,
        )
        for shared in (0, 2)
    },
    "helium": HeliumConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, **COMMON),
    "arcee": ArceeConfig(**LLAMA_SHAPE, num_key_value_heads=2, mlp_bias=True, **COMMON),
    "olmo": OlmoConfig(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
    "phimoe": PhimoeConfig(
        **LLAMA_SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True, **COMMON
    ),
    "solar-open": SolarOpenConfig(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, n_routed_experts=4, **MIXTURE, **COMMON),
    "exaone-moe": ExaoneMoeConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        num_experts=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        **MIXTURE,
        **COMMON,
    ),
    "cohere2-moe": Cohere2MoeConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        sliding_window=8,
        first_k_dense_replace=1,
        **COMMON,
    ),
    "mimo-v2-flash": MiMoV2FlashConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=1,
        head_dim=24,
        v_head_dim=16,
        n_routed_experts=4,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
        **MIXTURE,
        **COMMON,
    ),
    "glm4-moe-lite": Glm4MoeLiteConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=4,
        q_lora_rank=32,
        n_routed_experts=4,
        n_shared_experts=1,
        mlp_layer_types=["dense", "sparse"],
        **LATENT,
        **MIXTURE,
        **COMMON,
    ),
    "mistral4": Mistral4Config(
        **LLAMA_SHAPE,
        num_key_value_heads=4,
        q_lora_rank=32,
        n_routed_experts=4,
        n_shared_experts=1,
        rope_parameters=dict(ROPE),
        **LATENT,
        **MIXTURE,
        **COMMON,
    ),
    "gemma4": Gemma4TextConfig(**GEMMA4, hidden_size_per_layer_input=0, **COMMON),
    "gemma4-e2b": Gemma4TextConfig(**E2B, **COMMON),
    "gemma4-moe": Gemma4TextConfig(
        **GEMMA4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
        **COMMON,
    ),
    # With a state space, or a convolution, in place of attention.
    **{
        f"nemotron-h{latent and '-latent'}": NemotronHConfig(
            hidden_size=64,
            intermediate_size=96,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            n_routed_experts=8,
            moe_shared_expert_intermediate_size=32,
            moe_latent_size=latent or None,
            **MIXTURE,
            **COMMON,
        )
        for latent in ("", 32)
    },
    "granite-moe": GraniteMoeConfig(**LLAMA_SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **COMMON),
    **{
        f"granite-hybrid-{experts}-experts": GraniteMoeHybridConfig(
            **LLAMA_SHAPE,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            residual_multiplier=0.5,
            **COMMON,
        )
        for experts in (0, 4)
    },
    "falcon-h1": FalconH1Config(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        head_dim=16,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        attention_in_multiplier=0.5,
        **COMMON,
    ),
    "lfm2": Lfm2Config(**LLAMA_SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention"], **COMMON),
    "lfm2-moe": Lfm2MoeConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        num_experts=4,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
        **MIXTURE,
        **COMMON,
    ),
    "internvl": InternVLConfig(
        text_config=Qwen2Config(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        image_token_id=255,
    ),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=255,
    ),
    "llava-next": LlavaNextConfig(
        text_config=MistralConfig(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=255,
    ),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**LLAMA_SHAPE, num_key_value_heads=2, **COMMON),
        vision_config=PixtralVisionConfig(**VISION),
        image_token_index=255,
    ),
    # Linear attention, which keeps a state instead of keys and values, and attention with a gate.
    "qwen3-next": Qwen3NextConfig(
        **LLAMA_SHAPE,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        **LINEAR,
        **MIXTURE,
        **COMMON,
    ),
    "qwen3-5": Qwen3_5TextConfig(
        **LLAMA_SHAPE, num_key_value_heads=2, head_dim=32, layer_types=["linear_attention", "full_attention"], **LINEAR, **COMMON
    ),
    **{
        name: config(
            text_config={**LLAMA_SHAPE, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": MULTIMODAL, **text, **COMMON},
            vision_config=vision,
            image_token_id=255,
            video_token_id=254,
            vision_start_token_id=253,
            vision_end_token_id=252,
        )
        for name, config, text, vision in (
            (
                "qwen2-vl",
                Qwen2VLConfig,
                {},
                {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2, "mlp_ratio": 1, "patch_size": 8},
            ),
            ("qwen2-5-vl", Qwen2_5_VLConfig, {}, {**SEEN, "out_hidden_size": 64, "fullatt_block_indexes": [0]}),
            (
                "qwen3-vl",
                Qwen3VLConfig,
                {},
                {**SEEN, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            ),
            (
                "qwen3-vl-moe",
                Qwen3VLMoeConfig,
                {"num_experts": 4, **MIXTURE},
                {**SEEN, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            ),
            (
                "qwen3-5-moe-vision",
                Qwen3_5MoeConfig,
                {
                    "layer_types": ["linear_attention", "full_attention"],
                    "num_experts": 4,
                    "shared_expert_intermediate_size": 64,
                    **LINEAR,
                    **MIXTURE,
                },
                {**SEEN, "out_hidden_size": 64, "num_position_embeddings": 16},
            ),
            ("glm4v", Glm4vConfig, GLM4V, {**SEEN, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 16}),
            (
                "glm4v-moe",
                Glm4vMoeConfig,
                {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **GLM4V, **MIXTURE},
                {**SEEN, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 16},
            ),
            (
                "qwen3-5-vision",
                Qwen3_5Config,
                {"layer_types": ["linear_attention", "full_attention"], **LINEAR},
                {**SEEN, "out_hidden_size": 64, "num_position_embeddings": 16},
            ),
        )
    },
    "gemma4-vision": Gemma4Config(
        text_config=Gemma4TextConfig(**E2B, **COMMON),
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
        audio_config={
            **{name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            "subsampling_conv_channels": [8, 8],
            "output_proj_dims": 32,
        },
        image_token_id=255,
        video_token_id=254,
        audio_token_id=253,
    ),
    "gemma3-vision": Gemma3Config(
        text_config=Gemma3TextConfig(
            **LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, **COMMON
        ),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_index=255,
        boi_token_index=253,
        eoi_token_index=254,
        mm_tokens_per_image=4,
    ),
}

# The first layout of each family.
FIRST = tuple({find_family(config)[0]: name for name, config in reversed(TINY.items())}.values())

# Those with experts, and those without a norm that feeds linear layers and has a gain.
MIXTURES = (
    *("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2-lite", "deepseek-v3", "mistral4", "glm4-moe-lite"),
    *("olmoe", "phimoe", "minimax-m2", "glm4-moe", "glm4v-moe", "solar-open", "exaone-moe", "cohere2-moe", "mimo-v2-flash"),
    *("ernie4-5-moe-0-shared", "ernie4-5-moe-2-shared", "qwen3-next", "qwen3-vl-moe", "qwen3-5-moe-vision", "gemma4-moe"),
    *("nemotron-h", "nemotron-h-latent", "granite-moe", "granite-hybrid-4-experts", "lfm2-moe"),
)
ON_DISK_TOGETHER = ("mistral4", "qwen3-vl-moe", "gemma4-moe", "granite-moe", "granite-hybrid-4-experts")
LATENTS = ("deepseek-v2-lite", "deepseek-v3", "glm4-moe-lite", "mistral4")  # whose keys and values are made of a latent
HYBRID = (  # with linear attention, a state space or a convolution
    *("qwen3-next", "qwen3-5", "qwen3-5-vision", "qwen3-5-moe-vision", "nemotron-h", "nemotron-h-latent"),
    *("granite-hybrid-0-experts", "granite-hybrid-4-experts", "falcon-h1", "lfm2", "lfm2-moe"),
)
NORMS_AFTER = ("olmo", "olmo2", "olmo3", "exaone4")

# What transformers' own loader cannot read, per scheme, and why.
FUSED = "its loader stacks the experts' weights into one tensor, and cannot do that with integers"
CONV1D = "the layers are Conv1D there, and compressed-tensors quantizes nn.Linear"
OWN_LINEAR = "its linear layers read their weight themselves, past compressed-tensors"
SHAPELESS = "it needs `weight_shape`, and takes whatever is in memory where that is missing"
TOGETHER = "its loader looks for the experts of a block in one tensor, as the source has them"
UNREADABLE: dict[tuple[str, str], str] = {
    **{(name, "w8a8"): FUSED for name in MIXTURES},
    **{(name, "w4a16"): TOGETHER for name in ON_DISK_TOGETHER},
    **{("gpt2", scheme): CONV1D for scheme in ("w8a8", "w4a16")},
    ("bloom", "w4a16"): SHAPELESS,
    **{(name, "w4a16"): OWN_LINEAR for name in ("falcon-7b", "falcon-40b", "falcon-one-norm", "falcon-rw")},
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
    config = copy.deepcopy(TINY[name])
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, buffer in model.named_buffers():
            if path.endswith("layer_scalar"):
                buffer.fill_(0.5)
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in path:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return model


def auto_class(config: Any) -> Any:
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def save(model: Any, like: Path, directory: Path) -> Path:
    """A model that `load` gave of the directory `like`, with other weights, as a directory of the same kind."""
    decoder = Decoder(Checkpoint(like))
    shutil.copytree(like, directory, ignore=lambda _, names: [name for name in names if "safetensors" in name])
    tensors = {}
    for name, tensor in model.state_dict().items():
        disk = next((d for d in decoder.family.spellings(name) if d in decoder.checkpoint.tensors), None)
        if disk is not None:
            tensors[disk] = (tensor.t() if is_transposed(decoder.family, name, tensor) else tensor).clone(
                memory_format=torch.contiguous_format
            )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write(name: str, directory: Path, dtype: torch.dtype = torch.float16, seed: int = 0, shard_size: str = "50KB") -> Path:
    """The tiny model `name` as a model directory of several shards, with a tokenizer."""
    build(name, seed).to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory


# Text like the calibration's, so that static scales fit it.
IDS = make_tokenizer()(TEXT[1000:1040], return_tensors="pt")["input_ids"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@contextmanager
def in_float64() -> Iterator[None]:
    """Whatever a model computes in float32, such as its norms, stays in float64."""
    to, as_float = torch.Tensor.to, torch.Tensor.float

    def exactly(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        exact = [torch.float64 if arg is torch.float32 else arg for arg in args]
        return to(tensor, *exact, **{key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()})

    torch.Tensor.to, torch.Tensor.float = exactly, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, as_float


@torch.no_grad()
def change_by_smoothing(directory: Path, dtype: torch.dtype, smooth: str) -> float:
    """How far the logits move when every declared pair of every block is smoothed with random factors."""
    model, decoder = load(directory, dtype=dtype), Decoder(Checkpoint(directory), dtype)
    exactly = in_float64 if dtype == torch.float64 else nullcontext
    with exactly():
        before = model(IDS).logits
    generator = torch.Generator().manual_seed(1)
    pairs = list(active_pairs(decoder.family, decoder.config, smooth))
    assert pairs
    for index, block in enumerate(model.get_submodule(decoder.family.blocks)):
        layers = linears(block, decoder.family)
        maxima = {name: 10 ** (torch.rand(linear.in_features, generator=generator) * 4 - 2) for name, linear in layers.items()}
        smoothed = smooth_block(decoder, index, block, pairs, maxima, 0.7)
        assert smoothed and all(pair.s.max() / pair.s.min() > 1.2 for pair in smoothed)
    with exactly():
        return relative(model(IDS).logits, before)
