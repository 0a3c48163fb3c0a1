"""Which source feeds which linears, one row of data per family (docs/add-a-family.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from smoothquant_plus.errors import InputError, did_you_mean
from smoothquant_plus.models.rows import Rows

TRANSFORMERS = tuple(int(part) for part in version("transformers").split(".")[:2])

# What `--smooth` may ask for: nothing, the pairs that start at a norm (SmoothQuant), or every pair that is exactly equivalent.
SMOOTH = ("none", "norms", "all")

# The alpha of SmoothQuant for models that have no published value (arXiv 2211.10438, Section 5.1).
DEFAULT_ALPHA = 0.5

# A family of the user's own, beside config.json: in the model's directory, or what `--pairs` put into the output's.
FAMILY_FILE = "family.json"

STRICT = ConfigDict(extra="forbid")  # a key that is misspelt is an error, not a default


@dataclass(frozen=True, config=STRICT)
class Pair:
    """A source whose output channels feed the input channels of `sinks`; paths are relative to the block.

    A `*` in a sink stands for each expert; one in the source makes a pair for each expert, and stands for the same one in the sinks. Sinks
    that are not quantized, such as a router, are rescaled too. `optional`: a block may lack some of the sinks or all, as dense blocks do that
    lie among mixtures of experts. `rows` says which of the source's output channels those are (models/rows.py): all of them (`each`), or the
    values of attention, which the query heads of a group share. `when` is the smallest `--smooth` setting that includes the pair.
    `requires` are configuration values without which the pair would not be exact, or is not there; a tuple lists alternatives, and ... is
    anything but None and 0. `multiplied`: on the way to some of the sinks the output is multiplied by a number of the configuration.
    """

    source: str
    sinks: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: Rows = "each"
    when: Literal["norms", "all"] = "norms"
    requires: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    multiplied: bool = False


@dataclass(frozen=True, config=STRICT)
class Refusal:
    """A layout of the family that smoothing would change the function of: `when` the configuration has these values, `reason`."""

    when: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, config=STRICT)
class Family:
    """One kind of decoder. `blocks` is the path of its list of decoder blocks in the transformers model.

    `alpha` is the published SmoothQuant alpha (None when none is published); `alpha_of_sizes` are the sizes that differ.
    `norm_offset` is 1 for norms that multiply by (1 + weight). `disk_names` are other spellings that a checkpoint may have: a tensor `name` of
    the model is also looked for as re.sub(pattern, replacement, name), for each of them and for several together. `returns_tuple`: whether a
    block's forward gives its hidden states as the first of several values. `transposed`: whether weights of linears are stored (in, out), as
    GPT-2's Conv1D does. `unquantized` are linears of a block that stay as they are. `shapeless` are those whose `weight_shape`, which vLLM can
    do without and transformers cannot, is left out of 4-bit checkpoints.
    """

    blocks: str
    pairs: tuple[Pair, ...]
    model_types: tuple[str, ...] = ()
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    alpha_of_sizes: tuple[tuple[Mapping[str, Any], float], ...] = ()
    norm_offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    disk_names: tuple[tuple[str, str], ...] = ()
    refuse: tuple[Refusal, ...] = ()
    returns_tuple: bool = False
    transposed: bool = False
    unquantized: tuple[str, ...] = ()
    shapeless: tuple[str, ...] = ()

    @field_validator("disk_names")
    @classmethod
    def _compile(cls, disk_names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for pattern, replacement in disk_names:
            try:
                re.sub(f"{pattern}|", replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"'{pattern}' and '{replacement}' are not what re.sub takes: {error}") from error
        return disk_names

    def spellings(self, name: str) -> list[str]:
        """The names that a checkpoint may store the model's tensor or module `name` under, the model's own first."""
        found = [name]
        for old, new in self.disk_names:
            found += [other for known in found if (other := re.sub(old, new, known)) not in found]
        return found


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Attention is linear in the values; act(gate) * up is linear in up, whatever the activation function.
VALUES = Pair("self_attn.v_proj", ("self_attn.o_proj",), rows="values", when="all")
UP = Pair("mlp.up_proj", ("mlp.down_proj",), when="all")
ATTENTION = Pair("input_layernorm", QKV)
LLAMA_PAIRS = (
    ATTENTION,
    Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    VALUES,
    UP,
)
# Gemma 2 and 3: post_attention_layernorm is on the way back to the residual stream, and feeds no linear layer.
GEMMA2_PAIRS = (ATTENTION, Pair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")), VALUES, UP)
GLM_PAIRS = (
    ATTENTION,
    Pair("post_attention_layernorm", ("mlp.gate_up_proj",)),
    VALUES,
    Pair("mlp.gate_up_proj", ("mlp.down_proj",), rows="last_half", when="all"),
)
# No norm in front of attention and MLP: they read the residual stream itself, and norms come after them.
NORMS_AFTER = (VALUES, UP)
PARALLEL = (Pair("input_layernorm", (*QKV, "mlp.gate_proj", "mlp.up_proj")), VALUES, UP)  # attention and MLP read the same norm
# In models whose blocks have attention or something linear in its place.
OPTIONAL_VALUES = replace(VALUES, optional=True)
UNCLIPPED_VALUES = replace(VALUES, requires={"clip_qkv": None})  # clamped values let no factor through


def mixer(*projections: str) -> Pair:
    """The first norm of a block with attention, or with linear attention or a state space whose input these `projections` read."""
    return Pair("input_layernorm", (*QKV, *projections), optional=True)


def mixture(
    *others: str, norm: str = "post_attention_layernorm", router: str = "mlp.gate", experts: str = "mlp.experts", shared: str = ""
) -> tuple[Pair, ...]:
    """The pairs of a block that has one MLP, or experts and perhaps one at `shared` that every token goes to. `norm` feeds the `router` and
    `others`, too."""
    mlps = ("mlp", experts + ".*", *([shared] if shared else []))
    inputs = [f"{mlp}.{projection}" for mlp in mlps for projection in ("gate_proj", "up_proj")]
    return (
        Pair(norm, (router, *others, *inputs), optional=True),
        *(Pair(f"{mlp}.up_proj", (f"{mlp}.down_proj",), when="all", optional=True) for mlp in mlps),
    )


# A mixture's names in checkpoints like Mixtral's.
MIXTRAL_NAMES = (
    (r"\.mlp\.(gate|e_score_correction_bias)\b", r".block_sparse_moe.\1"),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\b", r".block_sparse_moe.experts.\1.w1"),
    (r"\.mlp\.experts\.(\d+)\.down_proj\b", r".block_sparse_moe.experts.\1.w2"),
    (r"\.mlp\.experts\.(\d+)\.up_proj\b", r".block_sparse_moe.experts.\1.w3"),
)

# What reads the norm of Nemotron-H's blocks, each of which is one of them: a state space, attention, an MLP or a mixture of experts.
MIXERS = (
    *("mixer.in_proj", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.up_proj"),
    *("mixer.gate", "mixer.shared_experts.up_proj"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_types=("llama",),
        blocks="model.layers",
        pairs=LLAMA_PAIRS,
        alpha=0.85,
        alpha_of_sizes=(
            ({"hidden_size": 8192, "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 32000}, 0.9),
        ),  # Llama-2-70B
    ),
    "mistral": Family(model_types=("mistral",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=0.8),
    "mixtral": Family(
        model_types=("mixtral",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture(), VALUES),
        alpha=0.8,
        disk_names=MIXTRAL_NAMES,
    ),
    "qwen2": Family(model_types=("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    # The norms of its query and key heads feed no linear layer.
    "qwen3": Family(model_types=("qwen3", "qwen3_vl_text"), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "smollm3": Family(model_types=("smollm3",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "granite": Family(model_types=("granite",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "seed_oss": Family(model_types=("seed_oss",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "ernie4_5": Family(model_types=("ernie4_5",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "hunyuan": Family(model_types=("hunyuan_v1_dense",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "ministral": Family(model_types=("ministral", "ministral3"), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "helium": Family(model_types=("helium",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None),
    "qwen2_moe": Family(
        model_types=("qwen2_moe",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture("mlp.shared_expert_gate", shared="mlp.shared_expert"), VALUES),
        alpha=None,
        unquantized=("mlp.shared_expert_gate",),
    ),
    "qwen3_moe": Family(
        model_types=("qwen3_moe", "qwen3_vl_moe_text"), blocks="model.layers", pairs=(ATTENTION, *mixture(), VALUES), alpha=None
    ),
    # The gates of linear attention have few channels and decide how fast it forgets: they stay as they are.
    "qwen3_next": Family(
        model_types=("qwen3_next",),
        blocks="model.layers",
        pairs=(
            mixer("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            *mixture("mlp.shared_expert_gate", shared="mlp.shared_expert"),
            OPTIONAL_VALUES,
        ),
        alpha=None,
        norm_offset=1.0,
        unquantized=("mlp.shared_expert_gate", "linear_attn.in_proj_ba"),
    ),
    "qwen3_5": Family(
        model_types=("qwen3_5_text", "qwen3_5_moe_text"),
        blocks="model.layers",
        pairs=(
            mixer(*(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))),
            *mixture("mlp.shared_expert_gate", shared="mlp.shared_expert"),
            OPTIONAL_VALUES,
        ),
        alpha=None,
        norm_offset=1.0,
        unquantized=("mlp.shared_expert_gate", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    ),
    "olmoe": Family(model_types=("olmoe",), blocks="model.layers", pairs=(ATTENTION, *mixture(), UNCLIPPED_VALUES), alpha=None),
    "minimax_m2": Family(
        model_types=("minimax_m2",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture(), VALUES),
        alpha=None,
        disk_names=MIXTRAL_NAMES,
    ),
    "phimoe": Family(
        model_types=("phimoe",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture(router="mlp.router"), VALUES),
        alpha=None,
        disk_names=((r"\.mlp\.router\b", ".block_sparse_moe.gate"), *MIXTRAL_NAMES),
        unquantized=("mlp.router",),
    ),
    "glm4_moe": Family(
        model_types=("glm4_moe", "glm4v_moe_text", "exaone_moe", "solar_open"),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture(shared="mlp.shared_experts"), VALUES),
        alpha=None,
        disk_names=((r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.e_score_correction_bias"),),  # EXAONE's
    ),
    "ernie4_5_moe": Family(
        model_types=("ernie4_5_moe",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture(shared="mlp.shared_experts"), VALUES),
        alpha=None,
        disk_names=((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),),
    ),
    # Its values have heads of another size, and layers differ in how many.
    "mimo_v2": Family(
        model_types=("mimo_v2_flash",),
        blocks="model.layers",
        pairs=(ATTENTION, *mixture()),
        alpha=None,
        disk_names=((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),),
    ),
    "deepseek": Family(
        model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4"),
        blocks="model.layers",
        pairs=(
            # Queries, keys and values go through latents with norms of their own, the queries of small models do not; the keys' rotary
            # part goes past them.
            Pair("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), optional=True),
            Pair("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), optional=True),
            Pair("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
            Pair("self_attn.kv_b_proj", ("self_attn.o_proj",), rows="latent_values", when="all"),
            *mixture(shared="mlp.shared_experts"),
        ),
        alpha=None,
    ),
    # Its experts may read a latent instead of the norm. What goes through relu(x) ** 2 would have to be divided by a root.
    "nemotron_h": Family(
        model_types=("nemotron_h",),
        blocks="model.layers",
        pairs=(
            Pair("norm", (*MIXERS, "mixer.experts.*.up_proj"), optional=True, requires={"moe_latent_size": None}),
            Pair("norm", (*MIXERS, "mixer.fc1_latent_proj"), optional=True, requires={"moe_latent_size": ...}),
            Pair("mixer.v_proj", ("mixer.o_proj",), rows="values", when="all", optional=True),
        ),
        alpha=None,
        disk_names=((r"^model\.", "backbone."),),
    ),
    "granite_moe": Family(
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        blocks="model.layers",
        pairs=(
            mixer("mamba.in_proj"),
            *mixture("shared_mlp.input_linear", router="block_sparse_moe.router", experts="block_sparse_moe.experts"),
            Pair("shared_mlp.input_linear", ("shared_mlp.output_linear",), rows="last_half", when="all", optional=True),
            OPTIONAL_VALUES,
        ),
        alpha=None,
        disk_names=((r"\.router\.weight$", ".router.layer.weight"),),
    ),
    "falcon_h1": Family(
        model_types=("falcon_h1",),
        blocks="model.layers",
        pairs=(
            Pair("input_layernorm", (*QKV, "mamba.in_proj"), multiplied=True),  # attention and state space are parallel
            Pair("pre_ff_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj")),
            VALUES,
            Pair("feed_forward.up_proj", ("feed_forward.down_proj",), when="all"),
        ),
        alpha=None,
        returns_tuple=True,
    ),
    "lfm2": Family(
        model_types=("lfm2", "lfm2_moe"),
        blocks="model.layers",
        pairs=(
            Pair("operator_norm", (*QKV, "conv.in_proj"), optional=True),
            Pair(
                "ffn_norm",
                (
                    *("feed_forward.w1", "feed_forward.w3", "feed_forward.gate"),
                    *("feed_forward.experts.*.gate_proj", "feed_forward.experts.*.up_proj"),
                ),
                optional=True,
            ),
            Pair("self_attn.v_proj", ("self_attn.out_proj",), rows="values", when="all", optional=True),
            Pair("feed_forward.w3", ("feed_forward.w2",), when="all", optional=True),
            Pair("feed_forward.experts.*.up_proj", ("feed_forward.experts.*.down_proj",), when="all", optional=True),
        ),
        alpha=None,
        disk_names=tuple(
            (rf"\.experts\.(\d+)\.{ours}\b", rf".experts.\1.{theirs}")
            for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
        ),
    ),
    "gemma": Family(model_types=("gemma",), blocks="model.layers", pairs=LLAMA_PAIRS, alpha=None, norm_offset=1.0),
    "gemma2": Family(model_types=("gemma2",), blocks="model.layers", pairs=GEMMA2_PAIRS, alpha=None, norm_offset=1.0),
    "gemma3": Family(model_types=("gemma3_text",), blocks="model.layers", pairs=GEMMA2_PAIRS, alpha=None, norm_offset=1.0),
    "gemma4": Family(
        model_types=("gemma4_text",),
        blocks="model.layers",
        pairs=(
            # Values may be made by the keys' projection, and are normalized. The last blocks may read the keys and values of earlier ones.
            Pair("input_layernorm", QKV, optional=True),
            Pair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            Pair("pre_feedforward_layernorm_2", ("experts.*.gate_proj", "experts.*.up_proj"), optional=True),
            UP,
            Pair("experts.*.up_proj", ("experts.*.down_proj",), when="all", optional=True),
        ),
        alpha=None,
        unquantized=("router.proj",),
    ),
    # No gain to fold factors into: its norms do not multiply.
    "olmo": Family(model_types=("olmo",), blocks="model.layers", pairs=(UNCLIPPED_VALUES, UP), alpha=None),
    "olmo2": Family(model_types=("olmo2", "olmo3"), blocks="model.layers", pairs=NORMS_AFTER, alpha=None),
    "exaone4": Family(model_types=("exaone4",), blocks="model.layers", pairs=NORMS_AFTER, alpha=None),
    "cohere": Family(model_types=("cohere", "cohere2"), blocks="model.layers", pairs=PARALLEL, alpha=None),
    "cohere2_moe": Family(
        model_types=("cohere2_moe",),
        blocks="model.layers",
        pairs=(*mixture(*QKV, norm="input_layernorm", shared="mlp.shared_experts"), VALUES),
        alpha=None,
    ),
    "arcee": Family(
        model_types=("arcee",),
        blocks="model.layers",
        pairs=(ATTENTION, Pair("post_attention_layernorm", ("mlp.up_proj",)), VALUES),
        alpha=None,
    ),
    "nemotron": Family(
        model_types=("nemotron",),
        blocks="model.layers",
        pairs=(ATTENTION, Pair("post_attention_layernorm", ("mlp.up_proj",)), VALUES),
        alpha=None,
        norm_offset=1.0,
    ),
    "apertus": Family(
        model_types=("apertus",),
        blocks="model.layers",
        pairs=(Pair("attention_layernorm", QKV), Pair("feedforward_layernorm", ("mlp.up_proj",)), VALUES),
        alpha=None,
    ),
    "phi": Family(
        model_types=("phi",),
        blocks="model.layers",
        pairs=(
            Pair("input_layernorm", (*QKV, "mlp.fc1")),  # attention and MLP are parallel
            Pair("self_attn.v_proj", ("self_attn.dense",), rows="values", when="all"),
        ),
        alpha=None,
    ),
    "phi3": Family(
        model_types=("phi3",),
        blocks="model.layers",
        pairs=(
            Pair("input_layernorm", ("self_attn.qkv_proj",)),
            Pair("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Pair("self_attn.qkv_proj", ("self_attn.o_proj",), rows="last_values", when="all"),
            Pair("mlp.gate_up_proj", ("mlp.down_proj",), rows="last_half", when="all"),
        ),
        alpha=None,
    ),
    "glm": Family(model_types=("glm",), blocks="model.layers", pairs=GLM_PAIRS, alpha=0.75),
    "glm4": Family(model_types=("glm4", "glm4v_text"), blocks="model.layers", pairs=GLM_PAIRS, alpha=0.75),
    "starcoder2": Family(
        model_types=("starcoder2",),
        blocks="model.layers",
        pairs=(ATTENTION, Pair("post_attention_layernorm", ("mlp.c_fc",)), VALUES),
        alpha=None,
    ),
    "opt": Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        pairs=(
            Pair("self_attn_layer_norm", QKV),
            Pair("final_layer_norm", ("fc1",)),
            Pair("self_attn.v_proj", ("self_attn.out_proj",), rows="values", when="all"),
            # relu(x / s) = relu(x) / s for s > 0; no other activation function lets a factor through.
            Pair("fc1", ("fc2",), when="all", requires={"activation_function": "relu"}),
        ),
        alpha=0.5,
        disk_names=((r"^model\.decoder\.", "decoder."),),
        refuse=(
            Refusal(
                {"do_layer_norm_before": False},
                "it normalizes after the residual sum (OPT-350m), so its norms feed the residual stream and not only linear layers",
            ),
        ),
    ),
    "bloom": Family(
        model_types=("bloom",),
        blocks="transformer.h",
        pairs=(
            Pair("input_layernorm", ("self_attention.query_key_value",)),
            Pair("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            Pair("self_attention.query_key_value", ("self_attention.dense",), rows="fused_values", when="all"),
        ),
        alpha=0.5,
        disk_names=((r"^transformer\.", ""),),
        refuse=(
            Refusal(
                {"apply_residual_connection_post_layernorm": True},
                "its residual stream reads the norms' outputs, which then feed more than linear layers",
            ),
            Refusal({"slow_but_exact": True}, "its code reads the weights of linear layers itself (slow_but_exact; set it to false)"),
        ),
        returns_tuple=True,
        shapeless=("self_attention.query_key_value",),  # vLLM cuts all that is stored of it into heads
    ),
    "gpt2": Family(
        model_types=("gpt2",),  # what Megatron-LM and MT-NLG checkpoints are converted to
        blocks="transformer.h",
        pairs=(
            Pair("ln_1", ("attn.c_attn",)),
            Pair("ln_2", ("mlp.c_fc",)),
            Pair("attn.c_attn", ("attn.c_proj",), rows="last_values", when="all"),
        ),
        alpha=None,
        disk_names=((r"^transformer\.", ""),),
        transposed=True,
        refuse=(Refusal({"add_cross_attention": True}, "it reads the states of an encoder, which calibration text does not give"),),
    ),
    "gpt_neox": Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        pairs=(
            Pair("input_layernorm", ("attention.query_key_value",)),
            Pair("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            Pair("attention.query_key_value", ("attention.dense",), rows="fused_values", when="all"),
        ),
        alpha=None,
        disk_names=((r"^lm_head\.", "embed_out."),),
    ),
    "gptj": Family(
        model_types=("gptj",),
        blocks="transformer.h",
        pairs=(
            Pair("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),  # attention and MLP are parallel
            Pair("attn.v_proj", ("attn.out_proj",), rows="values", when="all"),
        ),
        alpha=None,
        returns_tuple=TRANSFORMERS < (5, 24),
    ),
    "falcon": Family(
        model_types=("falcon",),
        blocks="transformer.h",
        pairs=(
            # Falcon-40B: attention and MLP are parallel, each with a norm of its own.
            Pair("ln_attn", ("self_attention.query_key_value",), requires={"parallel_attn": True, "num_ln_in_parallel_attn": 2}),
            Pair("ln_mlp", ("mlp.dense_h_to_4h",), requires={"parallel_attn": True, "num_ln_in_parallel_attn": 2}),
            # Falcon-7B, and the new layout with one norm: parallel, and both read that.
            Pair(
                "input_layernorm",
                ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
                requires={"parallel_attn": True, "num_ln_in_parallel_attn": (None, 1)},
            ),
            # Falcon-RW: one after the other.
            Pair("input_layernorm", ("self_attention.query_key_value",), requires={"parallel_attn": False}),
            Pair("post_attention_layernorm", ("mlp.dense_h_to_4h",), requires={"parallel_attn": False}),
            Pair("self_attention.query_key_value", ("self_attention.dense",), rows="fused_values", when="all"),
        ),
        alpha=0.6,
        alpha_of_sizes=(({"hidden_size": 8192, "num_hidden_layers": 60}, 0.7),),  # Falcon-40B
        refuse=(
            Refusal({"new_decoder_architecture": True, "parallel_attn": False}, "transformers' own code does not run this combination"),
        ),
        returns_tuple=True,
    ),
}


# Models whose language tower is a decoder of another family, at `model.language_model`; its configuration is their `text_config`.
WRAPPERS = (
    *("llava", "llava_next", "internvl", "mistral3", "gemma3", "gemma4", "glm4v", "glm4v_moe"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
)
WRAPPER_DISK_NAMES = (
    (r"^model\.language_model\.", "model."),  # Qwen 2's, which vLLM calls as all others
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline|visual)\b", r"\1"),
    (r"^((model\.)?vision_tower)\.", r"\1.vision_model."),
)


def supported() -> list[str]:
    """The values of model_type in config.json that are known."""
    return [*(model_type for family in FAMILIES.values() for model_type in family.model_types), *WRAPPERS]


class UnknownFamilyError(InputError):
    """The model's type has no row here."""


def read_family(path: Path) -> Family:
    """A family that a user declares: a JSON object with the fields of `Family`. Raises InputError for anything else."""
    try:
        return TypeAdapter(Family).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path} does not declare a family: {where}: {first['msg']} (docs/add-a-family.md).") from error


def find_family(config: Any) -> tuple[str, Family]:
    """The family of a transformers configuration, with its name. Raises InputError for an unknown one and for a refused layout."""
    model_type = getattr(config, "model_type", None) or "(none)"
    if model_type in WRAPPERS:
        name, family = find_family(config.get_text_config())
        blocks = re.sub(r"^model\.", "model.language_model.", family.blocks)
        return name, replace(family, blocks=blocks, disk_names=(*family.disk_names, *WRAPPER_DISK_NAMES))
    for name, family in FAMILIES.items():
        if model_type in family.model_types:
            check_refusals(family, config)
            return name, family
    raise unknown(model_type)


def check_refusals(family: Family, config: Any) -> None:
    """Raises InputError for a layout of the family that cannot be smoothed."""
    for refusal in family.refuse:
        if all(getattr(config, key, None) == value for key, value in refusal.when.items()):
            raise InputError(
                f"this '{config.model_type}' layout cannot be smoothed exactly: {refusal.reason}. Other layouts of its family can."
            )


def unknown(model_type: str) -> UnknownFamilyError:
    """The error for a model_type that is not `supported`."""
    return UnknownFamilyError(
        f"unknown model family: model_type '{model_type}' in config.json. Supported: {', '.join(supported())}."
        f"{did_you_mean(model_type, supported())} "
        "A new family is one row, in models/families.py or given as --pairs FILE (docs/add-a-family.md)."
    )


def active_pairs(family: Family, config: Any, smooth: str) -> Iterator[Pair]:
    """The pairs that `smooth` asks for and that are exact under this configuration."""
    wanted = SMOOTH[1 : SMOOTH.index(smooth) + 1]
    for pair in family.pairs:
        if pair.when in wanted and is_exact(pair, config):
            yield pair


def is_exact(pair: Pair, config: Any) -> bool:
    """Whether the configuration has what the pair requires. Raises InputError for a key that it does not have at all."""
    for key in pair.requires:
        if not hasattr(config, key):
            raise InputError(f"the pair of {pair.source} requires '{key}', which config.json and the model's class do not know.")
    return all(_fits(getattr(config, key), value) for key, value in pair.requires.items())


def _fits(found: Any, required: Any) -> bool:
    if required is ...:
        return bool(found)
    return found in (required if isinstance(required, (tuple, list)) else (required,))


def pairs_in(modules: Collection[str], pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The `pairs` of a block that has these `modules`, by path, with each `*` replaced by the experts that are there.

    Raises InputError when a pair that is not optional is there in part, and when one has sinks and no source.
    """
    for pair in pairs:
        for source, expert in _matches(pair.source, modules) or [(pair.source, "*")]:
            patterns = [sink.replace("*", expert) if "*" in pair.source else sink for sink in pair.sinks]
            sinks = {pattern: [name for name, _ in _matches(pattern, modules)] for pattern in patterns}
            if pair.optional:
                sinks = {pattern: found for pattern, found in sinks.items() if found}
                if not sinks:
                    continue
            absent = [name for name, found in {source: source in modules, **sinks}.items() if not found]
            if absent:
                raise InputError(
                    f"the pair {pair.source} -> {', '.join(pair.sinks)} matches nothing: the model's blocks have no '{absent[0]}'."
                    f"{did_you_mean(absent[0], modules)} Its row in models/families.py does not fit this model."
                )
            yield replace(pair, source=source, sinks=tuple(name for found in sinks.values() for name in found))


def _matches(pattern: str, modules: Collection[str]) -> list[tuple[str, str]]:
    """The `modules` that `pattern` names, each with what stands for its `*`."""
    if "*" not in pattern:
        return [(pattern, "")] if pattern in modules else []
    expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return [(name, found[1]) for name in modules if (found := expression.fullmatch(name))]


def published_alpha(family: Family, config: Any) -> float | None:
    for size, alpha in family.alpha_of_sizes:
        if all(getattr(config, key, None) == value for key, value in size.items()):
            return alpha
    return family.alpha
