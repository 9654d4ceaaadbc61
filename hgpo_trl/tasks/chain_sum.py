"""The embedded task: add a chain of digits modulo 10.

    user:      a = 3 b = 6 c = 0 d = 5 sum mod 10 ?
    think:     <think> let me add step by step : a + 3 = 3 b + 6 = 9 c + 0 = 9 d + 5 = 4 </think> 4
    no think:  <no_think> 4 </no_think>

Small enough that a model of 134k parameters learns it on a CPU in minutes, hard enough that answering at once fails
from four operands on: exactly what makes the choice of a mode worth learning. The level is the number of operands.
"""

import random
import string

from hgpo_trl.tasks.embedded import Query

MODULUS = 10
DIGITS = range(7)  # 0 to 6: with larger digits, answering at once hits a cliff instead of a slope
LEVELS = {1: 2, 2: 2, 3: 2, 4: 1, 6: 1, 8: 1}  # operands -> weight

_PREFIX = "let me add step by step :"
VOCABULARY = [
    *dict.fromkeys(f"{_PREFIX} sum mod ? + =".split()),
    *string.ascii_lowercase[: max(LEVELS)],
    *(str(number) for number in range(MODULUS + 1)),
]


def sample(level: int, rng: random.Random) -> Query:
    """Draw one query with `level` operands."""
    digits = [rng.choice(DIGITS) for _ in range(level)]
    names = string.ascii_lowercase[:level]
    total, steps = 0, []
    for name, digit in zip(names, digits, strict=True):
        total = (total + digit) % MODULUS
        steps.append(f"{name} + {digit} = {total}")
    operands = " ".join(f"{name} = {digit}" for name, digit in zip(names, digits, strict=True))
    return Query(
        prompt=f"{operands} sum mod {MODULUS} ?",
        reasoning=f"{_PREFIX} {' '.join(steps)}",
        answer=str(total),
        level=level,
    )
