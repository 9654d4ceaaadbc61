"""Evaluate a model in both modes: hybrid accuracy, thinking ratio, accuracy and tokens.

    hgpo-trl evaluate --config recipes/chain-sum/evaluate.yaml --model runs/chain-sum/hft --output_dir runs/eval/hft

Writes `report.json` (the metrics), `samples.parquet` (every response with its score) and `examples.json` (some prompts
with a response of either mode) into `output_dir`. The same
command resumes after an interruption; `--rescore true` scores the existing samples again, without the model. Several
processes share the prompts:

    accelerate launch --config_file recipes/accelerate/ddp.yaml -m hgpo_trl.scripts.evaluate --config recipe.yaml

`--compare NAME=FOLDER NAME=FOLDER ...` compares models that have been evaluated: see `hgpo_trl.scripts.compare`.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.files import make_folder, nan_to_null, write_json
from hgpo_trl.common.fingerprints import model_fingerprint
from hgpo_trl.evaluation.backends import check_backend, default_device, loaded_sampler
from hgpo_trl.evaluation.benchmarks import BENCHMARKS, load_benchmark
from hgpo_trl.evaluation.examples import chosen_prompts, examples_of
from hgpo_trl.evaluation.leakage import leakage_table
from hgpo_trl.evaluation.metrics import GROUPS, SWEEP, report_on
from hgpo_trl.evaluation.parts import PARTS, Part, draw_missing, mixed_parts, parts_by_length
from hgpo_trl.evaluation.processes import Processes, join_processes
from hgpo_trl.evaluation.samples import (
    PROMPT_ID,
    RECORD,
    SAMPLES,
    prompts_hash,
    samples_file,
    samples_in_blocks,
    samples_of_prompts,
)
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.evaluation.transformers_backend import prompts_at_a_time
from hgpo_trl.inference.decoding import prompt_lengths
from hgpo_trl.inference.generate import AUTO, check_settings
from hgpo_trl.inference.limits import LIMITS, MAX_NO_THINK_HELP, MAX_THINK_HELP, THINK_BUDGET_HELP, Limits
from hgpo_trl.inference.vllm_support import check_vllm_installed
from hgpo_trl.modes import LHRM, MODES, Mode, ModeFormat, as_format, format_of, format_response, mode_tokens
from hgpo_trl.modes.chat_template import FORMAT_HELP, settle_format
from hgpo_trl.modes.hybrid_accuracy import Label, PromptTable, group_labels
from hgpo_trl.reporting.examples import EXAMPLES
from hgpo_trl.rewards.functions import check_weights, load_reward
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.rewards import RewardArguments, check_answers_are_there
from hgpo_trl.training.checks import DROP_HELP, check_prompts, dropped_rows_file, model_positions, without_dropped
from hgpo_trl.training.model_dir import tokenizer_of
from hgpo_trl.training.rows import Renderer
from hgpo_trl.training.run_dir import check_same_run

VLLM_CHUNK = 4096  # responses of a part: a kill loses one part, but the engine runs dry at the end of each


@dataclass
class EvaluateArguments:
    """What to evaluate, and how to sample."""

    model: str = field(metadata={"help": "Model to evaluate: path or hub id."})
    data: str = field(
        metadata={
            "help": f"A benchmark ({', '.join(BENCHMARKS)}), or a data set with `prompt`, what the rewards need, and "
            "perhaps `level`, `subject`, `domain`: file, folder or hub id."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for report.json and samples.parquet."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of local copies of benchmarks: NAME.json, .jsonl or .parquet."}
    )
    split: str = field(default="train", metadata={"help": "Split of data; a benchmark has its own."})
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many prompts."})
    drop_faulty_rows: bool = field(default=False, metadata={"help": DROP_HELP})
    samples_per_mode: int = field(default=8, metadata={"help": "Responses per prompt and mode."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One per reward function, reward_model last, as in training; null is 1 each."}
    )
    margin: float = field(default=0.0, metadata={"help": "Mode means closer than this count as equal (Eq. 13)."})
    decision_bias: float | str = field(
        default=0.0, metadata={"help": "Added to the log-odds of thinking, logit(think) - logit(no_think); or sweep."}
    )
    price_per_million_tokens: float | None = field(
        default=None, metadata={"help": "Price of generated tokens: adds the cost of 1,000 queries to the report."}
    )
    rescore: bool = field(
        default=False, metadata={"help": "Only score the samples that are there, and report; no model is needed."}
    )
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature (paper: 0.6); 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling (paper: 0.95)."})
    max_new_tokens: int = field(default=35_000, metadata={"help": "Tokens per response (paper: 35,000)."})
    max_think_tokens: int | None = field(default=None, metadata={"help": MAX_THINK_HELP})
    max_no_think_tokens: int | None = field(default=None, metadata={"help": MAX_NO_THINK_HELP})
    think_budget: int | None = field(default=None, metadata={"help": THINK_BUDGET_HELP})
    batch_size: int = field(default=64, metadata={"help": "transformers: responses generated at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    backend: str = field(
        default="transformers", metadata={"help": "What samples: transformers, or vllm (needs the extra vllm)."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs that share the model."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "vllm: its share of each GPU's memory."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32, bfloat16."})
    mode_format: dict | str | None = field(default=None, metadata={"help": FORMAT_HELP})

    def __post_init__(self) -> None:
        for name in ("num_prompts", "samples_per_mode", "batch_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}.")
        check_settings(AUTO, 0.0, self.max_new_tokens, self.temperature, self.top_p)
        _ = self.limits  # which refuses those that contradict each other
        if not 0.0 <= self.margin < math.inf:
            raise UserError(f"margin must be a finite number of at least 0; got {self.margin}.")
        price = self.price_per_million_tokens
        if price is not None and not 0.0 <= price < math.inf:
            raise UserError(f"price_per_million_tokens must be a finite number of at least 0; got {price}.")
        check_backend("backend", self.backend)
        if self.data_dir is not None and self.data not in BENCHMARKS:
            raise UserError(
                f"data_dir={self.data_dir!r} holds copies of benchmarks, but data={self.data!r} is none of "
                f"{', '.join(BENCHMARKS)}. Give the file itself as data, and leave data_dir out."
            )
        if self.data in BENCHMARKS and self.split != "train":
            raise UserError(
                f"split={self.split!r}: the benchmark data={self.data!r} has its own split. Leave split out, or give "
                f"the data set itself as data ({BENCHMARKS[self.data].hub})."
            )
        if self.decision_bias != SWEEP and not (
            isinstance(self.decision_bias, int | float) and math.isfinite(self.decision_bias)
        ):
            raise UserError(f"decision_bias must be a finite number or {SWEEP}; got {self.decision_bias!r}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise UserError(f"gpu_memory_utilization must lie in (0, 1]; got {self.gpu_memory_utilization}.")
        if self.tensor_parallel_size > 1 and self.backend != "vllm":
            raise UserError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs vLLM, but backend is {self.backend}. "
                "Set backend to vllm, or tensor_parallel_size to 1."
            )

    @property
    def limits(self) -> Limits:
        """The limits of a response's length."""
        return Limits(self.max_new_tokens, self.max_think_tokens, self.max_no_think_tokens, self.think_budget)


def _load_function(name: str) -> Callable:
    reward = load_reward(name)
    if isinstance(reward, str):
        raise UserError(
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
        raise UserError(f"reward_funcs: {error}. The columns of data are {dataset.column_names}.") from error


def _load(args: EvaluateArguments) -> Dataset:
    if args.data in BENCHMARKS:
        dataset = load_benchmark(args.data, args.data_dir)
    else:
        dataset = load_data("data", args.data, args.split)
    if args.num_prompts is not None:
        dataset = dataset.select(range(min(args.num_prompts, len(dataset))))
    return dataset


def _settings(args: EvaluateArguments, dataset: Dataset) -> dict[str, Any]:
    """Settings of the sampling; evaluations that differ in one of them cannot be compared."""
    return {
        "split": BENCHMARKS[args.data].split if args.data in BENCHMARKS else args.split,
        "num_prompts": len(dataset),
        "samples_per_mode": args.samples_per_mode,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        **{name: getattr(args, name) for name in LIMITS},
        "seed": args.seed,
        "backend": args.backend,
    }


def _claim(
    args: EvaluateArguments,
    dataset: Dataset,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> ModeFormat:
    """Claim `output_dir` for these samples, and record their model, prompts and settings there.

    Returns:
        The format of the samples: the tokenizer's, or without one, where samples are only scored, that of the record.

    Raises:
        UserError: it holds samples of another model, of other prompts or settings, or of an unknown run; or there are
            none to `rescore`.
    """
    output_dir = Path(args.output_dir)
    record = output_dir / RECORD
    run = {
        "model": args.model,
        "data": args.data,
        "prompts": prompts_hash(dataset["prompt"] if "prompt" in dataset.column_names else []),
        "dtype": args.dtype,
        **settings,
    }
    if tokenizer is not None and (mode_format := format_of(tokenizer)) != LHRM:
        run["mode_format"] = mode_format.declaration()
    if args.backend == "transformers":  # a batch is drawn from one stream of random numbers
        run["batch_size"] = args.batch_size
    if args.rescore:
        if not (output_dir / SAMPLES).is_file():
            raise UserError(
                f"rescore: there is no {output_dir / SAMPLES}, so there is nothing to score again. Name the output_dir "
                "of a finished evaluation, or leave rescore out to sample what is missing."
            )
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        run["model_files"] = before.get("model_files")  # the model may be gone, and its tokenizer with it
        if "mode_format" in before:
            run["mode_format"] = before["mode_format"]
    else:
        run["model_files"] = model_fingerprint(args.model)
    if (output_dir / SAMPLES).is_file() or any((output_dir / PARTS).glob("*.parquet")):
        check_same_run(record, run)
    write_json(record, run)
    return as_format(run.get("mode_format", LHRM))


def _parts(
    args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], num_processes: int
) -> list[Part]:
    """All parts of the samples; the prompts in them depend on the data and, with vLLM, on who started first."""
    folder, lengths = Path(args.output_dir) / PARTS, prompt_lengths(tokenizer, prompts)
    if args.backend == "transformers":
        size = prompts_at_a_time(args.batch_size, args.samples_per_mode)
        parts = parts_by_length(folder, lengths, size, args.seed)
    else:
        rounds = math.ceil(len(prompts) * len(MODES) * args.samples_per_mode / (VLLM_CHUNK * num_processes))
        parts = mixed_parts(folder, lengths, rounds * num_processes, args.seed)
    if drawn := sum(len(part.prompts) for part in parts if part.is_drawn()):
        print(f"{drawn} of {len(prompts)} prompts have been sampled already: {folder}", flush=True)
    return parts


def _draw(
    args: EvaluateArguments,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    parts: Sequence[Part],
    processes: Processes,
) -> None:
    """Sample the missing parts, and free the backend's memory."""
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
    draw_missing(
        parts,
        sampler,
        prompts,
        samples_per_mode=args.samples_per_mode,
        processes=processes,
        temperature=args.temperature,
        top_p=args.top_p,
        **{name: getattr(args, name) for name in LIMITS},
    )


def _score(
    files: Sequence[Path],
    output_dir: Path,
    dataset: Dataset,
    rewards: Sequence[Callable],
    weights: Sequence[float] | None,
    mode_format: ModeFormat,
) -> tuple[pd.DataFrame, PromptTable]:
    """Score the samples of some files, and write them to samples.parquet, a block of texts in memory at a time.

    Returns:
        The scored samples without their texts, and the signs of leakage in these.
    """
    scored, leakage = list[pd.DataFrame](), list[PromptTable]()
    scratch = output_dir / PARTS / "joined.arrow"
    make_folder(scratch.parent)
    with samples_file(output_dir / SAMPLES) as write:
        for block in samples_in_blocks(files, scratch):
            block = score_samples(block, dataset, rewards, weights, mode_format)
            write(block)
            leakage.append(leakage_table(block, mode_format))
            scored.append(block.drop(columns="completion"))
    table = {name: np.concatenate([of_block[name] for of_block in leakage]) for name in leakage[0]}
    return pd.concat(scored, ignore_index=True), table


def _model_tokenizer(args: EvaluateArguments, is_main_process: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer. The main process prints what format it shows.

    Raises:
        UserError: there is no such model, it has no mode tags, or its openings leave no room within the limits.
    """
    tokenizer = tokenizer_of("model", args.model)
    if (line := settle_format(tokenizer, args.mode_format)) and is_main_process:
        print(line, flush=True)
    try:
        tokens = mode_tokens(tokenizer)
    except ValueError as error:
        raise UserError(
            f"model={args.model!r} is no hybrid model: {error} Evaluate one that went through `hgpo-trl hft`."
        ) from None
    args.limits.rooms(tokens)
    args.limits.budget(tokenizer, tokens)
    return tokenizer


def _check(
    args: EvaluateArguments, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, is_main_process: bool
) -> Dataset:
    """Drop faulty prompts if `drop_faulty_rows` is set; else raise UserError if there are any."""
    return check_prompts(
        f"data={args.data!r}",
        dataset,
        Renderer(tokenizer),
        positions=model_positions(args.model),
        max_new_tokens=args.max_new_tokens,
        dropped=dropped_rows_file(args.output_dir, "data") if args.drop_faulty_rows else None,
        is_main_process=is_main_process,
    )


def main(argv: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--compare" for word in argv):
        from hgpo_trl.scripts import compare

        compare.main(argv)
        return
    parser = RecipeParser((EvaluateArguments, RewardArguments), prog="hgpo-trl evaluate")
    parser.epilog = "--compare NAME=FOLDER NAME=FOLDER ... compares models that have been evaluated, instead."
    args, reward_args = parser.parse_recipe(argv)
    if args.backend == "vllm" and not args.rescore:
        check_vllm_installed("backend=vllm")
    processes = join_processes()
    rewards = [_load_function(name) for name in reward_args.reward_funcs]
    check_weights(args.reward_weights, len(rewards) + (reward_args.reward_model is not None))
    dataset = _load(args)
    if args.rescore:
        if not processes.is_main:
            return
        tokenizer = None
        if args.drop_faulty_rows:
            dataset = without_dropped(dataset, dropped_rows_file(args.output_dir, "data"))
    else:
        tokenizer = _model_tokenizer(args, processes.is_main)
        dataset = _check(args, dataset, tokenizer, processes.is_main)
        if not processes.is_main:
            parts = processes.agree(list[Part])  # the main process's
            _draw(args, tokenizer, dataset["prompt"], parts, processes)
            return
    settings = _settings(args, dataset)
    check_answers_are_there("data", dataset, rewards, reward_args)
    groups: dict[str, list[Label | None]] = {
        name: group_labels(name, dataset[name]) for name in GROUPS if name in dataset.column_names
    }
    mode_format = _claim(args, dataset, settings, tokenizer)
    _try_rewards(rewards, dataset)
    reward_model = reward_args.build_reward_model(default_device(), dataset[0]["prompt"])
    if reward_model is not None:
        rewards.append(reward_model)  # its weights are loaded once sampling has freed the memory
    output_dir = Path(args.output_dir)
    files, parts = [output_dir / SAMPLES], []
    if files[0].is_file():
        print(f"All samples are there: {files[0]}", flush=True)
    else:
        assert tokenizer is not None  # rescoring without samples was refused
        parts = _parts(args, tokenizer, dataset["prompt"], processes.count)
        files = [part.path for part in parts]
    if tokenizer is not None:
        parts = processes.agree(lambda: parts)
        _draw(args, tokenizer, dataset["prompt"], parts, processes)
    samples, leakage = _score(files, output_dir, dataset, rewards, args.reward_weights, mode_format)
    report = report_on(
        samples,
        args.margin,
        groups.get("level"),
        args.decision_bias,
        subjects=groups.get("subject"),
        domains=groups.get("domain"),
        price_per_million_tokens=args.price_per_million_tokens,
        mode_format=mode_format,
        leakage=leakage,
    )
    bias = 0.0 if args.decision_bias == SWEEP else float(args.decision_bias)
    chosen = chosen_prompts(samples, dataset, groups, args.margin, bias)
    shown = samples_of_prompts(output_dir / SAMPLES, [prompt for prompt, _ in chosen])
    examples = examples_of(chosen, shown, dataset, groups, args.margin, bias, mode_format)
    write_json(output_dir / EXAMPLES, nan_to_null(examples))
    heading: dict[str, Any] = {"model": args.model, "dataset": args.data, "settings": settings}
    if mode_format != LHRM:
        heading["mode_format"] = mode_format.declaration()
    write_json(output_dir / "report.json", nan_to_null({**heading, **report}))
    shutil.rmtree(output_dir / PARTS, ignore_errors=True)  # all of it is in samples.parquet
    accuracy, length = report["accuracy"], report["mean_tokens"]
    print(
        f"{args.model}: hybrid accuracy {report['hybrid_accuracy']:.3f}, "
        f"balanced {report['balanced_hybrid_accuracy']:.3f}, solved by neither mode {report['unsolved']:.3f}, "
        f"thinking ratio {report['thinking_ratio']:.3f}, "
        f"accuracy {accuracy['auto']:.3f} (always thinking {accuracy['think']:.3f}), "
        f"tokens {length['auto']:.1f} (always thinking {length['think']:.1f}) -> {output_dir}"
    )


if __name__ == "__main__":
    run_stage(main, "evaluate", sys.argv[1:])
