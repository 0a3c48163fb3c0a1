"""Mixtures of experts: what the tiny models in test_families.py do not reach."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import families
from smoothquant_plus.errors import VerificationError
from smoothquant_plus.method.statistics import ChannelMaxima
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import INDEX, Checkpoint
from smoothquant_plus.models.experts import recorded, repeated, share_with_unreached, tokens_of_experts, unfuse
from smoothquant_plus.models.families import FAMILIES, find_family
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.models.transform import smooth_block
from smoothquant_plus.pipeline import calibrate, quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.verification import verify


def test_an_unreached_expert_has_the_maxima_of_the_others() -> None:
    measured = {
        "mlp.experts.0.up_proj": ChannelMaxima(torch.tensor([1.0, 4.0]), tokens=3),
        "mlp.experts.1.up_proj": ChannelMaxima(torch.tensor([2.0, 3.0]), tokens=1),
        "mlp.experts.2.up_proj": ChannelMaxima.empty(2),
        "mlp.experts.2.down_proj": ChannelMaxima.empty(1),
        "mlp.experts.0.down_proj": ChannelMaxima(torch.tensor([9.0]), tokens=3),
        "q_proj": ChannelMaxima(torch.tensor([7.0, 7.0]), tokens=4),
    }
    share_with_unreached(measured)
    assert measured["mlp.experts.2.up_proj"].maxima.tolist() == [2.0, 4.0]
    assert measured["mlp.experts.2.down_proj"].maxima.tolist() == [9.0]
    assert measured["mlp.experts.0.up_proj"].maxima.tolist() == [1.0, 4.0]
    assert tokens_of_experts(measured) == {"mlp.experts": [3, 1, 0]}


def test_an_unknown_layout_of_experts_is_an_error() -> None:
    fused = nn.Module()
    fused.gate_up_proj = nn.Parameter(torch.empty(2, 8, 6))  # (E, hidden, 2 * intermediate): the other way round
    fused.down_proj = nn.Parameter(torch.empty(2, 8, 3))
    with pytest.raises(ValueError, match="laid out in a way that is not known"):
        unfuse(nn.ModuleDict({"experts": fused}))


def test_experts_that_compute_something_else_are_an_error() -> None:
    """DeepSeek-V4's clamp what Mixtral's do not."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    with torch.device("meta"):
        fused = DeepseekV4Experts(DeepseekV4Config(hidden_size=8, intermediate_size=4, moe_intermediate_size=4, n_routed_experts=4))
    with pytest.raises(ValueError, match="compute something else"):
        unfuse(nn.ModuleDict({"experts": fused}))


def test_a_correction_of_the_router_keeps_its_dtype(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """DeepSeek-V3's is stored in float32 among 16-bit weights: rounded, it would make ties of experts."""
    model = load(tiny("deepseek-v3", torch.bfloat16))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = 5 + 0.02 * torch.randn(4)
    model.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias = exact
    source = families.save(model, tiny("deepseek-v3", torch.bfloat16), tmp_path / "source")
    quantize(source, tmp_path / "out", calibration=replace(calibration, compute_dtype="checkpoint"))
    for directory in (source, tmp_path / "out"):
        assert torch.equal(load(directory, dtype=torch.bfloat16).state_dict()[name], exact)
    with Decoder(Checkpoint(source), torch.bfloat16).block(1) as block:
        assert torch.equal(block.state_dict()["mlp.gate.e_score_correction_bias"], exact)


def test_statistics_of_experts_that_another_tools_text_did_not_reach(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = calibrate(tiny("mixtral"), tmp_path / "s.safetensors", calibration=Calibration(str(text_file), samples=2, seq_len=32))
    found = load_file(statistics)
    expert = "model.layers.0.mlp.experts.2"
    zeros = {name: torch.zeros_like(maxima) if name.startswith(f"{expert}.") else maxima for name, maxima in found.items()}
    save_file(zeros, tmp_path / "zeros.safetensors")
    out = tmp_path / "out"
    given = Calibration(statistics=tmp_path / "zeros.safetensors")
    result = quantize(tiny("mixtral"), out, activations="static", target="here", calibration=given)
    assert "1 experts have maxima of zero" in capsys.readouterr().err
    assert not any("were reached by no token" in note for note in result.notes)
    used = load_file(out / STATISTICS)
    others = [used[f"model.layers.0.mlp.experts.{number}.up_proj"] for number in (0, 1, 3)]
    assert torch.equal(used[f"{expert}.up_proj"], torch.stack(others).amax(dim=0))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-5-moe-vision", "deepseek-v3"])
def test_experts_that_lie_in_one_tensor(
    name: str, transposed: bool, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    """As Qwen3.5 and Qwen3-VL store them: read one by one, and quantized to the same bits as experts that are stored one by one."""
    apart, together = tiny(name), tmp_path / "together"
    checkpoint = Checkpoint(apart)
    tensors = {disk: checkpoint.read(disk) for disk in checkpoint.tensors if ".experts." not in disk}
    for path in {disk.split(".experts.")[0] for disk in checkpoint.tensors if ".experts." in disk}:
        each = [{p: checkpoint.read(f"{path}.experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(4)]
        fused = {
            "gate_up_proj": torch.stack([torch.cat([expert["gate"], expert["up"]]) for expert in each]),
            "down_proj": torch.stack([expert["down"] for expert in each]),
        }
        for kind, tensor in fused.items():
            tensors[f"{path}.experts.{kind}"] = tensor.mT.contiguous() if transposed else tensor
    shutil.copytree(apart, together, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, together / "model.safetensors", metadata={"format": "pt"})

    with torch.no_grad():
        expected = load(apart, dtype=torch.float32)(families.IDS).logits
        assert torch.equal(load(together, dtype=torch.float32)(families.IDS).logits, expected)
    outs = []
    for source in (apart, together):
        outs.append(tmp_path / f"{source.name}-out")
        quantize(source, outs[-1], smooth="all", activations="static", target="here", calibration=calibration)
        verify(outs[-1], source)
    one, other = map(Checkpoint, outs)
    assert one.tensors.keys() == other.tensors.keys() and all(torch.equal(one.read(each), other.read(each)) for each in one.tensors)


def test_statistics_may_have_the_checkpoints_names(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """As SmoothQuant's own script saves them, of models whose modules were called so."""
    given = calibrate(tiny("mixtral"), tmp_path / "s.safetensors", calibration=Calibration(str(text_file), samples=2, seq_len=32))
    renamed = {
        FAMILIES["mixtral"].spellings(f"{name}.weight")[-1].removesuffix(".weight"): maxima for name, maxima in load_file(given).items()
    }
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in renamed
    save_file(renamed, tmp_path / "renamed.safetensors")
    results = []
    for name in ("s", "renamed"):
        statistics = Calibration(statistics=tmp_path / f"{name}.safetensors")
        quantize(tiny("mixtral"), tmp_path / name, calibration=statistics)
        results.append(load_file(tmp_path / name / SMOOTHING))
    assert results[0].keys() == results[1].keys() and all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_blocks_beyond_the_last_stay_as_they_are(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Those for speculative decoding, which transformers' classes have no place for: carried along, and not to be taken for quantized."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("deepseek-v3"), source)
    name = "model.layers.2.self_attn.o_proj.weight"
    extra = {name: torch.ones(64, 64, dtype=torch.float16), "model.layers.2.enorm.weight": torch.ones(64, dtype=torch.float16)}
    extra["mtp.fc.weight"] = torch.ones(64, 128, dtype=torch.float16)
    save_file(extra, source / "extra.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    quantize(source, out, smooth="none")
    assert torch.equal(Checkpoint(out).read(name), extra[name])
    ignored = Checkpoint(out).config["quantization_config"]["ignore"]
    assert {"model.layers.2.self_attn.o_proj", "mtp.fc"} <= set(ignored) and not any(
        "enorm" in each or "layers.1.self_attn" in each for each in ignored
    )
    assert load(out) is not None


@pytest.mark.parametrize("name", families.MIXTURES)
def test_experts_that_no_text_reached(name: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """They are counted, reported, and quantized with statistics that are not zero; verify makes the same again."""
    out = tmp_path / "out"
    little = Calibration(str(text_file), samples=1, seq_len=2)
    found = quantize(tiny(name), out, activations="static", smooth="all", target="here", calibration=little)
    unreached = [count for block in json.loads((out / "plan.json").read_text())["blocks"] for count in counts(block) if count == 0]
    assert unreached
    assert any(note.startswith(f"{len(unreached)} of ") for note in found.notes)
    assert all(bool((maxima > 0).any()) for maxima in load_file(out / STATISTICS).values())
    verify(out, tiny(name))


def counts(block: dict[str, dict[str, dict[str, list[int]]]]) -> list[int]:
    return [count for tokens in block.get("experts", {}).get("tokens", {}).values() for count in tokens]


@pytest.mark.parametrize("name", families.MIXTURES)
@pytest.mark.parametrize("forgotten", [r"\.(gate|router)$", r"(experts\.\*\.up_proj|latent_proj)$"], ids=["router", "experts"])
def test_a_forgotten_reader_is_caught(
    name: str, forgotten: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = find_family(families.TINY[name])
    row = FAMILIES[family]
    pairs = tuple(replace(pair, sinks=tuple(sink for sink in pair.sinks if not re.search(forgotten, sink))) for pair in row.pairs)
    if pairs == row.pairs:
        pytest.skip("its router does not read the norm")
    monkeypatch.setitem(FAMILIES, family, replace(row, pairs=pairs))
    with pytest.raises(VerificationError, match="changed the function of"):
        quantize(tiny(name), tmp_path / "out", alpha=0.7, calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_a_router_is_rescaled_without_rounding(tiny: Callable[..., Path]) -> None:
    directory = tiny("mixtral", torch.float16)
    decoder = Decoder(Checkpoint(directory))
    with decoder.block(0) as block, torch.no_grad():
        before = block.get_submodule("mlp.gate").weight.clone()
        maxima = {name: torch.rand(linear.in_features) * 100 for name, linear in decoder.linears(0).items()}
        smoothed = smooth_block(decoder, 0, block, decoder.family.pairs, maxima, 0.5)
        (pair,) = (pair for pair in smoothed if "mlp.gate" in pair.sinks)
        after = block.get_submodule("mlp.gate").weight
        assert torch.equal(after.half().float(), after) and torch.equal(after / pair.s, before)


def test_a_tie_between_experts_is_no_change(tiny: Callable[..., Path]) -> None:
    """The repetition sends each token where it went before, and counts those that wanted to go elsewhere."""
    directory = tiny("mixtral", torch.float32)
    decoder = Decoder(Checkpoint(directory))
    stream = decoder.embed([families.IDS])
    with decoder.block(0) as block, torch.no_grad():
        router = block.get_submodule("mlp.gate")
        router.weight[1] = router.weight[0]
        with recorded(block) as routing:
            before = decoder.run(block, 0, stream, 0)
        router.weight[1] += 1e-6 * torch.randn_like(router.weight[1])  # what was a tie now goes either way
        with repeated(block, routing):
            after = decoder.run(block, 0, stream, 0)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert routing.tokens == families.IDS.numel()


def test_an_expert_is_stored_under_the_name_of_the_source(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    source, out = tiny("mixtral"), tmp_path / "out"
    quantize(source, out, calibration=calibration)
    tensors = Checkpoint(out).tensors
    assert tensors.keys() >= Checkpoint(source).tensors.keys()
    assert tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"].dtype == torch.int8
    assert tensors["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.float16
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.gate" in ignored
    assert load(out).model.layers[0].mlp.experts[3].gate_proj.scheme.name == "w8a8"
