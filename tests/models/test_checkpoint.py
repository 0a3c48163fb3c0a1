"""What is on disk, against the package whose format it is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.integers import QuantizedWeight, dequantize, quantize_weight
from smoothquant_plus.method.scheme import ACTIVATIONS, GROUP_SIZES, Scheme, find_scheme
from smoothquant_plus.models.checkpoint import (
    CONFIG,
    SINGLE,
    Checkpoint,
    linear_layout,
    linear_tensors,
    quantization_config,
    read_linear,
    read_scheme,
    write_shard,
)

GROUPED = [find_scheme("w4a16", group_size=size, symmetric=symmetric) for size, symmetric in itertools.product(GROUP_SIZES, (False, True))]
SCHEMES = [
    *(find_scheme("w8a8", activations, weights) for activations, weights in itertools.product(ACTIVATIONS, ("channel", "tensor"))),
    *GROUPED,
]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Zero points are packed eight rows to a number: fewer than eight, and more than a multiple of eight; and one group in a row, or many.
SHAPES = list(itertools.product((1, 5, 8, 17), (128, 384)))
NAME = "model.layers.0.self_attn.q_proj"


def name_of(scheme: Scheme) -> str:
    if scheme.inputs is None:
        return f"{scheme.weights.group_size}-{'symmetric' if scheme.weights.symmetric else 'asymmetric'}"
    return f"{scheme.inputs.strategy}-{'dynamic' if scheme.inputs.dynamic else 'static'}-{scheme.weights.strategy}"


def quantized(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> tuple[QuantizedWeight, Tensor | None]:
    """A weight whose rows differ in size and in sign, one of them all zero, and its input scale for static activations."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight[rows // 2 :] = weight[rows // 2 :].abs()
    weight[rows // 3] = 0
    return quantize_weight(weight, scheme.weights, dtype), torch.tensor([0.02]) if scheme.static else None


@HALVES
@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_compressed_tensors_reads_what_was_meant(scheme: Scheme, dtype: torch.dtype) -> None:
    quant = scheme.weights
    arguments = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=quant.group_size, symmetric=quant.symmetric, dynamic=False
    )
    theirs = QuantizationScheme(targets=["Linear"], weights=arguments)
    for rows, columns in SHAPES:
        weight, _ = quantized(scheme, rows, columns, dtype)
        stored = linear_tensors(weight, None)
        assert set(stored) == set(PackedQuantizationCompressor.compression_param_names(theirs))
        found = PackedQuantizationCompressor.decompress(stored, theirs)["weight"]
        # They multiply in the dtype of the scale, where the integers are exact: the product alone is rounded, to that dtype.
        assert found.dtype == dtype and torch.equal(found, dequantize(weight).to(dtype))

        assert torch.equal(stored["weight_packed"], pack_to_int32(weight.values, 4))
        if weight.zero_point is not None:
            assert torch.equal(stored["weight_zero_point"], pack_to_int32(weight.zero_point, 4, packed_dim=0))


@HALVES
@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_a_linear_is_stored_as_declared_and_comes_back(scheme: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    for rows, columns in SHAPES:
        weight, input_scale = quantized(scheme, rows, columns, dtype)
        stored = linear_tensors(weight, input_scale)
        assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in stored.items()} == linear_layout(scheme, rows, columns, dtype)

        write_shard(tmp_path / SINGLE, {f"{NAME}.{suffix}": tensor for suffix, tensor in stored.items()})
        back, scale = read_linear(Checkpoint(tmp_path), NAME, scheme, rows, columns)
        assert torch.equal(back.values, weight.values) and back.quant == weight.quant
        assert back.scale.dtype == weight.scale.dtype and torch.equal(back.scale, weight.scale)
        assert (scale is None) == (input_scale is None) and (scale is None or torch.equal(scale, input_scale))
        if weight.zero_point is None:
            assert back.zero_point is None
        else:
            assert back.zero_point.dtype == torch.int8 and torch.equal(back.zero_point, weight.zero_point)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_is_nearly_four_times_smaller(symmetric: bool) -> None:
    layout = linear_layout(find_scheme("w4a16", symmetric=symmetric), 4096, 4096, torch.float16)
    stored = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
    assert 4096 * 4096 * 2 / stored > 3.8


def test_a_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    """Two shapes may need tensors of the same sizes; only `weight_shape` tells them apart."""
    scheme = find_scheme("w4a16")
    weight, _ = quantized(scheme, 5, 128, torch.float16)
    (tmp_path / CONFIG).write_text("{}")
    tensors = linear_tensors(weight, None) | {"weight_shape": torch.tensor([6, 128])}
    write_shard(tmp_path / SINGLE, {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()})
    with pytest.raises(InputError, match=rf"'{NAME}\.weight_shape' is \[6, 128\], and the layer is \[5, 128\]"):
        read_linear(Checkpoint(tmp_path), NAME, scheme, 5, 128)


@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_the_shape_may_be_missing(scheme: Scheme, tmp_path: Path) -> None:
    """As it is where vLLM could not read it, and vLLM itself does without."""
    weight, _ = quantized(scheme, 5, 384, torch.float16)
    (tmp_path / CONFIG).write_text("{}")
    tensors = linear_tensors(weight, None)
    del tensors["weight_shape"]
    write_shard(tmp_path / SINGLE, {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()})
    back, _ = read_linear(Checkpoint(tmp_path), NAME, scheme, 5, 384)
    assert torch.equal(dequantize(back), dequantize(weight))
    with pytest.raises(InputError, match="must be"):  # and the other tensors still say that it is another layer
        read_linear(Checkpoint(tmp_path), NAME, scheme, 6, 384)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_a_declared_scheme_comes_back(scheme: Scheme) -> None:
    config = json.loads(json.dumps({"quantization_config": quantization_config(scheme, ["lm_head"], ["lm_head"])}))
    assert read_scheme(config, Path("OUT"), ["lm_head"]) == scheme.model_copy(update={"ignore": ("lm_head",)})


def group_of(scheme: Scheme, **changes: Any) -> dict[str, Any]:
    """The declared quantization with another `weights` or `input_activations`."""
    declared = quantization_config(scheme, [], ["lm_head"])
    group = declared["config_groups"]["group_0"]
    for key, change in changes.items():
        group[key] = change if change is None or group.get(key) is None else group[key] | change
    return declared


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"num_bits": 8}},
        {"weights": {"group_size": 16}},
        {"weights": {"group_size": None}},
        {"weights": {"strategy": "channel", "group_size": None}},
        {"weights": {"actorder": "group"}},
        {"weights": {"type": "float"}},
        {"output_activations": {"num_bits": 8}},
        {"weights": None},
        {"input_activations": {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}},
    ],
    ids=str,
)
def test_another_4_bit_format_is_refused(changes: dict[str, Any]) -> None:
    """What other tools write in the same format and this package would compute wrongly."""
    with pytest.raises(InputError, match=r"OUT/config\.json declares a quantization that cannot be run here"):
        read_scheme({"quantization_config": group_of(find_scheme("w4a16"), **changes)}, Path("OUT"), ["lm_head"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "declares a quantized KV cache"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "declares transforms of activations"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "declares sparse weights"),
        ({"ignore": ["re:("]}, "unterminated subpattern"),
        ({"ignore": [3]}, "ignore is not a list of names"),
        ({"ignore": "lm_head"}, "ignore is not a list of names"),
    ],
    ids=str,
)
def test_what_else_changes_the_result_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_scheme({"quantization_config": group_of(find_scheme("w8a8")) | changes}, Path("OUT"), ["lm_head"])


@pytest.mark.parametrize("order", ["static", "weight", None])
def test_what_changes_nothing_is_not(order: str | None) -> None:
    """An order in which another tool rounded channels, and sections that say nothing."""
    declared = group_of(find_scheme("w4a16"), weights={"actorder": order}) | {
        "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"},
        "transform_config": {},
        "kv_cache_scheme": None,
    }
    assert read_scheme({"quantization_config": declared}, Path("OUT"), ["lm_head"]) == find_scheme("w4a16")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}, "weights of 4 bits per group"),
        ({"weights": {"strategy": "token"}}, "weights of 8 bits per token"),
        ({"input_activations": {"dynamic": False}}, "activations of 8 bits per token, static"),
        ({"input_activations": {"symmetric": False}}, "8 bits are symmetric"),
        ({"input_activations": None}, "activations that are not quantized"),
    ],
    ids=str,
)
def test_another_8_bit_format_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_scheme({"quantization_config": group_of(find_scheme("w8a8"), **changes)}, Path("OUT"), ["lm_head"])
