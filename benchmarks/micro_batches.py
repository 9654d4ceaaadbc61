"""Loss and backward pass of HGPOTrainer against stock GRPOTrainer, side by side, on identical fixed completions.

    OMP_NUM_THREADS=1 python benchmarks/micro_batches.py [--quick] [--update_results]
        [--repeats 5] [--output_dir runs/benchmarks/micro-batches]

Completions (see fixed_rollouts.py) are given to both trainers in place of generation. The two take turns, step by step,
the first of a turn alternating; ratios are medians over the turns. "Training phase" is loss and backward pass of an
optimizer step, "whole step" adds scoring, advantages, metrics and the optimizer, but no generation.

Seconds are this process's CPU seconds, of one thread: on a CPU they are the wall time of a machine that does nothing
else. Peak memory is what a step's resident memory rises to above that of the trainer before it, each in a process of
its own (Linux). Writes results.json, table.md and micro_batches.png, and with --update_results the section of
benchmarks/RESULTS.md.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fixed_rollouts import CASE_COLUMNS, DISTRIBUTIONS, Case, build, markdown_table, publish
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from trl import GRPOConfig, GRPOTrainer

from hgpo_trl import HGPOConfig, HGPOTrainer


class Timed:
    """Fixed completions in, seconds and tokens out. Mixed into both trainers."""

    completions: list[list[int]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.processed = self.real = 0
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        first = self.accelerator.process_index * len(prompt_ids)  # type: ignore[attr-defined]
        return [list(ids) for ids in self.completions[first : first + len(prompt_ids)]], None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start = time.process_time()
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.seconds["scoring"] += time.process_time() - start
        return output

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.processed += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        self.real += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class Stock(Timed, GRPOTrainer):
    """TRL as it is."""


class Ours(Timed, HGPOTrainer):
    """HGPOTrainer as it is."""


KINDS: dict[str, Any] = {"stock": (Stock, GRPOConfig), "ours": (Ours, HGPOConfig)}


def ready(kind: str, case: Case, directory: str) -> Any:
    """A trainer with its optimizer, before its first step."""
    trainer = build(*KINDS[kind], case, directory, logging_strategy="no")
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = case.rows // case.micro_batch
    return trainer


def step(trainer: Any, case: Case, micro_batches: int | None = None) -> dict[str, float]:
    """One optimizer step; seconds of the training phase and of the whole."""
    trainer.seconds.clear()
    trainer._step, trainer._buffered_inputs = 0, None  # the next micro-batch begins with a rollout
    batch = [{"prompt": trainer.train_dataset[0]["prompt"]} for _ in range(case.rows)]
    start = time.process_time()
    for _ in range(micro_batches or case.rows // case.micro_batch):
        trainer.training_step(trainer.model, batch, None)
    training = time.process_time() - start - trainer.seconds["scoring"]
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return {"training": training, "whole": time.process_time() - start}


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0])


def _rise(prepare: Callable[[str], Callable[[], Any]], queue: Any) -> None:
    with TemporaryDirectory() as directory:
        run = prepare(directory)
        resting = _kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        run()
        queue.put(_kib("VmHWM") - resting)


def peak_memory(prepare: Callable[[str], Callable[[], Any]]) -> float:
    """MiB of a step, measured in a fork; only a process that has not run a backward pass yet can be forked.

    Args:
        prepare: makes a trainer, with a folder for it, and returns a function that takes the step.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_rise, args=(prepare, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"The process that measured a step's memory ended with status {process.exitcode}.")
    return queue.get() / 1024


def one_step(kind: str, case: Case) -> Callable[[str], Callable[[], Any]]:
    """What `peak_memory` measures of a kind of trainer."""
    return lambda directory: partial(step, ready(kind, case, directory), case)


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds and tokens of both trainers, and their ratios turn by turn."""
    with TemporaryDirectory() as directory:
        trainers = {kind: ready(kind, case, directory) for kind in KINDS}
        for trainer in trainers.values():
            step(trainer, case, micro_batches=2)  # warm-up
            trainer.processed = trainer.real = 0
        turns = []
        for turn in range(repeats):
            order = list(trainers)[:: -1 if turn % 2 else 1]
            turns.append({kind: step(trainers[kind], case) for kind in order})
    longest = trainers["ours"].completions
    return {
        **asdict(case),
        "mean_length": sum(map(len, longest)) / len(longest),
        "parameters": trainers["ours"].model.num_parameters(),
        **{f"tokens_{kind}": trainer.processed / trainer.real for kind, trainer in trainers.items()},
        **{
            f"{part}_{kind}_s": statistics.median(turn[kind][part] for turn in turns)
            for part in ("training", "whole")
            for kind in KINDS
        },
        **{
            f"speedup_{part}": statistics.median(turn["stock"][part] / turn["ours"][part] for turn in turns)
            for part in ("training", "whole")
        },
    }


BASE = Case()
GROWTH = {  # what varies, on the log-normal lengths; the middle one is BASE
    "N": [replace(BASE, group=4), BASE, replace(BASE, group=16)],
    "length": [replace(BASE, scale=80.0), BASE, replace(BASE, scale=20.0)],
    "model": [replace(BASE, hidden_size=64, layers=2), BASE, replace(BASE, hidden_size=256)],
}
COLUMNS = {
    **CASE_COLUMNS,
    "processed / real tokens, stock": lambda r: f"{r['tokens_stock']:.2f}",
    "ours": lambda r: f"{r['tokens_ours']:.2f}",
    "training phase, stock / ours": lambda r: f"{r['speedup_training']:.2f}",
    "whole step, stock / ours": lambda r: f"{r['speedup_whole']:.2f}",
    "peak memory, stock": lambda r: f"{r['memory_stock_mib']:.0f} MiB",
    "ours / stock": lambda r: f"{r['memory_ours_mib'] / r['memory_stock_mib']:.2f}",
}


def show_ticks(panel: Any, label: str, ticks: list[tuple[float, str]]) -> None:
    """A logarithmic axis with nothing but the values measured."""
    panel.axhline(1, color="#999999", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xticks(*zip(*ticks, strict=True))
    panel.minorticks_off()
    panel.set_xlabel(label, fontsize=8.5)


def draw(found: dict[Case, dict[str, Any]], by_rows: dict[str, list[Case]]) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=[1.4, 1, 1, 1])
    for (name, cases), marker in zip(by_rows.items(), "os^", strict=True):
        panels[0].plot(
            [c.rows for c in cases], [found[c]["speedup_training"] for c in cases], marker=marker, label=name
        )
    panels[0].legend(frameon=False, fontsize=8)
    ticks = [(case.rows, str(case.rows)) for case in by_rows["log-normal"]]
    show_ticks(panels[0], "rows", ticks)
    shown: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "N": ("N", "group", str),
        "length": ("tokens per response", "mean_length", "{:.0f}".format),
        "model": ("million parameters", "parameters", lambda number: f"{number / 1e6:.2g}"),
    }
    for panel, (name, (label, key, written)) in zip(panels[1:], shown.items(), strict=True):
        rows = [found[case] for case in GROWTH[name] if case in found]
        panel.plot([row[key] for row in rows], [row["speedup_training"] for row in rows], marker="o")
        show_ticks(panel, label, [(row[key], written(row[key])) for row in rows])
    panels[0].set(
        ylabel="stock / ours, seconds", ylim=(0, 1.08 * max(row["speedup_training"] for row in found.values()))
    )
    figure.suptitle(
        "Training phase: how many times faster than stock TRL (three right: log-normal, 64 rows)",
        x=0.01,
        ha="left",
        fontsize=10.5,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 turns, no more than 64 rows, short responses")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each case")
    parser.add_argument("--update_results", action="store_true", help="write benchmarks/RESULTS.md and its figure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/micro-batches"))
    args = parser.parse_args()

    rows = [16, 64] if args.quick else [16, 64, 256]
    by_rows = {name: [replace(BASE, lengths=name, rows=n) for n in rows] for name in DISTRIBUTIONS}
    growth = [case for cases in GROWTH.values() for case in cases if not args.quick or case.scale >= BASE.scale]
    cases = list(dict.fromkeys([case for cases in by_rows.values() for case in cases] + growth))
    memory = {
        case: {f"memory_{kind}_mib": peak_memory(one_step(kind, case)) for kind in KINDS}
        for case in tqdm(cases, desc="memory")
    }
    found = {}
    for case in tqdm(cases, desc="seconds"):
        # short steps vary more
        repeats = min(args.repeats, 3) if args.quick else args.repeats * (1 if case.rows > 64 else 2)
        found[case] = memory[case] | compare(case, repeats)
        tqdm.write(json.dumps(found[case]))
    publish("micro_batches", list(found.values()), markdown_table(COLUMNS, found.values()), draw(found, by_rows), args)


if __name__ == "__main__":
    main()
