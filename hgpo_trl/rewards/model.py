"""A reward model as an ordinary reward function, for queries without a definite answer (Eq. 7)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import patch_environment
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hgpo_trl.common.compat import no_deepspeed_config
from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import Response, completion_text
from hgpo_trl.rewards import has_answer

Messages = list[dict[str, Any]]


class RewardModel:
    """Scores the responses of rows without a reference `answer`; a row with one is left to the rule and gets None.

    It scores the prompt's conversation with the answer part as the assistant's message, in the reward model's own chat
    template. A plain-text prompt is one user message; for a reward model without a template, prompt and answer are
    concatenated. A malformed response is not scored and gets 0, which the trainer and the evaluation replace.

    The raw score s, a logit, becomes sigmoid((s - center) / scale), so that rewards lie between 0 and 1 as the rule's
    do: the margin δ of Eq. 8 then has one meaning for all queries, and no answer scores below a broken format.

    Config and tokenizer are loaded at once, the weights with the first score.

    Args:
        name: path or hub id of a sequence-classification model with one label.
        device: where it computes. On a CPU its weights are float32, elsewhere bfloat16.
        batch_size: conversations per forward pass, of like length. It does not change the scores.
        squash: False for raw scores.
        center, scale: in units of the raw score.

    Raises:
        UserError: the model has another number of labels, or lacks weights (found when they are loaded).
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 8,
        squash: bool = True,
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        self.__name__ = "reward_model"  # of the column and the metrics in TRL
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.squash, self.center, self.scale = squash, center, scale
        config = AutoConfig.from_pretrained(name)
        if config.num_labels != 1:
            raise UserError(
                f"reward_model={name!r} has num_labels={config.num_labels}; a reward model has 1. Name a "
                "sequence-classification model that gives one score."
            )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        self.pad_token_id = config.get_text_config().pad_token_id
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    @cached_property
    def model(self) -> PreTrainedModel:
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        with _whole_weights():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"reward_model={self.name!r} lacks weights, {', '.join(missing)}, which would be random. Name a model "
                "that was trained to give scores."
            )
        return model.eval().requires_grad_(requires_grad=False).to(self.device)

    def __call__(
        self,
        prompts: list,
        completions: list,
        answer: list | None = None,
        response: list[Response] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """One reward per completion, None where the row has an `answer`.

        Args:
            prompts, completions: plain text or conversations; the completions are the answer parts.
            answer: the data set's column of reference answers, if it has one.
            response: the parts of every response, which say which ones are malformed. Without them none is.
        """
        references = answer or [None] * len(prompts)
        rows = [row for row, reference in enumerate(references) if not has_answer(reference)]
        rewards: list[float | None] = [None if has_answer(reference) else 0.0 for reference in references]
        if response is not None:
            rows = [row for row in rows if response[row].well_formed]
        scores = self.scores([prompts[row] for row in rows], [completion_text(completions[row]) for row in rows])
        if self.squash:
            scores = torch.sigmoid((scores - self.center) / self.scale)
        for row, score in zip(rows, scores.tolist(), strict=True):
            rewards[row] = score
        return rewards

    def scores(self, prompts: list, answers: list[str]) -> Tensor:
        """Raw scores, `[B]`, of answers to prompts (plain text or conversations)."""
        ids = [self.encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        scores = torch.zeros(len(ids), dtype=torch.float64)
        for rows in tqdm(batches, desc="reward model", leave=False, delay=5):  # shown where it takes longer than that
            scores[rows] = self._forward([ids[row] for row in rows])
        return scores

    def encode(self, prompt: str | Messages, answer: str) -> list[int]:
        """Encode a conversation as token ids, cut at its beginning to the model's positions.

        Raises:
            UserError: the chat template is missing or refuses the conversation.
        """
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self._render([*messages, {"role": "assistant", "content": answer}])
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt + answer)["input_ids"]
        else:
            raise UserError(
                f"reward_model={self.name!r} has no chat template, but the prompts are conversations. Save one with "
                "its tokenizer, or give prompts as plain text."
            )
        return ids[-self.max_length :]

    def _render(self, messages: Messages) -> str:
        """Render the conversation with the model's template, in a simpler form if the template refuses it."""
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            simple = _without_system(messages)
        try:
            return str(self.tokenizer.apply_chat_template(simple, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                f"The chat template of reward_model={self.name!r} refuses a conversation of {roles}: {error}. Use "
                "another reward model, or prompts that it takes."
            ) from error

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Scores of one batch. The model pools the last token that is not its padding token."""
        config = self.model.config.get_text_config()
        width = max(map(len, rows))
        pad = self.pad_token_id
        if pad is None:  # one that stands in no row of this batch, so that the last token is pooled
            used = {token for row in rows for token in row}
            pad = next(token for token in range(len(used) + 1) if token not in used)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        config.pad_token_id = pad
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, 0].double().cpu()


def _without_system(messages: Messages) -> Messages:
    """Merge messages into alternating turns of user and assistant; a system message joins the next turn."""
    turns: Messages = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{message['content']}"}
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Load a model whole on every process, also under DeepSpeed ZeRO-3 and FSDP.

    Each process scores its own rows in its own time; a sharded model would need all of them in every forward pass.
    """
    # FSDP's setting loads the weights on the first process alone.
    with no_deepspeed_config(), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield
