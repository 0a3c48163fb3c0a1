from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton decides that when it is first imported, as transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import families
from smoothquant_plus.preparation import Calibration

collect_ignore = ["vllm"]  # they run in an environment of their own: make test-vllm

# The models here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(families.TEXT)
    return path


@pytest.fixture(scope="session")
def calibration(text_file: Path) -> Calibration:
    """Little text, for models where only the mechanism matters."""
    return Calibration(text=(str(text_file),), samples=4, seq_len=32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(name, dtype): the directory of a tiny model, made once a session; not to be written to."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float16) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = families.write(name, tmp_path_factory.mktemp(name) / name, dtype)
        return made[name, dtype]

    return get
