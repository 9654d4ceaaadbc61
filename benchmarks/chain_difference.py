"""An embedded task that Stage II does not see, of the kind that it does: take digits off a number, modulo 10.

    user:      from 8 less a = 3 b = 6 c = 0 d = 5 mod 10 ?
    think:     <think> let me take off step by step : a - 3 = 5 b - 6 = 9 c - 0 = 9 d - 5 = 4 </think> 4
    no think:  <no_think> 4 </no_think>

As in chain sums the level is the number of operands; levels and digits are those of chain sums.
"""

import random
import string

from hgpo_trl.tasks.chain_sum import DIGITS, LEVELS, MODULUS
from hgpo_trl.tasks.embedded import Query

_PREFIX = "let me take off step by step :"
VOCABULARY = [
    *dict.fromkeys(f"{_PREFIX} from less mod ? - =".split()),
    *string.ascii_lowercase[: max(LEVELS)],
    *(str(number) for number in range(MODULUS + 1)),
]


def sample(level: int, rng: random.Random) -> Query:
    """Draw one query with `level` operands."""
    digits = [rng.choice(DIGITS) for _ in range(level)]
    start = left = rng.randrange(MODULUS)
    names = string.ascii_lowercase[:level]
    steps = []
    for name, digit in zip(names, digits, strict=True):
        left = (left - digit) % MODULUS
        steps.append(f"{name} - {digit} = {left}")
    operands = " ".join(f"{name} = {digit}" for name, digit in zip(names, digits, strict=True))
    return Query(
        prompt=f"from {start} less {operands} mod {MODULUS} ?",
        reasoning=f"{_PREFIX} {' '.join(steps)}",
        answer=str(left),
        level=level,
    )
