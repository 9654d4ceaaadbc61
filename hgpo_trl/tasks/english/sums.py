"""Sums and differences of small numbers, in words; the level is how many numbers there are.

user:      Start with 4, add 7, take away 3. What do you get?
reasoning: 4+7=11
           11-3=8
answer:    8
"""

import random
from collections.abc import Callable, Sequence

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, domain_name, listed

LEVELS = {2: 3, 3: 3, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1}

_THINGS = "apples coins shells stamps marbles eggs books cards plums stones".split()
_SIGNED = ("+", "-")


def _expression(numbers: Sequence[int], plus: str = "+", minus: str = "-") -> str:
    words = [f"{plus if number > 0 else minus} {abs(number)}" for number in numbers[1:]]
    return " ".join([str(numbers[0]), *words])


def _steps(numbers: Sequence[int], plus: str, minus: str) -> str:
    return ", ".join(f"{plus if number > 0 else minus} {abs(number)}" for number in numbers[1:])


def _what_is(numbers: Sequence[int], rng: random.Random) -> str:
    return f"What is {_expression(numbers)}?"


def _start_with(numbers: Sequence[int], rng: random.Random) -> str:
    return f"Start with {numbers[0]}, {_steps(numbers, 'add', 'take away')}. What do you get?"


def _bus(numbers: Sequence[int], rng: random.Random) -> str:
    stops = ", ".join(f"{abs(number)} get {'on' if number > 0 else 'off'}" for number in numbers[1:])
    return f"A bus has {numbers[0]} people. Then {stops}. How many people are on the bus?"


def _has(numbers: Sequence[int], rng: random.Random) -> str:
    name, things = rng.choice(NAMES), rng.choice(_THINGS)
    return f"{name} has {numbers[0]} {things}, {_steps(numbers, 'gets', 'gives away')}. How many does {name} have?"


def _add(numbers: Sequence[int], rng: random.Random) -> str:
    return f"Add the numbers {listed([str(number) for number in numbers])}."


def _days(numbers: Sequence[int], rng: random.Random) -> str:
    found = listed([str(number) for number in numbers])
    return f"{rng.choice(NAMES)} finds {found} {rng.choice(_THINGS)} on {len(numbers)} days. How many in total?"


def _spoken(numbers: Sequence[int], rng: random.Random) -> str:
    return f"Please work out {_expression(numbers, 'plus', 'minus')}."


def _board(numbers: Sequence[int], rng: random.Random) -> str:
    return f"On the board are the numbers {listed([str(number) for number in numbers])}. Give their sum."


Pattern = tuple[Callable[[Sequence[int], random.Random], str], bool]
_PATTERNS: tuple[Pattern, ...] = (  # with whether a number may be taken away
    (_what_is, True),
    (_start_with, True),
    (_bus, True),
    (_has, True),
    (_add, False),
    (_days, False),
    (_spoken, True),
    (_board, False),
)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one query with `level` numbers from 1 to 9; the running total never falls below 1."""
    (phrase, signed), is_other = choose_pattern(_PATTERNS, patterns, rng)
    numbers = [rng.randint(1, 9)]
    steps, total = [], numbers[0]
    for _ in range(level - 1):
        number = rng.randint(1, 9)
        if signed and number < total and rng.random() < 0.3:
            number = -number
        numbers.append(number)
        steps.append(f"{total}{_SIGNED[number < 0]}{abs(number)}={total + number}")
        total += number
    return Query(phrase(numbers, rng), "\n".join(steps), str(total), level, domain_name("sums", is_other))
