"""Micro-batches of rows of similar length, each as narrow as its longest row.

TRL pads all completions of a generation batch to the longest one and computes every micro-batch at that width, which is
mostly padding where half of the responses are short. Here rows are sorted by length before they are cut into
micro-batches, and each micro-batch is trimmed to its own longest prompt and response. With `micro_batch_tokens` the
rows of all processes are divided anew (`partition`), into micro-batches of as many rows as fit.

Shapes: `B` rows in a generation batch on this process, `P` prompt tokens (padded left), `T` completion tokens (padded
right).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from transformers import Trainer
from trl import GRPOTrainer

from hgpo_trl.common.errors import UserError
from hgpo_trl.training.idle_tokens import mask_idle
from hgpo_trl.training.losses import DIVISORS
from hgpo_trl.training.partition import balanced_partition
from hgpo_trl.training.validate import tied_to_micro_batches

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


def _merge(batches: list[Batch]) -> Batch:
    """One batch of all rows; counts are those of the first."""
    return {
        name: torch.cat([batch[name] for batch in batches]) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in batches[0].items()
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
        merged = _merge(group)
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


class _Parts(Trainer):
    """Trainer whose micro-batch may come in several parts, or in none, each with a forward and a backward pass.

    It stands between GRPOTrainer and Trainer, so that TRL counts and times the parts as one micro-batch.
    """

    args: Any  # with the field micro_batch_tokens
    optimizer: Any

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:  # type: ignore[override]
        """Trainer's, for each part that `_prepare_inputs` returns; the sum of their losses."""
        if self.args.micro_batch_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()  # both as Trainer does before it prepares inputs
        self.optimizer.train()
        parts: Any = self._prepare_inputs(inputs)
        loss = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with _unsynced(self.accelerator, model):
                loss += super().training_step(model, part, num_items_in_batch)
        for part in parts[-1:]:
            loss += super().training_step(model, part, num_items_in_batch)
        return loss


@contextmanager
def _unsynced(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without a sum over the processes, as the training loop does before a step's last pass."""
    synced = accelerator.sync_gradients  # False: the loop does so already
    sums_each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    # DeepSpeed goes by `sync_gradients` alone.
    waits = synced and not sums_each and accelerator.distributed_type != DistributedType.DEEPSPEED
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model) if waits else nullcontext():
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(synced)


@contextmanager
def _gathering_unequal(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator.gather` take tensors of unequal numbers of rows; NaN fills the shorter ones."""
    gather = accelerator.gather
    accelerator.gather = lambda tensor: gather(accelerator.pad_across_processes(tensor, pad_index=math.nan))
    try:
        yield
    finally:
        del accelerator.gather  # the method again


class MicroBatchTrainer(GRPOTrainer, _Parts):
    """GRPOTrainer that computes less padding: micro-batches and chunks hold rows of similar length.

    `args.trim_micro_batches` turns it on. With `args.micro_batch_tokens`, micro-batches hold as many rows as fit, taken
    from all processes, and TRL's `gradient_accumulation_steps` micro-batches become as many as it takes. The gradient
    is the same.

    Raises:
        UserError: `micro_batch_tokens` with a loss that depends on which rows share a micro-batch.
    """

    args: Any  # with the fields trim_micro_batches and micro_batch_tokens
    pad_to_multiple_of: int | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.micro_batch_tokens is not None and not self._rows_may_meet_any_others():
            raise UserError(
                f"micro_batch_tokens={self.args.micro_batch_tokens} moves rows between micro-batches, and this model's "
                "loss depends on which rows share one: it has a router's auxiliary loss. Set router_aux_loss_coef to 0 "
                "or micro_batch_tokens to null."
            )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's micro-batches; those of a new rollout are regrouped by length and trimmed.

        With `micro_batch_tokens`: a list of micro-batches. The last call of a window of calls gets all of the window.
        """
        if isinstance(generation_batch, dict):  # a part that this method has returned
            return generation_batch
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.args.trim_micro_batches or self._buffered_inputs is before:
            return inputs
        if self._idle_tokens_have_no_gradient():
            divided = DIVISORS[self.loss_type].by_length
            self._buffered_inputs = [mask_idle(batch, divided_by_length=divided) for batch in self._buffered_inputs]
        per_step = self.args.gradient_accumulation_steps
        if self.args.micro_batch_tokens is not None:
            self._buffered_inputs = self._by_tokens(self._buffered_inputs, per_step)
        else:
            self._buffered_inputs = sort_and_trim(
                self._buffered_inputs,
                per_step,
                sort=self._rows_may_meet_any_others(),
                multiple=self.pad_to_multiple_of,
                permutation=self._common_permutation,
            )
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _by_tokens(self, batches: list[Batch], batches_per_step: int) -> list[list[Batch]]:
        """For each of TRL's micro-batches, what is computed in its place: nothing, or all of its window's rows.

        The window is what `sort_and_trim` sorts. Its last micro-batch computes it, since gradients are summed over the
        processes after the last one of a step.
        """
        window = math.gcd(len(batches), batches_per_step)
        result: list[list[Batch]] = []
        for start in range(0, len(batches), window):
            parts = [part for part, _ in self._shares(_merge(batches[start : start + window]))]
            result += [[] for _ in range(window - 1)]
            result.append(parts)
        return result

    def _shares(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """This process's share of what all processes hold: trimmed micro-batches, and their rows' numbers.

        Rows are numbered through all processes, in the order of `accelerator.gather`.
        """
        accelerator = self.accelerator
        lengths = torch.stack([batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1)], dim=1)
        prompts, completions = accelerator.gather(lengths).T.tolist()
        plan = balanced_partition(
            prompts, completions, accelerator.num_processes, self.args.micro_batch_tokens, self.pad_to_multiple_of
        )
        mine = [torch.tensor(group[accelerator.process_index], device=lengths.device) for group in plan]
        rows = torch.cat(mine)

        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            padded = accelerator.pad_across_processes(value, dim=1, pad_first=name in _PROMPT_KEYS)
            return accelerator.gather(padded.contiguous())[rows]

        held = {name: moved(name, value) for name, value in batch.items()}
        shares = []
        for places, numbers in zip(torch.arange(len(rows)).split([len(part) for part in mine]), mine, strict=True):
            longest = max(prompts[row] for row in numbers.tolist()), max(completions[row] for row in numbers.tolist())
            shares.append((_cut(_select(held, places.to(rows.device)), *longest, self.pad_to_multiple_of), numbers))
        return shares

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; with `micro_batch_tokens`, every row weighs as in a micro-batch of the usual number of rows."""
        if self.args.micro_batch_tokens is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with _gathering_unequal(self.accelerator):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if DIVISORS[self.loss_type].per_row:
            loss = loss * (len(inputs["prompt_ids"]) / self.args.per_device_train_batch_size)
        return loss

    def _common_permutation(self, size: int) -> Tensor:
        """One order for all processes, whose random numbers differ: the first one's."""
        return broadcast(torch.randperm(size).to(self.accelerator.device))

    def _rows_may_meet_any_others(self) -> bool:
        """Whether the sum over an optimizer step is the same however its rows are grouped into micro-batches."""
        return not (tied_to_micro_batches(self.args) or self.aux_loss_enabled)

    def _idle_tokens_have_no_gradient(self) -> bool:
        """Whether a token's part in the loss is its advantage times a function of its own probability."""
        return (
            self._rows_may_meet_any_others()
            and not DIVISORS[self.loss_type].idle_tokens_count
            and self.beta == 0.0
            and self.importance_sampling_level == "token"
            and self.off_policy_mask_threshold is None  # a mean over the row's tokens
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
        by_tokens = self.args.micro_batch_tokens is not None
        if whole or batch_size is None or (batch_size >= num_rows and not by_tokens):
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        if by_tokens:
            return self._shared_log_probs(score, model, input_ids, attention_mask, logits_to_keep), None, None
        log_probs = torch.zeros(num_rows, logits_to_keep, device=input_ids.device)
        for rows, first, last in sorted_chunks(attention_mask, batch_size):
            keep = max(1, last - (width - logits_to_keep))  # a masked response still has one column
            first, last = min(first, width - logits_to_keep - 1), width - logits_to_keep + keep
            chunk, _, _ = score(model, input_ids[rows, first:last], attention_mask[rows, first:last], keep, **options)
            log_probs[rows, :keep] = chunk.to(log_probs.dtype)
        return log_probs, None, None

    def _shared_log_probs(
        self,
        score: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]],
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
    ) -> Tensor:
        """`[b, logits_to_keep]`, log-probabilities of this process's rows, which all processes compute together."""
        num_rows, prompt_width = len(input_ids), input_ids.shape[1] - logits_to_keep
        batch = {
            "prompt_ids": input_ids[:, :prompt_width],
            "prompt_mask": attention_mask[:, :prompt_width],
            "completion_ids": input_ids[:, prompt_width:],
            "completion_mask": attention_mask[:, prompt_width:],
        }
        widest = int(self.accelerator.gather(torch.tensor([logits_to_keep], device=input_ids.device)).amax())
        log_probs = torch.zeros(num_rows * self.accelerator.num_processes, widest, device=input_ids.device)
        for part, rows in self._shares(batch):
            ids, mask = (torch.cat([part[f"prompt_{kind}"], part[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
            found, _, _ = score(model, ids, mask, part["completion_ids"].shape[1])
            log_probs[rows, : found.shape[1]] = found.to(log_probs.dtype)
        log_probs = self.accelerator.reduce(log_probs, "sum")  # each row is another process's zeros but for one
        first = self.accelerator.process_index * num_rows
        return log_probs[first : first + num_rows, :logits_to_keep]
