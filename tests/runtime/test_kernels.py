"""Every backend against the reference, on shapes that are not nice."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.method import integers
from smoothquant_plus.method.integers import QuantizedWeight, dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme, find_scheme
from smoothquant_plus.runtime.kernels import backends, cpu, reference, select, torch_int4, torch_int8
from smoothquant_plus.runtime.linear import QuantLinear

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 17, 33), (17, 40, 128), (118, 96, 250), (0, 8, 16), (5, 1, 300)]  # M, N, K
SCHEMES = [
    find_scheme("w8a8", activations, weights)
    for activations, weights in itertools.product(("token", "tensor", "static"), ("channel", "tensor"))
]
GROUPED = [find_scheme("w4a16", group_size=size, symmetric=symmetric) for size, symmetric in itertools.product(GROUP_SIZES, (False, True))]
CPU = torch.device("cpu")
ON_CPU = backends(CPU)  # triton: test_triton.py
# The 4-bit product takes few tokens and multiples of 16 channels; its layout has blocks of 16, 32 or 64 channels and smaller last ones.
TOKENS = (0, 1, 3, 4, 5, 17, 118)
CHANNELS = ((1, 128), (17, 384), (16, 128), (40, 256), (96, 384), (112, 128), (208, 256))  # N, K
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SCALES = pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: f"scale-{d}")
# The one-product method is tried only where the processor has been found not to saturate in it.
METHODS = list(dict.fromkeys(["digits", "int_mm", torch_int8.cpu_method()]))


def name_of(scheme: Scheme) -> str:
    if scheme.inputs is None:
        return f"{scheme.weights.group_size}-{'symmetric' if scheme.weights.symmetric else 'asymmetric'}"
    return f"{scheme.inputs.strategy}-{'dynamic' if scheme.inputs.dynamic else 'static'}-{scheme.weights.strategy}"


def layer(
    scheme: Scheme, backend: str, n: int, k: int, with_bias: bool, spread: float = 1.0, scale_dtype: torch.dtype = torch.float32
) -> QuantLinear:
    torch.manual_seed(n * 1000 + k)
    weight = quantize_weight(torch.randn(n, k) * torch.logspace(0, spread, n)[:, None], scheme.weights, scale_dtype)
    static = torch.tensor([0.02]) if scheme.static else None
    return QuantLinear(weight, scheme, input_scale=static, bias=torch.randn(n) if with_bias else None, backend=backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@DTYPES
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


def assert_w4a16_is_the_reference(scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    # float32: another order of summation. Otherwise weights are rounded to x's dtype, or for the 4-bit product zero points times scales to
    # bfloat16; the reference rounds nothing but the result.
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for n, k in CHANNELS:
        right, tried = (layer(scheme, backend, n, k, True, scale_dtype=scale_dtype) for backend in ("reference", "torch"))
        magnitudes = dequantize(kept_by(right)).abs().t()
        for m, bias in itertools.product(TOKENS, (right.bias, None)):
            right.bias = tried.bias = bias
            x = torch.randn(m, k).to(dtype)
            got, expected = tried(x), right(x)
            assert got.dtype == dtype and got.shape == (m, n)
            # Of what was summed, element by element: large channels hide nothing in small ones.
            bound = tolerance * (x.float().abs() @ magnitudes + (0 if bias is None else bias.abs()))
            assert ((got.float() - expected.float()).abs() <= bound).all(), (m, n, k, bias is None)


def kept_by(linear: QuantLinear) -> QuantizedWeight:
    """The weight that the reference keeps packed."""
    packed, scale, *zero_point = linear.prepared
    return QuantizedWeight(integers.unpack_int4(packed), scale, linear.scheme.weights, zero_point[0] if zero_point else None)


@DTYPES
@SCALES
@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_torch_backend_is_the_reference_in_w4a16(scheme: Scheme, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    assert_w4a16_is_the_reference(scheme, scale_dtype, dtype)


@pytest.mark.parametrize("scheme", GROUPED[:2], ids=name_of)
def test_a_layout_that_is_not_recognized_is_not_used(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int4, "block_layout", lambda: None)
    packed, scale, *_ = layer(scheme, "torch", 64, 128, False, scale_dtype=torch.bfloat16).prepared
    kept, _, *_ = layer(scheme, "reference", 64, 128, False, scale_dtype=torch.bfloat16).prepared
    assert scale.ndim == 2 and torch.equal(packed, kept)
    for dtype in (torch.bfloat16, torch.float32):
        assert_w4a16_is_the_reference(scheme, torch.bfloat16, dtype)


@pytest.mark.parametrize("scheme", GROUPED[:2], ids=name_of)
def test_pieces_of_the_weight_are_the_weight(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "PIECE", 1000)  # a few channels at a time, and the last piece is smaller
    for scale_dtype in (torch.bfloat16, torch.float16):
        assert_w4a16_is_the_reference(scheme, scale_dtype, torch.float32)


def test_another_processor() -> None:
    """Without vector instructions PyTorch packs otherwise and has other products."""
    script = (
        "import torch, test_kernels as tests\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
        "for scheme in tests.GROUPED:\n"
        "    tests.assert_w4a16_is_the_reference(scheme, torch.bfloat16, torch.bfloat16)\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def packed_as(values: Tensor, block: int, halves: bool) -> bytes:
    """What PyTorch's `weight_to_int4pack_kernel` does, byte by byte: blocks of 64 channels and halves with AVX-512, of 32 and halves with
    AVX2, of 32 or fewer and neighbours on other processors."""
    unsigned = (values + 8).tolist()
    packed = bytearray()
    for first in range(0, len(unsigned), block):
        rows = unsigned[first : first + block]
        half = len(rows) // 2
        pairs = [(i, i + half) if halves and len(rows) == block else (2 * i, 2 * i + 1) for i in range(half)]
        packed += bytes(rows[a][k] | rows[b][k] << 4 for k in range(values.shape[1]) for a, b in pairs)
    return bytes(packed)


@pytest.mark.parametrize("block", [64, 32, 16])
@pytest.mark.parametrize("halves", [True, False])
def test_the_layout_of_every_processor_is_unpacked(block: int, halves: bool) -> None:
    for n in (16, 32, 48, 64, 112, 208):
        values = torch.randint(-8, 8, (n, 64), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
        packed = torch.frombuffer(bytearray(packed_as(values, block, halves)), dtype=torch.uint8).reshape(n, 32)
        assert torch.equal(torch_int4._unpack_blocks(packed, block, halves), values)


@pytest.mark.parametrize("backend", ON_CPU)
@SCALES
@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_a_token_that_is_one_in_one_channel_reads_the_weight(scheme: Scheme, scale_dtype: torch.dtype, backend: str) -> None:
    weight = kept_by(layer(scheme, "reference", 48, 128, False, scale_dtype=scale_dtype))
    linear = QuantLinear(weight, scheme, backend=backend)
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (4, 16)):
        read = torch.cat([linear(x) for x in torch.eye(128, dtype=dtype).split(tokens)]).float().t()
        exact = dequantize(weight).to(dtype).float()
        if backend == "torch" and tokens == 4 and dtype == scale_dtype == torch.bfloat16 and not scheme.weights.symmetric:
            # The 4-bit product adds the zero point times the scale as a bfloat16 number, up to 8 steps, rounded.
            steps = 8 * weight.scale.float().repeat_interleave(scheme.weights.group_size or 0, dim=1)
            assert ((read - exact).abs() <= torch.finfo(dtype).eps / 2 * (steps + exact.abs())).all()
        else:
            assert torch.equal(read, exact)


@pytest.mark.parametrize("backend", ON_CPU)
@SCALES
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_in_memory_is_nearly_four_times_smaller(symmetric: bool, scale_dtype: torch.dtype, backend: str) -> None:
    layers = [layer(find_scheme("w4a16", symmetric=symmetric), backend, 512, 512, False, scale_dtype=scale_dtype) for _ in range(3)]
    assert not any(list(one.parameters()) for one in layers)

    def memory(one: QuantLinear, following: QuantLinear) -> int:
        """Storages, so that a view into something larger is counted as what it keeps alive; of one that the layer made after this one has a part
        of, too, only what lies between the two."""
        total = 0
        for buffer, next_one in zip(one.buffers(), following.buffers(), strict=True):
            same = buffer.untyped_storage().data_ptr() == next_one.untyped_storage().data_ptr() != 0
            total += next_one.data_ptr() - buffer.data_ptr() if same else buffer.untyped_storage().nbytes()
        return total

    # Of three layers two have parts of the same memory, if any have.
    assert 512 * 512 * 2 / min(memory(*pair) for pair in itertools.pairwise(layers)) > 3.6


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
    for backend in ON_CPU:
        y = QuantLinear(weight, scheme, input_scale=torch.ones(1), backend=backend)(x)
        sums = torch.tensor([127.0, -128.0, 127.0, -128.0])[:, None] * values.double().sum(1).float()
        assert torch.equal(y, sums)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scheme", [find_scheme("w8a8"), *GROUPED], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_views_and_tokens(dtype: torch.dtype, scheme: Scheme, backend: str) -> None:
    linear = layer(scheme, backend, 32, 128, True, scale_dtype=torch.bfloat16)
    x = torch.randn(2, 5, 256).to(dtype)[..., ::2]
    y = linear(x)
    assert y.shape == (2, 5, 32)
    close = {"rtol": 0.0, "atol": (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * y.float().abs().max().item()}
    torch.testing.assert_close(linear(x.contiguous()), y, **close)
    torch.testing.assert_close(linear(x.transpose(0, 1)), y.transpose(0, 1), **close)
    for row, token in itertools.product(range(2), range(5)):
        # Dynamic scales are per token: another token's values do not matter.
        torch.testing.assert_close(linear(x[row, token]), y[row, token], **close)
    assert linear(x[:, :0]).shape == (2, 0, 32)


@pytest.mark.parametrize("backend", ON_CPU)
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


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_w4a16_is_close_to_the_float_product(scheme: Scheme, backend: str) -> None:
    """128 normal weights span about 5 standard deviations: 15 steps of a third, whose rounding is 0.3 / sqrt(12) off."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 256), torch.randn(9, 256)
    quantized = quantize_weight(weight, scheme.weights)
    y = QuantLinear(quantized, scheme, backend=backend)(x)
    assert ((y - x @ weight.t()).norm() / (x @ weight.t()).norm()).item() < 0.13
    torch.testing.assert_close(y, x @ dequantize(quantized).t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "reference"])  # the others in test_cpu.py
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


@pytest.mark.parametrize("backend", ON_CPU)
def test_repacked_weights_compile_whole(backend: str) -> None:
    linear = layer(find_scheme("w8a8"), backend, 16, 32, True)
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="eager")(x), linear(x))


# With bfloat16 scales the weight is packed for the 4-bit product.
@pytest.mark.parametrize(
    ("backend", "scale_dtype"), [("torch", torch.bfloat16), ("torch", torch.float16), ("reference", torch.float16)], ids=str
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_w4a16_ops_pass_opcheck_and_compile_whole(symmetric: bool, scale_dtype: torch.dtype, backend: str) -> None:
    linear = layer(find_scheme("w4a16", symmetric=symmetric), backend, 16, 128, True, scale_dtype=scale_dtype)
    torch.compiler.reset()  # all layers share one forward, and only so many compiled forms of it are kept
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    for x in (torch.randn(3, 128), torch.randn(3, 128).bfloat16(), torch.randn(2, 3, 128).bfloat16()):
        assert torch.equal(compiled(x), linear(x))
    packed, scale, *zero_point = linear.prepared
    op = getattr(torch.ops.smoothquant_plus, f"{backend}_w4a16").default
    torch.library.opcheck(op, (torch.randn(3, 128).bfloat16(), packed, scale, zero_point[0] if zero_point else None, linear.bias))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("scheme", [find_scheme("w8a8"), *GROUPED], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_token_stays_in_that_token(dtype: torch.dtype, scheme: Scheme, backend: str) -> None:
    linear = layer(scheme, backend, 16, 128, False, scale_dtype=torch.bfloat16)
    x = torch.randn(3, 128).to(dtype)
    x[1, 4] = float("nan")
    y = linear(x)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


def test_selection() -> None:
    scheme = find_scheme("w8a8")
    assert select(scheme, CPU, (8, 8))[0] == "cpu"
    assert select(scheme, CPU, (8, 8), "torch")[0] == "torch"
    assert select(scheme, CPU, (8, 8), "reference")[0] == "reference"
    with pytest.raises(InputError, match=r"unknown backend 'torhc'.*Did you mean 'torch'"):
        select(scheme, CPU, (8, 8), "torhc")
    with pytest.raises(InputError, match=r"cannot run a 7x8 layer in w8a8 on cuda: .*multiples of 8"):
        select(scheme, torch.device("cuda"), (7, 8), "torch")
    assert select(scheme, torch.device("cuda"), (7, 8))[0] == "reference"


@pytest.mark.parametrize("scheme", [*SCHEMES, *GROUPED], ids=name_of)
def test_each_file_takes_its_own_scheme(scheme: Scheme) -> None:
    own, other = (torch_int4, torch_int8) if scheme.name == "w4a16" else (torch_int8, torch_int4)
    assert own.supports(scheme, CPU, (16, 128)) is None
    assert "it multiplies" in str(other.supports(scheme, CPU, (16, 128)))
    for name, expected in ((None, ("cpu", cpu)), ("torch", ("torch", own)), ("reference", ("reference", reference))):
        assert select(scheme, CPU, (16, 128), name) == expected


def test_a_scheme_that_no_file_takes() -> None:
    other = find_scheme("w4a16").model_copy(update={"name": "w2a2"})
    with pytest.raises(
        InputError, match=r"no backend can run a 7x128 layer in w2a2 on cpu: cpu: .*; torch_int8: .*; torch_int4: .*; reference: "
    ):
        select(other, CPU, (7, 128))
    with pytest.raises(InputError, match=r"backend 'torch' cannot run a 7x128 layer in w2a2 on cpu: torch_int8: .*; torch_int4: .*"):
        select(other, CPU, (7, 128), "torch")


def test_a_static_layer_needs_its_scale() -> None:
    scheme = find_scheme("w8a8", "static")
    with pytest.raises(ValueError, match="needs the input scale"):
        QuantLinear(quantize_weight(torch.randn(4, 4), scheme.weights), scheme)


def test_a_layer_says_what_does_not_fit_it() -> None:
    scheme = find_scheme("w8a8")
    weight = quantize_weight(torch.randn(16, 126), scheme.weights)
    with pytest.raises(ValueError, match=r"a bias of shape \(15,\) does not fit 16 output channels"):
        QuantLinear(weight, scheme, bias=torch.zeros(15))
    bias = torch.randn(32)[::2]
    for backend in ("cpu", "torch", "reference"):
        layer = QuantLinear(weight, scheme, bias=bias, backend=backend)
        with pytest.raises(ValueError, match="x has 128 channels, and the layer 126"):
            layer(torch.randn(2, 128))
        torch.testing.assert_close(layer(torch.zeros(1, 126))[0], bias)


def test_sums_that_could_overflow_are_left_to_the_reference() -> None:
    shape = (8, torch_int8.LARGEST_K + 1)
    assert select(find_scheme("w8a8"), CPU, shape)[0] == "reference"


def test_scales_in_float64_are_rounded_once() -> None:
    scheme = find_scheme("w4a16", group_size=32)
    weight = quantize_weight(torch.randn(16, 64), scheme.weights, torch.float64)
    x = torch.randn(2, 64)
    ours, right = (QuantLinear(weight, scheme, backend=backend)(x) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
