"""Paths and files: what a name in a recipe stands for, and writing that leaves a whole file or none."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id has at most one slash and does not begin with one, a dot or a ~."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if all goes well: a reader never sees half a file.

    The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys sorted: the same content gives the same bytes.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have (`nan_to_null`).
    """
    write_atomically(path, f"{json.dumps(content, indent=2, sort_keys=True, allow_nan=False)}\n".encode())


def nan_to_null(value: Any) -> Any:
    """The same mappings and lists with None, which JSON can hold, for NaN."""
    match value:
        case Mapping():
            return {key: nan_to_null(item) for key, item in value.items()}
        case list() | tuple():
            return [nan_to_null(item) for item in value]
        case float() if math.isnan(value):
            return None
    return value
