"""Paths and files: expand the paths of a recipe, and write a whole file or none."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hgpo_trl.common.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id has at most one slash and does not begin with one, a dot or a ~."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def expand_path(field: str, text: str) -> str:
    """Expand a path as a shell does: `~` at its beginning, or behind NAME=, and `$NAME` or `${NAME}` replaced.

    Other text is returned unchanged: a variable is replaced only in text without blanks that has a slash or is the
    variable alone.

    Args:
        field: the setting that holds the text, for the message.

    Raises:
        UserError: the path names a variable that is not set.
    """
    name, equals, path = ("", "", text) if text.startswith("~") else text.partition("=")
    if path.startswith("~"):
        text = f"{name}{equals}{os.path.expanduser(path)}"  # noqa: PTH111 (a Path would change other text)
    if re.search(r"\s", text) or not ("/" in text or _VARIABLE.fullmatch(text)):
        return text

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in os.environ:
            raise UserError(
                f"{field}={text!r}: the environment variable {variable} is not set. Set it, or write it out."
            )
        return os.environ[variable]

    return _VARIABLE.sub(value, text)


def expand_paths(field: str, value: Any) -> Any:
    """`expand_path` of every text in nested lists and mappings."""
    match value:
        case str():
            return expand_path(field, value)
        case list():
            return [expand_paths(field, item) for item in value]
        case dict():
            return {key: expand_paths(field, item) for key, item in value.items()}
    return value


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless they are there.

    Raises:
        UserError: a file stands in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (path, *path.parents) if part.exists())
        raise UserError(
            f"{str(path)!r} cannot be a folder, since {str(file)!r} is a file. Move it, or name another output_dir."
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if all goes well: a reader never sees half a file.

    The folder is made if it is missing.

    Raises:
        UserError: see `make_folder`.
    """
    make_folder(path.parent)
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
    """Replace NaN in mappings and lists by None, which JSON can hold."""
    match value:
        case Mapping():
            return {key: nan_to_null(item) for key, item in value.items()}
        case list() | tuple():
            return [nan_to_null(item) for item in value]
        case float() if math.isnan(value):
            return None
    return value
