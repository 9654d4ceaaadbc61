"""An adapter reads the rows of a source, in its own schema, and gives examples.

A faulty row gives a `Drop` with the reason, never an exception.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.rows import Fault, Parts, Row
from hgpo_trl.modes import TAGS, Mode, trace_mark


class Generator(Protocol):
    """The rows of a source that a program generates, by index. Picklable."""

    def __call__(self, index: int) -> dict[str, Any]:
        """Generate one row: prompt and answer, and where there are any reasoning, level, domain."""
        ...

    @property
    def domain(self) -> str:
        """Of rows that do not give it."""
        ...

    @property
    def licence(self) -> str:
        """Of the rows."""
        ...

    @property
    def version(self) -> str:
        """Changes when the code that generates the rows does."""
        ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """A source and the function that reads its rows. Picklable.

    Args:
        name: id on the hub, or "generic".
        licence: of the data set, from its card.
        stage: "hft" (responses) or "hgpo" (prompts).
        domain: of its examples, unless a row gives it.
        mode: of its responses; None for prompts alone, or if a row gives it.
        read: returns a row's parts.
        subset: configuration on the hub to take by default.
        split: split to take by default.
        files: glob of the files to read in place of the subset's, if those cannot be read row by row.
        note: advice to its users.
        generator: of a source whose rows are generated; None: they are read from files.
    """

    name: str
    licence: str
    stage: str
    domain: str
    mode: Mode | None
    read: Callable[[Row], Parts]
    subset: str = "default"
    split: str = "train"
    files: str | None = None
    note: str = ""
    generator: Generator | None = None


def adapt(adapter: Adapter, row: Row, source: str) -> Example | Drop:
    """Convert a row to an example, or to a `Drop` with the reason.

    Reasons: "missing_field" (absent or null), "empty_field", "not_text", "null_messages", "unknown_role",
    "roles_out_of_order", "two_systems" (a system message and a system column that differ), "two_traces" (one in the
    content, another in a field), "no_prompt", "no_answer", "unknown_format" (a response without the marks of a trace),
    "unbalanced_tags", "unopened_trace" (a trace that ends and never begins), "tag_in_text" (one of the four mode tags
    inside a part), "trace_in_no_think" (a trace in other marks), "invalid_unicode", "wrong_mode" and a source's own
    flags: "toxic", "redacted", "not_verified", "truncated".

    Args:
        adapter: reads the row.
        row: as in the file.
        source: name of the source in the recipe.
    """
    try:
        parts = adapter.read(row)
        fields: dict[str, Any] = {"source": source, "domain": adapter.domain, "mode": adapter.mode, "id": "", **parts}
        example = Example(**fields)
        if adapter.mode is not None and example.mode is not adapter.mode:
            raise Fault("wrong_mode", mode=example.mode)
        _check_text(example)
    except Fault as fault:
        return fault.drop
    example.id = example.id or _hash(example)
    return example


def _check_text(example: Example) -> None:
    """Refuse mode tags inside a part, which would be decisions in the wrong place, and text that UTF-8 cannot hold."""
    prompt = "\n".join(message["content"] for message in example.prompt)
    for name, text in (("prompt", prompt), ("reasoning", example.reasoning), ("answer", example.answer)):
        if tag := next((tag for tag in TAGS if tag in text), None):
            raise Fault("tag_in_text", part=name, tag=tag)
    if example.mode is Mode.NO_THINK and (mark := trace_mark(example.answer)):
        raise Fault("trace_in_no_think", mark=mark)
    labels = (example.reference or "", example.level or "", example.domain, example.id)
    for text in (prompt, example.reasoning, example.answer, *labels):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Fault("invalid_unicode", character=ascii(error.object[error.start])) from None
    if not prompt.strip():
        raise Fault("no_prompt")
    if example.mode is not None and not example.answer:
        raise Fault("no_answer")


def _hash(example: Example) -> str:
    """An id from the content: the same in every build."""
    content = [example.prompt, example.mode, example.reasoning, example.answer, example.reference]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
