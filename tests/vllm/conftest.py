"""Tests inside a real vLLM on a CPU: `make test-vllm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import SCHEMES, Answer, ask, open_engine, stop
from vllm import LLM

from smoothquant_plus.pipeline import quantize
from smoothquant_plus.preparation import Calibration


@pytest.fixture(scope="session")
def out(tiny: Callable[..., Path], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """out(family, scheme): the quantized tiny model, made once a session; not to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, scheme: str) -> Path:
        if (family, scheme) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{scheme}") / "out"
            quantize(tiny(f"wide-{family}"), directory, **SCHEMES[scheme], smooth="all", alpha=0.6, calibration=calibration, target="here")
            made[family, scheme] = directory
        return made[family, scheme]

    return get


@pytest.fixture
def theirs() -> Iterator[Callable[..., Answer]]:
    """theirs(directory, **options of LLM): what vLLM answers, after `then` has been done to it."""
    running: list[LLM] = []

    def get(directory: Path, then: Callable[[LLM], Any] = lambda llm: None, **options: Any) -> Answer:
        stop(running)
        try:
            running.append(open_engine(directory, **options))
            then(running[-1])
            return ask(running[-1])
        finally:
            stop(running)

    yield get
