"""The two modes of a hybrid-reasoning model, their tags, and how both look in text, in a tokenizer and in a model.

    think:     <think> reasoning </think> answer
    no think:  <no_think> answer </no_think>

The response's first token, the open tag, is the model's decision (arXiv 2505.14631, section 2.1). For that each tag
has to be exactly one token, and an ordinary one: TRL decodes completions with `skip_special_tokens=True`, so a special
token would vanish before the rewards see it.
"""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken

from hgpo_trl.common.errors import UserError

if TYPE_CHECKING:  # only functions on models need them, and importing them takes seconds
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Mode(StrEnum):
    """How a response is given: with a reasoning trace (⊢), or at once (⊬)."""

    THINK = "think"
    NO_THINK = "no_think"

    @property
    def open_tag(self) -> str:
        return f"<{self}>"

    @property
    def close_tag(self) -> str:
        return f"</{self}>"


MODES = (Mode.THINK, Mode.NO_THINK)  # this order is the mode axis of every tensor
TAGS = tuple(tag for mode in MODES for tag in (mode.open_tag, mode.close_tag))

_OPENED = {mode.open_tag: mode for mode in MODES}
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_THINK_TAGS = (Mode.THINK.open_tag, Mode.THINK.close_tag)
# Marks of a reasoning trace in other models' responses. `List<Thought>` in code is none of them.
_TRACE = re.compile(
    r"(?:(?<!\w)<|</)(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)/?>"
    r"|<\|(?:(?:begin|end)_of_thought|/?think(?:ing)?)\|>"
    r"|\[/?think\]"
    r"|◁/?think(?:ing)?▷",
    re.IGNORECASE,
)

# Fields of a chat message in which models keep their trace, beside the content.
TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")


# --- text ---------------------------------------------------------------------------------------------------


class Fault(StrEnum):
    """Faults in the format of a response."""

    NO_MODE = "no_mode"  # does not begin with a mode tag
    UNCLOSED = "unclosed"  # the mode's close tag never comes
    NESTED = "nested"  # a tag where none belongs
    THINK_IN_NO_THINK = "think_in_no_think"  # a reasoning trace inside no-think, in our tags or other marks
    TRAILING_TEXT = "trailing_text"  # text after </no_think>
    EMPTY_ANSWER = "empty_answer"  # closed, but nothing to score
    OVERLONG = "overlong"  # a no-think answer beyond the cap (`rewards.overlong`); the text alone does not show it


@dataclass(frozen=True, slots=True)
class Response:
    """A split response. `mode` is None if it does not begin with a mode tag; `faults` are in `Fault`'s order."""

    mode: Mode | None
    reasoning: str
    answer: str
    faults: tuple[Fault, ...]

    @property
    def well_formed(self) -> bool:
        return not self.faults


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL passes it: a string, or a conversation of one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def split_response(text: str) -> Response:
    """Split a response into mode, reasoning and answer, and name every fault of its format.

    Total: never raises, and never loses an answer. Without a mode the answer is the whole text; in an unclosed no-think
    response it is the rest; in an unclosed think response all is reasoning and the answer is empty; text after
    `</no_think>` is not part of the answer. Reasoning and answer are stripped. A no-think answer with a reasoning trace
    in another model's marks (`<thinking>`, `<|begin_of_thought|>`, `[THINK]`, `◁think▷`, ...) has the fault of one in
    `<think>`; without a mark, reasoning cannot be told from explanation.
    """
    tags = list(_TAG.finditer(text))
    names = [tag.group() for tag in tags]
    mode = _OPENED.get(names[0]) if names else None
    if mode is None or text[: tags[0].start()].strip():
        return Response(None, "", text.strip(), (Fault.NO_MODE,))

    start = tags[0].end()
    closed = mode.close_tag in names
    close = names.index(mode.close_tag) if closed else len(names)
    end, rest = tags[close].span() if closed else (len(text), len(text))
    inside, after = text[start:end].strip(), text[rest:].strip()
    tags_inside, tags_after = set(names[1:close]), names[close + 1 :]

    reasoning, answer = (inside, after) if mode is Mode.THINK else ("", inside)
    misplaced = tags_inside.intersection(_THINK_TAGS) if mode is Mode.NO_THINK else set()
    found = (
        (Fault.UNCLOSED, not closed),
        (Fault.NESTED, tags_inside - misplaced or tags_after),
        (Fault.THINK_IN_NO_THINK, mode is Mode.NO_THINK and (misplaced or trace_mark(inside))),
        (Fault.TRAILING_TEXT, mode is Mode.NO_THINK and after),
        (Fault.EMPTY_ANSWER, closed and not answer),
    )
    return Response(mode, reasoning, answer, tuple(fault for fault, present in found if present))


def trace_mark(text: str) -> str | None:
    """The first mark of a reasoning trace that is not one of our tags, as `<thinking>`; None where there is none."""
    found = _TRACE.search(text) if any(begin in text for begin in "<[◁") else None  # 20 times faster on prose
    return found.group() if found else None


def format_response(mode: Mode | str, answer: str, reasoning: str = "") -> str:
    """Write a response in its mode's format; the inverse of `split_response` for text without tags.

    Raises:
        UserError: `mode` is unknown, a part contains a tag, `answer` is blank, or no-think is given `reasoning`, also
            inside `answer` (see `split_response`).
    """
    mode = Mode(mode)
    answer, reasoning = answer.strip(), reasoning.strip()
    for name, part in (("answer", answer), ("reasoning", reasoning)):
        if tag := _TAG.search(part):
            raise UserError(f"{name} contains the tag {tag.group()}: take it apart with split_response() first.")
    if not answer:
        raise UserError("answer is blank: a response needs an answer; drop the example.")
    if mode is Mode.THINK:
        return f"{mode.open_tag}\n{reasoning}\n{mode.close_tag}\n\n{answer}"
    if reasoning:
        raise UserError(f"reasoning was given for mode {mode}: leave it empty, or use mode {Mode.THINK}.")
    if mark := trace_mark(answer):
        raise UserError(f"answer contains {mark}, a reasoning trace, in mode {mode}: use mode {Mode.THINK}.")
    return f"{mode.open_tag}\n{answer}\n{mode.close_tag}"


# --- tokenizer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModeTokens:
    """Token ids of the four tags, in the order of `TAGS`."""

    think: int
    end_think: int
    no_think: int
    end_no_think: int

    @property
    def decision(self) -> tuple[int, int]:
        """Ids of the two open tags, in the order of `MODES`."""
        return self.think, self.no_think


_ADD = "Add the tags with hgpo_trl.modes.add_mode_tokens(tokenizer, model)."


def mode_tokens(tokenizer: "PreTrainedTokenizerBase") -> ModeTokens:
    """Look up the four tags in a tokenizer: the check to make at start-up.

    Raises:
        UserError: a tag is not exactly one token wherever it stands, is the unknown token, is registered as special,
            does not survive decoding, or shares its id with another tag. The message names the tag and the remedy.
    """
    vocab = tokenizer.get_vocab()
    ids: list[int] = []
    for tag in TAGS:
        token_id = vocab.get(tag)
        if token_id is None or token_id == tokenizer.unk_token_id:
            alone = tokenizer.encode(tag, add_special_tokens=False)
            raise UserError(f"The tag {tag} is not a token of the tokenizer, it is encoded as {alone}. {_ADD}")
        if token_id in ids:
            other = TAGS[ids.index(token_id)]
            raise UserError(f"The tags {other} and {tag} share the token id {token_id}: give each its own token.")
        ids.append(token_id)
    for tag, token_id in zip(TAGS, ids, strict=True):
        _check_tag(tokenizer, tag, token_id)
    return ModeTokens(*ids)


def _check_tag(tokenizer: "PreTrainedTokenizerBase", tag: str, token_id: int) -> None:
    """UserError if a tag of the vocabulary is special, or is split or lost somewhere (see `mode_tokens`)."""
    _refuse_special(tokenizer, tag)
    # A word of the plain vocabulary may be found alone and yet be split, or lost, next to other text.
    for text in (tag, f"a {tag} b", f"\n{tag}\n", f"a{tag}b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids.count(token_id) != 1 or (text == tag and len(ids) != 1):
            raise UserError(f"The tag {tag} is not one token in {text!r}, which is encoded as {ids}. {_ADD}")
        if tag not in (decoded := tokenizer.decode(ids, skip_special_tokens=True)):
            raise UserError(
                f"The tag {tag} does not survive decoding, {text!r} comes back as {decoded!r}: "
                "correct the tokenizer's decoder."
            )


def _refuse_special(tokenizer: "PreTrainedTokenizerBase", tag: str) -> None:
    """UserError if a tag is registered as a special token."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tag in special.union(tokenizer.all_special_tokens):
        raise UserError(
            f"The tag {tag} is a special token and would vanish in decoding with skip_special_tokens=True: "
            're-register it as an ordinary added token ("special": false in tokenizer.json and '
            "tokenizer_config.json, not among extra_special_tokens)."
        )


# --- model --------------------------------------------------------------------------------------------------


def check_embeddings(model: "PreTrainedModel", tokens: ModeTokens) -> None:
    """Check that a model has a row for every tag in its input and, if it has one, its output embedding.

    Raises:
        UserError: a row is missing; the message names the tag, its id and the remedy.
    """
    for name, module in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if module is None:
            continue
        rows = _rows(module)
        for tag, token_id in zip(TAGS, astuple(tokens), strict=True):
            if token_id >= rows:
                raise UserError(
                    f"The tag {tag} has id {token_id}, but the model's {name} embedding has only {rows} rows. {_ADD}"
                )


def add_mode_tokens(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel | None" = None) -> int:
    """Make the four tags ordinary added tokens of a tokenizer, and give them embedding rows in its model. Idempotent.

    A model with spare rows (Qwen's are padded) keeps its size; another grows to the next multiple of 64, and
    `config.vocab_size` with it. A new tag's rows, input and output, are the mean of the rows of the pieces that spell
    it, `<` and `think>`, so that it starts inside the distribution of the known rows; where the tokenizer
    cannot spell it, of all rows in use. Rows of tags that the tokenizer already had are left alone, unless the model
    lacked them.

    Returns:
        The number of tags added to the tokenizer.

    Raises:
        UserError: a tag is registered as a special token (nothing is changed then), or `mode_tokens` finds a fault.
    """
    for tag in TAGS:
        _refuse_special(tokenizer, tag)
    known = tokenizer.get_vocab()
    missing = [tag for tag in TAGS if tag not in tokenizer.added_tokens_encoder]
    tokenizer.add_tokens(
        [AddedToken(tag, special=False, normalized=False, lstrip=False, rstrip=False) for tag in missing]
    )
    tokens = mode_tokens(tokenizer)
    if model is not None:
        _add_rows(model, tokenizer, tokens, known)
    return len(missing)


def _add_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: ModeTokens, known: dict[str, int]
) -> None:
    """Enlarge the embeddings if need be, and initialise the rows of tags that are new to the tokenizer or the model."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    old_rows = min(_rows(module) for module in embeddings if module is not None)
    ids = dict(zip(TAGS, astuple(tokens), strict=True))
    new = {tag: token_id for tag, token_id in ids.items() if tag not in known or token_id >= old_rows}
    if not new:
        return
    needed = max(ids.values()) + 1
    if needed > old_rows:
        model.resize_token_embeddings(needed, pad_to_multiple_of=64, mean_resizing=False)

    used = {token_id for token, token_id in known.items() if token_id < old_rows and token not in new}
    pieces = {token_id: _pieces(tokenizer, tag, used) for tag, token_id in new.items()}
    tensors = _per_token_parameters(model)
    import torch

    with torch.no_grad(), _gathered(tensors):
        for tensor in tensors:
            mean = _mean_row(tensor, used)
            tensor[old_rows:] = mean  # the padding: without it, random logits on tokens that do not exist
            for token_id, parts in pieces.items():
                tensor[token_id] = _mean_row(tensor, parts) if parts else mean


def _pieces(tokenizer: "PreTrainedTokenizerBase", tag: str, used: set[int]) -> list[int]:
    """The ids that spell a tag, or none if the tokenizer cannot spell it without unknown pieces."""
    parts = (tag[:1], tag[1:])  # in two, because it may already know the whole as one token
    ids = [token_id for part in parts for token_id in tokenizer.encode(part, add_special_tokens=False)]
    return ids if used.issuperset(ids) and tokenizer.unk_token_id not in ids else []


def _per_token_parameters(model: "PreTrainedModel") -> "list[nn.Parameter]":
    """Every parameter with one row per token: input weight, output weight and bias; a tied one once."""
    found: dict[int, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


def _mean_row(tensor: "Tensor", ids: Iterable[int]) -> "Tensor":
    import torch

    return tensor[list(ids)].mean(dim=0, dtype=torch.float32).to(tensor.dtype)


def _rows(module: "nn.Module") -> int:
    """Rows of an embedding, also where DeepSpeed ZeRO-3 has partitioned it and its local shape is 0."""
    module = getattr(module, "original_module", module)  # PEFT's wrapper would compute its weight, and copy it for that
    weight = cast("Tensor", module.weight)
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _gathered(parameters: "list[nn.Parameter]") -> AbstractContextManager:
    """Gather whole parameters under DeepSpeed ZeRO-3 and broadcast rank 0's changes; do nothing elsewhere."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
