"""Training phase of HGPOTrainer against stock GRPOTrainer, side by side in one run, on identical fixed completions.

    python benchmarks/micro_batches.py [--rows 16 64 256] [--repeats 5] [--output_dir runs/benchmarks/micro-batches]

Completions are drawn once per length distribution and given to both trainers in place of generation, so that only what
comes after a rollout is timed. The two trainers take turns, step by step. Distributions (tokens per response):

    log-normal   think: log-normal, mean 4,000, sigma 0.6, at most 16,000; no think: mean 400; scaled down by --scale
    embedded     the chain-sum task's own lengths
    equal        every response as long as the others: nothing to gain

Writes results.json, table.md and speedup.png. Ratios are medians over the steps; seconds depend on the machine.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from hgpo_trl import HGPOConfig, HGPOTrainer
from hgpo_trl.tasks.embedded import build_tokenizer, load_task

PROMPT_TOKENS = 8
MICRO_BATCH = 4
GROUP = 8
Lengths = Callable[[np.random.Generator, bool], int]


def log_normal(scale: float) -> Lengths:
    """Think and no-think lengths of a reasoning model, divided by `scale`."""

    def draw(rng: np.random.Generator, think: bool) -> int:
        mean, sigma, cap = (4000, 0.6, 16_000) if think else (400, 0.6, 16_000)
        length = min(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), cap)
        return max(2, round(length / scale))

    return draw


def embedded(rng: np.random.Generator, think: bool) -> int:
    task = load_task("hgpo_trl.tasks.chain_sum")
    levels = [level for level, weight in task.LEVELS.items() for _ in range(weight)]
    return 11 + 5 * int(rng.choice(levels)) if think else 4


def equal(rng: np.random.Generator, think: bool) -> int:
    return 32


class Timed:
    """Fixed completions in, seconds and tokens out. Mixed into both trainers."""

    completions: list[list[int]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.processed = self.real = 0
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        return [list(ids) for ids in self.completions[: len(prompt_ids)]], None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.seconds["scoring"].append(time.perf_counter() - start)
        return output

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.processed += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        self.real += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start, scored = time.perf_counter(), len(self.seconds["scoring"])
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        elapsed = time.perf_counter() - start
        self.seconds["training"].append(elapsed - sum(self.seconds["scoring"][scored:]))
        return loss


class StockTrainer(Timed, GRPOTrainer):
    """TRL as it is."""


class OurTrainer(Timed, HGPOTrainer):
    """HGPOTrainer with its own code timed apart from what it inherits."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        inherited = 0.0
        original = GRPOTrainer._generate_and_score_completions

        def timed(trainer: Any, batch: Any) -> Any:
            nonlocal inherited
            start = time.perf_counter()
            output = original(trainer, batch)
            inherited = time.perf_counter() - start
            return output

        GRPOTrainer._generate_and_score_completions = timed
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            GRPOTrainer._generate_and_score_completions = original
        self.seconds["own"].append(self.seconds["scoring"][-1] - inherited)
        return output


def length_free_reward(completions: list, **kwargs: Any) -> list[float]:
    return [float(row % 3 == 0) for row in range(len(completions))]


def build(kind: str, rows: int, longest: int, directory: str, hidden_size: int, layers: int) -> Any:
    """A trainer on a small Qwen2 whose optimizer step covers `rows` rows in micro-batches of MICRO_BATCH."""
    tokenizer = build_tokenizer(load_task("hgpo_trl.tasks.chain_sum"))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=longest + 64,
        )
    )
    settings = {
        "output_dir": directory,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": rows // MICRO_BATCH,
        "num_generations": GROUP,
        "max_completion_length": max(2, longest),
        "loss_type": "dr_grpo",
        "beta": 0.0,
        "max_steps": 10_000,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    prompt = " ".join(["a", "=", "1"] * 2)
    data = Dataset.from_dict({"prompt": [prompt] * max(rows, 8)})
    if kind == "stock":
        return StockTrainer(model, length_free_reward, GRPOConfig(**settings), data, processing_class=tokenizer)
    return OurTrainer(model, length_free_reward, HGPOConfig(**settings), data, processing_class=tokenizer)


def step(trainer: Any, rows: int) -> dict[str, float]:
    """One optimizer step's worth of micro-batches; seconds of the training phase, of scoring and of our own code."""
    trainer.seconds.clear()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = rows // MICRO_BATCH
    batch = [{"prompt": trainer.train_dataset[0]["prompt"]} for _ in range(rows)]
    for _ in range(rows // MICRO_BATCH):
        trainer.training_step(trainer.model, batch, None)
    trainer.model.zero_grad()
    return {name: sum(values) for name, values in trainer.seconds.items()}


def compare(name: str, lengths: Lengths, rows: int, repeats: int, hidden_size: int, layers: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    drawn = [lengths(rng, think=i % GROUP < GROUP // 2) for i in range(rows)]
    with TemporaryDirectory() as directory:
        trainers = {kind: build(kind, rows, max(drawn), directory, hidden_size, layers) for kind in ("stock", "ours")}
        times: dict[str, list[dict[str, float]]] = {kind: [] for kind in trainers}
        for trainer in trainers.values():
            words = len(trainer.processing_class) - 5
            trainer.completions = [[7 + (i + j) % (words - 7) for j in range(n)] for i, n in enumerate(drawn)]
            step(trainer, rows)  # warm-up
            trainer.processed = trainer.real = 0
        for _ in range(repeats):
            for kind, trainer in trainers.items():
                times[kind].append(step(trainer, rows))
    median = {
        kind: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for kind, entries in times.items()
    }
    ours, stock = median["ours"], median["stock"]
    return {
        "distribution": name,
        "rows": rows,
        "tokens_stock": trainers["stock"].processed / trainers["stock"].real,
        "tokens_ours": trainers["ours"].processed / trainers["ours"].real,
        "training_stock_s": stock["training"],
        "training_ours_s": ours["training"],
        "speedup_training": stock["training"] / ours["training"],
        "speedup_training_and_scoring": (stock["training"] + stock["scoring"]) / (ours["training"] + ours["scoring"]),
        "own_share": ours["own"] / (ours["training"] + ours["scoring"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="rows of a generation batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each trainer")
    parser.add_argument("--scale", type=float, default=40.0, help="divide the log-normal lengths by this")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/micro-batches"))
    args = parser.parse_args()

    distributions = {"log-normal": log_normal(args.scale), "embedded": embedded, "equal": equal}
    results = []
    for name, lengths in tqdm(distributions.items(), desc="distributions"):
        for rows in args.rows:
            results.append(compare(name, lengths, rows, args.repeats, args.hidden_size, args.layers))
            tqdm.write(json.dumps(results[-1]))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    header = [
        "lengths", "rows", "processed / real tokens, stock", "ours", "training phase, stock / ours",
        "training and scoring, stock / ours", "own code, share of ours",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| :-- " + "| --: " * (len(header) - 1) + "|"]
    lines += [
        f"| {r['distribution']} | {r['rows']} | {r['tokens_stock']:.2f} | {r['tokens_ours']:.2f} | "
        f"{r['speedup_training']:.2f} | {r['speedup_training_and_scoring']:.2f} | {100 * r['own_share']:.2f} % |"
        for r in results
    ]
    (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, marker in zip(distributions, "os^", strict=True):
        mine = [r for r in results if r["distribution"] == name]
        axes.plot([r["rows"] for r in mine], [r["speedup_training"] for r in mine], marker=marker, label=name)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.set(xscale="log", xlabel="rows of a generation batch", ylabel="stock / ours, seconds", ylim=(0, None))
    axes.set_xticks(args.rows, [str(rows) for rows in args.rows])
    axes.minorticks_off()
    axes.set_title("Training phase: how many times faster than stock TRL", loc="left", fontsize=10.5)
    axes.legend(frameon=False)
    figure.savefig(args.output_dir / "speedup.png", dpi=160)


if __name__ == "__main__":
    main()
