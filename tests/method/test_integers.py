from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.method import integers
from smoothquant_plus.method.integers import (
    dequantize,
    dequantized_pieces,
    lost_channels,
    pack_int4,
    quantize_input,
    quantize_weight,
    unpack_int4,
)
from smoothquant_plus.method.scheme import ACTIVATIONS, GROUP_SIZES, SCHEMES, Quant, find_scheme

CHANNEL = SCHEMES["w8a8"].weights
TENSOR = find_scheme("w8a8", weights="tensor").weights
GROUPS = [
    find_scheme("w4a16", group_size=size, symmetric=symmetric).weights for size, symmetric in itertools.product(GROUP_SIZES, (False, True))
]


def name_of(quant: Quant) -> str:
    return f"{quant.group_size}-{'symmetric' if quant.symmetric else 'asymmetric'}"


@pytest.mark.parametrize("quant", [CHANNEL, TENSOR], ids=["channel", "tensor"])
@given(rows=st.integers(1, 9), columns=st.integers(1, 33), exponent=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_a_weight_comes_back_within_half_a_step(quant: Quant, rows: int, columns: int, exponent: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    quantized = quantize_weight(weight, quant)
    assert quantized.values.dtype == torch.int8
    assert quantized.values.abs().max() == 127  # the largest magnitude uses the whole range
    assert ((dequantize(quantized) - weight).abs() <= quantized.scale * 0.5001).all()
    assert quantized.scale.shape == ((rows, 1) if quant is CHANNEL else (1,))


def test_zero_channels_and_negative_channels() -> None:
    weight = torch.tensor([[0.0, 0.0], [-1.0, -3.0], [1e-30, 2e-30]])
    quantized = quantize_weight(weight, CHANNEL)
    assert quantized.values.tolist() == [[0, 0], [-42, -127], [64, 127]]
    assert quantized.scale[0] == 1
    assert torch.isfinite(dequantize(quantized)).all()


# What a group can look like, in numbers around one.
KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "both signs": lambda size, generator: torch.randn(size, generator=generator),
    "positive": lambda size, generator: torch.rand(size, generator=generator) + 0.5,
    "negative": lambda size, generator: -torch.rand(size, generator=generator) - 0.5,
    "half zero": lambda size, generator: torch.randn(size, generator=generator).clamp_(min=0),
    "one huge": lambda size, generator: (1e-3 * torch.randn(size, generator=generator)).index_fill_(0, torch.tensor([size - 1]), -1.0),
    "constant": lambda size, generator: torch.full((size,), 0.7),
    "negative constant": lambda size, generator: torch.full((size,), -0.7),
    # The ends are half a step from an integer each: both are rounded away from zero, and together they need 17 integers.
    "ties": lambda size, generator: torch.tensor([-1.0, 1.0]).repeat(size // 2),
    "zero": lambda size, generator: torch.zeros(size),
}


@pytest.mark.parametrize(
    ("dtype", "decades"),
    [(torch.float16, (-6, 3)), (torch.bfloat16, (-36, 36)), (torch.float32, (-36, 36))],
    ids=["float16", "bfloat16", "float32"],
)
@pytest.mark.parametrize("quant", GROUPS, ids=name_of)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.sampled_from([1, 2, 5, 9]), seed=st.integers(0, 2**31))
def test_a_group_comes_back_within_half_a_step_of_its_stored_scale(
    quant: Quant, dtype: torch.dtype, decades: tuple[int, int], data: Any, rows: int, seed: int
) -> None:
    """However the groups of one weight differ in kind and in size."""
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(*decades)), min_size=1, max_size=4))
    size, generator = quant.group_size or 0, torch.Generator().manual_seed(seed)
    # Rows begin with another group each, so that neighbours differ in both directions.
    groups = [[KINDS[kind](size, generator) * 10.0**decade for kind, decade in drawn[row % len(drawn) :] + drawn] for row in range(rows)]
    weight = torch.stack([torch.cat(row[: len(drawn)]) for row in groups])
    quantized = quantize_weight(weight, quant, dtype)
    values, scale, zero_point, back = quantized.values, quantized.scale, quantized.zero_point, dequantize(quantized)

    assert scale.shape == (rows, len(drawn)) and scale.dtype == dtype
    assert ((back - weight).abs() <= 0.5001 * scale.float().repeat_interleave(size, dim=1)).all()
    assert (back[weight == 0] == 0).all()
    assert values.dtype == torch.int8 and values.min() >= -8 and values.max() <= 7
    assert (zero_point is None) == quant.symmetric
    if zero_point is not None:
        assert zero_point.dtype == torch.int8 and zero_point.shape == scale.shape and zero_point.min() >= -8 and zero_point.max() <= 7

    parts = weight.reshape(rows, -1, size)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    needed = torch.maximum(high / 7, -low / 8) if quant.symmetric else (high - low) / 15
    empty = needed == 0
    assert (scale[empty] == 1).all()
    # Nothing is given away: the scale is what the range needs, or the next number up in its dtype.
    finest = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    assert (scale.float() <= needed * (1 + torch.finfo(dtype).eps) + finest)[~empty].all()


@pytest.mark.parametrize("quant", GROUPS, ids=name_of)
def test_known_groups(quant: Quant) -> None:
    """Whose integers can be told by hand."""
    size = quant.group_size or 0
    ends = torch.zeros(4, size)
    ends[0, 0], ends[0, 1] = -8, 7
    ends[1, 0] = 7
    ends[2, 0] = -8
    quantized = quantize_weight(ends, quant)
    if quant.symmetric:
        assert quantized.scale.flatten().tolist() == [1, 1, 1, 1]
        assert quantized.values[:, :2].tolist() == [[-8, 7], [7, 0], [-8, 0], [0, 0]]
    else:
        assert quantized.scale.flatten().tolist() == pytest.approx([1, 7 / 15, 8 / 15, 1])
        assert quantized.zero_point is not None and quantized.zero_point.flatten().tolist() == [0, -8, 7, -8]
        assert quantized.values[:, :2].tolist() == [[-8, 7], [7, -8], [-8, 7], [-8, -8]]
    torch.testing.assert_close(dequantize(quantized), ends)


@pytest.mark.parametrize("quant", [CHANNEL, TENSOR, *GROUPS], ids=lambda quant: quant.strategy)
def test_pieces_of_a_weight_are_the_weight(quant: Quant, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(weight, quant)
    for piece in (1, 512, 600):  # numbers at a time: one row, two, two
        monkeypatch.setattr(integers, "PIECE", piece)
        cut = quantize_weight(weight, quant)
        assert torch.equal(cut.values, whole.values) and torch.equal(cut.scale, whole.scale)
        back = list(dequantized_pieces(cut))
        assert len(back) == (7 if piece == 1 else 4)
        assert torch.equal(torch.cat([rows for _, rows in back]), dequantize(whole))


@given(rows=st.integers(0, 9), columns=st.integers(0, 17), seed=st.integers(0, 2**31))
def test_packed_integers_come_back(rows: int, columns: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, 2 * columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, columns) and packed.is_contiguous()
    assert unpack_int4(packed).dtype == torch.int8 and torch.equal(unpack_int4(packed), values)


def test_the_first_of_two_packed_integers_is_the_low_half() -> None:
    assert pack_int4(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)).tolist() == [[0xF0, 0x78]]


@pytest.mark.parametrize("quant", [CHANNEL, TENSOR, *GROUPS], ids=lambda quant: quant.strategy)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float, quant: Quant) -> None:
    weight = torch.ones(3, 256)
    weight[1, 200] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight, quant)


@pytest.mark.parametrize("quant", [CHANNEL, *GROUPS], ids=lambda quant: quant.strategy)
def test_a_weight_must_be_a_matrix(quant: Quant) -> None:
    for shape in ((128,), (2, 2, 128)):
        with pytest.raises(ValueError, match="2-D"):
            quantize_weight(torch.ones(shape), quant)


@pytest.mark.parametrize("quant", GROUPS, ids=name_of)
def test_groups_that_do_not_divide_a_row_are_refused(quant: Quant) -> None:
    for columns in (16, 129, 200):
        with pytest.raises(ValueError, match=f"groups of {quant.group_size} do not divide {columns} input channels"):
            quantize_weight(torch.ones(2, columns), quant)


@pytest.mark.parametrize("quant", GROUPS, ids=name_of)
def test_a_scale_that_overflows_is_refused(quant: Quant) -> None:
    """And the largest one that does not is kept."""
    weight = torch.ones(3, 256)
    weight[1, 200] = 65504.0 * (7 if quant.symmetric else 15)
    assert quantize_weight(weight, quant, torch.float16).scale.max() == 65504
    weight[1, 200] *= 1.0001  # nearer to 65504 than to the next number there would be
    with pytest.raises(ValueError, match="the scale of a group overflows float16"):
        quantize_weight(weight, quant, torch.float16)
    assert quantize_weight(weight, quant, torch.bfloat16).scale.max() == 65536


def test_activation_scales() -> None:
    x = torch.tensor([[[1.0, -2.0], [0.0, 0.0]], [[127.0, 3.0], [0.5, 0.25]]])
    per_token, scale = quantize_input(x, ACTIVATIONS["token"])
    assert scale.shape == (2, 2, 1) and scale.flatten().tolist() == pytest.approx([2 / 127, 1, 1, 0.5 / 127])
    assert per_token[0, 1].tolist() == [0, 0]
    _, scale = quantize_input(x, ACTIVATIONS["tensor"])
    assert scale.tolist() == [1.0]
    saturated, _ = quantize_input(torch.tensor([[300.0, -300.0]]), ACTIVATIONS["static"], torch.tensor([1.0]))
    assert saturated.tolist() == [[127, -128]]
    with pytest.raises(ValueError, match="calibrated scale"):
        quantize_input(x, ACTIVATIONS["static"])


def test_schemes_are_frozen_and_reject_unknown_keys() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SCHEMES["w8a8"].name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        Quant(bits=8, strategy="tensor", colour="red")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 4, "strategy": "channel"},
        {"bits": 4, "strategy": "group"},
        {"bits": 4, "strategy": "channel", "group_size": 128},
        {"bits": 4, "strategy": "group", "group_size": 17},
        {"bits": 8, "strategy": "group", "group_size": 128},
        {"bits": 8, "strategy": "channel", "group_size": 128},
        {"bits": 8, "strategy": "channel", "symmetric": False},
        {"bits": 3, "strategy": "group", "group_size": 128},
    ],
    ids=str,
)
def test_numbers_without_a_meaning_cannot_be_declared(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Quant(**wrong)


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_options_of_w4a16(size: int, symmetric: bool) -> None:
    scheme = find_scheme("w4a16", group_size=size, symmetric=symmetric)
    assert scheme.inputs is None and not scheme.static
    assert scheme.weights == Quant(bits=4, strategy="group", group_size=size, symmetric=symmetric)


def test_schemes_by_name_are_their_defaults() -> None:
    for name, scheme in SCHEMES.items():
        assert find_scheme(name) == scheme


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("w4a16", {"activations": "token"}, "--activations does not apply to scheme w4a16"),
        ("w4a16", {"weights": "channel"}, "--weights does not apply to scheme w4a16"),
        ("w8a8", {"group_size": 128}, "--group-size does not apply to scheme w8a8"),
        ("w8a8", {"symmetric": True}, "--symmetric does not apply to scheme w8a8"),
        ("w4a16", {"group_size": 17}, "--group-size 17: choose 128, 64, 32"),
        ("w4a16", {"group_size": 0}, "--group-size 0: choose 128, 64, 32"),
        ("w8a8", {"weights": "group"}, "unknown --weights 'group': choose channel or tensor"),
        ("w8a8", {"activations": "tokens"}, "unknown --activations 'tokens'.*Did you mean 'token'"),
        ("w4a61", {}, "unknown scheme 'w4a61': choose one of w8a8, w4a16.*Did you mean 'w4a16'"),
    ],
)
def test_options_that_a_scheme_does_not_have(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_scheme(name, **options)


def test_lost_channels() -> None:
    """Half a step of 127's scale is 1/254 of the largest; a channel that is always 0 loses nothing."""
    assert lost_channels(torch.tensor([254.0, 0.99, 1.01, 0.0])) == 0.25
    assert lost_channels(torch.zeros(3)) == 0.0
    maxima = torch.rand(1000) ** 8
    x = maxima * torch.tensor([[1.0], [-0.5]])
    integers, _ = quantize_input(x, Quant(bits=8, strategy="tensor", dynamic=True))
    assert lost_channels(maxima) == pytest.approx((integers == 0).all(dim=0).float().mean().item(), abs=0.002)
