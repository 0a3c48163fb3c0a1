from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.models.checkpoint import Checkpoint
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.generate import generate
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.runtime.load import load

IDS = families.make_tokenizer()(families.TEXT[:24], return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(tiny("llama"), out, calibration=calibration)
    return out


def test_no_full_precision_weight_is_ever_made(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the quantized linears only integers and scales are read, and they are what stays in memory."""
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, **how: read.append(name) or original(self, name, **how))
    model = load(quantized, dtype=torch.float32)
    assert len(read) == len(set(read)), "every tensor is read once"
    floats = [name for name, p in model.model.layers.named_parameters() if p.is_floating_point()]
    assert all("norm" in name for name in floats)
    assert all(t.dtype != torch.float32 or t.ndim < 2 for m in model.modules() if isinstance(m, QuantLinear) for t in m.prepared)


def test_padded_batches_generate_what_single_prompts_do(quantized: Path) -> None:
    model = load(quantized, dtype=torch.float32)
    single = model.generate(IDS[:, 4:12], max_new_tokens=8, do_sample=False)[0, 8:]
    padded = torch.cat([IDS[:, :12], torch.nn.functional.pad(IDS[:, 4:12], (4, 0), value=256)])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[1, 12:]
    assert torch.equal(single, batch)


def test_torch_compile_takes_the_whole_model(quantized: Path) -> None:
    model = load(quantized, dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(quantized: Path, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = load(quantized, dtype=torch.float32)(IDS).logits
        got = load(quantized, dtype=dtype)(IDS).logits
    assert got.dtype == dtype
    assert ((got.float() - expected).norm() / expected.norm()).item() < 0.1


def test_a_named_backend_never_falls_back(tiny: Callable[..., Path], quantized: Path) -> None:
    assert {m.backend for m in load(quantized, backend="reference").modules() if isinstance(m, QuantLinear)} == {"reference"}
    with pytest.raises(InputError, match="unknown backend 'cuda'"):
        load(quantized, backend="cuda")
    with pytest.raises(InputError, match="is not quantized"):
        load(tiny("llama"), backend="torch")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_slow_products_are_told(
    has_instructions: bool, tiny: Callable[..., Path], quantized: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of models that are not quantized, in 16 bits: all of their products are slow then."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: has_instructions)
    for directory, dtype, told in ((tiny(), None, not has_instructions), (tiny(), torch.float32, False), (quantized, None, False)):
        load(directory, dtype=dtype)
        assert ("products in float16" in capfd.readouterr().err) == told


def test_a_head_of_its_own_is_kept_whatever_config_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A fine-tune of a tied model may store a head that differs from the embedding; transformers then unties them, and so must we."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama", torch.float32), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    head = Checkpoint(source).read("lm_head.weight")
    quantize(source, tmp_path / "out", smooth="none")
    for directory in (source, tmp_path / "out"):
        assert torch.equal(load(directory).lm_head.weight, head)


def test_generated_text_keeps_the_space_it_begins_with(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers of the Llama-2 kind drop a leading space when they decode."""

    class Tokenizer:
        bos_token = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

        def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
            return "".join(f" {int(token)}" for token in ids).lstrip()

    monkeypatch.setattr("smoothquant_plus.runtime.generate.load_tokenizer", lambda _: Tokenizer())
    assert generate(tiny("llama"), "1 2 3", max_new_tokens=2, dtype=torch.float32).startswith(" ")


def test_what_is_packed_for_the_kernels_is_not_saved(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a quantized model cannot be saved.*Copy its directory"):
        load(quantized).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_another_dtype_leaves_the_scales_alone(quantized: Path) -> None:
    model = load(quantized, dtype=torch.float32)
    scales = {name: buffer for name, buffer in model.named_buffers() if "prepared" in name and buffer.is_floating_point()}
    before = model(families.IDS).logits
    model.to(torch.bfloat16)
    assert scales and all(torch.equal(model.get_buffer(name), scale) for name, scale in scales.items())
    after = model(families.IDS).logits
    assert after.dtype == torch.bfloat16 and ((after - before).norm() / before.norm()).item() < 0.05


def test_generate_is_greedy_whatever_the_model_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    expected = generate(tiny(), "abc", max_new_tokens=8)
    shutil.copytree(tiny(), tmp_path / "model")
    wishes = {"num_beams": 4, "repetition_penalty": 1.5, "return_dict_in_generate": True, "no_repeat_ngram_size": 1}
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    assert generate(tmp_path / "model", "abc", max_new_tokens=8) == expected
