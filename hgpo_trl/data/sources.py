"""Sources: files, folders and data sets on the hub, read in units that are small enough for any number of rows.

JSON lines are read by ranges of bytes, parquet by row groups, and both are opened in place (`hf://` for the hub), so
only the rows of one unit are in memory. A file that is one JSON list is read whole, a compressed file as one unit.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from hgpo_trl.common.errors import UserError, did_you_mean
from hgpo_trl.common.files import looks_like_path
from hgpo_trl.data.example import Drop

UNIT_BYTES = 16 * 2**20  # of JSON lines
UNIT_ROWS = 20_000  # of parquet; a larger row group is a unit of its own
_BATCH_ROWS = 500  # of parquet, decoded at a time
_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TYPES = (".jsonl", ".json", ".parquet")
_READ_ERRORS = (EOFError, OSError, ValueError, RecursionError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of a recipe's `sources`.

    Args:
        path: file, folder, or id on the hub.
        name: value of the data set's column `source`; default: `path`.
        adapter: id of the source whose schema the rows have; default: `path` if it has an adapter, else "generic".
        subset: configuration on the hub; default: the adapter's.
        split: default: the adapter's.
        files: glob of files within the folder or repository, in place of subset and split.
        licence: for the card; default: the adapter's.
        mode: "think" or "no_think"; generic adapter only, to refuse the other. Of a generated source: of its responses.
        domain: such as "maths"; generic adapter and generated sources only, the others have their own.
        fields: generic adapter only: our name -> column, or columns whose texts are joined.
        rows: most rows, drawn randomly after all filters, or domain -> most rows; a domain that is not named is left
            out. None: all. Of a generated source: how many rows are generated.
        config: generated sources only (`hgpo_trl.data.generators`): settings of the generator.
        seed: generated sources only: another seed asks other questions.
        reasoning, level: data sets of reasoning-gym only: field of the metadata, or function of the entry.
    """

    path: str
    name: str | None = None
    adapter: str | None = None
    subset: str | None = None
    split: str | None = None
    files: str | None = None
    licence: str | None = None
    mode: str | None = None
    domain: str | None = None
    fields: dict[str, str | list[str]] | None = None
    rows: NonNegativeInt | dict[str, NonNegativeInt] | None = None
    config: dict[str, Any] | None = None
    seed: int | None = None
    reasoning: str | None = None
    level: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.path

    def cap(self, domain: str) -> int | None:
        """Most rows of a domain; None where `rows` is one number for all domains together."""
        return self.rows.get(domain, 0) if isinstance(self.rows, dict) else None


def parse_entries(field: str, entries: Sequence[Any], kind: type) -> list[Any]:
    """Parse the entries of a recipe's list into instances of a dataclass with a `path` and a `label`.

    Raises:
        UserError: an entry is no mapping, has an unknown key, lacks `path`, or a value has the wrong type; or two
            entries have the same label.
    """
    names = [entry.name for entry in fields(kind)]
    parsed: list[Any] = []
    for index, entry in enumerate(entries):
        where = f"{field}[{index}]"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where}={entry!r} must be a mapping with the keys {', '.join(names)}.")
        for key in entry:
            if key not in names:
                hint = did_you_mean(str(key), names, f"; the keys are {', '.join(names)}.", cutoff=0.5)
                raise UserError(f"{where} has the unknown key {key!r}{hint}")
        if not entry.get("path"):
            raise UserError(f"{where}={dict(entry)!r} lacks `path`: a file, a folder, or an id on the hub.")
        try:
            parsed.append(TypeAdapter(kind).validate_python(dict(entry)))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"{where} ({entry['path']}): {problems}") from None
    labels = [entry.label for entry in parsed]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"{field}: {twice!r} is there twice. Give each its own `name`.")
    return parsed


# --- files and units ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source that one worker reads, from `start` to `stop`; `stop` is None for a file that is read whole.

    It counts bytes of JSON lines, row groups of parquet, or generated rows.
    """

    source: int  # place in the recipe
    path: str
    start: int = 0
    stop: int | None = None


def list_files(where: str, name: str, subset: str | None, split: str, pattern: str | None = None) -> list[str]:
    """List the files of a source in a fixed order: local paths or `hf://` addresses.

    Args:
        where: the field of the recipe, for messages.
        name: file, folder, or id on the hub.
        subset, split: of a folder or a data set on the hub, as `datasets` finds them.
        pattern: glob of files within the folder or repository, in place of subset and split.

    Raises:
        UserError: the source or the split does not exist, or a file is of a type that cannot be read.
    """
    path = Path(name)
    if path.is_file():
        found = [str(path)]
    elif not path.is_dir() and (looks_like_path(name) or _suffix(name) in _TYPES):
        raise UserError(f"{where}={name!r}: there is no such file or folder. Fix the path.")
    elif pattern is not None:
        base = str(path) if path.is_dir() else f"hf://datasets/{name}"
        with _explaining(where, name):
            fs, root = fsspec.core.url_to_fs(f"{base}/{pattern}")
            found = [cast(str, fs.unstrip_protocol(match)) if not path.is_dir() else match for match in fs.glob(root)]
        if not found:
            raise UserError(f"{where}={name!r}: no file there matches {pattern!r}.")
    else:
        from datasets import load_dataset_builder  # takes seconds to import, and workers do not need it

        with _explaining(where, name):
            data_files = load_dataset_builder(name, subset).config.data_files or {}
        if split not in data_files:
            raise UserError(f"{where}={name!r} has no split {split!r}; its splits are {sorted(map(str, data_files))}.")
        found = [str(file) for file in data_files[split]]
    for file in found:
        if _suffix(file) not in _TYPES:
            raise UserError(
                f"{where}={name!r}: {file} is not of a type that can be read: {', '.join(_TYPES)}, the first two "
                f"also compressed ({', '.join(_COMPRESSIONS)})."
            )
    return sorted(found)


@contextmanager
def _explaining(where: str, name: str) -> Iterator[None]:
    """Name the source in errors of a folder or of the hub (network, name, access, subset)."""
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub or httpx: they have no base in common
        found = "the folder" if Path(name).is_dir() else "there is no such file or folder, and the hub"
        raise UserError(
            f"{where}={name!r}: {found} cannot be read: {type(error).__name__}: {error}. Fix the path or the subset, "
            "or check the network and your access to the hub."
        ) from error


def _suffix(path: str) -> str:
    """The type of a file, without its compression."""
    suffixes = PurePosixPath(path).suffixes
    return next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSIONS), "")


def _compressed(path: str) -> bool:
    return PurePosixPath(path).suffix in _COMPRESSIONS


def split_into_units(source: int, path: str) -> list[Unit]:
    """Split a file into units of about `UNIT_BYTES` or `UNIT_ROWS`.

    Raises:
        UserError: a parquet file is broken.
    """
    if _suffix(path) == ".parquet":
        return _row_groups(source, path)
    if _compressed(path):
        return [Unit(source, path)]
    with _open(path) as file:
        if _is_list(file):
            return [Unit(source, path)]
        size = file.seek(0, io.SEEK_END)
    return [Unit(source, path, start, min(start + UNIT_BYTES, size)) for start in range(0, size, UNIT_BYTES)]


def _row_groups(source: int, path: str) -> list[Unit]:
    try:
        with _open(path) as file:
            metadata = pq.ParquetFile(file).metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except _READ_ERRORS as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None
    units, start, rows = [], 0, 0
    for group, size in enumerate(sizes):
        if rows and rows + size > UNIT_ROWS:
            units.append(Unit(source, path, start, group))
            start, rows = group, 0
        rows += size
    return [*units, Unit(source, path, start, len(sizes))] if sizes else []


def _open(path: str) -> IO[bytes]:
    """Open a local or remote file for reading, decompressed."""
    remote = "://" in path
    raw = io.BufferedReader(fsspec.open(path, "rb").open(), 2**20) if remote else Path(path).open("rb")  # noqa: SIM115
    return _COMPRESSIONS[PurePosixPath(path).suffix](raw) if _compressed(path) else raw


def _is_list(file: IO[bytes]) -> bool:
    """Whether a JSON file is one list, not lines. The position returns to the beginning."""
    begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return begin.startswith(b"[")


# --- rows -----------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def read_unit(unit: Unit, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    """Yield a unit's rows with their places, such as "data.jsonl:118233" (byte) or "data.parquet:0:17" (group, row).

    A faulty row gives a Drop: "invalid_json", "not_utf8", "not_an_object", "row_too_large". Blank lines are skipped.

    Args:
        max_row_bytes: longest row that is decoded.

    Raises:
        UserError: a JSON list, a compressed file or a row group is broken.
    """
    name = PurePosixPath(unit.path).name
    try:
        if _suffix(unit.path) == ".parquet":
            yield from _parquet_rows(unit, name, max_row_bytes)
            return
        with _open(unit.path) as file:
            if unit.stop is None and _is_list(file):
                yield from _list_rows(file, name, max_row_bytes)
            else:
                yield from _lines(file, unit, name, max_row_bytes)
    except _READ_ERRORS as error:
        raise UserError(f"{unit.path} cannot be read: {error}") from error


def _lines(file: IO[bytes], unit: Unit, name: str, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    if unit.start:  # the line that this byte is in the middle of belongs to the unit before
        file.seek(unit.start - 1)
        _skip_line(file)
    while (position := file.tell()) < (unit.stop or float("inf")):
        line = file.readline(max_row_bytes + 1)
        if not line:
            return
        place = f"{name}:{position}"
        if len(line) > max_row_bytes and not line.endswith(b"\n"):
            _skip_line(file)
            yield place, Drop("row_too_large", {"begins": line[:80].decode(errors="replace")})
        elif line.strip():
            yield place, _decode(line)


def _skip_line(file: IO[bytes]) -> None:
    while (part := file.readline(2**20)) and not part.endswith(b"\n"):
        pass


def _decode(line: bytes) -> Row | Drop:
    try:
        return _object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Drop("not_utf8", {"problem": str(error)})
    except (ValueError, RecursionError) as error:  # a ValueError is also a number of thousands of digits
        return Drop("invalid_json", {"problem": str(error)[:200], "begins": line[:80].decode(errors="replace")})


def _object(value: Any) -> Row | Drop:
    return value if isinstance(value, dict) else Drop("not_an_object", {"type": type(value).__name__})


def _list_rows(file: IO[bytes], name: str, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    for index, value in enumerate(json.loads(file.read().decode("utf-8-sig"))):
        too_large = characters(value) > max_row_bytes
        yield f"{name}:{index}", Drop("row_too_large") if too_large else _object(value)


def _parquet_rows(unit: Unit, name: str, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    with _open(unit.path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(unit.start, cast(int, unit.stop)):
            row = 0
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                may_exceed = batch.nbytes > max_row_bytes
                for value in batch.to_pylist():
                    too_large = may_exceed and characters(value) > max_row_bytes
                    yield f"{name}:{group}:{row}", Drop("row_too_large") if too_large else value
                    row += 1


def characters(value: Any) -> int:
    """Characters of text in a row, at any depth."""
    match value:
        case str():
            return len(value)
        case Mapping():
            return sum(map(characters, value.values()))
        case list():
            return sum(map(characters, value))
    return 8
