"""Benchmarks by name: real copies through `hgpo-trl evaluate`, made-up rows of the schemas that no copy has."""

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas as pd
import pytest
from datasets import Dataset
from settings import argv

from hgpo_trl.evaluation.benchmarks import BENCHMARKS, CHOICE_INSTRUCTION, INSTRUCTION, as_prompts, load_benchmark
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.scripts.evaluate import main

ROWS = {"math500": 500, "aime24": 30, "amc23": 83, "olympiadbench": 675, "gsm8k": 1319}
COPIES = {name: f"{name}_test.json" for name in ROWS} | {"amc23": "amc_test.json"}
GROUPS = {"math500": ["level", "subject"], "aime24": ["level"], "amc23": ["level"], "olympiadbench": ["subject"]}


def question(row: dict[str, Any]) -> str:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize("name", ROWS)
def test_a_real_copy(name: str, shared_data: Path) -> None:
    """Every row, its question and its answer, against the file."""
    found = load_benchmark(name, str(shared_data))
    original = json.loads((shared_data / COPIES[name]).read_text(encoding="utf-8"))
    assert len(found) == len(original) == ROWS[name]
    assert found.column_names == ["prompt", "answer", *GROUPS.get(name, [])]
    for row, source in zip(found, original, strict=True):
        assert question(row) == f"{source['problem'].strip()}\n\n{INSTRUCTION}"
        if isinstance(source["answer"], list):
            assert ast.literal_eval(row["answer"]) == source["answer"]
        else:
            assert row["answer"] == str(source["answer"]).strip()
    columns = {"math500": "level", "aime24": "problem_number", "amc23": "difficulty"}
    if name in columns:
        assert list(found["level"]) == [source[columns[name]] for source in original]
    if "subject" in found.column_names:
        column = "subfield" if name == "olympiadbench" else "subject"
        assert list(found["subject"]) == [source[column] for source in original]


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_answers_are_right_answers(name: str, shared_data: Path) -> None:
    """In a box, the answer of the file itself scores 1, and a wrong one 0."""
    rows = load_benchmark(name, str(shared_data)).shuffle(seed=0).select(range(30))
    answers = [ast.literal_eval(a) if a.startswith("[") and name == "olympiadbench" else [a] for a in rows["answer"]]
    boxed = ["\\boxed{" + ", ".join(answer).replace("$", "") + "}" for answer in answers]
    right = accuracy_reward([f"<no_think>\n{box}\n</no_think>" for box in boxed], answer=list(rows["answer"]))
    wrong = accuracy_reward(["<no_think>\n\\boxed{31415926}\n</no_think>"] * len(rows), answer=list(rows["answer"]))
    assert right == [1.0] * len(rows)
    assert wrong == [0.0] * len(rows)


@pytest.mark.parametrize("name", ROWS)
def test_a_real_copy_is_evaluated(name: str, model_dir: str, shared_data: Path, tmp_path: Path) -> None:
    fields = {
        "model": model_dir, "data": name, "data_dir": shared_data, "output_dir": tmp_path, "num_prompts": 4,
        "samples_per_mode": 2, "max_new_tokens": 6,
    }  # fmt: skip
    main(argv(fields))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["dataset"], report["num_prompts"], report["settings"]["split"]) == (name, 4, BENCHMARKS[name].split)
    rows = load_benchmark(name, str(shared_data)).select(range(4))
    for group in ("level", "subject", "domain"):
        counted = {entry[group]: entry["num_prompts"] for entry in report[f"by_{group}"]}
        assert counted == (Counter(rows[group]) if group in rows.column_names else {})
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    assert len(samples) == 4 * 2 * 2
    assert samples["reward"].isin([0.0, 1.0]).all()


# --- Schemas of the hub -------------------------------------------------------


def gpqa(**changes: Any) -> Dataset:
    row = {
        "Question": "What is spin?",
        "Correct Answer": " right\n",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "Subdomain": "Quantum Mechanics",
        "High-level domain": "Physics",
    }
    return Dataset.from_list([row | changes])


def test_choices_are_lettered_in_an_order_of_the_questions_own() -> None:
    letters = Counter()
    for number in range(200):
        rows = as_prompts("gpqa_diamond", gpqa(Question=f"What is spin {number}?"))
        (row,) = rows
        asked, choices, instruction = question(row).split("\n\n")
        assert (asked, instruction) == (f"What is spin {number}?", CHOICE_INSTRUCTION)
        listed = dict(line.split(") ", 1) for line in choices.split("\n"))
        assert list(listed) == ["A", "B", "C", "D"]
        assert set(listed.values()) == {"right", "wrong 1", "wrong 2", "wrong 3"}
        assert listed[row["answer"]] == "right"
        assert (row["subject"], row["domain"]) == ("Quantum Mechanics", "Physics")
        letters[row["answer"]] += 1
    assert min(letters.values()) > 30  # 50 each
    # the order of the columns has no part in it
    swapped = as_prompts("gpqa_diamond", gpqa(**{"Incorrect Answer 1": "wrong 3", "Incorrect Answer 3": "wrong 1"}))
    assert question(swapped[0]) == question(as_prompts("gpqa_diamond", gpqa())[0])


@pytest.mark.parametrize("letter", ["\\boxed{X}", "\\boxed{\\text{X}}", "\\boxed{(X)}", "The answer is X."])
def test_a_letter_is_verified(letter: str) -> None:
    (answer,) = as_prompts("gpqa_diamond", gpqa())["answer"]
    other = "ABCD"[("ABCD".index(answer) + 1) % 4]
    completions = [f"<no_think>\n{letter.replace('X', shown)}\n</no_think>" for shown in (answer, other)]
    assert accuracy_reward(completions, answer=[answer] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("gsm8k", {"question": "Q", "answer": "16 - 3 = <<16-3=13>>13.\n#### 1,318"}, "1,318"),
        ("aime24", {"id": 60, "problem": "Q", "solution": "…", "answer": "033", "year": "2024"}, "033"),
        ("aime25", {"problem": "Q", "answer": 70, "id": "0"}, "70"),
        ("amc23", {"id": 0, "question": "Q", "answer": 27.0, "url": "…"}, "27.0"),
        ("olympiadbench", {"question": "Q", "final_answer": ["$3$", "4"], "subfield": "Algebra"}, "['$3$', '4']"),
        ("olympiadbench", {"question": "Q", "final_answer": "['2']", "subfield": "Algebra"}, "['2']"),
        ("math500", {"problem": "Q", "answer": "\\frac{1}{2}", "level": 5, "subject": "Algebra"}, "\\frac{1}{2}"),
    ],
)
def test_rows_as_the_hub_has_them(name: str, row: dict[str, Any], expected: str) -> None:
    (found,) = as_prompts(name, Dataset.from_list([row]))
    assert (question(found), found["answer"]) == (f"Q\n\n{INSTRUCTION}", expected)


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "Q", "answer": "1"}, {"problem": " ", "answer": "1"}], r"row 1 cannot be asked: empty_field"),
        ([{"problem": "Q", "answer": None}], r"row 0 cannot be asked: it has no answer"),
        ([{"problem": "a <think> b", "answer": "1"}], r"row 0 cannot be asked: tag_in_text"),
        ([{"question": "Q", "answer": "1"}], r"has no column problem for its prompt; its columns are \['answer', 'que"),
        ([{"problem": "Q", "solution": "1"}], r"has no column answer for its answer"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(rows: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data='math500'.*{message}"):
        as_prompts("math500", Dataset.from_list(rows))


@pytest.mark.parametrize("column", ["Question", "Correct Answer", "Incorrect Answer 3"])
@pytest.mark.parametrize("value", [None, " \n"])
def test_a_choice_that_is_missing_is_refused(column: str, value: str | None) -> None:
    with pytest.raises(ValueError, match=rf"data='gpqa_diamond': row 0 cannot be asked: its '{column}' is empty\. Fix"):
        as_prompts("gpqa_diamond", gpqa(**{column: value}))


def test_choices_need_their_columns() -> None:
    with pytest.raises(ValueError, match=r"data='gpqa_diamond' has no column 'Incorrect Answer 2'"):
        as_prompts("gpqa_diamond", gpqa().remove_columns("Incorrect Answer 2"))


def test_a_copy_is_found_by_name(tmp_path: Path) -> None:
    def answer() -> str:
        return load_benchmark("amc23", str(tmp_path))["answer"][0]

    with pytest.raises(
        ValueError, match=r"data='amc23': data_dir=.* holds none of amc23\.json,.*amc_test\.parquet\. Put"
    ):
        answer()
    rows = {name: Dataset.from_list([{"problem": "Q", "answer": name}]) for name in ("4", "3", "2", "1")}
    rows["4"].to_parquet(tmp_path / "amc_test.parquet")
    assert answer() == "4"
    rows["3"].to_json(tmp_path / "amc.jsonl")
    assert answer() == "3"
    (tmp_path / "amc23_test.json").write_text(json.dumps([{"problem": "Q", "answer": "2"}]), encoding="utf-8")
    assert answer() == "2"
    rows["1"].to_parquet(tmp_path / "amc23.parquet")
    assert answer() == "1"
    with pytest.raises(ValueError, match=r"is not a folder with one of gsm8k\.json"):
        load_benchmark("gsm8k", str(tmp_path / "nowhere"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under HF_HUB_OFFLINE=1, with nothing in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.usefixtures("offline")
def test_a_benchmark_that_is_out_of_reach_is_named(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_benchmark(name)
    message = str(caught.value)
    for part in (f"data={name!r}", BENCHMARKS[name].hub, "network", "HF_HUB_OFFLINE", "data_dir"):
        assert part in message


def test_what_a_benchmark_decides_itself_is_refused(capsys: pytest.CaptureFixture) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit):
            main(["--model", "m", "--output_dir", "o", *argv])
        return capsys.readouterr().err

    assert "split='test': the benchmark data='math500' has its own split" in refused(
        "--data", "math500", "--split", "test"
    )
    assert "data='mine.parquet' is none of math500, aime24" in refused("--data", "mine.parquet", "--data_dir", "x")


def test_the_documentation_lists_them(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{benchmark.hub}`" in line
        assert f"`{benchmark.split}`" in line
        assert benchmark.subset is None or f"`{benchmark.subset}`" in line
    assert INSTRUCTION in text
    assert CHOICE_INSTRUCTION in text
