"""What is written for vLLM is what it reads, and what it could not read is refused before any work: `--for vllm`, the default."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig
from typer.testing import CliRunner

import families
from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.inspection import inspect
from smoothquant_plus.method.scheme import find_scheme
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.models.vllm_limits import check_for_vllm
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.load import load
from smoothquant_plus.verification import MANIFEST, verify

WRAPPERS = ("llava", "llava-next", "gemma3-vision", "mistral3")
BFLOAT16 = ("gemma2", "gemma3", "glm4", "gemma3-vision")
W4A16: dict[str, Any] = {"name": "w4a16", "group_size": 32}
SYMMETRIC: dict[str, Any] = {**W4A16, "symmetric": True}


@pytest.fixture(scope="module")
def decoder(tiny: Callable[..., Path]) -> Callable[..., Decoder]:
    return functools.cache(lambda name, dtype=torch.float16: Decoder(Checkpoint(tiny(name, dtype))))


# What is refused, why, and what would do.
STATIC: dict[str, Any] = {"name": "w8a8", "activations": "static"}
PER_TENSOR: dict[str, Any] = {"name": "w8a8", "weights": "tensor"}
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"name": "w8a8", "activations": "tensor"}, "dynamic per-tensor INT8 activations", "--activations token"),
    *((name, STATIC, "no experts with static activations", "--activations token") for name in families.MIXTURES),
    *((name, PER_TENSOR, "no INT8 weights with one scale for all", "--weights channel") for name in families.MIXTURES),
    ("bloom", STATIC, "cannot cut a static scale", "--activations token"),
    ("bloom", PER_TENSOR, "cannot cut a scale of the whole weight", "--weights channel"),
    ("llama", {**W4A16, "lm_head": "w4a16"}, "zero points .* lm_head has 257", "--symmetric"),
    *(
        (name, {"name": "w8a8", "lm_head": "w8a8"}, "cannot have a quantized output head", "leave out --lm-head")
        for name in ("bloom", "gemma2", "opt", "opt-gelu-untied")
    ),
    ("cohere", {**SYMMETRIC, "lm_head": "w4a16"}, "cannot have a quantized output head", "leave out --lm-head"),
]


@pytest.mark.parametrize(("name", "options", "reason", "instead"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_what_vllm_could_not_read_is_refused_with_what_it_could(
    name: str, options: dict[str, Any], reason: str, instead: str, decoder: Callable[..., Decoder]
) -> None:
    with pytest.raises(InputError, match=f"vLLM could not read .*{reason}.*{instead}.*--for here"):
        check_for_vllm(decoder(name), find_scheme(**options))
    if instead.startswith("leave out"):
        better = {key: value for key, value in options.items() if key != "lm_head"}
    else:
        option, _, value = instead.removeprefix("--").partition(" ")
        better = {**options, option: value or True}
    check_for_vllm(decoder(name), find_scheme(**better))


def test_all_reasons_are_given_at_once(decoder: Callable[..., Decoder]) -> None:
    with pytest.raises(InputError, match=r"use --activations token; .*use --weights channel\. Or give --for here"):
        check_for_vllm(decoder("mixtral"), find_scheme("w8a8", "static", "tensor"))


def test_zero_points_of_small_heads_of_bloom(tmp_path: Path, decoder: Callable[..., Decoder]) -> None:
    config = BloomConfig(hidden_size=96, n_layer=1, n_head=8, **families.COMMON)
    families.AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path)
    narrow = Decoder(Checkpoint(tmp_path))
    with pytest.raises(InputError, match="8 does not divide the channels of a head: use --symmetric"):
        check_for_vllm(narrow, find_scheme(**W4A16))
    for options in (SYMMETRIC, {"name": "w8a8"}):
        check_for_vllm(narrow, find_scheme(**options))


@pytest.mark.parametrize("name", families.TINY)
def test_every_family_can_be_made_for_vllm(name: str, decoder: Callable[..., Decoder]) -> None:
    """And what holds on some machines only is said."""
    schemes = [find_scheme("w8a8"), find_scheme(**W4A16), find_scheme(**SYMMETRIC)]
    if name not in (*families.MIXTURES, "bloom"):
        schemes += [find_scheme("w8a8", "static"), find_scheme("w8a8", "static", "tensor")]
    for scheme in schemes:
        notes = check_for_vllm(decoder(name), scheme)
        assert any("a CPU without AMX" in note for note in notes) == (name in families.MIXTURES)
        assert any("refuses to run this family in float16" in note for note in notes) == (name in BFLOAT16)
        narrow = scheme.name == "w4a16" and name in families.LATENTS
        assert any("kv_a_proj_with_mqa has 40: a GPU can run this" in note for note in notes) == narrow
        assert all(note.startswith("vLLM: ") for note in notes)
    if name in BFLOAT16:
        assert not check_for_vllm(decoder(name, torch.bfloat16), schemes[0])


def test_it_is_said_before_the_work_and_changes_no_byte(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {target: quantize(tiny("mixtral"), tmp_path / target, calibration=calibration, target=target) for target in ("vllm", "here")}
    assert found["vllm"].notes[0].startswith("vLLM: on a CPU without AMX") and found["vllm"].notes[1:] == found["here"].notes
    assert (tmp_path / "vllm" / MANIFEST).read_bytes() == (tmp_path / "here" / MANIFEST).read_bytes()
    capsys.readouterr()
    again = quantize(tiny("mixtral"), tmp_path / "here", calibration=calibration)  # the same recipe: nothing to do
    assert again.notes == found["vllm"].notes and "vLLM: on a CPU without AMX" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--activations", "tensor"), "use --activations token. Or give --for here"),
        (("--activations", "tensor", "--for", "vllm"), "use --activations token"),
        (("--for", "vlm"), "unknown --for 'vlm': choose vllm or here. Did you mean 'vllm'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_refusal_comes_before_any_work(arguments: tuple[str, ...], said: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(tiny()), str(tmp_path / "OUT"), "--smooth", "none", *arguments])
    assert result.exit_code == 2 and said in result.stderr.replace("\n", " ") and not list(tmp_path.iterdir())


def test_for_here_everything_is_made(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    result = CliRunner().invoke(app, ["quantize", str(tiny()), str(out), "--smooth", "none", "--activations", "tensor", "--for", "here"])
    assert result.exit_code == 0, result.stderr
    verify(out, tiny())


@pytest.mark.parametrize("symmetric", [False, True])
@torch.no_grad()
def test_bloom_is_stored_so_that_vllm_can_cut_it(symmetric: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its loader cuts every tensor of query_key_value into heads, each with its query, key and value, and puts all queries first: what is
    packed too, so the packed weight must stand for the weight that was cut."""
    source, out = tiny("bloom"), tmp_path / "out"
    quantize(source, out, scheme="w4a16", group_size=32, symmetric=symmetric, smooth="none")
    verify(out, source)
    stored = Checkpoint(out)
    if not symmetric:
        assert stored.nbytes == inspect(source).sizes["w4a16, groups of 32"]
    shapes = [name.removesuffix(".weight_shape") for name in stored.tensors if name.endswith("weight_shape")]
    assert len(shapes) == 3 * 2 and not any(name.endswith("query_key_value") for name in shapes)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.view(families.TINY["bloom"].n_head, 3, -1, *tensor.shape[1:])
        return heads.transpose(0, 1).reshape(tensor.shape)

    def unpacked(packed: torch.Tensor) -> torch.Tensor:
        return ((packed.contiguous()[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2).float()

    def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        names = {name.rpartition(".")[2]: name for name in stored.tensors if "h.0.self_attention.query_key_value" in name}
        tensors = {suffix: change(stored.read(name)) for suffix, name in names.items()}
        zero = torch.tensor(8.0) if symmetric else unpacked(tensors["weight_zero_point"].t()).t()[..., None]
        return ((unpacked(tensors["weight_packed"]).unflatten(1, (-1, 32)) - zero) * tensors["weight_scale"].float()[..., None]).flatten(1)

    whole = weight(lambda tensor: tensor)
    original = Checkpoint(source).read("transformer.h.0.self_attention.query_key_value.weight").float()
    assert families.relative(whole, original) < 0.15
    assert torch.equal(weight(cut), cut(whole)) and not torch.equal(whole, cut(whole))
    assert (
        families.relative(load(out, dtype=torch.float32)(families.IDS).logits, load(source, dtype=torch.float32)(families.IDS).logits)
        < 0.35
    )


# What vLLM's own classes of these models do to the names of `ignore`, and what they call the first linear layer of the vision tower.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
FIRST = dict.fromkeys(WRAPPERS, "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj") | {
    "mistral3": "vision_tower.transformer.layers.0.attention.q_proj"
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_stays_as_it_is_in_a_wrapper_is_named_for_both_readers(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny(name), tmp_path / "out", smooth="none")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignored) == len(set(ignored)) and {"lm_head", "language_model.lm_head"} <= set(ignored)
    theirs = families.auto_class(families.TINY[name]).from_pretrained(tiny(name))
    outside = {
        path for path, module in theirs.named_modules() if isinstance(module, torch.nn.Linear) and "language_model.layers" not in path
    }
    assert outside <= set(ignored)
    vllm = {next((new + path.removeprefix(old) for old, new in RENAMED.items() if path.startswith(old)), path) for path in ignored}
    towers = {re.sub(r"^model\.", "", path) for path in outside if "vision_tower" in path}
    middle = FIRST[name].removeprefix("vision_tower.").split(".")[0]
    for tower in towers:
        called = tower if middle == "transformer" else tower.replace("vision_tower.", "vision_tower.vision_model.")
        assert called in vllm
    assert FIRST[name] in vllm
