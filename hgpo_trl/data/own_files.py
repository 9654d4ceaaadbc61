"""An adapter for a user's own files, from a mapping of our names to their columns."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.adapter import Adapter
from hgpo_trl.data.conversations import history, last_answer, messages_of, with_system
from hgpo_trl.data.rows import Fault, Parts, Row, items_of, optional_text, text_of, user_message
from hgpo_trl.data.traces import has_trace, thought, unopened
from hgpo_trl.modes import TAGS, TRACE_FIELDS, Mode

FIELDS = ("prompt", "messages", "system", "reasoning", "answer", "response", "reference", "level", "id", "domain")
_JOINED = ("prompt", "system", "reasoning", "answer", "response")  # may be joined from several columns

Fields = Mapping[str, str | Sequence[str]]


def columns_of(fields: Fields | None) -> list[str]:
    """The columns that `fields` read."""
    return [column for columns in (fields or {}).values() for column in _listed(columns)]


def _listed(columns: str | Sequence[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def generic(
    fields: Fields, mode: Mode | str | None = None, domain: str = "general", opened_in_prompt: bool = False
) -> Adapter:
    """An adapter for files of any schema.

    A response is given as `reasoning` and `answer` (think), as `answer` alone (no think), as `response` (with the marks
    of a trace: think, or within <no_think> tags: no think), or as the last message of `messages` (marks as before, or a
    trace in a field of the message; an answer without any is no think). An empty trace is no think. Without a response
    the examples are prompts; so is a conversation that ends with the user, unless `mode` asks for responses: then what
    follows the last answer is left out.

    Args:
        fields: our names to the file's columns: `prompt` or `messages`; `reasoning` and `answer`, or `response`;
            `reference`, `level`, `id` (else a hash of the content), `domain`, `system`. Several columns of a text are
            joined by a blank line, those that are empty left out: {"prompt": ["instruction", "input"]}.
        mode: the only mode of the file's responses; others are dropped as "wrong_mode". None: both.
        domain: of rows that do not give it.
        opened_in_prompt: the prompt opened the trace, so responses only end it. `mode` think implies it.

    Raises:
        UserError: a name is unknown, two exclude each other, one needs another, none gives the prompt, one cannot have
            several columns, or they cannot give the mode.
    """
    if unknown := [name for name in fields if name not in FIELDS]:
        raise UserError(f"fields: unknown name {unknown[0]!r}; the names are {', '.join(FIELDS)}.")
    if several := [name for name, columns in fields.items() if not isinstance(columns, str) and name not in _JOINED]:
        raise UserError(f"fields: {several[0]} must be one column; got {fields[several[0]]!r}.")
    if empty := [name for name, columns in fields.items() if not columns]:
        raise UserError(f"fields: {empty[0]} names no column; name one, or leave it out.")
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError(f"fields={dict(fields)!r} must have either prompt or messages.")
    if "response" in fields and ("answer" in fields or "reasoning" in fields):
        raise UserError(f"fields={dict(fields)!r}: give either response, or answer and perhaps reasoning.")
    if "reasoning" in fields and "answer" not in fields:
        raise UserError(f"fields={dict(fields)!r}: reasoning needs answer.")
    wanted = None if mode is None else _wanted(fields, mode)
    opened = opened_in_prompt or wanted is Mode.THINK
    read = partial(_generic, {name: _listed(columns) for name, columns in fields.items()}, wanted, opened)
    return Adapter("generic", "not stated", "hft", domain, wanted, read)


def _wanted(fields: Fields, mode: Mode | str) -> Mode:
    """A source's only mode; UserError if its fields cannot give it."""
    if mode not in list(Mode):
        raise UserError(f"mode must be {' or '.join(Mode)}, or left out; got {mode!r}.")
    wanted, needed = Mode(mode), "answer and reasoning" if mode == Mode.THINK else "answer without reasoning"
    separate = wanted is (Mode.THINK if "reasoning" in fields else Mode.NO_THINK) and "answer" in fields
    if not (separate or "response" in fields or "messages" in fields):
        raise UserError(f"fields={dict(fields)!r}: mode {wanted} needs {needed}, or response, or messages.")
    return wanted


def _generic(fields: dict[str, list[str]], wanted: Mode | None, opened: bool, row: Row) -> Parts:
    response: str | None = None
    system = _joined(row, fields["system"]) if "system" in fields else None
    if "messages" in fields:
        messages = with_system(messages_of(row, fields["messages"][0]), system)
        messages = [message | {"content": _opened(message, opened)} for message in messages]
        if wanted is None and messages[-1]["role"] == "user":
            prompt = history(messages)
        else:
            prompt, response = last_answer(messages)
    else:
        prompt = with_system(user_message(_required(row, fields["prompt"])), system)
    parts: Parts = {"mode": None}
    if "reasoning" in fields:
        texts = [_required(row, fields[name]).strip() for name in ("reasoning", "answer")]
        parts = {"mode": Mode.THINK, "reasoning": texts[0], "answer": texts[1]}
    elif "answer" in fields:
        parts = {"mode": Mode.NO_THINK, "answer": _required(row, fields["answer"]).strip()}
    elif "response" in fields:
        text = _required(row, fields["response"])
        parts = _tagged(_opened({"role": "assistant", "content": text}, opened))
    elif response is not None:
        tagged = has_trace(response) or any(tag in response for tag in TAGS)
        parts = _tagged(response) if tagged else {"mode": Mode.NO_THINK, "answer": response.strip()}
    for name in ("reference", "level", "domain", "id"):
        if name in fields and (value := optional_text(row, fields[name][0])) is not None:
            parts[name] = value
    parts["prompt"] = prompt
    return parts


def _joined(row: Row, columns: Sequence[str]) -> str | None:
    """The text of several columns, without the empty ones; None where all are."""
    return "\n\n".join(text for column in columns if (text := optional_text(row, column)) is not None) or None


def _required(row: Row, columns: Sequence[str]) -> str:
    """As `_joined`, but the text is required."""
    text = _joined(row, columns)
    return text_of(row, *columns) if text is None else text  # raises, with the missing column


def _opened(message: dict[str, str], opened: bool) -> str:
    """An assistant's text; a trace that it only ends is opened, if `opened` says that the prompt did so."""
    text = message["content"]
    if message["role"] != "assistant" or (convention := unopened(text)) is None:
        return text
    if not opened:
        hint = "set mode: think for this source, if its prompts open the trace"
        raise Fault("unopened_trace", mark=convention.close, begins=text[:80], hint=hint)
    return f"{convention.open}{text}"


def _tagged(response: str) -> Parts:
    """A response that names its mode by its tags."""
    text, (opened, closed) = response.strip(), (Mode.NO_THINK.open_tag, Mode.NO_THINK.close_tag)
    if not text.startswith(opened):
        return thought(text)
    if not text.endswith(closed):
        raise Fault("unbalanced_tags", counts={mark: text.count(mark) for mark in (opened, closed)})
    return {"mode": Mode.NO_THINK, "answer": text[len(opened) : -len(closed)].strip()}


def unread(fields: Fields, rows: Sequence[Row]) -> list[str]:
    """Columns of these rows, and fields of their messages, that look like content and are not read.

    Content is text of several words, or a list or an object that is not empty.
    """
    known, messages = set(columns_of(fields)), _listed(fields.get("messages", ()))
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(name for name, value in row.items() if name not in known and _is_content(value))
        for column in messages:
            for message in (m for m in items_of(row.get(column)) if isinstance(m, Mapping)):
                others = (name for name in message if name not in _MESSAGE_FIELDS and _is_content(message[name]))
                found |= dict.fromkeys(f"{column}[].{name}" for name in others)
    return list(found)


_MESSAGE_FIELDS = ("role", "content", "from", "value", *TRACE_FIELDS)


def _is_content(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.split()) > 2
    return isinstance(value, (list, tuple, Mapping)) and len(value) > 0
