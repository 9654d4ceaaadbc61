"""Legs of animals; the level is how many kinds of animals there are.

user:      How many legs do 3 dogs and 2 birds have?
reasoning: dog 4, bird 2
           3*4=12
           2*2=4
           12+4=16
answer:    16
"""

import random
from collections.abc import Callable

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, counted, domain_name, listed, sum_of_products

LEVELS = {1: 3, 2: 3, 3: 2, 4: 1}

_LEGS = dict.fromkeys("dog cat horse cow lion pig goat rabbit".split(), 4)
_LEGS |= dict.fromkeys("bird duck chicken owl".split(), 2)
_LEGS |= dict.fromkeys("ant bee beetle".split(), 6) | {"spider": 8}

_PATTERNS: tuple[Callable[[str, str], str], ...] = (
    lambda animals, name: f"How many legs do {animals} have?",
    lambda animals, name: f"{name} sees {animals}. How many legs does {name} see?",
    lambda animals, name: f"Count the legs of {animals}.",
    lambda animals, name: f"There are {animals} on a farm. How many legs is that?",
    lambda animals, name: f"{name} draws {animals}. How many legs are in the picture?",
    lambda animals, name: f"What is the number of legs of {animals} together?",
)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one query with `level` kinds of animals, 2 to 4 of each."""
    phrase, is_other = choose_pattern(_PATTERNS, patterns, rng)
    counts = {animal: rng.randint(2, 4) for animal in rng.sample(list(_LEGS), level)}
    known = ", ".join(f"{animal} {_LEGS[animal]}" for animal in counts)
    steps, total = sum_of_products([(count, _LEGS[animal]) for animal, count in counts.items()])
    animals = listed([counted(count, animal) for animal, count in counts.items()])
    return Query(
        phrase(animals, rng.choice(NAMES)), f"{known}\n{steps}", str(total), level, domain_name("legs", is_other)
    )
