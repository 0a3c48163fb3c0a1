"""The plugin inside vLLM: what it answers is what this package's own runtime answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import SCHEMES, Answer, ours
from transformers import LlamaConfig, LlamaForCausalLM

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.method.integers import dequantize
from smoothquant_plus.method.scheme import find_scheme
from smoothquant_plus.models.checkpoint import INDEX, Checkpoint, read_linear
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.runtime import vllm as plugin
from smoothquant_plus.runtime.kernels import cpu
from smoothquant_plus.runtime.kernels import triton as kernels_of_triton

Out = Callable[[str, str], Path]
Theirs = Callable[..., Answer]

LAYER = "model.layers.0.mlp.down_proj"

plugin.register()
pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the kernels are not built")


def check(found: Answer, expected: Answer, scheme: str) -> None:
    """Equal but for rounding. vLLM computes norms and activation functions in another order, or with another formula (BLOOM, Gemma 2), and now and
    then an activation is rounded the other way. In nats, where a wrong scale changes the mean by more than 0.5."""
    difference = (found[0] - expected[0][: len(found[0])]).abs()
    largest, mean = (0.3, 0.05) if scheme in ("token", "static") else (0.01, 0.001)
    assert difference.max() < largest and difference.mean() < mean
    # Of two tokens that are as near as that, either may be the first, and others follow it then.
    tie = expected[0][-1].max() - expected[0][-1, found[1][0]] < largest
    assert found[1] == expected[1] or (tie and found[1][0] != expected[1][0])


# Every layout of every family; wrappers' text alone could be tried, see docs/formats.md.
WRAPPERS = {name for name, config in families.TINY.items() if hasattr(config, "vision_config")}
# What vLLM 0.32 does not run on CPUs, or answers otherwise than transformers, unquantized too: routers that are neither softmax alone nor in groups,
# values with heads of another size, a text alone that it knows inside a wrapper, linear attention and convolutions; and
# Solar Open's mixture, for which it has transformers' code alone, and refuses any that is quantized. State spaces were not tried.
ELSEWHERE = {
    "minimax-m2",
    "ernie4-5-moe-0-shared",
    "ernie4-5-moe-2-shared",
    "phimoe",
    "mimo-v2-flash",
    "mistral4",
    "solar-open",
    *families.HYBRID,
}
WIDE = [name.removeprefix("wide-") for name in families.TINY if name.startswith("wide-")]
LAYOUTS = [name for name in WIDE if name not in WRAPPERS | ELSEWHERE]
UNREAD = ("bloom", *families.LATENTS)  # with static activations
READ = [(family, scheme) for family in LAYOUTS for scheme in SCHEMES if scheme != "static" or family not in UNREAD]


@pytest.mark.parametrize(("family", "scheme"), READ)
def test_checkpoints_run_on_our_kernels(family: str, scheme: str, out: Out, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    if family in families.LATENTS and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's latent attention takes no float32 where there is AMX")
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


class Layer:
    """What vLLM asks a kernel about."""

    def __init__(self, input_symmetric: bool = True) -> None:
        self.input_symmetric = input_symmetric


@pytest.fixture
def additional_config(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """vLLM's, to be filled."""

    class Config:
        additional_config: ClassVar[dict[str, str]] = {}

    monkeypatch.setattr(plugin, "get_current_vllm_config_or_none", Config)
    return Config.additional_config


def test_what_our_kernels_lack_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch, additional_config: dict[str, str]) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin.log, "warning_once", lambda message, *words: said.append(message % words))
    assert plugin.Int8Kernel.can_implement(Layer(input_symmetric=False)) == (False, "asymmetric activations")
    monkeypatch.setattr(cpu, "missing", lambda: "not built")
    assert plugin.Int8Kernel.can_implement(Layer()) == (False, "not built")
    assert said == ["left to vLLM's own kernels: asymmetric activations", "left to vLLM's own kernels: not built"]
    additional_config["sqplus_kernels"] = "cpu"
    with pytest.raises(InputError, match="sqplus_kernels: cpu cannot run this model: not built"):
        plugin.Int8Kernel.can_implement(Layer())


def test_vllms_own_kernels_can_be_asked_for(additional_config: dict[str, str]) -> None:
    assert plugin.Int8Kernel.can_implement(Layer()) == (True, None)
    additional_config["sqplus_kernels"] = "vllm"
    able, reason = plugin.Int8Kernel.can_implement(Layer())
    assert not able and "unless its additional config says sqplus_kernels: cpu" in reason
    additional_config["sqplus_kernels"] = "triton"
    with pytest.raises(InputError, match="unknown sqplus_kernels 'triton' in vLLM's additional config: choose cpu or vllm"):
        plugin.Int8Kernel.can_implement(Layer())


def test_whose_kernels_a_model_has(out: Out, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(plugin, "keep", lambda layer, *_: made.append(layer))
    # With AMX vLLM's own product takes no float32.
    theirs(out("llama", "token"), dtype="bfloat16", additional_config={"sqplus_kernels": "vllm"})
    assert not made


def test_on_gpus_ours_have_to_be_asked_for(monkeypatch: pytest.MonkeyPatch, additional_config: dict[str, str]) -> None:
    """Decided without a GPU; there is none to run them on."""

    class Gpu:
        device_type = "cuda"

        def is_cpu(self) -> bool:
            return False

    monkeypatch.setattr(plugin, "current_platform", Gpu())
    able, reason = plugin.Int8Kernel.can_implement(Layer())
    assert not able and "unless its additional config says sqplus_kernels: triton" in reason
    additional_config["sqplus_kernels"] = "tirton"
    with pytest.raises(InputError, match="unknown sqplus_kernels 'tirton'"):
        plugin.Int8Kernel.can_implement(Layer())
    additional_config["sqplus_kernels"] = "triton"
    with pytest.raises(InputError, match="triton cannot run this model: "):
        plugin.Int8Kernel.can_implement(Layer())
    monkeypatch.setattr(kernels_of_triton, "supports", lambda *args: None)
    assert plugin.Int8Kernel.can_implement(Layer()) == (True, None)


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


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "token"), ("llama", "static"), ("qwen2", "asymmetric"), ("mixtral", "symmetric"), ("gemma4-moe", "token")],
)
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
    quantize(model, tmp_path / "out", activations="static", smooth="all", alpha=0.7, calibration=calibration, target="here")
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
    directory = beside(tiny("wide-llama"), out("llama", "token"), tmp_path / "model", SMOOTHING)
    factors = load_file(directory / SMOOTHING)
    save_file({**factors, "model.layers.9.input_layernorm": torch.ones(128)}, directory / SMOOTHING)
    with pytest.raises(InputError, match=r"'model.layers.9.input_layernorm' in .* is not of a norm or linear"):
        list(plugin.Quantizer(directory, {}).tensors())
    save_file({name: s[:64].clone() for name, s in factors.items()}, directory / SMOOTHING)
    with pytest.raises(InputError, match="are not 128 positive numbers"):
        list(plugin.Quantizer(directory, {}).tensors())


@pytest.mark.parametrize(("family", "scheme"), [("llama", "token"), ("mixtral", "asymmetric")])
def test_weights_are_reloaded(family: str, scheme: str, out: Out, theirs: Theirs, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Every layer's, experts' too, from another checkpoint into the engine that runs."""
    shutil.copytree(tiny(f"wide-{family}"), tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: tensor if tensor.ndim == 1 else -tensor for name, tensor in tensors.items()}, shard, {"format": "pt"})
    quantize(tmp_path / "model", tmp_path / "out", smooth="none", **SCHEMES[scheme])
    reloaded = theirs(
        out(family, scheme), then=lambda llm: llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "out")})
    )
    expected = theirs(tmp_path / "out")
    assert torch.equal(reloaded[0], expected[0]) and reloaded[1] == expected[1]


def test_reloading_a_model_that_is_not_ours(theirs: Theirs, tiny: Callable[..., Path]) -> None:
    found = theirs(tiny("wide-llama"), then=lambda llm: llm.collective_rpc("reload_weights"))
    check(found, ours(tiny("wide-llama")), "asymmetric")


def test_what_does_not_go_together(out: Out, theirs: Theirs, tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is smoothed, and an adapter's layers"):
        theirs(out("llama", "token"), enable_lora=True)
    smoothed = beside(tiny("wide-llama"), out("llama", "token"), tmp_path / "model", SMOOTHING)
    with pytest.raises(InputError, match="is smoothed, and an adapter's layers"):
        theirs(smoothed, quantization="sqplus", enable_lora=True)
    with pytest.raises(InputError, match="--load-format npcache does not quantize while loading"):
        theirs(tiny("wide-llama"), quantization="sqplus", load_format="npcache")


def test_zero_points_that_cannot_be_cut() -> None:
    """vLLM would cut between the eight zero points of one number, and round down."""

    class Layer:
        prefix, output_partition_sizes, tp_size = "model.layers.0.mlp.gate_up_proj", [684, 684], 2

    class Kernel:
        class config:
            zero_points = True

    with pytest.raises(InputError, match=r"gate_up_proj: zero points of \[684, 684\] output channels"):
        plugin.Int4Kernel.process_weights_after_loading(Kernel, Layer())


def test_zero_points_that_vllm_cannot_pack(tmp_path: Path) -> None:
    shape = {**families.LLAMA_SHAPE, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 12}
    LlamaForCausalLM(LlamaConfig(**shape, **families.COMMON)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"k_proj has 12: use symmetric"):
        plugin.Quantizer(tmp_path, {"group_size": 32})
    plugin.Quantizer(tmp_path, {"group_size": 32, "symmetric": True})


def test_the_cache_of_compiled_models_knows_the_kernels(out: Out, theirs: Theirs) -> None:
    known: list[Any] = []
    theirs(out("llama", "token"), then=lambda llm: known.append(llm.llm_engine.vllm_config.additional_config))
    assert known[0]["sqplus"].endswith(", None")


@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor has no bfloat16 products of ours")
@pytest.mark.parametrize("family", ["llama", "llama-mha-tied-biases"])
def test_a_bfloat16_head_runs_on_our_product(family: str, out: Out, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    channels: list[int] = []
    original = cpu.linear_bfloat16
    monkeypatch.setattr(cpu, "linear_bfloat16", lambda *arguments: channels.append(arguments[-1]) or original(*arguments))
    found = theirs(out(family, "token"), dtype="bfloat16")
    assert set(channels) == {-(-families.VOCABULARY // 64) * 64}  # as vLLM fills it up
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    expected = theirs(out(family, "token"), dtype="bfloat16")
    difference = (found[0] - expected[0]).abs()
    assert difference.max() <= 2.0**-5 and difference.mean() < 2.0**-9  # one unit in the last place of bfloat16 logits up to 8
    assert found[1] == expected[1]


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


SHARED = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    scheme: str
    loaded: bool  # quantized while it is loaded
    options: dict[str, Any]


@pytest.mark.parametrize(
    "case",
    [
        Case("in processes of its own", "llama", "static", True, {}),
        Case("compiled", "llama", "static", False, {"enforce_eager": False}),
        Case("compiled experts", "mixtral", "asymmetric", False, {"enforce_eager": False}),
        Case("in two workers", "llama", "static", False, SHARED),
        Case("in two workers", "qwen2", "asymmetric", True, SHARED),
        Case("experts in two workers", "mixtral", "asymmetric", False, SHARED),
    ],
    ids=lambda case: f"{case.name}-{case.family}-{case.scheme}",
)
def test_other_ways_to_run(case: Case, out: Out, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM finds the plugin by its entry point; what is quantized while loading goes to its processes too, and tensor parallelism shares the
    integers, their scales and their zero points out."""
    directory, options = out(case.family, case.scheme), case.options
    if case.loaded:
        directory = beside(tiny(f"wide-{case.family}"), directory, tmp_path / "model", SMOOTHING, STATISTICS)
        options = {**options, **on_load(case.scheme)}
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    logprobs, tokens = answer_of(script, directory, json.dumps(options))
    check((torch.tensor(logprobs), tokens), ours(out(case.family, case.scheme)), case.scheme)


def answer_of(script: Path, *arguments: str | Path) -> Any:
    """What the script prints after ANSWER."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=900)
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, done.stderr[-3000:]
    return json.loads(answers[0])


MEMORY = """
import json, sys, threading
from pathlib import Path
from serving import open_engine
from smoothquant_plus.runtime import vllm as plugin
def anonymous():
    "Bytes of this process that are not pages of files."
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
plugin.register()
load = plugin.Loader.load_model
def measured(self, *args, **kwargs):
    before, seen, done = anonymous(), [], threading.Event()
    def watch():
        while not done.wait(0.002):
            seen.append(anonymous() - before)
    thread = threading.Thread(target=watch)
    thread.start()
    model = load(self, *args, **kwargs)
    done.set()
    thread.join()
    print("ANSWER", json.dumps([max(seen), anonymous() - before]), flush=True)
    return model
plugin.Loader.load_model = measured
open_engine(Path(sys.argv[1]), quantization="sqplus", dtype="float16")
"""


def test_memory_while_loading(tmp_path: Path) -> None:
    """What is quantized so far, and no more than a block takes in the model's own float16."""
    layers = 4
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, **families.COMMON)).half()
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="60MB")
    families.make_tokenizer().save_pretrained(tmp_path / "model")
    script = tmp_path / "process.py"
    script.write_text(MEMORY)
    peak, after = answer_of(script, tmp_path / "model")
    quantized = (4 + 20 / 128) / 8 * layers * block  # a scale of 16 bits and a zero point of 4 for each group of 128
    assert quantized < after and peak < quantized + 2 * block
