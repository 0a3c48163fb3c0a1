"""Smoothing: the exactly equivalent rescaling of SmoothQuant (arXiv 2211.10438, Section 4) and SmoothQuant+ (arXiv 2312.03788).

For a source (a norm, or a linear layer) whose output X feeds linear layers W:

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)        source_j /= s_j        W[:, j] *= s_j

and (X / s) (s * W) = X W. `max|W_j|` runs over all the linears that the source feeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smoothquant_plus.method.integers import absolute_maximum

# A channel is never scaled further than this either way: beyond it the rescaling only moves rounding error around.
LARGEST_FACTOR = 1e5


def factors(activation_maxima: Tensor, weight_maxima: Tensor, alpha: float) -> Tensor:
    """Smoothing factors s, float32 (K,), from max|X_j| and max|W_j| (K,) (SmoothQuant, Equation 4).

    A channel that is dead on either side (a maximum of zero) keeps s = 1. Raises ValueError for an alpha outside 0..1, for shapes that
    differ and for maxima that are not finite.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    if activation_maxima.shape != weight_maxima.shape:
        raise ValueError(
            f"activation maxima {tuple(activation_maxima.shape)} and weight maxima {tuple(weight_maxima.shape)} differ in shape"
        )
    activation_maxima, weight_maxima = activation_maxima.float(), weight_maxima.float()
    if not (torch.isfinite(activation_maxima).all() and torch.isfinite(weight_maxima).all()):
        raise ValueError("maxima that are NaN or infinite")
    dead = (activation_maxima <= 0) | (weight_maxima <= 0)
    # In float64, rounded once: float32 powers differ in their last bit between instruction sets, and `verify` repeats them elsewhere.
    s = activation_maxima.double().pow(alpha) / weight_maxima.double().pow(1 - alpha)
    return torch.where(dead, torch.ones_like(s), s).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR).float()


def nearest_power_of_two(s: Tensor) -> Tensor:
    """The power of two next to each positive factor, by its logarithm: multiplying by it rounds nothing."""
    return torch.exp2(torch.round(torch.log2(s)))


def weight_maxima(weights: Sequence[Tensor]) -> Tensor:
    """max|W_j| over the rows of all `weights` (N_i, K), float32 (K,)."""
    return torch.stack([absolute_maximum(w.float(), dim=0) for w in weights]).amax(dim=0)


def share_within_groups(s: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Factors for v_proj -> o_proj under grouped-query attention: the query heads of a group read the same value head, so they share s.

    `s` is (heads * head_dim,), as o_proj's input sees it, heads of one group next to each other. Returns the maximum over each group:
    for the source's rows (groups * head_dim,), and repeated for the sink's columns (heads * head_dim,).
    """
    by_head = s.reshape(groups, -1, head_dim)  # (kv heads, query heads of the group, head_dim)
    shared = by_head.amax(dim=1)  # (kv heads, head_dim)
    return shared.reshape(-1), shared[:, None].expand_as(by_head).reshape(-1)


def fold_norm(weight: Tensor, s: Tensor, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide a norm's gain (K,) by `s`, rounded to the checkpoint's `dtype`: the new gain, and the factors that were really applied, both
    float32. `offset` is 1 for norms that multiply by (1 + w).

    The gain is stored in 16 bits, so gain / s is rounded; instead of accepting that as an error of the function, the factor is moved to
    what the rounded gain says, s := gain / rounded, and the bias and the linears are rescaled by that: the pair stays exact.
    With an `offset` a gain next to zero cannot be stored: it becomes the smallest that can, and its factor fits that.
    Raises OverflowError when a value overflows `dtype`, or a gain that was not zero becomes zero in it.
    """
    gain = at_least_float32(weight) + offset
    rounded = to_storage(gain / s - offset, dtype, "the norm's gain")
    if offset:
        smallest = torch.finfo(dtype).eps * gain.sign()
        rounded = torch.where(rounded == -offset, smallest - offset, rounded)
    applied = rounded + offset
    lost = (applied == 0) & (gain != 0)
    if bool(lost.any()):
        raise OverflowError(f"the norm's gain underflows to zero in {name_of(dtype)} (channel {int(lost.nonzero()[0])})")
    return rounded, torch.where(gain != 0, gain / applied, s)


def fold_bias(bias: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide a source's bias (K,) by `s` (K,), rounded to the checkpoint's `dtype`, in which it is stored: float32.

    What rounding takes from a small one is less than the dtype's smallest number. Raises OverflowError when a value overflows `dtype`.
    """
    return to_storage(at_least_float32(bias) / s, dtype, "the bias")


def fold_source_rows(weight: Tensor, s: Tensor) -> Tensor:
    """Divide a linear's output channels, the rows of its float32 `weight` (N, K), by `s` (N,), in place: it is quantized next and never stored."""
    return weight.div_(s[:, None])


def fold_sink(weight: Tensor, s: Tensor) -> Tensor:
    """Multiply a linear's input channels, the columns of its float32 `weight` (N, K), by `s` (K,), in place."""
    return weight.mul_(s)


def to_storage(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`x` rounded to `dtype` and back in its own. Raises OverflowError when a value leaves its range."""
    stored = x.to(dtype).to(x.dtype)
    if not bool(torch.isfinite(stored).all()):
        channel = int((~torch.isfinite(stored)).nonzero()[0])
        raise OverflowError(f"{what} overflows {name_of(dtype)} (channel {channel}: {x.flatten()[channel].item():.3g})")
    return stored


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
