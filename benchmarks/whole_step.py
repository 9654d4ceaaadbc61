"""Whole steps of HGPOTrainer against stock GRPOTrainer that samples both modes through the same vLLM engine.

    make demo RECIPE=smollm2-135m                                 # model and data; an HFT model is enough
    OMP_NUM_THREADS=1 python benchmarks/whole_step.py [--update_results] [--turns 3] [--steps 4]

Both train the HFT model of recipes/smollm2-135m on the same queries with the settings of its hgpo.yaml, but N = 8:
a step is 8 queries with 4 responses in each mode. vLLM samples in the training's process. Stock TRL gets every query
twice, as two prompts that end with the opening of a mode, with 4 responses each; so both sides write responses of the
same kind.
"ours, lazy" is the recipe itself, with lazy thinking, "ours" the recipe without.

The sides take turns in processes of their own. The first step of a process, in which vLLM warms up, is not counted.
Seconds are wall time, and only their ratios within a run mean anything. "Training" is all micro-batches' forward and
backward passes, "sampling" the engine with the sync of the weights, "rest" the decision pass, scoring and optimizer.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from datasets import Dataset
from fixed_rollouts import markdown_table, publish
from matplotlib.figure import Figure
from overhead import INHERITED, Clock, StepTimes
from tqdm.auto import tqdm
from transformers import AutoTokenizer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m" / "hgpo.yaml"
SIDES = ("stock TRL", "ours", "ours, lazy")
PARTS = ("sampling", "training", "rest")
LENGTH = "completions/mean_length"
STEP = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}  # N, and rows
NOT_TRLS = ("margin", "alpha", "decision_weighting", "lazy_thinking", "micro_batch_tokens")
NOT_FIELDS = ("model_name_or_path", "train_data", "reward_funcs", "env", "dtype")  # of the command, not of the config


def ends_with_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """A reward that costs nothing: the reference answer is the response's last word."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    words = [text.replace("</no_think>", " ").split() for text in texts]
    return [float(bool(found) and found[-1] == right) for found, right in zip(words, answer, strict=True)]


def train(side: str, model: str, data: str, steps: int) -> dict[str, Any]:
    """Train in this process; seconds of every step but the first, by part, and this process's peak memory."""
    import torch
    from trl import GRPOConfig, GRPOTrainer

    from hgpo_trl import HGPOConfig, HGPOTrainer
    from hgpo_trl.common.data_files import load_data
    from hgpo_trl.inference.vllm_support import keep_cpu_weights_replaceable
    from hgpo_trl.modes import MODES, mode_tokens
    from hgpo_trl.training.precision import choose_bf16
    from hgpo_trl.training.vllm import prepare_generation

    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for name, value in settings["env"].items():
        os.environ.setdefault(name, value)
    settings = {name: value for name, value in settings.items() if name not in NOT_FIELDS} | STEP
    on_cpu = not torch.accelerator.is_available()
    settings |= {"use_cpu": on_cpu, "bf16": choose_bf16(on_cpu), "model_init_kwargs": {"dtype": "float32"}}
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", truncation_side="left")
    rows = load_data("data", data, "train")
    clock = Clock(time.perf_counter)
    times = StepTimes(clock)
    with TemporaryDirectory() as folder:
        settings |= {
            "output_dir": folder, "max_steps": steps + 1, "save_strategy": "no", "disable_tqdm": True,
            "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
        }  # fmt: skip
        if side == "stock TRL":
            settings = {name: value for name, value in settings.items() if name not in NOT_TRLS}
            settings["num_generations"] //= 2
            trainer_class, config = GRPOTrainer, GRPOConfig
            openings = [tokenizer.decode(mode_tokens(tokenizer).openings[place]) for place in range(len(MODES))]
            rows = in_both_modes(rows, tokenizer, openings)
            keep_cpu_weights_replaceable()
        else:
            settings["lazy_thinking"] = side == "ours, lazy"
            trainer_class, config = HGPOTrainer, HGPOConfig
        arguments = config(**settings)
        trainer = trainer_class(
            model=model, reward_funcs=ends_with_answer, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        if side == "stock TRL":  # vLLM's CPU engine packs its weights, and takes no others from TRL alone
            prepare_generation(trainer.vllm_generation, merge_adapter=False)
        trainer.add_callback(times)
        trainer.vllm_generation.sync_weights = clock.charging(trainer.vllm_generation.sync_weights, "sampling")
        trainer.vllm_generation.generate = clock.charging(trainer.vllm_generation.generate, "sampling")
        trainer._generate_and_score_completions = clock.charging(trainer._generate_and_score_completions, INHERITED)
        trainer.training_step = clock.charging(trainer.training_step, "training")
        trainer.train()
        lengths = [entry[LENGTH] for entry in trainer.state.log_history if LENGTH in entry]
    steps_taken = [
        {"step": step.total(), "length": length, **step, "rest": step[INHERITED]}
        for step, length in zip(times.steps, lengths, strict=True)
    ]
    return {
        "steps": steps_taken[1:],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "precision": "bf16" if arguments.bf16 else "fp32",
    }


def in_both_modes(rows: Dataset, tokenizer: Any, openings: list[str]) -> Dataset:
    """Every query twice, as texts that end with the opening of a mode."""
    asked = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    return Dataset.from_dict(
        {
            "prompt": [prompt + opening for prompt in asked for opening in openings],
            "answer": [answer for answer in rows["answer"] for _ in openings],
        }
    )


def in_a_process(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """`train` in a process of its own: one process holds one engine."""
    command = [sys.executable, __file__, "--side", side, "--model", args.model, "--data", args.data]
    output = subprocess.run([*command, "--steps", str(args.steps)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def summary(turns: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per side: medians over all steps of all turns, and the median over turns of stock's step over its own."""

    def median(side: str, name: str, turn: dict[str, Any]) -> float:
        return statistics.median(step.get(name, 0.0) for step in turn[side]["steps"])

    def over_turns(side: str, name: str) -> float:
        return statistics.median(median(side, name, turn) for turn in turns)

    return [
        {"side": side, "peak": max(turn[side]["peak"] for turn in turns)}
        | {name: over_turns(side, name) for name in ("step", "length", *PARTS)}
        | {"ratio": statistics.median(median(SIDES[0], "step", turn) / median(side, "step", turn) for turn in turns)}
        for side in SIDES
    ]


COLUMNS: dict[str, Callable[[dict], Any]] = {
    "trainer": lambda r: r["side"],
    "tokens per response": lambda r: f"{r['length']:.0f}",
    "step": lambda r: f"{r['step']:.1f} s",
    **{part: lambda r, part=part: f"{r[part]:.1f} s" for part in PARTS},
    "stock / this": lambda r: f"{r['ratio']:.2f}",
    "peak memory": lambda r: f"{r['peak'] / 2**30:.1f} GiB",
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A bar per trainer, by part."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row[part] for row in rows]
        axes.barh([row["side"] for row in rows], widths, left=left, label=part, height=0.6)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(PARTS), loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2-135m/hft")
    parser.add_argument("--data", default="runs/smollm2-135m/data/hgpo")
    parser.add_argument("--steps", type=int, default=4, help="counted in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/whole_step"))
    parser.add_argument("--update_results", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(train(args.side, args.model, args.data, args.steps)))
        return
    turns = [{side: in_a_process(side, args) for side in SIDES} for _ in tqdm(range(args.turns), unit="turn")]
    rows = summary(turns)
    publish("whole_step", rows, markdown_table(COLUMNS, rows), draw(rows), args, turns[0][SIDES[0]]["precision"])


if __name__ == "__main__":
    main()
