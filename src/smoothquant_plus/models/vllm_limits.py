"""What vLLM does not read of what this package can write, and what it does not read everywhere: one row each (tried with 0.32.0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.scheme import ACTIVATIONS, Scheme
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.experts import Experts
from smoothquant_plus.models.skeleton import quantized_linears


@dataclass(frozen=True)
class Limit:
    """`when` finds what `what` says, with what it found in place of {}. `instead` is what can be done: without that the checkpoint can be
    read all the same, though not on every machine."""

    when: Callable[[Decoder, Scheme], object]
    what: str
    instead: str = ""


def experts(decoder: Decoder, _: Scheme) -> bool:
    return any(isinstance(module, Experts) for module in decoder.model.modules())


def is_a(*model_types: str) -> Callable[[Decoder, Scheme], bool]:
    return lambda decoder, _: decoder.config.model_type in model_types


def static(_: Decoder, scheme: Scheme) -> bool:
    return scheme.static


def per_tensor(_: Decoder, scheme: Scheme) -> bool:
    return scheme.weights.strategy == "tensor"


def zero_points(_: Decoder, scheme: Scheme) -> bool:
    return not scheme.weights.symmetric


def head(_: Decoder, scheme: Scheme) -> bool:
    return scheme.head is not None


def in_float16(decoder: Decoder, _: Scheme) -> bool:
    return str(decoder.checkpoint.config.get("dtype") or decoder.checkpoint.config.get("torch_dtype")) == "float16"


def uneven(number: int, packed: bool = False) -> Callable[[Decoder, Scheme], str]:
    """The first 4-bit layer whose output channels `number` does not divide, of those with zero points if these are what is `packed`. (An output
    head is padded when it is loaded, but its zero points are not.)"""

    def find(decoder: Decoder, scheme: Scheme) -> str:
        for path, (linear, own) in quantized_linears(decoder.model, decoder.family, scheme).items():
            counts = own.weights.bits == 4 and (not own.weights.symmetric if packed else path != decoder.head_path)
            if counts and linear.out_features % number:
                return f"{path} has {linear.out_features}"
        return ""

    return find


def both(*conditions: Callable[[Decoder, Scheme], object]) -> Callable[[Decoder, Scheme], bool]:
    return lambda decoder, scheme: all(condition(decoder, scheme) for condition in conditions)


BLOOM = "its loader of BLOOM cuts whatever belongs to query_key_value into heads, and cannot cut"
LIMITS = (
    Limit(
        lambda _, scheme: scheme.inputs == ACTIVATIONS["tensor"], "it has no dynamic per-tensor INT8 activations", "use --activations token"
    ),
    Limit(both(experts, static), "it has no experts with static activations", "use --activations token"),
    Limit(both(experts, per_tensor), "its experts have no INT8 weights with one scale for all", "use --weights channel"),
    Limit(both(is_a("bloom"), static), f"{BLOOM} a static scale", "use --activations token"),
    Limit(both(is_a("bloom"), per_tensor), f"{BLOOM} a scale of the whole weight", "use --weights channel"),
    Limit(
        both(is_a("bloom"), zero_points, lambda decoder, _: decoder.config.hidden_size // decoder.config.num_attention_heads % 8),
        f"{BLOOM} zero points, eight to a number, when 8 does not divide the channels of a head",
        "use --symmetric",
    ),
    Limit(uneven(8, packed=True), "its zero points are those of eight output channels together, and {}", "use --symmetric"),
    Limit(
        both(is_a("bloom", "cohere", "gemma2", "opt"), head),
        "its model of this family cannot have a quantized output head",
        "leave out --lm-head",
    ),
    Limit(experts, "on a CPU without AMX it needs this package's plugin to run quantized experts."),
    Limit(uneven(32), "on a CPU its 4-bit kernel takes output channels in multiples of 32, and {}: a GPU can run this."),
    Limit(
        both(is_a("gemma2", "gemma3_text", "glm4"), in_float16),
        "it refuses to run this family in float16: the default there is bfloat16 then, so leave out --dtype or give that.",
    ),
)


def check_for_vllm(decoder: Decoder, scheme: Scheme) -> list[str]:
    """What to know about running the model in vLLM when it is quantized in this way. Raises InputError, with the options that would do, when
    vLLM could not read it on any machine."""
    found = [(limit, limit.what.format(hit)) for limit in LIMITS if (hit := limit.when(decoder, scheme))]
    refused = [f"{what}: {limit.instead}" for limit, what in found if limit.instead]
    if refused:
        raise InputError(
            f"vLLM could not read this checkpoint: {'; '.join(refused)}. Or give --for here: other readers can (docs/formats.md)."
        )
    return [f"vLLM: {what}" for _, what in found]
