"""The fused operations between W8A8 layers against the separate ones of torch: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothquant_plus.method.integers import quantize_input, quantize_weight
from smoothquant_plus.method.scheme import SCHEMES
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime import load
from smoothquant_plus.runtime.fuse import FusedMLP
from smoothquant_plus.runtime.linear import QuantizedInput, QuantLinear

pytest.importorskip("triton")
from smoothquant_plus.runtime.kernels.triton import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 3), (3, 200), (7, 96), (5, 257), (2, 512)]
if DEVICE == "cuda":
    SIZES += [(1, 4096), (33, 5120), (1000, 8192), (17, 11008), (5, 16384)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPSILON = 1e-6


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float = EPSILON) -> Tensor:
    """As in Llama: rounded before its weight is applied."""
    floats = x.float()
    return weight * (floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    inputs = SCHEMES["w8a8"].inputs
    assert inputs is not None
    return quantize_input(x, inputs)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """With a channel that is an outlier, and the first row all zeros where there are several."""
    x = torch.randn(*shape, device=DEVICE)
    x[..., shape[-1] // 2] *= 30
    if x.ndim > 1 and len(x) > 1:
        x[0] = 0
    return x.to(dtype)


def assert_the_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """The integers, but for one in 200 that is a step off where a sum or exp rounded the other way; on bfloat16 the interpreter does not
    round, it truncates."""
    truncates = dtype == torch.bfloat16 and DEVICE == "cpu"
    (values, scale), (expected_values, expected_scale) = found, expected
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    channels = expected_values.shape[-1]
    assert values.shape == (*expected_values.shape[:-1], -(-channels // 128) * 128) and scale.shape == expected_scale.shape[:-1]
    assert not values[..., channels:].any()
    values, scale = values[..., :channels], scale[..., None]
    torch.testing.assert_close(scale, expected_scale, rtol=2e-2 if truncates else 1e-6 if dtype == torch.float32 else 1e-2, atol=0)
    off = (values.int() - expected_values.int()).abs()
    assert off.max() <= (3 if truncates else 1)
    assert truncates or (off > 0).float().mean() <= 1 / 200


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("norm", "layer", "biased"), [(rms_norm, False, False), (layer_norm, True, True), (layer_norm, True, False)])
def test_norms(norm: Callable[..., Tensor], layer: bool, biased: bool, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = normal(*size, dtype=dtype), normal(*size, dtype=dtype)
    weight = (torch.rand(size[1], device=DEVICE) + 0.5).to(dtype)
    bias = torch.randn(size[1], device=DEVICE).to(dtype) if biased else None
    found = torch.ops.smoothquant_plus.triton_norm_quantize(x, weight, bias, EPSILON, layer)
    assert_the_same(found, quantized(norm(x, weight, bias)), dtype)
    total, *found = torch.ops.smoothquant_plus.triton_add_norm_quantize(x, residual, weight, bias, EPSILON, layer)
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        assert torch.equal(total, x + residual)
    assert_the_same(tuple(found), quantized(norm(x + residual, weight, bias)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = normal(*size, dtype=dtype), normal(*size, dtype=dtype)
    found = torch.ops.smoothquant_plus.triton_silu_quantize(gate, up)
    assert_the_same(found, quantized(torch.nn.functional.silu(gate) * up), dtype)


def test_batches_views_and_no_rows() -> None:
    torch.manual_seed(0)
    both, weight = torch.randn(2, 3, 192, device=DEVICE), torch.rand(96, device=DEVICE)
    gate, up = both.chunk(2, dim=-1)  # rows that are apart, as a fused layer's halves are
    assert_the_same(fused.silu_quantize(gate, up), quantized(torch.nn.functional.silu(gate) * up), torch.float32)
    assert_the_same(
        fused.silu_quantize(gate[0].t(), up[0].t()), quantized(torch.nn.functional.silu(gate[0].t()) * up[0].t()), torch.float32
    )
    assert_the_same(fused.norm_quantize(up, weight, None, EPSILON, False), quantized(rms_norm(up, weight, None)), torch.float32)
    total, values, scale = fused.add_norm_quantize(gate[:, :0], up[:, :0], weight, None, EPSILON, False)
    assert total.shape == (2, 0, 96) and values.shape == (2, 0, 128) and scale.shape == (2, 0)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible_in_its_own_token(bad: float) -> None:
    x = torch.randn(3, 40, device=DEVICE)
    x[1, 7] = bad
    weight, ones = torch.rand(40, device=DEVICE), torch.ones(3, 40, device=DEVICE)
    for _, scale in (
        fused.norm_quantize(x, weight, None, EPSILON, False),
        fused.norm_quantize(x, weight, None, EPSILON, True),
        fused.silu_quantize(ones, x),
        fused.silu_quantize(x, ones),
    ):
        assert scale.isnan().flatten().tolist() == [False, True, False] and scale.isfinite().sum() == 2


def test_every_step_between_two_integers_rounds_to_even() -> None:
    ratio = torch.arange(-508, 509, device=DEVICE) / 4  # -127..127 in quarters, halves among them
    values, scale = fused.silu_quantize(torch.full((1, len(ratio)), 64.0, device=DEVICE), ratio[None])  # SiLU(64) is 64
    assert scale.item() == 64
    assert torch.equal(values[0, : len(ratio)], ratio.round().to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 48, dtype=dtype, device=DEVICE), torch.rand(48, device=DEVICE).to(dtype)
    ops = torch.ops.smoothquant_plus
    for op, arguments in (
        (ops.triton_norm_quantize, (x, weight, None, EPSILON, False)),
        (ops.triton_norm_quantize, (x, weight, weight, EPSILON, True)),
        (ops.triton_add_norm_quantize, (x, x + 1, weight, None, EPSILON, False)),
        (ops.triton_silu_quantize, (x, x + 1)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_a_product_of_integers_is_the_layer_without_its_quantization() -> None:
    torch.manual_seed(0)
    scheme, x, bias = SCHEMES["w8a8"], torch.randn(2, 3, 200, device=DEVICE), torch.randn(40, device=DEVICE)
    layer = QuantLinear(quantize_weight(torch.randn(40, 200, device=DEVICE), scheme.weights), scheme, bias=bias, backend="triton")
    weight, ones = torch.ones(200, device=DEVICE), torch.ones(2, 3, 200, device=DEVICE)
    values, scale = fused.norm_quantize(x, weight, None, 0.0, False)
    expected = layer(rms_norm(x, weight, None, epsilon=0.0))
    torch.testing.assert_close(layer(QuantizedInput(values, scale, x.dtype)), expected, rtol=1e-5, atol=1e-4)
    assert layer(QuantizedInput(values[:, :0], scale[:, :0], x.dtype)).shape == (2, 0, 40)
    torch.library.opcheck(torch.ops.smoothquant_plus.triton_w8a8_product.default, (values, scale, *layer.prepared, bias, ones.dtype))


def in_torch(y: Tensor) -> tuple[Tensor, Tensor]:
    """What a fused operation gives for y: its integers, filled up with zeros, and its scales."""
    values, scale = quantized(y)
    return torch.nn.functional.pad(values, (0, -y.shape[-1] % 128)), scale[..., 0]


FUSED_IN_TORCH = {
    "triton_norm_quantize": lambda x, weight, bias, eps, layer: in_torch(rms_norm(x, weight, bias, eps)),
    "triton_add_norm_quantize": lambda x, y, weight, bias, eps, layer: (x + y, *in_torch(rms_norm(x + y, weight, bias, eps))),
    "triton_silu_quantize": lambda gate, up: in_torch(torch.nn.functional.silu(gate) * up),
}


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied-biases", "mistral-sliding-window", "qwen2", "qwen3"])
def test_a_fused_model_says_the_same(
    name: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, where torch's operations stand for the fused ones. These may round an integer the other way, on some machines and not on
    others, which is a small part of what rounding does to the model anyway."""
    out = tmp_path / "out"
    quantize(tiny(name), out, calibration=calibration)
    how = {"device": DEVICE, "dtype": torch.float32, "backend": "triton"}
    model = load.load(out, **how)
    assert all(isinstance(block.mlp, FusedMLP) for block in model.model.layers)
    with monkeypatch.context() as patch:
        patch.setattr(load, "fuse", lambda blocks: None)
        separate = load.load(out, **how)
    original = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).to(DEVICE)
    tokens = torch.tensor([[65, 7, 250]], device=DEVICE)
    with torch.no_grad():
        expected = separate(tokens, output_hidden_states=True)
        found = model(tokens, output_hidden_states=True)
        assert len(found.hidden_states) == len(expected.hidden_states)
        assert relative(found.logits, expected.logits) < relative(expected.logits, original(tokens).logits) / 4
        if name == "qwen2":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert relative(compiled(tokens).logits, found.logits) < 1e-3
        for operation, function in FUSED_IN_TORCH.items():
            monkeypatch.setattr(torch.ops.smoothquant_plus, operation, function)
        assert torch.equal(model(tokens).logits, expected.logits)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {"scheme": "w4a16", "group_size": 32}), ("llama", {"activations": "static"}), ("gemma", {})]
)
def test_what_cannot_be_fused_stays(
    name: str, options: dict[str, Any], tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny(name), out, calibration=calibration, smooth="none", **options)
    model = load.load(out, device=DEVICE, backend="triton")
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
