"""Deduplication: planted duplicates are found, what differs in a number is not one, clusters are the graph's."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hgpo_trl.data.deduplication import dedup_keys, first_of_each
from hgpo_trl.data.example import Example
from hgpo_trl.data.text import tokens
from hgpo_trl.modes import Mode

PLACES = "river harbour garden market valley island castle forest meadow tower bridge mill".split()
VERBS = "walks looks turns waits climbs paints reads sings writes builds repairs measures".split()
THINGS = "lantern violin basket carpet ladder mirror kettle bottle window pillow hammer saddle".split()


def example(query: str, mode: Mode | None = Mode.THINK, source: str = "s", history: tuple[str, ...] = ()) -> Example:
    roles = ("user", "assistant")
    prompt = [{"role": roles[i % 2], "content": text} for i, text in enumerate((*history, query))]
    return Example(prompt=prompt, source=source, domain="general", id=query, mode=mode)


def originals(count: int, seed: int = 0) -> list[str]:
    """Queries of 60 to 90 words without anything in common but their vocabulary."""
    rng = random.Random(seed)
    sentence = lambda: f"near the {rng.choice(PLACES)} she {rng.choice(VERBS)} with a {rng.choice(THINGS)}"  # noqa: E731
    return [
        f"Tell {rng.randrange(10**6)} people: " + ", ".join(sentence() for _ in range(rng.randint(7, 10)))
        for _ in range(count)
    ]


def reworded(text: str, share: float, rng: random.Random) -> str:
    """A share of the words, at least one, replaced by others."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 2]
    for i in rng.sample(places, max(1, round(share * len(words)))):
        words[i] = rng.choice(("quietly", "perhaps", "seldom", "together"))
    return " ".join(words)


def restyled(text: str) -> str:
    return re.sub(r"\s+", " \n ", text.upper().replace(",", " ;")) + " !"


def clusters(examples: list[Example], **options: object) -> np.ndarray:
    return first_of_each(dedup_keys(examples, **options))  # type: ignore[arg-type]


# --- keys -----------------------------------------------------------------------------------------------------


def test_planted_corpus() -> None:
    """Precision 1 and a recall of at least 0.97 (edits of up to 3 % of the words) and 0.75 (5 %)."""
    rng = random.Random(1)
    base = originals(150)
    numbers = [re.sub(r"\d+", lambda match: str(int(match[0]) + 1), text) for text in base]
    copies = {
        "exact": base,
        "style": [restyled(text) for text in base],
        "1 %": [reworded(text, 0.01, rng) for text in base],
        "3 %": [reworded(text, 0.03, rng) for text in base],
        "5 %": [reworded(text, 0.05, rng) for text in base],
    }
    for kind, texts in copies.items():
        sources = [example(text, source="a") for text in base] + [example(text, source="b") for text in texts]
        first = clusters([*sources, *map(example, numbers)])
        n = len(base)
        assert (first[:n] == np.arange(n)).all(), kind  # the originals are kept
        assert (first[2 * n :] == np.arange(2 * n, 3 * n)).all(), kind  # and so is what differs in a number
        found = first[n : 2 * n] != np.arange(n, 2 * n)
        assert (first[n : 2 * n][found] == np.flatnonzero(found)).all(), kind  # the right one
        assert found.mean() >= {"3 %": 0.97, "5 %": 0.75}.get(kind, 1.0), kind


def test_exact_keys_alone() -> None:
    text = originals(1)[0]
    examples = [example(text), example(restyled(text)), example(reworded(text, 0.01, random.Random(0)))]
    assert clusters(examples, near=False).tolist() == [0, 0, 2]
    assert dedup_keys(examples, near=False).shape == (3, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is $2+2$?", "what is  2 + 2", True),
        ("Compute $\\dfrac{1}{2}$.", "Compute \\[\\frac 12\\]", True),
        ("How many of the 1,000 coins?", "How many of the $1000$ coins?", True),
        ("Hello!", "hello", True),
        ("What is 2 + 2?", "What is 2 + 3?", False),
        ("What is $x - 2$ for $x = 5$?", "What is $x + 2$ for $x = 5$?", False),
        ("Expand $2(x + 1)$.", "Expand $2x + 1$.", False),
        ("What is 3.5?", "What is 35?", False),
        ("What is the capital of France?", "What is the capital of Spain?", False),
        ("请写一首诗", "请写一首歌", False),
    ],
)
def test_short_prompts(one: str, other: str, same: bool) -> None:
    assert (clusters([example(one), example(other)])[1] == 0) == same


def test_a_variable_or_a_sign_in_a_long_problem() -> None:
    story = originals(1)[0]
    problems = [f"{story}. If x + y = 12, what is the value of {end}" for end in ("x?", "y?", "x!", "x - y?", "x + y?")]
    assert clusters([example(problem) for problem in problems]).tolist() == [0, 1, 0, 3, 4]


@pytest.mark.parametrize("across_modes", [False, True])
def test_modes(across_modes: bool) -> None:
    text = originals(1)[0]
    near = reworded(text, 0.01, random.Random(0))
    examples = [example(text), example(text, Mode.NO_THINK), example(near, Mode.NO_THINK), example(near)]
    expected = [0, 0, 0, 0] if across_modes else [0, 1, 1, 0]
    assert clusters(examples, across_modes=across_modes).tolist() == expected


def test_the_whole_conversation_counts() -> None:
    question = "And what does that mean for the harbour?"
    examples = [
        example(question, history=("What is a tide?", "The sea's rise.")),
        example(question, history=("What is a port?", "A place for ships.")),
        example(question, history=("what is a TIDE", "the sea's rise")),
    ]
    assert clusters(examples).tolist() == [0, 1, 0]


def test_keys_depend_on_the_example_alone() -> None:
    examples = [example(text) for text in originals(20)]
    together = dedup_keys(examples)
    assert together.dtype == np.uint64
    assert len(together) == 20
    apart = np.concatenate([dedup_keys(examples[start : start + 3]) for start in range(0, 20, 3)])
    assert (together == apart).all()
    assert dedup_keys([]).shape == (0, together.shape[1])


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        dedup_keys([], threshold=threshold)


def test_too_few_permutations() -> None:
    with pytest.raises(ValueError, match="num_perm must be at least 2; got 1"):
        dedup_keys([], num_perm=1)


def test_real_problems(shared_data: Path) -> None:
    """In MATH few problems are duplicates, and none of those of AIME; general queries come back where planted."""
    rows = json.loads((shared_data / "math_train.json").read_text())
    first = clusters([example(row["problem"]) for row in rows])
    assert 10 <= (first != np.arange(len(rows))).sum() <= 40
    numbers = [[token for token in tokens(row["problem"]) if token[0].isdigit()] for row in rows]
    assert all(numbers[i] == numbers[j] for i, j in enumerate(first))
    queries = json.loads((shared_data / "general_queries.json").read_text())
    texts = [f"{row['instruction']} {row['input']}" for row in queries]
    first = clusters([example(text) for text in (*texts, *map(restyled, texts))])
    assert (first[len(texts) :] < len(texts)).mean() > 0.98  # some hold a sign of punctuation that is one of maths


# --- clusters -------------------------------------------------------------------------------------------------


def reference(keys: np.ndarray) -> list[int]:
    """Clusters by plain search: a row's is that of the first row from which it can be reached."""
    first = [-1] * len(keys)
    for start in range(len(keys)):
        if first[start] != -1:
            continue
        reached = [start]
        first[start] = start
        for i in reached:
            for j in np.flatnonzero((keys == keys[i]).any(axis=1)):
                if first[j] == -1:
                    first[j] = start
                    reached.append(int(j))
    return first


@given(arrays(np.uint64, st.tuples(st.integers(0, 25), st.integers(1, 4)), elements=st.integers(0, 30)))
@settings(max_examples=200)
def test_clusters_are_those_of_a_plain_search(keys: np.ndarray) -> None:
    assert first_of_each(keys).tolist() == reference(keys)


def test_keys_on_disk(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 5_000, (3_000, 3)).astype(np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    on_disk = np.load(tmp_path / "keys.npy", mmap_mode="r")
    assert first_of_each(on_disk).tolist() == reference(keys)
