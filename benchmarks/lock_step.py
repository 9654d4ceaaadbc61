"""Tokens that processes in lock-step compute per optimizer step: micro-batches of fixed rows, or of fixed tokens.

    python benchmarks/lock_step.py [--steps 5] [--update_results]

A simulation without a model, of the rollouts of recipes/qwen2.5-math-7b/hgpo.yaml: half of the responses think, of
log-normal lengths (mean 4,000 and 400 tokens, sigma 0.6), cut off at max_completion_length. Sorting, trimming and the
partition are those of `hgpo_trl.training`. Gradients are summed once a step, but ZeRO-3 and FSDP gather weights in
every micro-batch: each takes as long as the process with the largest one, so a step's tokens (rows x columns) are the
sum over its micro-batches of the largest of all processes. All results are divided by the real tokens per process.
`micro_batch_tokens` is max_completion_length, half of what the recipe's micro-batch may take. Prompts are left out.
Takes a minute or two; with --update_results the table goes to benchmarks/RESULTS.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from fixed_rollouts import log_normal, markdown_table, update_results
from torch import Tensor

from hgpo_trl.training.micro_batches import Batch, sort_and_trim
from hgpo_trl.training.partition import balanced_partition

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen2.5-math-7b" / "hgpo.yaml"
STEPS = [(1, 1024), (2, 1024), (8, 256), (8, 1024), (64, 1024), (64, 8192)]  # processes, rows of a step on all of them

Permutation = Callable[[int], Tensor]


def micro_batches(lengths: Tensor, rows: int) -> list[Batch]:
    """One process's responses, padded to its longest, as TRL cuts them."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return [
        {"prompt_mask": torch.ones(len(part), 1, dtype=torch.int8), "completion_mask": part}
        for part in mask.to(torch.int8).split(rows)
    ]


def waited(processes: list[list[Batch]]) -> int:
    """Sum over the micro-batches of the largest of all processes, in tokens."""
    tokens = [[batch["completion_mask"].numel() for batch in batches] for batches in processes]
    return sum(max(together) for together in zip(*tokens, strict=True))


def simulate(recipe: dict, num_processes: int, num_rows: int, steps: int) -> dict[str, float]:
    """Mean tokens of a step per process, over its real ones."""
    rows, cap = recipe["per_device_train_batch_size"], recipe["max_completion_length"]
    think = np.arange(num_rows) % recipe["num_generations"] < recipe["num_generations"] // 2
    rng = np.random.default_rng(0)
    found: list[dict[str, float]] = []
    for step in range(steps):
        lengths = torch.tensor([log_normal(rng, thinks, cap=cap) for thinks in think.tolist()])
        processes = [micro_batches(part, rows) for part in lengths.chunk(num_processes)]

        def trimmed(seeds: list[int], processes: list[list[Batch]] = processes) -> int:
            """Each process shuffles by its own seed."""
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            orders: list[Permutation] = [lambda size, g=g: torch.randperm(size, generator=g) for g in generators]
            return waited(
                [
                    sort_and_trim(batches, len(batches), permutation=order)
                    for batches, order in zip(processes, orders, strict=True)
                ]
            )

        plan = balanced_partition([0] * num_rows, lengths.tolist(), num_processes, cap)
        tokens = [[len(part) * int(lengths[part].max()) for part in together] for together in plan]
        of_step = {
            "untrimmed": waited(processes),
            "own order": trimmed([step * num_processes + process for process in range(num_processes)]),
            "one order": trimmed([step] * num_processes),
            "by tokens": sum(map(max, tokens)),
            "by tokens, computed": sum(map(sum, tokens)) / num_processes,
            "longest": int(lengths.max()),
        }
        real = lengths.sum().item() / num_processes
        found.append({name: value / real for name, value in of_step.items()} | {"by tokens, number": len(plan)})
    return {name: float(np.mean([of_step[name] for of_step in found])) for name in found[0]}


COLUMNS: dict[str, Callable[[dict], object]] = {
    "processes": lambda r: r["processes"],
    "rows of a step": lambda r: f"{r['rows']:,}",
    "micro-batches by rows": lambda r: r["micro_batches"],
    "untrimmed": lambda r: f"{r['untrimmed']:.2f}",
    "each process's own order": lambda r: f"{r['own order']:.2f}",
    "one order": lambda r: f"{r['one order']:.2f}",
    "micro-batches by tokens": lambda r: f"{r['by tokens, number']:.1f}",
    "by tokens": lambda r: f"{r['by tokens']:.2f}",
    "by tokens, without waiting": lambda r: f"{r['by tokens, computed']:.3f}",
    "the longest row alone": lambda r: f"{r['longest']:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="simulated optimizer steps of each row")
    parser.add_argument("--update_results", action="store_true", help="write the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    rows = [
        {
            "processes": processes,
            "rows": rows,
            "micro_batches": rows // processes // recipe["per_device_train_batch_size"],
            **simulate(recipe, processes, rows, args.steps),
        }
        for processes, rows in STEPS
    ]
    table = markdown_table(COLUMNS, rows)
    print(table)
    if args.update_results:
        update_results("lock_step", table)


if __name__ == "__main__":
    main()
