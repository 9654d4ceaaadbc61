"""The classifier of reasoning queries: training, its file, the step, and how good the one of the package is."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hgpo_trl.data.classifier import (
    FEATURES,
    ReasoningQueryClassifier,
    no_reasoning_queries,
    precision_and_recall,
    seed_kinds,
    train,
    vectorise,
)
from hgpo_trl.data.example import Example
from hgpo_trl.modes import Mode
from hgpo_trl.scripts import data

MATHS = [f"Let $x_{{{i}}}$ satisfy $x^2 - {i}x + {i + 1} = 0$. Find the sum of all values of $x$." for i in range(60)]
GENERAL = [
    f"{verb} {thing}."
    for verb in ("Describe", "Name", "Praise", "Draw")
    for thing in "a cat,my boss,the sea".split(",")
]
REASONING_QUERIES = [  # written for this test, not looked at in training
    "What is the sum of the first 100 odd numbers?",
    "A rectangle is 3 m longer than it is wide and its area is 40 m². How wide is it?",
    "A shop sells pens at 3 for $2. How much are 18 pens?",
    "Simplify (x^2-9)/(x-3)",
    "Convert 0.375 to a fraction",
    "I roll two dice. How likely is it that the total is 9?",
    "What is 17% of 2,340?",
    "If 3 workers paint a house in 12 days, how long do 4 workers need?",
    "Give me a Haskell implementation of Dijkstra's shortest path",
    "How can I vectorize this nested loop with NumPy?",
    "Calculate the pH of a 0.01 M HCl solution.",
    "What number comes next: 2, 6, 12, 20, 30?",
]
GENERAL_QUERIES = [
    "Recommend a podcast about history.",
    "Which wine goes with salmon?",
    "How do I train my puppy not to bite?",
    "Draft a complaint to an airline about lost luggage.",
    "How long does it take to fly from London to Tokyo?",
    "Explain photosynthesis to a child.",
    "Rewrite this in a friendlier tone: Send me the report now.",
    "What is the meaning of the word serendipity?",
    "Pros and cons of remote work",
    "Make a weekly meal plan for a vegetarian.",
    "What caused the First World War?",
    "What is the population of Canada?",
]


def example(query: str, mode: Mode | None = Mode.NO_THINK, *history: str) -> Example:
    roles = ("user", "assistant")
    prompt = [{"role": roles[i % 2], "content": text} for i, text in enumerate((*history, query))]
    return Example(prompt=prompt, source="s", domain="general", id="1", mode=mode, answer="4")


@pytest.fixture(scope="module")
def shipped() -> ReasoningQueryClassifier:
    return ReasoningQueryClassifier.load()


# --- features and training ------------------------------------------------------------------------------------


def test_features() -> None:
    rows = vectorise(["What is 12 + 3?", "what IS $7 + 48$?", "What was that?"])
    assert rows.shape == (3, FEATURES["n_features"])
    assert (rows[0] != rows[1]).nnz == 0  # numbers, case and dollar signs are no features
    assert (rows[0] != rows[2]).nnz > 0
    long = "Tell me more. " * 1_000
    assert (vectorise([long]) != vectorise([long + long])).nnz == 0  # the beginning and the end are looked at


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Write a function to reverse a string", ["code"]),
        ("fix my C++ program", ["code"]),
        ("Prove that 2 + 2 = 4.", ["maths"]),
        ("Solve this riddle.", ["logic"]),
        ("Describe the sea.", []),
        ("Summarise https://example.org/python/code.html", []),
        ("I like cobras and rubies.", []),
    ],
)
def test_seed_terms(text: str, kinds: list[str]) -> None:
    assert seed_kinds(text) == kinds


def test_training_relabels_and_leaves_out() -> None:
    coded = ["Write a Python function.", "Debug this code."] * 5
    points = [
        f"Let $P_{{{i}}}$ be a point of the circle $C$. Find the largest distance of $P$ and $Q$." for i in range(60)
    ]
    doubtful = "Let $R$ be a point of the circle $C$. Find the largest distance of $R$ and $Q$."
    assert not seed_kinds(doubtful)
    classifier = train({"m": points}, {"g": [*GENERAL * 3, *coded, doubtful]}, 0.5, 0)
    assert classifier.metadata["rows"] == {"reasoning": 60, "other": 37, "relabelled": 10, "doubtful": 1}
    assert (classifier.probability([points[0], coded[0], doubtful, "Write a Python script."]) > 0.5).all()
    assert (classifier.probability(GENERAL) < 0.5).all()
    again = train({"m": points}, {"g": [*GENERAL * 3, *coded, doubtful]}, 0.5, 0)
    assert (again.weights == classifier.weights).all()


def test_precision_and_recall_by_hand() -> None:
    rows = precision_and_recall(np.array([0.9, 0.6, 0.2]), np.array([0.7, 0.1]), [0.5, 0.8, 0.95])
    assert [(row["precision"], row["recall"]) for row in rows] == [(2 / 3, 2 / 3), (1.0, 1 / 3), (None, 0.0)]


# --- file -----------------------------------------------------------------------------------------------------


def test_file_holds_everything(tmp_path: Path, shipped: ReasoningQueryClassifier) -> None:
    classifier = train({"m": MATHS}, {"g": GENERAL * 3}, 0.4, 0)
    classifier.save(tmp_path / "a" / "c.safetensors")
    again = ReasoningQueryClassifier.load(tmp_path / "a" / "c.safetensors")
    texts = [*MATHS, *GENERAL]
    assert np.allclose(again.probability(texts), classifier.probability(texts), atol=5e-3)  # weights of 16 bits
    assert (again.threshold, again.metadata) == (0.4, classifier.metadata)
    assert (pickle.loads(pickle.dumps(shipped)).probability(texts) == shipped.probability(texts)).all()
    assert shipped.probability([]).shape == (0,)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        ReasoningQueryClassifier.load(tmp_path / "c.safetensors")
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(ValueError, match="is no file of `hgpo-trl data classifier`"):
        ReasoningQueryClassifier.load(tmp_path / "text.safetensors")
    save_file({"weights": np.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no file of `hgpo-trl data classifier`"):
        ReasoningQueryClassifier.load(tmp_path / "other.safetensors")
    about = {"bias": 0.0, "threshold": 0.5, "features": FEATURES | {"n_features": 4}}
    save_file({"weights": np.zeros(4)}, tmp_path / "old.safetensors", {"classifier": json.dumps(about)})
    with pytest.raises(ValueError, match="was trained with other features"):
        ReasoningQueryClassifier.load(tmp_path / "old.safetensors")


# --- step -----------------------------------------------------------------------------------------------------


def test_only_no_think_examples_are_judged(shipped: ReasoningQueryClassifier) -> None:
    examples = [
        example("Describe the sea."),
        example(MATHS[0]),
        example(MATHS[0], Mode.THINK),
        example(MATHS[0], None),
        example("Thanks!", Mode.NO_THINK, MATHS[0], "x"),
    ]
    step = pickle.loads(pickle.dumps(no_reasoning_queries(shipped)))
    drops = step(examples)
    assert [drop and drop.reason for drop in drops] == [None, "reasoning_query", None, None, "reasoning_query"]
    assert drops[1].detail["probability"] > 0.9
    assert no_reasoning_queries(shipped, 1.0)(examples) == [None] * 5
    assert step([]) == []


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_threshold_out_of_range(shipped: ReasoningQueryClassifier, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        no_reasoning_queries(shipped, threshold)


# --- the one of the package -----------------------------------------------------------------------------------


def test_shipped_file_is_small_and_says_what_it_is(shipped: ReasoningQueryClassifier) -> None:
    path = Path(__file__).parents[1] / "hgpo_trl" / "data" / "reasoning_queries.safetensors"
    assert path.stat().st_size <= 100_000
    assert shipped.metadata["sources"] == {"reasoning": ["aime_train", "math_train"], "other": ["general_queries"]}
    assert {"measured", "rows", "scikit_learn", "seed"} <= shipped.metadata.keys()


def test_shipped_on_queries_of_its_own_kind(shipped: ReasoningQueryClassifier) -> None:
    assert (shipped.probability(REASONING_QUERIES) >= 0.5).mean() >= 0.9
    assert (shipped.probability(GENERAL_QUERIES) >= 0.5).mean() <= 0.05


@pytest.mark.parametrize(
    ("name", "recall"), [("gsm8k_test", 0.93), ("olympiadbench_test", 0.98), ("amc_test", 0.95), ("math500_test", 0.98)]
)
def test_shipped_on_problems_it_was_not_trained_on(
    shipped: ReasoningQueryClassifier, shared_data: Path, name: str, recall: float
) -> None:
    rows = json.loads((shared_data / f"{name}.json").read_text())
    assert (shipped.probability([row["problem"] for row in rows]) >= shipped.threshold).mean() >= recall


# --- command --------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Callable[[], list[str]]:
    """Small files of both kinds, and the arguments that name them."""
    (tmp_path / "m.json").write_text(json.dumps([{"problem": text} for text in MATHS]))
    rows = [{"instruction": text, "input": None} for text in [*GENERAL, "Write a Python script."] * 2]
    (tmp_path / "g.json").write_text(json.dumps(rows))
    arguments = ["--reasoning", f"{tmp_path}/m.json=problem", "--other", f"{tmp_path}/g.json=instruction+input"]
    return lambda: ["classifier", *arguments, "--output", f"{tmp_path}/out/c.safetensors"]


def test_command(sources: Callable[[], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main([*sources(), "--held_out", "0.3", "--threshold", "0.6", "--test_reasoning", f"{tmp_path}/m.json=problem"])
    report = json.loads((tmp_path / "out" / "c.json").read_text())
    assert report["sets"]["m (held out)"] == {"rows": 18, "reasoning": True, "found": 1.0}
    assert report["sets"]["m"]["rows"] == 60
    held = [entry["rows"] for name, entry in report["sets"].items() if name.startswith("g (held out)")]
    assert sum(held) == 4  # of 13 different texts
    assert report["rows"]["reasoning"] == 42
    assert [row["threshold"] for row in report["by_threshold"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert ReasoningQueryClassifier.load(tmp_path / "out" / "c.safetensors").threshold == 0.6
    printed = capsys.readouterr().out
    assert "100.0%  recall" in printed
    assert "threshold  precision  recall" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--held_out", "1"], "held_out must lie between 0 and 1; got 1.0"),
        (["--threshold", "0"], "threshold must lie between 0 and 1; got 0.0"),
        (["--reasoning", "a.json"], "reasoning: 'a.json' is not FILE=COLUMN"),
        (["--other", "a.json=x+"], "other: 'a.json=x+' is not FILE=COLUMN"),
        (["--output", "c.bin"], "output must end in .safetensors; got 'c.bin'"),
    ],
)
def test_refused_arguments(
    more: list[str], words: str, sources: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        data.main([*sources(), *more])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hgpo-trl data classifier: error: ")
    assert words in error


def test_columns_and_files_that_are_not_there(sources: Callable[[], list[str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column 'query'; it has problem"):
        data.main([*sources(), "--reasoning", f"{tmp_path}/m.json=query"])
    with pytest.raises(ValueError, match="there is no such file"):
        data.main([*sources(), "--other", f"{tmp_path}/x.json=query"])
    with pytest.raises(ValueError, match="two files are named m"):
        data.main([*sources(), "--reasoning", f"{tmp_path}/m.json=problem", f"{tmp_path}/m.json=problem"])
