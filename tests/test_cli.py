"""The command line as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smoothquant_plus import __version__
from smoothquant_plus.cli import app


def sqplus(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "smoothquant_plus.cli", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_every_command_prints_one_json_object_and_nothing_else(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has everything imported; file descriptors are captured, so that no library may talk there either."""
    model, out = tiny("llama"), tmp_path / "out"
    calibration = ("--text", text_file, "--samples", "4", "--seq-len", "32", "--json")
    runs = {
        "inspect": (model, "--json"),
        "quantize": (model, out, *calibration),
        "calibrate": (model, tmp_path / "statistics.safetensors", *calibration),
        "verify": (out, "--against", model, "--json"),
        "eval": (out, "--text", text_file, "--seq-len", "64", "--dtype", "float32", "--json"),
        "generate": (out, "--prompt", "12 times", "--max-new-tokens", "4", "--dtype", "float32", "--attention", "int8", "--json"),
    }
    found = {}
    for command, arguments in runs.items():
        app([command, *map(str, arguments)], standalone_mode=False)
        printed = capfd.readouterr().out
        assert printed.count("\n") == 1
        found[command] = json.loads(printed)
    assert {"family", "blocks", "pairs", "sizes"} <= set(found["inspect"])
    expected = {"output", "scheme", "alpha", "blocks", "bytes_before", "bytes_after", "peak_rss_mb", "seconds"}
    assert expected <= set(found["quantize"])
    assert found["quantize"]["scheme"] == "w8a8" and found["quantize"]["alpha"] == 0.85 and found["quantize"]["blocks"] == 3
    assert {"perplexity", "tokens", "loss"} <= set(found["eval"])
    assert found["verify"]["linears"] == 21 and found["verify"]["equivalence_error"] < 1e-5
    assert found["generate"]["prompt"] == "12 times" and found["generate"]["text"]
    assert Path(found["calibrate"]["output"]).is_file()


def test_without_json_the_result_is_on_stdout_and_progress_on_stderr(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    done = sqplus("quantize", tiny("opt"), tmp_path / "out", "--text", text_file, "--samples", "4", "--seq-len", "32")
    assert done.returncode == 0
    assert "w8a8, 2 blocks, alpha 0.5" in done.stdout and "block" not in done.stdout.replace("2 blocks", "")
    assert "block 1/2" in done.stderr and "left" in done.stderr and "GB peak" in done.stderr


def test_help_and_version() -> None:
    assert sqplus("--version").stdout.strip() == __version__
    text = sqplus("--help").stdout
    for command in ("quantize", "calibrate", "verify", "eval", "generate", "inspect", "plot", "demo", "bench"):
        assert command in text
