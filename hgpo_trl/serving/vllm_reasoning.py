"""The reasoning parser of hybrid-reasoning models for vLLM's OpenAI-compatible server.

    --reasoning-parser-plugin /path/to/this/file.py --reasoning-parser lhrm

`hgpo-trl serve` sets both. A think response arrives as `reasoning` and `content`, a no-think response as `content`
alone: its `reasoning` is null, or never streamed. A think response always has `reasoning`, even if it is "".
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.reasoning.basic_parsers import DeltaMessage  # where every supported version has it

from hgpo_trl.modes import LHRM, MODES, Mode, mode_tokens, prompt_end
from hgpo_trl.serving.splitter import ResponseSplitter, split_whole

NAME = "lhrm"
_tokens = lru_cache(maxsize=8)(mode_tokens)  # a parser is built for each response


def forced_mode(template_variables: Mapping[str, Any] | None, tokenizer: Any = None) -> Mode | None:
    """The mode that the chat template forces, given a request's `chat_template_kwargs`; None where the model picks.

    A value that the template refuses gives None, too: the request fails there, with the template's own message.

    Args:
        tokenizer: with the model's own chat template, which is asked; None: with this library's.
    """
    variables = template_variables or {}
    if tokenizer is not None:
        return _opened(tokenizer, tuple((name, variables.get(name)) for name in ("enable_thinking", "thinking")))
    if (mode := variables.get("thinking_mode")) is not None:
        return Mode(mode) if mode in tuple(Mode) else None
    if (thinks := variables.get("enable_thinking")) is not None:
        return Mode.THINK if thinks else Mode.NO_THINK
    return None


@lru_cache(maxsize=64)
def _opened(tokenizer: Any, choices: tuple[tuple[str, Any], ...]) -> Mode | None:
    """The mode that a model's own chat template opens."""
    end = prompt_end(tokenizer, **{name: value for name, value in choices if value is not None})
    return _tokens(tokenizer).mode_format.opened_by(end)


class HybridReasoningParser(ReasoningParser):
    """One response's parser. vLLM builds it with the tokenizer and `chat_template_kwargs=`.

    Raises:
        ValueError: the tokenizer lacks a mode tag (`hgpo_trl.modes.mode_tokens`); the server does not start then.
    """

    # vLLM asks such a parser for the text it held back at the end of a stream, and passes all text through it until
    # `has_engine_confirmed_reasoning_end`, which stays False: content has tags and blanks to take out, too.
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._tokens = _tokens(tokenizer)
        self._format = self._tokens.mode_format
        self._forced = forced_mode(
            kwargs.get("chat_template_kwargs"), None if self._format == LHRM else self.model_tokenizer
        )
        self._splitter: ResponseSplitter | None = None

    # --- text ---

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Split a whole response into (reasoning, content); None for a part that never began."""
        fields = split_whole(model_output, self._forced, self._format)
        return fields.get("reasoning"), fields.get("content")

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Return the next piece of a response, as far as its field is known."""
        if self._splitter is None:
            self._splitter = ResponseSplitter(self._forced, self._format)
        fields = self._splitter.feed(delta_text)
        return DeltaMessage.model_validate(fields) if fields else None

    def finish_streaming(self) -> DeltaMessage | None:
        """Return the text held back, at the end of a stream."""
        fields = self._splitter.finish() if self._splitter else {}
        return DeltaMessage.model_validate(fields) if fields else None

    # --- token ids ---

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of a response between `<think>` and `</think>`, or to its end."""
        return len(self._sections(list(token_ids))[0])

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens of a response's content, without the mode's tags."""
        return self._sections(input_ids)[1]

    def _sections(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A response's token ids as (reasoning, content)."""
        mode, tokens = self._forced, self._tokens
        if mode is None:
            opened = self._format.opened(self._text(ids))
            if opened is None:
                return [], ids
            mode = opened[0]
            start = next(i for i in range(len(ids) + 1) if self._format.opened(self._text(ids[:i])) is not None)
            opening = tokens.openings[MODES.index(mode)]
            start = len(opening) if tuple(ids[: len(opening)]) == opening else start
            ids = ids[start:]
        close = tokens.end_think if mode is Mode.THINK else tokens.end_no_think
        end = ids.index(close) if close in ids else len(ids)
        before, after = ids[:end], ids[end + 1 :]
        return (before, after) if mode is Mode.THINK else ([], before + after)

    def _text(self, ids: list[int]) -> str:
        return str(self.model_tokenizer.decode(ids, skip_special_tokens=True))

    # --- structured outputs ---

    @property
    def reasoning_start_str(self) -> str:
        return self._format.think.strip() or Mode.THINK.open_tag

    @property
    def reasoning_end_str(self) -> str:
        return self._format.end(Mode.THINK)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """False: vLLM asks this of prompts, and would pass the response through unparsed."""
        return False

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether content begins after these tokens, and with it a grammar; False for the one that parses the text."""
        end, (_, no_think) = self._tokens.end_think, self._tokens.openings
        ends = {end} if end in no_think else {end, no_think[-1]}
        return self._splitter is None and not ends.isdisjoint(delta_ids)

    def adjust_request(self, request: Any) -> Any:
        """Start a grammar at once if the prompt forces no-think: then no token marks the beginning of the content."""
        format_type = getattr(getattr(request, "response_format", None), "type", "text")
        grammar = getattr(request, "structured_outputs", None) is not None or format_type != "text"
        if grammar and self._forced is Mode.NO_THINK:
            request.include_reasoning = False
        return request


ReasoningParserManager.register_module(NAME, module=HybridReasoningParser)
