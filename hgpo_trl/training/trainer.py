"""HGPOTrainer: TRL's GRPOTrainer with hybrid group sampling and mode-aware advantages."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, has_length
from trl.data_utils import is_conversational
from trl.models.utils import disable_gradient_checkpointing

from hgpo_trl.common import paper
from hgpo_trl.inference.decoding import set_generation_config
from hgpo_trl.inference.limits import ThinkBudget
from hgpo_trl.modes import MODES, OTHER, Fault, Response, check_embeddings
from hgpo_trl.modes.decision import OFF_MODE, Decision, draw_other, read_decision
from hgpo_trl.modes.hybrid_accuracy import THINK
from hgpo_trl.rewards.functions import answer_parts, check_finite, checked, floor_faults, overlong, split_completions
from hgpo_trl.training.advantages import Estimator
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.group_decisions import read_group_decisions
from hgpo_trl.training.lazy import LazyThinking
from hgpo_trl.training.lora import prepare_wrapped
from hgpo_trl.training.metrics import EvaluationMetrics, group_metrics, sampled_completions
from hgpo_trl.training.micro_batches import MicroBatchTrainer
from hgpo_trl.training.resume import ResumableTrainer
from hgpo_trl.training.rollout import OwnTokens, Rollout, inspect_responses, response_modes, row_modes, unsampled_rows
from hgpo_trl.training.rules import Groups, Rule, build_rule
from hgpo_trl.training.validate import as_list, check_advantages, check_text_only, model_name, validate
from hgpo_trl.training.vllm import naming_a_failing_server, prepare_generation

logger = get_logger(__name__)

NO_MASS_BELOW = 1e-4  # mean probability of a mode at the first step that causes a warning

OFF_MODE_WARNING = (
    "The response begins in neither mode with a mean probability of {mass:.3f} (off_mode_warning={limit}). The policy "
    "is leaving the two modes: use decision_weighting=winner, raise beta, or lower the learning rate. If it has been "
    "so from the first step, train HFT for longer."
)
NO_MASS = (
    "The policy begins with the mode {mode} with a mean probability of {mass:.1e}: it has hardly ever seen that "
    "opening, and the decision moves slowly from there. Check mode_format and the chat template (docs/formats.md); if "
    "they are right, a short Stage I in this format, or a higher learning rate, gives the mode its mass."
)
OUT_OF_REACH = (
    "No decision bias keeps to eval_token_budget={budget}: never thinking takes {no_think:.1f} tokens per response. "
    "hgpo/accuracy_at_budget has no value, and a checkpoint without one is never the best. Raise the budget."
)


class HGPOTrainer(MicroBatchTrainer, ResumableTrainer):
    """Trainer for Hybrid Group Policy Optimization (arXiv 2505.14631, Algorithm 1).

    Every query is sampled in both modes: of its N responses the first N/2 are forced to begin with the opening of the
    think mode, the others with that of the no-think mode (Eq. 5, 6): `<think>` and `<no_think>`, or the model's own.
    The mode means decide the inter-group reward, the samples of a mode compete for the intra-group reward (Eq. 8, 9),
    and together they give one advantage per token (Eq. 10). With `lazy_thinking`, queries that no-think wins whatever
    thinking would bring get no think samples. `mode_rule` puts another rule for learning when to think in the place of
    Eq. 8 to 10 (`hgpo_trl.training.rules`); in evaluation both modes are always forced.

    The loss is that of `GRPOTrainer`. Overridden are:

    - `__init__`: validates arguments and data before a model is loaded.
    - `_generate_and_score_completions`: replaces the advantages and logs the metrics of both modes.
    - `_generate_single_turn`: forces the modes, unless the rule samples them.
    - `_calculate_rewards`: shows the answer parts to the reward functions and keeps the scored rollout.
    - `_log_completion_extra`: puts columns of reward functions into their rows under `lazy_thinking`.
    - `evaluation_loop`, `prediction_step`: compute hybrid accuracy and its companions in place of a loss.
    - `_determine_best_metric`, `log_metrics`: accept metrics without a value.
    - `_prepare_inputs`, `training_step`, `compute_loss`, `_get_per_token_logps_and_entropies` (`MicroBatchTrainer`):
      compute less padding.
    - `_get_train_sampler`, `_save_checkpoint`, `_load_optimizer_and_scheduler` (`ResumableTrainer`): let a resumed run
      go on where it stopped.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, ...: as in `GRPOTrainer`. The model must know the four mode
            tags (`hgpo_trl.modes.add_mode_tokens`), which Hybrid Fine-Tuning adds, or have modes of its own
            (`hgpo_trl.modes.format_of`). Reward functions get the answer
            part of every response as its completion, and all its parts as the column `response` (a
            `hgpo_trl.modes.Response` each); a malformed response gets the lowest reward whatever they return.
        args: `HGPOConfig`.
        estimator: advantage estimator of your own for HGPO (`hgpo_trl.training.advantages.Estimator`), in place of
            `args.estimator`.

    Raises:
        UserError: the tokenizer, the data or an argument does not fit; raised before a model is loaded where possible.
        UnsupportedError: `tools`, `environment_factory`, `rollout_func` or images are asked for.
    """

    args: HGPOConfig
    model: PreTrainedModel
    max_completion_length: int
    _logs: dict[str, Any]

    _tag_names = ["trl", "hgpo"]
    _name = "HGPO"
    _paper = {"title": paper.TITLE, "id": paper.ARXIV_ID, "citation": paper.CITATION}

    _rule: Rule
    _rollout: Rollout  # the latest
    _lazy: LazyThinking | None = None  # of the rollout that is being sampled; None: both modes are sampled at once

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: HGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        estimator: Estimator | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = HGPOConfig(f"{model_name(model).split('/')[-1]}-HGPO")
        if not isinstance(args, HGPOConfig):
            raise TypeError(f"args must be an HGPOConfig; got {type(args).__name__}.")
        if processing_class is None:
            sides = {"truncation_side": "left", "padding_side": "left"}
            processing_class = AutoTokenizer.from_pretrained(
                model_name(model), trust_remote_code=args.trust_remote_code, **sides
            )
        rule = build_rule(args, **({} if estimator is None else {"estimator": estimator}))
        self.mode_tokens = validate(args, model, processing_class, reward_funcs, train_dataset, eval_dataset, kwargs)
        self._rooms = args.limits.rooms(self.mode_tokens)
        self._budget = args.limits.budget(processing_class, self.mode_tokens)
        if reward_funcs is not None:
            reward_funcs = [checked(reward_func) for reward_func in as_list(reward_funcs)]
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        check_embeddings(self.model, self.mode_tokens)
        set_generation_config(self.model, self._tokenizer)
        if is_peft_model(self.model):
            prepare_wrapped(self.model)
        if self.use_vllm:
            prepare_generation(self.vllm_generation, is_peft_model(self.model))
        self._limit_new_tokens(max(self._rooms))
        self._rule = rule
        self._evaluation = EvaluationMetrics()
        self._warned: set[str] = set()  # messages that have been logged

    def _limit_new_tokens(self, max_new_tokens: int) -> None:
        """Let the backend sample so many tokens for a response, at most."""
        if self.use_vllm:
            self.vllm_generation.max_completion_length = max_new_tokens
        else:
            self.generation_config.max_new_tokens = max_new_tokens
            self.generation_kwargs["max_new_tokens"] = max_new_tokens

    @property
    def _group_size(self) -> int:
        """N, in training or in evaluation."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        assert size is not None  # HGPOConfig has checked it
        return size

    # ------------------------------------------------------------------------------- one rollout (Algorithm 1)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with HGPO's per-token advantages `[B, T]` in place of TRL's `[B]`."""
        is_lazy = self.args.lazy_thinking and self.model.training
        self._lazy = LazyThinking(inputs, self._group_size, self.accelerator) if is_lazy else None
        output = super()._generate_and_score_completions(inputs)  # sampling and rewards: the overrides below
        if self._budget is not None:
            output["tool_mask"] = self._mask_forced(output, self._budget)
        rollout = self._rollout
        decision = self._read_decision(output["prompt_ids"], output["prompt_mask"])
        advantages = self._advantages(inputs, rollout, decision)
        first = self.accelerator.process_index * len(inputs)
        width = output["completion_ids"].shape[1]  # this process's own longest response, perhaps padded further
        local = advantages[first : first + len(inputs), :width]
        output["advantages"] = nn.functional.pad(local, (0, width - local.shape[1]))
        if self._rule.decision_log_prob is not None and self.model.training:
            output["old_per_token_logps"] = self._old_log_probs(output)
            output["old_per_token_logps"][:, len(self.mode_tokens.prefix)] = self._rule.decision_log_prob
        self._log_rollout(rollout, decision)
        self._log_completion_table(rollout, advantages)
        return output

    def _advantages(self, inputs: list[dict[str, Any]], rollout: Rollout, decision: Decision) -> Tensor:
        """The rule's advantages of the global batch, `[B, T]`."""

        def column(name: str) -> Tensor:
            local = torch.tensor([float(row.get(name, math.nan)) for row in inputs], device=self.accelerator.device)
            return self.accelerator.gather(local)

        shape = (-1, rollout.group_size)
        own = OwnTokens.of(self.mode_tokens, len(rollout.lengths), rollout.group_size, rollout.lengths.device)
        lengths = own.lengths(rollout.lengths)
        advantages = self._rule.advantages(
            Groups(
                rewards=rollout.response_rewards.view(shape),
                modes=rollout.modes.view(shape),
                lengths=lengths.view(shape),
                mode_probs=decision.mode_probs,
                columns={name: column(name).view(shape) for name in self._rule.columns},
                decided=rollout.decided,
            )
        )
        if self.model.training:
            check_advantages(self.args.mode_rule, self._rule, advantages, lengths)
        return own.spread(advantages)

    def _mask_forced(self, output: dict[str, Any], budget: ThinkBudget) -> Tensor:
        """`[b, T]`, 0 for tokens that closed a reasoning by force, by which TRL's loss leaves them out."""
        ids, lengths = output["completion_ids"], output["completion_mask"].sum(dim=1)
        thinks = torch.tensor(self._row_modes(len(ids)), device=ids.device) == THINK
        forced = budget.forced(ids, lengths, thinks)
        self._rollout = replace(self._rollout, closing_tokens=self.accelerator.gather(forced.sum(dim=1)))
        return (~forced).to(output["completion_mask"].dtype)

    def _old_log_probs(self, output: dict[str, Any]) -> Tensor:
        """`[b, T]`, this process's rows under the old policy; TRL leaves them out where the ratio is always 1."""
        if "old_per_token_logps" in output:
            return output["old_per_token_logps"]
        ids, mask = (
            torch.cat([output[f"prompt_{kind}"], output[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        with torch.no_grad(), self._without_checkpointing():
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, output["completion_ids"].shape[1], self.args.per_device_train_batch_size
            )
        return log_probs

    def _without_checkpointing(self) -> AbstractContextManager:
        """Switch gradient checkpointing off: passes that need no gradients gain nothing from it."""
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        return disable_gradient_checkpointing(self.model, kwargs)

    # --- sampling (Eq. 5, 6)

    @property
    def _samples_modes(self) -> bool:
        """Whether the policy draws the modes of this rollout; else they are forced."""
        return self._rule.samples_modes and self.model.training

    def _row_modes(self, num_rows: int) -> list[int]:
        """Modes of this process's rows: 0 = think, 1 = no_think."""
        return row_modes(num_rows, self._group_size, self.accelerator.process_index * num_rows)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Force each row's mode: its opening ends the prompt during sampling and is then moved to the response's front.

        The forced tokens were not sampled, so they have no sampling log-probability: None, which TRL turns into an
        importance ratio of exactly 1. Nothing is forced in training under a rule that samples the mode.
        """
        check_text_only(images, multimodal_fields)
        if self._samples_modes:
            with naming_a_failing_server(self.args, self.state.global_step):
                return super()._generate_single_turn(prompt_ids, None, {}, num_generations, has_tool_images)
        modes = self._row_modes(len(prompt_ids))
        openings = self._openings(prompt_ids, modes)
        think, no_think = ([row for row, mode in enumerate(modes) if mode == m] for m in range(len(MODES)))
        per_mode = num_generations // 2
        # A server samples equal prompts in one request. Those that end in a token drawn for each row are not equal.
        same = 1 if OTHER in self.mode_tokens.decision else per_mode
        completion_ids = [list(opening) for opening in openings]
        log_probs: list[list[float | None]] = [[None] * len(opening) for opening in openings]
        generate = super()._generate_single_turn

        def sample(prompts: list[list[int]], same: int, max_new_tokens: int) -> tuple[list[list[int]], Any]:
            is_training = self.model.training
            self._limit_new_tokens(max_new_tokens)
            with naming_a_failing_server(self.args, self.state.global_step):
                generated = generate(prompts, None, {}, same, has_tool_images)
            if self.model.training != is_training:  # continuous batching leaves the model in training mode
                self.model.train(is_training)
            return generated

        def draw(rows: list[int]) -> tuple[list[list[int]], Any]:
            forced = [[*prompt_ids[row], *openings[row]] for row in rows]
            mode = modes[rows[0]]  # rows of both modes have the same limit
            if self._budget is not None and mode == THINK:
                return self._budget.sample(forced, same, sample, self.eos_token_ids)
            return sample(forced, same, self._rooms[mode])

        def extend(rows: list[int]) -> None:
            ids, sampled_log_probs = draw(rows)
            for place, row in enumerate(rows):
                completion_ids[row] += ids[place]
                log_probs[row] += sampled_log_probs[place] if sampled_log_probs else []

        if self._lazy is not None:
            extend(no_think)
            if undecided := self._undecided(self._lazy, completion_ids):
                extend(undecided)
            elif not self._lazy.decided.all():
                draw(think[:1])  # for nothing: ZeRO-3 and FSDP need all processes as long as one of them samples
        # Plain generation runs until its longest row ends, so the short no-think rows do not wait for the long ones.
        # More than half a group holds both modes wherever it begins, so every process makes the same two calls, which
        # ZeRO-3 and FSDP need.
        elif self.args.limits.of_both is None or (
            not (self.use_vllm or self.use_transformers_continuous_batching) and len(modes) > per_mode
        ):
            extend(think)
            extend(no_think)
        else:
            extend(list(range(len(modes))))
        return completion_ids, log_probs if self.use_vllm else None  # no other backend returns any

    def _openings(self, prompt_ids: list[list[int]], modes: list[int]) -> list[list[int]]:
        """The opening of each row's mode, with a token that the policy draws where the decision is OTHER."""
        openings = [list(self.mode_tokens.openings[mode]) for mode in modes]
        if OTHER not in self.mode_tokens.decision:
            return openings
        draws = self.mode_tokens.decision.index(OTHER)
        rows = self.args.per_device_train_batch_size
        with self._without_checkpointing(), self.accelerator.autocast():
            drawn = draw_other(
                self.model, self._tokenizer.pad_token_id, prompt_ids, self.mode_tokens, self.temperature, rows
            )
        return [
            [*opening, token] if mode == draws else opening
            for opening, token, mode in zip(openings, drawn, modes, strict=True)
        ]

    def _undecided(self, lazy: LazyThinking, completion_ids: list[list[int]]) -> list[int]:
        """Score the no-think responses, the only ones there are; returns the think rows that need samples."""
        prompts = [row["prompt"] for row in lazy.inputs]
        completions: list[Any] = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        rollout = self._score(lazy.inputs, prompts, completions, completion_ids)
        return lazy.decide(rollout.rewards, self.args.margin)

    # --- rewards (Eq. 7)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """TRL's rewards `[B, F]` of the answer parts, lowest where the format is broken."""
        self._rollout = self._score(inputs, prompts, completions, completion_ids_list)
        return self._rollout.rewards_per_func

    def _score(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids: list[list[int]]
    ) -> Rollout:
        """Score all responses; under `lazy_thinking` those that this pass has to.

        Responses that are not sampled have no fault and no reward.
        """
        lazy, group_size, device = self._lazy, self._group_size, self.accelerator.device
        decided = None if lazy is None else lazy.decided
        responses = split_completions(completions, self.mode_tokens.mode_format)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        local = inspect_responses(responses, completion_ids, ends)
        lengths, truncated, words, faults = self.accelerator.gather(local.to(device)).split(
            (1, 1, 1, len(Fault)), dim=1
        )
        sampled = ~unsampled_rows(len(lengths), group_size, decided, device)[:, None]
        faults, responses = self._cap_no_think(faults * sampled, responses)
        shown = [True] * len(inputs) if lazy is None else lazy.asked_here
        rewards = super()._calculate_rewards(
            [
                {**row, "response": response if is_shown else None}
                for row, response, is_shown in zip(inputs, responses, shown, strict=True)
            ],
            prompts,
            answer_parts(completions, responses),
            completion_ids,
        )
        check_finite(rewards, self.reward_func_names)
        weights = self.reward_weights.to(device)
        if lazy is not None:
            rewards = lazy.merge(rewards, weights, self.reward_func_names)
        query = torch.arange(len(rewards), device=device) // group_size
        rewards = floor_faults(rewards, faults.any(dim=1), query, weights)
        truncated = (truncated * sampled)[:, 0]
        modes = self.accelerator.gather(response_modes(responses).to(device)) if self._samples_modes else None
        return Rollout(
            rewards,
            weights,
            lengths[:, 0],
            truncated,
            faults,
            words[:, 0],
            group_size,
            decided,
            forced=self.mode_tokens.forced,
            sampled_modes=modes,
        )

    def _cap_no_think(self, faults: Tensor, responses: list[Response]) -> tuple[Tensor, list[Response]]:
        """Add `Fault.OVERLONG` to no-think responses whose answer is beyond the cap; `responses` are this process's."""
        if self.args.no_think_cap is None and self.args.no_think_max_tokens is None:
            return faults, responses
        answers = self._tokenizer([response.answer for response in responses], add_special_tokens=False)["input_ids"]
        local = torch.tensor([len(ids) for ids in answers], device=self.accelerator.device)
        shape = (-1, len(MODES), self._group_size // len(MODES))
        lengths, well_formed = self.accelerator.gather(local).view(shape), ~faults.any(dim=1).view(shape)
        beyond = overlong(lengths, well_formed, self.args.no_think_cap, self.args.no_think_max_tokens).flatten()
        faults[:, list(Fault).index(Fault.OVERLONG)] = beyond
        first = self.accelerator.process_index * len(responses)
        return faults, [
            replace(response, faults=(*response.faults, Fault.OVERLONG)) if far else response
            for response, far in zip(responses, beyond[first : first + len(responses)].tolist(), strict=True)
        ]

    def _log_completion_extra(self, column: str, values: list) -> None:
        """TRL's, with the values in the places of the rows that the reward functions are shown."""
        if self._lazy is None:
            super()._log_completion_extra(column, values)
        else:
            self._lazy.fill_column(column, self._pending_extra_logs[column], values)

    # --- the decision (mode probabilities, metrics)

    def _read_decision(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Decision:
        """Read the old policy's first-token distribution for every query of the global batch, `[Q]` per field."""
        training = self.model.training
        rows = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        max_tokens = self.args.micro_batch_tokens if training else None
        read = partial(read_decision, self.model, tokens=self.mode_tokens, temperature=self.temperature)
        with self._without_checkpointing(), self.accelerator.autocast():
            return read_group_decisions(
                read,
                prompt_ids,
                prompt_mask,
                self._group_size,
                rows,
                self.max_completion_length,
                self.accelerator,
                max_tokens,
            )

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's, with `EvaluationMetrics` of the whole data set under `{prefix}_hgpo/`; without a value they are None.

        Every prompt counts once (of a stream, whose length is not known, those that fill the last batch count again).
        """
        prompts = len(cast(Dataset, dataloader.dataset)) if has_length(dataloader.dataset) else math.inf
        self._evaluation = EvaluationMetrics(prompts)
        kept = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction = 0.0, False  # their forward passes serve a loss alone
        try:
            arguments = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            output = super().evaluation_loop(*arguments)
        finally:
            self.beta, self.vllm_importance_sampling_correction = kept
        margin, budget = self.args.eval_margin, self.args.eval_token_budget
        found = self._evaluation.compute(self.args.margin if margin is None else margin, budget)
        if self._evaluation.out_of_reach(found):
            self._warn_once(OUT_OF_REACH, budget=budget, no_think=found["mean_tokens/no_think"])
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
        """Trainer's; a metric without a value is never the best."""
        return super()._determine_best_metric({k: math.nan if v is None else v for k, v in metrics.items()}, trial)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Trainer's; a metric without a value is shown as null, as `save_metrics` writes it."""
        super().log_metrics(split, {k: "null" if v is None else v for k, v in metrics.items()})

    # --------------------------------------------------------------------------------------------------- logging

    def _log_rollout(self, rollout: Rollout, decision: Decision) -> None:
        """Log one value per query for each metric: TRL averages them, so every query counts once."""
        logged = self._metrics["train" if self.model.training else "eval"]
        queries = len(decision.think) if self.model.training else self._evaluation.add(rollout, decision)
        metrics = group_metrics(rollout, decision, self.args.margin, self.args.ties)
        columns = torch.stack([column[:queries].float() for column in metrics.values()]).tolist()  # one transfer
        for name, column in zip(metrics, columns, strict=True):
            logged[name] += column
        if rollout.decided is not None:
            for name, value in sampled_completions(rollout).items():
                logged[name][-1] = value  # in place of TRL's
        off_mode_mass = decision.neither[:queries].mean().item()
        if off_mode_mass > self.args.off_mode_warning:
            self._warn_once(OFF_MODE_WARNING, mass=off_mode_mass, limit=self.args.off_mode_warning)
        if self.state.global_step == 0:  # a trained policy may well have given up a mode
            for mode, mass in zip(MODES, decision.mode_probs[:queries].mean(dim=0).tolist(), strict=True):
                if mass < NO_MASS_BELOW:
                    self._warn_once(NO_MASS, mode=mode, mass=mass)

    def _log_completion_table(self, rollout: Rollout, advantages: Tensor) -> None:
        """Show mode, advantage of the response and advantage of the decision in TRL's table of completions."""
        num_rows = len(advantages)
        last = advantages.gather(1, rollout.lengths[:, None] - 1)[:, 0]  # beyond the decision it is norm(r_intra)
        last = last.masked_fill(rollout.unsampled, 0.0)
        for _ in range(min(num_rows, len(self._logs["advantages"]))):  # TRL has just appended its own
            self._logs["advantages"].pop()
        of_responses, of_decisions = torch.stack([last, advantages[:, len(self.mode_tokens.prefix)]]).tolist()
        self._logs["advantages"].extend(of_responses)
        self._logs["extra"]["decision_advantage"].extend(of_decisions)
        names = {OFF_MODE: "neither", **{place: mode.value for place, mode in enumerate(MODES)}}
        self._logs["extra"]["mode"].extend(names[mode] for mode in rollout.modes.tolist())

    def _warn_once(self, message: str, **values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message.format(**values))
