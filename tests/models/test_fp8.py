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
from smoothquant_plus.models.checkpoint import CONFIG, Checkpoint
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
    name: str, size: list[int] | None, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
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


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_experts_in_one_tensor_in_fp8(transposed: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    fp8, meant = publish(tiny("qwen3-moe", torch.bfloat16), tmp_path, [16, 16])
    stored = load_file(fp8 / "model.safetensors")
    stored = {name: tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor for name, tensor in stored.items()}  # what can be joined
    tensors = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for path, suffix in {
        (name.split(".experts.")[0], "_scale_inv" * name.endswith("_scale_inv")) for name in stored if ".experts." in name
    }:
        gate, up, down = (
            [stored[f"{path}.experts.{expert}.{part}_proj.weight{suffix}"] for expert in range(4)] for part in ("gate", "up", "down")
        )
        for kind, tensor in (
            ("gate_up_proj", torch.stack([torch.cat(both) for both in zip(gate, up, strict=True)])),
            ("down_proj", torch.stack(down)),
        ):
            tensors[f"{path}.experts.{kind}{suffix}"] = tensor.mT if transposed else tensor
    tensors = {name: (tensor.view(FP8) if tensor.dtype == torch.uint8 else tensor).contiguous() for name, tensor in tensors.items()}
    (fp8 / "model.safetensors").unlink()
    save_file(tensors, fp8 / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(fp8, dtype=torch.float32)(families.IDS).logits, load(meant, dtype=torch.float32)(families.IDS).logits)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([16, 16], r"down_proj.weight_scale_inv' in .* has shape \(2, 3\), .*\(64, 96\) in blocks of \(16, 16\)"),
        ([0, 1], "weight_block_size"),
    ],
)
def test_scales_of_other_blocks(size: list[int], message: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    fp8, _ = publish(tiny("llama", torch.bfloat16), tmp_path, [32, 32])
    change_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(InputError, match=message):
        load(fp8)
