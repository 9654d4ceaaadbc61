"""Columns that processes in lock-step compute per optimizer step: micro-batches in one order, or in each one's own.

    python benchmarks/lock_step.py [--steps 20] [--update_results]

A simulation without a model, of the rollouts of recipes/qwen2.5-math-7b/hgpo.yaml: 1,024 responses a step, half of
them think, of log-normal lengths (mean 4,000 and 400 tokens, sigma 0.6), cut off at max_completion_length. Sorting and
trimming are `hgpo_trl.training.micro_batches` itself. Gradients are summed once a step, but ZeRO-3 and FSDP gather
weights in every micro-batch: each takes as long as the process with the widest one, so a step's columns are the sum
over its micro-batches of the widest of all processes. Prompts are left out. Takes half a minute; with
--update_results the table goes to benchmarks/RESULTS.md.
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

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen2.5-math-7b" / "hgpo.yaml"
ROWS = 1024  # of an optimizer step, on all processes

Permutation = Callable[[int], Tensor]


def micro_batches(lengths: Tensor, rows: int) -> list[Batch]:
    """One process's responses, padded to its longest, as TRL cuts them."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return [
        {"prompt_mask": torch.ones(len(part), 1, dtype=torch.int8), "completion_mask": part}
        for part in mask.to(torch.int8).split(rows)
    ]


def columns(processes: list[list[Batch]]) -> int:
    """Sum over the micro-batches of the widest completions of all processes."""
    widths = [[batch["completion_mask"].shape[1] for batch in batches] for batches in processes]
    return sum(max(together) for together in zip(*widths, strict=True))


def simulate(recipe: dict, num_processes: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Mean columns of a step: untrimmed, trimmed in each process's own order, in one order, and without any padding."""
    rows = recipe["per_device_train_batch_size"]
    think = torch.arange(ROWS) % recipe["num_generations"] < recipe["num_generations"] // 2
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"untrimmed": [], "own order": [], "one order": [], "no padding": []}
    for step in range(steps):
        cap = recipe["max_completion_length"]
        lengths = torch.tensor([log_normal(rng, thinks, cap=cap) for thinks in think.tolist()])
        processes = [micro_batches(part, rows) for part in lengths.chunk(num_processes)]

        def trimmed(seeds: list[int], processes: list[list[Batch]] = processes) -> int:
            """Each process shuffles by its own seed."""
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            orders: list[Permutation] = [lambda size, g=g: torch.randperm(size, generator=g) for g in generators]
            return columns(
                [
                    sort_and_trim(batches, len(batches), permutation=order)
                    for batches, order in zip(processes, orders, strict=True)
                ]
            )

        found["untrimmed"].append(columns(processes))
        found["own order"].append(trimmed([step * num_processes + process for process in range(num_processes)]))
        found["one order"].append(trimmed([step] * num_processes))
        found["no padding"].append(lengths.sum().item() / (rows * num_processes))
    return {name: float(np.mean(values)) for name, values in found.items()}


COLUMNS = {
    "processes x micro-batches": lambda r: f"{r['processes']} x {r['micro_batches']}",
    "untrimmed": lambda r: f"{r['untrimmed']:,.0f}",
    "each process's own order": lambda r: f"{r['own order']:,.0f}",
    "one order": lambda r: f"{r['one order']:,.0f}",
    "own order / one order": lambda r: f"{r['own order'] / r['one order']:.2f}",
    "no padding at all": lambda r: f"{r['no padding']:,.0f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="simulated optimizer steps of each row")
    parser.add_argument("--update_results", action="store_true", help="write the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    rows = [
        {
            "processes": processes,
            "micro_batches": ROWS // processes // recipe["per_device_train_batch_size"],
            **simulate(recipe, processes, args.steps),
        }
        for processes in (1, 2, 8, 32)
    ]
    table = markdown_table(COLUMNS, rows)
    print(table)
    if args.update_results:
        update_results("lock_step", table)


if __name__ == "__main__":
    main()
