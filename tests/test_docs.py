"""What README.md and examples/ show works as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoothquant_plus.demo import CALIBRATION, HELD_OUT, MODEL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with MODEL, calibration.txt and held_out.txt: what ships with the package."""
    directory = tmp_path_factory.mktemp("readme")
    shutil.copytree(MODEL, directory / "MODEL")
    shutil.copy(CALIBRATION, directory / "calibration.txt")
    (directory / "held_out.txt").write_text(HELD_OUT.read_text()[:10_000])
    return directory


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_readme_commands(place: Path) -> None:
    commands = [line.split("  #")[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("sqplus")]
    assert [command.split()[1] for command in commands] == ["inspect", "quantize", "quantize", "plot", "verify", "eval", "eval", "generate"]
    for command in commands:
        subprocess.run(
            command.replace("sqplus", f"{sys.executable} -m smoothquant_plus.cli", 1),
            shell=True,
            cwd=place,
            check=True,
            capture_output=True,
        )


def test_readme_python(place: Path) -> None:
    shutil.rmtree(place / "OUT", ignore_errors=True)
    (block,) = blocks("python")
    subprocess.run([sys.executable, "-c", block], cwd=place, check=True, capture_output=True)


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("quantize_and_compare.py", ["MODEL", "example-out", "calibration.txt", "held_out.txt"]),
        ("generate.py", ["example-out", "12 times"]),
        ("share_statistics.py", ["MODEL", "calibration.txt", "."]),
    ],
)
def test_examples(script: str, arguments: list[str], place: Path) -> None:
    path = ROOT / "examples" / script
    assert len(path.read_text().splitlines()) <= 40
    subprocess.run([sys.executable, str(path), *arguments], cwd=place, check=True, capture_output=True)
