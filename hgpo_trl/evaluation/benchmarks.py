"""Benchmarks by name: their places on the hub, and their rows as `prompt`, `answer` and, where they have them, `level`,
`subject` and `domain`.

The adapter for files of any schema reads the columns, as it does for a source of training data.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tqdm.auto import tqdm

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError
from hgpo_trl.data.adapter import adapt
from hgpo_trl.data.example import Drop
from hgpo_trl.data.own_files import generic
from hgpo_trl.evaluation.metrics import GROUPS
from hgpo_trl.verification import final_answer

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # of Qwen2.5-Math's evaluation
CHOICE_INSTRUCTION = "Please reason step by step, and put the letter of your choice, alone, within \\boxed{}."
SUFFIXES = (".json", ".jsonl", ".parquet")
LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class HubBenchmark:
    """A benchmark's place on the hub, and the names of its columns.

    Args:
        hub: id on the hub.
        fields: possible names of the columns of `prompt`, `answer` and those of `GROUPS` that it has; the first that
            exists is read. A group without a column is left out.
        subset, split: on the hub.
        wrong: columns of the wrong choices of a multiple-choice question.
        copies: further names of local copies.
    """

    hub: str
    fields: Mapping[str, tuple[str, ...]]
    subset: str | None = None
    split: str = "test"
    wrong: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


BENCHMARKS = {
    "math500": HubBenchmark(
        "HuggingFaceH4/MATH-500",
        {"prompt": ("problem",), "answer": ("answer",), "level": ("level",), "subject": ("subject",)},
    ),
    "aime24": HubBenchmark(
        "HuggingFaceH4/aime_2024",
        {"prompt": ("problem",), "answer": ("answer",), "level": ("problem_number",)},
        split="train",
    ),
    "aime25": HubBenchmark(
        "math-ai/aime25",
        {"prompt": ("problem",), "answer": ("answer",), "level": ("problem_number",)},
    ),
    "amc23": HubBenchmark(
        "math-ai/amc23",
        {"prompt": ("question", "problem"), "answer": ("answer",), "level": ("difficulty",)},
        copies=("amc",),
    ),
    "olympiadbench": HubBenchmark(
        "Hothan/OlympiadBench",
        {"prompt": ("question", "problem"), "answer": ("final_answer", "answer"), "subject": ("subfield",)},
        subset="OE_TO_maths_en_COMP",
        split="train",
    ),
    "gsm8k": HubBenchmark(
        "openai/gsm8k",
        {"prompt": ("question", "problem"), "answer": ("answer",)},
        subset="main",
    ),
    "gpqa_diamond": HubBenchmark(
        "Idavidrein/gpqa",
        {
            "prompt": ("Question",),
            "answer": ("Correct Answer",),
            "subject": ("Subdomain",),
            "domain": ("High-level domain",),
        },
        subset="gpqa_diamond",
        split="train",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
}


def load_benchmark(name: str, data_dir: str | None = None) -> Dataset:
    """Load a benchmark as `prompt` (a conversation of one message), `answer` (text), and its columns of `GROUPS`.

    Args:
        name: one of `BENCHMARKS`.
        data_dir: folder with a local copy, as `local_copy` finds it; None: the hub.

    Raises:
        UserError: there is no such copy, the hub cannot be read, a column is missing, or a row lacks its question or
            answer.
    """
    benchmark = BENCHMARKS[name]
    if data_dir is not None:
        rows = load_data("data_dir", str(local_copy(name, data_dir)))
    else:
        rows = _from_hub(name, benchmark)
    return as_prompts(name, rows)


def local_copy(name: str, data_dir: str) -> Path:
    """Find the file of a benchmark in a folder: NAME or NAME_test (the same for `copies`), .json, .jsonl or .parquet.

    Raises:
        UserError: the folder or the file is missing; names every possible file.
    """
    folder = Path(data_dir)
    stems = [f"{stem}{test}" for stem in (name, *BENCHMARKS[name].copies) for test in ("", "_test")]
    possible = [f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    for file in possible:
        if (folder / file).is_file():
            return folder / file
    lacks = "holds none of" if folder.is_dir() else "is not a folder with one of"
    raise UserError(
        f"data={name!r}: data_dir={data_dir!r} {lacks} {', '.join(possible)}. Put a copy of "
        f"{BENCHMARKS[name].hub} there, or leave data_dir out to load it from the hub."
    )


def _from_hub(name: str, benchmark: HubBenchmark) -> Dataset:
    try:
        return load_dataset(benchmark.hub, benchmark.subset, split=benchmark.split)
    except Exception as error:  # of datasets, huggingface_hub or httpx: they have no base in common
        raise UserError(
            f"data={name!r}: {benchmark.hub} cannot be loaded from the hub: {type(error).__name__}: {error}. Check the "
            "network (with HF_HUB_OFFLINE=1 only what the cache holds is found) and your access to it (hf auth "
            "login, where its terms have to be accepted), or give a folder with a local copy as data_dir."
        ) from error


def as_prompts(name: str, rows: Dataset) -> Dataset:
    """Convert a benchmark's own rows, in their order, to the form that `load_benchmark` describes.

    Raises:
        UserError: a column is missing, or a row lacks question, answer or a choice.
    """
    benchmark = BENCHMARKS[name]
    columns = {field: _column(name, rows, field) for field in ("prompt", "answer")}
    groups = {field: _first(rows, benchmark.fields.get(field, ())) for field in GROUPS}
    if missing := [column for column in benchmark.wrong if column not in rows.column_names]:
        raise UserError(f"data={name!r} has no column {missing[0]!r}; its columns are {sorted(rows.column_names)}.")
    reader = generic({"prompt": "prompt", "reference": "answer"}, domain=name)
    prompts, answers = [], []
    for number, row in enumerate(tqdm(rows, desc=name, unit="row")):
        question = row[columns["prompt"]]
        answer = _answer(row[columns["answer"]])
        instruction = INSTRUCTION
        if benchmark.wrong:
            for column in (*columns.values(), *benchmark.wrong):
                if not str(row[column] or "").strip():
                    raise _cannot_be_asked(name, number, f"its {column!r} is empty")
            choices, answer = _choices(question, row[columns["answer"]], [row[column] for column in benchmark.wrong])
            question, instruction = f"{question}\n\n{choices}", CHOICE_INSTRUCTION
        example = adapt(reader, {"prompt": question, "answer": answer}, name)
        if isinstance(example, Drop) or example.reference is None:
            reason = f"{example.reason} {example.detail}" if isinstance(example, Drop) else "it has no answer"
            raise _cannot_be_asked(name, number, reason)
        prompts.append([{"role": "user", "content": f"{example.prompt[0]['content'].strip()}\n\n{instruction}"}])
        answers.append(example.reference.strip())
    labels = {field: list(rows[column]) for field, column in groups.items() if column is not None}
    return Dataset.from_dict({"prompt": prompts, "answer": answers, **labels})


def _cannot_be_asked(name: str, number: int, reason: str) -> UserError:
    return UserError(f"data={name!r}: row {number} cannot be asked: {reason}. Fix or remove it in your copy.")


def _first(rows: Dataset, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in rows.column_names), None)


def _column(name: str, rows: Dataset, field: str) -> str:
    names = BENCHMARKS[name].fields[field]
    if (found := _first(rows, names)) is None:
        raise UserError(
            f"data={name!r} has no column {' or '.join(names)} for its {field}; its columns are "
            f"{sorted(rows.column_names)}. Rename the one that holds it."
        )
    return found


def _answer(answer: Any) -> Any:
    """The text of a list, which the verifier reads as its entries, or the final answer of a worked solution."""
    if isinstance(answer, list):
        return str([str(entry) for entry in answer])
    return final_answer(answer) if isinstance(answer, str) else answer


def _choices(question: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The lettered choices, in the order of a hash of question and choice, and the letter of the right one."""

    def place(choice: str) -> bytes:
        return hashlib.sha256(f"{question}\0{choice}".encode()).digest()

    texts = [str(choice).strip() for choice in (right, *wrong)]
    ordered = sorted(texts, key=place)
    listing = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, ordered, strict=True))
    return listing, LETTERS[ordered.index(texts[0])]
