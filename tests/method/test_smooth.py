from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothquant_plus.method.smooth import (
    LARGEST_FACTOR,
    factors,
    fold_bias,
    fold_norm,
    fold_sink,
    fold_source_rows,
    share_within_groups,
    weight_maxima,
)
from smoothquant_plus.method.statistics import ChannelMaxima


def test_the_formula() -> None:
    s = factors(torch.tensor([16.0, 4.0]), torch.tensor([4.0, 1.0]), 0.5)
    assert s.tolist() == [2.0, 2.0]
    assert factors(torch.tensor([16.0]), torch.tensor([4.0]), 1.0).tolist() == [16.0]
    assert factors(torch.tensor([16.0]), torch.tensor([4.0]), 0.0).tolist() == [0.25]


def test_dead_channels_keep_factor_one_and_factors_stay_in_range() -> None:
    s = factors(torch.tensor([0.0, 3.0, 1e30, 1e-30]), torch.tensor([1.0, 0.0, 1e-30, 1e30]), 0.5)
    assert s.tolist() == [1.0, 1.0, LARGEST_FACTOR, pytest.approx(1 / LARGEST_FACTOR)]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        factors(torch.ones(2), torch.ones(2), alpha)


def test_maxima_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        factors(torch.tensor([float("nan")]), torch.ones(1), 0.5)


@given(
    seed=st.integers(0, 2**31),
    alpha=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    offset=st.sampled_from([0.0, 1.0]),
    with_bias=st.booleans(),
)
def test_folding_a_norm_leaves_the_function_as_it_was(seed: int, alpha: float, dtype: torch.dtype, offset: float, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels, rows = 24, 10
    gain = (torch.randn(channels, generator=generator) * torch.logspace(-1, 1, channels)).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype) if with_bias else None
    weight = torch.randn(rows, channels, generator=generator)
    x = torch.randn(50, channels, generator=generator)

    def norm(g: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return x * (g.float() + offset) + (0 if b is None else b.float())

    before = norm(gain, bias)
    s = factors(before.abs().amax(0), weight_maxima([weight]), alpha)
    folded, s = fold_norm(gain, s, dtype, offset)
    assert torch.equal(folded, folded.to(dtype).float()), "the stored gain is exactly what was proven"
    after = norm(folded, None if bias is None else fold_bias(bias, s, dtype)) @ fold_sink(weight.clone(), s).t()
    # Only a bias is rounded; a gain's rounding moved into the factors.
    exact = offset == 0 and not with_bias
    tolerance = 2e-5 if exact or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert (after - before @ weight.t()).abs().max() <= tolerance * (before.abs() @ weight.abs().t()).max()


def test_a_gain_of_zero_is_left_alone() -> None:
    gain, s = fold_norm(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0]), torch.float16)
    assert gain.tolist() == [0.0, 0.5] and s.tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("gain", "bias", "s", "message"),
    [
        (6e4, 0.0, 0.5, "gain overflows float16"),
        (1e-6, 0.0, 1e4, "gain underflows to zero in float16"),
        (1.0, 6e4, 0.5, "bias overflows float16"),
    ],
)
def test_values_that_leave_the_dtype_are_refused(gain: float, bias: float, s: float, message: str) -> None:
    with pytest.raises(OverflowError, match=message):
        fold_bias(torch.tensor([bias]), fold_norm(torch.tensor([gain]), torch.tensor([s]), torch.float16)[1], torch.float16)


def test_folding_a_linear_source() -> None:
    weight, bias, s = torch.randn(6, 4), torch.randn(6), torch.rand(6) + 0.5
    folded = fold_source_rows(weight.clone(), s)
    x = torch.randn(5, 4)
    torch.testing.assert_close((x @ folded.t() + fold_bias(bias, s, torch.float32)) * s, x @ weight.t() + bias)


def test_query_heads_of_a_group_share_their_factors() -> None:
    # 2 value heads of 3 channels, each read by 2 query heads: o_proj sees heads 0, 1 (value head 0), 2, 3 (value head 1).
    s = torch.tensor([[1.0, 2, 3], [3, 2, 1], [5, 5, 5], [4, 6, 4]]).reshape(-1)
    rows, columns = share_within_groups(s, groups=2, head_dim=3)
    assert rows.tolist() == [3, 2, 3, 5, 6, 5]
    assert columns.reshape(4, 3).tolist() == [[3, 2, 3], [3, 2, 3], [5, 6, 5], [5, 6, 5]]


def test_statistics_leave_padding_out_and_merge() -> None:
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]], [[100.0, 100.0], [-4.0, 0.0]]])
    mask = torch.tensor([[True, True], [False, True]])
    together = ChannelMaxima.empty(2)
    together.update(x, mask)
    assert together.maxima.tolist() == [4.0, 5.0] and together.tokens == 3
    halves = [ChannelMaxima.empty(2), ChannelMaxima.empty(2)]
    for half, rows, keep in zip(halves, x, mask, strict=True):
        half.update(rows, keep)
    assert torch.equal(halves[0].merge(halves[1]).maxima, together.maxima) and halves[0].merge(halves[1]).tokens == 3
    together.update(torch.empty(0, 2))
    together.update(torch.tensor([[float("nan"), 0.0]]))
    assert together.maxima.isnan().tolist() == [True, False]
