"""What README.md and examples/ show works as it stands there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import families
import family_table
from smoothquant_plus.cli import app
from smoothquant_plus.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with MODEL, calibration.txt and held_out.txt in it: enough for every default."""
    positions = {**families.COMMON, "max_position_embeddings": 2048}
    config = LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **positions)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "MODEL")
    families.make_tokenizer().save_pretrained(tmp_path / "MODEL")
    (tmp_path / "calibration.txt").write_text(families.TEXT * 5)
    (tmp_path / "held_out.txt").write_text(families.TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_readme_commands(place: Path) -> None:
    commands = [line.split("  #")[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("sqplus")]
    assert [command.split()[1] for command in commands] == ["inspect", "quantize", "quantize", "verify", "eval", "eval", "generate", "plot"]
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"


def test_readme_python(place: Path) -> None:
    (block,) = blocks("python")
    exec(block, {})


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


EXAMPLES = {
    "quantize_and_compare.py": ["MODEL", "example-out", "calibration.txt", "held_out.txt"],
    "generate.py": ["example-out", "12 times"],
    "share_statistics.py": ["MODEL", "calibration.txt", "."],
}


def test_examples(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    for script, arguments in EXAMPLES.items():
        path = ROOT / "examples" / script
        assert len(path.read_text().splitlines()) <= 40
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")


def test_table_of_families_says_what_the_rows_say() -> None:
    _, body, _ = re.split(f"{family_table.BEGIN}|{family_table.END}", family_table.PAGE.read_text())
    header, _, *lines = body.strip().splitlines()
    assert header == family_table.HEADER
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(float(cells.pop(4)) <= 1e-9 for cells in written)
    assert written == [family_table.row(name, family) for name, family in FAMILIES.items()]
