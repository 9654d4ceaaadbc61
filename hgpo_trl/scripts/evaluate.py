"""Evaluate a model in both modes: hybrid accuracy, thinking ratio, accuracy and tokens.

    hgpo-trl evaluate --config recipes/chain-sum/evaluate.yaml --model runs/chain-sum/hft --output_dir runs/eval/hft

Writes `report.json` (the figures) and `samples.parquet` (every response with its score) into `output_dir`.
`--compare NAME=FOLDER NAME=FOLDER ...` compares models that have been evaluated: see `hgpo_trl.scripts.compare`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hgpo_trl.data_files import load_data
from hgpo_trl.evaluation import PROMPT_ID, SWEEP, report_on, score_samples
from hgpo_trl.files import nan_to_null, write_json
from hgpo_trl.modes import Mode, format_response
from hgpo_trl.rewards import load_reward
from hgpo_trl.sampling import check_backend, default_device, loaded_sampler
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.rewards import RewardArguments, check_answers_are_there
from hgpo_trl.scripts.training import check_model_path
from hgpo_trl.trainer import check_dataset
from hgpo_trl.vllm_support import check_vllm_installed


@dataclass
class EvaluateArguments:
    """What to evaluate, and how to sample."""

    model: str = field(metadata={"help": "Model to evaluate: path or hub id."})
    data: str = field(metadata={"help": "Data set with `prompt`, what the rewards need, and perhaps `level`."})
    output_dir: str = field(metadata={"help": "Folder for report.json and samples.parquet."})
    split: str = field(default="train", metadata={"help": "Split of data."})
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many prompts."})
    samples_per_mode: int = field(default=8, metadata={"help": "Responses per prompt and mode."})
    margin: float = field(default=0.0, metadata={"help": "Mode means closer than this count as equal (Eq. 13)."})
    decision_bias: float | str = field(
        default=0.0, metadata={"help": "Added to the log-odds of thinking, logit(think) - logit(no_think); or sweep."}
    )
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature (paper: 0.6); 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling (paper: 0.95)."})
    max_new_tokens: int = field(default=35_000, metadata={"help": "Tokens per response (paper: 35,000)."})
    batch_size: int = field(default=64, metadata={"help": "transformers: responses generated at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    backend: str = field(
        default="transformers", metadata={"help": "What samples: transformers, or vllm (needs the extra vllm)."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs that share the model."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "vllm: its share of each GPU's memory."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32, bfloat16."})

    def __post_init__(self) -> None:
        for name in ("samples_per_mode", "batch_size", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.max_new_tokens < 2:
            raise ValueError(
                f"max_new_tokens must be at least 2, the decision token and one more; got {self.max_new_tokens}."
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, which is greedy; got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if not 0.0 <= self.margin < math.inf:
            raise ValueError(f"margin must be a finite number of at least 0; got {self.margin}.")
        check_backend("backend", self.backend)
        if self.decision_bias != SWEEP and not (
            isinstance(self.decision_bias, int | float) and math.isfinite(self.decision_bias)
        ):
            raise ValueError(f"decision_bias must be a finite number or {SWEEP}; got {self.decision_bias!r}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must lie in (0, 1]; got {self.gpu_memory_utilization}.")
        if self.tensor_parallel_size > 1 and self.backend != "vllm":
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs vLLM, but backend is {self.backend}. "
                "Set backend to vllm, or tensor_parallel_size to 1."
            )


def _load_function(name: str) -> Callable:
    reward = load_reward(name)
    if isinstance(reward, str):
        raise ValueError(
            f"reward_funcs: {name!r} is a reward model; evaluation takes functions only. Name a function "
            "(package.module.function or file.py:function) there, and a reward model as reward_model."
        )
    return reward


def _try_rewards(rewards: Sequence[Callable], dataset: Dataset) -> None:
    """Score one made-up response, so that a reward function that does not fit the data fails before the sampling."""
    response = pd.DataFrame({PROMPT_ID: [0], "completion": [format_response(Mode.NO_THINK, "0")]})
    try:
        score_samples(response, dataset.select([0]), rewards)
    except TypeError as error:  # a column that the function takes is not there
        raise ValueError(f"reward_funcs: {error}. The columns of data are {dataset.column_names}.") from error


def _sample(args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> pd.DataFrame:
    """Load the model into the backend, and sample; the backend's memory is free again afterwards."""
    sampler = loaded_sampler(
        args.model,
        tokenizer,
        prompts,
        backend=args.backend,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    with sampler as sample:
        return sample(
            prompts,
            samples_per_mode=args.samples_per_mode,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )


def main(argv: Sequence[str]) -> None:
    if "--compare" in argv:
        from hgpo_trl.scripts import compare

        compare.main(argv)
        return
    args, reward_args = RecipeParser((EvaluateArguments, RewardArguments), prog="hgpo-trl evaluate").parse_recipe(argv)
    if args.backend == "vllm":
        check_vllm_installed("backend=vllm")
    rewards = [_load_function(name) for name in reward_args.reward_funcs]
    dataset = load_data("data", args.data, args.split)
    if args.num_prompts is not None:
        dataset = dataset.select(range(min(args.num_prompts, len(dataset))))
    check_model_path("model", args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    check_dataset("data", dataset, tokenizer)
    check_answers_are_there("data", dataset, rewards, reward_args)
    _try_rewards(rewards, dataset)
    reward_model = reward_args.build_reward_model(default_device(), dataset[0]["prompt"])
    if reward_model is not None:
        rewards.append(reward_model)  # its weights are loaded when the sampling has left the memory to them
    samples = _sample(args, tokenizer, dataset["prompt"])
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    samples.to_parquet(output_dir / "samples.parquet", index=False)  # whatever becomes of the scoring
    samples = score_samples(samples, dataset, rewards)
    samples.to_parquet(output_dir / "samples.parquet", index=False)
    levels = dataset["level"] if "level" in dataset.column_names else None
    report = report_on(samples, args.margin, levels, args.decision_bias)
    write_json(output_dir / "report.json", nan_to_null({"model": args.model, "dataset": args.data, **report}))
    accuracy, length = report["accuracy"], report["mean_tokens"]
    print(
        f"{args.model}: hybrid accuracy {report['hybrid_accuracy']:.3f}, "
        f"thinking ratio {report['thinking_ratio']:.3f}, "
        f"accuracy {accuracy['auto']:.3f} (always thinking {accuracy['think']:.3f}), "
        f"tokens {length['auto']:.1f} (always thinking {length['think']:.1f}) -> {output_dir}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
