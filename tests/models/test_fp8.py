"""Models that are published in FP8 with a scale for each block of weights: read as what those stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.inspection import inspect
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import CONFIG, INDEX, Checkpoint
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.verification import verify

FP8 = torch.float8_e4m3fn


def in_blocks(weight: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in FP8, its scales, and what the two stand for: block by block, as slowly as it is said."""
    stored, stands_for = torch.empty_like(weight, dtype=FP8), torch.empty_like(weight, dtype=torch.float32)
    scales = torch.empty(-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[block].float().abs().max() / 448
            stored[block] = (weight[block].float() / scales[i, j]).to(FP8)
            stands_for[block] = stored[block].float() * scales[i, j]
    return stored, scales, stands_for


def publish(source: Path, directory: Path, size: list[int] | None) -> tuple[Path, Path]:
    """The model in `source` as it is published, with each linear layer of its blocks in FP8; and what that stands for, in float32."""
    decoder = Decoder(Checkpoint(source))
    linear = {decoder.disk_name(f"{decoder.path(i)}.{name}.weight") for i in range(len(decoder)) for name in decoder.linears(i)}
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name in decoder.checkpoint.tensors:
        tensor = decoder.checkpoint.read(name)
        if name in linear:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = in_blocks(tensor, *(size or tensor.shape))
            if size is None:
                stored[f"{name}_scale_inv"] = stored[f"{name}_scale_inv"].reshape(())
                stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.01)  # as Ministral 3
        else:
            stored[name], meant[name] = tensor, tensor.float()
    for path, tensors in ((directory / "fp8", stored), (directory / "meant", meant)):
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    change_config(directory / "fp8", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size})
    return directory / "fp8", directory / "meant"


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", [32, 40]), ("llama", None), ("deepseek-v3", [32, 32]), ("minimax-m2", [48, 32]), ("gpt2", [32, 32])],
    ids=lambda value: value if isinstance(value, str) else "whole" if value is None else "x".join(map(str, value)),
)
def test_what_is_published_in_fp8(
    name: str,
    size: list[int] | None,
    tiny: Callable[..., Path],
    calibration: Calibration,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loaded, quantized and verified as the float32 model that it stands for, to the last bit."""
    fp8, meant = publish(tiny(name, torch.bfloat16), tmp_path, size)
    with torch.no_grad():
        assert torch.equal(load(fp8, dtype=torch.float32)(families.IDS).logits, load(meant, dtype=torch.float32)(families.IDS).logits)
    assert inspect(fp8).quantized is None
    outs = []
    for source in (fp8, meant):
        outs.append(tmp_path / f"{source.name}-out")
        quantize(source, outs[-1], activations="static", smooth="none", target="here", calibration=calibration)
        verify(outs[-1], source)
        assert ("is stored in FP8" in capsys.readouterr().err) == (source == fp8)
    ours, theirs = map(Checkpoint, outs)
    assert ours.tensors.keys() == theirs.tensors.keys() and not any("scale_inv" in each for each in ours.tensors)
    for each, info in ours.tensors.items():
        assert torch.equal(ours.read(each).float(), theirs.read(each).float())
        assert info.dtype in (torch.int8, torch.float32 if each.endswith("_scale") else torch.bfloat16)
    assert ours.config["quantization_config"]["quant_method"] == "compressed-tensors"
    quantize(fp8, tmp_path / "smoothed", smooth="all", alpha=0.6, scheme="w4a16", group_size=32, target="here", calibration=calibration)
    assert verify(tmp_path / "smoothed", fp8).equivalence_error < 2e-3
    scales = [info.dtype for each, info in Checkpoint(tmp_path / "smoothed").tensors.items() if each.endswith("weight_scale")]
    assert set(scales) == {torch.bfloat16}


def test_transformers_reads_the_same(tiny: Callable[..., Path], tmp_path: Path) -> None:
    fp8, _ = publish(tiny("llama", torch.bfloat16), tmp_path, [32, 32])
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16)
    ours = load(fp8).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize(
    ("size", "transposed", "halves"),
    [([16, 16], False, 1), ([16, 16], True, 1), (None, False, 1), (None, False, 2), (None, True, 1)],
    ids=["rows", "columns", "one scale", "a scale for each half", "columns, one scale"],
)
def test_experts_in_one_tensor_in_fp8(
    size: list[int] | None, transposed: bool, halves: int, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    """With static scales of inputs as Mistral 4 has them; nothing of all that is left in the output."""
    fp8, meant = publish(tiny("qwen3-moe", torch.bfloat16), tmp_path, size)
    stored, float32 = load_file(fp8 / "model.safetensors"), load_file(meant / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for path in {name.split(".experts.")[0] for name in stored if ".experts." in name}:
        names = [[f"{path}.experts.{e}.{part}_proj.weight" for part in ("gate", "up")] for e in range(4)]
        downs = [f"{path}.experts.{e}.down_proj.weight" for e in range(4)]
        if size is None and halves == 1:  # one scale for both
            for gate, up in names:
                both, scale, means = in_blocks(torch.cat([float32[gate], float32[up]]), 2 * len(float32[up]), float32[up].shape[1])
                for name, part, mean in zip((gate, up), both.view(torch.uint8).chunk(2), means.chunk(2), strict=True):
                    stored[name], stored[f"{name}_scale_inv"], float32[name] = part.view(FP8), scale, mean.clone()
        for kind, of_experts in (("gate_up_proj", names), ("down_proj", [[down] for down in downs])):
            weight = torch.stack([torch.cat([stored[name].view(torch.uint8) for name in own]) for own in of_experts])
            scales = torch.stack(
                [
                    torch.cat([torch.atleast_2d(stored[f"{name}_scale_inv"]) for name in own[: halves if size is None else 2]])
                    for own in of_experts
                ]
            )
            tensors[f"{path}.experts.{kind}"] = (weight.mT if transposed else weight).contiguous().view(FP8)
            tensors[f"{path}.experts.{kind}_scale_inv"] = (scales.mT if transposed else scales).contiguous()
            tensors[f"{path}.experts.{kind}_activation_scale"] = torch.ones(4)
    save_file(tensors, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(float32, meant / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(fp8, dtype=torch.float32)(families.IDS).logits, load(meant, dtype=torch.float32)(families.IDS).logits)
    quantize(fp8, tmp_path / "out", calibration=calibration)
    verify(tmp_path / "out", fp8)
    assert not any(name.endswith(("_inv", "activation_scale")) for name in Checkpoint(tmp_path / "out").tensors)


def test_experts_that_the_model_has_no_place_for(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A stack of matrices in FP8 that stays together: as what it stands for, in 16 bits."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama", torch.bfloat16), source)
    weight, scales = torch.randn(3, 8, 6).to(FP8), torch.rand(3, 2, 2)
    save_file({"mtp.stack": weight, "mtp.stack_scale_inv": scales}, source / "extra.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(("mtp.stack", "mtp.stack_scale_inv"), "extra.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    change_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [4, 3]})
    quantize(source, tmp_path / "out", smooth="none")
    found = Checkpoint(tmp_path / "out").read("mtp.stack")
    expected = weight.float() * scales.repeat_interleave(4, 1).repeat_interleave(3, 2)
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([16, 16], r"down_proj.weight' in .* have shape \(2, 3\), .*\(64, 96\) in blocks of \(16, 16\)"),
        ([0, 1], "weight_block_size"),
    ],
)
def test_scales_of_other_blocks(size: list[int], message: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    fp8, _ = publish(tiny("llama", torch.bfloat16), tmp_path, [32, 32])
    change_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(InputError, match=message):
        load(fp8)
