"""The command that `sqplus serve` becomes; tests/vllm runs it for real."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from smoothquant_plus.cli import app
from smoothquant_plus.errors import InputError
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.runtime import serve
from smoothquant_plus.runtime.serve import KV_CACHE, SERVER, server_command


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: ModuleSpec(name, None, origin="somewhere"))
    monkeypatch.delenv(KV_CACHE, raising=False)


def test_what_is_started(tiny: Callable[..., Path], tmp_path: Path) -> None:
    command, environment = server_command(tiny("llama"), "w8a8", ["--port", "8001"])
    assert command[:5] == [sys.executable, "-m", SERVER, "--model", str(tiny("llama"))] and command[-2:] == ["--port", "8001"]
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides == {"quantization_config": {"quant_method": "sqplus", "scheme": "w8a8"}}
    assert 0 < float(command[command.index("--gpu-memory-utilization") + 1]) < 1 and int(environment[KV_CACHE]) >= 1
    quantize(tiny("llama"), tmp_path / "out", smooth="none", calibration=Calibration())
    command, environment = server_command(tmp_path / "out", None, ["--gpu-memory-utilization=0.5", "--kv-cache-memory-bytes=1000"])
    assert command[5:] == ["--gpu-memory-utilization=0.5", "--kv-cache-memory-bytes=1000"] and not environment
    with pytest.raises(InputError, match=r"--scheme w4a16: .*out is quantized already \(w8a8\), leave it out"):
        server_command(tmp_path / "out", "w4a16")


def test_what_is_refused(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown scheme 'w4a8'"):
        server_command(tiny("llama"), "w4a8")
    for option in ("--hf-overrides", "--hf_overrides={}", "--hf-overrides.max_position_embeddings"):
        with pytest.raises(InputError, match=rf'{option}: it is also what --scheme gives vLLM.*"scheme": "w8a8"'):
            server_command(tiny("llama"), "w8a8", [option, "1"])
    with pytest.raises(InputError, match=r"config\.json"):
        server_command(tmp_path)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vLLM is not installed here: `pip install '\.\[vllm\]'`"):
        server_command(tiny("llama"))


def test_as_a_user_runs_it(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: started.append((command, environment)))
    app(["serve", str(tiny("llama")), "--scheme", "w4a16", "--max-model-len", "64", "--port=8001"], standalone_mode=False)
    ((command, environment),) = started
    assert (
        command[-3:] == ["--max-model-len", "64", "--port=8001"] and KV_CACHE in environment and environment["PATH"] == os.environ["PATH"]
    )
    assert f"{KV_CACHE}=" in capfd.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert app(["serve", str(tiny("llama"))], standalone_mode=False) == 2
    assert "vLLM is not installed here" in capfd.readouterr().err
