"""What the tests of the CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smoothquant_plus.runtime.kernels import cpu

# The highest level of this machine; where there are no kernels, the tests that need them say so.
HIGHEST = torch.ops.smoothquant_plus.cpu_level(len(cpu.LEVELS) - 1) if cpu.missing() is None else -1


@pytest.fixture(params=range(HIGHEST + 1), ids=lambda level: cpu.LEVELS[level])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    assert torch.ops.smoothquant_plus.cpu_level(request.param) == request.param
    yield cpu.LEVELS[request.param]
    torch.ops.smoothquant_plus.cpu_level(HIGHEST)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
