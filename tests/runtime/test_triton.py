"""The Triton kernels against the reference: in Triton's interpreter (see conftest.py), or on a GPU where there is one. What only a GPU shows is in
test_triton_gpu.py."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation import tune
from smoothquant_plus.method.integers import QuantizedWeight, dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import GROUP_SIZES, Scheme, find_scheme
from smoothquant_plus.runtime.kernels import select, triton
from smoothquant_plus.runtime.kernels.triton import configurations, w4a16, w8a8
from smoothquant_plus.runtime.kernels.triton.configurations import ANYWHERE, SHIPPED, Configuration, choose, parts
from smoothquant_plus.runtime.kernels.triton.shipped import shipped
from smoothquant_plus.runtime.linear import QuantLinear

# numpy, in the interpreter, remarks on what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
OPS = torch.ops.smoothquant_plus
INT8 = [find_scheme("w8a8", activations) for activations in ("token", "tensor", "static")]
GROUPED = [find_scheme("w4a16", group_size=size, symmetric=symmetric) for size, symmetric in itertools.product(GROUP_SIZES, (False, True))]
HALVES = (torch.bfloat16, torch.float16)
# M, N, K: each kind of kernel of the tables, with and without a split sum; no number of channels is a multiple of a tile, and K need not be one
# of a block.
SHAPES = [(1, 17, 384), (3, 70, 128), (16, 5, 256), (17, 130, 192), (40, 33, 320), (70, 20, 128), (300, 24, 192)]


def name_of(scheme: Scheme) -> str:
    if scheme.inputs is None:
        return f"{scheme.weights.group_size}-{'symmetric' if scheme.weights.symmetric else 'asymmetric'}"
    return f"{scheme.inputs.strategy}-{'dynamic' if scheme.inputs.dynamic else 'static'}"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS, in the reference, would have to be told before
    yield
    torch.use_deterministic_algorithms(before)


def grouped_weight(scheme: Scheme, n: int, k: int, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return quantize_weight(torch.randn(n, k, generator=generator), scheme.weights, scale_dtype).to(DEVICE)


def int8_layer(scheme: Scheme, n: int, k: int, backend: str = "triton") -> QuantLinear:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    weight = QuantizedWeight(values, torch.rand(n, 1, generator=generator) + 0.1, scheme.weights).to(DEVICE)
    static = torch.tensor([0.02], device=DEVICE) if scheme.static else None
    return QuantLinear(weight, scheme, input_scale=static, bias=torch.randn(n, generator=generator).to(DEVICE), backend=backend)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def assert_is_the_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float) -> None:
    """y = x @ weight.T + bias, up to `tolerance` of what was summed, element by element: large channels hide nothing in small ones."""
    expected, magnitude = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + bias.abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= tolerance * magnitude).all(), (x.shape, weight.shape, x.dtype)


def assert_same(y: Tensor, expected: Tensor) -> None:
    """Equal; but the interpreter cuts bfloat16 off where it should round."""
    if GPU or y.dtype != torch.bfloat16:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=torch.finfo(y.dtype).eps, atol=0)


@pytest.mark.parametrize("scheme", GROUPED, ids=name_of)
def test_w4a16_is_the_reference(scheme: Scheme) -> None:
    size = scheme.weights.group_size or 0
    shapes = [(m, n, -(-k // size) * size) for m, n, k in SHAPES]
    for number, ((m, n, k), dtype) in enumerate(itertools.product(shapes, HALVES)):
        weight = grouped_weight(scheme, n, k, (torch.bfloat16, torch.float16, torch.float32)[number % 3])
        bias = None if number % 4 == 0 else random(n)
        layer = QuantLinear(weight, scheme, bias=bias, backend="triton")
        x = random(m, k, dtype=dtype)
        assert_is_the_product(layer(x), x, dequantize(weight), bias, torch.finfo(dtype).eps)
        assert not layer.prepared[-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("how", ["scale_after", "scale_before", "matmul"])
@pytest.mark.parametrize("scheme", GROUPED[1::3], ids=name_of)
def test_a_token_that_is_one_in_one_channel_reads_the_weight(
    scheme: Scheme, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4a16, "PIECE", 1)
    monkeypatch.setattr(w4a16, "NARROWEST", 16)  # three pieces, of which the last has one channel
    weight = grouped_weight(scheme, 33, 128)
    x = torch.eye(128, device=DEVICE, dtype=dtype)[5:69]
    read = x.new_empty(64, 33)
    w4a16.multiply(x, *w4a16.pack(weight), None, read, Configuration(how, rows=64, split=1))
    assert_same(read.t(), dequantize(weight).to(dtype)[:, 5:69])


@pytest.mark.parametrize("scheme", INT8, ids=name_of)
def test_w8a8_is_the_reference(scheme: Scheme) -> None:
    shapes = [*SHAPES[:-1], (2, 3, 1), (5, 1, 300), (20, 64, 33)]
    for number, (m, n, k) in enumerate(shapes if not GPU else shapes * 3):
        ours, right = (int8_layer(scheme, n, k, backend) for backend in ("triton", "reference"))
        x = random(m, k, dtype=(*HALVES, torch.float32, torch.float16)[number % 4])
        # The integers are exact in both, and the order of the scales is the same; a bias may be added in the same step.
        if number % 3 == 0:
            eps = torch.finfo(x.dtype).eps
            torch.testing.assert_close(ours(x), right(x), rtol=eps, atol=eps / 8 * right(x).float().abs().max().item())
        else:
            ours.bias = right.bias = None
            assert_same(ours(x), right(x))
        assert not ours.prepared[-1].any()


@pytest.mark.parametrize("m", [3, 33])
def test_w8a8_by_pytorchs_product(m: int) -> None:
    layer = int8_layer(INT8[0], 64, 256)
    weight, weight_scale, arrived = layer.prepared
    x = random(m, 256, dtype=torch.float16)
    values, scale = w8a8.quantize(x, per_token=True)
    y = x.new_empty(m, 64)
    w8a8.multiply(values, scale, weight, weight_scale, arrived, layer.bias, y, Configuration("matmul"))
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_split_sums(split: int) -> None:
    """Whatever the number of parts: integers are exact, and everything is done in the same order every time."""
    layer, x = int8_layer(INT8[0], 20, 640), random(18, 640, dtype=torch.float16)
    weight, weight_scale, arrived = layer.prepared
    values, scale = w8a8.quantize(x, per_token=True)
    y = x.new_empty(18, 20)
    how = Configuration("fused", rows=16, channels=64, split=parts(Configuration("fused", rows=16, split=split), 20, 640, 18, 1))
    assert how.split == split
    w8a8.multiply(values, scale, weight, weight_scale, arrived, layer.bias, y, how)
    assert torch.equal(y, layer(x)) and not arrived.any()

    grouped = grouped_weight(GROUPED[2], 20, 640)
    packed, steps, arrived = w4a16.pack(grouped)
    how = Configuration("scale_after", rows=16, channels=64, split=split)
    once, again = torch.empty_like(y), torch.empty_like(y)
    w4a16.multiply(x, packed, steps, arrived, None, once, how)
    w4a16.multiply(x, packed, steps, arrived, None, again, how)
    assert_is_the_product(once, x, dequantize(grouped), None, torch.finfo(x.dtype).eps)
    assert torch.equal(once, again) and not arrived.any()


def test_activations_are_rounded_as_the_reference_does() -> None:
    """Ties go to the even integer, and values beyond a static scale saturate."""
    x = torch.linspace(-140, 140, 64 * 35, device=DEVICE).reshape(35, 64)
    x[:, ::2] = (x[:, ::2] * 2).round() / 2
    x[0, 0], x[1, 0], x[2] = 1000, -1000, 0
    one = torch.ones(1, device=DEVICE)
    for scheme, given in ((INT8[0], None), (INT8[1], None), (INT8[2], one)):
        assert scheme.inputs is not None
        for dtype in (torch.float32, *HALVES):
            values, scale = w8a8.quantize(x.to(dtype), scheme.inputs.strategy == "token", given)
            expected, expected_scale = quantize_input(x.to(dtype), scheme.inputs, given)
            assert torch.equal(values[:, :64], expected) and not values[:, 64:].any()
            assert torch.equal(scale, expected_scale.reshape(-1).expand(35))


def test_extreme_integers_are_summed_exactly() -> None:
    k = 2048 if DEVICE.type == "cpu" else 28672
    values = torch.full((4, k), 127, dtype=torch.int8)
    values[1] = -127
    values[2, ::2] = -127
    weight = QuantizedWeight(values, torch.ones(4, 1), INT8[2].weights).to(DEVICE)
    layer = QuantLinear(weight, INT8[2], input_scale=torch.ones(1, device=DEVICE), backend="triton")
    x = torch.stack([torch.full((k,), v, device=DEVICE) for v in (127.0, -128.0, 1e9, -1e9, float("inf"), float("-inf"))])
    sums = torch.tensor([127.0, -128.0, 127.0, -128.0, 127.0, -128.0])[:, None] * values.double().sum(1).float()
    assert torch.equal(layer(x), sums.to(DEVICE))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", [INT8[0], GROUPED[0], GROUPED[5]], ids=name_of)
def test_what_is_not_finite_stays_in_its_token(scheme: Scheme, bad: float) -> None:
    eight = scheme.inputs is not None
    layer = int8_layer(scheme, 20, 128) if eight else QuantLinear(grouped_weight(scheme, 20, 128), scheme, backend="triton")
    for m, dtype in ((3, torch.float16), (17, torch.bfloat16)):
        x = random(m, 128, dtype=dtype)
        clean = layer(x)
        x[1, 5] = bad
        y = layer(x)
        assert y[1].isnan().all() if eight else not torch.isfinite(y[1]).any()
        others = [row for row in range(m) if row != 1]
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("scheme", INT8[1:], ids=name_of)
def test_nan_is_visible_with_one_scale_for_all(scheme: Scheme) -> None:
    x = random(3, 64)
    x[2, 7] = float("nan")
    assert int8_layer(scheme, 20, 64)(x)[2].isnan().all()


def test_views_batches_and_other_dtypes() -> None:
    for layer in (int8_layer(INT8[0], 70, 128), QuantLinear(grouped_weight(GROUPED[0], 70, 128), GROUPED[0], backend="triton")):
        x = random(2, 5, 256, dtype=torch.float16)[..., ::2]
        y = layer(x)
        assert y.shape == (2, 5, 70) and torch.equal(layer(x.contiguous()), y)
        assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
        # One token has tiles of its own, so sums are in another order; here and there that changes the last digit of something small.
        torch.testing.assert_close(layer(x[0, 0]), y[0, 0], rtol=1e-3, atol=1e-5 * y.abs().max().item())
        assert layer(x[:, :0]).shape == (2, 0, 70)
        assert torch.equal(layer(x[:, :, :].as_strided((2, 128), (3, 1))), layer(x.as_strided((2, 128), (3, 1)).clone()))
        single, double = layer(x.float()), layer(x.double())
        assert single.dtype == torch.float32 and double.dtype == torch.float64 and torch.equal(double, single.double())
        layer.bias = random(70, dtype=torch.float16)
        assert layer(x).dtype == torch.float16


def test_a_weight_is_kept_once_and_packed() -> None:
    for scheme, dtype in itertools.product(GROUPED[:2], HALVES):
        layer = QuantLinear(grouped_weight(scheme, 512, 512, dtype), scheme, backend="triton")
        assert 512 * 512 * 2 / sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers()) > 3.6
    weight = torch.randint(-127, 128, (64, 256), dtype=torch.int8, device=DEVICE)
    layer = QuantLinear(QuantizedWeight(weight, torch.ones(64, 1, device=DEVICE), INT8[0].weights), INT8[0], backend="triton")
    assert layer.prepared[0].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", [*INT8, GROUPED[0], GROUPED[3]], ids=name_of)
def test_ops_pass_opcheck_and_compile_whole(scheme: Scheme, with_bias: bool) -> None:
    if scheme.inputs is not None:
        layer = int8_layer(scheme, 20, 128)
    else:
        layer = QuantLinear(grouped_weight(scheme, 20, 128), scheme, bias=random(20), backend="triton")
    layer.bias = layer.bias if with_bias else None
    x = random(3, 128, dtype=torch.bfloat16)
    if scheme.inputs is not None:
        arguments = (x, *layer.prepared, scheme.inputs.strategy == "token", layer.input_scale, layer.bias)
        torch.library.opcheck(OPS.triton_w8a8.default, arguments)
    else:
        torch.library.opcheck(OPS.triton_w4a16.default, (x, *layer.prepared, layer.bias))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for each in (x, x.view(3, 1, 128)):
        assert torch.equal(compiled(each), layer(each))


def test_ops_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="x has 256 input channels, and the weight 128"):
        OPS.triton_w4a16(random(3, 256, dtype=torch.float16), *w4a16.pack(grouped_weight(GROUPED[0], 20, 128)), None)
    with pytest.raises(ValueError, match="x has 384 input channels, and the weight 256"):
        OPS.triton_w8a8(random(3, 300), *int8_layer(INT8[0], 20, 200).prepared, True, None, None)


def test_what_they_support() -> None:
    cpu = torch.device("cpu")
    assert select(INT8[0], cpu, (8, 8))[0] in ("cpu", "torch")  # never by itself, though the interpreter could
    assert "4-bit weights" in str(triton.supports(INT8[0].model_copy(update={"name": "w4a8"}), DEVICE, (8, 8)))
    assert "exact for at most" in str(triton.supports(INT8[0], DEVICE, (8, 200_000)))
    assert triton.supports(GROUPED[0], DEVICE, (8, 200_064)) is None
    if GPU:
        assert select(INT8[0], DEVICE, (7, 9))[0] == "triton"
        assert "they run on NVIDIA GPUs" in str(triton.supports(INT8[0], cpu, (8, 8)))
    else:
        assert select(INT8[0], cpu, (7, 9), "triton")[0] == "triton"
        assert "TRITON_INTERPRET=1" in str(triton.supports(INT8[0], torch.device("cuda"), (8, 8)))


@pytest.mark.parametrize("without", [True, False])
def test_machines_without_triton_or_a_gpu(without: bool) -> None:
    script = (
        "import sys, torch\n"
        f"if {without}: sys.modules['triton'] = None\n"
        "from smoothquant_plus.method.scheme import find_scheme\n"
        "from smoothquant_plus.runtime.kernels import select, triton\n"
        "print(triton.supports(find_scheme('w4a16'), torch.device('cpu'), (8, 128)))\n"
        "print(select(find_scheme('w8a8'), torch.device('cpu'), (8, 8))[0])\n"
        "select(find_scheme('w4a16'), torch.device('cpu'), (8, 128), 'triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False)
    reason = "Triton cannot be imported (" if without else "they run on NVIDIA GPUs, not on 'cpu'"
    assert done.stdout.startswith(reason), done.stderr
    assert done.stdout.split()[-1] in ("cpu", "torch")
    assert f"InputError: backend 'triton' cannot run a 8x128 layer in w4a16 on cpu: triton: {reason}" in done.stderr


def test_tables_end_with_any_number_of_tokens_in_increasing_order() -> None:
    for rows in (*SHIPPED.values(), *ANYWHERE.values()):
        most = [each for each, _ in rows]
        assert most == sorted(most) and most[-1] == configurations.MANY
        assert all(how.depth == 128 or how.kernel == "fused" for _, how in rows)


def test_parts_share_the_work_evenly() -> None:
    for n, k, tokens in itertools.product((64, 4096, 28672), (128, 4096, 28672), (1, 16, 64, 4096)):
        for how in (ANYWHERE["w4a16"][0][1], ANYWHERE["w8a8"][0][1], Configuration("fused", split=7)):
            split, steps = parts(how, n, k, tokens, 132), k // 128
            length = -(-steps // split)
            assert 1 <= split <= steps and (split - 1) * length < steps  # no program is without a step
    assert parts(Configuration("scale_after", rows=16), 4096, 4096, 1, 132) > 1
    assert parts(Configuration("scale_after", rows=16), 128256, 4096, 1, 132) == 1
    assert parts(Configuration("fused", rows=128, channels=256), 4096, 4096, 4096, 132) == 1  # enough tiles
    assert parts(Configuration("matmul"), 4096, 4096, 4096, 132) == 1
    large = Configuration("fused", rows=128, channels=256)
    for n, tokens in itertools.product((4096, 8192, 28672), (128, 256, 512)):
        tiles = -(-tokens // 128) * -(-n // 256)
        split = parts(large, n, 8192, tokens, 132)
        assert split == 1 or tiles * split <= 132  # a second wave for some tiles would double the time


def test_a_tuned_file_is_used_and_a_broken_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("SQPLUS_TUNED", str(path))
    name = torch.cuda.get_device_properties(0).name if GPU else ""
    rows = [[4, {"kernel": "scale_after", "rows": 8, "split": 2}], [configurations.MANY, {"kernel": "matmul"}]]
    path.write_text(json.dumps({name: {"w4a16 64x512": rows}}))
    configurations.tuned.cache_clear()
    try:
        assert choose("w4a16", 64, 512, 3, DEVICE) == Configuration("scale_after", rows=8, split=2)
        assert choose("w4a16", 64, 512, 5, DEVICE).kernel == "matmul"
        assert choose("w4a16", 64, 640, 3, DEVICE).warps == 2  # another shape: what is shipped
        path.write_text(json.dumps({name: {"w4a16 64x512": [[4, {"kernel": "fastest"}]]}}))
        configurations.tuned.cache_clear()
        with pytest.raises(InputError, match=r"tuned.json is not what sqplus tune writes .*: remove it, or run sqplus tune again"):
            choose("w4a16", 64, 512, 3, DEVICE)
    finally:
        configurations.tuned.cache_clear()


def test_every_compilation_is_complete() -> None:
    for architecture in ("sm_90", "sm_80"):
        listed = list(shipped(architecture))
        assert len({each.name for each in listed}) == len(listed)
        for each in listed:
            assert list(each.signature) == list(each.kernel.arg_names)
            assert {name for name, kind in each.signature.items() if kind == "constexpr"} == set(each.constants)


@pytest.mark.skipif(GPU, reason="times are made up")
def test_tune_writes_what_is_fastest_and_layers_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "tuned.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"another GPU": {"w8a8 8x8": [[1, {"kernel": "matmul"}]]}}))
    monkeypatch.setenv("SQPLUS_TUNED", str(path))
    fast = Configuration("scale_after", rows=8, channels=32, split=2, warps=2, stages=3)
    slow = Configuration("scale_before", rows=16, channels=64, split=1)
    tried: list[Configuration] = []

    def sampler_of(
        op: str, x: Tensor, copies: list[tuple[Tensor, ...]], how: Configuration, expected: Tensor
    ) -> Callable[[], float] | None:
        assert torch.allclose(tune.product_of(op, x, copies[0], how)(), expected, atol=0.5) if how in (fast, slow) else True
        tried.append(how)
        return None if how.channels == 64 and how != slow else lambda: 1.0 if how == fast else 2.0

    monkeypatch.setattr(tune, "sampler_of", sampler_of)
    monkeypatch.setattr(tune, "candidates", lambda op, n, m: [fast, slow, Configuration("scale_after", rows=8)])
    monkeypatch.setattr(tune, "choose", lambda *shape: slow)
    try:
        found = tune.tune(["40x256"], "2,4", "w4a16", "cpu")
        assert [(one.tokens, one.configuration, one.microseconds) for one in found.choices] == [(2, fast, 1e6), (4, fast, 1e6)]
        assert [one.microseconds_before for one in found.choices] == [2e6, 2e6] and fast in tried and slow in tried
        assert choose("w4a16", 40, 256, 1000, DEVICE) == fast  # the largest batch stands for all that are larger
        assert set(json.loads(path.read_text())) == {"another GPU", ""}
        assert len(tune.tables(found)[0].lines) == 2
    finally:
        configurations.tuned.cache_clear()


def test_what_tune_tries() -> None:
    for op, m in itertools.product(("w4a16", "w8a8"), (1, 8, 17, 64, 256, 4096)):
        tried = tune.candidates(op, 64, m)
        assert len(set(tried)) == len(tried) and 5 < len(tried) < 100
        assert all(how.rows >= min(m, 128) / 2 or how.kernel == "matmul" for how in tried)
        assert any(how.kernel == "matmul" for how in tried) == (m >= 32)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_tune_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="times kernels on an NVIDIA GPU, and torch finds none here"):
        tune.tune()
