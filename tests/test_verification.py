"""Good outputs pass; one corruption each does not, and the message names what it hit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import families
from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError, VerificationError
from smoothquant_plus.files import write_json
from smoothquant_plus.models.checkpoint import INDEX, Checkpoint
from smoothquant_plus.models.statistics import SMOOTHING, STATISTICS
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.verification import MANIFEST, manifest, verify
from smoothquant_plus.workspace import PLAN

# Every setting of each option, and each pair of activations and smoothing once or more over the two models.
SETTINGS = [
    ("llama", "token", "channel", "norms"),
    ("llama", "token", "tensor", "none"),
    ("llama", "tensor", "channel", "all"),
    ("llama", "tensor", "tensor", "norms"),
    ("llama", "static", "channel", "none"),
    ("llama", "static", "tensor", "all"),
    ("opt", "token", "tensor", "all"),
    ("opt", "token", "channel", "none"),
    ("opt", "tensor", "tensor", "none"),
    ("opt", "static", "channel", "norms"),
]
W4A16: dict[str, Any] = {"scheme": "w4a16", "group_size": 32, "alpha": 0.5}
W4A16_SETTINGS = [("llama", False, "all"), ("llama", True, "norms"), ("opt", False, "none"), ("opt", True, "all")]
LINEARS = {"llama": 3 * 7, "opt": 2 * 6}


OPTIONS: dict[str, tuple[str, dict[str, Any], float]] = {
    **{
        "-".join(row): (row[0], dict(zip(("activations", "weights", "smooth", "target"), (*row[1:], "here"), strict=True)), 0.1)
        for row in SETTINGS
    },
    **{
        f"{name}-w4a16-{'symmetric' if symmetric else 'asymmetric'}-{smooth}": (
            name,
            {**W4A16, "symmetric": symmetric, "smooth": smooth, "alpha": "default" if smooth == "none" else 0.5},
            0.12,
        )
        for name, symmetric, smooth in W4A16_SETTINGS
    },
}


@pytest.mark.parametrize(("name", "options", "largest"), OPTIONS.values(), ids=OPTIONS)
def test_good_output_passes(
    name: str, options: dict[str, Any], largest: float, tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "OUT"
    result = quantize(tiny(name), out, calibration=calibration, **options)

    report = verify(out)
    assert report.files == len(list(out.iterdir())) - 1  # all but the manifest
    assert report.tensors == sum(len(load_file(shard)) for shard in out.glob("model-*.safetensors"))
    assert report.linears == LINEARS[name]
    assert report.equivalence_error is None

    report = verify(out, against=tiny(name))
    assert report.equivalence_error is not None
    if options["smooth"] == "none":
        assert report.equivalence_error == result.equivalence_error == 0.0
    else:
        assert 0.0 < report.equivalence_error < 1e-3
    assert len(report.weight_error) == LINEARS[name]
    assert all(0.0 < error < largest for error in report.weight_error.values())


@pytest.fixture(scope="module")
def good(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that has every kind of tensor and file; not to be written to."""
    out = tmp_path_factory.mktemp("good") / "OUT"
    quantize(tiny(), out, activations="static", smooth="all", calibration=calibration)
    return out


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    """A copy of the good output, to be corrupted."""
    return Path(shutil.copytree(good, tmp_path / "OUT"))


@pytest.fixture(scope="module")
def good_w4a16(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with packed weights and zero points; not to be written to."""
    out = tmp_path_factory.mktemp("good") / "OUT"
    quantize(tiny(), out, smooth="all", calibration=calibration, **W4A16)
    return out


@pytest.fixture
def out_w4a16(good_w4a16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_w4a16, tmp_path / "OUT"))


# A linear and a norm of the second of three blocks, and the shard that they are in.
LINEAR = "model.layers.1.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm.weight"
SHARD = "model-00003-of-00005.safetensors"
OTHER_SHARD = "model-00002-of-00005.safetensors"


def flip(name: str) -> Callable[[Path], None]:
    """The lowest bit of the first value of the tensor `name`."""

    def corrupt(out: Path) -> None:
        path = out / Checkpoint(out).tensors[name].shard
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        start, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
        content[8 + length + start] ^= 1
        path.write_bytes(content)

    return corrupt


def flip_first(file: str) -> Callable[[Path], None]:
    """The lowest bit of the first value of a file of tensors."""

    def corrupt(out: Path) -> None:
        content = bytearray((out / file).read_bytes())
        content[8 + int.from_bytes(content[:8], "little")] ^= 1
        (out / file).write_bytes(content)

    return corrupt


def change_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Another tensor, or none at all, in the shard; the index is left as it is."""

    def corrupt(out: Path) -> None:
        path = out / Checkpoint(out).tensors[name].shard
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else {**tensors, name: changed}, path, metadata={"format": "pt"})

    return corrupt


def change_json(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """`change` edits the content in place or returns another."""

    def corrupt(out: Path) -> None:
        content = json.loads((out / file).read_text())
        changed = change(content)
        (out / file).write_text(json.dumps(content if changed is None else changed))

    return corrupt


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    def corrupt(out: Path) -> None:
        (out / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return corrupt


def truncate(file: str, size: int) -> Callable[[Path], None]:
    return lambda out: write(file, (out / file).read_bytes()[:size])(out)


def remove(file: str) -> Callable[[Path], None]:
    return lambda out: (out / file).unlink()


def refit(*corruptions: Callable[[Path], None]) -> Callable[[Path], None]:
    """The corruptions, and a manifest whose hashes fit them."""

    def corrupt(out: Path) -> None:
        for corruption in corruptions:
            corruption(out)
        write_json(out / MANIFEST, manifest(out))

    return corrupt


def forget(name: str) -> Callable[[Path], None]:
    """The tensor `name` is neither in its shard nor in the index."""

    def corrupt(out: Path) -> None:
        change_tensor(name, lambda tensor: None)(out)
        change_json(INDEX, lambda index: index["weight_map"].pop(name) and None)(out)

    return corrupt


def declare_per_tensor(config: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"


def declare_dynamic(config: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {"dynamic": True, "strategy": "token"}


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    # One bit.
    "bit-of-a-weight": (
        flip(f"{LINEAR}.weight"),
        [f"{SHARD} has changed", f"the weight of '{LINEAR}' in {SHARD} is not the one in plan.json"],
    ),
    "bit-of-a-scale": (flip(f"{LINEAR}.weight_scale"), [f"{SHARD} has changed", f"the weight of '{LINEAR}' in {SHARD} is not the one"]),
    "bit-of-an-input-scale": (flip(f"{LINEAR}.input_scale"), [f"{SHARD} has changed"]),
    "bit-of-a-norm": (flip(NORM), [f"{SHARD} has changed"]),
    "bit-of-the-embeddings": (flip("model.embed_tokens.weight"), ["model-00001-of-00005.safetensors has changed"]),
    # Shards.
    "truncated-shard": (truncate(SHARD, 20_000), [f"{SHARD} has changed", f"{SHARD} is damaged or truncated"]),
    "shard-cut-in-its-header": (truncate(SHARD, 100), [f"{SHARD} has changed", f"{SHARD} is damaged or truncated"]),
    "empty-shard": (truncate(SHARD, 0), [f"{SHARD} has changed", f"{SHARD} is damaged or truncated"]),
    "missing-shard": (remove(SHARD), [f"{SHARD} is missing"]),
    "swapped-shards": (
        lambda out: shutil.copy(out / OTHER_SHARD, out / SHARD),
        [f"{SHARD} has changed", f"{SHARD} holds '{NORM}', but it does not"],
    ),
    "missing-statistics": (remove(STATISTICS), [f"{STATISTICS} is missing"]),
    "missing-smoothing": (remove(SMOOTHING), [f"{SMOOTHING} is missing"]),
    "bit-of-the-smoothing": (flip_first(SMOOTHING), [f"{SMOOTHING} has changed"]),
    # Tensors.
    "another-dtype": (
        change_tensor(f"{LINEAR}.weight", Tensor.half),
        [f"tensor '{LINEAR}.weight' is torch.float16 (64, 64) and must be torch.int8 (64, 64)"],
    ),
    "another-shape": (
        change_tensor(f"{LINEAR}.weight_scale", lambda t: t[:-1].clone()),
        [f"'{LINEAR}.weight_scale'", "(63, 1)", "(64, 1)"],
    ),
    "not-a-number": (
        change_tensor(f"{LINEAR}.weight_scale", lambda t: torch.where(t == t.max(), torch.nan, t)),
        [f"'{LINEAR}.weight_scale'", SHARD, "NaN"],
    ),
    "missing-tensor": (change_tensor(f"{LINEAR}.weight_scale", lambda tensor: None), [f"'{LINEAR}.weight_scale'", SHARD]),
    "missing-tensor-refitted": (refit(forget(f"{LINEAR}.weight_scale")), [f"tensor '{LINEAR}.weight_scale' is missing"]),
    "missing-input-scale-refitted": (refit(forget(f"{LINEAR}.input_scale")), [f"tensor '{LINEAR}.input_scale' is missing"]),
    "missing-norm-refitted": (refit(forget(NORM)), [NORM]),
    "missing-embeddings-refitted": (refit(forget("model.embed_tokens.weight")), ["model.embed_tokens.weight"]),
    "another-shape-of-a-norm-refitted": (refit(change_tensor(NORM, lambda t: t[:-1].clone())), [NORM, "(63,)", "(64,)"]),
    # The index.
    "index-names-another-shard": (
        change_json(INDEX, lambda index: index["weight_map"].update({f"{LINEAR}.weight": OTHER_SHARD})),
        [f"{INDEX} has changed", f"{OTHER_SHARD} holds '{LINEAR}.weight', but it does not"],
    ),
    "index-leaves-the-directory": (
        change_json(INDEX, lambda index: index["weight_map"].update({f"{LINEAR}.weight": f"../{SHARD}"})),
        [f"{INDEX} has changed", f"'../{SHARD}'", "outside the model directory"],
    ),
    "index-is-not-json": (truncate(INDEX, 100), [f"{INDEX} has changed", f"{INDEX} is not a safetensors index"]),
    "missing-index": (remove(INDEX), [f"{INDEX} is missing"]),
    # Other files.
    "missing-tokenizer": (remove("tokenizer.json"), ["tokenizer.json is missing"]),
    "edited-tokenizer": (change_json("tokenizer_config.json", lambda t: t.update(eos_token="a")), ["tokenizer_config.json has changed"]),
    "edited-config": (change_json("config.json", lambda config: config.update(rms_norm_eps=1e-5)), ["config.json has changed"]),
    "config-with-fewer-blocks": (
        change_json("config.json", lambda c: c.update(num_hidden_layers=2)),
        ["config.json has changed", "2 blocks"],
    ),
    "config-with-more-blocks": (
        change_json("config.json", lambda c: c.update(num_hidden_layers=4)),
        ["config.json has changed", "4 blocks"],
    ),
    "config-of-another-size": (
        change_json("config.json", lambda c: c.update(hidden_size=32)),
        ["config.json has changed", f"{LINEAR}.weight"],
    ),
    "config-that-builds-no-model": (change_json("config.json", lambda c: c.update(hidden_size="x")), ["config.json has changed"]),
    "config-of-an-unknown-family": (change_json("config.json", lambda c: c.update(model_type="lama")), ["config.json has changed", "lama"]),
    "config-not-quantized": (change_json("config.json", lambda c: c.pop("quantization_config") and None), ["no quantization_config"]),
    "config-of-another-quantization": (
        change_json("config.json", declare_per_tensor),
        ["config.json has changed", f"'{LINEAR}.weight_scale'"],
    ),
    "config-refitted": (refit(change_json("config.json", declare_dynamic)), ["config.json", "plan.json"]),
    "config-is-not-json": (truncate("config.json", 100), ["config.json has changed", "config.json is not valid JSON"]),
    "missing-config": (remove("config.json"), ["config.json is missing"]),
    # The plan.
    "edited-plan": (
        change_json(PLAN, lambda plan: plan["blocks"][1]["linears"]["self_attn.q_proj"].update(sha256="0" * 64)),
        [f"{PLAN} has changed", f"the weight of '{LINEAR}'"],
    ),
    "edited-plan-refitted": (
        refit(change_json(PLAN, lambda plan: plan["blocks"][1]["linears"]["self_attn.q_proj"].update(sha256="0" * 64))),
        [f"the weight of '{LINEAR}'"],
    ),
    "plan-without-a-linear": (
        change_json(PLAN, lambda plan: plan["blocks"][1]["linears"].pop("self_attn.q_proj") and None),
        [PLAN, LINEAR],
    ),
    "plan-without-a-block": (change_json(PLAN, lambda plan: plan["blocks"].pop() and None), [f"{PLAN} has changed", "2 blocks"]),
    "plan-without-blocks": (change_json(PLAN, lambda plan: plan.pop("blocks") and None), [f"{PLAN} has changed", "'blocks'"]),
    "plan-without-recipe": (change_json(PLAN, lambda plan: plan.pop("recipe") and None), [f"{PLAN} has changed", "'recipe'"]),
    "plan-is-a-list": (change_json(PLAN, lambda plan: [plan]), [f"{PLAN} has changed"]),
    "plan-is-not-json": (truncate(PLAN, 100), [f"{PLAN} has changed", f"{PLAN} cannot be read"]),
    "missing-plan": (remove(PLAN), [f"{PLAN} is missing"]),
    # The manifest.
    "weight-refitted": (refit(flip(f"{LINEAR}.weight")), [f"the weight of '{LINEAR}' in {SHARD} is not the one in plan.json"]),
    "scale-refitted": (refit(flip(f"{LINEAR}.weight_scale")), [f"the weight of '{LINEAR}' in {SHARD} is not the one in plan.json"]),
    "missing-manifest": (remove(MANIFEST), [MANIFEST]),
    "manifest-is-not-json": (truncate(MANIFEST, 100), [f"{MANIFEST} cannot be read"]),
    "manifest-is-a-list": (change_json(MANIFEST, list), [MANIFEST]),
    "manifest-without-a-shard": (change_json(MANIFEST, lambda files: files.pop(SHARD) and None), [f"{SHARD} is not in {MANIFEST}"]),
    "manifest-without-the-tokenizer": (
        change_json(MANIFEST, lambda f: f.pop("tokenizer.json") and None),
        [f"tokenizer.json is not in {MANIFEST}"],
    ),
    "shard-that-was-not-written": (
        lambda out: shutil.copy(out / SHARD, out / "model.safetensors"),
        [f"model.safetensors is not in {MANIFEST}"],
    ),
}


def declare(**weights: Any) -> Callable[[Any], None]:
    """A config.json that says something else of the weights."""
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)


WRONG = f"the weight of '{LINEAR}' in {SHARD} is not the one in plan.json"
# What a 64x64 layer is in groups of 32.
PACKED = {
    "weight_packed": ("torch.int32", (64, 8)),
    "weight_scale": ("torch.float16", (64, 2)),
    "weight_zero_point": ("torch.int32", (8, 2)),
    "weight_shape": ("torch.int64", (2,)),
}
W4A16_CORRUPTIONS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nibble-of-a-weight": (flip(f"{LINEAR}.weight_packed"), [f"{SHARD} has changed", WRONG]),
    # The lowest bit is in a four-bit number of its own.
    "nibble-of-a-weight-refitted": (refit(flip(f"{LINEAR}.weight_packed")), [WRONG]),
    "nibble-of-a-zero-point-refitted": (refit(flip(f"{LINEAR}.weight_zero_point")), [WRONG]),
    "scale-refitted": (refit(flip(f"{LINEAR}.weight_scale")), [WRONG]),
    "shape-refitted": (refit(flip(f"{LINEAR}.weight_shape")), [f"'{LINEAR}.weight_shape' is [65, 64]", "[64, 64]"]),
    **{
        f"missing-{suffix}-refitted": (refit(forget(f"{LINEAR}.{suffix}")), [f"tensor '{LINEAR}.{suffix}' is missing"])
        for suffix in PACKED
        if suffix != "weight_shape"  # which says nothing that the others do not
    },
    **{
        f"another-dtype-of-{suffix}-refitted": (
            refit(change_tensor(f"{LINEAR}.{suffix}", lambda t: t.to(torch.int8))),
            # A scale may be in any float dtype, so that only numbers of another kind are wrong.
            [f"tensor '{LINEAR}.{suffix}' is torch.int8 {shape} and must be {dtype.replace('16', '32')} {shape}"],
        )
        for suffix, (dtype, shape) in PACKED.items()
    },
    **{
        f"another-shape-of-{suffix}-refitted": (
            refit(change_tensor(f"{LINEAR}.{suffix}", lambda t: t[:-1].clone())),
            [f"tensor '{LINEAR}.{suffix}' is {dtype} {(shape[0] - 1, *shape[1:])} and must be {dtype} {shape}"],
        )
        for suffix, (dtype, shape) in PACKED.items()
    },
    "not-a-number-refitted": (
        refit(change_tensor(f"{LINEAR}.weight_scale", lambda t: torch.where(t == t.max(), torch.nan, t))),
        [f"'{LINEAR}.weight_scale'", SHARD, "NaN"],
    ),
    "config-without-zero-points-refitted": (
        refit(change_json("config.json", declare(symmetric=True))),
        ["config.json declares another quantization than plan.json", f"the weight of '{LINEAR}'"],
    ),
    "config-with-other-groups-refitted": (
        refit(change_json("config.json", declare(group_size=64))),
        ["config.json declares another quantization than plan.json", f"tensor '{LINEAR}.weight_scale'", "(64, 2)", "(64, 1)"],
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_named(name: str, out: Path) -> None:
    assert_named(name, CORRUPTIONS[name], out)


@pytest.mark.parametrize("name", W4A16_CORRUPTIONS)
def test_corruption_of_packed_weights_is_named(name: str, out_w4a16: Path) -> None:
    assert_named(name, W4A16_CORRUPTIONS[name], out_w4a16)


def assert_named(name: str, corruption: tuple[Callable[[Path], None], list[str]], out: Path) -> None:
    corrupt, named = corruption
    corrupt(out)
    with pytest.raises(VerificationError) as error:
        verify(out)
    assert str(error.value).startswith(f"{out} is damaged: ")
    for words in named:
        assert words in str(error.value)
    if name.endswith("refitted"):
        assert "has changed" not in str(error.value)


def test_all_corruptions_are_named_at_once(out: Path) -> None:
    for name in ("bit-of-a-weight", "bit-of-the-embeddings", "missing-tokenizer", "edited-config"):
        CORRUPTIONS[name][0](out)
    with pytest.raises(VerificationError) as error:
        verify(out)
    for words in (
        SHARD,
        f"'{LINEAR}'",
        "model-00001-of-00005.safetensors has changed",
        "tokenizer.json is missing",
        "config.json has changed",
    ):
        assert words in str(error.value)


def test_files_beside_the_output_are_allowed(out: Path) -> None:
    """A model card, or what git keeps, does no harm."""
    (out / "README.md").write_text("# A model card")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (out / ".git").mkdir()
    verify(out)


def drop(file: str, name: str) -> Callable[[Path], None]:
    """A file of tensors without the tensor `name`."""
    return lambda out: save_file({key: tensor for key, tensor in load_file(out / file).items() if key != name}, out / file)


# Nothing but the model itself can tell of these.
AGAINST = {
    "norm": (refit(flip(NORM)), [f"'{NORM}'", SHARD]),
    "embeddings": (refit(flip("model.embed_tokens.weight")), ["'model.embed_tokens.weight'", "model-00001-of-00005.safetensors"]),
    "output-head": (refit(flip("lm_head.weight")), ["'lm_head.weight'", "model-00005-of-00005.safetensors"]),
    "input-scale": (refit(flip(f"{LINEAR}.input_scale")), [f"'{LINEAR}.input_scale'", SHARD]),
    "dtype": (refit(change_tensor(NORM, Tensor.float)), [f"'{NORM}'", SHARD]),
    "extra-tensor": (
        refit(
            lambda out: save_file({"extra": torch.ones(1)}, out / "model-extra.safetensors", metadata={"format": "pt"}),
            change_json(INDEX, lambda index: index["weight_map"].update(extra="model-extra.safetensors")),
        ),
        ["'extra'", "model-extra.safetensors"],
    ),
    "statistics": (
        refit(lambda out: save_file({k: v * 2 for k, v in load_file(out / STATISTICS).items()}, out / STATISTICS)),
        ["model.layers.0."],
    ),
    "missing-statistics": (refit(remove(STATISTICS)), [f"{STATISTICS} is missing"]),
    "statistics-of-one-linear": (refit(drop(STATISTICS, LINEAR)), [LINEAR, STATISTICS]),
    "damaged-statistics": (refit(truncate(STATISTICS, 100)), [STATISTICS]),
    "damaged-smoothing": (refit(truncate(SMOOTHING, 100)), [SMOOTHING]),
    "smoothing": (refit(flip_first(SMOOTHING)), ["model.layers.0.", SMOOTHING]),
    "missing-smoothing": (refit(remove(SMOOTHING)), [f"{SMOOTHING} is missing"]),
    "smoothing-of-one-norm": (refit(drop(SMOOTHING, NORM.removesuffix(".weight"))), [NORM.removesuffix(".weight"), SMOOTHING]),
}
W4A16_AGAINST = {
    # The same numbers, in another dtype.
    "dtype-of-a-scale": (refit(change_tensor(f"{LINEAR}.weight_scale", Tensor.float)), [f"'{LINEAR}.weight_scale'", SHARD]),
    "missing-smoothing": AGAINST["missing-smoothing"],
}


@pytest.mark.parametrize("name", AGAINST)
def test_refitted_corruption_is_seen_against_the_model(name: str, out: Path, tiny: Callable[..., Path]) -> None:
    assert_seen(AGAINST[name], out, tiny())


@pytest.mark.parametrize("name", W4A16_AGAINST)
def test_refitted_corruption_of_packed_weights_is_seen_against_the_model(name: str, out_w4a16: Path, tiny: Callable[..., Path]) -> None:
    assert_seen(W4A16_AGAINST[name], out_w4a16, tiny())


def assert_seen(corruption: tuple[Callable[[Path], None], list[str]], out: Path, model: Path) -> None:
    corrupt, named = corruption
    corrupt(out)
    verify(out)
    with pytest.raises(VerificationError) as error:
        verify(out, against=model)
    for words in named:
        assert words in str(error.value)


def test_against_other_weights(good: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = families.write("llama", tmp_path / "other", seed=1)
    with pytest.raises(VerificationError, match=r"was not made of .*the shards"):
        verify(good, against=other)

    # In a large shard the difference may lie where the fingerprint does not look.
    fingerprint = json.loads((good / PLAN).read_text())["recipe"]["model"]
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda checkpoint: fingerprint)
    with pytest.raises(VerificationError, match=r"the factors of 'model\.layers\.0\..*smoothing\.safetensors are not what "):
        verify(good, against=other)
    plain = tmp_path / "plain"
    quantize(tiny(), plain, smooth="none")
    with pytest.raises(VerificationError, match=r"'model\.layers\.0\..*is that the model it was made of"):
        verify(plain, against=other)


def test_against_another_dtype(good: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(VerificationError, match=r"was not made of .*config\.json"):
        verify(good, against=tiny("llama", torch.bfloat16))


def test_against_other_shards(good: Path, tmp_path: Path) -> None:
    other = families.write("llama", tmp_path / "other", shard_size="5GB")
    with pytest.raises(VerificationError, match=r"was not made of .*the shards"):
        verify(good, against=other)


def test_against_another_family(good: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(VerificationError, match=r"was not made of .*config\.json"):
        verify(good, against=tiny("opt"))


def test_against_no_model(good: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        verify(good, against=tmp_path / "nothing")


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_command_for_a_good_output(good: Path, tiny: Callable[..., Path]) -> None:
    result = command(good, "--against", tiny(), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["linears"] == LINEARS["llama"]
    assert set(report["weight_error"]) == {f"model.layers.{i}.{name}" for i in range(3) for name in linear_names(good)}
    result = command(good)
    assert result.exit_code == 0
    assert "21 quantized weights are as they were written" in result.stdout


def linear_names(good: Path) -> list[str]:
    return list(json.loads((good / PLAN).read_text())["blocks"][0]["linears"])


@pytest.mark.parametrize("name", ["bit-of-a-weight", "truncated-shard", "missing-tokenizer", "missing-manifest", "weight-refitted"])
def test_command_for_a_corrupted_output(name: str, out: Path) -> None:
    corrupt, named = CORRUPTIONS[name]
    corrupt(out)
    result = command(out, "--json")
    assert result.exit_code == 3
    assert result.stdout == ""
    for words in named:
        assert words in result.stderr


def test_command_against_another_model(good: Path, tiny: Callable[..., Path]) -> None:
    result = command(good, "--against", tiny("opt"))
    assert result.exit_code == 3
    assert "was not made of" in result.stderr


def test_command_for_a_directory_that_is_not_ours(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for directory, words in ((tiny(), "was not written by smoothquant-plus"), (tmp_path / "nothing", "no such directory")):
        result = command(directory)
        assert result.exit_code == 2
        assert words in result.stderr
        with pytest.raises(InputError, match=words):
            verify(directory)
