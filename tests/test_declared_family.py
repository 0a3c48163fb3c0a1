"""Families that a user declares, with StableLM, which has no row: what docs/add-a-family.md walks through."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StableLmConfig
from typer.testing import CliRunner

import families
import smoothquant_plus.models.families as rows
from smoothquant_plus.cli import app
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.models.families import FAMILIES, Family, find_family

PAGE = (Path(__file__).parent.parent / "docs" / "add-a-family.md").read_text()
SHAPE = {**families.LLAMA_SHAPE, **families.COMMON, "num_key_value_heads": 2}
CONFIGS = {"one-after-the-other": StableLmConfig(**SHAPE), "parallel": StableLmConfig(**SHAPE, use_parallel_residual=True)}


def code(language: str) -> str:
    """The walk-through's only block of code in a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return str(block)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(families.TINY, "stablelm", CONFIGS[request.param])
    return families.write("stablelm", tmp_path / "MODEL")


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    path = tmp_path / "stablelm.json"
    path.write_text(code("json"))
    return path


def sqplus(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def calibrated(text_file: Path) -> tuple[object, ...]:
    return ("--text", text_file, "--samples", 4, "--seq-len", 32, "--alpha", 0.5)


def test_from_end_to_end(model: Path, declared: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    commands = [
        ("quantize", model, out, "--smooth", "all", "--pairs", declared, *calibrated(text_file)),
        ("verify", out, "--against", model),
        ("generate", out, "--prompt", "12 times", "--max-new-tokens", 2),
        ("inspect", out),
        ("plot", out),
    ]
    for command in commands:
        result = sqplus(*command)
        assert result.exit_code == 0, result.output
    assert json.loads((out / "plan.json").read_text())["family"] == "declared"
    assert (out / "family.json").read_text() == declared.read_text()


def test_in_the_models_directory(model: Path, declared: Path, text_file: Path, tmp_path: Path) -> None:
    declared.rename(model / "family.json")
    assert sqplus("eval", model, "--text", text_file, "--seq-len", 64).exit_code == 0
    assert sqplus("calibrate", model, tmp_path / "s.safetensors", *calibrated(text_file)[:-2]).exit_code == 0
    assert sqplus("quantize", model, tmp_path / "OUT", *calibrated(text_file)).exit_code == 0


def test_a_wrong_declaration_is_not_accepted(model: Path, declared: Path, text_file: Path, tmp_path: Path) -> None:
    wrong = json.loads(declared.read_text())
    for pair in wrong["pairs"]:
        pair["sinks"] = [sink for sink in pair["sinks"] if sink != "self_attn.v_proj"]
    declared.write_text(json.dumps(wrong))
    result = sqplus("quantize", model, tmp_path / "OUT", "--pairs", declared, *calibrated(text_file))
    assert result.exit_code == 3 and "changed the function of model.layers.0" in result.stderr
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_ofset": 1.0}, "norm_ofset"),
        ({"blocks": 3}, "blocks"),
        (
            {"pairs": [{"source": "input_layernorm", "sinks": ["self_attn.qproj"]}]},
            "no 'self_attn.qproj'. Did you mean 'self_attn.q_proj'?",
        ),
        ({"pairs": [{"source": "self_attn.v_proj", "sinks": ["self_attn.o_proj"], "rows": "most"}]}, "pairs.0.rows"),
        ({"blocks": "model.layer"}, "no list of blocks at 'model.layer'"),
        ({"pairs": [{"source": "input_layernorm", "sinks": ["self_attn.q_proj"], "requires": {"no_such_key": 1}}]}, "no_such_key"),
        ({"disk_names": [["(", "x"]]}, "not what re.sub takes"),
        ({"disk_names": [["model", "\\9"]]}, "not what re.sub takes"),
        ({"pairs": [{"source": "mlp", "sinks": ["mlp.up_proj"]}]}, "neither a norm nor a linear layer"),
        ({"pairs": [{"source": "input_layernorm", "sinks": ["post_attention_layernorm"]}]}, "post_attention_layernorm"),
        ({"pairs": [{"source": "input_layernorm", "sinks": ["mlp"]}]}, "not a linear layer"),
        ({"pairs": [{"source": "input_layernorm", "sinks": []}]}, "pairs.0.sinks"),
        ({"pairs": []}, "has no pair"),
        ({"alpha": 5}, "alpha"),
        ({"norm_offset": float("nan")}, "norm_offset"),
        (
            {"unquantized": ["mlp.up_proj"], "pairs": [{"source": "mlp.up_proj", "sinks": ["mlp.down_proj"]}]},
            "'mlp.up_proj' is the source of a pair, and left unquantized",
        ),
        ({"unquantized": ["mlp.gate_projj"]}, "leaves 'mlp.gate_projj' unquantized"),
        ({"unquantized": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]}, "quantized"),
        ({"refuse": [{"when": {"hidden_size": 64}, "reason": "it is small"}]}, "it is small"),
        ({"returns_tuple": True}, "returns_tuple"),
        ("not json", "does not declare a family"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_bad_declarations(change: Any, says: str, model: Path, declared: Path, text_file: Path, tmp_path: Path) -> None:
    if change is None:
        declared.unlink()
    else:
        declared.write_text(change if isinstance(change, str) else json.dumps(json.loads(declared.read_text()) | change))
    result = sqplus("quantize", model, tmp_path / "OUT", "--pairs", declared, *calibrated(text_file))
    assert result.exit_code == 2 and says in result.stderr, result.stderr
    assert not list(tmp_path.glob("*OUT*"))


def test_an_unknown_family_is_refused_with_the_nearest(model: Path, text_file: Path, tmp_path: Path) -> None:
    result = sqplus("quantize", model, tmp_path / "OUT", *calibrated(text_file))
    assert result.exit_code == 2
    parallel = json.loads((model / "config.json").read_text())["use_parallel_residual"]
    assert f"The nearest is '{'cohere' if parallel else 'llama'}'" in result.stderr and "--pairs" in result.stderr


def test_the_walk_through(model: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row, in at most 20 lines, is exact."""
    row = code("python")
    assert len(row.splitlines()) <= 20
    found: dict[str, Family] = eval(f"{{{row}}}", vars(rows).copy())
    (name,) = found
    assert name not in FAMILIES
    monkeypatch.setitem(FAMILIES, name, found[name])
    assert find_family(Decoder(Checkpoint(model)).config)[0] == name
    exact = families.write("stablelm", model.parent / "float64", torch.float64)
    assert families.change_by_smoothing(exact, torch.float64, "all") < 1e-9
