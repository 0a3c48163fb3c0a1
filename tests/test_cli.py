"""The command line as a user runs it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import smoothquant_plus
from smoothquant_plus import __version__
from smoothquant_plus.cli import app
from smoothquant_plus.inspection import inspect
from smoothquant_plus.pipeline import quantize


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


def test_what_is_printed_is_what_was_meant(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Brackets, colons and tabs in paths and in what a model says; and a terminal that lacks a letter."""
    out = tmp_path / "a[b:x:2]" / "out[/v2]\t:b:"
    app(["quantize", str(tiny()), str(out), "--smooth", "none"], standalone_mode=False)
    assert capfd.readouterr().out.startswith(f"{out}: w8a8")
    app(["verify", str(out)], standalone_mode=False)
    assert capfd.readouterr().out.startswith(f"{out}: ")
    again = CliRunner().invoke(app, ["quantize", str(tiny()), str(out), "--smooth", "none", "--lm-head", "w8a8"])
    assert f"error: {out} exists already" in again.output
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = sqplus("generate", out, "--prompt", "y = x[a:b:c]\t[i:x:2] \u00e9", "--max-new-tokens", "2")
    assert done.returncode == 0 and done.stdout.startswith("y = x[a:b:c]\t[i:x:2] ?")


@pytest.mark.parametrize(
    ("error", "command", "says"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "eval", "use a smaller --seq-len"),
        (MemoryError(), "generate", "use fewer --max-new-tokens"),
        (MemoryError(), "inspect", "not enough memory (MemoryError)"),
        (OSError(errno.ENOSPC, "No space left on device"), "eval", "run the same command again."),
        (OSError(errno.ENOSPC, "No space left on device"), "quantize", "it continues where it was"),
        (KeyboardInterrupt(), "eval", "interrupted.\n"),
        (KeyboardInterrupt(), "quantize", "run the same command again to continue"),
    ],
    ids=str,
)
def test_what_ends_a_command_is_told(
    error: BaseException, command: str, says: str, tiny: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    homes = {"eval": "evaluation.perplexity.evaluate", "generate": "runtime.generate.generate", "inspect": "inspection.inspect"}
    monkeypatch.setattr(f"smoothquant_plus.{homes.get(command, 'pipeline.quantize')}", fail)
    arguments = {"eval": ("--text", text_file), "generate": ("--prompt", "a"), "quantize": ("OUT",)}.get(command, ())
    result = CliRunner().invoke(app, [command, str(tiny()), *map(str, arguments)])
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert says in result.output and "Traceback" not in result.output


def test_a_quantized_model_is_inspected_as_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny(), tmp_path / "out", smooth="none")
    assert "it is quantized already (compressed-tensors)" in CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    assert inspect(tiny()).quantized is None


def test_the_public_names_are_there() -> None:
    """And importing the package does not import torch."""
    code = "import smoothquant_plus as sq, sys; assert set(sq.__all__) <= set(dir(sq)) and 'torch' not in sys.modules; print(sq.InputError)"
    assert "errors.InputError" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(callable(getattr(smoothquant_plus, name)) or name == "SCHEMES" for name in smoothquant_plus.__all__)


def test_help_and_version() -> None:
    assert sqplus("--version").stdout.strip() == __version__
    text = sqplus("--help").stdout
    for command in ("quantize", "calibrate", "verify", "eval", "generate", "inspect", "plot", "demo", "bench"):
        assert command in text
