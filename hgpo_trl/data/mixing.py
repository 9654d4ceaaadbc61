"""Mixing: select rows so that modes, domains and sources have the shares that a recipe asks for.

Rows are left out, never repeated. A fixed random number of each row decides, so the same recipe keeps the same rows,
and a smaller cap keeps a subset of the rows of a larger one.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError

AXES = ("mode", "domain", "source")
Cell = tuple[str, str, str]  # of a row: its value on each of AXES

_TOLERANCE = 1e-9
_ITERATIONS = 10_000


def quotas(
    cells: Sequence[Cell], counts: NDArray[np.int64], shares: Mapping[str, Mapping[str, float]], max_rows: int | None
) -> NDArray[np.int64]:
    """Number of rows of each cell to keep: as many as the shares allow, otherwise in the cells' own proportions.

    The counts are fitted to the shares of one axis after the other until all hold (iterative proportional fitting),
    then scaled until no cell needs more rows than it has.

    Args:
        cells: `[C]`.
        counts: `[C]`, rows of each cell.
        shares: axis -> value -> share; an axis without shares is left alone.
        max_rows: of the data set; None: no limit.

    Returns:
        `[C]`.

    Raises:
        UserError: an axis's shares are negative, do not sum to 1, name a value without rows or leave out a value with
            rows, or the shares of several axes exclude each other.
    """
    groups = [_groups(axis, wanted, cells, counts) for axis, wanted in shares.items() if wanted]
    weights = counts.astype(np.float64)
    total = weights.sum()
    for _ in range(_ITERATIONS):
        worst = 0.0
        for members, target in groups:
            have = members @ weights / total
            worst = max(worst, float(np.abs(have - target).max()))
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.where(target > 0, target / have, 0.0)
            weights = np.nan_to_num(weights * (factor @ members), posinf=0.0)
        if worst < _TOLERANCE:
            break
    else:
        raise UserError(
            f"{' and '.join(f'{axis}_shares' for axis in shares if shares[axis])} cannot hold together: the rows that "
            f"are there are {_listing(cells, counts)}. Change a share, or add a source."
        )
    used = weights > total * _TOLERANCE
    scale = float((counts[used] / weights[used]).min(initial=np.inf)) if used.any() else 0.0
    if max_rows is not None:
        scale = min(scale, max_rows / weights.sum())
    return np.floor(weights * scale + 1e-6).astype(np.int64)


def check_shares(field: str, shares: Mapping[str, float]) -> None:
    """UserError if the shares are negative or do not sum to 1."""
    if any(share < 0 for share in shares.values()) or not abs(sum(shares.values()) - 1) <= 1e-6:
        raise UserError(f"{field}={dict(shares)!r}: shares must not be negative and must sum to 1.")


def _groups(
    axis: str, wanted: Mapping[str, float], cells: Sequence[Cell], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Which cells each value has (`[V, C]`, 0 or 1), and the values' shares (`[V]`)."""
    field = f"{axis}_shares"
    values = [cell[AXES.index(axis)] for cell in cells]
    present = {value for value, count in zip(values, counts, strict=True) if count}
    check_shares(field, wanted)
    if absent := [value for value, share in wanted.items() if share > 0 and value not in present]:
        raise UserError(f"{field} asks for {absent[0]!r}, of which no row is left; there are {sorted(present)}.")
    if forgotten := sorted(present - set(wanted)):
        raise UserError(f"{field} leaves out {forgotten[0]!r}. Give it a share, 0 to drop it.")
    members = np.array([[float(value == name) for value in values] for name in wanted])
    return members, np.array(list(wanted.values()), dtype=np.float64)


def _listing(cells: Sequence[Cell], counts: NDArray[np.int64]) -> str:
    return ", ".join(f"{count:,} {'/'.join(cell)}" for cell, count in zip(cells, counts, strict=True))


def smallest(draw_key: NDArray[np.uint64], group: NDArray[np.int32], quota: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows have the `quota[g]` smallest random numbers of their group.

    Args:
        draw_key: `[N]`, a random number per row.
        group: `[N]`, its group; negative: not a candidate.
        quota: `[G]`.

    Returns:
        `[N]`.
    """
    kept = np.zeros(len(draw_key), dtype=bool)
    for index, size in enumerate(quota):
        rows = np.flatnonzero(group == index)
        if size < len(rows):
            rows = rows[np.argsort(draw_key[rows], kind="stable")[:size]]
        kept[rows] = True
    return kept
