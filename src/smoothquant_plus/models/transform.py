"""Smoothing and quantizing one block that is in memory: the method applied to a model's modules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.method.integers import QuantizedWeight, dequantized_pieces, join_rows, pieces, quantize_weight, scale_of
from smoothquant_plus.method.scheme import Scheme
from smoothquant_plus.method.smooth import (
    factors,
    fold_bias,
    fold_norm,
    fold_sink,
    fold_source_rows,
    nearest_power_of_two,
    share_within_groups,
    to_storage,
    weight_maxima,
)
from smoothquant_plus.models.blocks import Decoder, Stream, assign
from smoothquant_plus.models.checkpoint import SHAPE, linear_tensors
from smoothquant_plus.models.experts import Routing, repeated
from smoothquant_plus.models.families import Pair, active_pairs
from smoothquant_plus.models.rows import kv_heads, source_rows
from smoothquant_plus.models.skeleton import is_transposed, linears

# A right pair moves a block by rounding alone, about 1e-6; a wrong one by 0.2 and more (docs/pitfalls.md).
EQUIVALENCE_TOLERANCE = 1e-3


# What smoothing still has to do, in this order, to the weight of each linear that a block was opened without (`Decoder.block`): by path inside it.
Pending = dict[str, list[Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class SmoothedPair:
    """What smoothing did to one pair of a block: `s` float32, per input channel of the sinks; `rounded` are the tensors that could not be
    rescaled exactly in the dtype that they are stored in."""

    source: str
    sinks: tuple[str, ...]
    s: Tensor
    dead_channels: int
    rounded: tuple[str, ...]


def smooth_block(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    pairs: Sequence[Pair],
    maxima: dict[str, Tensor],
    alpha: float,
    pending: Pending | None = None,
) -> list[SmoothedPair]:
    """Fold smoothing factors into the float32 weights of `block`, in place, one pair after the other.

    `maxima` are the per-channel input maxima of the block's linears; the sinks' are divided by s in place, as their inputs now are. Of a
    block without its linears' weights those are read one at a time, and what is to be done to them is added to `pending`.
    Raises InputError when a folded value cannot be stored in the checkpoint's dtype, naming the tensor.
    """
    smoothed = []
    quantized = decoder.linears(index)
    for pair in decoder.pairs(index, pairs):
        source: Any = block.get_submodule(pair.source)
        path = f"{decoder.path(index)}.{pair.source}"
        if source.weight is None:
            raise InputError(f"{path} has no weight to fold the smoothing factors into (a norm without gain): use --smooth none.")
        sinks: dict[str, Any] = {name: block.get_submodule(name) for name in pair.sinks}
        names = [name for name in sinks if name in quantized]
        activation = torch.stack([maxima[name] for name in names]).amax(dim=0)  # experts see some of the tokens each
        each = [weight_maxima([_weight_of(decoder, index, block, name, pending)]) for name in names]
        weights = torch.stack(each).amax(dim=0).to(activation.device)
        s = factors(activation, weights, alpha)
        if len(names) < len(sinks):
            # A router stays in 16 bits: what it is multiplied by must not round it, or tokens would go to other experts.
            s = nearest_power_of_two(s)
        try:
            s, rounded = _fold_pair(decoder, index, block, pair, s, maxima, pending)
        except OverflowError as error:
            raise InputError(
                f"{path}: {error}. Its smoothed values do not fit the checkpoint's dtype: convert the checkpoint to bfloat16 or float32, or "
                f"choose another --alpha (now {alpha:g})."
            ) from error
        dead = int(((activation <= 0) | (weights <= 0)).sum())
        smoothed.append(SmoothedPair(pair.source, pair.sinks, s.cpu(), dead, rounded))
    return smoothed


def fold_block(
    decoder: Decoder, index: int, block: nn.Module, found: Mapping[str, Tensor], maxima: dict[str, Tensor], pending: Pending | None = None
) -> set[str]:
    """Fold the factors that `smooth_block` found for this model before, {path of the source: s float32}, into the float32 weights of
    `block`, in place or as it does `pending`; returns the paths that are of this block. `maxima`, which may be empty, are divided by them.

    Raises InputError for factors of another shape, and for folded values that the checkpoint's dtype cannot hold.
    """
    folded = set()
    for pair in decoder.pairs(index, list(active_pairs(decoder.family, decoder.config, "all"))):
        path = f"{decoder.path(index)}.{pair.source}"
        if path not in found:
            continue
        s, sink = found[path], cast(Any, block.get_submodule(pair.sinks[0]))
        channels = sink.weight.shape[1]
        if s.shape != (channels,) or not bool(((s > 0) & s.isfinite()).all()):
            raise InputError(f"the factors of {path} are not {channels} positive numbers: they are damaged, or of another model.")
        try:
            _fold_pair(decoder, index, block, pair, s, maxima, pending)
        except OverflowError as error:
            raise InputError(f"the factors of {path} do not fit this checkpoint: {error}.") from error
        folded.add(path)
    return folded


def _weight_of(decoder: Decoder, index: int, block: nn.Module, name: str, pending: Pending | None) -> Tensor:
    """The weight of a linear as smoothing has left it: in place, or read anew."""
    if pending is None:
        weight: Tensor = cast(Any, block.get_submodule(name)).weight
        return weight
    weight = decoder.read(f"{decoder.path(index)}.{name}.weight", torch.float32)
    for change in pending.get(name, []):
        weight = change(weight)
    return weight


def _change(linear: Any, name: str, pending: Pending | None, change: Callable[[Tensor], Tensor]) -> None:
    """Do to a linear's weight what `change` does in place, now or later."""
    if pending is None:
        change(linear.weight)
    else:
        pending.setdefault(name, []).append(change)


def _fold_pair(
    decoder: Decoder, index: int, block: nn.Module, pair: Pair, s: Tensor, maxima: dict[str, Tensor], pending: Pending | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Divide the pair's source by `s` and multiply its sinks, in place or as it does `pending`, and divide the `maxima` of those; returns the
    factors that were really applied, and the tensors that they rounded. Raises OverflowError when a folded value does not fit its stored
    dtype."""
    source: Any = block.get_submodule(pair.source)
    quantized = decoder.linears(index)
    s = _fold_source(decoder, index, source, pair, s.to(decoder.device), pending)
    rounded = [f"{pair.source}.bias"] if getattr(source, "bias", None) is not None else []
    for name in pair.sinks:
        sink: Any = block.get_submodule(name)
        _change(sink, name, pending if name in quantized else None, partial(fold_sink, s=s))
        if name not in quantized:
            stored = decoder.stored_dtype(f"{decoder.path(index)}.{name}.weight")
            exact = sink.weight.clone()
            sink.weight.copy_(to_storage(exact, stored, f"the weight of {name}"))
            if not torch.equal(sink.weight, exact):  # next to zero even a power of two rounds in float16
                rounded.append(f"{name}.weight")
        elif name in maxima:
            maxima[name] = maxima[name] / s.cpu()
    return s, tuple(rounded)


def _fold_source(decoder: Decoder, index: int, source: Any, pair: Pair, s: Tensor, pending: Pending | None) -> Tensor:
    """Divide the source by `s`; returns the factors that the sinks must be multiplied by."""
    stored = decoder.stored_dtype(f"{decoder.path(index)}.{pair.source}.weight")
    bias = getattr(source, "bias", None)
    if isinstance(source, nn.Linear):
        rows = source_rows(pair.rows, decoder.config, len(source.weight), len(s)).to(s.device)
        of_rows = s
        if len(rows) < len(s):  # the query heads of a group read the same value head
            groups = kv_heads(decoder.config)
            of_rows, s = share_within_groups(s, groups, len(rows) // groups)
        divisors = torch.ones(len(source.weight), dtype=s.dtype, device=s.device)
        divisors[rows] = of_rows
        # The weight is quantized next and never stored; only its bias is, in the checkpoint's dtype.
        _change(source, pair.source, pending, partial(fold_source_rows, s=divisors))
    else:
        gain, s = fold_norm(source.weight, s, stored, decoder.family.norm_offset)
        source.weight.copy_(gain)
        divisors = s
    if bias is not None:
        bias.copy_(fold_bias(bias, divisors, stored))
    return s


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear of a block or the output head, quantized: `error` is the relative Frobenius error of its (smoothed) weight, `digest` the
    sha256 of the float32 weight that the integers stand for."""

    weight: QuantizedWeight
    input_scale: Tensor | None
    error: float
    digest: str


def quantize_block(decoder: Decoder, index: int, block: nn.Module, scheme: Scheme, maxima: dict[str, Tensor]) -> dict[str, QuantizedLinear]:
    """Every linear of a (smoothed) block as integers, by path inside the block; the block's own float weights are released on the way.

    `maxima` is read for static activations only.
    """
    quantized = {}
    for name, linear in linears(block, decoder.family).items():
        folded = linear.weight.cpu().float()
        weight, input_scale = quantize_linear(decoder, f"{decoder.path(index)}.{name}", folded, scheme, maxima.get(name))
        wrong, whole = wrong_of(weight, folded)
        quantized[name] = QuantizedLinear(weight, input_scale, wrong / max(whole, 1e-30), digest_of(weight))
        assign(linear, "weight", torch.empty_like(folded, device="meta"))
    return quantized


def quantize_pending(
    decoder: Decoder, index: int, block: nn.Module, scheme: Scheme, maxima: dict[str, Tensor], pending: Pending
) -> Iterator[tuple[str, Tensor]]:
    """What a block that was opened without its linears' weights is on disk, name by name; those are read, smoothed and quantized one at a time.

    The tensors are the same as of `quantize_block`; what a plan says of them, which takes most of its time, is left out.
    """
    for name in decoder.linears(index):
        folded = _weight_of(decoder, index, block, name, pending)
        weight, input_scale = quantize_linear(decoder, f"{decoder.path(index)}.{name}", folded, scheme, maxima.get(name))
        stored = tensors_of_linear(decoder, index, name, weight, input_scale)
        del folded, weight  # memory belongs to the next one, not to what is left of this
        yield from stored.items()
        del stored
    yield from other_tensors(decoder, index, block).items()


def quantize_head(decoder: Decoder, scheme: Scheme) -> QuantizedLinear:
    """The output head as integers, of the embedding's table if it is tied to that: rounded to nearest and not smoothed, because what feeds it,
    the last norm, is the source of no pair of the papers. A few rows at a time are read and in memory as floats."""
    head = decoder.model.get_output_embeddings()
    parts, wrongs, wholes = [], [], []
    for rows in pieces(head.weight):
        floats = decoder.checkpoint.read(decoder.disk_name(f"{decoder.head_path}.weight"), rows=rows, dtype=torch.float32).float()
        part, _ = quantize_linear(decoder, decoder.head_path, floats, scheme, None)
        wrong, whole = wrong_of(part, floats)
        parts.append(part)
        wrongs.append(wrong)
        wholes.append(whole)
    weight = join_rows(parts)
    return QuantizedLinear(weight, None, math.hypot(*wrongs) / max(math.hypot(*wholes), 1e-30), digest_of(weight))


def quantize_linear(
    decoder: Decoder, path: str, folded: Tensor, scheme: Scheme, maxima: Tensor | None
) -> tuple[QuantizedWeight, Tensor | None]:
    """The (smoothed) float32 weight `folded` (N, K) of the linear `path` as integers, and its input scale for static activations, which the
    input's `maxima` (K,) are for.

    Group scales are stored in the dtype of the checkpoint's weight: servers compute in it, and would round them to it.
    """
    try:
        weight = quantize_weight(folded, scheme.weights, decoder.stored_dtype(f"{path}.weight"))
    except ValueError as error:
        raise InputError(f"{path}: {error}.") from error
    if not scheme.static:
        return weight, None
    assert maxima is not None  # static activations are always calibrated
    return weight, scale_of(maxima.amax().reshape(1))


def wrong_of(weight: QuantizedWeight, folded: Tensor) -> tuple[float, float]:
    """Frobenius norms of what is wrong in `weight` against the float32 weight (N, K) that it was made of, and of that weight."""
    wrong = math.hypot(*(torch.linalg.vector_norm(back - folded[rows]).item() for rows, back in dequantized_pieces(weight)))
    return wrong, torch.linalg.vector_norm(folded).item()


def digest_of(weight: QuantizedWeight) -> str:
    """sha256 of the float32 values that the integers stand for, in memory order."""
    digest = hashlib.sha256()
    for _, back in dequantized_pieces(weight):
        digest.update(back.view(-1).numpy())
    return digest.hexdigest()


def block_tensors(decoder: Decoder, index: int, block: nn.Module, quantized: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """What a block is on disk: its linears as integers, every other tensor in the dtype and under the name that the source has."""
    tensors = other_tensors(decoder, index, block)
    for name, linear in quantized.items():
        tensors |= tensors_of_linear(decoder, index, name, linear.weight, linear.input_scale)
    return tensors


def tensors_of_linear(decoder: Decoder, index: int, name: str, weight: QuantizedWeight, input_scale: Tensor | None) -> dict[str, Tensor]:
    disk = decoder.disk_name(f"{decoder.path(index)}.{name}.weight").removesuffix(".weight")
    stored_as = linear_tensors(weight, input_scale, decoder.family.transposed)
    if name in decoder.family.shapeless:
        stored_as.pop(SHAPE, None)
    return {f"{disk}.{suffix}": tensor for suffix, tensor in stored_as.items()}


def other_tensors(decoder: Decoder, index: int, block: nn.Module) -> dict[str, Tensor]:
    """What a block is on disk without its quantized linears' weights."""
    path = decoder.path(index)
    quantized = decoder.linears(index)
    tensors: dict[str, Tensor] = {}
    for name, tensor in block.state_dict().items():
        if name.removesuffix(".weight") not in quantized:
            disk = decoder.disk_name(f"{path}.{name}")
            stored = tensor.t() if is_transposed(decoder.family, f"{path}.{name}", tensor) else tensor
            tensors[disk] = stored.to("cpu", decoder.checkpoint.tensors[disk].dtype)
    # What the model itself ignores, such as the rotary tables of old checkpoints, is carried along.
    ignored = [name for name in decoder.block_tensors(index) if name not in decoder.known_names]
    return tensors | {name: decoder.checkpoint.read(name, finite=False) for name in ignored}


def head_tensors(decoder: Decoder, quantized: QuantizedLinear) -> dict[str, Tensor]:
    """What the quantized output head is on disk: a tied one, which had no name there, is called as in the model. Its bias stays as it is."""
    weight = f"{decoder.head_path}.weight"
    disk = (decoder.disk_name(weight) if decoder.head_is_stored else weight).removesuffix(".weight")
    tensors = {f"{disk}.{suffix}": tensor for suffix, tensor in linear_tensors(quantized.weight, quantized.input_scale).items()}
    return tensors | {name: decoder.checkpoint.read(name) for name in decoder.head_names if name != f"{disk}.weight"}


def unquantized(decoder: Decoder, scheme: Scheme) -> list[str]:
    """The linear layers that stay as they are, routers too: what readers must not look for integers in. Each under the model's name, which
    transformers looks for, and under its last spelling, which vLLM does: layers of a wrapper are called differently in the two."""
    inside = [set(decoder.linears(index)) for index in range(len(decoder))]
    kept = []
    for name, module in decoder.model.named_modules():
        if decoder.in_blocks(name):
            number, _, path = name.removeprefix(f"{decoder.family.blocks}.").partition(".")
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim == 2 and path not in inside[int(number)]:
                kept.append(name)
        elif isinstance(module, nn.Linear) and not (scheme.head and name == decoder.head_path):
            kept.append(name)
    spellings = [decoder.family.spellings(f"{name}.weight") for name in kept]
    # What the model's class has no place for, and is carried along: a server may have one, for speculative decoding.
    for name, info in decoder.checkpoint.tensors.items():
        if name not in decoder.known_names and name.endswith(".weight") and len(info.shape) == 2:
            spellings.append([name])
    return list(dict.fromkeys(name.removesuffix(".weight") for found in spellings for name in (found[0], found[-1])))


def prove_equivalent(
    decoder: Decoder,
    block: nn.Module,
    index: int,
    stream: Stream,
    reference: list[Tensor],
    routing: Routing,
    smoothed: Iterable[SmoothedPair],
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Run the `smoothed` block in float32 over the stream and compare with the original's outputs `reference`, also in float32, whose tokens
    went to experts as in `routing`: the largest relative error over all tokens.

    Raises VerificationError above the tolerance, and when tokens are routed to other experts than before.
    """
    residual = torch.as_tensor(getattr(block, "layer_scalar", 1.0)).item()  # Gemma 4's blocks multiply all that they put out
    errors = []
    with repeated(block, routing):
        for batch, before in enumerate(reference):
            after = decoder.run(block, index, stream, batch, torch.float32)
            errors.append(relative_error(before, after, stream.hidden[batch], residual))
            progress(batch + 1)
    error = torch.tensor(errors).amax().item()  # of a NaN too, which max() would lose
    # The sources' biases, divided by s, are rounded to the dtype they are stored in; hardly anything else is (method/smooth.py).
    names = [f"{decoder.path(index)}.{name}" for pair in smoothed for name in pair.rounded]
    tolerance = max(EQUIVALENCE_TOLERANCE, *(4 * torch.finfo(decoder.stored_dtype(name)).eps for name in names), 0.0)
    # Tokens whose two best experts were equal up to that may go to the other one.
    rerouted = routing.flipped > max(1, tolerance * routing.tokens)
    if not error <= tolerance or rerouted:
        changed = f"relative error {error:.2e}, tolerance {tolerance:.0e}"
        if rerouted:
            changed += f", and {routing.flipped} of {routing.tokens} tokens went to other experts"
        raise VerificationError(
            f"smoothing changed the function of {decoder.path(index)}: {changed}. Nothing was published. The pairs declared for family "
            f"'{decoder.family_name}' do not fit this model; --smooth none quantizes it unsmoothed."
        )
    return error


def relative_error(before: Tensor, after: Tensor, hidden: Tensor, residual: float = 1.0) -> float:
    """How far a block's change of the hidden states moved: the largest |after - before| / |before - residual * hidden| over tokens, in float32.

    `hidden` is what went into the block, and `residual` how much of it comes out. Norms are per token over channels, and the residual stream is
    taken out: neither one huge token nor a large residual can hide a wrong one. Channels behind those of `hidden` are keys and values for
    later blocks, and are compared by themselves.
    """
    width = hidden.shape[-1]

    def largest(before: Tensor, after: Tensor, known: Tensor | float) -> float:
        difference, change = (torch.linalg.vector_norm(each, dim=-1) for each in (after - before, before - known))
        return (difference / change.clamp_min(1e-30)).amax().item()

    before, after = before.float(), after.float()
    error = largest(before[..., :width], after[..., :width], residual * hidden.float())
    return max(error, largest(before[..., width:], after[..., width:], 0.0)) if before.shape[-1] > width else error
