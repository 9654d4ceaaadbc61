"""The chat template of a hybrid-reasoning model: the model picks the mode, or the caller forces one.

    tokenizer.apply_chat_template(messages, add_generation_prompt=True)                           # the model picks
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, thinking_mode="think")    # or "no_think"
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)    # as for Qwen3

One Jinja body (`templates/lhrm.jinja`) serves three dialects of turns, chosen from the tokens that the tokenizer has:
ChatML, Llama 3 headers, and plain text. A forced mode adds its tag's id to the end of the prompt and changes nothing
else. In training the tag is part of the response, so prompt and prompt + response share the prompt's tokens.
"""

import json
from dataclasses import asdict, dataclass
from importlib import resources

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hgpo_trl.modes import MODES

_BODY = resources.files("hgpo_trl").joinpath("templates/lhrm.jinja").read_text(encoding="utf-8")

# Tokens that pad well, best first: they never end a turn of a dialect. The unknown token is the last resort.
_PADS = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<|end_of_text|>", "<pad>", "[PAD]")


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How turns are written. The fields are the variables of the Jinja body."""

    bos: str  # before everything
    headers: dict[str, str]  # role -> what begins its turn
    answer_lead: str  # between the assistant's header and an answer without a tag
    input_end: str  # what ends a system or user turn
    stop: str  # the token that ends an assistant turn, and generation
    turn_break: str  # between two turns


def build_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer.

    Raises:
        ValueError: turns have to be written in plain text, and the tokenizer has no `eos_token` to end them.
    """
    variables = asdict(_dialect(tokenizer))
    preamble = (f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in variables.items())
    return "".join(preamble) + _BODY


def set_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the template, the `eos_token` that ends its turns, and a `pad_token` other than that.

    A model's `generation_config.eos_token_id` is not the tokenizer's: set it where the two are saved together.

    Raises:
        ValueError: as `build_chat_template`.
    """
    tokenizer.chat_template = build_chat_template(tokenizer)
    stop = _dialect(tokenizer).stop
    pads = (tokenizer.pad_token, *_PADS, tokenizer.eos_token, tokenizer.unk_token)
    tokenizer.eos_token = stop
    # Padding with the stop token would let a collator that masks by id mask the end of the response too.
    tokenizer.pad_token = next((pad for pad in pads if pad and pad != stop and _has(tokenizer, pad)), stop)


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


def _dialect(tokenizer: PreTrainedTokenizerBase) -> _Dialect:
    """The dialect that the tokenizer has the tokens for; ValueError as `build_chat_template`."""
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
        raise ValueError("eos_token is not set: the tokenizer needs one to end the assistant's turn; set it first.")
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
