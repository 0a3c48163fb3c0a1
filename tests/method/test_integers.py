from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothquant_plus.method.integers import dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import ACTIVATIONS, SCHEMES, Quant, find_scheme

CHANNEL = SCHEMES["w8a8"].weights
TENSOR = find_scheme("w8a8", weights="tensor").weights


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(torch.tensor([[1.0, bad]]), CHANNEL)


def test_a_weight_must_be_a_matrix() -> None:
    with pytest.raises(ValueError, match="2-D"):
        quantize_weight(torch.ones(3), CHANNEL)


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
