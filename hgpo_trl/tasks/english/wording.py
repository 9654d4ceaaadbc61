"""Small pieces of English that the tasks share."""

import random
from collections.abc import Sequence
from typing import TypeVar

from hgpo_trl.common.errors import UserError

NAMES = "Ann Ben Clara David Emma Finn Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
NUM_OTHER = 2  # sentence patterns of each task that are kept apart


T = TypeVar("T")


def choose_pattern(patterns: Sequence[T], which: str, rng: random.Random) -> tuple[T, bool]:
    """Draw a sentence pattern, and say whether it is one of those that are kept apart.

    Args:
        patterns: all of a task; the last `NUM_OTHER` are kept apart.
        which: "main", "other" or "all".

    Raises:
        UserError: `which` is none of these.
    """
    parts = {"main": (0, len(patterns) - NUM_OTHER), "other": (len(patterns) - NUM_OTHER, len(patterns))}
    parts["all"] = (0, len(patterns))
    if which not in parts:
        raise UserError(f"patterns must be one of {', '.join(parts)}; got {which!r}.")
    index = rng.randrange(*parts[which])
    return patterns[index], index >= len(patterns) - NUM_OTHER


def domain_name(task: str, is_other: bool) -> str:
    """The domain of a query: the task, and whether its wording is one of those that are kept apart."""
    return f"{task}, other wording" if is_other else task


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def counted(number: int, noun: str) -> str:
    """ "1 cat", "2 cats"."""
    return f"{number} {noun}" if number == 1 else f"{number} {_plural(noun)}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def sum_of_products(pairs: Sequence[tuple[int, int]]) -> tuple[str, int]:
    """The trace of a sum of products, one step a line, and its result: each product, then the running total."""
    total, steps = 0, []
    for index, (count, value) in enumerate(pairs):
        product = count * value
        steps.append(f"{count}*{value}={product}")
        if index:
            steps.append(f"{total}+{product}={total + product}")
        total += product
    return "\n".join(steps), total
