"""What only a GPU shows: real shapes against a float64 product, and CUDA graphs. make test-gpu runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoothquant_plus.method.integers import dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import Scheme, find_scheme
from smoothquant_plus.runtime.linear import QuantLinear

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (1000, 5120)]  # N, K
TOKENS = [1, 3, 8, 16, 17, 64, 100, 256, 1024, 2500]
SCHEMES = [find_scheme("w8a8"), find_scheme("w4a16"), find_scheme("w4a16", group_size=32, symmetric=True)]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_of(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[QuantLinear, Tensor]:
    """A layer of random weights, and the weight that its integers stand for, float64."""
    torch.manual_seed(n + k)
    weight = quantize_weight(torch.randn(n, k, device="cuda"), scheme.weights, torch.float32 if scheme.inputs else dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    return QuantLinear(weight, scheme, bias=bias, backend="triton"), dequantize(weight).double()


@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=["w8a8", "w4a16", "w4a16 group 32 symmetric"])
def test_real_shapes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, weight = layer_of(scheme, *shape, dtype)
    for m in TOKENS:
        x = torch.randn(m, shape[1], device="cuda").to(dtype)
        integers = None if scheme.inputs is None else quantize_input(x, scheme.inputs)
        exact = x.double() if integers is None else integers[0].double() * integers[1].double()
        expected = exact @ weight.t() + layer.bias.double()
        # Of what was summed, element by element: large channels hide nothing in small ones.
        magnitude = exact.abs() @ weight.abs().t() + layer.bias.double().abs()
        y = layer(x)
        rounded = torch.finfo(dtype).eps * (expected.abs() if scheme.inputs else magnitude)
        assert ((y.double() - expected).abs() <= rounded + 1e-6 * magnitude).all(), m
        assert torch.equal(layer(x), y), f"not the same twice at {m} tokens"


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=["w8a8", "w4a16"])
def test_cuda_graphs(scheme: Scheme) -> None:
    layer, _ = layer_of(scheme, 4096, 4096, torch.bfloat16)
    for m in (1, 16, 64, 300, 1024):
        x = torch.randn(m, 4096, device="cuda").bfloat16()
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=["w8a8", "w4a16"])
def test_inductor(scheme: Scheme) -> None:
    layer, _ = layer_of(scheme, 1024, 2048, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for m in (1, 1, 33, 33):
        x = torch.randn(m, 2048, device="cuda").bfloat16()
        assert torch.equal(compiled(x).clone(), layer(x))


def test_models_as_cuda_graphs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`sqplus bench model --device cuda` runs a model that is not quantized beside ours, all as graphs."""
    pytest.importorskip("compressed_tensors")
    from smoothquant_plus.evaluation.benchmark_model import bench_model
    from smoothquant_plus.pipeline import quantize

    model, outputs = tiny("llama"), [tmp_path / "w8a8", tmp_path / "w4a16"]
    quantize(model, outputs[0], smooth="none")
    quantize(model, outputs[1], scheme="w4a16", group_size=32, smooth="none")
    found = bench_model([model, *outputs], prompt_tokens=16, new_tokens=4, batch=2, device="cuda")
    assert found.cuda_graphs and [row.backend for row in found.rows] == ["", "triton", "triton"]
