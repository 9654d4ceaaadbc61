"""Configuration of `HGPOTrainer`: TRL's `GRPOConfig` with the paper's settings, plus what HGPO adds."""

from dataclasses import dataclass, field

from transformers import SchedulerType
from trl import GRPOConfig

from hgpo_trl.inference.limits import Limits
from hgpo_trl.training.advantages import DECISION_WEIGHTINGS, ESTIMATORS, INTRA_SCOPES, TIES
from hgpo_trl.training.rules import RULES
from hgpo_trl.training.validate import (
    BEST_METRIC,
    best_direction,
    check_fields,
    check_resolved_fields,
    check_whole_groups,
)


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
        margin: δ of Eq. 8, added to the no-think mode's mean reward before the modes are compared. (GRPOConfig's
            `delta` is two-sided clipping.)
        mode_rule: rule for learning when to think: "hgpo", "adaptthink", "thinkless", "stable_adaptive" or "grpo", or
            the import path of your own (`rules.Rule`): package.module.Class, path/to/file.py:Class. docs/rules.md
            compares them. The fields `alpha`, `estimator`, `intra_scope`, `ties`, `discount`, `decision_weighting` and
            `lazy_thinking` are of HGPO alone.
        mode_rule_kwargs: options of the rule, its keyword arguments.
        estimator: "grpo" (Eq. 10), "rloo" (Eq. 23), "reinforce_plus_plus" or "reinforce_plus_plus_as_printed" (Eq. 22),
            or the import path of your own (`advantages.Estimator`): package.module.function, path/to/file.py:function.
        intra_scope: normalise r_intra over the mode's own N/2 samples ("mode") or over all N ("all").
        ties: r_intra of samples that share the maximum: "all" get 1, or the "first" only.
        discount: γ of Eq. 22; REINFORCE++ only.
        decision_weighting: weights of the inter-group advantage on the rows of the winning and of the losing mode:
            "winner" 2 and 0; "saturating" 2(1 − π_old) and 2·π_old of the row's mode; "uniform" 1 and 1, the paper as
            printed, whose push on the loser never ends (docs/method.md).
        off_mode_warning: warn, once per run, when the mean probability that a response begins in neither mode exceeds
            this; between 0 and 1.
        trim_micro_batches: sort the rows of an optimizer step by length into its micro-batches and trim each to its own
            longest row; with beta 0, leave out the tokens behind a response's last one with an advantage
            (`idle_tokens.mask_idle`). The gradient is the same; TRL's entropy and clip ratios are means over the tokens
            that are computed.
        micro_batch_tokens: tokens of a micro-batch on each process, padding included. The rows that all processes hold
            for an optimizer step are divided anew (`partition.balanced_partition`): as many rows as fit, the same
            number of micro-batches and about the same tokens on every process; a row that is longer is a micro-batch
            of its own. Also for the passes of old and reference log-probabilities and of the decision. Rows per step
            remain `per_device_train_batch_size` x `gradient_accumulation_steps` x processes, and the gradient is the
            same. None: `per_device_train_batch_size` rows.
        no_think_cap: a no-think response whose answer has more tokens than this multiple of the longest answer part
            among the query's well-formed think responses counts as malformed (`rewards.overlong`). None: no such limit.
        no_think_max_tokens: the same for a fixed number of tokens.
        lazy_thinking: sample and score the no-think responses of a rollout first, then think responses of the queries
            that are still undecided (`advantages.decided_without_think`). The think responses of the other queries are
            the decision token alone. Rewards and their weighted sum must lie between 0 and 1. Training only.
        max_think_tokens, max_no_think_tokens: the most tokens of a response of that mode, in evaluation too, where it
            is to be less than `max_completion_length` (`hgpo_trl.inference.limits`). None: that.
        think_budget: tokens of reasoning after which a think response is closed by force (`limits.ThinkBudget`) and
            answers within what is left of its limit; in evaluation too. None: no budget.
        eval_margin: margin of Eq. 13 for hybrid accuracy in evaluation: mode means closer than this count as equal.
            None: `margin`.
        eval_token_budget: mean tokens per response that `hgpo/accuracy_at_budget` keeps to
            (`hybrid_accuracy.accuracy_at_budget`). None: not computed.
        metric_for_best_model: a metric of the evaluation. Default with `load_best_model_at_end`: BEST_METRIC.
        greater_is_better: follows from the metric (`hybrid_accuracy.GREATER_IS_BETTER`): tokens, off-mode mass
            and unsolved prompts are better when lower. `thinking_ratio` alone needs it.

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
    mode_rule: str = field(
        default="hgpo",
        metadata={
            "help": f"Rule for learning when to think: {', '.join(RULES)}, or your own as package.module.Class or "
            "path/to/file.py:Class."
        },
    )
    mode_rule_kwargs: dict | None = field(
        default=None, metadata={"help": "Options of mode_rule, for example {control_weight: 0.1}; null: none."}
    )
    estimator: str = field(
        default="grpo",
        metadata={
            "help": f"Advantage estimator: {', '.join(ESTIMATORS)}, or your own as package.module.function or "
            "path/to/file.py:function."
        },
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
        default="winner",
        metadata={
            "help": "Weights of the inter-group advantage: winner (the winning mode's rows alone), saturating (by the "
            "policy's distance from the winning mode) or uniform (the paper as printed).",
            "choices": tuple(DECISION_WEIGHTINGS),
        },
    )
    off_mode_warning: float = field(
        default=0.05,
        metadata={"help": "Warn once when the mean first-token probability of neither mode exceeds this."},
    )
    trim_micro_batches: bool = field(
        default=True,
        metadata={"help": "Less padding and no idle tokens in micro-batches; same gradient."},
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a micro-batch, padding included, with as many rows of all processes as fit; same "
            "gradient. null: per_device_train_batch_size rows."
        },
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
        metadata={"help": "Sample no think responses of queries that no-think wins already (rewards between 0 and 1)."},
    )
    max_think_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a think response; null: max_completion_length."}
    )
    max_no_think_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a no-think response; null: max_completion_length."}
    )
    think_budget: int | None = field(
        default=None,
        metadata={"help": "Close the reasoning by force after so many tokens; null: no budget."},
    )
    eval_margin: float | None = field(
        default=None, metadata={"help": "Mode means closer than this count as equal in hybrid accuracy; null: margin."}
    )
    eval_token_budget: float | None = field(
        default=None,
        metadata={"help": "Mean tokens per response of the evaluation's accuracy_at_budget; null: not computed."},
    )

    @property
    def limits(self) -> Limits:
        """The limits of a response's length. UserError if they contradict each other."""
        assert self.max_completion_length is not None  # `check_fields` refuses it
        return Limits(
            self.max_completion_length,
            self.max_think_tokens,
            self.max_no_think_tokens,
            self.think_budget,
            total="max_completion_length",
        )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.load_best_model_at_end or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or BEST_METRIC
        if self.metric_for_best_model is not None:
            self.greater_is_better = best_direction(self.metric_for_best_model, self.greater_is_better)
        try:
            super().__post_init__()
        except ValueError:
            if hasattr(self, "distributed_state"):  # else TRL has not come to the size of a rollout
                check_whole_groups(self)  # the same fault, with its remedy
            raise
        check_resolved_fields(self)
