"""The marks of the modes in a tokenizer and in a model: their token ids, the place of the decision, embedding rows.

A response's opening is the model's decision. This library's own tags have to be exactly one token each, and ordinary
ones: TRL decodes completions with `skip_special_tokens=True`, so a special token would vanish before the rewards see
it. Other formats' openings may have several tokens; the decision stands where the two part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes.format import LHRM, MODES, PRESETS, TAGS, Mode, ModeFormat, as_format

if TYPE_CHECKING:  # only functions on models need them, and importing them takes seconds
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# --- tokenizer ----------------------------------------------------------------------------------------------


OTHER = -1  # in `ModeTokens.decision`: every token but the other mode's


@dataclass(frozen=True, slots=True)
class ModeTokens:
    """Token ids of a format's marks. Pairs are in the order of `MODES`."""

    mode_format: ModeFormat
    openings: tuple[tuple[int, ...], tuple[int, ...]]
    end_think: int  # ends the reasoning
    end_no_think: int | None = None  # ends a no-think answer; None where the end of the turn does

    @classmethod
    def of_tags(cls, think: int, end_think: int, no_think: int, end_no_think: int) -> "ModeTokens":
        """Ids of this library's own tags, in the order of `TAGS`."""
        return cls(LHRM, ((think,), (no_think,)), end_think, end_no_think)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The beginning that both openings share."""
        return tuple(commonprefix(self.openings))  # noqa: RUF071 (tokens, not paths)

    @property
    def decision(self) -> tuple[int, int]:
        """The tokens at which the openings part; OTHER for an opening that ends there."""
        place = len(self.prefix)
        think, no_think = (opening[place] if place < len(opening) else OTHER for opening in self.openings)
        return think, no_think

    @property
    def forced(self) -> tuple[int, int]:
        """Tokens that a response of each mode is given: its opening, or at least all up to the decision."""
        think, no_think = (max(len(opening), len(self.prefix) + 1) for opening in self.openings)
        return think, no_think

    @property
    def think(self) -> int:
        """The token that decides for thinking."""
        return self.decision[0]

    @property
    def no_think(self) -> int:
        """The token that decides against it."""
        return self.decision[1]

    @property
    def beginnings(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Every beginning of an opening, with the tokens that follow it in one: where to read π(m | q) by steps."""
        found: dict[tuple[int, ...], tuple[int, ...]] = {}
        for opening in self.openings:
            for place, token in enumerate(opening):
                known = found.get(opening[:place], ())
                found[opening[:place]] = known if token in known else (*known, token)
        return found

    def probabilities(self, log_probs: Mapping[tuple[int, ...], float]) -> tuple[float, float]:
        """π(think | q) and π(no_think | q) from the log-probability of each beginning's last token after the others."""

        def follow(opening: tuple[int, ...]) -> float:
            return math.exp(sum(log_probs[opening[: place + 1]] for place in range(len(opening))))

        think, no_think = (
            follow(opening) - (follow((*opening, other)) if token == OTHER else 0.0)
            for opening, token, other in zip(self.openings, self.decision, reversed(self.decision), strict=True)
        )
        return think, no_think

    def picked(self, greedy: Mapping[tuple[int, ...], int]) -> Mode | None:
        """The mode that the most likely token after each beginning leads to; None if it is neither."""
        for mode, opening, token, other in zip(
            MODES, self.openings, self.decision, reversed(self.decision), strict=True
        ):
            follows = all(greedy[opening[:place]] == opening[place] for place in range(len(opening)))
            if follows and (token != OTHER or greedy[opening] != other):
                return mode
        return None

    def chosen(self, response: Sequence[int]) -> Mode | None:
        """The mode that a response's tokens decide for; None if they go another way before or at the decision."""
        place = len(self.prefix)
        if len(response) <= place or tuple(response[:place]) != self.prefix:
            return None
        for mode, token, other in zip(MODES, self.decision, reversed(self.decision), strict=True):
            if response[place] == token or (token == OTHER and response[place] != other):
                return mode
        return None

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token of the marks, once; of this library's own tags in the order of `TAGS`."""
        think, no_think = self.openings
        ends = () if self.end_no_think is None else (self.end_no_think,)
        return tuple(dict.fromkeys((*think, self.end_think, *no_think, *ends)))


_ADD = "Add the tags with hgpo_trl.modes.add_mode_tokens(tokenizer, model)."


def mode_tokens(tokenizer: "PreTrainedTokenizerBase") -> ModeTokens:
    """Look up the marks of a tokenizer's format (`format_of`): the check to make at start-up.

    Raises:
        UserError: one of this library's tags is not exactly one token wherever it stands, is the unknown token, is
            registered as special, does not survive decoding, or shares its id with another tag; or the openings of
            another format do not survive encoding and decoding, or do not part. The message names it and the remedy.
    """
    mode_format = format_of(tokenizer)
    return _tag_tokens(tokenizer) if mode_format == LHRM else _format_tokens(tokenizer, mode_format)


def _tag_tokens(tokenizer: "PreTrainedTokenizerBase") -> ModeTokens:
    """Ids of this library's own tags; UserError as `mode_tokens`."""
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
    return ModeTokens.of_tags(*ids)


def _format_tokens(tokenizer: "PreTrainedTokenizerBase", mode_format: ModeFormat) -> ModeTokens:
    """Ids of the marks of another model's format; UserError as `mode_tokens`."""
    for mark in (mode_format.think, mode_format.no_think, mode_format.end_reasoning, mode_format.end_no_think):
        for part in mark.split():
            _refuse_special(tokenizer, part)
    think, no_think = (_encoded(tokenizer, mode_format, mode_format.opening(mode)) for mode in MODES)
    if think == no_think:
        raise UserError(
            f"mode_format {mode_format.name}: the tokenizer encodes both openings as {list(think)}, so that no token "
            "shows the mode. Give openings that differ by more than blanks, or make tokens of their marks."
        )
    _check_boundary(tokenizer, mode_format)
    ends: list[int | None] = []
    for mode in MODES:
        mark = mode_format.end(mode)
        ids = _encoded(tokenizer, mode_format, mark)
        if mark and len(ids) != 1:
            raise UserError(
                f"mode_format {mode_format.name}: {mark} is not one token, it is encoded as {list(ids)}. Make it an "
                f"ordinary added token (tokenizer.add_tokens([{mark!r}])) and train it, or name another format."
            )
        ends.append(ids[0] if mark else None)
    end_think, end_no_think = ends
    assert end_think is not None  # the end of reasoning is never blank
    return ModeTokens(mode_format, (think, no_think), end_think, end_no_think)


def _check_boundary(tokenizer: "PreTrainedTokenizerBase", mode_format: ModeFormat) -> None:
    """UserError if the tokenizer joins an opening with the end of a prompt.

    Its forced tokens would then be others than those of a prompt that the chat template ends with the opening.
    """
    if tokenizer.chat_template is None:
        return
    end = prompt_end(tokenizer)
    if (opened := mode_format.opened_by(end)) is not None:
        end = end.removesuffix(mode_format.opening(opened))
    before = tokenizer.encode(end, add_special_tokens=False)
    for opening in map(mode_format.opening, mode_format.by_length):
        ids = tokenizer.encode(opening, add_special_tokens=False)
        if (whole := tokenizer.encode(end + opening, add_special_tokens=False)) != [*before, *ids]:
            raise UserError(
                f"mode_format {mode_format.name}: behind the chat template's {end!r} the tokenizer encodes the opening "
                f"{opening!r} as {whole}, but alone as {ids}. Give openings that begin with a token of their own, such "
                "as <think>."
            )


def _encoded(tokenizer: "PreTrainedTokenizerBase", mode_format: ModeFormat, text: str) -> tuple[int, ...]:
    """The ids of a mark; UserError unless they spell it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if str(decoded).split() != text.split() and "".join(str(decoded).split()) != "".join(text.split()):
        raise UserError(
            f"mode_format {mode_format.name}: {text!r} is encoded as {ids}, which is decoded as {decoded!r}. Name the "
            f"format that the model was trained with: one of {', '.join(PRESETS)}, or its texts."
        )
    return tuple(ids)


# --- the format of a tokenizer ------------------------------------------------------------------------------

_FIELD = "mode_format"  # of tokenizer_config.json


def declare_format(tokenizer: "PreTrainedTokenizerBase", mode_format: ModeFormat) -> None:
    """Make a format that of a tokenizer; it is saved with it."""
    tokenizer.init_kwargs[_FIELD] = mode_format.declaration()


def is_declared(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer declares its format."""
    return tokenizer.init_kwargs.get(_FIELD) is not None


def format_of(tokenizer: "PreTrainedTokenizerBase") -> ModeFormat:
    """Find a tokenizer's format: the one that it declares, or the one that its tokens and chat template show.

    A tokenizer with the tag <no_think> has this library's format. Otherwise the chat template tells: the ends of its
    generation prompts with thinking on and off (`enable_thinking`, `thinking`) are those of a preset, or it opens a
    reasoning trace whatever it is told (`r1`). Where none of this holds, it is this library's format.

    Raises:
        UserError: the declared format is none (see `as_format`).
    """
    declared = tokenizer.init_kwargs.get(_FIELD)
    if declared is not None:
        return as_format(declared)
    known = [tokenizer.convert_tokens_to_ids(tag) not in (None, tokenizer.unk_token_id) for tag in TAGS]
    if tokenizer.chat_template is None or known != [True, True, False, False]:
        return LHRM
    return _shown_by_template(tokenizer) or LHRM


def prompt_end(tokenizer: "PreTrainedTokenizerBase", **settings: Any) -> str:
    """What a chat template writes between a question and its response.

    Raises:
        Any error of the template.
    """
    question = [{"role": "user", "content": "?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **settings)
    return str(prompt).rpartition("?")[2]


def _shown_by_template(tokenizer: "PreTrainedTokenizerBase") -> ModeFormat | None:
    """The preset whose openings a chat template writes; None if none is."""
    from jinja2 import TemplateError

    try:
        on, off = (prompt_end(tokenizer, enable_thinking=thinks, thinking=thinks) for thinks in (True, False))
    except (TemplateError, TypeError, ValueError, KeyError, IndexError):  # a template may raise any of them
        return None
    if on == off:
        return PRESETS["r1"] if on.rstrip().endswith(Mode.THINK.open_tag) else None
    for name in ("qwen3", "smollm3", "deepseek-v3.1"):
        preset = PRESETS[name]
        turn = off.removesuffix(preset.no_think)
        if turn != off and Mode.THINK.open_tag not in turn and on in (turn, turn + preset.think):
            return preset
    return None


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
    own = tokens.mode_format == LHRM
    names = TAGS if own else [f"token of the format {tokens.mode_format.name}"] * len(tokens.ids)
    remedy = _ADD if own else "The tokenizer is not this model's: name the model's own."
    for name, module in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if module is None:
            continue
        rows = _rows(module)
        for tag, token_id in zip(names, tokens.ids, strict=True):
            if token_id >= rows:
                raise UserError(
                    f"The tag {tag} has id {token_id}, but the model's {name} embedding has only {rows} rows. {remedy}"
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
    tokens = _tag_tokens(tokenizer)
    if model is not None:
        _add_rows(model, tokenizer, tokens, known)
    return len(missing)


def _add_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: ModeTokens, known: dict[str, int]
) -> None:
    """Enlarge the embeddings if need be, and initialise the rows of tags that are new to the tokenizer or the model."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    old_rows = min(_rows(module) for module in embeddings if module is not None)
    ids = dict(zip(TAGS, tokens.ids, strict=True))
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
