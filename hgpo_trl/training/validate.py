"""Validation of arguments and data, before a model is loaded.

`HGPOConfig` checks its own fields when it is made; `validate` checks them against model, tokenizer, data and rewards.
"""

import difflib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_utils import IntervalStrategy

from hgpo_trl.common.errors import UnsupportedError, UserError
from hgpo_trl.inference.limits import LIMITS
from hgpo_trl.modes import LHRM, OTHER, ModeTokens, mode_tokens
from hgpo_trl.modes.hybrid_accuracy import GREATER_IS_BETTER
from hgpo_trl.rewards.functions import check_weights, is_model
from hgpo_trl.training.advantages import (
    DECISION_WEIGHTINGS,
    INTRA_SCOPES,
    TIES,
    check_choice,
    check_coefficients,
    load_estimator,
)
from hgpo_trl.training.checks import check_dataset
from hgpo_trl.training.losses import DIVISORS
from hgpo_trl.training.metrics import BUDGET_METRIC, EVALUATION_METRICS
from hgpo_trl.training.rules import HGPO, Rule, build_rule, load_rule
from hgpo_trl.training.vllm import prepare_vllm

logger = logging.getLogger(__name__)

Args = Any  # `HGPOConfig`, whose module imports this one
BEST_METRIC = "eval_hgpo/hybrid_accuracy"  # by which the best checkpoint is chosen, unless another one is named


def validate(
    args: Args,
    model: Any,
    tokenizer: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    other: Mapping[str, Any],
) -> ModeTokens:
    """Check everything that a training needs and that can be known before its model is loaded.

    Args:
        args: `HGPOConfig`.
        model, tokenizer, reward_funcs, train_dataset, eval_dataset: as `HGPOTrainer` takes them.
        other: the other arguments that it is given.

    Returns:
        The ids of the mode tags.

    Raises:
        UserError, UnsupportedError: something does not fit; the message names it and the remedy.
    """
    for name in ("tools", "environment_factory", "rollout_func"):
        if other.get(name):
            raise UnsupportedError(
                f"{name} is not supported by HGPOTrainer: both modes of a query are sampled in a single turn. "
                "Leave it unset, or use TRL's GRPOTrainer."
            )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UnsupportedError(
            f"processing_class must be a tokenizer; got {type(tokenizer).__name__}. HGPOTrainer trains text-only "
            "models."
        )
    for name in ("response_template", "response_schema"):
        if getattr(tokenizer, name, None) is not None:
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
        prepare_vllm(args, model_name(model))
    name_unread_fields(args)
    check_evaluation(args, eval_dataset)
    tokens = mode_tokens(tokenizer)
    check_rule_format(args, tokens)
    check_columns(args, train_dataset)
    named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **named}.items():
        if dataset is not None or name == "train_dataset":
            check_dataset(name, dataset, tokenizer, args, model)
    if reward_funcs is not None:
        check_reward_funcs(args, as_list(reward_funcs))
    return tokens


def name_unread_fields(args: Args) -> None:
    """Warn of fields that are set but are not read, because `mode_rule` is not HGPO."""
    defaults = {field.name: field.default for field in fields(args)}
    given = {name: getattr(args, name) for name in HGPO.settings if getattr(args, name) != defaults[name]}
    if given and not issubclass(load_rule(args.mode_rule), HGPO) and args.process_index == 0:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        logger.warning(f"mode_rule={args.mode_rule} does not read {listed}, which only HGPO does.")


def check_rule_format(args: Args, tokens: ModeTokens) -> None:
    """Check that the rule can tell the modes apart in the model's format.

    Raises:
        UserError: it samples the mode, which no format but `lhrm` shows in one token; or it needs the decision token of
            both modes, and one mode has none.
    """
    rule, name = load_rule(args.mode_rule), tokens.mode_format.name
    if rule.samples_modes and tokens.mode_format != LHRM:
        raise UserError(
            f"mode_rule={args.mode_rule} lets the policy sample the mode, which works in the format lhrm alone; the "
            f"model's is {name}. Choose a rule that forces the modes, such as mode_rule=hgpo, or train Stage I in lhrm."
        )
    if rule.decision_log_prob is not None and OTHER in tokens.decision:
        raise UserError(
            f"mode_rule={args.mode_rule} sets the old probability of the decision token, but in the format {name} one "
            "mode has no such token: it begins with any but the other's. Set mode_rule=hgpo, or name another format."
        )


def check_columns(args: Args, train_dataset: Any) -> None:
    """Check that the training data has the columns that the rule reads.

    Raises:
        UserError: one is missing.
    """
    found = getattr(train_dataset, "column_names", None)
    if found is None:  # a stream may not know its columns
        return
    if missing := [name for name in load_rule(args.mode_rule).columns if name not in found]:
        raise UserError(
            f"mode_rule={args.mode_rule} needs the column {' and '.join(missing)} in train_data, which has "
            f"{', '.join(found)}. docs/rules.md says how to add it."
        )


def model_name(model: Any) -> str:
    """Path or hub id of a model, given as such or loaded."""
    return model if isinstance(model, str) else model.config._name_or_path


def as_list(reward_funcs: Any) -> list[Any]:
    """Reward functions as TRL takes them, one or a list of them, as a list."""
    return reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]


def check_text_only(images: Any, multimodal_fields: Mapping[str, Any]) -> None:
    """Check that a batch has nothing but text.

    Raises:
        UnsupportedError: it has images or other fields.
    """
    if images is not None or multimodal_fields:
        fields = ", ".join(["images"] * (images is not None) + list(multimodal_fields))
        raise UnsupportedError(
            f"HGPOTrainer trains text-only models; this batch has {fields}. Restrict tokenizer.model_input_names to "
            "input_ids and attention_mask."
        )


def check_advantages(name: str, rule: Rule, advantages: Tensor, lengths: Tensor) -> None:
    """Check a rule's advantages.

    Args:
        name: `mode_rule`.
        advantages: as the rule returns them.
        lengths: `[B]`, tokens of each response.

    Raises:
        UserError: they are not `[B, T]`, not finite, or not 0 beyond the end of a response.
    """
    shape = (len(lengths), int(lengths.max()))
    if advantages.shape != shape:
        raise UserError(
            f"mode_rule={name}: advantages must have the shape {list(shape)}; got {list(advantages.shape)}."
        )
    if not advantages.isfinite().all():
        hint = f", and numbers in {' and '.join(rule.columns)} of train_data" if rule.columns else ""
        raise UserError(f"mode_rule={name}: some advantages are not finite. Check rows without a reward{hint}.")
    if advantages.masked_fill(torch.arange(shape[1], device=lengths.device) < lengths[:, None], 0.0).any():
        raise UserError(f"mode_rule={name}: advantages beyond the end of a response must be 0. Use `Groups.per_token`.")


def check_reward_funcs(args: Args, reward_funcs: list[Any]) -> None:
    """Check that reward functions go with their weights, and with `lazy_thinking`.

    Raises:
        UserError: their number is not that of the weights, or `lazy_thinking` meets scores without bounds.
    """
    check_weights(args.reward_weights, len(reward_funcs))
    models = [func if isinstance(func, str) else type(func).__name__ for func in reward_funcs if is_model(func)]
    if args.lazy_thinking and models:
        raise UserError(
            f"lazy_thinking needs rewards between 0 and 1, but the scores of {' and '.join(models)} have no bounds. "
            "Name it as reward_model, which squashes them, or set lazy_thinking=false."
        )


def check_evaluation(args: Args, eval_dataset: Any) -> None:
    """Check that there are prompts to evaluate on, and that evaluations compute `metric_for_best_model`.

    Args:
        eval_dataset: as `HGPOTrainer` takes it; only whether there is one, and the names of several, count.

    Raises:
        UserError: `eval_strategy` without prompts, or a `metric_for_best_model` that evaluations do not compute.
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
    names = EVALUATION_METRICS if args.eval_token_budget is None else (*EVALUATION_METRICS, BUDGET_METRIC)
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    valid = [f"eval_{of_set}hgpo/{name}" for of_set in sets for name in names]
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if metric not in valid:
        budget = " (accuracy_at_budget needs eval_token_budget)" if args.eval_token_budget is None else ""
        nearest = difflib.get_close_matches(metric, valid, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model!r} is none of the evaluation's metrics{budget}.{hint} "
            f"There are {', '.join(valid)}."
        )


# --- fields of HGPOConfig ------------------------------------------------------------------------------------------


def check_fields(args: Args) -> None:
    """Check the fields of an `HGPOConfig` as they are given.

    Raises:
        UserError: naming the field, its value and the remedy.
    """
    load_estimator(args.estimator)
    check_choice("intra_scope", args.intra_scope, INTRA_SCOPES)
    check_choice("ties", args.ties, TIES)
    check_choice("decision_weighting", args.decision_weighting, DECISION_WEIGHTINGS)
    check_coefficients(args.alpha, args.margin, args.discount)
    _check_group_size("num_generations", args.num_generations, minimum=4)
    if args.num_generations_eval is not None:
        _check_group_size("num_generations_eval", args.num_generations_eval, minimum=2)
    if args.max_completion_length is None or args.max_completion_length < 2:
        raise UserError(
            f"max_completion_length must be at least 2, the decision token and one more; got "
            f"{args.max_completion_length}."
        )
    if not 0.0 <= args.off_mode_warning <= 1.0:
        raise UserError(f"off_mode_warning must lie between 0 and 1; got {args.off_mode_warning}.")
    for name in ("no_think_cap", "no_think_max_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be a finite number above 0, or null for no cap; got {value}.")
    _ = args.limits  # which refuses those that contradict each other
    if args.micro_batch_tokens is not None and args.micro_batch_tokens < 1:
        raise UserError(
            f"micro_batch_tokens must be at least 1 token, or null for per_device_train_batch_size rows; got "
            f"{args.micro_batch_tokens}."
        )
    if args.eval_margin is not None and not 0.0 <= args.eval_margin < float("inf"):
        raise UserError(
            f"eval_margin must be a finite number of at least 0, or null for margin; got {args.eval_margin}."
        )
    if args.eval_token_budget is not None and not 0.0 < args.eval_token_budget < float("inf"):
        raise UserError(
            f"eval_token_budget must be a finite number of tokens above 0, or null for no budget; got "
            f"{args.eval_token_budget}."
        )
    if args.eval_strategy == "no" and (args.load_best_model_at_end or args.save_strategy == "best"):
        raise UserError(
            "load_best_model_at_end and save_strategy=best choose a checkpoint by evaluations, but "
            "eval_strategy is no. Set eval_strategy and eval_data, or turn the best checkpoint off."
        )
    check_weights(args.reward_weights)
    if args.scale_rewards not in ("group", True):
        raise UserError(
            f"scale_rewards={args.scale_rewards!r} has no effect under HGPO, whose `estimator` normalises. Leave "
            "scale_rewards at its default; estimator=rloo subtracts a baseline without dividing by the std."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise UserError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} normalises each reward function "
            "before the sum, but HGPO compares the modes' raw mean rewards plus the margin. Use sum_then_normalize."
        )


def check_whole_groups(args: Args) -> None:
    """Check that a rollout holds whole groups of responses, once TRL has computed its size.

    Raises:
        UserError: it does not.
    """
    rows, group = args.generation_batch_size, args.num_generations
    processes, steps = args.world_size, args.steps_per_generation
    if steps is not None and rows == args.per_device_train_batch_size * processes * steps and rows % group:
        raise UserError(
            f"A rollout must hold whole groups of num_generations={group} responses, but per_device_train_batch_size="
            f"{args.per_device_train_batch_size} x {processes} processes x steps_per_generation="
            f"{steps} = {rows} rows must be divisible by num_generations. Change one of them "
            "(gradient_accumulation_steps sets steps_per_generation), or the number of processes."
        )


def check_resolved_fields(args: Args) -> None:
    """Check the fields of an `HGPOConfig` that TRL parses or computes.

    Raises:
        UserError: naming the field, its value and the remedy.
    """
    forced = {"thinking_mode", "enable_thinking", "thinking"} & set(args.chat_template_kwargs or {})
    if forced:
        raise UserError(
            f"chat_template_kwargs sets {' and '.join(sorted(forced))}, but HGPO itself forces each response's "
            "mode. Leave it out."
        )
    if args.lazy_thinking:
        _check_lazy_thinking(args)
    if args.limits.of_both is None:
        limit = next(name for name in LIMITS if getattr(args, name) is not None)
        _check_two_calls(limit, "null", args)
        if args.eval_strategy != "no" or args.do_eval:
            _check_both_modes(
                limit,
                "null",
                "num_generations_eval",
                args.num_generations_eval or args.num_generations,
                {"per_device_eval_batch_size": args.per_device_eval_batch_size},
            )
    if args.micro_batch_tokens is not None:
        _check_micro_batch_tokens(args)
    check_rule(args)


def tied_to_micro_batches(args: Args) -> dict[str, str]:
    """Fields by which the loss depends on which rows share a micro-batch, and what frees it of that.

    A divisor, a quantile or a mean is of the micro-batch's own tokens.
    """
    free = {
        "loss_type": (args.loss_type in DIVISORS, " or ".join(DIVISORS)),
        "top_entropy_quantile": (args.top_entropy_quantile == 1.0, "1.0"),
        "entropy_coef": (args.entropy_coef == 0.0, "0.0"),
        "use_adaptive_entropy": (not args.use_adaptive_entropy, "false"),
    }
    return {name: remedy for name, (is_free, remedy) in free.items() if not is_free}


def _check_micro_batch_tokens(args: Args) -> None:
    """Check that the loss does not depend on which rows share a micro-batch.

    Raises:
        UserError: it does.
    """
    untrimmed = {} if args.trim_micro_batches else {"trim_micro_batches": "true"}
    for name, remedy in (untrimmed | tied_to_micro_batches(args)).items():
        raise UserError(
            f"micro_batch_tokens={args.micro_batch_tokens} moves rows between micro-batches, and "
            f"{name}={getattr(args, name)} depends on which rows share one. Set {name} to {remedy}, or "
            "micro_batch_tokens to null."
        )


def check_rule(args: Args) -> None:
    """Check `mode_rule` and its options, and that the other fields go with it.

    Raises:
        UserError: naming the field, its value and the remedy.
    """
    rule = build_rule(args)
    if rule.loss_types and args.loss_type not in rule.loss_types:
        raise UserError(
            f"mode_rule={args.mode_rule} weighs tokens by itself and needs loss_type={' or '.join(rule.loss_types)}; "
            f"got {args.loss_type}."
        )
    if args.lazy_thinking and not isinstance(rule, HGPO):
        raise UserError(
            f"lazy_thinking leaves out think samples that cannot change HGPO's decision; mode_rule={args.mode_rule} "
            "decides by other means. Set lazy_thinking=false, or mode_rule=hgpo."
        )
    if args.estimator != "grpo" and not isinstance(rule, HGPO):
        raise UserError(
            f"estimator={args.estimator} is of HGPO alone; mode_rule={args.mode_rule} has its own advantages. Leave "
            "estimator out, or set mode_rule=hgpo."
        )
    for name in LIMITS:
        if rule.samples_modes and getattr(args, name) is not None:
            raise UserError(
                f"{name} needs to know which responses think before they are sampled, but mode_rule={args.mode_rule} "
                f"lets the policy sample the mode. Set {name} to null, or choose a rule that forces the modes."
            )
    for name in ("no_think_cap", "no_think_max_tokens"):
        if rule.samples_modes and getattr(args, name) is not None:
            raise UserError(
                f"{name} needs both modes of every query, which mode_rule={args.mode_rule} does not force. Set {name} "
                "to null, or choose a rule that forces the modes."
            )


def _check_lazy_thinking(args: Args) -> None:
    for name, why in (
        ("no_think_cap", "it measures no-think answers by think answers, which are not there yet"),
        ("mask_truncated_completions", "it would leave out think responses that are the decision token alone"),
    ):
        if value := getattr(args, name):
            raise UserError(f"lazy_thinking does not go with {name}={value}: {why}. Turn one of them off.")
    if any(not 0.0 <= weight <= 1.0 for weight in args.reward_weights or []):
        raise UserError(
            f"lazy_thinking needs rewards whose weighted sum lies between 0 and 1; reward_weights is "
            f"{args.reward_weights}. Give weights between 0 and 1, or set lazy_thinking=false."
        )
    _check_two_calls("lazy_thinking", "false", args)


def _check_two_calls(name: str, off: str, args: Args) -> None:
    """Check that a process can sample its think rows and its no-think rows apart, for the field `name`."""
    if args.use_vllm and (args.vllm_mode == "server" or args.vllm_tensor_parallel_size > 1):
        raise UserError(
            f"{name} needs processes that sample different numbers of responses; vLLM does so with "
            f"vllm_mode=colocate and vllm_tensor_parallel_size=1, not with {args.vllm_mode} and "
            f"{args.vllm_tensor_parallel_size}. Change them, or set {name}={off}."
        )
    rows = {name: getattr(args, name) for name in ("per_device_train_batch_size", "steps_per_generation")}
    _check_both_modes(name, off, "num_generations", args.num_generations, rows)


def _check_both_modes(name: str, off: str, group: str, size: int, rows: dict[str, int]) -> None:
    """Check that every process gets more than half a group, and so rows of both modes.

    Args:
        group: field that holds the group's size.
        rows: fields whose product is the number of a process's rows in one rollout.
    """
    product = " x ".join(f"{field}={value}" for field, value in rows.items())
    product += f" = {math.prod(rows.values())}" if len(rows) > 1 else ""
    if 2 * math.prod(rows.values()) <= size:
        raise UserError(
            f"{name} needs both modes in every process: more than half of {group}={size} rows in its part of a "
            f"rollout, but {product}. Raise {' or '.join(rows)}, or set {name}={off}."
        )


def best_direction(metric: str, given: bool | None) -> bool | None:
    """Find `greater_is_better` for a `metric_for_best_model`.

    Args:
        given: by the user; returned as it is for a metric that evaluations do not compute.

    Raises:
        UserError: it contradicts the metric, or is missing for one that is neither better when higher nor when lower.
    """
    base = metric.rpartition("hgpo/")[2].partition("/")[0]
    if "hgpo/" not in metric or base not in GREATER_IS_BETTER:
        return given
    right = GREATER_IS_BETTER[base]
    if right is None and given is None:
        raise UserError(
            f"metric_for_best_model={metric!r} has no better end by itself. Set greater_is_better to true or false, or "
            f"choose by {BEST_METRIC}."
        )
    if None not in (right, given) and right != given:
        raise UserError(
            f"greater_is_better={given} would keep the worst checkpoint: metric_for_best_model={metric!r} is better "
            f"when {'higher' if right else 'lower'}. Leave greater_is_better out."
        )
    return given if right is None else right


def _check_group_size(name: str, value: int | None, minimum: int) -> None:
    if value is None or value < minimum or value % 2:
        raise UserError(
            f"{name} must be even and at least {minimum}, so that each mode gets half of a query's samples; "
            f"got {value}."
        )
