"""Draw tokens from a hybrid-reasoning model with Transformers: token ids in, token ids out.

`Decoder` is what `hgpo_trl.inference.generate` and evaluation share: the decision, forced openings, and the rest of a
response, in batches of like length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from hgpo_trl.inference.limits import ThinkBudget
from hgpo_trl.modes import MODES, OTHER, Mode, ModeTokens
from hgpo_trl.modes.decision import Decision, draw_other, move_decision, read_decision

# The paper's sampling, for a model's generation config. Without it Transformers decodes greedily, and think responses
# fall into loops. Transformers' default for top_k is 50, not all.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}

FirstToken = tuple[float, float, int]  # π(think | q), π(no_think | q), and the greedy pick as in `Decision.picked`


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


def batches(ids: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar length, which need little padding."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


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


@dataclass(frozen=True)
class Decoder:
    """Draws tokens from a model with its weights, and with these settings in place of its own generation config."""

    model: Any  # a causal language model that can `generate`
    tokenizer: PreTrainedTokenizerBase
    tokens: ModeTokens
    temperature: float  # 0 is greedy
    top_p: float
    batch_size: int  # responses at a time

    @cached_property
    def ends(self) -> list[int]:
        """Ids that end a response (`end_tokens`)."""
        return end_tokens(self.tokenizer, self.model.generation_config.eos_token_id)

    def padded(self, rows: list[list[int]]) -> BatchEncoding:
        """Rows of token ids as one batch on the model's device, padded on the left."""
        return self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.model.device)

    def draw(
        self,
        inputs: BatchEncoding,
        max_new_tokens: int,
        processor: LogitsProcessor | None = None,
        output_logits: bool = False,
        **settings: Any,
    ) -> Any:
        """`model.generate` on a batch of `padded`.

        Args:
            processor: of the logits before temperature and top-p.
            output_logits: return the logits, too, as fields of an object.
            settings: other arguments of `model.generate`.
        """
        config = self._config(max_new_tokens)
        config.update(output_logits=output_logits, return_dict_in_generate=output_logits)
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.inference_mode():
                return self.model.generate(
                    **inputs,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([] if processor is None else [processor]),
                    **settings,
                )
        finally:
            self.model.generation_config = own

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        sample = self.temperature > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            temperature=self.temperature if sample else 1.0,
            top_p=self.top_p if sample else 1.0,
            top_k=0 if sample else None,
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.ends,
        )

    def read_decisions(self, prompts: list[list[int]]) -> list[FirstToken]:
        """Read the model's own decision on each prompt."""
        found: dict[int, FirstToken] = {}
        for rows in batches(prompts, self.batch_size):
            decision = self._read(self.padded([prompts[row] for row in rows]))
            values = zip(decision.think.tolist(), decision.no_think.tolist(), decision.picked.tolist(), strict=True)
            found |= dict(zip(rows, values, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _read(self, inputs: BatchEncoding) -> Decision:
        return read_decision(self.model, inputs["input_ids"], inputs["attention_mask"], self.tokens)

    def decide(self, prompts: list[list[int]], bias: float) -> tuple[list[list[int]], list[float]]:
        """Draw each response up to the decision, like any other token, and read the model's own π(think | q).

        Args:
            bias: moves the log-odds of thinking (`DecisionBias`).

        Returns:
            The tokens drawn, and π(think | q) without the bias, at temperature 1; both per prompt.
        """
        begun: dict[int, list[int]] = {}
        probs: dict[int, float] = {}
        at_once = len(self.tokens.openings[0]) == 1 and not self.tokens.prefix
        for batch in batches(prompts, self.batch_size):
            inputs = self.padded([prompts[row] for row in batch])
            length = inputs["input_ids"].shape[1]
            biased = DecisionBias(self.tokens, bias, length)
            output = self.draw(inputs, len(self.tokens.prefix) + 1, biased, output_logits=True)
            if at_once:
                think = torch.softmax(output.logits[0].float(), dim=-1)[:, self.tokens.think]
            else:
                think = self._read(inputs).think
            drawn = [until_end(row, self.ends)[0] for row in output.sequences[:, length:].tolist()]
            begun |= dict(zip(batch, drawn, strict=True))
            probs |= dict(zip(batch, think.tolist(), strict=True))
        return [begun[row] for row in range(len(prompts))], [probs[row] for row in range(len(prompts))]

    def force(self, prompts: list[list[int]], mode: Mode) -> list[list[int]]:
        """Give the forced beginning of each prompt's response in a mode, with a token of the model's where that is
        OTHER."""
        place = MODES.index(mode)
        opening = list(self.tokens.openings[place])
        if self.tokens.decision[place] != OTHER:
            return [opening] * len(prompts)
        pad = self.tokenizer.pad_token_id
        drawn = draw_other(self.model, pad, prompts, self.tokens, self.temperature, self.batch_size)
        return [[*opening, token] for token in drawn]

    def complete(
        self, rows: list[list[int]], max_new_tokens: int, progress: tqdm, budget: ThinkBudget | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue rows of token ids: (row number, the tokens that follow, padding included).

        Args:
            budget: of the reasoning that begins behind the rows; None: there is no reasoning, or no budget.
        """
        for batch in batches(rows, self.batch_size):
            inputs = self.padded([rows[row] for row in batch])
            length = inputs["input_ids"].shape[1]
            sequences = self.draw(inputs, max_new_tokens, None if budget is None else CloseReasoning(budget, length))
            yield from zip(batch, sequences[:, length:].tolist(), strict=True)
            progress.update(len(batch))
