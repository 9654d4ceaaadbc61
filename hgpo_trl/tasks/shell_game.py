"""An embedded task of another kind than sums: follow the ball under four cups that are swapped in pairs.

    user:      ball in red a swap blue red b swap green white c swap white blue where ?
    think:     <think> let me follow it step by step : a blue red in blue b green white in blue c white blue in white </think> white
    no think:  <no_think> white </no_think>

As with chain sums, answering at once fails with length: the level is the number of swaps. The steps carry the names
that operands carry there, so that a choice of mode that goes by a prompt's length has something in common to go by.
"""  # noqa: E501 (a response is one line)

import random
import string

from hgpo_trl.tasks.embedded import Query

CUPS = ("red", "blue", "green", "white")
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
        one, other = rng.sample(CUPS, 2)
        place = {one: other, other: one}.get(place, place)
        swaps.append(f"{name} swap {one} {other}")
        steps.append(f"{name} {one} {other} in {place}")
    return Query(
        prompt=f"ball in {start} {' '.join(swaps)} where ?",
        reasoning=f"{_PREFIX} {' '.join(steps)}",
        answer=place,
        level=level,
    )
