"""Mixing: shares hold, as many rows as possible stay, and the same ones in every build."""

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hgpo_trl.data.mixing import AXES, quotas, smallest

CELLS = [
    ("think", "maths", "a"),
    ("think", "code", "b"),
    ("no_think", "general", "c"),
    ("no_think", "general", "d"),
]


def counts(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_by_hand() -> None:
    """60 % of 1,000 rows at most: the 400 no-think rows are the bottleneck."""
    kept = quotas(CELLS, counts(1000, 500, 300, 100), {"mode": {"think": 0.6, "no_think": 0.4}}, None)
    assert kept.tolist() == [400, 200, 300, 100]


def test_two_axes() -> None:
    shares = {"mode": {"think": 0.5, "no_think": 0.5}, "source": {"a": 0.4, "b": 0.1, "c": 0.25, "d": 0.25}}
    kept = quotas(CELLS, counts(1000, 500, 300, 100), shares, None)
    assert kept.tolist() == [160, 40, 100, 100]


def test_a_share_of_zero_drops_and_max_rows_scales() -> None:
    shares = {"domain": {"maths": 0.5, "code": 0.0, "general": 0.5}}
    assert quotas(CELLS, counts(100, 50, 60, 20), shares, None).tolist() == [80, 0, 60, 20]
    assert quotas(CELLS, counts(100, 50, 60, 20), shares, 40).tolist() == [20, 0, 15, 5]


@settings(max_examples=200)
@given(st.data())
def test_shares_hold_and_nothing_more_fits(data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(AXES))
    cells = list(product(("think", "no_think"), ("x", "y"), ("s", "t")))
    there = np.array(data.draw(st.lists(st.integers(0, 10_000), min_size=8, max_size=8)))
    place = AXES.index(axis)
    values = sorted({cell[place] for cell in cells})
    present = {v: int(sum(n for n, cell in zip(there, cells, strict=True) if cell[place] == v)) for v in values}
    assume(all(present.values()))
    first = data.draw(st.floats(0.05, 0.95))
    wanted = dict(zip(values, (first, 1 - first), strict=True))
    kept = quotas(cells, there, {axis: wanted}, None)
    assert (kept <= there).all()
    assert (kept >= 0).all()
    per_value = {v: int(sum(n for n, cell in zip(kept, cells, strict=True) if cell[place] == v)) for v in values}
    total = min(present[v] / wanted[v] for v in values)  # the bottleneck decides
    for v in values:
        assert per_value[v] == pytest.approx(wanted[v] * total, abs=5)  # four cells are rounded down


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"mode": {"think": 0.6, "no_think": 0.6}}, "mode_shares=.* must not be negative and must sum to 1"),
        ({"mode": {"think": 1.5, "no_think": -0.5}}, "must not be negative"),
        ({"domain": {"maths": 0.5, "law": 0.5}}, r"domain_shares asks for 'law', of which no row is left; there are"),
        ({"mode": {"think": 1.0}}, "mode_shares leaves out 'no_think'. Give it a share, 0 to drop it"),
        (
            {"mode": {"think": 0.9, "no_think": 0.1}, "domain": {"maths": 0.1, "code": 0.1, "general": 0.8}},
            "mode_shares and domain_shares cannot hold together: the rows that are there are 10 think/maths/a",
        ),
    ],
)
def test_what_cannot_be_had(shares: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quotas(CELLS, counts(10, 10, 10, 10), shares, None)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(-1, 2)), max_size=60),
    st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_the_smallest_of_each_group_stay(rows: list[tuple[int, int]], quota: list[int]) -> None:
    order = np.array([number for number, _ in rows], dtype=np.uint64)
    group = np.array([g for _, g in rows], dtype=np.int32)
    kept = smallest(order, group, np.array(quota))
    for g, size in enumerate(quota):
        members = sorted((number, i) for i, (number, of) in enumerate(rows) if of == g)
        assert sorted(np.flatnonzero(kept & (group == g)).tolist()) == sorted(i for _, i in members[:size])
    assert not kept[group < 0].any()
