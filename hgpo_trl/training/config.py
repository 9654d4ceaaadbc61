"""Configuration of `HGPOTrainer`: TRL's `GRPOConfig` with the paper's settings, plus what HGPO adds."""

from dataclasses import dataclass, field
from typing import cast

from transformers import SchedulerType
from trl import GRPOConfig

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes.hybrid_accuracy import GREATER_IS_BETTER
from hgpo_trl.rewards.functions import check_weights
from hgpo_trl.training.advantages import (
    DECISION_WEIGHTINGS,
    ESTIMATORS,
    INTRA_SCOPES,
    TIES,
    check_choice,
    check_coefficients,
)

BEST_METRIC = "eval_hgpo/hybrid_accuracy"  # by which the best checkpoint is chosen, unless another one is named


@dataclass
class HGPOConfig(GRPOConfig):
    """Arguments of `HGPOTrainer`. Only the fields that HGPO adds or whose default differs from `GRPOConfig`'s are here.

    Defaults are the paper's (arXiv 2505.14631, section 3): N = 4, α = 1, δ = 0.2, KL coefficient 0.001, ε = 0.5,
    AdamW at a constant 1e-6. The loss is `dr_grpo`: a constant normaliser, the paper's plain sum over tokens up to a
    factor. `grpo`'s 1/|o| would let the decision token of a long response count 10 to 20 times less than a short one's.

    Args:
        num_generations: N, responses per query: the first half is forced to think, the second half not to. Even, >= 4.
        num_generations_eval: the same in evaluation; even, >= 2. Default: `num_generations`.
        alpha: α of Eq. 10, weight of the inter-group advantage on the decision token.
        margin: δ of Eq. 8, added to the no-think mode's mean reward before the modes are compared. (`delta` is another
            thing: GRPOConfig's two-sided clipping.)
        estimator: "grpo" (Eq. 10), "rloo" (Eq. 23), "reinforce_plus_plus" or "reinforce_plus_plus_as_printed" (Eq. 22).
        intra_scope: normalise r_intra over the mode's own N/2 samples ("mode") or over all N ("all").
        ties: r_intra of samples that share the maximum: "all" get 1, or the "first" only.
        discount: γ of Eq. 22; REINFORCE++ only.
        decision_weighting: "saturating" scales the inter-group advantage by how far the policy is from the winning
            mode; "uniform" is the paper as printed, whose push on the decision token never ends (docs/method.md).
        off_mode_warning: warn, once per run, when the mean probability that the first token is neither mode exceeds
            this; between 0 and 1.
        trim_micro_batches: sort the rows of an optimizer step by length into its micro-batches and trim each to its own
            longest row. The gradient is the same; only the padding goes.
        no_think_cap: a no-think response whose answer has more tokens than this multiple of the longest answer part
            among the query's well-formed think responses counts as malformed (`rewards.overlong`). None: no such limit.
        no_think_max_tokens: the same for a fixed number of tokens.
        lazy_thinking: sample and score the no-think responses of a rollout first, and think samples only of the queries
            that these leave undecided (`advantages.decided_without_think`). Of the others the think responses are the
            decision token alone. Rewards must lie between 0 and 1, their weighted sum too. Training only.
        eval_margin: margin of Eq. 13 for hybrid accuracy in evaluation: mode means closer than this count as equal.
            None: `margin`.
        eval_token_budget: mean tokens per response that `hgpo/accuracy_at_budget` keeps to
            (`hybrid_accuracy.accuracy_at_budget`). None: not computed.
        metric_for_best_model: a figure of the evaluation. Default, where a best checkpoint is asked for: BEST_METRIC.
        greater_is_better: follows from the figure (`hybrid_accuracy.GREATER_IS_BETTER`): tokens and off-mode mass are
            better when lower. Only for `thinking_ratio` it must be given.

    Raises:
        UserError: at construction, naming the field, its value and the remedy.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW (paper: 1e-6)."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning rate schedule (paper: constant)."}
    )
    num_generations: int | None = field(
        default=4,
        metadata={"help": "N, responses per query, half of them in each mode. Even and at least 4 (paper: 4)."},
    )
    beta: float = field(default=0.001, metadata={"help": "KL coefficient towards the HFT model (paper: 0.001)."})
    epsilon: float = field(default=0.5, metadata={"help": "Clipping range of the probability ratio (paper: 0.5)."})
    loss_type: str = field(
        default="dr_grpo",
        metadata={"help": "Loss aggregation. dr_grpo is the paper's plain token sum up to a constant factor."},
    )

    alpha: float = field(default=1.0, metadata={"help": "Weight of the inter-group advantage on the decision token."})
    margin: float = field(
        default=0.2, metadata={"help": "Margin δ added to the no-think mean when modes are compared."}
    )
    estimator: str = field(
        default="grpo", metadata={"help": f"Advantage estimator: {', '.join(ESTIMATORS)}.", "choices": ESTIMATORS}
    )
    intra_scope: str = field(
        default="mode",
        metadata={
            "help": "Normalise r_intra over the mode's samples or over all N: mode, all.",
            "choices": INTRA_SCOPES,
        },
    )
    ties: str = field(
        default="all",
        metadata={"help": "Samples that share a mode's maximum and get r_intra = 1: all, first.", "choices": TIES},
    )
    discount: float = field(default=0.99, metadata={"help": "Discount γ of REINFORCE++."})
    decision_weighting: str = field(
        default="saturating",
        metadata={
            "help": "Weight of the inter-group advantage: saturating (by the policy's distance from the winning mode) "
            "or uniform (the paper as printed).",
            "choices": DECISION_WEIGHTINGS,
        },
    )
    off_mode_warning: float = field(
        default=0.05,
        metadata={"help": "Warn once when the mean first-token probability of neither mode exceeds this."},
    )
    trim_micro_batches: bool = field(
        default=True,
        metadata={"help": "Sort rows by length into micro-batches and trim each one; same gradient, less padding."},
    )
    no_think_cap: float | None = field(
        default=None,
        metadata={"help": "A no-think answer longer than this multiple of the query's longest think answer scores 0."},
    )
    no_think_max_tokens: int | None = field(
        default=None, metadata={"help": "A no-think answer of more tokens than this scores 0."}
    )
    lazy_thinking: bool = field(
        default=False,
        metadata={"help": "Draw no think samples of queries that no-think wins already (rewards between 0 and 1)."},
    )
    eval_margin: float | None = field(
        default=None, metadata={"help": "Mode means closer than this count as equal in hybrid accuracy; null: margin."}
    )
    eval_token_budget: float | None = field(
        default=None,
        metadata={"help": "Mean tokens per response of the evaluation's accuracy_at_budget; null: no such figure."},
    )

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("intra_scope", self.intra_scope, INTRA_SCOPES)
        check_choice("ties", self.ties, TIES)
        check_choice("decision_weighting", self.decision_weighting, DECISION_WEIGHTINGS)
        check_coefficients(self.alpha, self.margin, self.discount)
        _check_group_size("num_generations", self.num_generations, minimum=4)
        if self.num_generations_eval is not None:
            _check_group_size("num_generations_eval", self.num_generations_eval, minimum=2)
        if self.max_completion_length is None or self.max_completion_length < 2:
            raise UserError(
                f"max_completion_length must be at least 2, the decision token and one more; got "
                f"{self.max_completion_length}."
            )
        if not 0.0 <= self.off_mode_warning <= 1.0:
            raise UserError(f"off_mode_warning must lie between 0 and 1; got {self.off_mode_warning}.")
        for name in ("no_think_cap", "no_think_max_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} must be a finite number above 0, or null for no cap; got {value}.")
        if self.eval_margin is not None and not 0.0 <= self.eval_margin < float("inf"):
            raise UserError(
                f"eval_margin must be a finite number of at least 0, or null for margin; got {self.eval_margin}."
            )
        if self.eval_token_budget is not None and not 0.0 < self.eval_token_budget < float("inf"):
            raise UserError(
                f"eval_token_budget must be a finite number of tokens above 0, or null for no budget; got "
                f"{self.eval_token_budget}."
            )
        if self.load_best_model_at_end or self.save_strategy == "best":
            if self.eval_strategy == "no":
                raise UserError(
                    "load_best_model_at_end and save_strategy=best choose a checkpoint by evaluations, but "
                    "eval_strategy is no. Set eval_strategy and eval_data, or do without the best checkpoint."
                )
            self.metric_for_best_model = self.metric_for_best_model or BEST_METRIC
        if self.metric_for_best_model is not None:
            self.greater_is_better = _direction(self.metric_for_best_model, self.greater_is_better)
        check_weights(self.reward_weights)
        if self.scale_rewards not in ("group", True):
            raise UserError(
                f"scale_rewards={self.scale_rewards!r} has no effect under HGPO, whose `estimator` normalises. Leave "
                "scale_rewards at its default; estimator=rloo subtracts a baseline without dividing by the std."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises each reward function "
                "before the sum, but HGPO compares the modes' raw mean rewards plus the margin. Use sum_then_normalize."
            )
        try:
            super().__post_init__()
        except ValueError as error:
            if "must be divisible by num_generations" not in str(error):
                raise
            raise UserError(self._groups_do_not_come_out()) from None
        if self.lazy_thinking:
            self._check_lazy_thinking()
        forced = {"thinking_mode", "enable_thinking"} & set(self.chat_template_kwargs or {})
        if forced:
            raise UserError(
                f"chat_template_kwargs sets {' and '.join(sorted(forced))}, but HGPO itself forces each response's "
                "mode. Leave it out."
            )

    def _check_lazy_thinking(self) -> None:
        for name, why in (
            ("no_think_cap", "it measures no-think answers by think answers, which are not there yet"),
            ("mask_truncated_completions", "it would leave out think responses that are the decision token alone"),
        ):
            if value := getattr(self, name):
                raise UserError(f"lazy_thinking does not go with {name}={value}: {why}. Turn one of them off.")
        if any(not 0.0 <= weight <= 1.0 for weight in self.reward_weights or []):
            raise UserError(
                f"lazy_thinking needs rewards whose weighted sum lies between 0 and 1; reward_weights is "
                f"{self.reward_weights}. Give weights between 0 and 1, or set lazy_thinking=false."
            )
        if self.use_vllm and (self.vllm_mode == "server" or self.vllm_tensor_parallel_size > 1):
            raise UserError(
                "lazy_thinking needs processes that sample different numbers of responses; vLLM does so with "
                f"vllm_mode=colocate and vllm_tensor_parallel_size=1, not with {self.vllm_mode} and "
                f"{self.vllm_tensor_parallel_size}. Change them, or set lazy_thinking=false."
            )
        rows = self.per_device_train_batch_size * cast(int, self.steps_per_generation)
        if 2 * rows <= cast(int, self.num_generations):
            raise UserError(
                f"lazy_thinking needs both modes in every process: more than half of num_generations="
                f"{self.num_generations} rows in its part of a rollout, but per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x steps_per_generation={self.steps_per_generation} = {rows}. "
                "Raise one of them, or set lazy_thinking=false."
            )

    def _groups_do_not_come_out(self) -> str:
        rows, processes = self.per_device_train_batch_size, self.world_size
        return (
            f"A rollout must hold whole groups of num_generations={self.num_generations} responses, but "
            f"per_device_train_batch_size={rows} x {processes} processes x steps_per_generation="
            f"{self.steps_per_generation} = {self.generation_batch_size} rows must be divisible by num_generations. "
            "Change one of them (gradient_accumulation_steps sets steps_per_generation), or the number of processes."
        )


def _direction(metric: str, given: bool | None) -> bool | None:
    """`greater_is_better` of a `metric_for_best_model`; what was given where it is no figure of an evaluation.

    Raises:
        UserError: it is given and contrary to the figure, or not given for one that has no better end.
    """
    figure = metric.rpartition("hgpo/")[2].partition("/")[0]
    if "hgpo/" not in metric or figure not in GREATER_IS_BETTER:
        return given
    right = GREATER_IS_BETTER[figure]
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
