"""Per-channel absolute maxima of activations, in float32, gathered batch by batch and mergeable across processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ChannelMaxima:
    """Running max|X_j| over tokens: `maxima` float32 (K,), and how many tokens were seen."""

    maxima: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> ChannelMaxima:
        return cls(torch.zeros(channels))

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in activations `x` (..., K); tokens where `mask` (...) is False are padding and are left out.

        A NaN in x stays visible: torch.maximum carries it into the result.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1)]
        if len(rows) == 0:
            return
        self.maxima = torch.maximum(self.maxima, rows.abs().amax(dim=0).float().cpu())
        self.tokens += len(rows)

    def merge(self, other: ChannelMaxima) -> ChannelMaxima:
        """What one pass over both halves of the tokens would have measured."""
        return ChannelMaxima(torch.maximum(self.maxima, other.maxima), self.tokens + other.tokens)
