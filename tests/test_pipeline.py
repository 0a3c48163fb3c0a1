from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import families
from smoothquant_plus import blockwise, pipeline, preparation
from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.models import blocks, transform
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.models.families import FAMILIES, Pair
from smoothquant_plus.pipeline import calibrate, quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.verification import MANIFEST, verify
from smoothquant_plus.workspace import Workspace


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blocks_may_run_in_the_checkpoints_own_dtype(
    dtype: torch.dtype, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    """The maxima then come from 16-bit activations; the proof is in float32 all the same."""
    source = tiny("llama", dtype)
    results = {}
    for compute in ("float32", "checkpoint"):
        results[compute] = quantize(source, tmp_path / compute, calibration=replace(calibration, compute_dtype=compute))
        assert results[compute].equivalence_error < 1e-5
        verify(tmp_path / compute, source)
    full, half = (load_file(tmp_path / compute / "statistics.safetensors") for compute in results)
    for name, maxima in full.items():
        assert 0 < (half[name] - maxima).norm() / maxima.norm() < 16 * torch.finfo(dtype).eps


def test_weights_per_tensor(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    quantize(tiny(), tmp_path / "out", weights="tensor", activations="static", calibration=calibration)
    out = Checkpoint(tmp_path / "out")
    assert out.read("model.layers.0.mlp.up_proj.weight_scale").shape == (1,)
    group = out.config["quantization_config"]["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == ("tensor", False)
    verify(tmp_path / "out", tiny())


@pytest.mark.parametrize("activations", ["static", "tensor", "token"])
def test_massive_activations_are_told(activations: str, tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """One channel of a hidden layer, ten thousand times larger than the others as large models have them, leaves nothing of these in one scale."""
    source = tmp_path / "massive"
    shutil.copytree(tiny("llama", torch.float32), source)
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if (up := tensors.get("model.layers.1.mlp.up_proj.weight")) is not None:
            up[3] *= 1e4
        if (down := tensors.get("model.layers.1.mlp.down_proj.weight")) is not None:
            down[:, 3] /= 1e4
        save_file(tensors, shard, {"format": "pt"})
    calibration = Calibration(text=(str(text_file),), samples=4, seq_len=32)
    for smooth, massive in (("norms", activations != "token"), ("all", False)):
        found = quantize(source, tmp_path / smooth, activations=activations, smooth=smooth, target="here", calibration=calibration)
        told = [note for note in found.notes if "model.layers.1.mlp.down_proj (99%)" in note and "--activations token" in note]
        assert len(told) == massive
        linear = json.loads((tmp_path / smooth / "plan.json").read_text())["blocks"][1]["linears"]["mlp.down_proj"]
        assert (linear.get("lost_channels", 0) > 0.9) == massive and ("lost_channels" in linear) == (activations != "token")


def test_layers_that_share_an_input_share_their_static_scale(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """vLLM fuses them and keeps the scale of the last one that it loads."""
    quantize(tiny(), tmp_path / "out", activations="static", calibration=calibration)
    out = Checkpoint(tmp_path / "out")
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({out.read(f"model.layers.1.{name}.input_scale").item() for name in group}) == 1


def test_the_plan_says_what_was_done(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    result = quantize(tiny(), tmp_path / "out", smooth="all", alpha=0.6, calibration=calibration)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["alpha"] == result.alpha == 0.6 and plan["family"] == "llama" and plan["tokens"] == result.tokens == 128
    assert [pair["source"] for pair in plan["blocks"][0]["pairs"]] == [pair.source for pair in FAMILIES["llama"].pairs]
    assert str(tmp_path) not in json.dumps(plan), "equal inputs give equal bytes wherever they lie"
    for name in ("tokenizer.json", "generation_config.json", "manifest.json", "statistics.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    assert not list(tmp_path.glob(".*"))


def test_nothing_has_to_be_run_when_nothing_is_smoothed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    result = quantize(tiny(), tmp_path / "out", smooth="none", calibration=Calibration())
    assert result.alpha is None and result.tokens == 0
    verify(tmp_path / "out", tiny())


def test_a_family_without_a_published_alpha_says_so(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], alpha=None))
    result = quantize(tiny(), tmp_path / "out", calibration=calibration)
    assert result.alpha == 0.5 and "no alpha was published for family 'llama'" in result.notes[0]


def test_each_block_is_read_once_and_in_order(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = Checkpoint.read

    def read(self: Checkpoint, name: str, **how: Any) -> torch.Tensor:
        if self.directory == tiny():
            reads.append(name)
        return original(self, name, **how)

    monkeypatch.setattr(Checkpoint, "read", read)
    quantize(tiny(), tmp_path / "out", calibration=calibration)
    blocks = [name for name in reads if ".layers." in name]
    assert len(blocks) == len(set(blocks))
    assert [int(name.split(".")[2]) for name in blocks] == sorted(int(name.split(".")[2]) for name in blocks)


def test_the_backend_of_each_layer_is_logged(tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from smoothquant_plus.runtime.load import load

    quantize(tiny(), tmp_path / "out", smooth="none", calibration=Calibration())
    with caplog.at_level(logging.INFO, logger="smoothquant_plus"):
        load(tmp_path / "out")
    assert "w8a8 64x64 on cpu: backend cpu" in caplog.text


def test_a_checkpoint_of_mixed_dtypes_is_not_rounded(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """float32 norms among float16 weights, blocks run in float16: what is stored comes from the stored values all the same."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    for shard in source.glob("*.safetensors"):
        tensors = {n: t.float() * 1.0001 if "norm" in n else t for n, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    quantize(source, tmp_path / "out", calibration=replace(calibration, compute_dtype="checkpoint"))
    verify(tmp_path / "out", source)
    assert Checkpoint(tmp_path / "out").tensors["model.layers.0.input_layernorm.weight"].dtype == torch.float32


def test_other_weights_of_the_same_layout_are_another_model(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "out", calibration=calibration)
    families.write("llama", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="exists already"):
        quantize(tmp_path / "other", tmp_path / "out", calibration=calibration)


def test_after_a_failed_proof_the_advice_can_be_followed(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),)  # v_proj forgotten
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], pairs=wrong))
    with pytest.raises(VerificationError, match="--smooth none quantizes it unsmoothed"):
        quantize(tiny("llama"), tmp_path / "out", calibration=calibration)
    quantize(tiny("llama"), tmp_path / "out", smooth="none", calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_nan_does_not_pass_the_proof(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transform, "relative_error", lambda *_: float("nan"))
    with pytest.raises(VerificationError, match="relative error nan"):
        quantize(tiny("llama"), tmp_path / "out", calibration=calibration)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("input_layernrom", ("self_attn.q_proj",)), r"matches nothing.*no 'input_layernrom'.*Did you mean 'input_layernorm'"),
        (
            Pair("self_attn.v_proj", ("self_attn.o_proj",), when="all"),
            r"v_proj -> self_attn.o_proj does not fit: 32 channels out and 64 in",
        ),
    ],
)
def test_a_pair_that_does_not_fit_the_model_is_named(
    pair: Pair, message: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], pairs=(pair,)))
    with pytest.raises(InputError, match=message):
        quantize(tiny("llama"), tmp_path / "out", calibration=calibration)


def test_statistics_count_no_calibration_tokens_and_static_ones_need_no_run(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = calibrate(tiny("llama"), tmp_path / "statistics.safetensors", calibration=calibration)
    given = Calibration(statistics=statistics)
    assert quantize(tiny("llama"), tmp_path / "smoothed", calibration=given).tokens == 0
    monkeypatch.setattr(Decoder, "embed", None)
    quantize(tiny("llama"), tmp_path / "static", activations="static", smooth="none", calibration=given)
    verify(tmp_path / "static", against=None)


@pytest.mark.parametrize(
    ("alpha", "options"),
    [
        ("model", {"scheme": "w4a16", "group_size": 32, "symmetric": True}),
        ("block", {"scheme": "w8a8", "activations": "static"}),
        ("0.7", {"scheme": "w8a8"}),
    ],
)
def test_calibrate_writes_the_factors_that_quantize_folds(
    alpha: str, options: dict[str, Any], tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    how = {**options, "smooth": "all", "alpha": alpha, "calibration": replace(calibration, compute_dtype="checkpoint")}
    quantize(tiny("qwen2"), tmp_path / "out", **how)
    factors = load_file(calibrate(tiny("qwen2"), tmp_path / "smoothing.safetensors", **how))
    expected = load_file(tmp_path / "out" / "smoothing.safetensors")
    assert factors and set(factors) == set(expected)
    assert all(torch.equal(s, expected[name]) for name, s in factors.items())


def test_one_text_may_be_named_by_itself(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    first = quantize(tiny(), tmp_path / "a", calibration=Calibration(text=text_file, samples=2, seq_len=16))
    again = quantize(tiny(), tmp_path / "b", calibration=Calibration(text=[str(text_file)], samples=2, seq_len=16))
    assert first.tokens == again.tokens == 32
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_what_a_removed_run_left_behind_is_not_used(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    """A directory that was being removed when the process was killed: shards, but no recipe."""
    families.write("llama", tmp_path / "other", seed=1)
    quantize(tmp_path / "other", tmp_path / "foreign", calibration=calibration)
    work = tmp_path / ".out.partial"
    shutil.copytree(tmp_path / "foreign", work / "output")
    (work / "blocks").mkdir()
    (work / "blocks" / "00000.json").write_text("{}")
    quantize(tiny("llama"), tmp_path / "out", calibration=calibration)
    verify(tmp_path / "out", tiny("llama"))


def test_nothing_hides_what_a_block_did_wrong() -> None:
    """Neither a large residual, of which a part comes out again, nor keys and values beside small hidden states, nor the other way round."""
    hidden = 1000 * torch.randn(1, 3, 8)
    before = torch.cat([0.5 * hidden + 1e-2 * torch.randn(1, 3, 8), torch.randn(1, 3, 4)], dim=-1)
    for channels, change in ((slice(8), before[..., :8] - 0.5 * hidden), (slice(8, 12), before[..., 8:])):
        after = before.clone()
        after[..., channels] += 0.2 * change
        assert transform.relative_error(before, after, hidden, 0.5) == pytest.approx(0.2, rel=0.02)
    assert transform.relative_error(before, before, hidden, 0.5) == 0


@pytest.mark.parametrize("alpha", [0.5, "block"])
def test_what_later_blocks_read_of_earlier_ones_survives_an_interruption(
    alpha: Any, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values, in Gemma 4 E2B: the run goes on in a block that reads those of blocks before the interruption."""
    model, original = tiny("gemma4-vision"), blockwise.quantize_one
    quantize(model, tmp_path / "whole", calibration=calibration, alpha=alpha)

    def interrupted(decoder: Decoder, work: Workspace, index: int, *arguments: Any) -> Any:
        if index == 4:
            raise KeyboardInterrupt
        return original(decoder, work, index, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blockwise, "quantize_one", interrupted)
        quantize(model, tmp_path / "out", calibration=calibration, alpha=alpha)
    quantize(model, tmp_path / "out", calibration=calibration, alpha=alpha)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()


def test_text_that_changed_behind_its_name_does_not_continue_a_run(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a data set can, whose rows are not in the recipe."""
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny("llama"), tmp_path / "out", calibration=calibration)
    original = preparation.read_samples
    monkeypatch.setattr(
        pipeline, "read_samples", lambda *arguments: replace(found := original(*arguments), batches=[b + 1 for b in found.batches])
    )
    with pytest.raises(InputError, match="unfinished run on other calibration text"):
        quantize(tiny("llama"), tmp_path / "out", calibration=calibration)


def test_verify_repeats_the_blocks_on_another_instruction_set(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    source = tiny("llama", torch.float32)
    quantize(source, tmp_path / "out", smooth="all", calibration=calibration)
    command = [sys.executable, "-m", "smoothquant_plus.cli", "verify", str(tmp_path / "out"), "--against", str(source)]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"}, check=True, capture_output=True)


def test_what_lies_outside_the_blocks_is_copied_in_pieces(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vision tower, or layers that the model ignores, may be larger than any block."""
    whole = tmp_path / "whole"
    quantize(tiny("llava"), whole, calibration=calibration)
    monkeypatch.setattr(blocks, "OUTSIDE_BYTES", 10_000)
    out = tmp_path / "out"
    quantize(tiny("llava"), out, calibration=calibration)
    verify(out, tiny("llava"))
    assert len(Checkpoint(out).shards) > len(Checkpoint(whole).shards)
    assert Checkpoint(out).tensors.keys() == Checkpoint(whole).tensors.keys()


def test_what_config_says_of_other_code_is_left_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """It is not copied. And a quantization of null is none."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny(), source)
    config = json.loads((source / "config.json").read_text())
    more = {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}, "quantization_config": None}
    (source / "config.json").write_text(json.dumps(config | more))
    quantize(source, out, smooth="none")
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).model_type == "llama"
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_named_chat_templates_come_along(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny(), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ messages[0].content }} with tools"}
    tokenizer.save_pretrained(source)
    quantize(source, out, smooth="none")
    verify(out)
    said = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], chat_template="tool_use", tokenize=False
    )
    assert said == "hi with tools"
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    with pytest.raises(VerificationError, match=r"additional_chat_templates/tool_use.jinja has changed"):
        verify(out)


def test_others_may_read_the_output_as_the_umask_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    quantize(tiny(), tmp_path / "out", smooth="none")
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "file").stat().st_mode}
