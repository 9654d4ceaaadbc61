"""A task of your own: how often does a letter occur in a word, modulo 4?

    hgpo-trl data --tasks examples/count_letters.py --output_dir runs/count-letters/data

A task is three names: LEVELS, VOCABULARY and sample. The rest (tokenizer, model, data sets, held-out split) follows.
"""

import random

from hgpo_trl.tasks.embedded import Query

LETTERS = "abcd"
MODULUS = 4
LEVELS = {4: 2, 6: 2, 8: 1, 10: 1, 12: 1}  # letters in the word -> weight
VOCABULARY = [*"count in ? : so far".split(), *LETTERS, *(str(number) for number in range(max(LEVELS) + 1))]


def sample(level: int, rng: random.Random) -> Query:
    """Draw one word of `level` letters and the letter to count."""
    word = [rng.choice(LETTERS) for _ in range(level)]
    wanted = rng.choice(LETTERS)
    count, steps = 0, []
    for letter in word:
        count = (count + (letter == wanted)) % MODULUS
        steps.append(f"{letter} {count}")
    return Query(
        prompt=f"count {wanted} in : {' '.join(word)} ?",
        reasoning=f"so far : {' '.join(steps)}",
        answer=str(count),
        level=level,
    )
