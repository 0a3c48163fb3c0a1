"""Which source feeds which linears, one row of data per family (docs/add-a-family.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from smoothquant_plus.errors import InputError, did_you_mean

# What `--smooth` may ask for: nothing, the pairs that start at a norm (SmoothQuant), or every pair that is exactly equivalent.
SMOOTH = ("none", "norms", "all")

# The alpha of SmoothQuant for models that have no published value (arXiv 2211.10438, Section 5.1).
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True)
class Pair:
    """A source whose output channels feed the input channels of `sinks`; paths are relative to the block.

    `rows` says how the source's channels map to the sinks': `each` one to one; `kv_groups` for v_proj -> o_proj, where the query heads of a
    group read the same value head. `when` is the smallest `--smooth` setting that includes the pair. `requires` are configuration values
    without which the pair would not be exact.
    """

    source: str
    sinks: tuple[str, ...]
    rows: Literal["each", "kv_groups"] = "each"
    when: Literal["norms", "all"] = "norms"
    requires: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A layout of the family that smoothing would change the function of: `when` the configuration has these values, `reason`."""

    when: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Family:
    """One kind of decoder. `blocks` is the path of its list of decoder blocks in the transformers model.

    `alpha` is the published SmoothQuant alpha (None when none is published); `alpha_of_sizes` are the sizes that differ.
    `norm_offset` is 1 for norms that multiply by (1 + weight). `disk_prefixes` are prefixes that a checkpoint may put before, or leave out
    of, the module names: a tensor `name` of the model is looked for as `new + name[len(old):]` for each (old, new).
    """

    model_types: tuple[str, ...]
    blocks: str
    pairs: tuple[Pair, ...]
    alpha: float | None
    alpha_of_sizes: tuple[tuple[Mapping[str, Any], float], ...] = ()
    norm_offset: float = 0.0
    disk_prefixes: tuple[tuple[str, str], ...] = ()
    refuse: tuple[Refusal, ...] = ()

    def spellings(self, name: str) -> list[str]:
        """The names that a checkpoint may store the model's tensor or module `name` under, the model's own first."""
        return [name, *(new + name[len(old) :] for old, new in self.disk_prefixes if name.startswith(old))]


LLAMA_PAIRS = (
    Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Pair("self_attn.v_proj", ("self_attn.o_proj",), rows="kv_groups", when="all"),
    # act(gate) * up is linear in up, whatever the activation function.
    Pair("mlp.up_proj", ("mlp.down_proj",), when="all"),
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
    "opt": Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        pairs=(
            Pair("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Pair("final_layer_norm", ("fc1",)),
            Pair("self_attn.v_proj", ("self_attn.out_proj",), rows="kv_groups", when="all"),
            # relu(x / s) = relu(x) / s for s > 0; no other activation function lets a factor through.
            Pair("fc1", ("fc2",), when="all", requires={"activation_function": "relu"}),
        ),
        alpha=0.5,
        disk_prefixes=(("model.decoder.", "decoder."),),
        refuse=(
            Refusal(
                {"do_layer_norm_before": False},
                "it normalizes after the residual sum (OPT-350m), so its norms feed the residual stream and not only linear layers",
            ),
        ),
    ),
}


def find_family(config: Any) -> tuple[str, Family]:
    """The family of a transformers configuration, with its name. Raises InputError for an unknown one and for a refused layout."""
    model_type = getattr(config, "model_type", None) or "(none)"
    for name, family in FAMILIES.items():
        if model_type in family.model_types:
            for refusal in family.refuse:
                if all(getattr(config, key, None) == value for key, value in refusal.when.items()):
                    raise InputError(f"this '{model_type}' layout cannot be smoothed exactly: {refusal.reason}.")
            return name, family
    known = [t for family in FAMILIES.values() for t in family.model_types]
    raise InputError(
        f"unknown model family: model_type '{model_type}' in config.json. Supported: {', '.join(known)}.{did_you_mean(model_type, known)} "
        "A new family is one row in models/families.py (docs/add-a-family.md)."
    )


def active_pairs(family: Family, config: Any, smooth: str) -> Iterator[Pair]:
    """The pairs that `smooth` asks for and that are exact under this configuration."""
    wanted = SMOOTH[1 : SMOOTH.index(smooth) + 1]
    for pair in family.pairs:
        if pair.when in wanted and all(getattr(config, key) == value for key, value in pair.requires.items()):
            yield pair


def published_alpha(family: Family, config: Any) -> float | None:
    for size, alpha in family.alpha_of_sizes:
        if all(getattr(config, key, None) == value for key, value in size.items()):
            return alpha
    return family.alpha
