"""The commands of docs/serving.md and docs/vllm.md, as a user runs them: servers on this machine, asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import NEW_TOKENS, Answer, ours
from transformers import LlamaConfig

import families
from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation import benchmark_serve
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration

DOCS = Path(__file__).parents[2] / "docs"
SQPLUS = Path(sys.executable).with_name("sqplus")
ELSEWHERE = {  # what the pages say needs a GPU, or several, or several machines
    "tensor-parallel-size 4": "serving.md",
    "tensor-parallel-size 8": "serving.md",
    '"sqplus_kernels": "triton"': "vllm.md",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QUICK = ["--enforce-eager", "--dtype", "float32", "--chat-template", TEMPLATE]

families.TINY["wide-long"] = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **{**families.COMMON, "max_position_embeddings": 4096},
)


@pytest.fixture(scope="module")
def here(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with MODEL, OUT, made of it, and text.txt, as the pages have them."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "MODEL").symlink_to(tiny("wide-long"))
    (folder / "text.txt").write_text(families.TEXT)
    quantize(folder / "MODEL", folder / "OUT", activations="static", smooth="all", calibration=calibration)
    return folder


def commands(page: str, start: str) -> list[str]:
    """The lines of code blocks that begin so, without their comments."""
    lines = re.findall(rf"^(?: {{4}})?({start} .*)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines if not any(option in line for option in ELSEWHERE)]


def ask(port: int, path: str, content: dict[str, Any]) -> Any:
    data = json.dumps({"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **content}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


@pytest.mark.parametrize("command", dict.fromkeys([*commands("serving.md", "sqplus serve"), *commands("vllm.md", "sqplus serve")]))
def test_the_server_answers(command: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions with the tokens of this package's own runtime, and chat."""
    monkeypatch.chdir(here)
    served = Path(shlex.split(command)[2])
    started = [str(SQPLUS), *shlex.split(command)[1:], *QUICK]
    prompt = families.IDS[0].tolist()
    # The last of two --port counts.
    with benchmark_serve.server(started, {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}) as port:
        completion = ask(port, "completions", {"model": str(served), "prompt": prompt, "return_token_ids": True})
        chat = ask(port, "chat/completions", {"model": str(served), "messages": [{"role": "user", "content": "2 times 9 is "}]})
    assert chat["message"]["content"] and chat["finish_reason"] == "length"
    if served.name == "MODEL":
        group_size = 64 if "group_size" in command else 128
        quantize(served, tmp_path / "out", scheme="w4a16", group_size=group_size, smooth="none")
        served = tmp_path / "out"
    assert completion["token_ids"] == ours(served)[1]


def test_the_benchmark_of_a_server(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(benchmark_serve, "ROUNDS", 1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    (command,) = commands("serving.md", "sqplus bench serve")
    sizes = [
        "--requests",
        "3",
        "--input-tokens",
        "16",
        "--output-tokens",
        "4",
        "--concurrency",
        "2",
        "--json",
        str(tmp_path / "found.json"),
    ]
    app([*shlex.split(command)[1:], *sizes, "--enforce-eager"], standalone_mode=False)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["float16", "w8a8 while loading", "w4a16 while loading"]
    for row in rows:
        assert row["output_tokens_per_second"] > 0 and row["time_to_first_token_ms"] > 0 and row["time_per_output_token_ms"] > 0
    assert rows[0]["throughput_ratio"] == rows[0]["first_token_ratio"] == rows[0]["output_token_ratio"] == 1
    assert "3 requests of 16 tokens and 4 new ones, 2 at a time MODEL: scheme float16" in capfd.readouterr().out


def test_a_server_that_does_not_start(here: Path) -> None:
    with (
        pytest.raises(InputError, match=r"vLLM's server ended with exit code 2: .*--no-such-option(.|\n)*unrecognized arguments"),
        benchmark_serve.server([str(SQPLUS), "serve", str(here / "OUT"), "--no-such-option"], {}),
    ):
        raise AssertionError("it is running")


def test_from_a_model_to_a_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "MODEL").symlink_to(tiny("wide-long"))
    for name in ("text.txt", "held_out.txt"):
        (tmp_path / name).write_text(families.TEXT)
    few = {"quantize": ["--samples", "4", "--seq-len", "32"], "eval": ["--seq-len", "32"]}
    for command in (line for name in ("inspect", "quantize", "eval") for line in commands("serving.md", f"sqplus {name}")):
        run(command, tmp_path, *few.get(command.split()[1], []))
    assert (tmp_path / "OUT").is_dir()


def test_verified_in_vllm(here: Path) -> None:
    (verify,) = commands("serving.md", "sqplus verify")
    done = run(verify, here)
    assert "vLLM answers the same" in done.stdout and "64 of 64 greedy tokens are the same" in done.stdout


def test_the_papers_deployment(tiny: Callable[..., Path], theirs: Callable[..., Answer], tmp_path: Path) -> None:
    """`calibrate --alpha model` beside a full-precision model, which vLLM then quantizes while loading: the answers of the checkpoint that
    `quantize` makes with the same options."""
    shutil.copytree(tiny("wide-long"), tmp_path / "MODEL")
    (tmp_path / "text.txt").write_text(families.TEXT)
    few = ["--samples", "4", "--seq-len", "32"]
    run("sqplus quantize MODEL OUT --scheme w4a16 --text text.txt", tmp_path, *few)
    (calibrate,) = commands("vllm.md", "sqplus calibrate MODEL MODEL/smoothing.safetensors")
    run(calibrate, tmp_path, *few)
    found, expected = theirs(tmp_path / "MODEL", quantization="sqplus"), theirs(tmp_path / "OUT")
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


def run(command: str, directory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(SQPLUS), *shlex.split(command)[1:], *more], cwd=directory, capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_other_commands_say_what_they_need() -> None:
    for option, page in ELSEWHERE.items():
        before, found, _ = (DOCS / page).read_text().partition(option)
        assert found and re.search(r"needs (a GPU|several GPUs|several machines)", before[-400:])
