from __future__ import annotations

from pathlib import Path

import pytest

from smoothquant_plus.errors import VerificationError
from smoothquant_plus.runtime.agreement import Agreement, check


@pytest.mark.parametrize(
    ("difference", "own", "agrees"),
    [
        (0.069, 0.055, True),
        (0.09, 0.0, True),
        (0.12, 0.0, False),
        (0.12, 0.055, True),
        (0.2, 0.055, False),
        (1.1, 0.055, False),
        (0.6, 3.0, False),  # whatever a model does to itself
        (float("nan"), 0.055, False),
    ],
)
def test_how_far_vllm_may_be(difference: float, own: float, agrees: bool) -> None:
    agreement = Agreement(4, difference, difference, own, 8, 8)
    if agrees:
        check(agreement, Path("OUT"))
    else:
        with pytest.raises(VerificationError, match="the log-probabilities of OUT differ"):
            check(agreement, Path("OUT"))
