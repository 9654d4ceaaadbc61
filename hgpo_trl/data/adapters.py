"""Adapters: convert a source's rows, in its own schema, to examples.

One adapter per source of the paper (section 2, Stage I and II), by its id on the hub, and `generic` for a user's own
files. A faulty row gives a `Drop` with the reason, never an exception.
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypedDict

import xxhash

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.modes import TAGS, TRACE_FIELDS, Mode, trace_mark

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
            raise _Fault("wrong_mode", mode=example.mode)
        _check_text(example)
    except _Fault as fault:
        return fault.drop
    example.id = example.id or _hash(example)
    return example


# --- traces ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Convention:
    """Marks of a trace in responses: `open` trace `close` answer, the answer perhaps within marks of its own."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""


CONVENTIONS = (
    Convention("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),
    Convention("<think>", "</think>"),
)


def has_trace(text: str) -> bool:
    """Whether any mark of a trace occurs in a response."""
    return any(mark in text for convention in CONVENTIONS for mark in (convention.open, convention.close))


def unopened(text: str) -> Convention | None:
    """The convention of a response that ends a trace without opening it, because the prompt did."""
    ended = (convention for convention in CONVENTIONS if convention.close in text)
    return next((convention for convention in ended if convention.open not in text), None)


def _split(text: str) -> tuple[str, str]:
    """Reasoning and answer of a response that marks its trace in one of `CONVENTIONS`, stripped.

    The response must begin with the trace, and each mark must occur exactly once and in order.
    """
    for convention in CONVENTIONS:
        marks = {mark: text.count(mark) for mark in (convention.open, convention.close)}
        if not any(marks.values()):
            continue
        before, opened, rest = text.partition(convention.open)
        reasoning, closed, answer = rest.partition(convention.close)
        if set(marks.values()) != {1} or before.strip() or not (opened and closed):
            raise _Fault("unbalanced_tags", counts=marks)
        return reasoning.strip(), _unwrap(answer, convention)
    raise _Fault("unknown_format", begins=text[:80])


def _unwrap(answer: str, convention: Convention) -> str:
    """The answer without the marks around it, if it has those of the convention."""
    marks = [mark for mark in (convention.answer_open, convention.answer_close) if mark]
    counts = {mark: answer.count(mark) for mark in marks}
    if not any(counts.values()):
        return answer.strip()
    before, _, inside = answer.partition(convention.answer_open)
    inside, _, after = inside.partition(convention.answer_close)
    if set(counts.values()) != {1} or before.strip() or after.strip():
        raise _Fault("unbalanced_tags", counts=counts)
    return inside.strip()


# --- faults and fields ----------------------------------------------------------------------------------------


class _Fault(Exception):  # noqa: N818 (never leaves the module)
    def __init__(self, reason: str, **detail: Any) -> None:
        super().__init__(reason)
        self.drop = Drop(reason, detail)


def _brief(value: Any) -> str:
    """A value of any kind, for a fault's detail: it may be long, nested without end or not a number."""
    return str(value)[:80] if isinstance(value, (str, int, float)) else type(value).__name__


def _optional(row: Row, *names: str) -> str | None:
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
            raise _Fault("not_text", field=name, type=type(value).__name__)
    return None


def _text(row: Row, *names: str) -> str:
    """As `_optional`, but the value is required."""
    if (value := _optional(row, *names)) is not None:
        return value
    present = [name for name in names if row.get(name) is not None]
    raise _Fault("empty_field" if present else "missing_field", field=" or ".join(present or names))


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _check_text(example: Example) -> None:
    """Refuse mode tags inside a part, which would be decisions in the wrong place, and text that UTF-8 cannot hold."""
    prompt = "\n".join(message["content"] for message in example.prompt)
    for name, text in (("prompt", prompt), ("reasoning", example.reasoning), ("answer", example.answer)):
        if tag := next((tag for tag in TAGS if tag in text), None):
            raise _Fault("tag_in_text", part=name, tag=tag)
    if example.mode is Mode.NO_THINK and (mark := trace_mark(example.answer)):
        raise _Fault("trace_in_no_think", mark=mark)
    labels = (example.reference or "", example.level or "", example.domain, example.id)
    for text in (prompt, example.reasoning, example.answer, *labels):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Fault("invalid_unicode", character=ascii(error.object[error.start])) from None
    if not prompt.strip():
        raise _Fault("no_prompt")
    if example.mode is not None and not example.answer:
        raise _Fault("no_answer")


def _hash(example: Example) -> str:
    """An id from the content: the same in every build."""
    content = [example.prompt, example.mode, example.reasoning, example.answer, example.reference]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- conversations --------------------------------------------------------------------------------------------

_ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLES["system"] = "system"


def _messages(row: Row, name: str) -> Messages:
    """A conversation of {role, content} or {from, value} messages with the roles system, user and assistant.

    Content in parts of text is joined. A trace in a field of its own goes before the content, in marks.
    """
    if name not in row:
        raise _Fault("missing_field", field=name)
    value = row[name]
    if not isinstance(value, (list, tuple)) or not value:
        raise _Fault("null_messages", field=name)
    messages: Messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise _Fault("null_messages", field=name, message=len(messages))
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _Fault("unknown_role", role=_brief(role))
        text, trace = _content(content), _trace(message) if _ROLES[role] == "assistant" else ""
        if not text.strip():
            raise _Fault("null_messages", field=name, message=len(messages))
        if message.get("tool_calls"):
            raise _Fault("not_text", field="tool_calls")
        messages.append({"role": _ROLES[role], "content": _with_trace(text, trace)})
    return messages


def _content(content: Any) -> str:
    """A message's text; parts are joined as by a chat template."""
    if not isinstance(content, (list, tuple)):
        return content if isinstance(content, str) else ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _Fault("not_text", field="content", type=_brief(kind))
    return "".join(part["text"] for part in content)


def _trace(message: Mapping[str, Any]) -> str:
    """The trace in a field of an assistant's message; empty where there is none."""
    found = {value.strip() for field in TRACE_FIELDS if isinstance(value := message.get(field), str)} - {""}
    if len(found) > 1:
        raise _Fault("two_traces", fields=[field for field in TRACE_FIELDS if message.get(field)])
    return found.pop() if found else ""


def _with_trace(text: str, trace: str) -> str:
    if not trace:
        return text
    if has_trace(text):
        if _split(text)[0] != trace:
            raise _Fault("two_traces", begins=trace[:80])
        return text
    if text.strip().startswith(Mode.NO_THINK.open_tag):
        raise _Fault("two_traces", begins=trace[:80])
    return f"{Mode.THINK.open_tag}\n{trace}\n{Mode.THINK.close_tag}\n\n{text}"


def _last_answer(messages: Messages) -> tuple[Messages, str]:
    """The turns up to the last answer to a user's message, and that answer; traces in earlier answers are left out."""
    last = next((i for i in range(len(messages) - 1, 0, -1) if _answers(messages, i)), None)
    if last is None:
        raise _Fault("no_answer")
    return _history(messages[:last]), messages[last]["content"]


def _answers(messages: Messages, index: int) -> bool:
    return messages[index]["role"] == "assistant" and messages[index - 1]["role"] == "user"


def _history(messages: Messages) -> Messages:
    """A prompt: perhaps a system message, then user and assistant in turn, the user last; answers without traces."""
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise _Fault("roles_out_of_order", roles=turns[:20])
    return [
        message | {"content": _split(message["content"])[1]}
        if message["role"] == "assistant" and has_trace(message["content"])
        else message
        for message in messages
    ]


def _thought(text: str) -> Parts:
    """A response with a trace; one whose trace is empty, as Qwen3 answers at once, is a no-think example."""
    reasoning, answer = _split(text)
    return {"mode": Mode.THINK if reasoning else Mode.NO_THINK, "reasoning": reasoning, "answer": answer}


# --- Stage I, no think ----------------------------------------------------------------------------------------


def _wildchat(row: Row) -> Parts:
    """The first question and its answer."""
    for flag in ("toxic", "redacted"):
        if row.get(flag):
            raise _Fault(flag)
    messages = _messages(row, "conversation")
    first = 1 if messages[0]["role"] == "system" else 0
    prompt, answer = _last_answer(messages[: first + 2])
    return {"prompt": prompt, "answer": answer.strip(), "id": _optional(row, "conversation_hash") or ""}


def _oasst(row: Row) -> Parts:
    """A tree of messages: from its root along the best reply of each message, up to the last answer."""
    node = row.get("prompt")
    if not isinstance(node, Mapping):
        raise _Fault("missing_field", field="prompt", hint="a tree of messages: read a file *.trees.jsonl.gz")
    path: list[Mapping[str, Any]] = []
    while node is not None:
        path.append(node)
        replies = [reply for reply in _items(node.get("replies")) if isinstance(reply, Mapping)]
        kept = [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
        node = min(kept, key=_rank, default=None)
    messages = [{"role": message.get("role"), "content": message.get("text")} for message in path]
    prompt, answer = _last_answer(_messages({"tree": messages}, "tree"))
    return {"prompt": prompt, "answer": answer.strip(), "id": _optional(row, "message_tree_id") or ""}


def _rank(reply: Mapping[str, Any]) -> float:
    """0 is the one that people liked best; the unranked come last, in the file's order."""
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) and rank == rank else float("inf")


# --- Stage I, think -------------------------------------------------------------------------------------------

_TASK_DOMAINS = {"verifiable_math": "maths", "verifiable_code": "code", "code_output_prediction": "code"}
_DOMAINS = {"math": "maths", "maths": "maths", "code": "code"}


def _synthetic(row: Row) -> Parts:
    """A verified response to a task; of the raw data set, or of its edition for fine-tuning, which has messages."""
    score = row.get("score")
    if not isinstance(score, (int, float)) or not score >= 1:
        raise _Fault("not_verified", score=_brief(score))
    if "messages" in row:
        prompt, response = _last_answer(_messages(row, "messages"))
    else:
        prompt, response = _user(_text(row, "prompt")), _text(row, "llm_response")
    domain = _TASK_DOMAINS.get(_text(row, "task_type"), "other")
    reference = _ground_truth(row.get("verification_info")) if domain == "maths" else None
    identity: Parts = {"id": _optional(row, "response_id") or "", "domain": domain, "reference": reference}
    return {"prompt": prompt, **_thought(response), **identity}


def _ground_truth(info: Any) -> str | None:
    """The reference answer in SYNTHETIC-1's verification_info: a mapping, or one written as JSON or in Python."""
    if isinstance(info, str):
        for read in (json.loads, ast.literal_eval):
            try:
                info = read(info)
                break
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval may raise
                continue
    return _optional(info, "ground_truth") if isinstance(info, Mapping) else None


def _openr1(row: Row) -> Parts:
    """The first generation that is complete and was verified; without generations, the conversation."""
    prompt, identity = _user(_text(row, "problem")), _optional(row, "uuid") or ""
    if row.get("generations") is None:
        _, response = _last_answer(_messages(row, "messages"))
    else:
        response = _first_verified(row)
    return {"prompt": prompt, **_thought(response), "reference": _optional(row, "answer"), "id": identity}


def _first_verified(row: Row) -> str:
    generations = _items(row["generations"])
    verdicts = [row.get("correctness_math_verify"), row.get("correctness_llama")]
    for i, generation in enumerate(generations):
        finished = (
            _at(row.get("is_reasoning_complete"), i) is not False and _at(row.get("finish_reasons"), i) != "length"
        )
        if finished and any(_at(verdict, i) is True for verdict in verdicts):
            if not isinstance(generation, str):
                raise _Fault("not_text", field="generations", type=type(generation).__name__)
            return generation
    raise _Fault("not_verified", generations=len(generations))


def _items(value: Any) -> list[Any]:
    """A list column's items; none where it holds no list."""
    return list(value) if isinstance(value, (list, tuple)) else []


def _at(values: Any, index: int) -> Any:
    items = _items(values)
    return items[index] if index < len(items) else None


def _openthoughts(row: Row) -> Parts:
    """Columns of the subset "metadata", else the conversation of "default", whose system prompt asks for its marks."""
    if "deepseek_reasoning" not in row:
        messages = [message for message in _messages(row, "conversations") if message["role"] != "system"]
        prompt, response = _last_answer(messages)
        return {"prompt": prompt, **_thought(response)}
    problem, code = _text(row, "problem"), _optional(row, "starter_code")
    return {
        "prompt": _user(f"{problem}\n\n{code}" if code else problem),
        "reasoning": _text(row, "deepseek_reasoning").strip(),
        "answer": _text(row, "deepseek_solution").strip(),
        "domain": _DOMAINS.get(_optional(row, "domain") or "", "other"),
    }


def _codeforces_cots(row: Row) -> Parts:
    if row.get("finish_reason") == "length":
        raise _Fault("truncated", finish_reason="length")
    generation = _text(row, "generation")
    problem = _optional(row, "id") or ""  # the same for up to five generations
    return {
        "prompt": _user(_text(row, "prompt")),
        **_thought(generation),
        "id": f"{problem}-{xxhash.xxh3_64_hexdigest(generation.encode(errors='surrogatepass'))}",
    }


def _kodcode_r1(row: Row) -> Parts:
    prompt, response = _last_answer(_messages(row, "conversations"))
    return {
        "prompt": prompt,
        **_thought(response),
        "level": _optional(row, "gpt_difficulty"),
        "id": _optional(row, "question_id", "conversation_id") or "",
    }


# --- prompts --------------------------------------------------------------------------------------------------


def _aops(row: Row) -> Parts:
    return {
        "prompt": _user(_text(row, "problem", "question", "Question")),
        "reference": _optional(row, "answer", "Answer"),
        "id": _optional(row, "link", "id") or "",
    }


def _aime(row: Row) -> Parts:
    return {
        "prompt": _user(_text(row, "Question", "problem")),
        "reference": _text(row, "Answer", "answer"),
        "level": _optional(row, "Problem Number"),
        "id": _optional(row, "ID") or "",
    }


def _codeforces(row: Row) -> Parts:
    """The prompt of the subsets that have one, else the statement."""
    prompt = _optional(row, "prompt") or _statement(row)
    return {"prompt": _user(prompt), "level": _optional(row, "rating"), "id": _optional(row, "id") or ""}


def _statement(row: Row) -> str:
    parts = [_text(row, "description")]
    for title, name in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if text := _optional(row, name):
            parts.append(f"{title}\n{text}")
    for example in _items(row.get("examples")):
        if isinstance(example, Mapping):
            parts.append(f"Example\n{example.get('input', '')}\n{example.get('output', '')}")
    return "\n\n".join(parts)


def _kodcode(row: Row) -> Parts:
    return {
        "prompt": _user(_text(row, "question")),
        "level": _optional(row, "gpt_difficulty"),
        "id": _optional(row, "question_id") or "",
    }


def _deepscaler(row: Row) -> Parts:
    return {"prompt": _user(_text(row, "problem")), "reference": _text(row, "answer")}


def _preference(row: Row) -> Parts:
    """The prompt of the preferred conversation."""
    prompt, _ = _last_answer(_messages(row, "chosen"))
    return {"prompt": prompt, "id": _optional(row, "id") or ""}


_NO_TRACES = "Prompts alone: the paper's responses were generated with DeepSeek-R1. Give your own as a local file."

ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("allenai/WildChat-1M", "odc-by", "hft", "general", Mode.NO_THINK, _wildchat),
        Adapter(
            "OpenAssistant/oasst1",
            "apache-2.0",
            "hft",
            "general",
            Mode.NO_THINK,
            _oasst,
            files="2023-04-12_oasst_ready.trees.jsonl.gz",
            note="One example per tree; the parquet files hold single messages, which no row-wise reader can join.",
        ),
        Adapter("PrimeIntellect/SYNTHETIC-1", "apache-2.0", "hft", "other", Mode.THINK, _synthetic),
        Adapter("PrimeIntellect/SYNTHETIC-1-SFT-Data", "apache-2.0", "hft", "other", Mode.THINK, _synthetic),
        Adapter("open-r1/OpenR1-Math-220k", "apache-2.0", "hft", "maths", Mode.THINK, _openr1),
        Adapter(
            "open-thoughts/OpenThoughts-114k",
            "apache-2.0",
            "hft",
            "other",
            Mode.THINK,
            _openthoughts,
            subset="metadata",
            note="The subset default has no domain: all its rows would be of the domain other.",
        ),
        Adapter(
            "open-r1/codeforces-cots",
            "cc-by-4.0",
            "hft",
            "code",
            Mode.THINK,
            _codeforces_cots,
            subset="solutions_py",
            note="Not filtered for correctness: about 84 % of the Python solutions pass the public tests.",
        ),
        Adapter(
            "KodCode/KodCode-V1-SFT-R1",
            "cc-by-nc-4.0",
            "hft",
            "code",
            Mode.THINK,
            _kodcode_r1,
            note="The split train holds the responses that passed their tests. Not for commercial use.",
        ),
        Adapter("di-zhang-fdu/AOPS", "not stated", "hgpo", "maths", None, _aops, note=_NO_TRACES),
        Adapter(
            "di-zhang-fdu/AIME_1983_2024",
            "mit",
            "hgpo",
            "maths",
            None,
            _aime,
            note=f"{_NO_TRACES} Its card calls it a benchmark; it holds problems of AIME 2024.",
        ),
        Adapter("open-r1/codeforces", "cc-by-4.0", "hgpo", "code", None, _codeforces, note=_NO_TRACES),
        Adapter(
            "KodCode/KodCode-V1",
            "cc-by-nc-4.0",
            "hgpo",
            "code",
            None,
            _kodcode,
            note="Prompts alone: DeepSeek-R1's responses are in KodCode/KodCode-V1-SFT-R1. Not for commercial use.",
        ),
        Adapter("agentica-org/DeepScaleR-Preview-Dataset", "mit", "hgpo", "maths", None, _deepscaler),
        Adapter(
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            "odc-by",
            "hgpo",
            "general",
            None,
            _preference,
            note="Parts of it are under other licences, some of them not for commercial use.",
        ),
    )
}


# --- a user's own files ---------------------------------------------------------------------------------------

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
        messages = _with_system(_messages(row, fields["messages"][0]), system)
        messages = [message | {"content": _opened(message, opened)} for message in messages]
        if wanted is None and messages[-1]["role"] == "user":
            prompt = _history(messages)
        else:
            prompt, response = _last_answer(messages)
    else:
        prompt = _with_system(_user(_required(row, fields["prompt"])), system)
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
        if name in fields and (value := _optional(row, fields[name][0])) is not None:
            parts[name] = value
    parts["prompt"] = prompt
    return parts


def generated(generator: Generator, mode: Mode | None) -> Adapter:
    """An adapter for rows that a program generates.

    Args:
        mode: of the responses; None for prompts alone.
    """
    read = partial(_generated, mode)
    return Adapter("generated", generator.licence, "hft", generator.domain, mode, read, generator=generator)


def _generated(mode: Mode | None, row: Row) -> Parts:
    answer = _optional(row, "answer")
    parts: Parts = {"prompt": _user(_text(row, "prompt")), "reference": answer, "generated": True}
    if mode is not None:
        parts |= {"mode": mode, "answer": (answer or "").strip()}
    if mode is Mode.THINK:
        parts["reasoning"] = _text(row, "reasoning").strip()
    for name in ("level", "domain", "id", "reasoning_gym"):
        if (value := _optional(row, name)) is not None:
            parts[name] = value
    return parts


def _joined(row: Row, columns: Sequence[str]) -> str | None:
    """The text of several columns, without the empty ones; None where all are."""
    return "\n\n".join(text for column in columns if (text := _optional(row, column)) is not None) or None


def _required(row: Row, columns: Sequence[str]) -> str:
    """As `_joined`, but the text is required."""
    text = _joined(row, columns)
    return _text(row, *columns) if text is None else text  # raises, with the missing column


def _with_system(messages: Messages, system: str | None) -> Messages:
    """A conversation with the text of a system column at its beginning."""
    if system is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise _Fault("two_systems", begins=system[:80])
    return messages


def _opened(message: dict[str, str], opened: bool) -> str:
    """An assistant's text; a trace that it only ends is opened, if `opened` says that the prompt did so."""
    text = message["content"]
    if message["role"] != "assistant" or (convention := unopened(text)) is None:
        return text
    if not opened:
        hint = "set mode: think for this source, if its prompts open the trace"
        raise _Fault("unopened_trace", mark=convention.close, begins=text[:80], hint=hint)
    return f"{convention.open}{text}"


def _tagged(response: str) -> Parts:
    """A response that names its mode by its tags."""
    text, (opened, closed) = response.strip(), (Mode.NO_THINK.open_tag, Mode.NO_THINK.close_tag)
    if not text.startswith(opened):
        return _thought(text)
    if not text.endswith(closed):
        raise _Fault("unbalanced_tags", counts={mark: text.count(mark) for mark in (opened, closed)})
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
            for message in (m for m in _items(row.get(column)) if isinstance(m, Mapping)):
                others = (name for name in message if name not in _MESSAGE_FIELDS and _is_content(message[name]))
                found |= dict.fromkeys(f"{column}[].{name}" for name in others)
    return list(found)


_MESSAGE_FIELDS = ("role", "content", "from", "value", *TRACE_FIELDS)


def _is_content(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.split()) > 2
    return isinstance(value, (list, tuple, Mapping)) and len(value) > 0
