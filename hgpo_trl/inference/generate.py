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
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hgpo_trl.common.compat import prepend_to_stream
from hgpo_trl.common.errors import UserError
from hgpo_trl.inference.limits import Limits, ThinkBudget
from hgpo_trl.modes import (
    LHRM,
    MODES,
    OTHER,
    Mode,
    ModeFormat,
    ModeTokens,
    check_embeddings,
    format_of,
    mode_tokens,
    split_response,
)
from hgpo_trl.modes.chat_template import has_thinking_modes, opened_mode, settle_format
from hgpo_trl.modes.decision import draw_other, move_decision, read_decision

AUTO = "auto"  # the mode in which the model picks
CHOICES = (AUTO, *(mode.value for mode in MODES))

Conversation = Sequence[Mapping[str, Any]]

# The paper's sampling, for a model's generation config. Without it Transformers decodes greedily, and think responses
# fall into loops. Transformers' default for top_k is 50, not all.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}


# --- tokens in, tokens out ------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of each prompt, text or conversation, up to the point where the model decides."""
    encoded: Any  # the tokenizer's return type depends on its arguments' values
    if isinstance(prompts[0], str):
        encoded = tokenizer(list(prompts))
    else:
        encoded = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return encoded["input_ids"]


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], at_once: int = 1_000) -> list[int]:
    """Tokens of each prompt that `render` gives; the ids of `at_once` of them are in memory at a time."""
    starts = range(0, len(prompts), at_once)
    return [len(ids) for start in starts for ids in render(tokenizer, prompts[start : start + at_once])]


def end_tokens(tokenizer: PreTrainedTokenizerBase, eos: int | list[int] | None) -> list[int]:
    """Ids that end a response: the tokenizer's end token and those of the model's generation config."""
    return sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})


def until_end(response: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Cut the padding behind a response's end token; also return whether it is truncated, without an end token."""
    end = next((place for place, token in enumerate(response) if token in ends), None)
    return (response, True) if end is None else (response[: end + 1], False)


def sampling_config(
    tokenizer: PreTrainedTokenizerBase, ends: list[int], max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Build the configuration for drawing tokens; temperature 0 is greedy."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=top_p if temperature > 0 else 1.0,
        top_k=0 if temperature > 0 else None,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )


def set_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model, PEFT's or not, a generation config with its token ids and the paper's sampling alone.

    A base model's own settings (top_k, repetition_penalty, suppress_tokens, ...) would otherwise be saved with the
    trained model and shape its rollouts: Transformers falls back on them where a trainer leaves a field unset.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(tokenizer, model.generation_config.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
        **SAMPLING,
    )


@contextmanager
def own_settings_ignored(model: Any) -> Iterator[None]:
    """Make `model.generate` ignore the model's own generation config within this context."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def batches(ids: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar length, which need little padding."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> BatchEncoding:
    """Rows of token ids as one batch on the model's device, padded on the left."""
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    config: GenerationConfig,
    batch_size: int,
    progress: tqdm,
    budget: ThinkBudget | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue rows of token ids, in batches of like length: (row number, the tokens that follow, padding included).

    Args:
        budget: of the reasoning that begins behind the rows; None: there is no reasoning, or no budget.
    """
    for batch in batches(rows, batch_size):
        inputs = padded(model, tokenizer, [rows[row] for row in batch])
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode(), own_settings_ignored(model):
            sequences = model.generate(
                **inputs, generation_config=config, logits_processor=closing_processors(budget, length)
            )
        yield from zip(batch, sequences[:, length:].tolist(), strict=True)
        progress.update(len(batch))


class CloseReasoning(LogitsProcessor):
    """Closes a reasoning that is still open at its budget: the closing tokens are the only ones from there on.

    Args:
        start: place of the reasoning's first token: tokens of the prompt, padding and opening included.
    """

    def __init__(self, budget: ThinkBudget, start: int) -> None:
        self.budget = budget
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = self.start + self.budget.tokens  # where the closing tokens go
        place = input_ids.shape[1] - first
        if not 0 <= place < len(self.budget.closing):
            return scores
        closed = (input_ids[:, self.start : first] == self.budget.end_think).any(dim=1, keepdim=True)
        alone = torch.full_like(scores, -math.inf)
        alone[:, self.budget.closing[place]] = 0.0
        return torch.where(closed, scores, alone)


def closing_processors(budget: ThinkBudget | None, start: int) -> LogitsProcessorList:
    """`CloseReasoning` of a budget, if there is one, for `model.generate`."""
    return LogitsProcessorList([] if budget is None else [CloseReasoning(budget, start)])


# --- the decision ---------------------------------------------------------------------------------------------


class DecisionBias(LogitsProcessor):
    """Moves the log-odds of thinking, logit(think) − logit(no_think), by `bias` on the token that decides.

    Half of it is added to logit(think) and half subtracted from logit(no_think), before temperature and top-p. A large
    bias of either sign leaves no probability to the other mode or to any other token; 0 changes nothing. Where one mode
    is every token but the other's, the other's logit takes all of the bias.

    Args:
        prompt_length: tokens of the prompt, padding included: where the first generated token stands.
    """

    def __init__(self, tokens: ModeTokens, bias: float, prompt_length: int) -> None:
        self.tokens = tokens
        self.bias = bias
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prefix = self.tokens.prefix
        if input_ids.shape[1] != self.prompt_length + len(prefix):
            return scores
        deciding = (input_ids[:, self.prompt_length :] == input_ids.new_tensor(prefix)).all(dim=1)
        moved = move_decision(scores.clone(), self.tokens, self.bias)  # the raw logits are read afterwards
        return torch.where(deciding[:, None], moved, scores)


def _decide(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    tokens: ModeTokens,
    bias: float,
    config: GenerationConfig,
    batch_size: int,
) -> list[tuple[list[int], float]]:
    """Draw every response up to the decision, like any other token, and read the model's own π(think | q)."""
    found: dict[int, tuple[list[int], float]] = {}
    at_once = len(tokens.openings[0]) == 1 and not tokens.prefix
    for batch in batches(ids, batch_size):
        inputs = padded(model, tokenizer, [ids[row] for row in batch])
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode(), own_settings_ignored(model):
            output = model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([DecisionBias(tokens, bias, length)]),
            )
        if at_once:
            think = torch.softmax(output.logits[0].float(), dim=-1)[:, tokens.think]
        else:
            think = read_decision(model, inputs["input_ids"], inputs["attention_mask"], tokens).think
        found |= dict(zip(batch, zip(output.sequences[:, length:].tolist(), think.tolist(), strict=True), strict=True))
    return [found[row] for row in range(len(ids))]


def openings(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    tokens: ModeTokens,
    mode: Mode,
    temperature: float,
    batch_size: int,
) -> list[list[int]]:
    """The forced beginning of each prompt's response in a mode, with a token of the model's where that is OTHER."""
    opening = list(tokens.openings[MODES.index(mode)])
    if tokens.decision[MODES.index(mode)] != OTHER:
        return [opening] * len(ids)
    drawn = draw_other(model, tokenizer.pad_token_id, ids, tokens, temperature, batch_size)
    return [[*opening, token] for token in drawn]


# --- responses ------------------------------------------------------------------------------------------------


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


def _as_generation(
    tokenizer: PreTrainedTokenizerBase,
    tokens: ModeTokens,
    generated: list[int],
    ends: list[int],
    prob_think: float | None,
) -> Generation:
    generated, truncated = until_end(generated, ends)
    text = str(tokenizer.decode(generated, skip_special_tokens=True))
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
    tokens = check_model(model, tokenizer)
    if not conversations:
        return []
    ids = render(tokenizer, [_conversation(conversation) for conversation in conversations])
    lengths = _Lengths.of(limits, tokenizer, tokens, _room(model, max(map(len, ids)), tokens))
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)

    first, probs = _begin(model, tokenizer, ids, tokens, mode, decision_bias, ends, temperature, top_p, batch_size)
    responses = {row: list(begun) for row, begun in enumerate(first)}
    groups: dict[Mode | None, list[int]] = defaultdict(list)  # None: neither
    for row, begun in enumerate(first):
        if begun[-1] not in ends:
            groups[tokens.chosen(begun)].append(row)
    with tqdm(
        total=sum(map(len, groups.values())), desc="generating", unit="response", disable=len(ids) <= batch_size
    ) as progress:
        for chosen, group in groups.items():
            prompts = [[*ids[row], *first[row]] for row in group]
            most, budget = lengths.rest(chosen, len(first[group[0]]))
            config = sampling_config(tokenizer, ends, most, temperature, top_p)
            for place, rest in complete(model, tokenizer, prompts, config, batch_size, progress, budget):
                responses[group[place]] += rest
    return [_as_generation(tokenizer, tokens, responses[row], ends, probs[row]) for row in range(len(ids))]


@dataclass(frozen=True)
class _Lengths:
    """Lengths of the responses of one call of `generate` or `stream`."""

    limits: Limits
    budget: ThinkBudget | None
    room: float  # positions that are left for a response

    @classmethod
    def of(cls, limits: Limits, tokenizer: PreTrainedTokenizerBase, tokens: ModeTokens, room: float) -> "_Lengths":
        """UserError if the limits leave no room behind an opening, or for an answer."""
        limits.rooms(tokens)
        return cls(limits, limits.budget(tokenizer, tokens), room)

    def rest(self, chosen: Mode | None, begun: int) -> tuple[int, ThinkBudget | None]:
        """The most tokens behind the first `begun` tokens of a response, and the budget of its reasoning."""
        place = None if chosen is None else MODES.index(chosen)
        budget = None if self.budget is None or chosen is not Mode.THINK else self.budget.after(begun)
        return int(min(self.limits.most(place), self.room)) - begun, budget


def _begin(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    tokens: ModeTokens,
    mode: str,
    bias: float,
    ends: list[int],
    temperature: float,
    top_p: float,
    batch_size: int,
) -> tuple[list[list[int]], list[float | None]]:
    """Each response up to the decision, drawn or forced, and π(think | q) where it is drawn; else None."""
    if mode != AUTO:
        return openings(model, tokenizer, ids, tokens, Mode(mode), temperature, batch_size), [None] * len(ids)
    config = sampling_config(tokenizer, ends, len(tokens.prefix) + 1, temperature, top_p)
    config.update(output_logits=True, return_dict_in_generate=True)
    decided = _decide(model, tokenizer, ids, tokens, bias, config, batch_size)
    return [until_end(drawn, ends)[0] for drawn, _ in decided], [prob for _, prob in decided]


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
    tokens = check_model(model, tokenizer)
    (ids,) = render(tokenizer, [_conversation(conversation)])
    lengths = _Lengths.of(limits, tokenizer, tokens, _room(model, len(ids), tokens))
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)
    (begun,), _ = _begin(model, tokenizer, [ids], tokens, mode, decision_bias, ends, temperature, top_p, 1)
    if begun[-1] in ends:
        yield str(tokenizer.decode(begun, skip_special_tokens=True))
        return
    prompt = [*ids, *begun]
    most, budget = lengths.rest(tokens.chosen(begun), len(begun))
    config = sampling_config(tokenizer, ends, most, temperature, top_p)

    stopped = threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    prepend_to_stream(streamer, begun)

    def run() -> None:
        try:
            with torch.inference_mode(), own_settings_ignored(model):
                model.generate(
                    **padded(model, tokenizer, [prompt]),
                    generation_config=config,
                    logits_processor=closing_processors(budget, len(prompt)),
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
