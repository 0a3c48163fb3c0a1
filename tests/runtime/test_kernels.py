"""Every backend against the reference, on shapes that are not nice."""

from __future__ import annotations

import itertools

import pytest
import torch

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.integers import QuantizedWeight, dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import Scheme, find_scheme
from smoothquant_plus.runtime.kernels import BACKENDS, select, torch_int8
from smoothquant_plus.runtime.linear import QuantLinear

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 17, 33), (17, 40, 128), (118, 96, 250), (0, 8, 16), (5, 1, 300)]  # M, N, K
SCHEMES = [
    find_scheme("w8a8", activations, weights)
    for activations, weights in itertools.product(("token", "tensor", "static"), ("channel", "tensor"))
]
CPU = torch.device("cpu")
# The one-product method is tried only where the processor has been found not to saturate in it.
METHODS = list(dict.fromkeys(["digits", "int_mm", torch_int8.cpu_method()]))


def layer(scheme: Scheme, backend: str, n: int, k: int, with_bias: bool, spread: float = 1.0) -> QuantLinear:
    torch.manual_seed(n * 1000 + k)
    weight = quantize_weight(torch.randn(n, k) * torch.logspace(0, spread, n)[:, None], scheme.weights)
    static = None if scheme.inputs.dynamic else torch.tensor([0.02])
    return QuantLinear(weight, scheme, input_scale=static, bias=torch.randn(n) if with_bias else None, backend=backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.inputs.strategy}-{'dynamic' if s.inputs.dynamic else 'static'}-{s.weights.strategy}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_backend_is_the_reference(scheme: Scheme, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int8, "cpu_method", lambda: method)
    for (m, n, k), with_bias in itertools.product(SHAPES, (False, True)):
        x = torch.randn(m, k, dtype=dtype)
        expected = layer(scheme, "reference", n, k, with_bias)(x)
        got = layer(scheme, "torch", n, k, with_bias)(x)
        assert got.dtype == dtype and got.shape == (m, n)
        # Integers are exact in both; scales are applied in another order.
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * (expected.abs().max().item() if m else 1.0))


@pytest.mark.parametrize("method", METHODS)
def test_extreme_integers_are_summed_exactly(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 16-bit intermediates would saturate."""
    monkeypatch.setattr(torch_int8, "cpu_method", lambda: method)
    scheme = find_scheme("w8a8", "static")
    k = 11008
    values = torch.full((4, k), 127, dtype=torch.int8)
    values[1] = -127
    values[2, ::2] = -127
    weight = QuantizedWeight(values, torch.ones(4, 1), scheme.weights)
    x = torch.stack([torch.full((k,), v) for v in (127.0, -128.0, 1e9, -1e9)])
    for backend in BACKENDS:
        y = QuantLinear(weight, scheme, input_scale=torch.ones(1), backend=backend)(x)
        sums = torch.tensor([127.0, -128.0, 127.0, -128.0])[:, None] * values.double().sum(1).float()
        assert torch.equal(y, sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_views_and_tokens(backend: str) -> None:
    scheme = find_scheme("w8a8")
    linear = layer(scheme, backend, 24, 32, True)
    x = torch.randn(2, 5, 64)[..., ::2]
    y = linear(x)
    assert y.shape == (2, 5, 24)
    for row, token in itertools.product(range(2), range(5)):
        # Dynamic scales are per token: another token's values do not matter.
        torch.testing.assert_close(linear(x[row, token]), y[row, token], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_it_is_close_to_the_float_product(backend: str, activations: str) -> None:
    scheme = find_scheme("w8a8", activations)
    torch.manual_seed(0)
    weight, x = torch.randn(40, 256), torch.randn(9, 256)
    quantized = quantize_weight(weight, scheme.weights)
    scale = None if scheme.inputs.dynamic else x.abs().max().reshape(1) / 127
    y = QuantLinear(quantized, scheme, input_scale=scale, backend=backend)(x)
    assert ((y - x @ weight.t()).norm() / (x @ weight.t()).norm()).item() < 0.02
    integers, s = quantize_input(x, scheme.inputs, scale)
    torch.testing.assert_close(y, (integers.float() * s) @ dequantize(quantized).t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_pass_opcheck_and_compile_whole(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # opcheck takes plain tensors, and a weight that oneDNN has repacked is none.
    monkeypatch.setattr(torch_int8, "cpu_method", lambda: "int_mm")
    scheme = find_scheme("w8a8")
    linear = layer(scheme, backend, 16, 32, True)
    x = torch.randn(3, 32)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), linear(x))
    op = getattr(torch.ops.smoothquant_plus, f"{backend}_w8a8").default
    weight, scale = linear.prepared
    torch.library.opcheck(op, (x, weight, scale, True, None, linear.bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repacked_weights_compile_whole(backend: str) -> None:
    linear = layer(find_scheme("w8a8"), backend, 16, 32, True)
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="eager")(x), linear(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_token_stays_in_that_token(backend: str) -> None:
    linear = layer(find_scheme("w8a8"), backend, 8, 16, False)
    x = torch.randn(3, 16)
    x[1, 4] = float("nan")
    y = linear(x)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


def test_selection() -> None:
    scheme = find_scheme("w8a8")
    assert select(scheme, CPU, (8, 8))[0] == "torch"
    assert select(scheme, CPU, (8, 8), "reference")[0] == "reference"
    with pytest.raises(InputError, match=r"unknown backend 'torhc'.*Did you mean 'torch'"):
        select(scheme, CPU, (8, 8), "torhc")
    with pytest.raises(InputError, match=r"cannot run a 7x8 layer in w8a8 on cuda: .*multiples of 8"):
        select(scheme, torch.device("cuda"), (7, 8), "torch")
    assert select(scheme, torch.device("cuda"), (7, 8))[0] == "reference"


def test_a_static_layer_needs_its_scale() -> None:
    scheme = find_scheme("w8a8", "static")
    with pytest.raises(ValueError, match="needs the input scale"):
        QuantLinear(quantize_weight(torch.randn(4, 4), scheme.weights), scheme)
