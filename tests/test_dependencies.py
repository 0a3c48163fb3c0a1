"""Imports point down: method < models < runtime < search < evaluation, verification, preparation < output, blockwise < pipeline < demo < cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "smoothquant_plus"

# Each room may import from its own row and the rows above it.
LEVELS = [
    {"", "errors", "files", "progress"},
    {"method"},
    {"models", "text"},
    {"runtime", "workspace"},
    {"search"},
    {"evaluation", "inspection", "verification", "preparation"},
    {"output", "blockwise"},
    {"pipeline"},
    {"demo"},
    {"cli"},
]
# Heavy or optional packages, and the only files that may import them.
ONLY_IN = {
    "transformers": {
        *("models/skeleton.py", "runtime/attention.py", "runtime/unquantized.py", "runtime/load.py", "runtime/generate.py", "text.py"),
        "evaluation/benchmark_model.py",
    },
    "accelerate": {"models/skeleton.py"},
    "compressed_tensors": {"models/checkpoint.py"},
    "datasets": {"text.py", "evaluation/tasks.py"},
    "psutil": {"search.py", "runtime/serve.py", "evaluation/benchmark_linear.py"},
    "typer": {"cli.py"},
    "triton": {f"runtime/kernels/triton/{name}.py" for name in ("common", "fused", "int8_attention", "w4a16", "w8a8")},
    "vllm": {
        "runtime/vllm.py",
        "runtime/agreement.py",
        "evaluation/benchmark_serve.py",
        "evaluation/cpu_peers.py",
        "evaluation/gpu_peers.py",
    },
    "lm_eval": {"evaluation/tasks.py"},
    "matplotlib": {"evaluation/plot.py"},
    "onnx": {"evaluation/cpu_peers.py"},
    "onnxruntime": {"evaluation/cpu_peers.py"},
    "openvino": {"evaluation/cpu_peers.py"},
    "bitsandbytes": {"evaluation/gpu_peers.py"},
    "conch": {"evaluation/gpu_peers.py"},
    "gemlite": {"evaluation/gpu_peers.py"},
    "humming": {"evaluation/gpu_peers.py"},
    "torchao": {"evaluation/gpu_peers.py"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room(name: str) -> str:
    """The first part of a module's name inside the package: 'models', 'cli', or '' for the package itself."""
    return name.removeprefix("smoothquant_plus").lstrip(".").split(".")[0]


def level(name: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room(name) in rooms)


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too, but not what is for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = level(".".join(("smoothquant_plus", *relative.with_suffix("").parts)).removesuffix(".__init__"))
    for name in imports(path):
        package = name.split(".")[0]
        if package == "smoothquant_plus":
            assert level(name) <= own, f"{relative} must not import {name}"
        if package in ONLY_IN:
            assert str(relative) in ONLY_IN[package], f"{relative} must not import {package}"


def test_importing_the_package_or_asking_for_help_does_not_import_torch() -> None:
    for statement in ("import smoothquant_plus", "import smoothquant_plus.cli"):
        code = f"{statement}; import sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    import smoothquant_plus

    for name in smoothquant_plus.__all__:
        assert getattr(smoothquant_plus, name) is not None
    assert callable(smoothquant_plus.verify) and callable(smoothquant_plus.load)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        smoothquant_plus.quantise  # noqa: B018
