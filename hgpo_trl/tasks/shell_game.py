"""An embedded task of another kind than sums: follow the ball under three cups, swapped in pairs.

    user:      ball in red a swap red blue b swap red green c swap blue green where ?
    think:     <think> let me follow it step by step : a red blue in blue b red green in blue c blue green in green </think> green
    no think:  <no_think> green </no_think>

As with chain sums, answering at once fails with length: the level is the number of swaps. The steps are named
as the operands are there, so that a choice of mode by the prompt's length can carry over.
"""  # noqa: E501 (a response is one line)

import random
import string
from itertools import combinations

from hgpo_trl.tasks.embedded import Query

CUPS = ("red", "blue", "green")
SWAPS = list(combinations(CUPS, 2))  # in one order each: with four cups and both orders, two swaps are a cliff already
LEVELS = {1: 2, 2: 2, 3: 2, 4: 1, 6: 1, 8: 1}  # swaps -> weight

_PREFIX = "let me follow it step by step :"
VOCABULARY = [
    *dict.fromkeys(f"{_PREFIX} ball in swap where ?".split()),
    *string.ascii_lowercase[: max(LEVELS)],
    *CUPS,
]


def sample(level: int, rng: random.Random) -> Query:
    """Draw one query with `level` swaps."""
    start = place = rng.choice(CUPS)
    swaps, steps = [], []
    for name in string.ascii_lowercase[:level]:
        one, other = rng.choice(SWAPS)
        place = {one: other, other: one}.get(place, place)
        swaps.append(f"{name} swap {one} {other}")
        steps.append(f"{name} {one} {other} in {place}")
    return Query(
        prompt=f"ball in {start} {' '.join(swaps)} where ?",
        reasoning=f"{_PREFIX} {' '.join(steps)}",
        answer=place,
        level=level,
    )
