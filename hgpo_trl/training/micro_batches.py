"""Micro-batches of rows of similar length, each as narrow as its longest row.

TRL pads all completions of a generation batch to the longest one and computes every micro-batch at that width, which is
mostly padding where half of the responses are short. Here rows are sorted by length before they are cut into
micro-batches, and each micro-batch is trimmed to its own longest prompt and response.

Shapes: `B` rows in a generation batch on this process, `P` prompt tokens (padded left), `T` completion tokens (padded
right).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from trl import GRPOTrainer

from hgpo_trl.training.idle_tokens import ROW_MEANS, SUMS, mask_idle

Batch = dict[str, Any]

_PROMPT_KEYS = ("prompt_ids", "prompt_mask")


def _round_up(width: int, multiple: int | None) -> int:
    return width if multiple is None else math.ceil(width / multiple) * multiple


def trim(batch: Batch, multiple: int | None = None) -> Batch:
    """Cut a batch to its own longest prompt (on the left) and completion (on the right), at least one token each.

    Args:
        batch: TRL's rollout dict: `[B, P]` under the prompt keys; every other `[B, T]` tensor runs along the
            completion.
        multiple: keep widths at a multiple of this (`pad_to_multiple_of`), as far as the batch is that wide.
    """
    longest = torch.stack([batch["prompt_mask"].sum(dim=1).amax(), batch["completion_mask"].sum(dim=1).amax()])
    prompt, completion = longest.tolist()
    return _cut(batch, prompt, completion, multiple)


def _cut(batch: Batch, longest_prompt: int, longest_completion: int, multiple: int | None) -> Batch:
    """`trim`, with the longest lengths known."""
    prompt_width, completion_width = batch["prompt_mask"].shape[1], batch["completion_mask"].shape[1]
    prompt = min(_round_up(max(1, longest_prompt), multiple), prompt_width)
    completion = min(_round_up(max(1, longest_completion), multiple), completion_width)

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 2:
            return value
        if name in _PROMPT_KEYS:
            return value[:, prompt_width - prompt :]
        return value[:, :completion] if value.shape[1] == completion_width else value

    return {name: cut(name, value) for name, value in batch.items()}


def _select(batch: Batch, rows: Tensor) -> Batch:
    """The given rows of everything that has rows; the rest (counts, None) as it is."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() > 0 else value for name, value in batch.items()
    }


def _divide(batch: Batch, num_parts: int) -> list[Batch]:
    """Equal numbers of consecutive rows of everything that has rows; the rest in every part."""
    parts = {
        name: value.chunk(num_parts) if isinstance(value, Tensor) and value.dim() > 0 else [value] * num_parts
        for name, value in batch.items()
    }
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def sort_and_trim(
    batches: list[Batch],
    batches_per_step: int,
    *,
    sort: bool = True,
    multiple: int | None = None,
    permutation: Callable[[int], Tensor] = torch.randperm,
) -> list[Batch]:
    """Regroup micro-batches by length and trim each one. Their number and row counts stay as they are.

    Rows move only between micro-batches of the same optimizer step, so the sum over a step, and with it the gradient,
    is that of the untrimmed batches. Within a step the order of the micro-batches is shuffled.

    Processes compute their micro-batches in lock-step, each as slow as the widest of them. One order for all processes
    makes them compute their k-th longest micro-batches at the same time.

    Args:
        batches: the micro-batches of one generation batch, of equal row counts and widths, in the order of their use.
        batches_per_step: micro-batches that one optimizer step accumulates.
        sort: False trims only; for losses whose normaliser depends on which rows share a micro-batch.
        multiple: see `trim`.
        permutation: `permutation(n)` draws the order of a step's n micro-batches, `[n]`, the same on all processes.
    """
    window = math.gcd(len(batches), batches_per_step)  # a multiple of the step, a part of it, or out of phase with it
    if not sort or window == 1:
        return [trim(batch, multiple) for batch in batches]
    result = []
    for start in range(0, len(batches), window):
        group = batches[start : start + window]
        merged = {
            name: torch.cat([batch[name] for batch in group])
            if isinstance(value, Tensor) and value.dim() > 0
            else value
            for name, value in group[0].items()
        }
        lengths = torch.stack([merged["prompt_mask"].sum(dim=1), merged["completion_mask"].sum(dim=1)])
        order = lengths.sum(dim=0).argsort(stable=True)
        longest = lengths[:, order].view(2, window, -1).amax(dim=2).T.tolist()  # one transfer: each waits for the GPU
        chunks = _divide(_select(merged, order), window)
        for index in permutation(window).tolist():
            prompt, completion = longest[index]
            result.append(_cut(chunks[index], prompt, completion, multiple))
    return result


def sorted_chunks(attention_mask: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut a batch into chunks of rows of similar length, for a pass without gradients.

    Args:
        attention_mask: `[B, W]`, prompts padded left and completions right.

    Yields:
        `(rows, first, last)`: row numbers and the columns `[first, last)` outside which all of them are padding.
    """
    width = attention_mask.shape[1]
    first = attention_mask.argmax(dim=1)
    last = width - attention_mask.flip(1).argmax(dim=1)
    for rows in (last - first).argsort(stable=True).split(chunk_size):
        low, high = torch.stack([first[rows].amin(), last[rows].amax()]).tolist()
        yield rows, low, high


class MicroBatchTrainer(GRPOTrainer):
    """GRPOTrainer that computes less padding: micro-batches and chunks hold rows of similar length.

    `args.trim_micro_batches` turns it on. The gradient is the same.
    """

    args: Any  # with the field trim_micro_batches

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batches; those of a new rollout are regrouped by length and trimmed."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.args.trim_micro_batches or self._buffered_inputs is before:
            return inputs
        if self._idle_tokens_have_no_gradient():
            row_means = self.loss_type in ROW_MEANS
            self._buffered_inputs = [mask_idle(batch, row_means=row_means) for batch in self._buffered_inputs]
        self._buffered_inputs = sort_and_trim(
            self._buffered_inputs,
            self.args.gradient_accumulation_steps,
            sort=self._rows_may_meet_any_others(),
            multiple=self.pad_to_multiple_of,
            permutation=self._common_permutation,
        )
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _common_permutation(self, size: int) -> Tensor:
        """One order for all processes, whose random numbers differ: the first one's."""
        return broadcast(torch.randperm(size).to(self.accelerator.device))

    def _rows_may_meet_any_others(self) -> bool:
        """Whether the sum over an optimizer step is the same however its rows are grouped into micro-batches."""
        return not (
            self.loss_type == "bnpo"  # divides by the micro-batch's own tokens
            or self.top_entropy_quantile < 1.0  # a quantile of the micro-batch
            or self._entropy_bonus_enabled  # a mean over the micro-batch
            or self.aux_loss_enabled
        )

    def _idle_tokens_have_no_gradient(self) -> bool:
        """Whether a token's part in the loss is its advantage times a function of its own probability."""
        return (
            self.loss_type in (*SUMS, *ROW_MEANS)
            and self.beta == 0.0
            and self.importance_sampling_level == "token"
            and self.off_policy_mask_threshold is None  # a mean over the row's tokens
            and self._rows_may_meet_any_others()
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's; old and reference log-probabilities are computed in chunks of similar length, each trimmed."""
        score = super()._get_per_token_logps_and_entropies
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss, **kwargs}
        num_rows, width = input_ids.shape
        whole = torch.is_grad_enabled() or compute_entropy or not self.args.trim_micro_batches
        if whole or batch_size is None or batch_size >= num_rows:
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        log_probs = torch.zeros(num_rows, logits_to_keep, device=input_ids.device)
        for rows, first, last in sorted_chunks(attention_mask, batch_size):
            keep = max(1, last - (width - logits_to_keep))  # a masked response still has one column
            first, last = min(first, width - logits_to_keep - 1), width - logits_to_keep + keep
            chunk, _, _ = score(model, input_ids[rows, first:last], attention_mask[rows, first:last], keep, **options)
            log_probs[rows, :keep] = chunk.to(log_probs.dtype)
        return log_probs, None, None
