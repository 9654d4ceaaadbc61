"""Read conversations in the schemas that sources have, and take the last answer out of them."""

from collections.abc import Mapping
from typing import Any

from hgpo_trl.data.rows import Fault, Messages, Row, brief
from hgpo_trl.data.traces import has_trace, split_trace
from hgpo_trl.modes import TRACE_FIELDS, Mode

_ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLES["system"] = "system"


def messages_of(row: Row, name: str) -> Messages:
    """A conversation of {role, content} or {from, value} messages with the roles system, user and assistant.

    Content in parts of text is joined. A trace in a field of its own goes before the content, in marks.
    """
    if name not in row:
        raise Fault("missing_field", field=name)
    value = row[name]
    if not isinstance(value, (list, tuple)) or not value:
        raise Fault("null_messages", field=name)
    messages: Messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Fault("null_messages", field=name, message=len(messages))
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise Fault("unknown_role", role=brief(role))
        text, trace = _content(content), _trace(message) if _ROLES[role] == "assistant" else ""
        if not text.strip():
            raise Fault("null_messages", field=name, message=len(messages))
        if message.get("tool_calls"):
            raise Fault("not_text", field="tool_calls")
        messages.append({"role": _ROLES[role], "content": _with_trace(text, trace)})
    return messages


def _content(content: Any) -> str:
    """A message's text; parts are joined as by a chat template."""
    if not isinstance(content, (list, tuple)):
        return content if isinstance(content, str) else ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Fault("not_text", field="content", type=brief(kind))
    return "".join(part["text"] for part in content)


def _trace(message: Mapping[str, Any]) -> str:
    """The trace in a field of an assistant's message; empty where there is none."""
    found = {value.strip() for field in TRACE_FIELDS if isinstance(value := message.get(field), str)} - {""}
    if len(found) > 1:
        raise Fault("two_traces", fields=[field for field in TRACE_FIELDS if message.get(field)])
    return found.pop() if found else ""


def _with_trace(text: str, trace: str) -> str:
    if not trace:
        return text
    if has_trace(text):
        if split_trace(text)[0] != trace:
            raise Fault("two_traces", begins=trace[:80])
        return text
    if text.strip().startswith(Mode.NO_THINK.open_tag):
        raise Fault("two_traces", begins=trace[:80])
    return f"{Mode.THINK.open_tag}\n{trace}\n{Mode.THINK.close_tag}\n\n{text}"


def last_answer(messages: Messages) -> tuple[Messages, str]:
    """The turns up to the last answer to a user's message, and that answer; traces in earlier answers are left out."""
    last = next((i for i in range(len(messages) - 1, 0, -1) if _answers(messages, i)), None)
    if last is None:
        raise Fault("no_answer")
    return history(messages[:last]), messages[last]["content"]


def _answers(messages: Messages, index: int) -> bool:
    return messages[index]["role"] == "assistant" and messages[index - 1]["role"] == "user"


def history(messages: Messages) -> Messages:
    """A prompt: perhaps a system message, then user and assistant in turn, the user last; answers without traces."""
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Fault("roles_out_of_order", roles=turns[:20])
    return [
        message | {"content": split_trace(message["content"])[1]}
        if message["role"] == "assistant" and has_trace(message["content"])
        else message
        for message in messages
    ]


def with_system(messages: Messages, system: str | None) -> Messages:
    """A conversation with the text of a system column at its beginning."""
    if system is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise Fault("two_systems", begins=system[:80])
    return messages
