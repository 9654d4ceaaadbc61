"""Rollout tokens and seconds until a model knows when to think: HGPO and other rules on the embedded task.

    python benchmarks/rollout_tokens.py --seeds 0 1 2 [--rules hgpo lazy grpo thinkless adaptthink] [--jobs 2]
                                        [--models runs/seeds] [--output_dir runs/rollout_tokens]

Per seed the chain-sum recipes build data and HFT model (MODELS/SEED/{data,hft}, used as they are if they exist), and
every rule of `mode_rules.py` goes on from there with the optimiser, schedule, steps and batch of the recipe for Stage
II. Every few steps the model is evaluated on held-out prompts, always the same ones. Counted are the tokens that the
model drew in rollouts, and seconds without the evaluation.

Writes SEED/RULE.json (a run that has one is not run again) and SEED/RULE.log, then results.json, table.md and
rollout_tokens.png from all runs in the output folder.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import rc_context
from matplotlib.figure import Figure
from mode_rules import REFERENCE, RULES, Counting
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import ModelConfig

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.files import write_atomically, write_json
from hgpo_trl.evaluation.metrics import report_on
from hgpo_trl.evaluation.samples import Generated, samples_table
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.inference.generate import complete, end_tokens, render, sampling_config
from hgpo_trl.modes import mode_tokens
from hgpo_trl.reporting.figures import PERCENT_TICKS, STYLE, to_png
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.scripts.evaluate import EvaluateArguments
from hgpo_trl.scripts.hgpo import HGPOArguments
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.rewards import RewardArguments
from hgpo_trl.scripts.stages import load_tokenizer, model_init_kwargs
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.rules import load_rule

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "chain-sum"
MAIN_RULES = ("hgpo", "lazy", "grpo", "thinkless", "adaptthink")
TARGET = 0.9
REFERENCE_SAMPLES = 4  # K of AdaptThink; 16 in the paper. Here nearly every think response is right, so few will do
COLOURS = ["#2066B0", "#17A2A2", "#8C8C8C", "#BBBBBB", "#E07B00", "#F2B705", "#B0305A", "#E28AA5", "#4F9D3A"]


# --- one run ------------------------------------------------------------------------------------------------------


def reference_rewards(model_dir: str, dataset: Dataset, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """R̄_ref of every query (Eq. 5 of AdaptThink): the mean accuracy of the HFT model's own think responses."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir).eval(), AutoTokenizer.from_pretrained(model_dir)
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    think = mode_tokens(tokenizer).decision[0]
    rows = [[*ids, think] for ids in render(tokenizer, dataset["prompt"]) for _ in range(REFERENCE_SAMPLES)]
    torch.manual_seed(seed)
    start = time.process_time()
    with tqdm(total=len(rows), desc="reference", unit="response") as progress:
        config = sampling_config(tokenizer, ends, max_new_tokens - 1, temperature=1.0, top_p=1.0)
        drawn = [
            Generated(place // REFERENCE_SAMPLES, 0, place % REFERENCE_SAMPLES, ids)
            for place, ids in complete(model, tokenizer, rows, config, 512, progress)
        ]
    samples = samples_table(tokenizer, [(1.0, 0.0, 0)] * len(dataset), drawn, ends)
    scored = score_samples(samples, dataset, [accuracy_reward])
    return {
        "samples": REFERENCE_SAMPLES,
        "tokens": int((samples["num_tokens"] - 1).sum()),
        "cpu_seconds": time.process_time() - start,
        "rewards": scored.groupby("prompt_id")["reward"].mean().tolist(),
    }


class Curve(TrainerCallback):
    """Measures every so many steps, and keeps tokens and seconds of the training alone."""

    def __init__(self, trainer: Any, measure: Any, every: int) -> None:
        self.trainer, self.measure, self.every = trainer, measure, every
        self.seconds = self.cpu_seconds = 0.0
        self.points: list[dict[str, float]] = []

    def note(self, step: int) -> None:
        point = {"step": step, "tokens": self.trainer.rollout_tokens}
        self.points.append(point | {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds} | self.measure())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started[0]
        self.cpu_seconds += time.process_time() - self.started[1]
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.note(state.global_step)


class StopAt(TrainerCallback):
    """Ends the training early, on the schedule of a full one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def evaluator(model: Any, tokenizer: Any, dataset: Dataset, recipe: EvaluateArguments, samples_per_mode: int) -> Any:
    """A function that evaluates the model as the recipe does, without disturbing the training's random numbers."""

    def measure() -> dict[str, float]:
        training = model.training
        with torch.random.fork_rng():
            samples = sample_both_modes(
                model,
                tokenizer,
                dataset["prompt"],
                samples_per_mode=samples_per_mode,
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


def run(seed: int, name: str, args: argparse.Namespace) -> None:
    """Train one rule on one seed's HFT model, and write its curve."""
    rule, models, folder = RULES[name], args.models / str(seed), args.output_dir / str(seed)
    evaluation, _ = RecipeParser((EvaluateArguments, RewardArguments), prog="rollout_tokens").parse_recipe(
        ["--config", str(RECIPES / "evaluate.yaml"), "--model", str(models / "hft")]
    )
    script_args, config, model_args, _ = RecipeParser(
        (HGPOArguments, HGPOConfig, ModelConfig, RewardArguments), prog="rollout_tokens"
    ).parse_recipe(
        ["--config", str(RECIPES / "hgpo.yaml"), "--seed", str(seed), "--output_dir", tempfile.gettempdir()]
        + ["--model_name_or_path", str(models / "hft"), "--train_data", str(models / "data" / "hgpo.parquet")]
        + ["--logging_strategy", "no"]
        + [
            word
            for option, value in rule.fields.items()
            for word in (f"--{option}", value if isinstance(value, str) else json.dumps(value))
        ]
    )
    tokenizer = load_tokenizer(config, model_args, truncation_side="left", padding_side="left")
    train = load_data("train_data", script_args.train_data, "train")
    reference: dict[str, Any] = {}
    if REFERENCE in load_rule(config.mode_rule).columns:
        path = folder / "reference.json"
        if not path.is_file():
            limit = config.max_completion_length
            write_json(path, reference_rewards(str(models / "hft"), train, limit, seed))
        reference = json.loads(path.read_text(encoding="utf-8"))
        train = train.add_column(REFERENCE, reference["rewards"])

    config.model_init_kwargs = model_init_kwargs(config, model_args)
    trainer = Counting(
        model=model_args.model_name_or_path,
        reward_funcs=[accuracy_reward],
        args=config,
        train_dataset=train,
        processing_class=tokenizer,
    )
    held_out = load_data("data", str(models / "data" / "eval.parquet"), "train")
    few = held_out.select(range(args.prompts))
    curve = Curve(trainer, evaluator(trainer.model, tokenizer, few, evaluation, args.samples_per_mode), args.eval_every)
    trainer.add_callback(curve)
    if args.max_steps is not None:
        trainer.add_callback(StopAt(args.max_steps))
    trainer.train()
    final = evaluator(trainer.model, tokenizer, held_out, evaluation, evaluation.samples_per_mode)()
    result = {
        "rule": name,
        "seed": seed,
        "settings": settings(args),
        "fields": rule.fields,
        "curve": curve.points,
        "final": final,
        "tokens": trainer.rollout_tokens,
        "seconds": curve.seconds,
        "cpu_seconds": curve.cpu_seconds,
        "reference_tokens": reference.get("tokens", 0),
    }
    write_json(folder / f"{name}.json", result)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of an output folder have to share."""
    return {name: getattr(args, name) for name in ("max_steps", "eval_every", "prompts", "samples_per_mode")}


# --- all runs -----------------------------------------------------------------------------------------------------


def build_models(seed: int, models: Path, environment: dict[str, str]) -> None:
    """The seed's data and HFT model, by the chain-sum recipes, unless they are there."""
    folder = models / str(seed)

    def stage(name: str, *options: str) -> None:
        command = [sys.executable, "-m", f"hgpo_trl.scripts.{name}", *options, "--seed", str(seed)]
        subprocess.run(command, env=environment, check=True)

    if not (folder / "data" / "base" / "model.safetensors").is_file():
        stage("data_task", "--config", str(RECIPES / "data.yaml"), "--output_dir", str(folder / "data"))
    if not (folder / "hft" / "model.safetensors").is_file():
        stage(
            *("hft", "--config", str(RECIPES / "hft.yaml"), "--output_dir", str(folder / "hft")),
            *("--model_name_or_path", str(folder / "data" / "base")),
            *("--train_data", str(folder / "data" / "hft.parquet")),
        )


def run_in_process(seed: int, name: str, args: argparse.Namespace, environment: dict[str, str]) -> None:
    """One run in a process of its own, its output in SEED/RULE.log."""
    log = args.output_dir / str(seed) / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one", str(seed), name]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"Rule {name} on seed {seed} failed with status {done.returncode}; its output is in {log}.")


def check_results(args: argparse.Namespace) -> None:
    """ValueError if the output folder has runs with other settings."""
    for path in sorted(args.output_dir.glob("*/*.json")):
        found = json.loads(path.read_text(encoding="utf-8")).get("settings")
        if found is not None and found != settings(args):
            raise ValueError(f"{path} was made with {found}, not {settings(args)}. Choose another --output_dir.")


# --- results ------------------------------------------------------------------------------------------------------


def reached(curve: list[dict[str, float]], target: float = TARGET) -> dict[str, float] | None:
    """Where a curve's hybrid accuracy first reaches the target in two evaluations in a row; None if it does not.

    Step, tokens and seconds of the first of the two, linearly interpolated from the evaluation before, which was below
    the target.
    """
    for index, (point, following) in enumerate(itertools.pairwise(curve)):
        if min(point["hybrid_accuracy"], following["hybrid_accuracy"]) < target:
            continue
        before = curve[max(index - 1, 0)]
        gain = point["hybrid_accuracy"] - before["hybrid_accuracy"]
        share = (target - before["hybrid_accuracy"]) / gain if gain > 0 else 1.0  # no gain: the very first evaluation
        return {
            name: before[name] + share * (point[name] - before[name])
            for name in ("step", "tokens", "seconds", "cpu_seconds")
        }
    return None


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per rule, in the order of RULES: lists over its seeds, NaN where the target is not reached."""
    entries = []
    first = {r["seed"]: reached(r["curve"]) for r in results if r["rule"] == "hgpo"}
    for name, rule in RULES.items():
        runs = sorted((r for r in results if r["rule"] == name), key=lambda r: r["seed"])
        if not runs:
            continue
        there = [
            reached(r["curve"]) or dict.fromkeys(("step", "tokens", "seconds", "cpu_seconds"), math.nan) for r in runs
        ]
        hgpo = [(first.get(r["seed"]) or {"tokens": math.nan})["tokens"] for r in runs]
        entries.append(
            {
                "rule": name,
                "label": rule.label,
                "seeds": [r["seed"] for r in runs],
                **{f"{key}_to_target": [point[key] for point in there] for key in there[0]},
                "tokens_against_hgpo": [point["tokens"] / other for point, other in zip(there, hgpo, strict=True)],
                "tokens": [r["tokens"] for r in runs],
                "reference_tokens": [r["reference_tokens"] for r in runs],
                **{key: [r["final"][key] for r in runs] for key in runs[0]["final"]},
            }
        )
    return entries


def cell(values: list[float], form: str, scale: float = 1.0) -> str:
    """The median, and every seed's value in brackets; a dash is one that was not reached, which no number is above."""
    texts = ["–" if math.isnan(value) else f"{scale * value:{form}}" for value in values]
    median = statistics.median(math.inf if math.isnan(value) else value for value in values)
    shown = "–" if math.isinf(median) else f"{scale * median:{form}}"
    return f"{shown} ({', '.join(texts)})" if len(values) > 1 else shown


def table(entries: list[dict[str, Any]]) -> str:
    columns = [
        (f"tokens to {TARGET}, thousands", "tokens_to_target", ".0f", 1e-3),
        ("of HGPO's", "tokens_against_hgpo", ".2f", 1.0),
        ("steps", "step_to_target", ".0f", 1.0),
        ("seconds", "seconds_to_target", ".0f", 1.0),
        ("CPU seconds", "cpu_seconds_to_target", ".0f", 1.0),
        ("tokens in all, thousands", "tokens", ".0f", 1e-3),
        ("hybrid accuracy, %", "hybrid_accuracy", ".1f", 100.0),
        ("accuracy, own choice, %", "accuracy_auto", ".1f", 100.0),
        ("accuracy, sampled choice, %", "accuracy_sampled", ".1f", 100.0),
        ("thinking ratio", "thinking_ratio", ".2f", 1.0),
        ("mass on neither, %", "off_mode_mass", ".2f", 100.0),
    ]
    lines = ["| rule | " + " | ".join(title for title, *_ in columns) + " |", "| :-- " + "| --: " * len(columns) + "|"]
    for entry in entries:
        cells = [cell(entry[key], form, scale) for _, key, form, scale in columns]
        lines.append(f"| {entry['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(results: list[dict[str, Any]]) -> Figure:
    """Hybrid accuracy over rollout tokens: a thin line per seed, a thick one for the median over the seeds."""
    drawing = Figure(figsize=(9, 4.6), layout="constrained")
    axes = drawing.add_subplot()
    for (name, rule), colour in zip(RULES.items(), COLOURS, strict=True):
        curves = [r["curve"] for r in results if r["rule"] == name]
        if not curves:
            continue
        lines = [([p["tokens"] / 1e3 for p in c], [p["hybrid_accuracy"] for p in c]) for c in curves]
        for tokens, accuracy in lines:
            axes.plot(tokens, accuracy, color=colour, linewidth=0.7, alpha=0.5)
        grid = np.linspace(0, min(tokens[-1] for tokens, _ in lines), 200)
        median = np.median([np.interp(grid, *line) for line in lines], axis=0)
        axes.plot(grid, median, color=colour, label=rule.label)
    axes.axhline(TARGET, color="#333333", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tokens sampled in rollouts, thousands", ylabel="hybrid accuracy", ylim=(0, 1), xlim=(0, None))
    axes.yaxis.set_major_formatter(PERCENT_TICKS)
    axes.legend(loc="lower right")
    return drawing


def write_results(output_dir: Path) -> None:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output_dir.glob("*/*.json"))]
    results = [result for result in runs if "curve" in result]
    entries = summary(results)
    rows = table(entries)
    write_atomically(output_dir / "results.json", f"{json.dumps(entries, indent=2)}\n".encode())
    write_atomically(output_dir / "table.md", rows.encode())
    with rc_context(STYLE):
        write_atomically(output_dir / "rollout_tokens.png", to_png(figure(results)))
    print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, initial weights and sampling")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(MAIN_RULES), help="what to compare")
    parser.add_argument("--models", type=Path, default=Path("runs/seeds"), help="folder of SEED/{data,hft}")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rollout_tokens"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--max_steps", type=int, help="stop each run after so many steps of the recipe's schedule")
    parser.add_argument("--eval_every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--prompts", type=int, default=153, help="held-out prompts of an evaluation; 9 hold all levels")
    parser.add_argument("--samples_per_mode", type=int, default=8, help="of each of these prompts")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "RULE"), help="run only this one, in this process")
    args = parser.parse_args()
    args.models, args.output_dir = args.models.resolve(), args.output_dir.resolve()
    if args.one:
        run(int(args.one[0]), args.one[1], args)
        return

    check_results(args)
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(os.environ)
    for seed in args.seeds:
        build_models(seed, args.models, environment)
    missing = [
        (seed, name)
        for seed in args.seeds
        for name in args.rules
        if not (args.output_dir / str(seed) / f"{name}.json").is_file()
    ]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), desc="runs") as progress:
        for _ in pool.map(lambda one: run_in_process(*one, args, environment), missing):
            progress.update()
    write_results(args.output_dir)


if __name__ == "__main__":
    main()
