"""`sqplus demo`, on less text and with fewer recipes than it has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoothquant_plus.cli import app
from smoothquant_plus.demo import run as demo


def test_the_demo_shows_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    less = replace(demo.CODE, samples=2)
    naive, smoothed = "naive W8A8, per-tensor static", "SmoothQuant O3, per-tensor static"
    monkeypatch.setattr(demo, "RECIPES", {name: demo.RECIPES[name] | {"calibration": less} for name in (naive, smoothed)})
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 2 * demo.SEQ_LEN)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "kept"), "--json"])
    assert result.exit_code == 0, result.output
    full, worse, near = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in (worse, near)] == [naive, smoothed]
    assert worse["perplexity"] > 5 * full["perplexity"] and near["perplexity"] < 1.05 * full["perplexity"]
    assert near["megabytes"] < 0.65 * full["megabytes"] and near["text"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"planted", "quantized-0", "quantized-1"}
    again = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "kept")])
    assert again.exit_code == 2 and "exists already" in again.output
