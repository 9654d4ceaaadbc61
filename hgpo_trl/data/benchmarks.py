"""The benchmarks that a recipe's `decontamination` names: their files and questions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.sources import list_files, parse_entries, read_unit, split_into_units

_MAX_ROW_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry of `decontamination`.

    Args:
        path: file, folder, or id on the hub.
        field: its column of questions: texts, or prompts of a data set that is built already.
        name: in the report; default: `path`.
        subset, split: of a folder or on the hub.
        files: glob of files there, in place of both.
        match: "ngrams", or "exact" for templated questions, which differ from one another in a word or a number.
    """

    path: str
    field: str = "problem"
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    files: str | None = None
    match: Literal["ngrams", "exact"] = "ngrams"

    @property
    def label(self) -> str:
        return self.name or self.path


def find_benchmarks(entries: Sequence[Any]) -> list[tuple[Benchmark, list[str]]]:
    """Parse the entries of `decontamination`, and list the files of each.

    Raises:
        UserError: an entry is malformed, two have the same name, or there are no such files.
    """
    return [
        (benchmark, list_files(_named(index), benchmark.path, benchmark.subset, benchmark.split, benchmark.files))
        for index, benchmark in enumerate(parse_entries("decontamination", entries, Benchmark))
    ]


def questions_by_name(benchmarks: Sequence[tuple[Benchmark, list[str]]]) -> dict[str, list[str]]:
    """Read the questions of each benchmark of `find_benchmarks`.

    Raises:
        UserError: a file is broken, or a row has no question.
    """
    return {
        benchmark.label: list(_questions(benchmark, files, _named(index)))
        for index, (benchmark, files) in enumerate(benchmarks)
    }


def _named(index: int) -> str:
    return f"decontamination[{index}]"


def _questions(benchmark: Benchmark, files: list[str], where: str) -> Iterator[str]:
    for file in files:
        for unit in split_into_units(0, file):
            for place, row in read_unit(unit, _MAX_ROW_BYTES):
                question = _question(row.get(benchmark.field)) if isinstance(row, dict) else None
                if question is None:
                    columns = sorted(row) if isinstance(row, dict) else row.reason
                    raise UserError(
                        f"{where} ({benchmark.path}): row {place} has no text in {benchmark.field!r}; there is "
                        f"{columns}. Set `field` to its column of questions."
                    )
                yield question


def _question(value: Any) -> str | None:
    """A text, or the last message of a prompt that is a conversation; None for anything else."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None
