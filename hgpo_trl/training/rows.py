"""Open a row of a data set as its stage will, and find its fault.

A prompt, or a prompt with its completion, is rendered through the tokenizer's chat template; a completion is split as
the rewards will split it. Chat templates arrange texts and rarely read them. So one row is rendered for all rows of its
shape (roles, kinds of content); rows with a text that the template searches for are rendered one by one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import (
    LHRM,
    MODES,
    PRESETS,
    TRACE_FIELDS,
    Fault,
    Mode,
    ModeFormat,
    Response,
    add_mode_tokens,
    as_format,
    format_of,
    split_response,
)

if TYPE_CHECKING:  # workers of the builder do without
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

PROMPTS = ("prompt",)  # columns of a data set of prompts
EXAMPLES = ("prompt", "completion", "tools", "chat_template_kwargs")  # of examples: what TRL's SFTTrainer reads

EXCERPT = 80  # characters of a row in a message
_SPECIAL_TOKENS = 8  # that a tokenizer may put around a text by itself

KINDS = {
    "mixed_kinds": "plain text among conversations, or the reverse: a data set holds the one or the other",
    "not_a_conversation": "a conversation is a list of messages, each with `role` and `content`",
    "not_text": "content that is not text: models of this project read text only",
    "empty_prompt": "an empty `prompt`",
    "last_role": "the prompt ends with the assistant's message, where the model's response has to begin",
    "opened_mode": "the prompt ends in an opened mode, which is the model's own decision: take the tag out",
    "unknown_role": "a role that the chat template refuses",
    "chat_template": "the chat template refuses the conversation",
    "empty_completion": "an empty `completion`",
    "completion_roles": "the completion has to be one message of the assistant's",
    "lost_trace": "a trace in a field of the message that the chat template leaves out: write it into the content, "
    "<think> trace </think> answer",
    Fault.NO_MODE: "the completion does not begin with the opening of a mode",
    Fault.UNCLOSED: "the completion's mode is never closed",
    Fault.NESTED: "a mode tag inside the completion, where none belongs",
    Fault.THINK_IN_NO_THINK: "a reasoning trace in a completion that says <no_think>",
    Fault.TRAILING_TEXT: "text after </no_think>",
    Fault.EMPTY_ANSWER: "a completion without an answer",
    "too_long": "more tokens than the model has positions",
}
"""Kinds of faults, described for the user. The first that applies is a row's only fault."""


class FaultyRow(Exception):  # noqa: N818 (a result of `open_row`, not a failure)
    """A row cannot be used: the kind of its fault, of `KINDS`, and an excerpt or the chat template's message."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


# --- rendering a row --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rendering:
    """The result of rendering a row through a chat template."""

    refusal: str | None = None  # the chat template's message, where it refuses
    opened: bool = False  # it opens a mode itself at the prompt's end
    added_bytes: int = 0
    rewritten: str | None = None  # the completion, where it is not rendered as it is written


_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_PROBE = "An answer to look for."


def as_trained(tokenizer: "PreTrainedTokenizerBase", mode_format: Any = None) -> "PreTrainedTokenizerBase":
    """Copy a tokenizer and prepare it as Stage I does: with the mode tags, and a chat template that knows the modes.

    Args:
        mode_format: of the recipe, for a model that keeps its own marks; None: this library's.

    Raises:
        ValueError: see `add_mode_tokens` and `ensure_thinking_modes`.
    """
    from hgpo_trl.modes.chat_template import ensure_thinking_modes, settle_format  # imports transformers

    trained = deepcopy(tokenizer)
    if as_format(mode_format or LHRM) != LHRM:
        settle_format(trained, mode_format)
        return trained
    add_mode_tokens(trained)
    ensure_thinking_modes(trained)
    return trained


class Renderer:
    """Renders rows through a tokenizer's chat template.

    Args:
        tokenizer: as the stage will use it, with its mode tags and, if rows are conversations, a chat template.
        template_kwargs: for the chat template, as the stage will pass them.
        share: let one rendering stand for all rows of a shape. False renders every row: slower, with the same result.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any] | None = None, share: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.mode_format = format_of(tokenizer)
        self.template_kwargs = template_kwargs or {}
        template = tokenizer.chat_template
        self._looked_for = texts_looked_for(template) if share and isinstance(template, str) else None
        self._known: dict[Any, _Rendering] = {}
        self._end_of_turn: str | None = None

    def prompt(self, row: Row) -> int:
        """Render a row's prompt. Returns an upper bound of its tokens.

        Raises:
            FaultyRow: the chat template refuses it, or ends it in an opened mode.
        """
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return _num_bytes(prompt)
        texts = list(_texts(prompt))
        found = self._rendering(row, texts, ())
        return sum(map(_num_bytes, texts)) + found.added_bytes

    def example(self, row: Row) -> tuple[int, Response]:
        """Render a row's prompt and completion. Returns an upper bound of their tokens, and the completion, split.

        Raises:
            FaultyRow: the chat template refuses the row, or ends its prompt in an opened mode.
        """
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return _num_bytes(prompt) + _num_bytes(completion), split_response(completion, self.mode_format)
        texts, written = list(_texts(prompt)), "".join(_texts(completion))
        response = split_response(written, self.mode_format)
        parts = (response.reasoning, response.answer) if response.well_formed else (written,)  # tags are of the shape
        found = self._rendering(row, [*texts, *parts], (response.mode, response.faults))
        most = sum(map(_num_bytes, texts)) + _num_bytes(written) + found.added_bytes
        return most, response if found.rewritten is None else split_response(found.rewritten, self.mode_format)

    def text(self, row: Row) -> str:
        """Render the text of a row that is tokenised: prompt and, if it has one, completion."""
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, str):
            return prompt + (completion or "")
        return self._render([*prompt, *(completion or ())], completion is None, _row_kwargs(row))

    def _rendering(self, row: Row, texts: Sequence[str], completion: tuple[Any, ...]) -> _Rendering:
        """Render a row, or reuse the rendering of a row of its shape if the template searches for none of its texts.

        Raises:
            FaultyRow: see `prompt`.
            UserError: there is no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise UserError(
                "The tokenizer has no chat template, but the prompts are conversations. Install one with "
                "hgpo_trl.modes.chat_template.set_chat_template(tokenizer), or give prompts as plain text."
            )
        messages = [*row["prompt"], *row.get("completion", ())]
        found, shape = None, None
        if (
            self._looked_for is not None
            and all(map(_is_plain, messages))
            and not _row_kwargs(row)
            and not any(map("\0".join(texts).__contains__, self._looked_for))
        ):
            shape = (completion, *map(_shape, messages))
            found = self._known.get(shape)
        if found is None:
            found = self._render_row(row)
            if shape is not None and found.rewritten is None:
                self._known[shape] = found
        if found.refusal is not None:
            known = ("system", "user", "assistant")
            unknown = next((m["role"] for m in messages if m["role"] not in known), None)
            if unknown is not None:
                raise FaultyRow("unknown_role", f"{unknown}: {found.refusal}")
            raise FaultyRow("chat_template", found.refusal)
        if found.opened:
            raise FaultyRow("opened_mode", "the chat template adds the tag itself")
        return found

    def _render_row(self, row: Row) -> _Rendering:
        prompt, completion, kwargs = row["prompt"], row.get("completion"), _row_kwargs(row)
        try:
            begin = self._render(prompt, True, kwargs)
            whole = begin if completion is None else self._render([*prompt, *completion], False, kwargs)
            end = "" if completion is None else self._turn_end(prompt, kwargs)
        except _TEMPLATE_ERRORS as error:
            return _Rendering(str(error) or type(error).__name__)
        written = "" if completion is None else "".join(_texts(completion))
        rendered = whole[len(commonprefix([begin, whole])) :].removesuffix(end)  # noqa: RUF071 (texts, not paths)
        return _Rendering(
            opened=_ends_open(begin, self.mode_format),
            added_bytes=_num_bytes(whole) - sum(map(_num_bytes, _texts(prompt))) - _num_bytes(written),
            rewritten=None if completion is None or rendered.strip() == written.strip() else rendered,
        )

    def _turn_end(self, prompt: Messages, kwargs: dict[str, Any]) -> str:
        """Find the text that ends the assistant's turn."""
        if self._end_of_turn is None:
            probe = self._render([*prompt, {"role": "assistant", "content": _PROBE}], False, kwargs)
            self._end_of_turn = probe.rpartition(_PROBE)[2]
        return self._end_of_turn

    def _render(self, messages: Messages, is_prompt: bool, row_kwargs: dict[str, Any]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=is_prompt,
            **{**self.template_kwargs, **row_kwargs},
        )
        return cast(str, rendered)


_SEARCHES = frozenset(
    "startswith endswith split rsplit partition rpartition find rfind index count replace removeprefix "
    "removesuffix".split()
)


def texts_looked_for(template: str) -> tuple[str, ...] | None:
    """Find the texts that a chat template searches for in messages, such as `</think>`; None if they are not constants.

    They are the left operands of `in`, texts that are compared with anything but a role or a part's type, and the
    arguments of methods like `startswith` and `split`.
    """
    environment = jinja2.Environment(extensions=[loopcontrols, _GenerationBlock])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError:
        return None
    needles: list[nodes.Expr] = []
    for compare in tree.find_all(nodes.Compare):
        left = compare.expr
        for operand in compare.ops:
            right = operand.expr
            if operand.op in ("in", "notin") and not isinstance(right, (nodes.List, nodes.Tuple)):
                needles.append(left)
            elif operand.op in ("eq", "ne") and not (_is_of_shape(left) or _is_of_shape(right)):
                needles += [side for side in (left, right) if isinstance(side, nodes.Const)]
            left = right
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            needles += call.args[:1]
    for tag in tree.find_all(nodes.Filter):
        if tag.name == "replace":
            needles += tag.args[:1]
    if any(not isinstance(needle, nodes.Const) and not _is_of_shape(needle) for needle in needles):
        return None
    texts = (needle.value for needle in needles if isinstance(needle, nodes.Const))
    return tuple(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _is_of_shape(expression: nodes.Expr) -> bool:
    """Whether it is a message's role or a part's type, by which shapes differ anyway."""
    if isinstance(expression, nodes.Getitem):
        return isinstance(expression.arg, nodes.Const) and expression.arg.value in ("role", "type")
    return isinstance(expression, nodes.Getattr) and expression.attr in ("role", "type")


class _GenerationBlock(Extension):
    """Transformers' `{% generation %}`, for parsing alone."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message has nothing but a role and a content."""
    return len(message) == 2 or all(v is None or name in ("role", "content") for name, v in message.items())


def _shape(message: Mapping[str, Any]) -> tuple[str, Any]:
    """The properties by which a chat template tells messages apart if it does not read their texts."""
    content = message.get("content")
    if isinstance(content, str):
        return message["role"], bool(content.strip())
    return message["role"], None if content is None else ("parts", len(content))


def _row_kwargs(row: Row) -> dict[str, Any]:
    """The arguments that TRL passes to the chat template from a row's own columns."""
    if "tools" not in row and "chat_template_kwargs" not in row:
        return {}
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({"tools": tools} if tools else {}) | dict(row.get("chat_template_kwargs") or {})


def _texts(messages: Messages) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (part["text"] for part in content)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _ends_open(text: str, mode_format: ModeFormat) -> bool:
    openings = (mode_format.opening(mode).rstrip() for mode in MODES)
    return text.rstrip().endswith(tuple(filter(None, openings)))


# --- faults of a row --------------------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)):
        raise FaultyRow("not_a_conversation", f"{excerpt(messages)} ({type(messages).__name__})")
    for message in messages:
        if not isinstance(message, Mapping):
            raise FaultyRow("not_a_conversation", excerpt(message))
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise FaultyRow("not_a_conversation", f"a message with the keys {', '.join(map(str, message))}")
        content = message["content"]
        if isinstance(content, (list, tuple)):
            kinds = [_kind_of_part(part) for part in content]
            if other := next((kind for kind in kinds if kind != "text"), None):
                raise FaultyRow("not_text", f"a part of type {other} in the {message['role']}'s message")
        elif isinstance(content, str):
            if content.startswith("[{") and _are_parts(content):
                raise FaultyRow("not_text", f"parts that were read as the text {excerpt(content)}")
        elif content is not None:
            raise FaultyRow("not_text", f"{excerpt(content)} ({type(content).__name__})")


_PART_TYPES = ("text", "image", "image_url", "audio", "input_audio", "video")


def _are_parts(text: str) -> bool:
    """Whether a text is a list of parts in JSON, which `datasets` makes of them where the first rows hold text."""
    try:
        parts = json.loads(text)
    except ValueError:
        return False
    return all(isinstance(part, dict) and part.get("type") in _PART_TYPES for part in parts)


def _kind_of_part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return type(part).__name__
    kind = str(part.get("type"))
    return kind if kind != "text" or isinstance(part.get("text"), str) else "text without text"


def _check_prompt(prompt: Any, mode_format: ModeFormat) -> None:
    if not prompt:
        raise FaultyRow("empty_prompt", repr(prompt))
    if isinstance(prompt, str):
        last = prompt
    else:
        _check_messages(prompt)
        last = "".join(_texts(prompt[-1:]))
    if not last.strip():
        raise FaultyRow("empty_prompt", excerpt(prompt))
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise FaultyRow("opened_mode" if _ends_open(last, mode_format) else "last_role", excerpt(last))
    if _ends_open(last, mode_format):
        raise FaultyRow("opened_mode", excerpt(last, end=True))


def _check_completion(completion: Any) -> None:
    if not completion:
        raise FaultyRow("empty_completion", repr(completion))
    if isinstance(completion, str):
        if not completion.strip():
            raise FaultyRow("empty_completion", repr(completion))
        return
    _check_messages(completion)
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise FaultyRow("completion_roles", f"its roles are {', '.join(roles)}")
    if not any(map(str.strip, (*_texts(completion), *_traces(completion[0]).values()))):
        raise FaultyRow("empty_completion", excerpt(completion))


def _traces(message: Mapping[str, Any]) -> dict[str, str]:
    """The traces in those fields of a message in which models keep them."""
    if len(message) == 2:  # role and content
        return {}
    return {name: message[name] for name in TRACE_FIELDS if isinstance(message.get(name), str) and message[name]}


def _check_response(completion: Any, response: Response, mode_format: ModeFormat) -> None:
    traces = {} if isinstance(completion, str) else _traces(completion[0])
    for name, trace in traces.items():
        if trace.strip() not in response.reasoning:
            raise FaultyRow("lost_trace", f"{name}: {excerpt(trace)}")
    # Qwen3's template puts an empty trace before a text without one: <no_think> would go into the answer.
    tagged = any(tag in response.answer for tag in (Mode.NO_THINK.open_tag, Mode.NO_THINK.close_tag))
    if response.faults or tagged:
        remark = _other_format(completion, mode_format) if response.mode is None or tagged else ""
        raise FaultyRow((*response.faults, Fault.NESTED)[0], f"{excerpt(completion)}{remark}")


def _other_format(completion: Any, mode_format: ModeFormat) -> str:
    """A remark on a completion in the marks of another format; empty if it is in those of none."""
    text = completion if isinstance(completion, str) else "".join(_texts(completion))
    written = [preset for preset in PRESETS.values() if preset.think]  # r1 would take any text before a </think>
    name = next((other.name for other in written if split_response(text, other).well_formed), None)
    if name is None:
        return ""
    return (
        f", in the marks of {name}, but mode_format is {mode_format.name}. Set mode_format: {name}, or write the "
        f"examples with mode_format: {mode_format.name} (`hgpo-trl data hft`)"
    )


def open_row(row: Row, renderer: Renderer) -> tuple[int, bool]:
    """Open a row of `prompt`, or of `prompt` and `completion`, as its stage will.

    Returns:
        An upper bound of its tokens, and whether its completion thinks.

    Raises:
        FaultyRow: it cannot be used.
    """
    _check_prompt(row["prompt"], renderer.mode_format)
    if "completion" not in row:
        return renderer.prompt(row) + _SPECIAL_TOKENS, False
    completion = row["completion"]
    _check_completion(completion)
    if isinstance(row["prompt"], str) != isinstance(completion, str):
        raise FaultyRow("mixed_kinds", f"prompt: {excerpt(row['prompt'])}, completion: {excerpt(completion)}")
    most, response = renderer.example(row)
    _check_response(completion, response, renderer.mode_format)
    return most + _SPECIAL_TOKENS, response.mode is Mode.THINK


def excerpt(value: Any, *, end: bool = False) -> str:
    """A few words of a row, on one line."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(message, Mapping) for message in value):
        value = value[-1].get("content")
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    if len(text) <= EXCERPT:
        return repr(text) if isinstance(value, str) else text
    return repr(f"...{text[-EXCERPT:]}" if end else f"{text[:EXCERPT]}...")
