"""Decontamination: planted overlaps are found, clean rows are not, and what real data sets share."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgpo_trl.data.decontamination import Decontaminator
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.text import BRACKETS, tokens

FRACTION = (
    "Let $f(x)=\\dfrac{x+1}{x-1}$ for all real numbers $x \\neq 1$. Find the value of $f(f(3)) + \\frac{1}{2}$, "
    "and express your answer as a common fraction in lowest terms."
)
SHEEP = "A farmer has 17 sheep and all but 9 of them die in the night. How many sheep does the farmer have left?"
BENCHMARKS = {"algebra": ["What is $2+2$?", FRACTION], "riddles": [SHEEP]}


def example(*texts: str) -> Example:
    roles = ("user", "assistant")
    prompt = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Example(prompt=prompt, source="s", domain="maths", id="1")


def found(*texts: str) -> dict | None:
    (drop,) = Decontaminator(BENCHMARKS)([example(*texts)])
    assert drop is None or drop.reason == "contaminated"
    return drop.detail if drop else None


@pytest.mark.parametrize(
    ("texts", "benchmark", "row", "least"),
    [
        ((FRACTION,), "algebra", 1, 1.0),
        ((FRACTION.replace(" ", "\n  ").upper(),), "algebra", 1, 1.0),
        ((FRACTION.replace("\\dfrac", "\\frac").replace("$", "").replace("\\neq", "\\ne"),), "algebra", 1, 1.0),
        ((FRACTION.replace("\\frac{1}{2}", "\\tfrac12").replace("(x)", "\\left(x\\right)"),), "algebra", 1, 1.0),
        ((f"You are a tutor. Solve step by step: {FRACTION} Put the answer in \\boxed{{}}.",), "algebra", 1, 1.0),
        ((SHEEP, "Nine.", "And now with other words?"), "riddles", 0, 1.0),
        (("Hello", f"Consider this. {SHEEP}", "Go on."), "riddles", 0, 1.0),
        ((SHEEP.replace("left", "now"),), "riddles", 0, 0.5),
        (("what is 2 + 2",), "algebra", 0, 1.0),
        (("Hi", "Hello", "What is $2 + 2$?"), "algebra", 0, 1.0),
    ],
)
def test_planted_questions(texts: tuple[str, ...], benchmark: str, row: int, least: float) -> None:
    detail = found(*texts)
    assert detail is not None
    assert (detail["benchmark"], detail["row"]) == (benchmark, row)
    assert least <= detail["overlap"] <= 1.0
    assert detail["text"]


@pytest.mark.parametrize(
    "text",
    [
        "Please tell me what is 2 + 2 and why.",  # short questions are found only as they are
        "What is 2 + 3?",
        "In one night every sheep of a shepherd's flock of seventeen but nine is lost. What is left?",  # a paraphrase
        "How many sheep does the farmer have left? " + "I asked my neighbour that when we met at the fair. " * 3,
        "Express your answer as a common fraction in lowest terms.",
        "",
    ],
)
def test_what_is_not_found(text: str) -> None:
    assert found(text) is None


def test_other_numbers_are_found_where_enough_of_the_wording_is_left() -> None:
    assert found(FRACTION.replace("f(f(3))", "f(f(4))")) is not None
    assert found(SHEEP.replace("17", "20").replace("9", "5")) is None


def test_the_overlap_is_the_share_of_the_questions_n_grams() -> None:
    decontaminator = Decontaminator({"b": ["a b c d e f"]}, n=2, threshold=0.4)
    verdicts = decontaminator([example("x a b c y"), example("a b x c d"), example("e f g"), example("a b c d e f")])
    assert [verdict and verdict.detail for verdict in verdicts] == [
        {"benchmark": "b", "row": 0, "overlap": 0.4, "text": "a b"},
        {"benchmark": "b", "row": 0, "overlap": 0.4, "text": "a b"},
        None,
        {"benchmark": "b", "row": 0, "overlap": 1.0, "text": "a b"},
    ]


def test_the_question_with_the_largest_overlap_is_named() -> None:
    decontaminator = Decontaminator({"one": ["a b c d"], "two": ["z", "a b c e"]}, n=2)
    (drop,) = decontaminator([example("a b c e")])
    assert drop == Drop("contaminated", {"benchmark": "two", "row": 1, "overlap": 1.0, "text": "a b"})


def test_it_goes_to_worker_processes() -> None:
    decontaminator = Decontaminator(BENCHMARKS)
    examples = [example(SHEEP), example("Hello")]
    assert pickle.loads(pickle.dumps(decontaminator))(examples) == decontaminator(examples)


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=0, max_size=14)


@given(question=WORDS.filter(bool), row=WORDS, n=st.integers(1, 4), threshold=st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=300)
def test_against_plain_counting(question: list[str], row: list[str], n: int, threshold: float) -> None:
    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} - {()}

    share = len(grams(question) & grams(row)) / len(grams(question))
    (drop,) = Decontaminator({"b": [" ".join(question)]}, n, threshold)([example(" ".join(row))])
    assert (drop is not None) == (share >= threshold)
    assert drop is None or drop.detail["overlap"] == round(share, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"b": ["q"]}, 0), "n must be at least 1; got 0"),
        (({"b": ["q"]}, 8, 0.0), r"threshold must lie in \(0, 1\]; got 0.0"),
        (({"b": ["q"]}, 8, 1.5), r"threshold must lie in \(0, 1\]; got 1.5"),
        (({"a": ["q"], "b": []},), "benchmarks: 'b' has no questions"),
    ],
)
def test_bad_arguments(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decontaminator(*arguments)


# --- real data sets -------------------------------------------------------------------------------------------


def problems(shared_data: Path, name: str) -> list[str]:
    return [row["problem"] for row in json.loads((shared_data / f"{name}.json").read_text())]


def test_planted_among_real_rows(shared_data: Path) -> None:
    """Recall 1 and precision 1: every question of MATH500 hidden among queries that share nothing with it."""
    questions = problems(shared_data, "math500_test")
    queries = json.loads((shared_data / "general_queries.json").read_text())
    clean = [f"{row['instruction']} {row['input']}" for row in queries]
    clean += problems(shared_data, "gsm8k_test")
    hidden = [f"Solve this problem.\n\n{question}\n\nThink it through." for question in questions]
    decontaminator = Decontaminator({"math500": questions})
    drops = decontaminator([example(text) for text in (*clean, *hidden)])
    assert drops[: len(clean)] == [None] * len(clean)
    caught = np.array([drop is not None for drop in drops[len(clean) :]])
    sizes = [sum(token not in BRACKETS for token in tokens(question)) for question in questions]
    short = np.array(sizes) < decontaminator.n
    assert caught[~short].all()
    assert sum(drop is not None for drop in decontaminator([example(question) for question in questions])) == 500


@pytest.mark.parametrize(
    ("benchmark", "data", "overlapping", "whole"),
    [
        ("math500_test", "math_train", 45, 0),  # templates with other numbers, other questions on the same figure
        ("math500_test", "aime_train", 9, 6),  # MATH holds problems of AIME
        ("aime24_test", "aime_train", 0, 0),
        ("olympiadbench_test", "math_train", 2, 1),
    ],
)
def test_what_real_data_sets_share(shared_data: Path, benchmark: str, data: str, overlapping: int, whole: int) -> None:
    decontaminator = Decontaminator({benchmark: problems(shared_data, benchmark)})
    drops = [drop for drop in decontaminator([example(text) for text in problems(shared_data, data)]) if drop]
    assert len(drops) == pytest.approx(overlapping, abs=3)
    assert sum(drop.detail["overlap"] == 1.0 for drop in drops) >= whole


def test_templated_questions_are_matched_exactly() -> None:
    """By n-grams one question of a template is all of them; exactly, only itself."""
    template = "Ann has {} apples and buys {} more of them, on her way home from the market that opens every week on "
    template += "Monday. How many apples does Ann have now, all in all, if she has not eaten any?"
    trained = [template.format(i, j) for i in range(20) for j in range(20)]
    fresh = [example(template.format(i, 20)) for i in range(20)]
    assert None not in Decontaminator({"trained": trained})(fresh)
    exact = Decontaminator({"trained": trained, "riddles": [SHEEP]}, exact={"trained"})
    assert exact(fresh) == [None] * 20
    (drop,) = exact([example("Hello", "Hi", f" {trained[21]}\n")])
    assert drop is not None
    assert drop.detail == {"benchmark": "trained", "row": 21, "overlap": 1.0, "text": trained[21]}
    assert exact([example(trained[21].upper())]) == [None]
    (drop,) = exact([example(SHEEP.upper())])
    assert drop is not None
    assert drop.detail["benchmark"] == "riddles"
    assert pickle.loads(pickle.dumps(exact))(fresh) == [None] * 20
