"""HGPOTrainer: TRL's GRPOTrainer with hybrid group sampling and mode-aware advantages."""

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, IntervalStrategy, has_length
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler

from hgpo_trl.common import paper
from hgpo_trl.common.errors import UnsupportedError, UserError
from hgpo_trl.inference.generate import set_generation_config
from hgpo_trl.inference.vllm_support import (
    check_server,
    check_vllm_installed,
    keep_cpu_weights_replaceable,
    sync_merged_weights,
    sync_packed_weights,
)
from hgpo_trl.modes import MODES, Fault, Response, check_embeddings, mode_tokens
from hgpo_trl.modes.decision import Decision, read_decision
from hgpo_trl.modes.hybrid_accuracy import figures
from hgpo_trl.rewards.functions import (
    answer_parts,
    check_bounded,
    check_finite,
    check_weights,
    checked,
    floor_faults,
    is_model,
    overlong,
    split_completions,
    weighted_sum,
)
from hgpo_trl.training.advantages import assign_rewards, compute_advantages, decided_without_think, tied_modes
from hgpo_trl.training.checks import check_dataset
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.lora import prepare_wrapped
from hgpo_trl.training.micro_batches import sort_and_trim, sorted_chunks

logger = get_logger(__name__)


class EpochSampler(Sampler):
    """TRL's sampler with an order that depends on the seed and the epoch alone; epoch 0 has TRL's order.

    TRL draws every epoch's order from one generator. A resumed run starts that anew and repeats the first epoch's.
    """

    def __init__(self, sampler: RepeatSampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The training loop calls it before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class HGPOTrainer(GRPOTrainer):
    """Trainer for Hybrid Group Policy Optimization (arXiv 2505.14631, Algorithm 1).

    Every query is sampled in both modes: of its N responses the first N/2 are forced to begin with `<think>`, the
    others with `<no_think>` (Eq. 5, 6). The mode means decide the inter-group reward, the samples of a mode compete for
    the intra-group reward (Eq. 8, 9), and together they give one advantage per token (Eq. 10). With
    `lazy_thinking` a query that no-think wins whatever thinking would bring gets no think samples.

    What changes with respect to `GRPOTrainer`, each in one override: `_generate_single_turn` forces the modes,
    `_calculate_rewards` splits the responses and keeps the rewards, `_generate_and_score_completions` replaces the
    advantages and logs both modes, `_prepare_inputs` and `_get_per_token_logps_and_entropies` take the padding out of
    the micro-batches, `evaluation_loop` and `prediction_step` put hybrid accuracy and what goes with it in the place of
    a loss. The loss of training and everything else is inherited.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, ...: as in `GRPOTrainer`. The model must know the four mode
            tags (`hgpo_trl.modes.add_mode_tokens`), which Hybrid Fine-Tuning sees to. Reward functions get the answer
            part of every response as its completion, and all its parts as the column `response` (a
            `hgpo_trl.modes.Response` each); a malformed response gets the lowest reward whatever they return.
        args: `HGPOConfig`.

    Raises:
        UserError: the tokenizer, the data or an argument does not fit; checked before a model is loaded where
            possible.
        UnsupportedError: `tools`, `environment_factory`, `rollout_func` or images are asked for.
    """

    args: HGPOConfig
    model: PreTrainedModel
    max_completion_length: int
    _logs: dict[str, Any]

    _tag_names = ["trl", "hgpo"]
    _name = "HGPO"
    _paper = {"title": paper.TITLE, "id": paper.ARXIV_ID, "citation": paper.CITATION}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: HGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = HGPOConfig(f"{name.split('/')[-1]}-HGPO")
        if not isinstance(args, HGPOConfig):
            raise TypeError(f"args must be an HGPOConfig; got {type(args).__name__}.")
        for name in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(name):
                raise UnsupportedError(
                    f"{name} is not supported by HGPOTrainer: both modes of a query are sampled in a single turn. "
                    "Leave it unset, or use TRL's GRPOTrainer."
                )
        if processing_class is None:
            source = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(
                source, truncation_side="left", padding_side="left", trust_remote_code=args.trust_remote_code
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UnsupportedError(
                f"processing_class must be a tokenizer; got {type(processing_class).__name__}. "
                "HGPOTrainer trains text-only models."
            )
        for name in ("response_template", "response_schema"):
            if getattr(processing_class, name, None) is not None:
                raise UserError(
                    f"processing_class.{name} is set: TRL would take the mode tags out of the completions before the "
                    f"rewards see them. Set processing_class.{name} = None."
                )
        if args.beta != 0.0 and is_fsdp_enabled() and os.environ.get("FSDP_VERSION") == "2":
            raise UserError(
                f"beta={args.beta} needs a reference model, but with fsdp_cpu_ram_efficient_loading: true TRL leaves "
                "its weights random on every process but the first. Set that to false in the accelerate config, or "
                "beta to 0."
            )
        if args.use_vllm:
            _prepare_vllm(args, model if isinstance(model, str) else model.config._name_or_path)
        check_evaluation(args, eval_dataset)
        self.mode_tokens = mode_tokens(processing_class)
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **named}.items():
            if dataset is not None or name == "train_dataset":
                check_dataset(name, dataset, processing_class, args, model)

        if reward_funcs is not None:
            listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            check_weights(args.reward_weights, len(listed))
            models = [func if isinstance(func, str) else type(func).__name__ for func in listed if is_model(func)]
            if args.lazy_thinking and models:
                raise UserError(
                    f"lazy_thinking needs rewards between 0 and 1, but the scores of {' and '.join(models)} have no "
                    "bounds. Name it as reward_model, which squashes them, or set lazy_thinking=false."
                )
            reward_funcs = [checked(reward_func) for reward_func in listed]
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        check_embeddings(self.model, self.mode_tokens)
        set_generation_config(self.model, self._tokenizer)
        if is_peft_model(self.model):
            prepare_wrapped(self.model)
            if self.use_vllm:
                sync_merged_weights(self.vllm_generation)
        if self.use_vllm:
            sync_packed_weights(self.vllm_generation)
        self._budget_for_the_forced_token()
        self._warned_off_mode = False
        self._rewards_per_func: Tensor  # [B, F] over all processes, kept between two overrides
        self._faults: Tensor  # [B, len(Fault)] over all processes, 1 where a response has the fault
        self._lengths: Tensor  # [B] over all processes, tokens
        self._truncated: Tensor  # [B] over all processes, 1 where a response ran out of tokens
        self._rollout_inputs: list[dict[str, Any]]  # this process's rows of the data set in the rollout
        self._decided: Tensor | None = None  # [Q], queries whose think responses are not sampled; None: no such
        self._no_think_rewards: Tensor | None = None  # [B, F], as the functions gave them; None: not scored beforehand
        self._shown: list[bool]  # which of this process's rows the reward functions are shown
        self._evaluated: list[tuple[np.ndarray, ...]] = []  # of each batch, what `figures` takes
        self._to_evaluate: float = math.inf  # prompts of this evaluation that are still to come
        self._warned_budget = False

    def _budget_for_the_forced_token(self) -> None:
        """The decision token counts towards max_completion_length, so sampling gets one token less."""
        if self.use_vllm:
            self.vllm_generation.max_completion_length = self.max_completion_length - 1
        else:
            self.generation_config.max_new_tokens = self.max_completion_length - 1
            self.generation_kwargs["max_new_tokens"] = self.max_completion_length - 1

    # ------------------------------------------------------------------------------------------ sampling (Eq. 5, 6)

    def _group_size(self) -> int:
        size = self.num_generations if self.model.training else self.num_generations_eval
        assert size is not None  # HGPOConfig has seen to it
        return size

    def _row_modes(self, num_rows: int, first: int | None = None) -> list[int]:
        """Mode (0 = think, 1 = no_think) of rows of the global batch, from `first` on; by default the local ones.

        A group can straddle two processes, so a local row's place is global: process_index · num_rows + i, modulo N.
        """
        group = self._group_size()
        first = self.accelerator.process_index * num_rows if first is None else first
        return [int(place % group >= group // 2) for place in range(first, first + num_rows)]

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Force each row's mode: its token ends the prompt during sampling and is then moved to the response's front.

        The forced token was not sampled, so it has no sampling log-probability: None, which TRL turns into an
        importance ratio of exactly 1.
        """
        if images is not None or multimodal_fields:
            fields = ", ".join(["images"] * (images is not None) + list(multimodal_fields))
            raise UnsupportedError(
                f"HGPOTrainer trains text-only models; this batch has {fields}. A tokenizer that returns more than "
                "input_ids and attention_mask can be told not to (tokenizer.model_input_names)."
            )
        modes = self._row_modes(len(prompt_ids))
        decisions = [self.mode_tokens.decision[mode] for mode in modes]
        think, no_think = ([i for i, mode in enumerate(modes) if mode == m] for m in range(len(MODES)))
        per_mode = num_generations // 2
        generate = super()._generate_single_turn
        completion_ids: list[list[int]] = [[token] for token in decisions]
        log_probs: list[list[float | None]] = [[None] for _ in decisions]

        def sample(rows: list[int], spare: Sequence[int] = ()) -> None:
            """Sample for the rows, or for the spare ones where there are none: ZeRO-3 and FSDP need all processes."""
            forced = [[*prompt_ids[i], decisions[i]] for i in rows or spare]
            with self._naming_a_server_that_fails():
                sampled, sampled_log_probs = generate(forced, None, {}, per_mode, has_tool_images)
            for i, ids in zip(rows, sampled, strict=bool(rows)):
                completion_ids[i] += ids
            if sampled_log_probs is not None:
                for i, values in zip(rows, sampled_log_probs, strict=bool(rows)):
                    log_probs[i] += values

        if self.args.lazy_thinking and self.model.training:
            sample(no_think)
            decided = self._decide(completion_ids).tolist()
            if not all(decided):
                first = self.accelerator.process_index * len(modes)
                sample([i for i in think if not decided[(first + i) // num_generations]], spare=think[:1])
        # Plain generation runs until its longest row ends, so the short no-think rows do not wait for the long ones.
        # More than half a group holds both modes wherever it begins, so every process makes the same two calls, which
        # ZeRO-3 and FSDP need.
        elif not (self.use_vllm or self.use_transformers_continuous_batching) and len(modes) > per_mode:
            sample(think)
            sample(no_think)
        else:
            sample(list(range(len(modes))))
        return completion_ids, log_probs if self.use_vllm else None  # no other backend returns any

    def _decide(self, completion_ids: list[list[int]]) -> Tensor:
        """Score the no-think responses, the only ones there are; `[Q]`, the queries that need no think samples."""
        prompts = [row["prompt"] for row in self._rollout_inputs]
        completions: list[Any] = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        num_rows = len(prompts) * self.accelerator.num_processes
        self._decided = torch.ones(num_rows // self._group_size(), dtype=torch.bool, device=self.accelerator.device)
        rewards = self._calculate_rewards(self._rollout_inputs, prompts, completions, completion_ids)
        self._decided = decided_without_think(self._grouped(rewards)[:, 1], self.args.margin)
        return self._decided

    def _think_rows(self, num_rows: int) -> Tensor:
        """`[B]` over all processes, of which `num_rows` is B."""
        group = self._group_size()
        return torch.arange(num_rows, device=self.accelerator.device) % group < group // 2

    def _unsampled(self, num_rows: int) -> Tensor:
        """`[B]` over all processes: the think rows of decided queries, which are the decision token alone."""
        if self._decided is None:
            return torch.zeros(num_rows, dtype=torch.bool, device=self.accelerator.device)
        return self._think_rows(num_rows) & self._decided.repeat_interleave(self._group_size())

    @contextmanager
    def _naming_a_server_that_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.use_vllm or self.vllm_mode != "server":
                raise
            raise RuntimeError(
                f"The vLLM server at {_server_url(self.args)} failed at step {self.state.global_step}: {error}. Look "
                "at its log, restart it, and resume the training."
            ) from error

    # ------------------------------------------------------------------------------------- rewards and advantages

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """TRL's rewards of the answer parts, lowest where the format is broken; kept for the advantages and metrics.

        Under `lazy_thinking` it is called twice, for the no-think responses and then for the think responses that there
        are; what is not sampled has no fault and no reward.
        """
        responses = split_completions(completions)
        first, last = (len(inputs) * (self.accelerator.process_index + i) for i in range(2))
        unsampled = self._unsampled(len(inputs) * self.accelerator.num_processes)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        local = [
            (len(ids), ids[-1] not in ends, *_which_faults(response.faults))
            for response, ids in zip(responses, completion_ids_list, strict=True)
        ]
        facts = self.accelerator.gather(torch.as_tensor(np.array(local), device=self.accelerator.device))
        facts[unsampled, 1:] = 0
        self._lengths, self._truncated, self._faults = facts[:, 0], facts[:, 1], facts[:, 2:]
        responses = self._cap_no_think(responses)
        asked = ~unsampled if self._no_think_rewards is None else ~unsampled & self._think_rows(len(unsampled))
        self._shown = asked[first:last].tolist()
        rewards = super()._calculate_rewards(
            [
                {**row, "response": response if shown else None}
                for row, response, shown in zip(inputs, responses, self._shown, strict=True)
            ],
            prompts,
            answer_parts(completions, responses),
            completion_ids_list,
        )
        check_finite(rewards, self.reward_func_names)
        weights = self.reward_weights.to(rewards.device)
        if self._decided is not None:
            known = rewards.new_tensor(torch.nan) if self._no_think_rewards is None else self._no_think_rewards
            rewards = self._no_think_rewards = torch.where(asked[:, None], rewards, known)
            check_bounded(rewards, weights, self.reward_func_names)
        query = torch.arange(len(rewards), device=rewards.device) // self._group_size()
        self._rewards_per_func = floor_faults(rewards, self._faults.any(dim=1), query, weights)
        return self._rewards_per_func

    def _log_completion_extra(self, column: str, values: list) -> None:
        """TRL's, with the values in the places of the rows that the reward functions are shown."""
        if self._decided is None:
            super()._log_completion_extra(column, values)
            return
        if len(values) != sum(self._shown):
            raise UserError(
                f"log_extra({column!r}) got {len(values)} values for {sum(self._shown)} completions: under "
                "lazy_thinking it takes one per completion, in one call."
            )
        places = self._pending_extra_logs[column]
        places += [None] * (len(self._shown) - len(places))
        for place, value in zip(compress(range(len(self._shown)), self._shown), values, strict=True):
            places[place] = value

    def _cap_no_think(self, responses: list[Response]) -> list[Response]:
        """This process's responses and `_faults`, with `Fault.OVERLONG` where a no-think answer is beyond the cap."""
        cap, max_tokens = self.args.no_think_cap, self.args.no_think_max_tokens
        if cap is None and max_tokens is None:
            return responses
        answers = self._tokenizer([response.answer for response in responses], add_special_tokens=False)["input_ids"]
        local = torch.tensor([len(ids) for ids in answers], device=self.accelerator.device)
        shape = (-1, len(MODES), self._group_size() // len(MODES))
        well_formed = ~self._faults.any(dim=1)
        beyond = overlong(
            self.accelerator.gather(local).view(shape), well_formed.view(shape), cap, max_tokens
        ).flatten()
        self._faults[:, list(Fault).index(Fault.OVERLONG)] = beyond
        first = self.accelerator.process_index * len(responses)
        return [
            replace(response, faults=(*response.faults, Fault.OVERLONG)) if far else response
            for response, far in zip(responses, beyond[first : first + len(responses)].tolist(), strict=True)
        ]

    def _read_decision(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Decision:
        """The old policy's first-token distribution for every query of the global batch, `[Q]` entries each.

        Each process computes every g-th of its rows, g the greatest stride that no group boundary falls into; with
        whole groups per process that is each prompt once.
        """
        num_rows, group = len(prompt_ids), self._group_size()
        stride = math.gcd(num_rows, group)
        # As many prompts at a time as have no more tokens than a micro-batch of the longest responses. All processes
        # take the widest one's number, because ZeRO-3 and FSDP need the same number of passes of each.
        width = int(self.accelerator.gather(torch.tensor([prompt_ids.shape[1]], device=prompt_ids.device)).amax())
        rows = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        chunk = rows * (width + self.max_completion_length) // width
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with (
            disable_gradient_checkpointing(self.model, checkpointing),
            self.accelerator.autocast(),
        ):
            parts = [
                read_decision(self.model, ids, mask, self.mode_tokens, self.temperature)
                for ids, mask in zip(prompt_ids[::stride].split(chunk), prompt_mask[::stride].split(chunk), strict=True)
            ]
        local = Decision(*(torch.cat(field) for field in zip(*parts, strict=True)))
        return Decision(*(self.accelerator.gather(field)[:: group // stride] for field in local))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with HGPO's per-token advantages `[B, T]` in place of TRL's `[B]`."""
        self._rollout_inputs = inputs
        self._decided = self._no_think_rewards = None
        output = super()._generate_and_score_completions(inputs)
        decision = self._read_decision(output["prompt_ids"], output["prompt_mask"])
        grouped = self._grouped(self._rewards_per_func)
        advantages = compute_advantages(
            grouped,
            self._lengths,
            estimator=self.args.estimator,
            alpha=self.args.alpha,
            margin=self.args.margin,
            intra_scope=self.args.intra_scope,
            ties=self.args.ties,
            discount=self.args.discount,
            mode_probs=decision.mode_probs if self.args.decision_weighting == "saturating" else None,
            decided=self._decided,
        )
        first_row = self.accelerator.process_index * len(inputs)
        width = output["completion_ids"].shape[1]  # this process's own longest response, perhaps padded further
        local = advantages[first_row : first_row + len(inputs), :width]
        output["advantages"] = nn.functional.pad(local, (0, width - local.shape[1]))

        self._log_group_metrics(grouped, decision)
        self._log_table(advantages)
        return output

    def _grouped(self, rewards_per_func: Tensor) -> Tensor:
        """The weighted sums of rewards `[B, F]` by query and mode, `[Q, 2, N/2]`."""
        rewards = weighted_sum(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        return rewards.view(-1, len(MODES), self._group_size() // len(MODES))

    # ------------------------------------------------------------------------------- micro-batches of like length

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batches, regrouped by length and trimmed when a new rollout has been cut into them."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.args.trim_micro_batches or self._buffered_inputs is before:
            return inputs
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
        """Old and reference log-probabilities in chunks of like length, each trimmed; the loss's own pass as it is."""
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

    # --------------------------------------------------------------------------------------------------- resuming

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochSampler(cast(RepeatSampler, super()._get_train_sampler(dataset)), self.args.seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """TRL's checkpoint, with this process's rollout where the next step goes on with it."""
        super()._save_checkpoint(model, trial)
        if self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations) != 0:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            rollout = {"step": self._step, "micro_batches": self._buffered_inputs}
            torch.save(rollout, folder / self._rollout_file())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, self._rollout_file())).is_file():
            rollout = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = rollout["step"], rollout["micro_batches"]

    def _rollout_file(self) -> str:
        return f"rollout_{self.accelerator.process_index}.pt"

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's, with `hgpo_trl.modes.hybrid_accuracy.figures` of the whole data set under `{prefix}_hgpo/`.

        Every prompt counts once. Where the last batch does not come out even over the processes, it is filled up with
        the data set's first prompts; these are left out. A stream's length is not known, so there they count. A figure
        without a value is None.
        """
        self._evaluated = []
        self._to_evaluate = len(cast(Dataset, dataloader.dataset)) if has_length(dataloader.dataset) else math.inf
        kept = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction = 0.0, False  # passes for a loss
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.beta, self.vllm_importance_sampling_correction = kept
            self._to_evaluate = math.inf
        scores, lengths, think, no_think, picked = map(np.concatenate, zip(*self._evaluated, strict=True))
        margin = self.args.margin if self.args.eval_margin is None else self.args.eval_margin
        budget = self.args.eval_token_budget
        found = figures(scores, lengths, think, no_think, picked, margin, budget)
        out_of_reach = math.isnan(found.get("accuracy_at_budget", 0.0)) and not np.isnan(scores).all()
        if out_of_reach and not self._warned_budget:
            self._warned_budget = True
            logger.warning(
                f"No decision bias keeps to eval_token_budget={budget}: never thinking takes "
                f"{found['mean_tokens/no_think']:.1f} tokens per response. hgpo/accuracy_at_budget has no value, and a "
                "checkpoint without one is never the best. Raise the budget."
            )
        metrics = cast(dict[str, float | None], output.metrics)
        metrics |= {f"{metric_key_prefix}_hgpo/{k}": None if math.isnan(v) else v for k, v in found.items()}
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Sample and score a batch. The loss on a policy's own samples says nothing about it, and is left out."""
        self._prepare_inputs(inputs)
        return None, None, None

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        """Trainer's; a figure without a value is never the best."""
        return super()._determine_best_metric({k: math.nan if v is None else v for k, v in metrics.items()}, trial)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Trainer's; a figure without a value is shown as null, as `save_metrics` writes it."""
        super().log_metrics(split, {k: "null" if v is None else v for k, v in metrics.items()})

    # ---------------------------------------------------------------------------------------------------- metrics

    def _log_group_metrics(self, rewards: Tensor, decision: Decision) -> None:
        """One value per query for each metric: TRL averages what it finds, so every query counts once."""
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        if not training:
            queries = int(min(len(rewards), self._to_evaluate))
            self._to_evaluate -= queries
            rewards, decision = rewards[:queries], Decision(*(field[:queries] for field in decision))
        shape, rows = rewards.shape, rewards.numel()
        unsampled = self._unsampled(len(self._lengths))[:rows]
        lengths, faulty, truncated = (
            x[:rows].float().masked_fill(unsampled, torch.nan).view(shape)
            for x in (self._lengths, self._faults.any(dim=1), self._truncated)
        )
        found = (
            self._faults[:rows].float().masked_fill(unsampled[:, None], torch.nan).view(len(rewards), -1, len(Fault))
        )
        shares = found.nanmean(dim=1).unbind(dim=1)
        per_query = {f"hgpo/faults/{kind}": share for kind, share in zip(Fault, shares, strict=True)}
        per_query["hgpo/rollout_tokens"] = (self._lengths[:rows] - 1).view(len(rewards), -1).sum(dim=1)
        if self._decided is not None:
            per_query["hgpo/lazy_decided"] = self._decided
            for name, real in (
                ("mean_length", lengths.nanmean()),
                ("min_length", lengths[~lengths.isnan()].amin()),
                ("clipped_ratio", truncated.nanmean()),
            ):
                metrics[f"completions/{name}"][-1] = real.item()  # TRL has counted the decision tokens alone
        means = torch.stack([rewards, lengths, truncated, faulty]).nanmean(dim=3)
        by_mode = torch.cat([means, decision.mode_probs[None]])
        for mode, values in zip(MODES, by_mode.unbind(dim=2), strict=True):
            for name, value in zip(("reward", "length", "truncated", "format_faults", "prob"), values, strict=True):
                per_query[f"hgpo/{name}/{mode}"] = value
        per_query["hgpo/off_mode_mass"] = decision.neither
        per_query["hgpo/decision_entropy"] = decision.entropy

        r_inter, r_intra = assign_rewards(rewards, self.args.margin, self.args.ties, self._decided)
        compared = r_inter.any(dim=2).any(dim=1)
        per_query["hgpo/think_win_rate"] = r_inter[:, 0].amax(dim=1).masked_fill(~compared, torch.nan)
        flat = tied_modes(rewards, r_intra).all(dim=1)  # nothing to choose within either mode
        per_query["hgpo/no_intra_signal"] = flat
        per_query["hgpo/no_signal"] = flat & ~compared
        transferred = torch.stack([column.float() for column in per_query.values()]).tolist()
        for name, column in zip(per_query, transferred, strict=True):
            metrics[name] += column

        if not training:
            columns = (rewards, lengths, decision.think, decision.no_think)
            picked = decision.picked.cpu().numpy()
            self._evaluated.append((*(column.double().cpu().numpy() for column in columns), picked))

        off_mode_mass = decision.neither.mean().item()
        if off_mode_mass > self.args.off_mode_warning and not self._warned_off_mode:
            self._warned_off_mode = True
            logger.warning(
                f"The first token is neither mode with a mean probability of {off_mode_mass:.3f} (off_mode_warning="
                f"{self.args.off_mode_warning}). The policy is leaving the two modes: use "
                "decision_weighting=saturating, raise beta, or lower the learning rate; if it was so from the first "
                "step, train HFT for longer."
            )

    def _log_table(self, advantages: Tensor) -> None:
        """Show HGPO's own numbers in TRL's completion table: mode, advantage of the response and of the decision."""
        num_rows = len(advantages)
        last = advantages.gather(1, self._lengths[:, None] - 1)[:, 0]  # beyond the decision it is norm(r_intra)
        last = last.masked_fill(self._unsampled(num_rows), 0.0)
        for _ in range(min(num_rows, len(self._logs["advantages"]))):  # TRL has just appended its own
            self._logs["advantages"].pop()
        of_responses, of_decisions = torch.stack([last, advantages[:, 0]]).tolist()
        self._logs["advantages"].extend(of_responses)
        self._logs["extra"]["decision_advantage"].extend(of_decisions)
        self._logs["extra"]["mode"].extend(MODES[mode].value for mode in self._row_modes(num_rows, first=0))


@cache
def _which_faults(faults: tuple[Fault, ...]) -> tuple[bool, ...]:
    """Of every kind of fault, whether it is there."""
    return tuple(fault in faults for fault in Fault)


def _server_url(args: HGPOConfig) -> str:
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def _prepare_vllm(args: HGPOConfig, model: str) -> None:
    """Check what vLLM needs before the model is loaded.

    Raises:
        MissingPackageError: vLLM is missing or of an unsupported version.
        ServerError, UserError: the server does not answer, or serves another model.
    """
    check_vllm_installed("use_vllm=true")
    if args.vllm_mode == "colocate":
        keep_cpu_weights_replaceable()
    elif args.process_index == 0:
        check_server(_server_url(args), model, args.vllm_server_timeout)


def check_evaluation(args: HGPOConfig, eval_dataset: Any) -> None:
    """Check that there is something to evaluate on, and that evaluations give what the best checkpoint is chosen by.

    Args:
        eval_dataset: as `HGPOTrainer` takes it. What counts is whether there is one, and the names where there are
            several.

    Raises:
        UserError: `eval_strategy` without prompts, or a `metric_for_best_model` that is not among the figures.
    """
    if args.eval_strategy == "no":
        return
    if eval_dataset is None:
        raise UserError(
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value} needs prompts to evaluate on. Set "
            'eval_data (of HGPOTrainer: eval_dataset), or eval_strategy to "no".'
        )
    if args.metric_for_best_model is None:
        return
    one, half = np.ones((1, len(MODES), 1)), np.full(1, 0.5)
    names = figures(one, one, half, half, np.zeros(1, dtype=np.int64), token_budget=args.eval_token_budget)
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    valid = [f"eval_{of_set}hgpo/{name}" for of_set in sets for name in names]
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if metric not in valid:
        budget = " (accuracy_at_budget needs eval_token_budget)" if args.eval_token_budget is None else ""
        nearest = difflib.get_close_matches(metric, valid, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model!r} is none of the evaluation's figures{budget}.{hint} "
            f"There are {', '.join(valid)}."
        )
