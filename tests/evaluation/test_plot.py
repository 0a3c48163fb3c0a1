from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.plot import plot
from smoothquant_plus.models.statistics import STATISTICS
from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration
from smoothquant_plus.search import Search
from smoothquant_plus.verification import verify

W4A16 = {"scheme": "w4a16", "group_size": 32, "search": Search(samples=1)}


@pytest.mark.parametrize(
    ("alpha", "smooth", "drawn"),
    [("model", "norms", ["loss", "activations"]), ("block", "all", ["loss", "activations"]), (0.5, "norms", ["activations"])],
)
def test_what_was_recorded_is_drawn(
    alpha: str | float, smooth: str, drawn: list[str], tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny(), out, alpha=alpha, smooth=smooth, calibration=calibration, **W4A16)
    paths = plot(out)
    assert paths == [out / "plots" / f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert "block 2" in (out / "plots" / "activations.svg").read_text() or "activations" not in drawn
    verify(out)  # pictures may lie beside what was written
    if alpha == 0.5:
        assert plot(out, tmp_path / "elsewhere")[0].parent == tmp_path / "elsewhere"


def test_a_wrapper_is_drawn_and_damage_is_named(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny("llava"), out, calibration=calibration)
    assert "block 1" in next(path for path in plot(out) if path.suffix == ".svg").read_text()
    (out / STATISTICS).write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"{STATISTICS} and .* cannot be read"):
        plot(out)


def test_nothing_to_draw(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny(), out, smooth="none")
    with pytest.raises(InputError, match="nothing to plot"):
        plot(out)
    assert not (out / "plots").exists()
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        plot(tiny())


def test_lost_files_are_named(tiny: Callable[..., Path], calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny(), out, calibration=calibration)
    shutil.move(out / "smoothing.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"smoothing\.safetensors cannot be read"):
        plot(out)


def test_without_matplotlib(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install '\.\[plot\]'"):
        plot(tiny())
