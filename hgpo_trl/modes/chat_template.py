"""The chat template of a hybrid-reasoning model: the model picks the mode, or the caller forces one.

    tokenizer.apply_chat_template(messages, add_generation_prompt=True)                           # the model picks
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, thinking_mode="think")    # or "no_think"
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)    # as for Qwen3

A model that has a chat template keeps the turns that it knows. Where they are ChatML's, Llama 3's or plain text, one
Jinja body (`templates/lhrm.jinja`) writes them, as it does for a model without a template, by the tokens that the
tokenizer has. Any other template is kept and the modes are put around it (`templates/own_turns.jinja`): a reasoning
trace that its generation prompt opens is left to the response. A forced mode adds its tag's id to the end of the prompt
and changes nothing else. In training the tag is part of the response, so prompt and prompt + response share the
prompt's tokens.
"""

import json
import re
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import LHRM, MODES, PRESETS, as_format, declare_format, format_of, is_declared, prompt_end


def _template(name: str) -> str:
    return resources.files("hgpo_trl").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")


_MODES, _DIALECT_TURNS = _template("modes"), _template("lhrm")
_OWN = "{# THE MODEL'S OWN TEMPLATE #}"
_BEFORE_OWN, _AFTER_OWN = _template("own_turns").split(_OWN)
_BEFORE_AUTO, _AFTER_AUTO = _template("auto").split(_OWN)

# Tokens that pad well, best first: they never end a turn of a dialect. The unknown token is the last resort.
_PADS = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|end_of_text|>", "<pad>", "[PAD]")

# A reasoning trace that is opened, or also closed, at the end of a generation prompt.
_OPENING = re.compile(r"(?:<think>\s*(?:</think>\s*)?|</think>\s*)?\Z")
_EMPTY_TRACE = re.compile(r"<think>\s*</think>\s*")  # as some templates write into earlier turns
_REMEDY = (
    "Name one with chat_template_path whose generation prompt takes thinking_mode (auto, think, no_think) and ends "
    "with the mode's tag; or remove the tokenizer's own (chat_template.jinja) to have turns in plain text."
)


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How turns are written. The fields are the variables of the Jinja body."""

    bos: str  # before everything
    headers: dict[str, str]  # role -> what begins its turn
    answer_lead: str  # between the assistant's header and an answer without a tag
    input_end: str  # what ends a system or user turn
    stop: str  # the token that ends an assistant turn, and generation
    turn_break: str  # between two turns


@dataclass(frozen=True, slots=True)
class _OwnTurns:
    """How a model's own template writes turns. The fields, the first apart, are the variables of the Jinja body."""

    source: str
    lhrm_opening: str  # of a reasoning trace, at the end of the generation prompt
    lhrm_lead: str  # between the generation prompt and an answer without a tag
    lhrm_stop: str  # the token that ends an assistant turn, and generation


def build_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Build the template for a tokenizer; it keeps the turns of the tokenizer's own.

    Raises:
        UserError: the tokenizer's own template cannot take the modes; or there is none, turns have to be written in
            plain text, and the tokenizer has no `eos_token` to end them.
    """
    return _template_and_stop(tokenizer)[0]


def set_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the template, the `eos_token` that ends its turns, and a `pad_token` other than that.

    A model's `generation_config.eos_token_id` is not the tokenizer's: set it where the two are saved together.

    Raises:
        UserError: as `build_chat_template`.
    """
    tokenizer.chat_template, stop = _template_and_stop(tokenizer)
    pads = (tokenizer.pad_token, *_PADS, tokenizer.eos_token, tokenizer.unk_token)
    tokenizer.eos_token = stop
    # Padding with the stop token would let a collator that masks by id mask the end of the response too.
    tokenizer.pad_token = next((pad for pad in pads if pad and pad != stop and _has(tokenizer, pad)), stop)


def read_template(path: str) -> str:
    """Read the template that `chat_template_path` names; UserError unless it is a Jinja file."""
    file = Path(path)
    if file.suffix not in (".jinja", ".j2") or not file.is_file():
        raise UserError(
            f"chat_template_path={path!r} is not a file that ends in .jinja. Name one; a model's own template is kept "
            "without being named."
        )
    return file.read_text(encoding="utf-8")


def has_thinking_modes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template takes `thinking_mode`: the forced prompts are the automatic one plus the tag."""
    if tokenizer.chat_template is None:
        return False
    message = [{"role": "user", "content": "?"}]

    def prompt(mode: str) -> object:
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, thinking_mode=mode)

    try:
        return all(prompt(mode) == f"{prompt('auto')}{mode.open_tag}" for mode in MODES)
    except (TemplateError, TypeError, ValueError):  # a template that insists on more than one user message
        return False


def opened_mode(tokenizer: PreTrainedTokenizerBase) -> str:
    """The opening, of the tokenizer's format, with which its chat template ends a generation prompt; empty if none.

    Such a prompt leaves the model nothing to decide.
    """
    mode_format = format_of(tokenizer)
    mode = None if tokenizer.chat_template is None else mode_format.opened_by(prompt_end(tokenizer))
    return "" if mode is None else mode_format.opening(mode)


def let_model_decide(tokenizer: PreTrainedTokenizerBase) -> str:
    """Have a model's own chat template leave out the opening of a mode, unless the caller asks for a mode.

    `enable_thinking` and `thinking` still mean what the template makes of them.

    Returns:
        The opening that it wrote by itself; empty where it wrote none, and the template is as it was.

    Raises:
        UserError: the template cannot be put into another one.
    """
    opening = opened_mode(tokenizer)
    if not opening or format_of(tokenizer) == LHRM:
        return ""
    before = [prompt_end(tokenizer, enable_thinking=thinks, thinking=thinks) for thinks in (True, False)]
    auto = prompt_end(tokenizer).removesuffix(opening)
    own = _without_marks(tokenizer.get_chat_template())
    tokenizer.chat_template = _assignments({"lhrm_opening": opening}) + _BEFORE_AUTO + own + _AFTER_AUTO
    after = [prompt_end(tokenizer, enable_thinking=thinks, thinking=thinks) for thinks in (True, False)]
    if (prompt_end(tokenizer), after) != (auto, before):
        raise UserError(
            f"The tokenizer's chat template opens a mode by itself ({opening!r}), and cannot be put into another one "
            "that does not. Write a template whose generation prompt ends before it, and set it as the tokenizer's."
        )
    return opening


FORMATS = f"{', '.join(PRESETS)}, or a mapping of texts (docs/formats.md)"
FORMAT_HELP = f"Marks of the modes: {FORMATS}; null: as the tokenizer shows."


def settle_format(tokenizer: PreTrainedTokenizerBase, given: Any = None) -> str:
    """Settle a tokenizer's format, and have its chat template leave the decision to the model.

    Args:
        given: a recipe's `mode_format`; None: the tokenizer shows it (`format_of`).

    Returns:
        A line for the user about what was found or changed; empty if there is nothing to say.

    Raises:
        UserError: `given` is no format, or the template cannot leave the decision to the model.
    """
    if given is not None:
        declare_format(tokenizer, as_format(given))
    mode_format = format_of(tokenizer)
    if mode_format == LHRM:
        return ""
    declared = is_declared(tokenizer)
    declare_format(tokenizer, mode_format)
    opening = let_model_decide(tokenizer)
    notes = [] if declared else ["the chat template shows it"]
    if opening:
        notes.append(f"the chat template opens a mode by itself, {opening!r}, which is left to the model here")
    return f"mode_format: {mode_format.name} ({'; '.join(notes)})" if notes else ""


def ensure_thinking_modes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a chat template that takes `thinking_mode`, unless it has one.

    Raises:
        UserError: see `set_chat_template`.
    """
    if not has_thinking_modes(tokenizer):
        set_chat_template(tokenizer)


def _template_and_stop(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The template, and the token that ends its assistant turns; UserError as `build_chat_template`."""
    dialect = _dialect(tokenizer)
    if tokenizer.chat_template is not None:
        own = _read_own(tokenizer)
        if has_thinking_modes(tokenizer):
            return own.source, own.lhrm_stop
        if dialect is None or not _writes(tokenizer, own, dialect):
            return _around(tokenizer, own), own.lhrm_stop
    if dialect is None:
        raise UserError("eos_token is not set: the tokenizer needs one to end the assistant's turn; set it first.")
    return _in_dialect(dialect), dialect.stop


def _in_dialect(dialect: _Dialect) -> str:
    return _assignments(asdict(dialect)) + _MODES + _DIALECT_TURNS


def _assignments(variables: dict[str, object]) -> str:
    return "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in variables.items()
    )


# --- a model's own template -----------------------------------------------------------------------------------

_QUESTION = {"role": "user", "content": "Question"}
_ANSWER = {"role": "assistant", "content": "Answer"}
_CONVERSATION = [_QUESTION, _ANSWER, {"role": "user", "content": "Request"}]


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    """Render a conversation with a template; UserError if the template fails."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:  # a template may raise any of them
        raise UserError(
            f"The tokenizer's chat template fails at a question and an answer: {error}. {_REMEDY}"
        ) from error


def _read_own(tokenizer: PreTrainedTokenizerBase) -> _OwnTurns:
    """Read what the tokenizer's template writes around an answer; UserError if the mode tags do not fit there."""
    source = tokenizer.get_chat_template()
    prompt = _render(tokenizer, source, [_QUESTION], prompt=True)
    whole = _render(tokenizer, source, [_QUESTION, _ANSWER], prompt=False)
    opening = _OPENING.search(prompt)
    assert opening is not None  # perhaps an empty one
    prompt = prompt[: opening.start()]
    lead, found, end = whole.removeprefix(prompt).partition(_ANSWER["content"])
    if not whole.startswith(prompt) or not found or _OPENING.sub("", lead).strip():
        raise UserError(
            f"The tokenizer's chat template asks for a response with {prompt!r}, but writes the answer in {whole!r}: "
            f"a mode's tag has no place between the two. {_REMEDY}"
        )
    tokens = sorted({*tokenizer.get_added_vocab(), *filter(None, [tokenizer.eos_token])}, key=len, reverse=True)
    stop = next((token for token in tokens if end.lstrip().startswith(token)), None)
    if stop is None:
        raise UserError(
            f"The tokenizer's chat template ends an assistant's turn with {end!r}, which is none of the tokenizer's "
            f"special tokens: generation would not end with the response. {_REMEDY}"
        )
    return _OwnTurns(source, opening.group(), "" if lead.strip() else lead, stop)


def _writes(tokenizer: PreTrainedTokenizerBase, own: _OwnTurns, dialect: _Dialect) -> bool:
    """Whether a template writes the turns of a dialect, behind its own beginning, such as a default system prompt.

    Such a beginning is not kept: "Please reason step by step" in every prompt would favour one of the modes.
    """
    written = _render(tokenizer, own.source, _CONVERSATION, prompt=True).removesuffix(own.lhrm_opening)
    ours = _render(tokenizer, _in_dialect(dialect), _CONVERSATION, prompt=True)
    return _EMPTY_TRACE.sub("", written).endswith(ours.removeprefix(dialect.bos))


def _around(tokenizer: PreTrainedTokenizerBase, own: _OwnTurns) -> str:
    """The modes around a model's own template.

    Raises:
        UserError: a conversation would not be written as the template itself writes it.
    """
    variables = {name: value for name, value in asdict(own).items() if name != "source"}
    template = _assignments(variables) + _MODES + _BEFORE_OWN + _without_marks(own.source) + _AFTER_OWN
    expected = _render(tokenizer, own.source, _CONVERSATION, prompt=True).removesuffix(own.lhrm_opening)
    if _render(tokenizer, template, _CONVERSATION, prompt=True) != expected:
        raise UserError(f"The tokenizer's chat template cannot be put into another one that adds the modes. {_REMEDY}")
    return template


def _without_marks(source: str) -> str:
    """A template that can stand in another one.

    The other one marks which tokens to train on; marks of its own would add earlier answers. Jinja drops the last
    newline of a template, which is not the last one there.
    """
    return re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})", _as_if, source.removesuffix("\n"))


def _as_if(mark: re.Match[str]) -> str:
    return f"{mark[1]}{'endif' if mark[2] else 'if true'}"


# --- dialects -------------------------------------------------------------------------------------------------


def _dialect(tokenizer: PreTrainedTokenizerBase) -> _Dialect | None:
    """The dialect whose tokens the tokenizer has; None if it cannot end a turn even of plain text."""
    roles = ("system", "user", "assistant")
    bos = tokenizer.bos_token or ""
    if _has(tokenizer, "<|im_start|>", "<|im_end|>"):
        return _Dialect(
            # Some ChatML tokenizers name a `bos_token` that their model never saw in front of a chat.
            bos=bos if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else "",
            headers={role: f"<|im_start|>{role}\n" for role in roles},
            answer_lead="",
            input_end="<|im_end|>",
            stop="<|im_end|>",
            turn_break="\n",
        )
    if _has(tokenizer, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        return _Dialect(
            bos=bos,
            headers={role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in roles},
            answer_lead="",
            input_end="<|eot_id|>",
            stop="<|eot_id|>",
            turn_break="",
        )
    if not tokenizer.eos_token:
        return None
    return _Dialect(
        bos=bos,
        headers={"system": "System: ", "user": "User: ", "assistant": "Assistant:"},
        answer_lead=" ",  # but none before a tag, which follows the generation prompt at once
        input_end="",
        stop=str(tokenizer.eos_token),
        turn_break="\n",
    )


def _has(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> bool:
    """Whether each of these is a single token."""
    vocab = tokenizer.get_vocab()
    return all(t in vocab and tokenizer.encode(t, add_special_tokens=False) == [vocab[t]] for t in tokens)
