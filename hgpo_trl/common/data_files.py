"""Load data sets by the name that a recipe gives."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import looks_like_path

_FIRST_BLOCK = 10 * 2**20  # bytes of JSON lines by which `datasets` decides what a column holds

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_data(field: str, name: str, split: str = "train") -> Dataset:
    """Load a data set from a local file (parquet, JSON lines, JSON, CSV), a local folder of such files, or the hub.

    Args:
        field: the recipe's field that holds the name, for messages.
        name: path or hub id.
        split: split to take; a single local file has only "train".

    Raises:
        UserError: the name looks like a path and nothing is there, the file type is unknown, there are no rows, or
            rows cannot be read: the message names the first one of JSON lines that differs from those before it.
    """
    path = Path(name)
    if path.is_file() and path.suffix not in BUILDERS:
        raise UserError(f"{field}={name!r}: file type {path.suffix!r} is not one of {', '.join(BUILDERS)}.")
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split)
        if path.is_dir():
            return _load_folder(path, split)
    except (DatasetGenerationError, pa.ArrowException) as error:
        reason = _first_odd_row(_lines_of(path)) or " ".join(str(error.__cause__ or error).split())[:400]
        raise UserError(
            f"{field}={name!r} cannot be read: {reason}. All rows need the same columns, each of one kind throughout; "
            "mend the file, or build the data with `hgpo-trl data`, which leaves such rows out."
        ) from error
    except (StopIteration, ValueError) as error:  # raised by datasets if there are no rows
        if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
            raise
        raise UserError(f"{field}={name!r} has no rows. Give it at least one.") from None
    if path.suffix in BUILDERS or looks_like_path(name):
        raise UserError(
            f"{field}={name!r}: there is no such file or folder. Build it with `hgpo-trl data`, or fix the path."
        )
    return load_dataset(name, split=split)


def _load_folder(path: Path, split: str) -> Dataset:
    """Load a split of a folder, from the files that its README.md, if it has one, names for it.

    `load_dataset(folder)` caches by the folder's name and README configuration, and so confuses two folders of one
    name; named files are cached by path and time.
    """
    data_files = load_dataset_builder(str(path)).config.data_files or {}
    files = [str(file) for file in data_files.get(split, [])]
    if not files or Path(files[0]).suffix not in BUILDERS:
        return load_dataset(str(path), split=split)  # raises a clear error, or knows the file type
    return load_dataset(BUILDERS[Path(files[0]).suffix], data_files=files, split="train")


def _lines_of(path: Path) -> list[Path]:
    """The files of JSON lines at a path."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in files if file.suffix in (".jsonl", ".json")]


def _first_odd_row(files: Sequence[Path]) -> str | None:
    """The first row of JSON lines that is broken, or has a column or a kind of value that the first block lacks."""
    for file in files:
        kinds: dict[str, tuple[str, int]] = {}
        position = row = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    found = dict(_kinds(json.loads(line))) if line.strip() else {}
                except ValueError as error:
                    return f"row {row} of {file} is not JSON: {error}"
                for place, kind in found.items() if position >= _FIRST_BLOCK else ():
                    before, first = kinds.get(place, ("missing", 0))
                    if before != kind and place.rpartition(".")[0].removesuffix("[]") in ("", *kinds):
                        return f"`{place}` is {kind} in row {row} of {file}, and {before} in row {first}"
                kinds |= {place: (kind, row) for place, kind in found.items() if place not in kinds}
                position += len(line)
                row += bool(line.strip())
    return None


_NAMES = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _kinds(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place of every value that is not null, such as `prompt[].content`, and its kind."""
    if value is None:
        return
    if place:
        yield place, _NAMES[type(value)]
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{place}[]")
