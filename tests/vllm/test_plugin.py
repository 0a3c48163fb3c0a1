"""The plugin inside vLLM: what it answers is what this package's own runtime answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import SCHEMES, Answer, ours

from smoothquant_plus.errors import InputError
from smoothquant_plus.method.integers import dequantize
from smoothquant_plus.method.scheme import find_scheme
from smoothquant_plus.models.checkpoint import INDEX, Checkpoint, read_linear
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.runtime import vllm as plugin
from smoothquant_plus.runtime.kernels import cpu

Out = Callable[[str, str], Path]
Theirs = Callable[..., Answer]

LAYER = "model.layers.0.mlp.down_proj"

plugin.register()
pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the kernels are not built")


def check(found: Answer, expected: Answer, scheme: str) -> None:
    """Equal but for rounding. Dynamic scales follow the last bit of the norms, which vLLM computes in another order, and now and then an
    activation is rounded the other way."""
    difference = (found[0] - expected[0][: len(found[0])]).abs()
    assert difference.max() < (0.1 if scheme == "token" else 1e-3) and difference.mean() < (0.01 if scheme == "token" else 1e-4)
    assert found[1] == expected[1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "mixtral", "qwen3-moe"])
def test_checkpoints_run_on_our_kernels(family: str, scheme: str, out: Out, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *args: calls.append(args[2]) or original(*args))
    found = theirs(out(family, scheme))
    assert calls
    monkeypatch.undo()
    check(found, ours(out(family, scheme)), scheme)


def test_a_scale_per_fused_layer(out: Out, theirs: Theirs, tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny("wide-llama"), tmp_path / "out", scheme="w8a8", weights="tensor", smooth="none")
    check(theirs(tmp_path / "out"), ours(tmp_path / "out"), "token")


def test_what_our_kernels_lack_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        input_symmetric = False

    assert plugin.Int8Kernel.can_implement(Config()) == (False, "asymmetric activations")
    monkeypatch.setattr(cpu, "missing", lambda: "not built")
    Config.input_symmetric = True
    assert plugin.Int8Kernel.can_implement(Config()) == (False, "not built")


def test_the_float_weight_of_a_layer_with_static_activations(out: Out) -> None:
    """What DeepSeek's attention decodes with: multiplying the layer with ones would clip them."""
    checkpoint = Checkpoint(out("llama", "static"))
    scheme = find_scheme("w8a8", "static")
    weight, _ = read_linear(checkpoint, LAYER, scheme, 128, 256)
    layer = torch.nn.Module()
    plugin.keep(layer, weight, scheme, torch.full((1,), 1e-3))
    torch.testing.assert_close(plugin.float_weight(layer), dequantize(weight), rtol=1e-6, atol=0)


def beside(model: Path, quantized: Path, directory: Path, *files: str) -> Path:
    """The full-precision model, with these files of the quantized one beside it."""
    shutil.copytree(model, directory)
    for file in files:
        shutil.copy(quantized / file, directory)
    return directory


def on_load(scheme: str, **more: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config": {"quant_method": "sqplus", **SCHEMES[scheme], **more}}}


@pytest.mark.parametrize(("family", "scheme"), [("llama", "token"), ("llama", "static"), ("qwen2", "asymmetric"), ("mixtral", "symmetric")])
def test_smoothed_and_quantized_while_loading(
    family: str, scheme: str, out: Out, theirs: Theirs, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As the checkpoint that was made before, to the last bit."""
    model = beside(tiny(f"wide-{family}"), out(family, scheme), tmp_path / "model", SMOOTHING, STATISTICS)
    found, expected = theirs(model, **on_load(scheme)), theirs(out(family, scheme))
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


def test_rounded_to_nearest_without_a_word_said(theirs: Theirs, tiny: Callable[..., Path], tmp_path: Path, capfd: Any) -> None:
    quantize(tiny("wide-llama"), tmp_path / "out", scheme="w4a16", smooth="none")
    found = theirs(tiny("wide-llama"), quantization="sqplus")
    assert "rounded to nearest, not smoothed" in capfd.readouterr().err
    assert torch.equal(found[0], theirs(tmp_path / "out")[0])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3-moe", "gemma2"])
@pytest.mark.parametrize("source", [SMOOTHING, STATISTICS])
def test_the_tensors_are_those_of_the_checkpoint(
    family: str, source: str, tiny: Callable[..., Path], tmp_path: Path, calibration: Any
) -> None:
    """Under the dtype that vLLM makes the default one while it loads."""
    model = tiny(family, torch.bfloat16)
    quantize(model, tmp_path / "out", activations="static", smooth="all", alpha=0.7, calibration=calibration)
    directory = beside(model, tmp_path / "out", tmp_path / "model", STATISTICS, source)
    options = {} if source == SMOOTHING else {"smooth": "all", "alpha": 0.7}
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = plugin.Quantizer(directory, {"scheme": "w8a8", "activations": "static", **options})
        tensors = dict(quantizer.tensors())
    finally:
        torch.set_default_dtype(torch.float32)
    written = Checkpoint(tmp_path / "out")
    assert set(tensors) == set(written.tensors) and quantizer.config() == written.config["quantization_config"]
    for name, tensor in tensors.items():
        assert tensor.dtype == written.tensors[name].dtype and torch.equal(tensor, written.read(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shceme": "w8a8"}, "unknown option 'shceme'.*Did you mean 'scheme'"),
        ({"scheme": "w8a8", "activations": "tensor"}, "no dynamic per-tensor"),
        ({"scheme": "w8a8", "activations": "static"}, "static activations need .*sqplus calibrate"),
        ({"alpha": 0.5}, "smoothing needs .*sqplus calibrate"),
        ({"smooth": "nroms"}, "unknown smooth 'nroms'.*Did you mean 'norms'"),
    ],
)
def test_options_that_cannot_be_had(options: dict[str, Any], message: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        plugin.Quantizer(tiny("llama"), options)


def test_factors_of_another_model(out: Out, tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = beside(tiny("wide-qwen2"), out("llama", "token"), tmp_path / "model", SMOOTHING)
    factors = load_file(directory / SMOOTHING)
    save_file({**factors, "model.layers.9.input_layernorm": torch.ones(128)}, directory / SMOOTHING)
    with pytest.raises(InputError, match=r"'model.layers.9.input_layernorm' in .* is not of a norm or linear"):
        list(plugin.Quantizer(directory, {}).tensors())
    save_file({name: s[:64].clone() for name, s in factors.items()}, directory / SMOOTHING)
    with pytest.raises(InputError, match="are not 128 positive numbers"):
        list(plugin.Quantizer(directory, {}).tensors())


def without(suffix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.__delitem__(f"{LAYER}.{suffix}")


def with_scale(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[f"{LAYER}.weight_scale"][0].fill_(value)


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"][:, :4].clone()


@pytest.mark.parametrize(
    ("scheme", "damage", "named"),
    [
        ("static", without("input_scale"), "input_scale' is missing"),
        ("asymmetric", without("weight_zero_point"), "weight_zero_point' is missing"),
        ("asymmetric", cut, r"weight_packed' is .* and must be"),
        ("token", with_scale(float("nan")), "weight_scale' in .* not positive"),
        ("symmetric", with_scale(0.0), "weight_scale' in .* not positive"),
    ],
)
def test_damaged_checkpoints_are_refused(scheme: str, damage: Any, named: str, out: Out, theirs: Theirs, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(out("llama", scheme), directory)
    shard = json.loads((directory / INDEX).read_text())["weight_map"][f"{LAYER}.weight_scale"]
    tensors = load_file(directory / shard)
    damage(tensors)
    save_file(tensors, directory / shard)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard or name in tensors}
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"'{LAYER}.{named}"):
        theirs(directory)


PROCESS = """
import json, os, sys
from pathlib import Path
def main():
    from serving import ask, open_engine
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    llm = open_engine(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    logprobs, tokens = ask(llm)
    print("ANSWER", json.dumps([logprobs.tolist(), tokens]), flush=True)
    llm.llm_engine.engine_core.shutdown()
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("case", ["in processes of its own", "compiled", "compiled experts"])
def test_other_ways_to_run(case: str, out: Out, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM finds the plugin by its entry point; what is quantized while loading goes to its processes too."""
    family, scheme = ("mixtral", "asymmetric") if case == "compiled experts" else ("llama", "static")
    directory, options = out(family, scheme), {"enforce_eager": False}
    if case == "in processes of its own":
        directory = beside(tiny("wide-llama"), out(family, scheme), tmp_path / "model", SMOOTHING, STATISTICS)
        options = on_load(scheme)
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script), str(directory), json.dumps(options)], capture_output=True, text=True, env=environment, timeout=400
    )
    (answer,) = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")] or [done.stderr[-3000:]]
    logprobs, tokens = json.loads(answer)
    check((torch.tensor(logprobs), tokens), ours(out(family, scheme)), scheme)
