"""Use a hybrid-reasoning model with Transformers: the model picks the mode, perhaps with a bias, or the caller does.

    model = HybridModel.from_pretrained("runs/chain-sum/hgpo")
    model("a = 3 b = 6 sum mod 10 ?")                                 # Generation(mode=..., reasoning=..., answer=...)
    model(["a = 3 sum mod 10 ?", conversation], mode="no_think")      # a list gives a list
    model(questions, decision_bias=-2.0)                              # think less often

`hgpo_trl.modes.decision` reads the distribution of the first token, the decision; `hgpo_trl.modes.split_response`
splits the text.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hgpo_trl.common.compat import prepend_to_stream
from hgpo_trl.common.errors import UserError
from hgpo_trl.inference.decoding import CloseReasoning, Decoder, render, until_end
from hgpo_trl.inference.limits import Limits, ThinkBudget
from hgpo_trl.modes import (
    LHRM,
    MODES,
    Mode,
    ModeFormat,
    ModeTokens,
    check_embeddings,
    format_of,
    mode_tokens,
    split_response,
)
from hgpo_trl.modes.chat_template import has_thinking_modes, opened_mode, settle_format

AUTO = "auto"  # the mode in which the model picks
CHOICES = (AUTO, *(mode.value for mode in MODES))

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Generation:
    """One response. Tokens are counted as in evaluation: `num_tokens` is all of them, decision and end included."""

    mode: Mode | None  # None: the first token is neither mode, and all of the text is the answer
    reasoning: str
    answer: str
    text: str  # as the model wrote it, tags included
    num_tokens: int
    reasoning_tokens: int  # between <think> and </think>
    answer_tokens: int  # of the answer, without tags and end token
    truncated: bool  # ran out of tokens before its end
    prob_think: float | None  # π(think | q), of the model itself at temperature 1; None where the mode was forced


def _as_generation(decoder: Decoder, generated: list[int], prob_think: float | None) -> Generation:
    tokens, ends = decoder.tokens, decoder.ends
    generated, truncated = until_end(generated, ends)
    text = str(decoder.tokenizer.decode(generated, skip_special_tokens=True))
    response = split_response(text, tokens.mode_format)
    body = [token for token in generated if token not in ends]
    before, after = body, list[int]()
    if response.mode is not None:
        start = len(tokens.openings[MODES.index(response.mode)])
        close = tokens.end_think if response.mode is Mode.THINK else tokens.end_no_think
        place = body.index(close, start) if close in body[start:] else len(body)
        before, after = body[start:place], body[place + 1 :]
    reasoning, answer = (before, after) if response.mode is Mode.THINK else ([], before)
    return Generation(
        mode=response.mode,
        reasoning=response.reasoning,
        answer=response.answer,
        text=text,
        num_tokens=len(generated),
        reasoning_tokens=len(reasoning),
        answer_tokens=len(answer),
        truncated=truncated,
        prob_think=prob_think,
    )


def check_model(model: Any, tokenizer: PreTrainedTokenizerBase) -> ModeTokens:
    """Return the tags' ids; UserError if model or tokenizer lacks a tag, or the template does not know the modes."""
    tokens = mode_tokens(tokenizer)
    check_embeddings(model, tokens)
    if tokens.mode_format != LHRM:
        if opening := opened_mode(tokenizer):
            raise UserError(
                f"The tokenizer's chat template opens a mode by itself ({opening!r}), so that the model has nothing to "
                "decide. hgpo_trl.modes.chat_template.settle_format(tokenizer) changes that."
            )
    elif not has_thinking_modes(tokenizer):
        raise UserError(
            "The tokenizer's chat template takes no thinking_mode, or there is none: a hybrid model has been through "
            "`hgpo-trl hft`, which installs one (hgpo_trl.modes.chat_template.set_chat_template(tokenizer))."
        )
    return tokens


def check_settings(mode: str, decision_bias: float, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise UserError for the first setting that `generate` cannot use."""
    if mode not in CHOICES:
        raise UserError(f"mode must be one of {', '.join(CHOICES)}; got {mode!r}.")
    if not math.isfinite(decision_bias):
        raise UserError(f"decision_bias must be a finite number; got {decision_bias}. Force a mode with mode instead.")
    if max_new_tokens < 2:
        raise UserError(f"max_new_tokens must be at least 2, the decision token and one more; got {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be a finite number of at least 0, which is greedy; got {temperature}.")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p must lie in (0, 1]; got {top_p}.")


class TooLongError(UserError):
    """A conversation leaves the model no positions for a response."""


def _room(model: Any, longest_prompt: int, tokens: ModeTokens) -> float:
    """Positions that the model has for a response; TooLongError if there are none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = math.inf if positions is None else positions - longest_prompt
    if room <= max(tokens.forced):
        raise TooLongError(
            f"The longest prompt has {longest_prompt} tokens and the model {positions} positions "
            "(max_position_embeddings): nothing is left for a response. Shorten the conversation."
        )
    return room


def _conversation(prompt: str | Conversation) -> Conversation:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[str | Conversation],
    *,
    mode: str = AUTO,
    decision_bias: float = 0.0,
    max_new_tokens: int = 35_000,
    max_think_tokens: int | None = None,
    max_no_think_tokens: int | None = None,
    think_budget: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    batch_size: int = 64,
    seed: int | None = None,
) -> list[Generation]:
    """Generate one response to each conversation.

    Args:
        model, tokenizer: of a hybrid-reasoning model: tags, and a chat template that takes `thinking_mode`.
        conversations: messages that end with the user's; a text is one message of the user.
        mode: "think" or "no_think" for all, or "auto": the model picks. The first token is then drawn like every other
            one, so it may be neither mode (`Generation.mode` is None). Think and no-think responses are batched
            separately, so that short ones do not wait for long ones.
        decision_bias: moves the log-odds of thinking (see `DecisionBias`); without effect where the mode is forced.
        max_new_tokens: per response, the decision token included; fewer where the model runs out of positions.
        max_think_tokens, max_no_think_tokens: the same for one mode, where it is to be less.
        think_budget: tokens of reasoning after which it is closed by force, and the model answers; None: no budget.
        temperature, top_p: of the sampling (paper: 0.6 and 0.95); temperature 0 is greedy.
        batch_size: responses generated at a time.
        seed: of torch's random number generator; None leaves its state alone.

    Returns:
        Responses in the order of the conversations.

    Raises:
        UserError: model, tokenizer or a setting does not fit.
        TooLongError: a conversation, or the longest one, is too long for the model. (A UserError, too.)
    """
    check_settings(mode, decision_bias, max_new_tokens, temperature, top_p)
    limits = Limits(max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget)
    decoder = Decoder(model, tokenizer, check_model(model, tokenizer), temperature, top_p, batch_size)
    if not conversations:
        return []
    ids = render(tokenizer, [_conversation(conversation) for conversation in conversations])
    lengths = _Lengths.of(limits, decoder, max(map(len, ids)))
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)

    first, probs = _begin(decoder, ids, mode, decision_bias)
    responses = {row: list(begun) for row, begun in enumerate(first)}
    groups: dict[Mode | None, list[int]] = defaultdict(list)  # None: neither
    for row, begun in enumerate(first):
        if begun[-1] not in decoder.ends:
            groups[decoder.tokens.chosen(begun)].append(row)
    with tqdm(
        total=sum(map(len, groups.values())), desc="generating", unit="response", disable=len(ids) <= batch_size
    ) as progress:
        for chosen, group in groups.items():
            prompts = [[*ids[row], *first[row]] for row in group]
            most, budget = lengths.rest(chosen, len(first[group[0]]))
            for place, rest in decoder.complete(prompts, most, progress, budget):
                responses[group[place]] += rest
    return [_as_generation(decoder, responses[row], probs[row]) for row in range(len(ids))]


@dataclass(frozen=True)
class _Lengths:
    """Lengths of the responses of one call of `generate` or `stream`."""

    limits: Limits
    budget: ThinkBudget | None
    room: float  # positions that are left for a response

    @classmethod
    def of(cls, limits: Limits, decoder: Decoder, longest_prompt: int) -> "_Lengths":
        """UserError if the limits or the model's positions leave no room behind an opening, or for an answer."""
        room = _room(decoder.model, longest_prompt, decoder.tokens)
        limits.rooms(decoder.tokens)
        return cls(limits, limits.budget(decoder.tokenizer, decoder.tokens), room)

    def rest(self, chosen: Mode | None, begun: int) -> tuple[int, ThinkBudget | None]:
        """The most tokens behind the first `begun` tokens of a response, and the budget of its reasoning."""
        place = None if chosen is None else MODES.index(chosen)
        budget = None if self.budget is None or chosen is not Mode.THINK else self.budget.after(begun)
        return int(min(self.limits.most(place), self.room)) - begun, budget


def _begin(
    decoder: Decoder, ids: list[list[int]], mode: str, bias: float
) -> tuple[list[list[int]], Sequence[float | None]]:
    """Each response up to the decision, drawn or forced, and π(think | q) where it is drawn; else None."""
    if mode == AUTO:
        return decoder.decide(ids, bias)
    return decoder.force(ids, Mode(mode)), [None] * len(ids)


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversation: str | Conversation,
    *,
    mode: str = AUTO,
    decision_bias: float = 0.0,
    max_new_tokens: int = 35_000,
    max_think_tokens: int | None = None,
    max_no_think_tokens: int | None = None,
    think_budget: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Stream one response as pieces of text, tags included. Closing the iterator ends the generation.

    Arguments and errors are those of `generate`.
    """
    check_settings(mode, decision_bias, max_new_tokens, temperature, top_p)
    limits = Limits(max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget)
    decoder = Decoder(model, tokenizer, check_model(model, tokenizer), temperature, top_p, batch_size=1)
    (ids,) = render(tokenizer, [_conversation(conversation)])
    lengths = _Lengths.of(limits, decoder, len(ids))
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)
    (begun,), _ = _begin(decoder, [ids], mode, decision_bias)
    if begun[-1] in decoder.ends:
        yield str(tokenizer.decode(begun, skip_special_tokens=True))
        return
    prompt = [*ids, *begun]
    most, budget = lengths.rest(decoder.tokens.chosen(begun), len(begun))

    stopped = threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    prepend_to_stream(streamer, begun)

    def run() -> None:
        try:
            decoder.draw(
                decoder.padded([prompt]),
                most,
                None if budget is None else CloseReasoning(budget, len(prompt)),
                stopping_criteria=StoppingCriteriaList([lambda rows, *_, **__: _all(rows, stopped.is_set())]),
                streamer=streamer,
            )
        finally:
            streamer.end()  # the reader must not wait for a generation that has failed

    with ThreadPoolExecutor(1, thread_name_prefix="hgpo_trl.stream") as pool:
        generation = pool.submit(run)
        try:
            yield from streamer
            generation.result()
        finally:
            stopped.set()


def _all(rows: Tensor, value: bool) -> Tensor:
    return torch.full((len(rows),), value, dtype=torch.bool, device=rows.device)


@dataclass(frozen=True)
class HybridModel:
    """A hybrid-reasoning model and its tokenizer, to be called with a question, a conversation, or a list of them."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: str = "auto", device_map: Any = None, mode_format: Any = None
    ) -> "HybridModel":
        """Load a model by path or hub id, by default onto the accelerator if there is one.

        Args:
            mode_format: the model's format, by name or by its texts; None: the tokenizer shows it.

        Raises:
            UserError: it is no hybrid model; the message says what it lacks.
        """
        tokenizer = AutoTokenizer.from_pretrained(name)
        settle_format(tokenizer, mode_format)
        mode_tokens(tokenizer)  # before the weights are loaded
        if device_map is None:
            device_map = torch.accelerator.current_accelerator() or torch.device("cpu")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map)
        check_model(model, tokenizer)
        return cls(model, tokenizer)

    @property
    def mode_format(self) -> ModeFormat:
        """The format of its responses."""
        return format_of(self.tokenizer)

    def __call__(self, prompt: Any, **settings: Any) -> Any:
        """`generate`: one `Generation` for a text or a conversation, a list of them for a list."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            return generate(self.model, self.tokenizer, [prompt], **settings)[0]
        return generate(self.model, self.tokenizer, prompt, **settings)

    def stream(self, prompt: str | Conversation, **settings: Any) -> Generator[str, None, None]:
        """`stream`: the response's text, piece by piece."""
        return stream(self.model, self.tokenizer, prompt, **settings)
