"""Letters in words; the level is how many words there are.

user:      How many times does the letter e appear in "green tree"?
reasoning: g0 r0 e1 e2 n2
           t2 r2 e3 e4
answer:    4

A trace spells the words and counts on at every letter, so that no step looks back further than one letter.
"""

import random
from collections.abc import Callable

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, domain_name

LEVELS = {1: 3, 2: 3, 3: 2, 4: 1}

_WORDS = (
    "apple banana bread bridge butter candle carrot castle cheese cherry circle coffee cotton desert dinner doctor "
    "dragon eleven engine family farmer feather finger flower forest garden ginger green hammer harbor honey insect "
    "island jacket kitten ladder lemon letter little market meadow mirror monkey mountain needle onion orange paper "
    "parrot pepper pillow planet pocket potato rabbit ribbon river rocket school season seven sheep silver sister "
    "spoon street summer sweet table teacher thunder tiger tomato tree turtle valley village violet water weather "
    "window winter wooden yellow"
).split()

_PATTERNS: tuple[Callable[[str, str, str], str], ...] = (
    lambda letter, text, name: f'How many times does the letter {letter} appear in "{text}"?',
    lambda letter, text, name: f'Count the letter {letter} in "{text}".',
    lambda letter, text, name: f'{name} writes "{text}". How often does {name} write the letter {letter}?',
    lambda letter, text, name: f'How often is the letter {letter} in "{text}"?',
    lambda letter, text, name: f'Look at "{text}". How many of its letters are {letter}?',
    lambda letter, text, name: f'Tell me how often {letter} occurs in "{text}".',
)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one query with `level` words and a letter that occurs in them."""
    phrase, is_other = choose_pattern(_PATTERNS, patterns, rng)
    words = rng.sample(_WORDS, level)
    letter = rng.choice(sorted(set("".join(words))))
    steps, total = [], 0
    for word in words:
        counted = []
        for spelled in word:
            total += spelled == letter
            counted.append(f"{spelled}{total}")
        steps.append(" ".join(counted))
    question = phrase(letter, " ".join(words), rng.choice(NAMES))
    return Query(question, "\n".join(steps), str(total), level, domain_name("letters", is_other))
