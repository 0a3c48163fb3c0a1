"""The search for alpha (SmoothQuant+, arXiv 2312.03788, Section 3): its grid, its loss, and which candidate wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# 0, 0.05, .., 1
GRID = tuple(step / 20 for step in range(21))

# Losses that differ by less are equal: sums in float32 differ that much from one machine to the next.
SAME = 1e-6


@dataclass
class SquaredError:
    """Running mean squared error over numbers, summed in float64."""

    total: float = 0.0
    numbers: int = 0

    def update(self, found: Tensor, expected: Tensor) -> None:
        """Take in two tensors of the same shape; their difference is made in float32."""
        difference = found.float() - expected.float()
        self.total += torch.linalg.vector_norm(difference, dtype=torch.float64).square().item()
        self.numbers += difference.numel()

    @property
    def mean(self) -> float:
        return self.total / self.numbers


def best_alpha(losses: Mapping[float, float], unsmoothed: float) -> float | None:
    """The alpha with the smallest loss; of equal ones (and on a flat curve) the smallest alpha. None when the loss `unsmoothed`, without
    smoothing, is smaller than all of them."""
    least = min(losses.values())
    if unsmoothed * (1 + SAME) < least:
        return None
    return min(alpha for alpha, loss in losses.items() if loss <= least * (1 + SAME))
