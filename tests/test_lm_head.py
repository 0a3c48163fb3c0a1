"""The output head in fewer bits: `--lm-head`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from torch import Tensor, nn
from transformers import CompressedTensorsConfig
from typer.testing import CliRunner

import families
from families import IDS, relative
from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.files import write_json
from smoothquant_plus.inspection import inspect
from smoothquant_plus.method import integers
from smoothquant_plus.method.integers import dequantize, quantize_input, quantize_weight
from smoothquant_plus.method.scheme import SCHEMES, find_scheme
from smoothquant_plus.models.blocks import Decoder
from smoothquant_plus.models.checkpoint import Checkpoint, quantization_config, read_scheme
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime.linear import QuantLinear
from smoothquant_plus.runtime.load import load
from smoothquant_plus.search import Search
from smoothquant_plus.verification import MANIFEST, manifest, verify
from smoothquant_plus.workspace import PLAN

# The head's name on disk in models whose layouts differ: its own weight, tied to the embedding, with a bias, inside a wrapper.
HEADS = {
    "llama": "lm_head",
    "llama-mha-tied-biases": "lm_head",
    "gpt_neox": "embed_out",
    "gptj": "lm_head",
    "bloom": "lm_head",
    "gemma3-vision": "lm_head",
}
TIED = ("llama-mha-tied-biases", "bloom", "gemma3-vision")
# Of the blocks. The heads here read 64 channels.
BLOCKS: dict[str, dict[str, Any]] = {
    "w8a8": {"activations": "static"},
    "w4a16": {"scheme": "w4a16", "group_size": 32, "alpha": 0.5, "symmetric": True},
}
MIXED = [("w8a8", "w4a16"), ("w4a16", "w8a8")]
ALIKE = [("w8a8", "w8a8"), ("w4a16", "w4a16")]


def options(blocks: str, head: str) -> dict[str, Any]:
    groups = {"group_size": 32, "symmetric": True} if head == "w4a16" else {}
    return {**BLOCKS[blocks], **groups, "lm_head": head, "target": "here"}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


def through(head: QuantLinear | nn.Module, model: Any) -> tuple[Tensor, Tensor]:
    """What the head of `model` reads, and what it gives."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    logits(model)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "blocks", "head"), [(name, *pair) for name in HEADS for pair in MIXED] + [("llama", *pair) for pair in ALIKE]
)
def test_a_quantized_head_from_end_to_end(
    name: str, blocks: str, head: str, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    source, out = tiny(name), tmp_path / "out"
    result = quantize(source, out, calibration=calibration, **options(blocks, head))
    note = f"output head quantized, not smoothed: lm_head, {head}, relative weight error"
    assert note in result.notes[-1] and ("a head of its own is stored" in result.notes[-1]) == (name in TIED)
    report = verify(out, source)
    assert 0 < report.weight_error["lm_head"] < (0.12 if head == "w4a16" else 0.02) and len(report.weight_error) == report.linears

    # What is stored: everything outside the blocks as it was, but for the head's weight.
    before, after, disk = Checkpoint(source), Checkpoint(out), HEADS[name]
    stored = {tensor.removeprefix(f"{disk}."): info.dtype for tensor, info in after.tensors.items() if tensor.startswith(f"{disk}.")}
    assert stored.pop("bias", None) == (torch.float16 if name == "gptj" else None)
    packed = {"weight_packed": torch.int32, "weight_scale": torch.float16, "weight_shape": torch.int64}
    assert stored == (packed if head == "w4a16" else {"weight": torch.int8, "weight_scale": torch.float32})
    for tensor in (tensor for group in Decoder(before).outside for tensor in group):
        assert torch.equal(after.read(tensor), before.read(tensor))
    assert (f"{disk}.weight" in before.tensors) == (name not in TIED)
    assert after.config["tie_word_embeddings"] is False and after.config.get("text_config", after.config)["tie_word_embeddings"] is False

    # What it computes: the integers of method/integers.py, of what the blocks give.
    full, model = load(source, dtype=torch.float32), load(out, dtype=torch.float32)
    layer = model.get_output_embeddings()
    assert isinstance(layer, QuantLinear) and layer.scheme.name == head
    hidden, got = through(layer, model)
    original = full.get_output_embeddings()
    weight = dequantize(quantize_weight(original.weight, layer.scheme.weights, torch.float16))
    if layer.scheme.inputs is not None:
        values, scale = quantize_input(hidden, layer.scheme.inputs)
        hidden = values * scale
    assert relative(got, nn.functional.linear(hidden, weight, original.bias)) < 1e-5
    assert relative(logits(model), logits(full)) < 0.35
    assert relative(logits(load(out, dtype=torch.float32, backend="reference")), logits(model)) < 1e-4
    generated = model.generate(IDS[:, :5].repeat(2, 1), attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 9) and torch.equal(generated[0], generated[1])


@pytest.mark.parametrize(
    ("name", "blocks", "head", "close"),
    # As for blocks: the scales of dynamic activations are max/127 here, and max/127.5 in that emulation.
    [(name, *pair, 5e-3 if pair[1] == "w4a16" else 0.02) for name in ("llama", "gpt_neox") for pair in MIXED]
    + [("bloom", "w8a8", "w4a16", 5e-3), ("llama-mha-tied-biases", "w4a16", "w4a16", 1e-5), ("llama", "w8a8", "w8a8", 0.02)],
)
def test_transformers_reads_it_by_itself(
    name: str, blocks: str, head: str, close: float, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny(name), out, calibration=calibration, **options(blocks, head))
    theirs = families.auto_class(families.TINY[name]).from_pretrained(out, dtype=torch.float32)
    declared = QuantizationConfig.model_validate(Checkpoint(out).config["quantization_config"])
    assert declared.format == ("mixed-precision" if blocks != head else declared.config_groups["group_0"].format)
    targets = [target for group in declared.config_groups.values() for target in group.targets]
    assert match_targets("lm_head", theirs.lm_head, targets)[0] in declared.config_groups["group_1"].targets
    assert "lm_head" not in declared.ignore
    assert relative(logits(load(out, dtype=torch.float32)), logits(theirs)) < close


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_zero_points_of_one_scheme(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """It takes the blocks' scheme for every layer then (docs/formats.md), so that of the head must be the same."""
    quantize(tiny(), tmp_path / "out", scheme="w4a16", group_size=32, lm_head="w4a16", smooth="none", target="here")
    model = families.auto_class(families.TINY["llama"])
    theirs = model.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert relative(logits(load(tmp_path / "out", dtype=torch.float32)), logits(theirs)) < 2 * torch.finfo(torch.float16).eps


def test_a_head_is_read_and_quantized_in_pieces(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary it is larger than a block; and where it is cut changes nothing."""
    for head in SCHEMES:
        groups = {"group_size": 32} if head == "w4a16" else {}
        quantize(tiny(), tmp_path / f"whole-{head}", lm_head=head, smooth="none", target="here", **groups)
    read = Checkpoint.read
    sizes: list[int] = []

    def watched(self: Checkpoint, name: str, **how: Any) -> Tensor:
        tensor = read(self, name, **how)
        if name == "lm_head.weight" and self.directory == tiny():
            sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    monkeypatch.setattr(integers, "PIECE", 4000)
    for head in SCHEMES:
        out = tmp_path / f"pieces-{head}"
        groups = {"group_size": 32} if head == "w4a16" else {}
        quantize(tiny(), out, lm_head=head, smooth="none", target="here", **groups)
        shard = LAST
        assert (out / shard).read_bytes() == (tmp_path / f"whole-{head}" / shard).read_bytes()
    assert max(sizes) <= 4000 and sum(sizes) == 2 * families.VOCABULARY * 64


def test_a_search_measures_the_loss_through_the_full_precision_head(
    tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoothquant_plus.search.GRID", (0.5,))
    found = {}
    for head in (None, "w8a8"):
        out = tmp_path / str(head)
        quantize(tiny(), out, alpha="model", lm_head=head, calibration=calibration, search=Search(samples=1))
        found[head] = json.loads((out / PLAN).read_text())
    assert found[None]["search"] == found["w8a8"]["search"]
    assert "head" not in found[None] and found["w8a8"]["head"]["name"] == "lm_head"


def test_a_head_of_its_own_is_quantized_whatever_config_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Of a fine-tune that stores one, while config.json still says that it is tied."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny(), source)
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "tie_word_embeddings": True})
    quantize(source, out, smooth="none", lm_head="w8a8")
    verify(out, source)
    expected = logits(load(out, dtype=torch.float32))
    head = quantize_weight(Checkpoint(source).read("lm_head.weight"), SCHEMES["w8a8"].weights)
    assert torch.equal(Checkpoint(out).read("lm_head.weight"), head.values)
    # And an output whose config.json was edited back is loaded with the head that it has.
    config = json.loads((out / "config.json").read_text())
    write_json(out / "config.json", {**config, "tie_word_embeddings": True})
    assert torch.equal(logits(load(out, dtype=torch.float32)), expected)


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied-biases"])
def test_sizes_are_those_of_what_is_written(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    for head in SCHEMES:
        sizes = inspect(tiny(name), lm_head=head).sizes
        groups = {"group_size": 32} if head == "w4a16" else {}
        quantize(tiny(name), tmp_path / head, scheme="w4a16", group_size=32, lm_head=head, smooth="none", target="here")
        assert Checkpoint(tmp_path / head).nbytes == sizes["w4a16, groups of 32"]
        if head == "w8a8":
            quantize(tiny(name), tmp_path / "w8a8-w8a8", lm_head=head, smooth="none", **groups)
            assert Checkpoint(tmp_path / "w8a8-w8a8").nbytes == sizes["w8a8"]
    assert (inspect(tiny(name), lm_head="w8a8").sizes["w8a8"] < inspect(tiny(name)).sizes["w8a8"]) == (name == "llama")


@pytest.fixture(scope="module")
def good(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit blocks and an 8-bit head; not to be written to."""
    out = tmp_path_factory.mktemp("good") / "OUT"
    quantize(tiny(), out, scheme="w4a16", group_size=32, lm_head="w8a8", smooth="none")
    return out


def flip(tensor: str) -> Callable[[Path], None]:
    """The lowest bit of the tensor's first value."""

    def corrupt(out: Path) -> None:
        info = Checkpoint(out).tensors[tensor]
        content = bytearray((out / info.shard).read_bytes())
        content[info.offset] ^= 1
        (out / info.shard).write_bytes(content)

    return corrupt


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def corrupt(out: Path) -> None:
        content = json.loads((out / file).read_text())
        change(content)
        write_json(out / file, content)

    return corrupt


LAST = "model-00005-of-00005.safetensors"
WRONG = f"the weight of 'lm_head' in {LAST} is not the one in plan.json"
CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weight": (flip("lm_head.weight"), WRONG),
    "scale": (flip("lm_head.weight_scale"), WRONG),
    "plan": (edit(PLAN, lambda plan: plan["head"].update(sha256="0" * 64)), WRONG),
    "plan-without-head": (edit(PLAN, lambda plan: plan.pop("head")), WRONG),
    "config-without-its-group": (
        edit("config.json", lambda config: config["quantization_config"]["config_groups"].pop("group_1")),
        "config.json declares another quantization than plan.json",
    ),
    "config-of-another-scheme": (
        edit("config.json", lambda config: config["quantization_config"]["config_groups"]["group_1"]["weights"].update(strategy="tensor")),
        "config.json declares another quantization than plan.json",
    ),
}


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_corrupted_head_is_found(corrupt: Callable[[Path], None], message: str, good: Path, tmp_path: Path) -> None:
    """Though the manifest's hashes fit."""
    out = Path(shutil.copytree(good, tmp_path / "OUT"))
    corrupt(out)
    with pytest.raises(VerificationError, match="has changed"):
        verify(out)
    write_json(out / MANIFEST, manifest(out))
    with pytest.raises(VerificationError, match=message):
        verify(out)


def test_a_head_of_other_weights_is_found_against_the_model(good: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Everything in the output fits together, and does not come from the model."""
    out = Path(shutil.copytree(good, tmp_path / "OUT"))
    families.write("llama", tmp_path / "other", seed=1)
    quantize(tmp_path / "other", tmp_path / "other-out", scheme="w4a16", group_size=32, lm_head="w8a8", smooth="none")
    shutil.copy(tmp_path / "other-out" / LAST, out / LAST)
    head = json.loads((tmp_path / "other-out" / PLAN).read_text())["head"]
    edit(PLAN, lambda plan: plan.update(head=head))(out)
    write_json(out / MANIFEST, manifest(out))
    verify(out)
    with pytest.raises(VerificationError, match=rf"'lm_head\.weight' in .*{LAST} is not what .* gives"):
        verify(out, tiny())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lm-head", "w8a16"), ("unknown --lm-head 'w8a16'", "w8a8, w4a16", "Did you mean 'w4a16'?")),
        (("--lm-head", "w4a16"), ("groups of 128 do not divide the 64 input channels of lm_head", "--group-size 64 or 32 would do")),
        (("--lm-head", "w8a8", "--group-size", "32"), ("--group-size does not apply to scheme w8a8",)),
        (("--lm-head", "w8a8", "--symmetric"), ("--symmetric does not apply to scheme w8a8",)),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_bad_values_end_the_run_before_it_starts(arguments: Any, said: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(tiny()), str(tmp_path / "OUT"), "--smooth", "none", *arguments])
    assert result.exit_code == 2 and all(part in result.stderr.replace("\n", " ") for part in said), result.stderr
    assert not list(tmp_path.iterdir())


def test_the_heads_scheme_follows_the_groups_and_nothing_else() -> None:
    assert find_scheme("w8a8", "static", "tensor", lm_head="w8a8").head == SCHEMES["w8a8"]
    for scheme in SCHEMES:
        assert find_scheme(scheme, lm_head="w4a16").head == SCHEMES["w4a16"]
        found = find_scheme(scheme, group_size=64, symmetric=True, lm_head="w4a16")
        assert found.head == find_scheme("w4a16", group_size=64, symmetric=True)
        assert (found.weights == found.head.weights) == (scheme == "w4a16")


NAMES = ["lm_head", "embed_out"]


@pytest.mark.parametrize("blocks", SCHEMES)
@pytest.mark.parametrize("head", SCHEMES)
def test_a_declared_head_comes_back(blocks: str, head: str) -> None:
    scheme = find_scheme(blocks, lm_head=head)
    declared = quantization_config(scheme, [], NAMES)
    assert read_scheme({"quantization_config": declared}, Path("OUT"), NAMES) == scheme
    for targets in (["lm_head"], ["re:.*lm_head"]):  # as others write it
        declared["config_groups"]["group_1"]["targets"] = targets
        assert read_scheme({"quantization_config": declared}, Path("OUT"), NAMES) == scheme


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda groups: groups["group_1"].update(targets=["re:.*down_proj$"]),
            r"config groups for \['Linear'\] and \['re:\.\*down_proj\$'\]",
        ),
        (lambda groups: groups["group_1"].update(targets=["Linear"]), r"config groups for \['Linear'\] and \['Linear'\]"),
        (lambda groups: groups["group_1"].update(targets=["lm_head", "re:.*"]), "for the output head alone"),
        (lambda groups: groups["group_1"].update(targets=[]), "for the output head alone"),
        (lambda groups: groups.pop("group_0"), "for the output head alone"),
        (lambda groups: groups.update(group_2=groups["group_1"]), "for the output head alone"),
        (lambda groups: groups["group_1"].update(format="float-quantized"), "format 'pack-quantized', 'float-quantized'"),
        (lambda groups: groups["group_1"].pop("format"), "format 'pack-quantized', 'mixed-precision'"),
        (lambda groups: groups["group_1"]["weights"].update(num_bits=6), "cannot be run here"),
    ],
)
def test_other_mixes_are_refused(change: Callable[[Any], Any], said: str) -> None:
    declared = quantization_config(find_scheme("w4a16", lm_head="w8a8"), [], NAMES)
    change(declared["config_groups"])
    with pytest.raises(InputError, match=said):
        read_scheme({"quantization_config": declared}, Path("OUT"), NAMES)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_the_blocks_group_quantizes_is_refused(tied: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As llm-compressor writes it when `ignore` does not name it: no server takes that for a quantized head, and the embedding is not one."""
    out = tmp_path / "out"
    quantize(tiny(), out, scheme="w4a16", group_size=32, lm_head="w4a16", smooth="none", target="here")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_1"]
    write_json(out / "config.json", {**config, "tie_word_embeddings": tied})
    with pytest.raises(InputError, match=r"'lm_head' is quantized in .*/out, and its config\.json does not say how"):
        load(out)
