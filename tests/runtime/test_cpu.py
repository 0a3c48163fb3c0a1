"""Our own CPU kernels, at every instruction set that this machine has. `make sanitize` and `make emulate` run this on other builds of them."""

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
from smoothquant_plus.method.integers import QuantizedWeight, dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme, find_scheme, with_arithmetic
from smoothquant_plus.runtime.kernels import cpu, select
from smoothquant_plus.runtime.linear import QuantLinear

CPU = torch.device("cpu")
assert cpu.missing() is None, f"the tests need the CPU kernels: {cpu.missing()}"
pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.smoothquant_plus
HIGHEST = OPS.cpu_level(len(cpu.LEVELS) - 1)

# A tile has up to 2, 4 or 6 rows, a panel 64 channels; chunks of input channels depend on the rows.
SHAPES = [(1, 1, 1), (2, 64, 64), (3, 17, 33), (6, 129, 4), (17, 40, 128), (118, 96, 250), (0, 8, 16), (5, 1, 300), (13, 65, 0)]  # M, N, K
GROUPED_SHAPES = [
    (1, 1, 128),
    (2, 64, 128),
    (3, 17, 384),
    (4, 66, 128),
    (5, 208, 256),
    (6, 1, 256),
    (15, 63, 128),
    (17, 40, 256),
    (118, 96, 384),
]
INT8 = [find_scheme("w8a8", activations) for activations in ("token", "tensor", "static")]
GROUPED = [find_scheme("w4a16", group_size=size, symmetric=symmetric) for size, symmetric in itertools.product(GROUP_SIZES, (False, True))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int8_layer(scheme: Scheme, n: int, k: int, backend: str = "cpu") -> QuantLinear:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    weight = QuantizedWeight(values, torch.rand(n, 1, generator=generator) + 0.1, scheme.weights)
    static = torch.tensor([0.02]) if scheme.static else None
    return QuantLinear(weight, scheme, input_scale=static, bias=torch.randn(n, generator=generator), backend=backend)


def grouped_weight(scheme: Scheme, n: int, k: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return quantize_weight(torch.randn(n, k, generator=generator), scheme.weights, scale_dtype)


def magnitude(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What is summed, without signs: rounding is bounded by it, element by element."""
    return x.float().abs() @ weight.abs().t() + bias.abs()


@pytest.mark.parametrize("scheme", INT8, ids=("token", "tensor", "static"))
def test_w8a8_is_the_reference(scheme: Scheme, level: str) -> None:
    for (m, n, k), dtype in itertools.product(SHAPES, DTYPES):
        ours, right = (int8_layer(scheme, n, k, backend) for backend in ("cpu", "reference"))
        x = torch.randn(m, k).to(dtype)
        if k == 0 and not scheme.static:
            continue  # nothing to take a scale from
        for bias in (ours.bias, ours.bias.to(dtype), None):
            ours.bias = right.bias = bias
            got, expected = ours(x), right(x)
            assert got.dtype == dtype and got.shape == (m, n)
            # The integers are exact in both; scales and bias are applied in float32, in another order.
            tolerance = (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * (expected.float().abs().max().item() if m else 1)
            torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=tolerance)


@pytest.mark.parametrize("scheme", GROUPED, ids=lambda s: f"{s.weights.group_size}-{'symmetric' if s.weights.symmetric else 'asymmetric'}")
def test_w4_is_the_reference(scheme: Scheme, level: str) -> None:
    integers = with_arithmetic(scheme, "w4a8")
    for (m, n, k), scale_dtype in itertools.product(GROUPED_SHAPES, DTYPES):
        weight = grouped_weight(scheme, n, k, scale_dtype)
        meant, bias = dequantize(weight), torch.randn(n)
        exact, rounded = (QuantLinear(weight, how, bias=bias, backend="cpu") for how in (scheme, integers))
        right = QuantLinear(weight, integers, bias=bias, backend="reference")
        for dtype in DTYPES:
            x = torch.randn(m, k).to(dtype)
            tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            bound = tolerance * magnitude(x, meant, bias)
            got = exact(x)
            assert got.dtype == dtype and got.shape == (m, n)
            assert ((got.float() - (x.float() @ meant.t() + bias)).abs() <= bound).all(), (m, n, k, scale_dtype, dtype)
            assert ((rounded(x).float() - right(x).float()).abs() <= 2 * bound).all(), (m, n, k, scale_dtype, dtype)


def activations(kind: str, m: int, k: int) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
    if kind == "an outlier":
        x[:, 5] *= 1000
    elif kind == "heavy tails":
        x **= 5
    elif kind == "channels of all sizes":
        x *= 2.0 ** (torch.arange(k) * 7 % 41 - 20)
    return x * {"tiny": 2.0**-100, "huge": 2.0**100}.get(kind, 1.0)


@pytest.mark.parametrize("scheme", GROUPED[:2] + GROUPED[-2:], ids=lambda s: f"{s.weights.group_size}-{s.weights.symmetric}")
@pytest.mark.parametrize("kind", ["normal", "an outlier", "heavy tails", "channels of all sizes", "tiny", "huge"])
def test_w4a16_is_as_accurate_as_float32_sums(kind: str, scheme: Scheme, level: str) -> None:
    """Also where it multiplies in fixed point: against float64, beside the portable level, which multiplies and sums in float32."""
    m, n, k = 9, 130, 1024
    weight = grouped_weight(scheme, n, k, torch.float32)
    groups = weight.values.double().reshape(*weight.scale.shape, -1)
    zero = 0 if weight.zero_point is None else weight.zero_point[..., None]
    meant = ((groups - zero) * weight.scale[..., None]).reshape(n, k)
    layer, x = QuantLinear(weight, scheme, backend="cpu"), activations(kind, m, k)

    def errors() -> Tensor:
        return (layer(x).double() - x.double() @ meant.t()) / (x.double().abs() @ meant.abs().t())

    ours = errors()
    assert ours.abs().max() < 5e-5
    OPS.cpu_level(0)
    assert ours.norm() <= 1.25 * errors().norm()


@pytest.mark.parametrize("scheme", GROUPED, ids=lambda s: f"{s.weights.group_size}-{s.weights.symmetric}")
def test_a_few_tokens_in_tiles_are_in_fixed_point(scheme: Scheme) -> None:
    """To the bit what vectors give for them, whatever the dtype."""
    if cpu.LEVELS.index("amx") > HIGHEST:
        pytest.skip("no AMX here")
    layer = QuantLinear(grouped_weight(scheme, 130, 384, torch.bfloat16), scheme, backend="cpu")
    try:
        for m, dtype in itertools.product((1, 2, 3, 4, 5), DTYPES):
            x = (torch.randn(m, 384) ** 5).to(dtype)
            tiles = layer(x)
            OPS.cpu_level(cpu.LEVELS.index("avx512"))
            assert torch.equal(tiles, layer(x))
            OPS.cpu_level(HIGHEST)
    finally:
        OPS.cpu_level(HIGHEST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", GROUPED, ids=lambda s: f"{s.weights.group_size}-{s.weights.symmetric}")
def test_w4a16_takes_small_activations_beside_large_ones(scheme: Scheme, dtype: torch.dtype, level: str) -> None:
    """To the bit as in float32, which all are multiplied in where half precision leaves out zeros. Each group's first channel is 2^14 and its weight
    zero, so that the rest is what the lowest bits say."""
    as_they_are = (
        level in ("avx512_bf16", "amx") and dtype == torch.bfloat16
    )  # bfloat16 numbers are multiplied, of more than a few tokens with AMX
    few = 5 if level == "amx" else 0
    k, size = 384, scheme.weights.group_size
    assert size is not None
    weight = grouped_weight(scheme, 70, k, torch.float32)
    groups = weight.values.reshape(70, -1, size)
    groups[1, :, 1:] = 7
    groups[:, :, 0] = 0 if weight.zero_point is None else weight.zero_point
    layer = QuantLinear(weight, scheme, backend="cpu")
    for m in (1, 2, 3, 4, 5, 6, 7, 20):
        if as_they_are and m > few:
            continue
        x = torch.randn(m, k // size, size)
        x[0] = 0.5  # their low pieces are all -128
        x[:, :, 0] = 2.0**14
        x = x.reshape(m, k).to(dtype)
        assert torch.equal(layer(x), layer(x.float()).to(dtype))
        error = layer(x.float()) - x.double() @ dequantize(weight).double().t()
        assert (error.abs() <= 2.0**-8 * dequantize(weight).abs().sum(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [INT8[0], INT8[2], GROUPED[0], with_arithmetic(GROUPED[0], "w4a8")], ids=lambda s: s.name)
def test_a_row_depends_neither_on_other_rows_nor_on_threads(scheme: Scheme, dtype: torch.dtype, level: str) -> None:
    before = torch.get_num_threads()
    try:
        for m, n in ((7, 70), (97, 200)):  # 17 blocks and more, which threads share
            layer = int8_layer(scheme, n, 256) if scheme.weights.bits == 8 else QuantLinear(grouped_weight(scheme, n, 256, dtype), scheme)
            x = torch.randn(m, 256).to(dtype)
            torch.set_num_threads(1)
            y = layer(x)
            if level == "amx" and dtype == torch.bfloat16 and scheme.name == "w4a16":  # a few tokens are multiplied in fixed point
                assert torch.equal(torch.cat([layer(row[None]) for row in x[:5]]), layer(x[:5]))
                assert torch.equal(torch.cat([layer(x[:6]), layer(x[1:])[5:]]), y)
            else:
                assert torch.equal(torch.cat([layer(row[None]) for row in x]), y)
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(layer(x), y), threads
    finally:
        torch.set_num_threads(before)


def test_extreme_integers_are_summed_exactly(level: str) -> None:
    k = 11008
    values = torch.full((4, k), 127, dtype=torch.int8)
    values[1] = -127
    values[2, ::2] = -127
    layer = QuantLinear(QuantizedWeight(values, torch.ones(4, 1), INT8[2].weights), INT8[2], input_scale=torch.ones(1), backend="cpu")
    x = torch.stack([torch.full((k,), v) for v in (127.0, -128.0, 1e9, -1e9, float("inf"), float("-inf"))])
    sums = torch.tensor([127.0, -128.0, 127.0, -128.0, 127.0, -128.0])[:, None] * values.double().sum(1).float()
    assert torch.equal(layer(x), sums)


PAIRS = [(64, 64), (65, 64), (127, 2), (127, 1), (-64, -64), (-65, -64), (-127, -2), (127, -127), (127, 127), (-128, -128)]


@pytest.mark.parametrize("spread", [5, 40, 200])
def test_activations_that_would_saturate_sixteen_bits(spread: int, level: str) -> None:
    """None of them, few, and nearly all: what is cut in two to avoid it is summed exactly too."""
    generator = torch.Generator().manual_seed(spread)
    for m, n, k in ((1, 64, 256), (3, 70, 520), (10, 65, 33), (49, 64, 1026), (118, 130, 260)):
        values = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        values[0], values[1], values[2, ::2] = 127, -127, -127
        x = (torch.randn(m, k, generator=generator) * spread).round().clamp(-128, 127)
        for row, pair in zip(x, PAIRS * 20, strict=False):
            row[4:6], row[-3:-1] = torch.tensor(pair), torch.tensor(pair)
        layer = QuantLinear(QuantizedWeight(values, torch.ones(n, 1), INT8[2].weights), INT8[2], input_scale=torch.ones(1), backend="cpu")
        assert torch.equal(layer(x), (x.long() @ values.long().t()).float())


def test_rounding_is_the_references(level: str) -> None:
    """Ties go to the even integer, as torch.round has it."""
    identity = torch.eye(64, dtype=torch.int8)
    layer = QuantLinear(QuantizedWeight(identity, torch.ones(64, 1), INT8[2].weights), INT8[2], input_scale=torch.ones(1), backend="cpu")
    x = torch.linspace(-140, 140, 64 * 35).reshape(35, 64)
    x[:, ::2] = (x[:, ::2] * 2).round() / 2
    assert torch.equal(layer(x), quantize_input(x, INT8[2].inputs, torch.ones(1))[0].float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", [INT8[0], GROUPED[0], GROUPED[5], with_arithmetic(GROUPED[0], "w4a8")], ids=lambda s: s.name)
def test_what_is_not_finite_stays_in_its_token(scheme: Scheme, bad: float, level: str) -> None:
    layer = int8_layer(scheme, 70, 128) if scheme.weights.bits == 8 else QuantLinear(grouped_weight(scheme, 70, 128, torch.float16), scheme)
    for m, dtype in itertools.product((3, 20), DTYPES):
        x = torch.randn(m, 128).to(dtype)
        clean = layer(x)
        x[1, 5] = bad
        y = layer(x)
        assert y[1].isnan().all() if scheme.inputs is not None else not torch.isfinite(y[1]).any()
        others = [row for row in range(m) if row != 1]
        assert torch.equal(y[others], clean[others])


def test_nan_is_visible_with_static_scales(level: str) -> None:
    x = torch.randn(3, 64)
    x[2, 7] = float("nan")
    y = int8_layer(INT8[2], 20, 64)(x)
    assert y[2].isnan().all() and torch.isfinite(y[:2]).all()


@pytest.mark.parametrize("power", [-90, -30, 30, 100])
def test_extreme_scales(power: int, level: str) -> None:
    x = torch.randn(5, 128) * 2.0**power
    for scheme in (INT8[0], INT8[1]):
        ours, right = (int8_layer(scheme, 33, 128, backend) for backend in ("cpu", "reference"))
        torch.testing.assert_close(ours(x), right(x), rtol=1e-5, atol=1e-5 * right(x).abs().max().item())
    weight = grouped_weight(GROUPED[0], 33, 128, torch.float32)
    ours, right = (QuantLinear(weight, GROUPED[0], backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours(x), right(x), rtol=1e-5, atol=1e-5 * right(x).abs().max().item())


def test_half_precision_is_rounded_as_torch_does(level: str) -> None:
    """Every finite float16 number comes back through a product with one, and float32 sums between them round to even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    weight = QuantizedWeight(
        torch.ones(1, 32, dtype=torch.int8), torch.ones(1, 1), GROUPED[5].weights.model_copy(update={"group_size": 32})
    )
    scheme = find_scheme("w4a16", group_size=32, symmetric=True)
    layer = QuantLinear(weight, scheme, backend="cpu")
    x = torch.zeros(len(numbers), 32, dtype=torch.float16)
    x[:, 3] = numbers
    assert torch.equal(layer(x)[:, 0].view(torch.int16) & 0x7FFF, numbers.view(torch.int16) & 0x7FFF)
    x[:, 5] = numbers.roll(1)
    expected = (x[:, 3].float() + x[:, 5].float()).to(torch.float16)
    assert torch.equal(layer(x)[:, 0], expected)


def test_views_batches_and_double(level: str) -> None:
    for layer in (int8_layer(INT8[0], 70, 128), QuantLinear(grouped_weight(GROUPED[0], 70, 128, torch.bfloat16), GROUPED[0])):
        x = torch.randn(2, 5, 256)[..., ::2]
        y = layer(x)
        assert y.shape == (2, 5, 70) and torch.equal(layer(x.contiguous()), y)
        assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
        assert torch.equal(layer(x[0, 0]), y[0, 0]) and layer(x[:, :0]).shape == (2, 0, 70)
        assert layer(x.double()).dtype == torch.float64 and torch.equal(layer(x.double()), y.double())


@pytest.mark.parametrize("name", ["cpu_w8a8", "cpu_w4a16", "cpu_w4a8"])
def test_ops_pass_opcheck(name: str) -> None:
    x = torch.randn(3, 128)
    if name == "cpu_w8a8":
        weight, scale = int8_layer(INT8[0], 20, 128).prepared
        arguments = (x, weight, scale, True, None, torch.randn(20))
    else:
        rows, packed, scale, zero_point = QuantLinear(grouped_weight(GROUPED[0], 20, 128, torch.bfloat16), GROUPED[0]).prepared
        arguments = (x, packed, scale, zero_point, torch.randn(20), len(rows))
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("scheme", [INT8[0], INT8[2], GROUPED[0], GROUPED[1], with_arithmetic(GROUPED[0], "w4a8")], ids=lambda s: s.name)
def test_layers_compile_whole(scheme: Scheme) -> None:
    layer = (
        int8_layer(scheme, 20, 128) if scheme.weights.bits == 8 else QuantLinear(grouped_weight(scheme, 20, 128, torch.bfloat16), scheme)
    )
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for x in (torch.randn(3, 128), torch.randn(2, 3, 128).bfloat16()):
        assert torch.equal(compiled(x), layer(x))


def test_ops_refuse_what_does_not_fit() -> None:
    weight, scale = int8_layer(INT8[0], 20, 128).prepared
    x = torch.randn(3, 128)
    for arguments in (
        (torch.randn(3, 132), weight, scale, True, None, None),
        (x, weight, scale[:1].expand(100).contiguous(), True, None, None),
        (x, weight, scale.double(), True, None, None),
        (x, weight, scale, True, None, torch.randn(19)),
        (x.int(), weight, scale, True, None, None),
        (torch.tensor(1.0), weight, scale, True, None, None),
        (x, weight.view(torch.int8), scale, True, None, None),
        (x, weight, scale[:1].expand(20), True, None, None),
        (x, weight, scale, True, torch.empty(0), None),
        (x, weight, scale, True, torch.ones(2), None),
    ):
        with pytest.raises(RuntimeError):
            OPS.cpu_w8a8(*arguments)
    _, packed, scale, zero_point = QuantLinear(grouped_weight(GROUPED[0], 20, 128, torch.bfloat16), GROUPED[0]).prepared
    for arguments in (
        (torch.randn(3, 256), packed, scale, zero_point, None, 20),
        (x, packed, scale[:0], zero_point, None, 20),
        (x, packed[:-1], scale, zero_point, None, 20),
        (x, packed, scale, zero_point[:, :, :3], None, 20),
        (x, packed, scale, zero_point, torch.randn(19), 20),
        (x, packed, scale, zero_point, None, 100),
        (x, packed, scale[:, :, :1], None, None, 20),
        (torch.randn(3, 0), packed[:0], scale, zero_point, None, 20),
    ):
        with pytest.raises(RuntimeError):
            OPS.cpu_w4a16(*arguments)
    with pytest.raises(RuntimeError, match="int8 matrix"):
        OPS.cpu_pack_w4(torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="contiguous"):
        OPS.cpu_read(torch.zeros(1).expand(1 << 30))


@pytest.mark.usefixtures("level")
class TestBfloat16:
    """Weights that stay in bfloat16, at every level."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_products(self, shape: tuple[int, int, int]) -> None:
        m, n, k = shape
        for bias in (None, torch.randn(n), torch.randn(n).half()):
            x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
            y = cpu.linear_bfloat16(x, cpu.prepare_bfloat16(weight), bias, n)
            right = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
            rounding = 2.0**-8 * right.abs() + 2.0**-22 * (x.double().abs() @ weight.double().abs().t())
            assert y.dtype == torch.bfloat16 and y.shape == (m, n) and ((y.double() - right).abs() <= rounding).all()

    def test_each_weight_is_read_as_it_is(self) -> None:
        weight = torch.cat([torch.randn(70, 95) * 2.0**exponent for exponent in (-100, 0, 100)], dim=1).bfloat16()
        packed = cpu.prepare_bfloat16(weight)
        for rows in (1, 4, 100):
            read = torch.cat([cpu.linear_bfloat16(x, packed, None, 70) for x in torch.eye(285).bfloat16().split(rows)])
            assert torch.equal(read, weight.t())

    def test_rows_threads_strides_and_numbers_that_are_none(self) -> None:
        before = torch.get_num_threads()
        packed = cpu.prepare_bfloat16(torch.randn(200, 1100).bfloat16())
        x = torch.randn(97, 2200).bfloat16()[:, ::2]
        y = cpu.linear_bfloat16(x, packed, None, 200)
        assert torch.equal(torch.cat([cpu.linear_bfloat16(row, packed, None, 200)[None] for row in x]), y)
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(cpu.linear_bfloat16(x.reshape(1, 97, 1100), packed, None, 200)[0], y)
        finally:
            torch.set_num_threads(before)
        x = x.clone()
        x[3, 5] = float("nan")
        bad = cpu.linear_bfloat16(x, packed, None, 200)
        assert bad[3].isnan().all() and torch.equal(bad[4:], y[4:]) and torch.equal(bad[:3], y[:3])

    def test_op(self) -> None:
        packed = cpu.prepare_bfloat16(torch.randn(20, 129).bfloat16())
        torch.library.opcheck(OPS.cpu_bfloat16.default, (torch.randn(2, 3, 129).bfloat16(), packed, torch.randn(20), 20))
        for x, channels in ((torch.randn(3, 129), 20), (torch.randn(3, 120).bfloat16(), 20), (torch.randn(3, 129).bfloat16(), 100)):
            with pytest.raises(RuntimeError):
                OPS.cpu_bfloat16(x, packed, None, channels)
        with pytest.raises(RuntimeError, match="bfloat16 matrix"):
            OPS.cpu_pack_bfloat16(torch.zeros(4, 4))


def test_where_bfloat16_weights_are_multiplied_here(level: str) -> None:
    assert cpu.multiplies_bfloat16() == (level == "amx" or (level != "portable" and not torch.cpu._is_amx_tile_supported()))


def test_measures_of_the_machine(level: str) -> None:
    assert isinstance(OPS.cpu_read(torch.zeros(3 << 20, dtype=torch.uint8)), int)
    assert OPS.cpu_peak("int8", 10) > 0 and OPS.cpu_peak("float32", 10) > 0
    assert (OPS.cpu_peak("bfloat16", 10) > 0) == (level in ("avx512_bf16", "amx"))


def test_what_they_support() -> None:
    assert select(INT8[0], CPU, (7, 9)) == ("cpu", cpu) and select(GROUPED[0], CPU, (7, 128)) == ("cpu", cpu)
    assert "run on the CPU" in str(cpu.supports(INT8[0], torch.device("cuda"), (8, 8)))
    assert "exact for at most" in str(cpu.supports(INT8[0], CPU, (8, 200_000)))
    assert cpu.supports(GROUPED[0], CPU, (8, 200_064)) is None
    assert "4-bit weights" in str(cpu.supports(INT8[0].model_copy(update={"name": "w2a2"}), CPU, (8, 8)))
    with pytest.raises(InputError, match="unknown arithmetic 'w4a4'"):
        with_arithmetic(GROUPED[0], "w4a4")
    with pytest.raises(InputError, match="for w4a16 checkpoints, and this one is w8a8"):
        with_arithmetic(INT8[0], "w4a8")


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SQPLUS_")} | variables
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif("SQPLUS_LIBRARY" in os.environ, reason="another build is tested")
def test_the_environment_chooses_the_level_or_says_what_is_wrong(tmp_path: Path) -> None:
    select_one = (
        "import torch\n"
        "from smoothquant_plus.method.scheme import find_scheme\n"
        "from smoothquant_plus.runtime.kernels import cpu, select\n"
        "for _ in range(2): print(select(find_scheme('w8a8'), torch.device('cpu'), (8, 8))[0])\n"
    )
    done = run(select_one + "print(cpu.level())", SQPLUS_CPU="portable")
    assert done.stdout.split() == ["cpu", "cpu", "portable"], done.stderr
    done = run(select_one, SQPLUS_CPU="avx")
    assert "SQPLUS_CPU=avx: choose one of portable, avx2, avx512, avx512_bf16, amx. Did you mean 'avx2'?" in done.stderr
    if len(cpu.LEVELS) > HIGHEST + 1:
        done = run(select_one, SQPLUS_CPU=cpu.LEVELS[-1])
        assert f"SQPLUS_CPU={cpu.LEVELS[-1]}: this processor has {cpu.LEVELS[HIGHEST]} at most." in done.stderr
    # Without the library the slower backend is used, which is said once.
    broken = tmp_path / "_cpu.so"
    broken.write_text("not a library")
    done = run(select_one, SQPLUS_LIBRARY=str(broken))
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("slower ones of PyTorch are") == 1 and "cannot be loaded" in done.stderr
