"""Train one rule for learning when to think for a number of rollout tokens, on the embedded task.

    python benchmarks/rule_run.py --rule hgpo --seed 0 --runs runs/compare-rules/0 --tokens 250000
                                  --output_dir runs/compare-rules/0/hgpo
                                  (--learning_rate 1e-3 --weight low | --best_of runs/compare-rules/search/hgpo)

RUNS is a folder with data/, hft/ and, for AdaptThink, samples/. The recipe of the chain-sum task gives batch and
optimiser; the learning rate stays constant for 0.3 of the tokens and falls linearly to 5 %. Tokens are those that the
model samples in rollouts, end tokens included, forced ones not. Writes the model and, before it, curve.json: held-out
metrics after every 12,500 tokens, always on the same prompts.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from rule_curves import area, deciding
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from trl import ModelConfig

from hgpo_trl import HGPOTrainer
from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_json
from hgpo_trl.evaluation.metrics import report_on
from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.modes import MODES
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.scripts.evaluate import EvaluateArguments
from hgpo_trl.scripts.hgpo import HGPOArguments
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.rewards import RewardArguments
from hgpo_trl.scripts.stages import load_tokenizer, model_init_kwargs
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.rules import load_rule
from hgpo_trl.training.rules.adaptthink import REFERENCE

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "chain-sum"
EVERY = 12_500  # tokens between two evaluations
PROMPTS, SAMPLES = 99, 4  # held-out prompts of an evaluation, and responses to each in either mode; 9 hold all levels
CONSTANT, LAST = 0.3, 0.05  # share of the tokens at the full learning rate, and what is left of it at the end


@dataclass(frozen=True)
class Rule:
    """How a rule differs from the recipe, and the two values of its weight of the decision that are tried.

    The weight is the factor of the decision token where the rule has one, else δ, the bonus for not thinking. The
    authors' α of Thinkless, 0.001, is made for responses of thousands of tokens; these have 4 to 51.
    """

    label: str
    weights: dict[str, dict[str, Any]]  # fields under the names low and high
    fields: dict[str, Any] = field(default_factory=dict)


def _two(fields: Callable[[float], dict[str, Any]], low: float, high: float) -> dict[str, dict[str, Any]]:
    return {"low": fields(low), "high": fields(high)}


def _alpha(value: float) -> dict[str, Any]:
    return {"alpha": value}


def _margin(value: float) -> dict[str, Any]:
    return {"margin": value}


def _control_weight(value: float) -> dict[str, Any]:
    return {"mode_rule_kwargs": {"control_weight": value}}


RULES = {
    "hgpo": Rule("HGPO", _two(_alpha, 1.0, 2.0)),
    "lazy": Rule("HGPO, lazy thinking", _two(_alpha, 1.0, 2.0), {"lazy_thinking": True}),
    "reinforce_plus_plus": Rule("HGPO, REINFORCE++", _two(_alpha, 1.0, 2.0), {"estimator": "reinforce_plus_plus"}),
    "adaptthink": Rule(
        "AdaptThink",
        _two(_margin, 0.1, 0.2),
        {"mode_rule": "adaptthink", "epsilon": 0.2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    ),
    "thinkless": Rule("Thinkless", _two(_control_weight, 0.1, 1.0), {"mode_rule": "thinkless"}),
    "stable_adaptive": Rule(
        "Stable Adaptive Thinking", _two(_control_weight, 1.0, 10.0), {"mode_rule": "stable_adaptive"}
    ),
    "grpo": Rule("GRPO, bonus δ", _two(_margin, 0.1, 0.2), {"mode_rule": "grpo"}),
}


class Budgeted(HGPOTrainer):
    """HGPOTrainer that counts the tokens that the model draws in rollouts; they, not steps, set the learning rate."""

    rollout_tokens = 0
    budget: int

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.rollout_tokens += int(self._rollout.sampled_lengths.sum())
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda _: decay(self.rollout_tokens / self.budget))
        return self.lr_scheduler


def decay(spent: float) -> float:
    """Factor of the learning rate when so much of the token budget is spent."""
    return 1.0 - (1.0 - LAST) * min(max(spent - CONSTANT, 0.0) / (1.0 - CONSTANT), 1.0)


class Curve(TrainerCallback):
    """Measures after every so many rollout tokens, and ends the training when all are spent."""

    def __init__(self, trainer: Budgeted, measure: Callable[[], dict[str, float]]) -> None:
        self.trainer, self.measure = trainer, measure
        self.points: list[dict[str, float]] = []

    def _note(self, step: int) -> None:
        self.points.append({"step": step, "tokens": self.trainer.rollout_tokens} | self.measure())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = self.trainer.rollout_tokens
        control.should_training_stop = tokens >= self.trainer.budget
        if control.should_training_stop or tokens // EVERY > self.points[-1]["tokens"] // EVERY:
            self._note(state.global_step)


def evaluator(
    model: Any, tokenizer: Any, dataset: Dataset, recipe: EvaluateArguments
) -> Callable[[], dict[str, float]]:
    """A function that evaluates the model as the recipe does, without disturbing the training's random numbers."""

    def measure() -> dict[str, float]:
        training = model.training
        with torch.random.fork_rng():
            samples = sample_both_modes(
                model,
                tokenizer,
                dataset["prompt"],
                samples_per_mode=SAMPLES,
                max_new_tokens=recipe.max_new_tokens,
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
            )
        model.train(training)
        report = report_on(score_samples(samples, dataset, [accuracy_reward]), recipe.margin)
        return {
            "hybrid_accuracy": report["hybrid_accuracy"],
            "thinking_ratio": report["thinking_ratio"],
            "off_mode_mass": report["off_mode_mass"],
            **{f"accuracy_{name}": report["accuracy"][name] for name in ("auto", "sampled", "think", "no_think")},
            "mean_tokens": report["mean_tokens"]["auto"],
        }

    return measure


def reference_rewards(samples: pd.DataFrame, count: int) -> list[float]:
    """R̄_ref of each of `count` queries (Eq. 5 of AdaptThink): the mean reward of the HFT model's think responses."""
    think = samples[samples["mode"] == MODES[0]].groupby(PROMPT_ID)["reward"].mean()
    return think.reindex(range(count)).tolist()


def choose(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of the search with the largest area under hybrid accuracy over rollout tokens; the first of equals."""
    return max(candidates, key=lambda run: area(run["curve"], run["tokens"]))


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's curve.json, with the curve that `deciding` makes of it."""
    content: dict[str, Any] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    return {**content, "curve": deciding(content["curve"])}


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in the folders of `folder`, by name, as `read_run` reads them.

    Raises:
        UserError: there is none.
    """
    found = [read_run(path.parent) for path in sorted(folder.glob("*/curve.json"))]
    if not found:
        raise UserError(f"{folder} has no runs (*/curve.json). Make them with --learning_rate and --weight.")
    return found


def run(args: argparse.Namespace) -> None:
    """Train a rule on one seed's HFT model, and write its curve and the model."""
    rule = RULES[args.rule]
    if args.best_of is not None:
        best = choose(read_runs(args.best_of))
        args.learning_rate, args.weight = best["learning_rate"], best["weight"]
    fields = {"learning_rate": args.learning_rate, "eval_margin": 0.2} | rule.fields | rule.weights[args.weight]
    evaluation, _ = RecipeParser((EvaluateArguments, RewardArguments), prog="rule_run").parse_recipe(
        ["--config", str(RECIPES / "evaluate.yaml"), "--model", str(args.runs / "hft")]
    )
    script_args, config, model_args, _ = RecipeParser(
        (HGPOArguments, HGPOConfig, ModelConfig, RewardArguments), prog="rule_run"
    ).parse_recipe(
        ["--config", str(RECIPES / "hgpo.yaml"), "--seed", str(args.seed), "--output_dir", tempfile.gettempdir()]
        + ["--model_name_or_path", str(args.runs / "hft"), "--train_data", str(args.runs / "data" / "hgpo.parquet")]
        + ["--logging_strategy", "no"]
        + [
            word
            for option, value in fields.items()
            for word in (f"--{option}", value if isinstance(value, str) else json.dumps(value))
        ]
    )
    # Each of the 64 or more no-think responses of a step has a token of its own, so that the tokens end the run first.
    config.max_steps = args.tokens
    tokenizer = load_tokenizer(config, model_args, truncation_side="left", padding_side="left")
    train = load_data("train_data", script_args.train_data, "train")
    if REFERENCE in load_rule(config.mode_rule).columns:
        samples = pd.read_parquet(args.runs / "samples" / "samples.parquet")
        train = train.add_column(REFERENCE, reference_rewards(samples, len(train)))

    config.model_init_kwargs = model_init_kwargs(config, model_args)
    trainer = Budgeted(
        model=model_args.model_name_or_path,
        reward_funcs=[accuracy_reward],
        args=config,
        train_dataset=train,
        processing_class=tokenizer,
    )
    trainer.budget = args.tokens
    held_out = load_data("data", str(args.runs / "data" / "eval.parquet"), "train").select(range(PROMPTS))
    curve = Curve(trainer, evaluator(trainer.model, tokenizer, held_out, evaluation))
    trainer.add_callback(curve)
    trainer.train()
    result = {
        "rule": args.rule,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "weight": args.weight,
        "tokens": args.tokens,
        "curve": curve.points,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "curve.json", result)
    trainer.save_model(str(args.output_dir))


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the sampling")
    parser.add_argument("--runs", type=Path, required=True, help="folder of data/, hft/ and samples/")
    parser.add_argument("--tokens", type=int, required=True, help="rollout tokens of the training")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--weight", choices=("low", "high"))
    parser.add_argument("--best_of", type=Path, help="folder of runs, the best of which gives learning rate and weight")
    args = parser.parse_args(argv)
    given = [value is not None for value in (args.best_of, args.learning_rate, args.weight)]
    if given not in ([True, False, False], [False, True, True]):
        parser.error("give either --best_of, or --learning_rate and --weight")
    return args


if __name__ == "__main__":
    run(read_arguments())
