"""Checks of all rows of a data set, each opened as its stage will open it, before a model is loaded.

    faults, lengths = inspect_rows(dataset, renderer, EXAMPLES)  # of every row: at most one fault, and its length
    dataset, lengths = check_rows("train_data", dataset, renderer, EXAMPLES)  # refuses the faulty or leaves them out

A prompt, or a prompt with its completion, is rendered through the tokenizer's chat template; a completion is split as
the rewards will split it. A chat template arranges texts and rarely looks into them, so one row stands for all rows of
its shape (roles, kinds of content); a row in which the template finds a text that it looks for is rendered itself.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, cast

import jinja2
import numpy as np
from datasets import Dataset, IterableDataset
from jinja2 import nodes
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from hgpo_trl.errors import UserError
from hgpo_trl.files import whole_file
from hgpo_trl.modes import MODES, TRACE_FIELDS, Fault, Mode, Response, split_response

logger = logging.get_logger(__name__)

Row = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

PROMPTS = ("prompt",)
EXAMPLES = ("prompt", "completion", "tools", "chat_template_kwargs")  # that TRL's SFTTrainer reads

BATCH_ROWS = 1_000
SAMPLE_ROWS = 2_000  # rows whose tokens are counted for a share
EXCERPT = 80  # characters of a row in a message
_SPECIAL_TOKENS = 8  # that a tokenizer may put around a text by itself

_OPEN_TAGS = tuple(mode.open_tag for mode in MODES)

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
    Fault.NO_MODE: "the completion does not begin with <think> or <no_think>",
    Fault.UNCLOSED: "the completion's mode is never closed",
    Fault.NESTED: "a mode tag inside the completion, where none belongs",
    Fault.THINK_IN_NO_THINK: "a reasoning trace in a completion that says <no_think>",
    Fault.TRAILING_TEXT: "text after </no_think>",
    Fault.EMPTY_ANSWER: "a completion without an answer",
    "too_long": "more tokens than the model has positions",
}
"""What can be wrong with a row, in words for the user. The first that applies is a row's only fault."""


class RowFault(NamedTuple):
    """What is wrong with one row."""

    row: int
    kind: str  # of KINDS
    detail: str  # an excerpt, or what the chat template says


class Lengths(NamedTuple):
    """How long the rows of a data set are, and which of them think. Both `[N]`.

    `most` is an upper bound of a row's tokens: the bytes of its rendering, of which every token has at least one.
    """

    most: NDArray[np.int64]
    think: NDArray[np.bool_]


class FaultyRow(Exception):  # noqa: N818 (what `open_row` has to say, not what goes wrong)
    """A row cannot be used: the kind of its fault, of `KINDS`, and an excerpt or what the chat template says."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


# --- what a chat template makes of a row ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rendering:
    """What a chat template makes of a row."""

    refusal: str | None = None  # the chat template's words, where it refuses
    opened: bool = False  # it opens a mode itself at the prompt's end
    added_bytes: int = 0
    rewritten: str | None = None  # the completion, where it is not rendered as it is written


_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_PROBE = "An answer to look for."


class Renderer:
    """Renders rows through a tokenizer's chat template.

    Args:
        tokenizer: as the stage will use it, with its mode tags and, if rows are conversations, a chat template.
        template_kwargs: for the chat template, as the stage will pass them.
        share: let one rendering stand for all rows of a shape. False renders every row: slower, with the same result.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None, share: bool = True
    ) -> None:
        self.tokenizer = tokenizer
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
            return _num_bytes(prompt) + _num_bytes(completion), split_response(completion)
        texts, written = list(_texts(prompt)), "".join(_texts(completion))
        response = split_response(written)
        parts = (response.reasoning, response.answer) if response.well_formed else (written,)  # tags are of the shape
        found = self._rendering(row, [*texts, *parts], (response.mode, response.faults))
        most = sum(map(_num_bytes, texts)) + _num_bytes(written) + found.added_bytes
        return most, response if found.rewritten is None else split_response(found.rewritten)

    def text(self, row: Row) -> str:
        """What is tokenised of a row: prompt and, if it has one, completion."""
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, str):
            return prompt + (completion or "")
        return self._render([*prompt, *(completion or ())], completion is None, _row_kwargs(row))

    def _rendering(self, row: Row, texts: Sequence[str], completion: tuple[Any, ...]) -> _Rendering:
        """The rendering of a row, or of an earlier one of its shape, if the template looks for none of the texts."""
        messages = [*row["prompt"], *row.get("completion", ())]
        found, shape = None, None
        if (
            self._looked_for is not None
            and all(map(_is_plain, messages))
            and not _row_kwargs(row)
            and not any(mark in text for mark in self._looked_for for text in texts)
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
            opened=_ends_open(begin),
            added_bytes=_num_bytes(whole) - sum(map(_num_bytes, _texts(prompt))) - _num_bytes(written),
            rewritten=None if completion is None or rendered.strip() == written.strip() else rendered,
        )

    def _turn_end(self, prompt: Messages, kwargs: dict[str, Any]) -> str:
        """What ends the assistant's turn."""
        if self._end_of_turn is None:
            probe = self._render([*prompt, {"role": "assistant", "content": _PROBE}], False, kwargs)
            self._end_of_turn = probe.rpartition(_PROBE)[2]
        return self._end_of_turn

    def _render(self, messages: Messages, is_prompt: bool, row_kwargs: dict[str, Any]) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                "The tokenizer has no chat template, but the prompts are conversations. Install one with "
                "hgpo_trl.chat_template.set_chat_template(tokenizer), or give prompts as plain text."
            )
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
    """The texts that a chat template looks for in messages, as `</think>`; None if they cannot be told.

    They are what stands left of `in`, and the arguments of methods like `startswith` and `split`.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError:
        return None
    needles: list[nodes.Expr] = []
    for compare in tree.find_all(nodes.Compare):
        left = compare.expr
        for operand in compare.ops:
            if operand.op in ("in", "notin") and not isinstance(operand.expr, (nodes.List, nodes.Tuple)):
                needles.append(left)
            left = operand.expr
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            needles += call.args[:1]
    for tag in tree.find_all(nodes.Filter):
        if tag.name == "replace":
            needles += tag.args[:1]
    if any(not isinstance(needle, nodes.Const) and not _is_role(needle) for needle in needles):
        return None
    return tuple(
        dict.fromkeys(str(needle.value) for needle in needles if isinstance(needle, nodes.Const) and str(needle.value))
    )


def _is_role(needle: nodes.Expr) -> bool:
    """Whether a template asks for a message's role, which is part of its shape."""
    if isinstance(needle, nodes.Getitem):
        return isinstance(needle.arg, nodes.Const) and needle.arg.value == "role"
    return isinstance(needle, nodes.Getattr) and needle.attr == "role"


class _GenerationBlock(jinja2.ext.Extension):
    """Transformers' `{% generation %}`, for parsing alone."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message has nothing but a role and a content."""
    return all(value is None or name in ("role", "content") for name, value in message.items())


def _shape(message: Mapping[str, Any]) -> tuple[str, Any]:
    """By what a chat template tells messages apart, if it does not look into their texts."""
    content = message.get("content")
    if isinstance(content, str):
        return message["role"], bool(content.strip())
    return message["role"], None if content is None else ("parts", len(content))


def _row_kwargs(row: Row) -> dict[str, Any]:
    """What TRL gives to the chat template from a row's own columns."""
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


def _ends_open(text: str) -> bool:
    return text.rstrip().endswith(_OPEN_TAGS)


# --- what is wrong with a row -----------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)):
        raise FaultyRow("not_a_conversation", f"{_excerpt(messages)} ({type(messages).__name__})")
    for message in messages:
        if not isinstance(message, Mapping):
            raise FaultyRow("not_a_conversation", _excerpt(message))
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise FaultyRow("not_a_conversation", f"a message with the keys {', '.join(map(str, message))}")
        content = message["content"]
        if isinstance(content, (list, tuple)):
            kinds = [_kind_of_part(part) for part in content]
            if other := next((kind for kind in kinds if kind != "text"), None):
                raise FaultyRow("not_text", f"a part of type {other} in the {message['role']}'s message")
        elif content is not None and not isinstance(content, str):
            raise FaultyRow("not_text", f"{_excerpt(content)} ({type(content).__name__})")


def _kind_of_part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return type(part).__name__
    kind = str(part.get("type"))
    return kind if kind != "text" or isinstance(part.get("text"), str) else "text without text"


def _check_prompt(prompt: Any) -> None:
    if not prompt:
        raise FaultyRow("empty_prompt", repr(prompt))
    if isinstance(prompt, str):
        last = prompt
    else:
        _check_messages(prompt)
        last = "".join(_texts(prompt[-1:]))
    if not last.strip():
        raise FaultyRow("empty_prompt", _excerpt(prompt))
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise FaultyRow("opened_mode" if _ends_open(last) else "last_role", _excerpt(last))
    if _ends_open(last):
        raise FaultyRow("opened_mode", _excerpt(last, end=True))


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
        raise FaultyRow("empty_completion", _excerpt(completion))


def _traces(message: Mapping[str, Any]) -> dict[str, str]:
    """What a message holds in the fields in which models keep their trace."""
    return {name: message[name] for name in TRACE_FIELDS if isinstance(message.get(name), str) and message[name]}


def _check_response(completion: Any, response: Response) -> None:
    traces = {} if isinstance(completion, str) else _traces(completion[0])
    for name, trace in traces.items():
        if trace.strip() not in response.reasoning:
            raise FaultyRow("lost_trace", f"{name}: {_excerpt(trace)}")
    if response.faults:
        raise FaultyRow(response.faults[0], _excerpt(completion))


def open_row(row: Row, renderer: Renderer) -> tuple[int, bool]:
    """Open a row of `prompt`, or of `prompt` and `completion`, as its stage will.

    Returns:
        An upper bound of its tokens, and whether its completion thinks.

    Raises:
        FaultyRow: it cannot be used.
    """
    _check_prompt(row["prompt"])
    if "completion" not in row:
        return renderer.prompt(row) + _SPECIAL_TOKENS, False
    completion = row["completion"]
    _check_completion(completion)
    if isinstance(row["prompt"], str) != isinstance(completion, str):
        raise FaultyRow("mixed_kinds", f"prompt: {_excerpt(row['prompt'])}, completion: {_excerpt(completion)}")
    most, response = renderer.example(row)
    _check_response(completion, response)
    return most + _SPECIAL_TOKENS, response.mode is Mode.THINK


def _excerpt(value: Any, *, end: bool = False) -> str:
    """A few words of a row, on one line."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(message, Mapping) for message in value):
        value = value[-1].get("content")
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    if len(text) <= EXCERPT:
        return repr(text) if isinstance(value, str) else text
    return repr(f"...{text[-EXCERPT:]}" if end else f"{text[:EXCERPT]}...")


# --- all rows ---------------------------------------------------------------------------------------------------


def inspect_rows(dataset: Dataset, renderer: Renderer, columns: Sequence[str]) -> tuple[list[RowFault], Lengths]:
    """Open every row as its stage will.

    Args:
        columns: `PROMPTS` or `EXAMPLES`.

    Returns:
        The faults, in the order of the rows, and the rows' lengths; a faulty row has none.
    """
    names = [name for name in columns if name in dataset.column_names]
    faults: list[RowFault] = []
    most, think = np.zeros(len(dataset), dtype=np.int64), np.zeros(len(dataset), dtype=bool)
    is_text = np.zeros(len(dataset), dtype=bool)
    batches = dataset.with_format(None).select_columns(names).iter(BATCH_ROWS)
    rows = (dict(zip(names, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
    for number, row in enumerate(rows):
        is_text[number] = isinstance(row["prompt"], str)
        try:
            most[number], think[number] = open_row(row, renderer)
        except FaultyRow as fault:
            faults.append(RowFault(number, fault.kind, fault.detail))
    rest = np.ones(len(dataset), dtype=bool)
    rest[[fault.row for fault in faults]] = False
    texts, conversations = np.flatnonzero(rest & is_text), np.flatnonzero(rest & ~is_text)
    for number in min(texts, conversations, key=len).tolist() if len(texts) and len(conversations) else ():
        faults.append(RowFault(number, "mixed_kinds", f"prompt: {_excerpt(dataset[number]['prompt'])}"))
        most[number] = 0
    return sorted(faults), Lengths(most, think)


def count_tokens(dataset: Dataset, rows: Sequence[int] | NDArray[np.int64], renderer: Renderer) -> NDArray[np.int64]:
    """Tokens of some rows, prompt and completion together. As many as `rows`."""
    names = [name for name in EXAMPLES if name in dataset.column_names]
    counts: list[int] = []
    for batch in dataset.with_format(None).select_columns(names).select(rows).iter(BATCH_ROWS):
        values = cast(dict[str, list[Any]], batch)
        texts = [renderer.text(dict(zip(names, row, strict=True))) for row in zip(*values.values(), strict=True)]
        encoded = renderer.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts += map(len, encoded["input_ids"])
    return np.array(counts, dtype=np.int64)


class Share(NamedTuple):
    """Which share of the rows, and of those that think, is longer than a limit."""

    rows: float
    think: float
    exact: bool  # else estimated from `SAMPLE_ROWS` rows


def share_beyond(dataset: Dataset, lengths: Lengths, limit: int, renderer: Renderer) -> Share:
    """How many rows have more than `limit` tokens.

    Only rows that may have are counted, and of more than `SAMPLE_ROWS` of these only so many, evenly spread.
    """
    candidates = np.flatnonzero(lengths.most > limit)
    if not len(candidates):
        return Share(0.0, 0.0, True)
    sample = candidates[np.linspace(0, len(candidates) - 1, min(len(candidates), SAMPLE_ROWS)).astype(int)]
    beyond = count_tokens(dataset, sample, renderer) > limit
    weight = len(candidates) / len(sample)  # rows that one of the sample stands for
    of_think = beyond[lengths.think[sample]].sum() * weight / max(1, lengths.think.sum())
    return Share(beyond.sum() * weight / len(dataset), of_think, len(sample) == len(candidates))


def check_rows(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    columns: Sequence[str],
    *,
    positions: int | None = None,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> tuple[Dataset, Lengths]:
    """Refuse a data set with faulty rows, or leave these out.

    The same rows are left out whenever and in whatever process it is called.

    Args:
        name: the field of the recipe, or the argument, that holds the data set.
        columns: `PROMPTS` or `EXAMPLES`.
        positions: tokens that a row may have at most; None: any number.
        dropped: JSON lines to list the faulty rows in, which are then left out; None refuses them.
        is_main_process: this one writes the list.

    Returns:
        The rows without a fault, and their lengths.

    Raises:
        UserError: rows are faulty, or all are. The message counts them by kind and shows the first of each.
    """
    faults, lengths = inspect_rows(dataset, renderer, columns)
    if positions is not None:
        candidates = np.flatnonzero(lengths.most > positions)
        tokens = count_tokens(dataset, candidates, renderer)
        beyond = tokens > positions
        faults += [
            RowFault(int(row), "too_long", f"{count:,} tokens of at most {positions:,}")
            for row, count in zip(candidates[beyond], tokens[beyond], strict=True)
        ]
        faults.sort()
    if not faults:
        return dataset, lengths
    report = f"{name}: {len(faults):,} of {len(dataset):,} rows are faulty.\n{explain(faults)}"
    if dropped is None or len(faults) == len(dataset):
        raise UserError(f"{report}\nMend or remove them, or set drop_faulty_rows: true to leave them out.")
    if is_main_process:
        with whole_file(dropped) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(fault._asdict(), ensure_ascii=False)}\n" for fault in faults)
        counts = Counter(fault.kind for fault in faults)
        listing = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
        print(f"{name}: left out {len(faults):,} of {len(dataset):,} rows ({listing}); see {dropped}", flush=True)
    kept = np.setdiff1d(np.arange(len(dataset)), [fault.row for fault in faults])
    return dataset.select(kept), Lengths(*(values[kept] for values in lengths))


def explain(faults: Iterable[RowFault]) -> str:
    """Faults by kind, most frequent first: how many rows, what is wrong with them, and the first of them."""
    by_kind: dict[str, list[RowFault]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        first, rows = found[0], "row" if len(found) == 1 else "rows"
        lines.append(f"  {kind}: {len(found):,} {rows}, {KINDS[kind]}. The first is row {first.row}: {first.detail}")
    return "\n".join(lines)


# --- a stage's data ---------------------------------------------------------------------------------------------


def model_positions(
    model: str | PretrainedConfig, overrides: Mapping[str, Any] | None = None, **kwargs: Any
) -> int | None:
    """Tokens that a model has positions for (`max_position_embeddings`); None if its configuration names no number.

    Args:
        model: path, hub id, or the configuration of a model that is loaded.
        overrides: of the configuration, from a recipe's `model_init_kwargs`.
        kwargs: for `AutoConfig.from_pretrained`: `revision`, `trust_remote_code`.
    """
    if overrides and (given := overrides.get("max_position_embeddings")) is not None:
        return int(given)
    config = AutoConfig.from_pretrained(model, **kwargs) if isinstance(model, str) else model
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_prompts(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    *,
    positions: int | None = None,
    max_new_tokens: int = 0,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> Dataset:
    """Check the rows of a stage that samples responses.

    Args:
        positions: of the model. A prompt beyond them is a fault; one that leaves less than `max_new_tokens` of them to
            the response is warned of.
        dropped: see `check_rows`.
        is_main_process: this one writes the list, and the warnings.

    Returns:
        The rows without a fault.

    Raises:
        UserError: see `check_columns` and `check_rows`.
    """
    check_columns(name, dataset)
    dataset, lengths = check_rows(
        name, dataset, renderer, PROMPTS, positions=positions, dropped=dropped, is_main_process=is_main_process
    )
    if positions is not None and max_new_tokens:
        share = share_beyond(dataset, lengths, positions - max_new_tokens, renderer)
        if share.rows and is_main_process:
            logger.warning_once(
                f"{name}: {_percent(share.rows, share.exact)} of the prompts, with a response of {max_new_tokens:,} "
                f"tokens, are longer than the {positions:,} positions of the model (max_position_embeddings). "
                "Responses beyond them are of no use: lower the length of responses, or raise the positions."
            )
    return dataset


def check_examples(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    *,
    max_length: int | None,
    positions: int | None = None,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> Dataset:
    """Check the rows of Stage I.

    Args:
        max_length: tokens after which a row is cut off, which is warned of; None cuts none.
        positions: of the model. A row beyond them is a fault, unless it is cut off.
        dropped: see `check_rows`.
        is_main_process: this one writes the list, and the warnings.

    Returns:
        The rows without a fault.

    Raises:
        UserError: a column is missing; or see `check_rows`.
    """
    if missing := {"prompt", "completion"}.difference(dataset.column_names):
        raise UserError(
            f"{name} lacks the column {' and '.join(sorted(missing))}; its columns are {dataset.column_names}. "
            "Rename or add what is missing: the loss is on the completion only."
        )
    cut = max_length is not None and (positions is None or max_length <= positions)
    dataset, lengths = check_rows(
        name,
        dataset,
        renderer,
        EXAMPLES,
        positions=None if cut else positions,
        dropped=dropped,
        is_main_process=is_main_process,
    )
    if max_length is not None:
        share = share_beyond(dataset, lengths, max_length, renderer)
        if share.rows and is_main_process:
            logger.warning_once(
                f"{name}: {_percent(share.rows, share.exact)} of the rows and {_percent(share.think, share.exact)} of "
                f"those that think are longer than max_length={max_length:,} tokens and are cut off there. A think "
                "example that is cut has no answer. Raise max_length (TRL's default is 1,024, the paper's 32,768), or "
                "build the data with max_tokens."
            )
    return dataset


def _percent(share: float, exact: bool) -> str:
    return f"{'' if exact else 'about '}{share:.1%}"


def check_columns(name: str, dataset: Any) -> None:
    """Check that a data set can be one of prompts.

    Raises:
        UserError: not a data set, no `prompt` column, no rows, or a column `response`.
        NotImplementedError: it has images.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserError(f"{name} must be a datasets.Dataset or IterableDataset; got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"{name} is empty. Give it at least one row with a `prompt`.")
    if "prompt" not in first:
        raise UserError(
            f"{name} has no column `prompt`; its columns are {sorted(first)}. Rename the one that holds it."
        )
    if "response" in first:
        raise UserError(
            f"{name} has a column `response`, the name under which reward functions get the parts of a response. "
            "Rename or remove it."
        )
    if "image" in first or "images" in first:
        raise NotImplementedError(f"{name} has images; HGPOTrainer trains text-only models. Remove the column.")


def check_dataset(
    name: str,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_kwargs: dict[str, Any] | None = None,
    positions: int | None = None,
    max_new_tokens: int = 0,
    is_main_process: bool = True,
) -> None:
    """Check prompts before any long work, without leaving any out.

    Args:
        name: of the argument, for the messages.
        dataset: of a stream only the columns and the first row are looked at.
        tokenizer, template_kwargs: see `Renderer`.
        positions, max_new_tokens, is_main_process: see `check_prompts`.

    Raises:
        UserError: see `check_columns` and `check_rows`.
        NotImplementedError: the data has images.
    """
    check_columns(name, dataset)
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list([{"prompt": next(iter(dataset))["prompt"]}])
    renderer = Renderer(tokenizer, template_kwargs)
    check_prompts(
        name,
        dataset,
        renderer,
        positions=positions,
        max_new_tokens=max_new_tokens,
        is_main_process=is_main_process,
    )
