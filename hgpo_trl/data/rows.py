"""Read columns of a source's row; a value that cannot be used raises `Fault`, with the reason."""

from collections.abc import Mapping
from typing import Any, TypedDict

from hgpo_trl.data.example import Drop
from hgpo_trl.modes import Mode

Row = Mapping[str, Any]
Messages = list[dict[str, str]]


class Parts(TypedDict, total=False):
    """Fields of an example that a row gives; the adapter gives the rest."""

    prompt: Messages
    mode: Mode | None
    reasoning: str
    answer: str
    reference: str | None
    level: str | None
    id: str
    domain: str
    reasoning_gym: str | None
    generated: bool


class Fault(Exception):  # noqa: N818 (`adapt` catches it)
    """What an adapter's function raises for a row that it cannot read; it becomes a `Drop` with the same reason."""

    def __init__(self, reason: str, **detail: Any) -> None:
        super().__init__(reason)
        self.drop = Drop(reason, detail)


def brief(value: Any) -> str:
    """A value of any kind, for a fault's detail: it may be long, nested without end or not a number."""
    return str(value)[:80] if isinstance(value, (str, int, float)) else type(value).__name__


def optional_text(row: Row, *names: str) -> str | None:
    """The first of the columns that is neither absent, null nor blank, as text; None if there is none."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value == value:  # NaN is a table's null
                return str(value)
            continue
        if isinstance(value, str) and value.strip():
            return value
        if value is not None and not isinstance(value, str):
            raise Fault("not_text", field=name, type=type(value).__name__)
    return None


def text_of(row: Row, *names: str) -> str:
    """As `optional_text`, but the value is required."""
    if (value := optional_text(row, *names)) is not None:
        return value
    present = [name for name in names if row.get(name) is not None]
    raise Fault("empty_field" if present else "missing_field", field=" or ".join(present or names))


def items_of(value: Any) -> list[Any]:
    """A list column's items; none where it holds no list."""
    return list(value) if isinstance(value, (list, tuple)) else []


def user_message(text: str) -> Messages:
    return [{"role": "user", "content": text}]
