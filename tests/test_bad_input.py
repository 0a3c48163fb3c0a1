"""Everything a user can get wrong, through the command line: exit code 2, a message that names the file, tensor or option and the way out,
and nothing left behind. At the end, what looks wrong and is not."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import families
from smoothquant_plus.cli import app
from smoothquant_plus.models import checkpoint
from smoothquant_plus.runtime.load import load
from smoothquant_plus.text import read_documents

SMALL = ("--samples", "4", "--seq-len", "32")
W4A16 = ("--scheme", "w4a16", "--group-size", "32")
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sqplus(*arguments: object) -> Result:
    """The command as a user runs it; a traceback that escapes fails the test."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight_map(model: Path) -> dict[str, str]:
    return json.loads((model / INDEX).read_text())["weight_map"]


def change_tensor(model: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    shard = model / weight_map(model)[name]
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, shard, {"format": "pt"})


def rewrite(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Make `model` a single unsharded file of what `change` makes of all its tensors."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map(model).values())):
        tensors |= load_file(model / shard)
        (model / shard).unlink()
    (model / INDEX).unlink()
    save_file(change(tensors), model / "model.safetensors", {"format": "pt"})


def put(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with `value` in one place, not the first."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


class Bench:
    """Where a case is made: a directory of its own, with copies of the tiny models and the command lines that use them."""

    def __init__(self, here: Path, tiny: Callable[..., Path], quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self._tiny, self._quantized, self.monkeypatch = here, tiny, quantized, monkeypatch
        self.out = here / "OUT"
        self.text = self.file("text.txt", families.TEXT)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.here / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, name: str = "llama", change: Callable[[Path], object] | None = None, **config: Any) -> Path:
        """A copy of the tiny model `name`, with `config` changed in its config.json and then what `change` does to the directory."""
        path = shutil.copytree(self._tiny(name), self.here / "model")
        edit_json(path / "config.json", **config)
        if change:
            change(path)
        return path

    def quantized(self, **config: Any) -> Path:
        """A copy of the tiny Llama, quantized."""
        path = shutil.copytree(self._quantized, self.here / "quantized")
        if config:
            edit_json(path / "config.json", **config)
        return path

    def broken(self, change: Callable[[Path], object], name: str = "llama", **config: Any) -> list[object]:
        """Quantize a model that `change` has damaged."""
        return self.quantize(self.model(name, change, **config))

    def quantize(
        self, model: Path | None = None, *options: object, text: Path | str | None = None, small: Sequence[str] = SMALL
    ) -> list[object]:
        return ["quantize", model or self.model(), self.out, "--text", text or self.text, *small, *options]

    def evaluate(self, model: Path, *options: object, text: Path | str | None = None) -> list[object]:
        return ["eval", model, "--text", text or self.text, "--seq-len", "32", *options]

    def with_statistics(self, name: str, write: Callable[[Path, dict[str, Tensor]], object], *options: object) -> list[object]:
        """Quantize with a file of statistics that `write` makes from right ones."""
        maxima = {}
        for index in range(3):
            maxima |= {f"model.layers.{index}.self_attn.{linear}": torch.ones(64) for linear in ("q_proj", "k_proj", "v_proj", "o_proj")}
            maxima |= {f"model.layers.{index}.mlp.{linear}": torch.ones(64) for linear in ("gate_proj", "up_proj")}
            maxima |= {f"model.layers.{index}.mlp.down_proj": torch.ones(96)}
        write(self.here / name, maxima)
        return ["quantize", self.model(), self.out, "--statistics", self.here / name, *options]


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "quantized"
    assert sqplus("quantize", tiny(), path, "--text", text_file, *SMALL).exit_code == 0
    return path


@pytest.fixture
def bench(tmp_path: Path, tiny: Callable[..., Path], quantized: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, tiny, quantized, monkeypatch)


class Case(NamedTuple):
    """`make` gives the command line; the message must have every one of `says`. `late`: only known once weights are read,
    or the text has been cut into samples."""

    name: str
    make: Callable[[Bench], Sequence[object]]
    says: tuple[str, ...]
    late: bool = False


def no_gpu(b: Bench) -> list[object]:
    b.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return b.quantize(None, "--device", "cuda")


def no_space(b: Bench) -> list[object]:
    b.monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    return b.quantize()


def pickled(model: Path) -> None:
    rewrite(model, dict)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def remove_from_index(model: Path, name: str) -> None:
    edit_json(model / INDEX, weight_map={key: shard for key, shard in weight_map(model).items() if key != name})


def truncate(model: Path) -> None:
    shard = model / weight_map(model)[f"{Q_PROJ}.weight"]
    os.truncate(shard, shard.stat().st_size - 10)


def overflowing_gain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With --alpha 0 a channel is divided by 1 / max|W|: 0.5 here, and 6e4 / 0.5 is beyond float16."""
    tensors["model.layers.0.input_layernorm.weight"][5] = 6e4
    tensors[f"{Q_PROJ}.weight"][:, 5] = 2.0
    return tensors


def overflowing_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["model.decoder.layers.0.self_attn_layer_norm.bias"][5] = 6e4
    tensors["model.decoder.layers.0.self_attn.q_proj.weight"][:, 5] = 2.0
    return tensors


def underflowing_gain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["model.layers.0.input_layernorm.weight"][5] = 1e-7
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, 5] = 0.01
    return tensors


def overflowing_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With --alpha 1 a weight is multiplied by its input's maximum: about 1e4 here, and 6e4 * 1e4 / 15 is beyond float16."""
    tensors["model.layers.0.input_layernorm.weight"][5] = 1e4
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, 5] = 6e4
    return tensors


def narrow_mlp(model: Path) -> None:
    """72 channels between the layers, which no group size divides."""

    def narrow(tensor: Tensor) -> Tensor:
        return tensor[tuple(slice(72 if size == 96 else size) for size in tensor.shape)].contiguous()

    rewrite(model, lambda tensors: {name: narrow(tensor) for name, tensor in tensors.items()})


def folding(b: Bench, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> list[object]:
    return [*b.broken(lambda m: rewrite(m, change), name), "--alpha", "0"]


def without_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


class Code:
    """A malicious pickle: reading it makes the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.proof}",))


def chat(b: Bench, messages: object, template: str | None) -> list[object]:
    model = b.model()
    if template:
        (model / "chat_template.jinja").write_text(template)
    return b.quantize(model, text=b.file("chat.jsonl", json.dumps({"messages": messages})))


def data_set(b: Bench, text: str = "one", query: str = "") -> list[object]:
    datasets = pytest.importorskip("datasets")
    b.monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(b.here.parent / f"{b.here.name}-cache"))
    (b.here / "set").mkdir()
    b.file("set/train.jsonl", json.dumps({"text": text}) + "\n")
    return b.quantize(text=f"hf:{b.here / 'set'}?{query}")


def data_set_with_code(b: Bench) -> list[object]:
    pytest.importorskip("datasets")
    (b.here / "set").mkdir()
    b.file("set/set.py", "import datasets\n")
    return b.quantize(text=f"hf:{b.here / 'set'}")


def data_set_without_package(b: Bench) -> list[object]:
    b.monkeypatch.setitem(sys.modules, "datasets", None)
    return b.quantize(text="hf:nobody/nothing")


def existing(b: Bench) -> list[object]:
    b.out.mkdir()
    return b.quantize()


def other_options(b: Bench) -> list[object]:
    """A finished output, asked for with another alpha."""
    return ["quantize", b.model(), b.quantized(), "--text", b.text, *SMALL, "--alpha", "0.3"]


def unfinished(b: Bench) -> list[object]:
    """A run that another alpha left unfinished, as a kill would."""
    work = b.here / ".OUT.partial"
    (work / "blocks").mkdir(parents=True)
    (work / "blocks" / "00000.json").write_text("{}")
    (work / "recipe.json").write_text('{"alpha": 0.3}')
    (work / "lock").touch()
    return b.quantize()


def statistics_without(name: str) -> Callable[[Path, dict[str, Tensor]], None]:
    return lambda path, maxima: save_file({key: value for key, value in maxima.items() if key != name}, path)


def statistics_with(**changed: Tensor) -> Callable[[Path, dict[str, Tensor]], None]:
    return lambda path, maxima: save_file(maxima | {Q_PROJ: changed["q_proj"]}, path)


CASES = [
    # The model directory.
    Case("no such directory", lambda b: b.quantize(b.here / "nowhere"), ("no such model directory", "/nowhere", "download it first")),
    Case("a file as model", lambda b: b.quantize(b.text), ("/text.txt is a file", "the directory")),
    Case("no config", lambda b: b.broken(lambda m: (m / "config.json").unlink()), ("/model has no config.json",)),
    Case(
        "config is not JSON",
        lambda b: b.broken(lambda m: (m / "config.json").write_text("{")),
        ("/model/config.json is not valid JSON", "line 1", "download it again"),
    ),
    Case(
        "config is a list", lambda b: b.broken(lambda m: (m / "config.json").write_text("[]")), ("/model/config.json is not a JSON object",)
    ),
    Case(
        "unknown family",
        lambda b: b.quantize(b.model(model_type="lama")),
        ("'lama'", "config.json", "Supported: llama", "Did you mean 'llama'?"),
    ),
    Case("evaluate nothing", lambda b: b.evaluate(b.here / "nowhere"), ("no such model directory", "/nowhere")),
    Case("generate from nothing", lambda b: ["generate", b.here / "nowhere", "--prompt", "a"], ("no such model directory", "/nowhere")),
    Case("family not supported", lambda b: b.quantize(b.model(model_type="xglm")), ("model_type 'xglm'", "Supported: llama")),
    Case("a number as family", lambda b: b.quantize(b.model(model_type=7)), ("model_type '7'", "Supported: llama")),
    Case(
        "float64",
        lambda b: b.broken(lambda m: rewrite(m, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})),
        ("is in float64", "convert the checkpoint to float32"),
    ),
    Case("no family", lambda b: b.quantize(b.model(model_type=None)), ("model_type", "config.json", "Supported: llama")),
    Case(
        "remote code",
        lambda b: b.quantize(b.model(model_type="new", auto_map={"AutoConfig": "new.Config"})),
        ("/model", "auto_map", "not run", "Use a version"),
    ),
    Case(
        "remote code of a family that has a version of its own",
        lambda b: b.quantize(b.model(model_type="chatglm", auto_map={"AutoConfig": "new.Config"})),
        ("auto_map", "not run", "Did you mean 'glm'?"),
    ),
    Case(
        "refused layout of BLOOM",
        lambda b: b.quantize(b.model("bloom", apply_residual_connection_post_layernorm=True)),
        ("'bloom'", "cannot be smoothed", "residual stream", "Other layouts of its family can"),
    ),
    Case("refused layout", lambda b: b.quantize(b.model("opt", do_layer_norm_before=False)), ("'opt'", "cannot be smoothed", "OPT-350m")),
    Case("a word for a number", lambda b: b.quantize(b.model(hidden_size="wide")), ("/model/config.json", "hidden_size")),
    Case("no heads", lambda b: b.quantize(b.model(num_attention_heads=0)), ("/model/config.json",)),
    Case("unknown dtype of a model", lambda b: b.quantize(b.model(dtype="float17")), ("/model/config.json", "float17")),
    Case("unknown activation function", lambda b: b.quantize(b.model(hidden_act="gulu")), ("/model/config.json", "gulu")),
    Case("no blocks", lambda b: b.quantize(b.model(num_hidden_layers=0)), ("/model/config.json", "num_hidden_layers")),
    Case("inspect nothing", lambda b: ["inspect", b.here / "nowhere"], ("no such model directory", "/nowhere")),
    Case("inspect for no samples", lambda b: ["inspect", b.model(), "--samples", "-5"], ("--samples -5", "positive")),
    Case("inspect for no tokens", lambda b: ["inspect", b.model(), "--seq-len", "0"], ("--seq-len 0", "positive")),
    Case("inspect an unknown family", lambda b: ["inspect", b.model(model_type="misral")], ("'misral'", "Did you mean 'mistral'?")),
    # Its weights.
    Case("pickled weights", lambda b: b.broken(pickled), ("pytorch_model.bin", "can run code", "save_pretrained")),
    Case(
        "no weights", lambda b: b.broken(lambda m: [p.unlink() for p in m.glob("model*")]), ("/model has no weights", "model.safetensors")
    ),
    Case(
        "missing shard",
        lambda b: b.broken(lambda m: next(m.glob("model-00002*")).unlink()),
        ("/model/model-00002", "is missing", INDEX, "download it again"),
    ),
    Case("truncated shard", lambda b: b.broken(truncate), ("/model/model-0000", "truncated", "download it again")),
    Case("index is not JSON", lambda b: b.broken(lambda m: (m / INDEX).write_text("{")), (f"/model/{INDEX}", "download it again")),
    Case("index without map", lambda b: b.broken(lambda m: (m / INDEX).write_text("{}")), (f"/model/{INDEX}", "weight_map")),
    Case(
        "index points outside",
        lambda b: b.broken(lambda m: edit_json(m / INDEX, weight_map=weight_map(m) | {"lm_head.weight": "../quantized/model.safetensors"})),
        (f"/model/{INDEX}", "'../quantized/model.safetensors'", "outside the model directory", "refused"),
    ),
    Case(
        "index names a number",
        lambda b: b.broken(lambda m: edit_json(m / INDEX, weight_map=weight_map(m) | {"lm_head.weight": 3})),
        (f"/model/{INDEX}",),
    ),
    Case(
        "index names a tensor that is not there",
        lambda b: b.broken(lambda m: edit_json(m / INDEX, weight_map=weight_map(m) | {"extra": "model-00001-of-00006.safetensors"})),
        (f"/model/{INDEX}", "model-00001-of-00006.safetensors holds 'extra'", "download"),
    ),
    Case(
        "missing tensor",
        lambda b: b.broken(lambda m: remove_from_index(m, f"{Q_PROJ}.weight")),
        (f"/model has no tensor '{Q_PROJ}.weight'", "incomplete"),
    ),
    Case(
        "missing tensors",
        lambda b: b.broken(lambda m: rewrite(m, lambda tensors: {name: t for name, t in tensors.items() if ".2." not in name})),
        ("no tensor 'model.layers.2.", "and 8 more", "incomplete"),
    ),
    Case(
        "wrong shape",
        lambda b: b.broken(lambda m: change_tensor(m, f"{Q_PROJ}.weight", lambda t: t[:-1])),
        (f"'{Q_PROJ}.weight'", "/model/model-0000", "(63, 64)", "(64, 64)", "config.json"),
    ),
    Case(
        "wrong shape of the head",
        lambda b: b.broken(lambda m: change_tensor(m, "lm_head.weight", lambda t: t[:-1])),
        ("'lm_head.weight'", "(256, 64)", "(257, 64)", "config.json"),
    ),
    Case(
        "unsupported dtype",
        lambda b: b.broken(lambda m: change_tensor(m, f"{Q_PROJ}.weight", lambda t: t.to(torch.float8_e4m3fn))),
        (f"'{Q_PROJ}.weight'", "/model", "is in FP8", "no quant_method fp8"),
    ),
    Case(
        "integers instead of weights",
        lambda b: b.broken(lambda m: change_tensor(m, f"{Q_PROJ}.weight", lambda t: t.to(torch.int8))),
        (f"'{Q_PROJ}.weight'", "int8", "full-precision"),
    ),
    Case(
        "NaN in a weight",
        lambda b: b.broken(lambda m: change_tensor(m, f"{Q_PROJ}.weight", put(torch.nan))),
        (f"'{Q_PROJ}.weight'", "NaN"),
        True,
    ),
    Case(
        "infinity in the embedding",
        lambda b: b.broken(lambda m: change_tensor(m, "model.embed_tokens.weight", put(torch.inf))),
        ("'model.embed_tokens.weight'", "/model/model-0000", "infinite"),
        True,
    ),
    Case(
        "infinity in the head",
        lambda b: b.broken(lambda m: change_tensor(m, "lm_head.weight", put(-torch.inf))),
        ("'lm_head.weight'", "/model/model-0000", "infinite"),
        True,
    ),
    Case(
        "gain overflows float16",
        lambda b: folding(b, "llama", overflowing_gain),
        ("model.layers.0.input_layernorm", "gain overflows float16", "channel 5", "bfloat16", "--alpha"),
        True,
    ),
    Case(
        "bias overflows float16",
        lambda b: folding(b, "opt", overflowing_bias),
        ("model.decoder.layers.0.self_attn_layer_norm", "bias overflows float16", "channel 5", "bfloat16", "--alpha"),
        True,
    ),
    Case(
        "gain underflows float16",
        lambda b: folding(b, "llama", underflowing_gain),
        ("model.layers.0.input_layernorm", "underflows to zero in float16", "channel 5", "--alpha"),
        True,
    ),
    Case(
        "scale overflows float16",
        lambda b: b.quantize(b.model(change=lambda m: rewrite(m, overflowing_scale)), *W4A16, "--alpha", "1"),
        (Q_PROJ, "the scale of a group overflows float16"),
        True,
    ),
    Case("quantized already", lambda b: b.quantize(b.quantized()), ("/quantized is quantized already", "full-precision")),
    # Its tokenizer.
    Case("no tokenizer", lambda b: b.broken(without_tokenizer), ("/model has no tokenizer", "tokenizer.json", "copy it")),
    Case(
        "damaged tokenizer",
        lambda b: b.broken(lambda m: (m / "tokenizer.json").write_text("{")),
        ("the tokenizer in", "/model", "cannot be read"),
    ),
    Case(
        "tokenizer that is JSON only",
        lambda b: b.broken(lambda m: edit_json(m / "tokenizer.json", model="none")),
        ("the tokenizer in", "/model", "cannot be read", "copy it again"),
    ),
    Case(
        "tokenizer with code",
        lambda b: b.broken(
            lambda m: edit_json(m / "tokenizer_config.json", tokenizer_class="New", auto_map={"AutoTokenizer": ["n.New", None]})
        ),
        ("the tokenizer in", "/model", "tokenizer_config.json", "not run"),
    ),
    Case(
        "tokenizer of another model",
        lambda b: b.broken(
            lambda m: rewrite(m, lambda tensors: {name: t[:100] if len(t) == 257 else t for name, t in tensors.items()}),
            vocab_size=100,
            pad_token_id=None,
        ),
        ("the tokenizer in", "/model", "gives token id", "vocab_size 100", "the model's own"),
    ),
    # Text.
    Case("no text", lambda b: ["quantize", b.model(), b.out], ("--text FILE", "--statistics FILE")),
    Case("no text to calibrate on", lambda b: ["calibrate", b.model(), b.here / "OUT.safetensors"], ("--text FILE",)),
    Case("missing text", lambda b: b.quantize(text="nowhere.txt"), ("no such text file: nowhere.txt", "hf:NAME")),
    Case("a table as text", lambda b: b.quantize(text=b.file("table.csv", "a,b")), ("/table.csv", "'.csv'", ".txt", ".jsonl")),
    Case("empty text", lambda b: b.quantize(text=b.file("empty.txt", "")), ("the text is empty", "/empty.txt")),
    Case(
        "short text",
        lambda b: b.quantize(text=b.file("short.txt", "x" * 64)),
        ("/short.txt gives 3 samples of 32 tokens, and 4 were asked for", "--samples 3"),
    ),
    Case("binary text", lambda b: b.quantize(text=b.file("bytes.txt", b"\xff\xfe\x00")), ("/bytes.txt is not UTF-8",)),
    Case("broken line", lambda b: b.quantize(text=b.file("a.jsonl", '{"text": "one"}\n\n{"text"')), ("/a.jsonl, line 3 is not JSON",)),
    Case(
        "line without text",
        lambda b: b.quantize(text=b.file("a.jsonl", '{"content": "one"}')),
        ("/a.jsonl, line 1", "'text'", "'messages'"),
    ),
    Case(
        "chat without template",
        lambda b: chat(b, [{"role": "user", "content": "one"}], None),
        ("/chat.jsonl, line 1", "chat template", "plain text"),
    ),
    Case(
        "chat that the template refuses",
        lambda b: chat(b, [{"role": "tool", "content": "one"}], "{{ raise_exception('roles must alternate') }}"),
        ("/chat.jsonl, line 1", "chat template", "roles must alternate"),
    ),
    Case(
        "chat that the template fails on",
        lambda b: chat(b, [{"role": "user", "content": 1}], "{{ 'a' + messages[0].content }}"),
        ("/chat.jsonl, line 1", "chat template"),
    ),
    Case(
        "chat that is none",
        lambda b: chat(b, ["one"], "{% for m in messages %}{{ m.role }}{% endfor %}"),
        ("/chat.jsonl, line 1", "messages"),
    ),
    Case("no such data set", lambda b: b.quantize(text="hf:nobody/nothing"), ("the data set hf:nobody/nothing cannot be read",)),
    Case("data set without its package", data_set_without_package, ("hf:nobody/nothing", "pip install '.[datasets]'")),
    Case("a data set without a name", lambda b: b.quantize(text="hf:"), ("hf: names no data set", "hf:NAME")),
    Case(
        "splits that are added", lambda b: data_set(b, query="split=train+test"), ("the data set hf:", "split=train+test", "cannot be read")
    ),
    Case("a data set with code of its own", data_set_with_code, ("the data set hf:", "cannot be read", "scripts")),
    Case(
        "half of a character",
        lambda b: b.quantize(text=b.file("half.jsonl", json.dumps({"text": "one and \ud83d two"}))),
        ("lone surrogate", "one and", "remove it"),
        late=True,
    ),
    Case(
        "a search on one token",
        lambda b: b.quantize(None, *W4A16, text=b.file("one.jsonl", '{"text": "<|end|>"}'), small=("--samples", "1", "--seq-len", "32")),
        ("/one.jsonl gives one token", "more text"),
        late=True,
    ),
    Case("no such split", lambda b: data_set(b, query="split=test"), ("the data set hf:", "split=test", "cannot be read")),
    Case("no such column", lambda b: data_set(b, query="column=content"), ("row 1", "'content'")),
    Case("unknown option of a data set", lambda b: data_set(b, query="slit=train"), ("'slit'", "config, split and column")),
    # Options.
    Case("alpha too large", lambda b: b.quantize(None, "--alpha", "1.5"), ("--alpha 1.5", "between 0 and 1")),
    Case("alpha below zero", lambda b: b.quantize(None, "--alpha=-0.1"), ("--alpha -0.1", "between 0 and 1")),
    Case("alpha is NaN", lambda b: b.quantize(None, "--alpha", "nan"), ("--alpha nan", "between 0 and 1")),
    Case(
        "alpha is a word",
        lambda b: b.quantize(None, "--alpha", "strong"),
        ("--alpha strong", "'model', 'block' or a number between 0 and 1"),
    ),
    Case("alpha is nearly a word", lambda b: b.quantize(None, "--alpha", "modle"), ("--alpha modle", "Did you mean 'model'?")),
    *(
        Case(
            f"search by {alpha} without smoothing",
            lambda b, alpha=alpha: b.quantize(None, "--alpha", alpha, "--smooth", "none"),
            (f"--alpha {alpha}", "--smooth none", "leave one of them out"),
        )
        for alpha in ("model", "block", "0.7")
    ),
    *(
        Case(f"search by {alpha} without text", lambda b, alpha=alpha: ["quantize", b.model(), b.out, "--alpha", alpha], ("--text FILE",))
        for alpha in ("model", "block")
    ),
    *(
        Case(
            f"search by {alpha} with statistics",
            lambda b, alpha=alpha: b.with_statistics("s.safetensors", lambda path, maxima: save_file(maxima, path), "--alpha", alpha),
            (f"--alpha {alpha}", "loss on calibration text", "--text FILE"),
        )
        for alpha in ("model", "block")
    ),
    Case(
        "search on no samples",
        lambda b: b.quantize(None, "--alpha", "model", "--samples-search", "0"),
        ("--samples-search 0", "at least 1"),
    ),
    Case(
        "w4a16 without text",
        lambda b: b.with_statistics("s.safetensors", lambda path, maxima: save_file(maxima, path), *W4A16),
        ("--alpha model", "loss on calibration text", "--text FILE", "a number"),
    ),
    *(
        Case(
            f"search memory {memory}",
            lambda b, memory=memory: b.quantize(None, "--alpha", "model", f"--search-memory={memory}"),
            ("--search-memory",),
        )
        for memory in ("-1", "-0.5", "nan", "inf", "much")
    ),
    Case("unknown scheme", lambda b: b.quantize(None, "--scheme", "w8a9"), ("unknown scheme 'w8a9'", "w4a16", "Did you mean 'w8a8'?")),
    Case(
        "groups that do not divide",
        lambda b: b.quantize(None, "--scheme", "w4a16"),
        ("groups of 128", f"64 input channels of {Q_PROJ}", "--group-size 32 would do"),
    ),
    Case(
        "groups that do not divide a later layer",
        lambda b: b.quantize(None, "--scheme", "w4a16", "--group-size", "64"),
        ("groups of 64", "96 input channels of model.layers.0.mlp.down_proj", "--group-size 32 would do"),
    ),
    Case(
        "groups of no size divide",
        lambda b: b.quantize(b.model(change=narrow_mlp, intermediate_size=72), *W4A16),
        ("groups of 32", "72 input channels of model.layers.0.mlp.down_proj", "no group size fits", "--scheme w8a8"),
    ),
    Case("unknown group size", lambda b: b.quantize(None, "--scheme", "w4a16", "--group-size", "17"), ("--group-size 17", "128, 64, 32")),
    Case("group size is a word", lambda b: b.quantize(None, "--scheme", "w4a16", "--group-size", "row"), ("--group-size", "valid integer")),
    *(
        Case(
            f"{options[0]} with {scheme}",
            lambda b, scheme=scheme, options=options: b.quantize(None, "--scheme", scheme, *options),
            (f"{options[0]} does not apply to scheme {scheme}", "leave it out"),
        )
        for scheme, *options in (
            ("w8a8", "--group-size", "128"),
            ("w8a8", "--symmetric"),
            ("w4a16", "--activations", "token"),
            ("w4a16", "--weights", "channel"),
        )
    ),
    Case(
        "unknown activations", lambda b: b.quantize(None, "--activations", "tokens"), ("'tokens'", "token, tensor, static", "Did you mean")
    ),
    Case("unknown weights", lambda b: b.quantize(None, "--weights", "row"), ("'row'", "channel or tensor")),
    Case(
        "unknown smooth", lambda b: b.quantize(None, "--smooth", "norm"), ("--smooth 'norm'", "none, norms, all", "Did you mean 'norms'?")
    ),
    Case("unknown compute dtype", lambda b: b.quantize(None, "--compute-dtype", "fp8"), ("compute dtype 'fp8'", "float32 or checkpoint")),
    Case("unknown device", lambda b: b.quantize(None, "--device", "gpu"), ("device 'gpu'", "cpu, cuda or cuda:N")),
    Case("device that holds nothing", lambda b: b.quantize(None, "--device", "meta"), ("device 'meta'", "cpu, cuda or cuda:N")),
    Case("no GPU", no_gpu, ("device 'cuda'", "no CUDA device", "--device cpu")),
    Case("no samples", lambda b: b.quantize(small=("--samples", "0")), ("--samples 0", "at least 1")),
    Case("samples is a word", lambda b: b.quantize(small=("--samples", "many")), ("--samples", "valid integer")),
    Case("one token", lambda b: b.quantize(small=("--seq-len", "1")), ("--seq-len 1", "2 tokens")),
    Case("long samples", lambda b: b.quantize(small=("--samples", "1", "--seq-len", "257")), ("--seq-len 257", "256 positions")),
    Case("unknown option", lambda b: b.quantize(None, "--aplha", "0.5"), ("--aplha", "--alpha")),
    Case("text and statistics", lambda b: b.quantize(None, "--statistics", b.text), ("--text", "--statistics", "not both")),
    # Statistics.
    Case("missing statistics", lambda b: b.with_statistics("s.pt", lambda path, maxima: None), ("no such statistics file", "/s.pt")),
    Case(
        "statistics of another kind",
        lambda b: b.with_statistics("s.npz", lambda path, maxima: path.touch()),
        ("/s.npz", ".safetensors and .pt"),
    ),
    Case(
        "damaged statistics",
        lambda b: b.with_statistics("s.safetensors", lambda path, maxima: path.write_text("x")),
        ("/s.safetensors", "cannot be read"),
    ),
    Case(
        "damaged .pt statistics",
        lambda b: b.with_statistics("s.pt", lambda path, maxima: path.write_text("x")),
        ("/s.pt", "cannot be read"),
    ),
    Case(
        "statistics with code",
        lambda b: b.with_statistics("s.pt", lambda path, maxima: torch.save(maxima | {"code": Code(path.with_name("proof"))}, path)),
        ("/s.pt", "never run", "safetensors"),
    ),
    Case(
        "pickle as statistics",
        lambda b: b.with_statistics(
            "s.pt", lambda path, maxima: path.write_bytes(pickle.dumps({"code": Code(path.with_name("proof"))}, protocol=2))
        ),
        ("/s.pt", "never run", "safetensors"),
    ),
    Case(
        "statistics in a list",
        lambda b: b.with_statistics("s.pt", lambda path, maxima: torch.save([1], path)),
        ("/s.pt is not a dictionary",),
    ),
    Case(
        "statistics without names",
        lambda b: b.with_statistics("s.pt", lambda path, maxima: torch.save({0: torch.ones(1)}, path)),
        ("/s.pt", Q_PROJ),
    ),
    Case(
        "statistics lack a linear",
        lambda b: b.with_statistics("s.safetensors", statistics_without(Q_PROJ)),
        (f"/s.safetensors has no maxima for '{Q_PROJ}'", "Did you mean"),
    ),
    Case(
        "statistics of another size",
        lambda b: b.with_statistics("s.safetensors", statistics_with(q_proj=torch.ones(32))),
        ("/s.safetensors", f"'{Q_PROJ}'", "(32,)", "64 input channels"),
    ),
    Case(
        "negative statistics",
        lambda b: b.with_statistics("s.safetensors", statistics_with(q_proj=-torch.ones(64))),
        (f"'{Q_PROJ}'", "negative"),
    ),
    Case(
        "NaN in statistics",
        lambda b: b.with_statistics("s.safetensors", statistics_with(q_proj=put(torch.nan)(torch.ones(64)))),
        (f"'{Q_PROJ}'", "NaN"),
    ),
    Case(
        "statistics that contradict",
        lambda b: b.with_statistics("s.safetensors", statistics_with(q_proj=2 * torch.ones(64))),
        ("/s.safetensors", f"'{Q_PROJ}'", "k_proj", "same input"),
    ),
    # The output.
    Case("output exists", existing, ("/OUT exists already", "choose another output, or remove it")),
    Case("output of other options", other_options, ("/quantized exists already", "choose another output, or remove it")),
    Case("unfinished run of other options", unfinished, ("/.OUT.partial", "alpha was 0.3 and is now 0.85", "remove that directory")),
    Case("output is the model", lambda b: ["quantize", b.model(), b.here / "model", "--text", b.text, *SMALL], ("/model exists already",)),
    Case(
        "output below a file",
        lambda b: ["quantize", b.model(), b.text / "deep" / "OUT", "--text", b.text, *SMALL],
        ("/text.txt is a file", "choose another output"),
    ),
    Case("no space", no_space, ("0.00 GB free", "needs about", "free some space"), late=True),
    Case(
        "statistics of another suffix",
        lambda b: ["calibrate", b.model(), b.here / "OUT.pt", "--text", b.text],
        ("/OUT.pt", "ends in .safetensors"),
    ),
    Case(
        "factors of nothing",
        lambda b: ["calibrate", b.model(), b.here / "OUT.safetensors", "--text", b.text, "--alpha", "0.5", "--smooth", "none"],
        ("--smooth none", "norms or all"),
    ),
    Case(
        "maxima of a scheme",
        lambda b: ["calibrate", b.model(), b.here / "OUT.safetensors", "--text", b.text, "--scheme", "w8a8"],
        ("do not depend on a scheme", "give --alpha"),
    ),
    Case(
        "factors of another alpha",
        lambda b: ["calibrate", b.model(), b.here / "OUT.safetensors", "--text", b.text, "--alpha", "modle", "--scheme", "w8a8"],
        ("--alpha modle", "Did you mean 'model'"),
    ),
    # Verifying.
    Case("verify nothing", lambda b: ["verify", b.here / "nowhere"], ("no such", "/nowhere")),
    Case("verify a model", lambda b: ["verify", b.model()], ("/model has no manifest.json", "not written by smoothquant-plus")),
    Case(
        "verify against nothing",
        lambda b: ["verify", b.quantized(), "--against", b.here / "nowhere"],
        ("no such model directory", "/nowhere"),
    ),
    Case("verify in no vLLM", lambda b: ["verify", b.quantized(), "--vllm"], ("vLLM is not installed", "pip install '.[vllm]'")),
    # Evaluating and generating.
    Case("a server without vLLM", lambda b: ["bench", "serve", b.model(), "--max-model-len", "64"], ("vLLM is not installed",)),
    Case("a benchmark of no server", lambda b: ["bench", "serve", "--max-model-len", "64"], ("give the directory of a model",)),
    Case("evaluate on nothing", lambda b: ["eval", b.model()], ("--text FILE",)),
    Case("evaluate on a missing file", lambda b: b.evaluate(b.model(), text="nowhere.txt"), ("no such text file: nowhere.txt",)),
    Case(
        "evaluate on one token",
        lambda b: b.evaluate(b.model(), text=b.file("one.jsonl", '{"text": "<|end|>"}')),
        ("/one.jsonl has 1 token", "2"),
    ),
    Case(
        "long stride",
        lambda b: b.evaluate(b.model(), "--stride", "33"),
        ("--seq-len 32 --stride 33", "between 1 and the sequence length"),
    ),
    Case("no stride", lambda b: b.evaluate(b.model(), "--stride", "0"), ("--stride 0", "between 1")),
    Case("long windows", lambda b: b.evaluate(b.model("opt"), "--seq-len", "257"), ("--seq-len 257", "256 positions")),
    Case(
        "foreign quantization",
        lambda b: b.evaluate(b.quantized(quantization_config={"quant_method": "awq", "bits": 4})),
        ("/quantized/config.json", "'awq'", "only compressed-tensors"),
    ),
    *(
        Case(
            f"config groups that are {kind}",
            lambda b, groups=groups: b.evaluate(
                b.quantized(quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups})
            ),
            ("/quantized/config.json", "JSON object"),
        )
        for kind, groups in {
            "a list": ["x"],
            "numbers": {"a": 1},
            "of words": {"group_0": {"targets": ["Linear"], "weights": "x", "input_activations": "y"}},
        }.items()
    ),
    Case(
        "integers without a quantization",
        lambda b: b.evaluate(b.quantized(quantization_config=None)),
        ("/quantized/model-0000", "int8", "quantization_config"),
    ),
    Case(
        "evaluate a wrong shape",
        lambda b: b.evaluate(b.model(change=lambda m: change_tensor(m, f"{Q_PROJ}.weight", lambda t: t[:-1]))),
        (f"'{Q_PROJ}.weight'", "(63, 64)", "(64, 64)", "config.json"),
    ),
    Case("evaluate without tokenizer", lambda b: b.evaluate(b.model(change=without_tokenizer)), ("/model has no tokenizer",)),
    Case(
        "damaged generation_config",
        lambda b: b.evaluate(b.model(change=lambda m: (m / "generation_config.json").write_text("[]"))),
        ("/model/generation_config.json cannot be read",),
    ),
    Case(
        "unknown dtype",
        lambda b: b.evaluate(b.model(), "--dtype", "fp16"),
        ("--dtype 'fp16'", "float32, bfloat16 or float16"),
    ),
    Case(
        "unknown backend",
        lambda b: b.evaluate(b.quantized(), "--backend", "torhc"),
        ("backend 'torhc'", "Did you mean 'torch'?"),
    ),
    Case(
        "backend without integers",
        lambda b: b.evaluate(b.model(), "--backend", "torch"),
        ("/model is not quantized", "backend"),
    ),
    Case("half of a character in a prompt", lambda b: ["generate", b.model(), "--prompt", "caf\udce9"], ("lone surrogate", "'caf'")),
    Case("tasks of no model", lambda b: ["tasks", b.here / "nowhere", "--task", "hellaswag"], ("no such model directory", "/nowhere")),
    Case("empty prompt", lambda b: ["generate", b.model(), "--prompt", ""], ("the prompt is empty",)),
    Case(
        "no new tokens",
        lambda b: ["generate", b.model(), "--prompt", "a", "--max-new-tokens", "0"],
        ("--max-new-tokens", "greater than or equal to 1"),
    ),
    Case(
        "long generation",
        lambda b: ["generate", b.model("opt"), "--prompt", "abcdef", "--max-new-tokens", "251"],
        ("--max-new-tokens 251", "6 tokens", "256 positions"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(bench: Bench, case: Case) -> None:
    arguments = case.make(bench)
    before = {path: path.stat().st_mtime_ns for path in bench.here.rglob("*")}
    result = sqplus(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "error: " in result.stderr.lower()
    assert "Traceback" not in result.stderr
    for fragment in case.says:
        assert fragment in result.stderr
    assert "block 1/" not in result.stderr  # before long work: not even one block is done
    assert case.late or "calibration: " not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in bench.here.rglob("*")} == before, "something was left behind or changed"


def test_advice_can_be_followed(bench: Bench) -> None:
    """A refused command leaves nothing behind that stands in the way of the corrected one."""
    text = bench.file("short.txt", "x" * 64)
    model = bench.model()
    assert sqplus(*bench.quantize(model, text=text)).exit_code == 2
    assert sqplus(*bench.quantize(model, text=text, small=("--samples", "3", "--seq-len", "32"))).exit_code == 0


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smoothquant_plus.cli", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_wrong_option_in_a_shell(bench: Bench) -> None:
    done = shell(*bench.quantize(small=("--samples", "many")))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--samples" in done.stderr
    assert not bench.out.exists()


def test_wrong_model_in_a_shell(bench: Bench) -> None:
    done = shell(*bench.quantize(bench.here / "nowhere"), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such model directory: ")
    assert not bench.out.exists()


def test_json_in_a_shell(bench: Bench) -> None:
    done = shell(*bench.quantize(), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(bench.out)
    assert "block 1/3" in done.stderr


# A full disk: the run ends with a message, and the same command completes once there is room.


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("model-*.safetensors")}


def assert_full(result: Result, output: Path) -> None:
    assert result.exit_code == 2, result.output
    assert "No space left on device" in result.stderr
    assert "free some space and run the same command again" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize("write", [1, 3, 8], ids=["before the first block", "in a block", "in the last block"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")]
)
def test_full_disk(bench: Bench, quantized: Path, write: int, error: Exception) -> None:
    writes = iter(range(1, 100))

    def failing(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if next(writes) == write:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, **options)

    command = bench.quantize()
    with bench.monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", failing)
        assert_full(sqplus(*command), bench.out)
    assert sqplus(*command).exit_code == 0
    assert shards(bench.out) == shards(quantized)
    assert not (bench.here / ".OUT.partial").exists()


def test_full_disk_for_real(bench: Bench, quantized: Path) -> None:
    disk = bench.here / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(880 * 1024))
        bench.out = disk / "OUT"
        command = bench.quantize()
        with bench.monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))  # as if it filled up later
            assert_full(sqplus(*command), bench.out)
        assert list((disk / ".OUT.partial" / "output").iterdir())  # some of the work was done
        ballast.unlink()
        assert sqplus(*command).exit_code == 0
        assert shards(bench.out) == shards(quantized)
    finally:
        subprocess.run(["umount", disk], check=True)


# What looks wrong and is not.


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the first OPT checkpoints."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_rotary_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As old Llama checkpoints have them."""
    return tensors | {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.rand(8) for index in range(3)}


def dead_channels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the first pair channel 3 has no activations and channel 7 no weights."""
    tensors["model.layers.0.input_layernorm.weight"][3] = 0.0
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, 7] = 0.0
    return tensors


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("opt", without_prefix),
        ("opt", dict),
        ("llama", with_rotary_tables),
        ("llama", dead_channels),
        ("llama-mha-tied-biases", dict),
    ],
    ids=["OPT without 'model.'", "OPT", "rotary tables", "dead channels", "tied embeddings"],
)
def test_unusual_model(bench: Bench, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """It is quantized, verified, and answers like the original; what is not quantized is carried along as it was."""
    model = bench.model(name, lambda m: rewrite(m, change))
    for command in (bench.quantize(model), ["verify", bench.out, "--against", model]):
        result = sqplus(*command)
        assert result.exit_code == 0, result.stderr
    ids = torch.arange(40, 104).reshape(1, -1)
    before, after = load(model)(input_ids=ids).logits, load(bench.out)(input_ids=ids).logits
    assert torch.linalg.vector_norm(after - before) < 0.1 * torch.linalg.vector_norm(before)

    original, written = load_file(model / "model.safetensors"), {}
    for shard in bench.out.glob("model-*.safetensors"):
        written |= load_file(shard)
    assert set(original) == {key for key in written if not key.endswith("_scale")}
    for key in original:
        if "inv_freq" in key or "embed_tokens" in key or key == "lm_head.weight":
            assert torch.equal(original[key], written[key])

    records = [pair for block in json.loads((bench.out / "plan.json").read_text())["blocks"] for pair in block["pairs"]]
    assert [pair["dead_channels"] for pair in records] == [2 if change is dead_channels else 0, *[0] * (len(records) - 1)]
    if change is dead_channels:
        gain = "model.layers.0.input_layernorm.weight"
        assert torch.equal(written[gain][[3, 7]], original[gain][[3, 7]])  # their factor is 1
        assert not torch.equal(written[gain], original[gain])


def in_lines(b: Bench) -> list[object]:
    return b.quantize(text=b.file("text.jsonl", json.dumps({"text": families.TEXT}) + "\n\n"))


def as_chat(b: Bench) -> list[object]:
    halves = families.TEXT[:5000], families.TEXT[5000:]
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), halves, strict=True)]
    return chat(b, messages, "{% for message in messages %}{{ message.content }}{% endfor %}")


def unsharded(b: Bench) -> list[object]:
    return b.quantize(b.model(change=lambda m: rewrite(m, dict)))


def measured_before(b: Bench, suffix: str) -> list[object]:
    """Statistics from `calibrate`, as they are or as another tool would save them."""
    model, statistics = b.model(), b.here / "statistics.safetensors"
    assert sqplus("calibrate", model, statistics, "--text", b.text, *SMALL).exit_code == 0
    if suffix == ".pt":
        torch.save(load_file(statistics), statistics.with_suffix(suffix))
    return ["quantize", model, b.out, "--statistics", statistics.with_suffix(suffix)]


@pytest.mark.parametrize(
    "make",
    [
        in_lines,
        as_chat,
        lambda b: data_set(b, families.TEXT),
        unsharded,
        lambda b: measured_before(b, ".safetensors"),
        lambda b: measured_before(b, ".pt"),
    ],
    ids=["jsonl", "chat", "data set", "one file", "statistics", "statistics .pt"],
)
def test_same_input_in_another_form(bench: Bench, quantized: Path, make: Callable[[Bench], list[object]]) -> None:
    result = sqplus(*make(bench))
    assert result.exit_code == 0, result.stderr
    assert shards(bench.out) == shards(quantized)


def test_line_separators_inside_a_document(bench: Bench) -> None:
    """A JSON string may hold U+2028 and U+0085 as they are; only a newline ends a line of a .jsonl file."""
    documents = ["one\u2028two", "three\u0085four"]
    path = bench.file("text.jsonl", "".join(json.dumps({"text": document}, ensure_ascii=False) + "\r\n" for document in documents))
    assert list(read_documents([str(path)], None)) == documents
