"""What the benchmarks say, and refuse; never how fast anything is."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation import benchmark_fused, benchmark_linear, benchmark_model, machine, timing
from smoothquant_plus.evaluation.benchmark_linear import bench_linear, remarks, tables
from smoothquant_plus.evaluation.benchmark_model import bench_model
from smoothquant_plus.evaluation.cpu_peers import CPU_PEERS
from smoothquant_plus.evaluation.gpu_peers import gptq
from smoothquant_plus.evaluation.machine import Limits
from smoothquant_plus.evaluation.peers import BF16, Peer, Weights
from smoothquant_plus.evaluation.timing import turns
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.runtime.kernels import backends
from smoothquant_plus.runtime.load import load

ROW = {"scheme", "backend", "m", "n", "k", "threads", "microseconds", "ratio_to_bf16", "gb_per_s", "fraction_of_limit"}
MODEL_ROW = {
    *("model", "scheme", "backend", "attention", "prefill_tokens_per_second", "time_to_first_token_s", "decode_tokens_per_second"),
    *("peak_memory_bytes", "prefill_ratio", "decode_ratio"),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and caches are of no interest here."""
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "SIDE", {"cpu": 32})
    monkeypatch.setattr(timing, "COPIES", 2)
    monkeypatch.setattr(benchmark_linear, "ROUNDS", 3)


def test_linear_as_a_user_runs_it(quick: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "linear.json"
    options = ["--shape", "64x128", "--shape", "80x384", "--tokens", "1,3", "--threads", "1", "--json", str(file)]
    app(["bench", "linear", *options], standalone_mode=False)
    printed = capfd.readouterr()
    found = json.loads(file.read_text())
    assert {"cpu", "instruction_set", "threads", "torch"} == set(found["machine"]) and found["machine"]["threads"] == 1
    rows, left_out = found["rows"], found["left_out"]
    assert all(set(row) == ROW for row in rows)
    assert all(row[name] > 0 for row in rows for name in ROW - {"scheme", "backend"})
    assert all(row["ratio_to_bf16"] == 1 for row in rows if row["backend"] == BF16)
    # Whatever there is was timed or is named with the reason, and nothing that was timed multiplies something else.
    everything = {(peer.scheme, name) for name, peer in CPU_PEERS.items()}
    everything |= {(scheme, name) for scheme in ("w8a8", "w4a16", "w4a8") for name in backends(torch.device("cpu")) if name != "reference"}
    everything.add(("bf16", "cpu, of heads"))
    timed = {(row["scheme"], row["backend"]) for row in rows}
    assert timed | {(one["scheme"], one["backend"]) for one in left_out} == everything
    assert {("bf16", BF16), ("w8a8", "torch"), ("w4a16", "torch"), ("w8a8", "torch _int_mm")} <= timed
    assert all(one["reason"] and "wrong" not in one["reason"] for one in left_out)
    sizes = {(row["m"], row["n"], row["k"]) for row in rows if row["backend"] == BF16}
    assert sizes == {(m, *shape) for m in (1, 3) for shape in ((64, 128), (80, 384))}
    assert (
        "80x384 w8a8 --backend torch: M=1 " in printed.out and "% of limit; M=3 " in printed.out and "80x384 w4a16 limit: " in printed.out
    )
    assert "limits at best: read " in printed.out
    assert "bench 4/4: 80x384, 3 tokens" in printed.err and "left" in printed.err


def test_numbers_of_threads_take_turns(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is built or called is, with the threads that it says; ratios are to bfloat16 with as many."""
    seen: list[tuple[str, int]] = []
    before = torch.get_num_threads()

    def build(weights: Weights) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
        seen.append(("built", torch.get_num_threads()))
        return lambda x: lambda: torch.nn.functional.linear(x, weights.floats)

    def sampler(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> Callable[[], float]:
        calls[0]()
        return lambda: seen.append(("called", torch.get_num_threads())) or 3.0 / torch.get_num_threads()

    monkeypatch.setattr(benchmark_linear, "sampler", sampler)
    monkeypatch.setattr(benchmark_linear, "backends", lambda device: {})
    monkeypatch.setattr(benchmark_linear, "PEERS", {BF16: Peer("bf16", "float", (), ("cpu",), build)})
    found = bench_linear("w4a16", ["64x128"], "2", "1,3")
    assert torch.get_num_threads() == before and {("built", 1), ("built", 3), ("called", 1), ("called", 3)} == set(seen)
    rows = [row for row in found.rows if row.backend == BF16]
    assert [(row.threads, row.microseconds, row.ratio_to_bf16) for row in rows] == [(1, 3e6, 1.0), (3, 1e6, 1.0)]
    lines = next(tables(found)).lines
    assert [line[0] for line in lines[:2]] == [f"{BF16}, 1 thread", f"{BF16}, 3 threads"]
    assert "as with" not in lines[0][1] and lines[1][1].endswith("3.00x as with 1")
    assert len({one.backend for one in found.left_out}) == len(found.left_out)


def test_what_fails_or_is_wrong_is_not_timed_but_named(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weights: object) -> object:
        raise OSError("no such instruction\nand more")

    def no_small_batch(weights: object) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
        return lambda x: lambda: torch._int_mm(x, x)

    peers = {
        BF16: CPU_PEERS[BF16],
        "broken": Peer("w8a8", "int8", (), ("cpu",), broken),
        "zeros": Peer("w8a8", "int8", (), ("cpu",), lambda weights: lambda x: lambda: torch.zeros(len(x), 64)),
        "refuses": Peer("w8a8", "int8", (), ("cpu",), no_small_batch),
        "absent": Peer("w8a8", "int8", ("no_such_package",), ("cpu",), broken),
        "elsewhere": Peer("w8a8", "int8", (), ("cuda",), broken),
    }
    monkeypatch.setattr(benchmark_linear, "PEERS", peers)
    found = bench_linear("w8a8", ["64x128"], "2")
    assert {row.backend for row in found.rows} - {"cpu, of heads"} == {BF16, "cpu", "torch"}
    reasons = {one.backend: one.reason for one in found.left_out if one.scheme != "bf16"}
    assert reasons.pop("refuses")
    expected = {
        "broken": "no such instruction",
        "zeros": "its product is wrong (relative error 1.00)",
        "absent": "not installed: no_such_package",
    }
    assert reasons == expected
    lines = list(remarks(found))
    assert "not installed: no_such_package" in lines and "not timed: w8a8 broken: no such instruction" in lines
    assert [line[0] for line in next(tables(found)).lines if line[0] != "cpu, of heads"] == [
        BF16,
        "bf16 limit",
        "w8a8 --backend cpu",
        "w8a8 --backend torch",
        "w8a8 limit",
    ]


def test_copies_of_a_weight_take_turns(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by a stand-in for its graphs."""
    timed: list[tuple[int, list[torch.Tensor]]] = []

    def replayed(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> Callable[[], float]:
        timed.append((len(calls), [call() for call in calls]))
        return lambda: 1e-6

    monkeypatch.setattr(benchmark_linear, "copies_for", lambda nbytes, device: 3)
    monkeypatch.setattr(benchmark_linear, "sampler", replayed)
    weights: list[int] = []

    def build(copy: Weights) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
        weights.append(copy.floats.data_ptr())
        return lambda x: lambda: torch.nn.functional.linear(x, copy.floats)

    monkeypatch.setattr(benchmark_linear, "PEERS", {BF16: Peer("bf16", "float", (), ("cpu",), build)})
    found = bench_linear("w4a16", ["64x128"], "5")
    assert len(set(weights)) == 3
    for number, results in timed:
        assert number == 3 and all(torch.equal(result, results[0]) for result in results)
    assert {row.microseconds for row in found.rows} == {1.0}


def test_copies_that_do_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_linear, "copies_for", lambda nbytes, device: 10**12)
    with pytest.raises(InputError, match=r"--shape 64x128: .* GB are free: choose one --scheme, or a smaller --shape"):
        bench_linear("w4a16", ["64x128"], "5")


def test_calls_in_turn() -> None:
    """On a CPU: each once before, and the mean of one round; as many copies as no cache holds together."""
    order: list[str] = []
    cpu = torch.device("cpu")
    sample = timing.sampler([lambda: order.append("a"), lambda: order.append("b")], cpu)
    assert order == ["a", "b"] and 0 < sample() < 1 and order == ["a", "b"] * 2
    assert timing.copies_for(1, cpu) == timing.COPIES and timing.copies_for(1 << 40, cpu) == 1


def test_a_graph_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a graph, in turn, and the time of one of them; one that waits for the device is found before. CUDA is a stand-in."""
    order: list[str] = []
    modes = ["default"]
    replays: list[int] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
        graph=lambda graph: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        set_sync_debug_mode=modes.append,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1000),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: call() or 42.0)
    gpu = torch.device("cuda")
    sample = timing.sampler([lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")], gpu)
    assert order == list("abca" + "abc" * 7)  # once before, and 20 calls at least
    assert sample() == 42.0 / 21 and len(replays) == 2
    assert [timing.copies_for(nbytes, gpu) for nbytes in (10**6, 1000, 1)] == [1, 3, timing.COPIES]

    def waits() -> None:
        order.append(modes[-1])
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timing.sampler([waits], gpu)
    assert order[-2:] == ["default", "error"] and modes[-1] == "default"


def test_fused_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, by a stand-in for the clock."""
    pytest.importorskip("triton")
    from smoothquant_plus.runtime.kernels.triton import fused

    cpu, times = torch.device("cpu"), iter([2e-6, 5e-6] * 100)

    def fixed(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
        calls[0]()
        seconds = next(times)
        return lambda: seconds

    monkeypatch.setattr(benchmark_fused, "sampler", fixed)
    monkeypatch.setattr(fused, "LARGEST_NORM", 128)
    names = list(benchmark_fused.OPERATIONS)
    limits = Limits("", read_gb_per_s=10.0, int8_gop_per_s=None, bfloat16_gflop_per_s=None, float32_gflop_per_s=None)
    monkeypatch.setattr(benchmark_fused, "LARGEST_ERROR", 0.05)  # the interpreter truncates to bfloat16
    rows = [benchmark_fused.as_row(limits, one) for one in benchmark_fused.bench_fused([(3, 96), (2, 200)], cpu)]
    assert [(row.operation, row.m, row.k) for row in rows] == [(names[0], 3, 96), (names[1], 3, 96), (names[1], 2, 200)]
    assert rows[0].microseconds == 2.0 and rows[0].ratio_to_separate == pytest.approx(2.5)
    assert rows[0].gb_per_s == pytest.approx(7 * 3 * 96 / 2e-6 / 1e9) and rows[0].fraction_of_limit == pytest.approx(rows[0].gb_per_s / 10)
    small, large = benchmark_fused.tables(rows)
    assert small.title == "96 channels" and large.lines[0] == [names[0], "-", "-"]
    monkeypatch.setattr(benchmark_fused, "LARGEST_ERROR", 0.0)
    with pytest.raises(RuntimeError, match="add, RMSNorm, quantize of 3x96 is wrong"):
        list(benchmark_fused.bench_fused([(3, 96)], cpu))


def test_four_bits_as_gptq_packs_them() -> None:
    values = torch.randint(-8, 8, (3, 16), dtype=torch.int8)
    packed = gptq(values)
    assert packed.shape == (2, 3) and packed.is_contiguous()
    unpacked = torch.stack([packed >> 4 * i & 15 for i in range(8)], dim=1).reshape(16, 3)  # (K / 8, 8, N)
    assert torch.equal(unpacked.t() - 8, values.int())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w8a16"}, "unknown scheme 'w8a16'.*Did you mean"),
        ({"shapes": ["64"]}, "--shape 64: give output and input channels as NxK"),
        ({"shapes": ["64x128", "0x128"]}, "--shape 0x128: give"),
        ({"shapes": ["64x100"]}, "--shape 64x100: w4a16 has groups of 128"),
        ({"tokens": "1,,3"}, "--tokens 1,,3: give positive numbers"),
        ({"tokens": "0"}, "--tokens 0: give positive numbers"),
        ({"numbers_of_threads": "1,two"}, "--threads 1,two: give positive numbers"),
        ({"device": "cuda:99"}, "device 'cuda:99' was asked for"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_linear_refuses(options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_linear, "limits_of", lambda *_: pytest.fail("work began before the options were checked"))
    with pytest.raises(InputError, match=message):
        bench_linear(**options)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in (tmp_path, tmp_path / "missing" / "file.json"):
        assert app(["bench", "linear", "--json", str(file)], standalone_mode=False) == 2
    assert capfd.readouterr().err.count("give the name of a file in a directory that exists") == 2


def test_turns() -> None:
    assert list(turns("abc", 2, 10.0)) == list("abcabc")
    order = []
    for one in turns(["slow", "quick"], 3, 0.02):
        order.append(one)
        time.sleep(0.03 if one == "slow" else 0.0)
    assert order == ["slow", "quick", "quick", "quick"]


def test_a_limit_is_what_takes_longer_reading_or_multiplying() -> None:
    limits = Limits("", read_gb_per_s=10.0, int8_gop_per_s=100.0, bfloat16_gflop_per_s=50.0, float32_gflop_per_s=25.0)
    assert limits.seconds("int8", nbytes=10**10, operations=10**9) == 1.0
    assert limits.seconds("int8", nbytes=10, operations=10**11) == 1.0
    assert limits.seconds("float", nbytes=10, operations=10**11) == 2.0
    others = [Limits("", 5.0, None, 60.0, None), Limits("", 6.0, 90.0, 70.0, 30.0)]
    assert machine.summary([limits, *others], max) == Limits("", 10.0, 100.0, 70.0, 30.0)
    assert machine.summary([limits, *others], median) == Limits("", 6.0, 95.0, 60.0, 27.5)
    assert machine.summary(others[:1], median) == others[0]
    assert Limits("", 10.0, None, None, None).seconds("int8", 10**10, 10**20) == 1.0


def test_the_package_s_own_kernels_measure_the_limits_where_they_are_built(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(machine, "extension", lambda: SimpleNamespace(level=lambda: "avx512vnni"))
    monkeypatch.setattr(torch.ops.smoothquant_plus, "cpu_read", lambda tensor: read.append(tensor.nbytes) or 0, raising=False)
    monkeypatch.setattr(torch.ops.smoothquant_plus, "cpu_peak", lambda what, times: 0 if what == "bfloat16" else times, raising=False)
    cpu = torch.device("cpu")
    limits = machine.limits_of(cpu)(4)
    assert set(read) == {1 << 20} and limits.read_gb_per_s > 0 and "times the threads" in limits.source
    assert limits.bfloat16_gflop_per_s is None and limits.int8_gop_per_s and limits.float32_gflop_per_s
    assert machine.describe(4, cpu)["instruction_set"] == "avx512vnni"


def test_limits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy counts what it reads and what it writes; the device and the clock are stand-ins."""
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(machine, "SIDE", {"cuda": 64})
    monkeypatch.setattr(machine, "_best", lambda call, device: 1e-3 if call() is not None else 0.0)
    limits = machine._measure_cuda(torch.device("cpu"))
    assert limits.read_gb_per_s == pytest.approx(2 * 2**20 / 1e-3 / 1e9)
    peak = pytest.approx(2 * 64**3 / 1e-3 / 1e9)
    assert (limits.int8_gop_per_s, limits.bfloat16_gflop_per_s, limits.float32_gflop_per_s) == (peak, peak, peak)


def test_models_as_a_user_runs_it(tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, out, file = tiny("llama"), tmp_path / "out", tmp_path / "model.json"
    quantize(model, out, smooth="none")
    options = [
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "3",
        "--batch",
        "2",
        "--backend",
        "torch",
        "--attention",
        "int8",
        "--json",
        str(file),
    ]
    app(["bench", "model", str(model), str(out), *options], standalone_mode=False)
    printed = capfd.readouterr().out
    found = json.loads(file.read_text())
    assert (found["prompt_tokens"], found["new_tokens"], found["batch"]) == (8, 3, 2)
    assert [(row["model"], row["attention"]) for row in found["rows"]] == [(str(one), how) for one in (model, out) for how in ("", "int8")]
    first, with_integers, second, _ = found["rows"]
    assert (with_integers["scheme"], with_integers["backend"]) == ("float16", "")
    assert set(first) == set(second) == MODEL_ROW
    assert (first["scheme"], first["backend"], first["prefill_ratio"], first["decode_ratio"]) == ("float16", "", 1, 1)
    assert (second["model"], second["scheme"], second["backend"]) == (str(out), "w8a8", "torch")
    assert all(row[name] > 0 for row in (first, second) for name in MODEL_ROW - {"model", "scheme", "backend", "attention"})
    assert first["prefill_tokens_per_second"] == pytest.approx(16 / first["time_to_first_token_s"])
    assert f"{out}: scheme w8a8; backend torch; prefill tokens/s " in printed
    assert not multiprocessing.active_children()


def test_models_as_cuda_graphs_generate_the_same(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are stand-ins that call what they would hold: which tokens go in is what `generate` gives."""
    model, prompts, fed = load(tiny("llama"), dtype=torch.float32), torch.arange(10, 26).reshape(2, 8), []
    expected = model.generate(prompts, max_new_tokens=5, do_sample=False, eos_token_id=None)

    def stand_in(calls: list[Callable[[], Any]], device: torch.device) -> SimpleNamespace:
        for call in (*calls, calls[0]):
            call()
        return SimpleNamespace(replay=calls[0])

    monkeypatch.setattr(benchmark_model, "captured", stand_in)
    run = benchmark_model.capture(model, prompts, 5, Path("model"))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **options: (fed.append(input_ids.clone()), forward(input_ids, **options))[1])
    for _ in range(2):
        fed.clear()
        assert min(run()) > 0
        # The prompts, the same again to fill the cache, and a step for each token after the first.
        assert [tokens.shape[1] for tokens in fed] == [8, 8, 1, 1, 1, 1]
        assert torch.equal(torch.cat(fed[1:], dim=1), expected[:, :-1])


def test_a_step_waits_for_nothing_that_a_cuda_graph_cannot_hold(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values, as torch.compile uses them, fail where a value is asked for."""
    model, prompts = load(tiny("llama"), dtype=torch.float32), torch.zeros(2, 8, dtype=torch.int64)
    seen: list[str] = []

    def stand_in(calls: list[Callable[[], Any]], device: torch.device) -> None:
        calls[0]()
        seen.append("called")

    monkeypatch.setattr(benchmark_model, "captured", stand_in)
    with FakeTensorMode(allow_non_fake_inputs=True):
        benchmark_model.capture.__wrapped__(model, prompts, 4, Path("model"))
    assert seen == ["called"] * 2


@pytest.mark.parametrize(
    ("family", "error", "reason"),
    [
        ("llama", RuntimeError("called a synchronizing CUDA operation"), "called a synchronizing CUDA operation"),
        ("mistral-sliding-window", None, "its attention has a window of 8 tokens, and 13 are needed"),
        ("falcon-rw", None, ".*size"),  # transformers' own, which has as many biases as tokens
    ],
)
def test_models_that_cannot_be_captured_are_named(
    family: str, error: Exception | None, reason: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(*_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(benchmark_model, "captured", stand_in)
    with pytest.raises(InputError, match=rf"a model cannot be run as a CUDA graph: {reason}(.|\n)*--eager"):
        benchmark_model.capture(load(tiny(family)), torch.zeros(1, 8, dtype=torch.int64), 4, Path("a model"))


def test_models_refuse(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_model, "_processes", lambda *_: pytest.fail("a model was loaded before everything was checked"))
    model = tiny("llama")
    for directories, options, message in (
        ([tmp_path / "missing"], {}, "no such model directory"),
        ([model, tmp_path], {"prompt_tokens": 8}, r"has no config\.json"),
        ([model], {"prompt_tokens": 250}, "--prompt-tokens 250 --new-tokens 32 is more than the 256 positions"),
        ([model], {"prompt_tokens": 8, "backend": "torhc"}, "unknown backend 'torhc'.*Did you mean 'torch'"),
        ([model], {"prompt_tokens": 8, "backend": "torch"}, "--backend torch: none of the models is quantized"),
        ([model], {"prompt_tokens": 8, "eager": True}, "--eager is for CUDA"),
        ([model], {"device": "cuda:99"}, "device 'cuda:99' was asked for"),
    ):
        with pytest.raises(InputError, match=message):
            bench_model(directories, **options)


def test_a_process_hands_its_errors_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is the tests'
    ours, theirs = multiprocessing.Pipe()
    ours.send(([[1, 2]], 2))
    benchmark_model.serve(theirs, tmp_path / "missing", 1, "cpu", None, None, False)
    error = ours.recv()
    assert isinstance(error, InputError) and "no such model directory" in str(error)


def test_a_process_that_is_killed_is_an_error_that_says_so(tmp_path: Path) -> None:
    with benchmark_model._processes([tmp_path], [(1, "cpu", None, None, False)]) as ask:
        multiprocessing.active_children()[0].kill()
        with pytest.raises(InputError, match=r"exit code -9.*measure fewer of them"):
            ask(0, torch.zeros(1, 1, dtype=torch.int64), 2)
