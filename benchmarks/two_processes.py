"""Training phase in two real processes: HGPOTrainer, by rows and by tokens, against stock GRPOTrainer.

    OMP_NUM_THREADS=1 python benchmarks/two_processes.py [--engines ddp zero3] [--rows 256] [--steps 3] [--turns 2]
                                    [--update_results] [--output_dir runs/benchmarks/two-processes]

Processes wait for each other: once a step under DDP; under ZeRO-3, which gathers weights layer by layer, in every
micro-batch. So a step takes as long as the process with the most to compute, and what one saves is lost if the other
does not save it, too. All trainers get the same fixed responses (fixed_rollouts.py), half of them to each process:
log-normal ones, and equal ones, where nothing can be gained. "By rows" is HGPOTrainer with stock's micro-batches of 4
rows, "by tokens" with `micro_batch_tokens`, which moves rows between the processes.

Seconds are wall time of both processes, on gloo, so each needs a core; the trainers take turns. The training phase is
every micro-batch's loss and backward pass, with the waiting and, under ZeRO-3, DeepSpeed's optimizer step. A trainer's
first step is not counted. Writes results.json, table.md and two_processes.png, and with --update_results the section of
benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from fixed_rollouts import Case, build, markdown_table, publish
from matplotlib.figure import Figure
from micro_batches import KINDS
from overhead import INHERITED, Clock, StepTimes

PROCESSES = 2
CONFIGS = {"ddp": "cpu_ddp", "zero3": "zero3"}  # files in recipes/accelerate
NAMES = {"ddp": "DDP", "zero3": "ZeRO-3"}
LENGTHS = ("log-normal", "equal")
TOKENS = 1600  # of a micro-batch: what the largest of stock's four rows have on the log-normal lengths
SIDES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "stock": (*KINDS["stock"], {}),
    "by rows": (*KINDS["ours"], {}),
    "by tokens": (*KINDS["ours"], {"micro_batch_tokens": TOKENS}),
}


def measure(engine: str, side: str, case: Case, steps: int) -> dict[str, Any]:
    """Seconds of the training phase, median over the steps, of the slower process; tokens that both computed."""
    trainer_class, config, settings = SIDES[side]
    clock = Clock(time.perf_counter)
    times = StepTimes(clock)
    with TemporaryDirectory() as directory:
        trainer = build(
            trainer_class, config, case, directory,
            gradient_accumulation_steps=case.rows // case.micro_batch // PROCESSES,
            max_steps=steps + 1, use_cpu=engine == "ddp", ddp_backend="gloo",
            logging_strategy="no", **settings,
        )  # fmt: skip
        trainer.add_callback(times)
        trainer._generate_and_score_completions = clock.charging(trainer._generate_and_score_completions, INHERITED)
        trainer.training_step = clock.charging(trainer.training_step, "training")
        trainer.train()
    seconds = np.array(gather_object([[step["training"] for step in times.steps[1:]]]))  # (processes, steps)
    processed, real = np.array(gather_object([(trainer.processed, trainer.real)])).sum(axis=0)
    return {"seconds": statistics.median(seconds.max(axis=0)), "tokens": float(processed / real)}


def compare(engine: str, lengths: str, rows: int, steps: int, turns: int) -> dict[str, Any]:
    """All sides on one kind of lengths, turn by turn."""
    case = Case(lengths, rows=rows)
    taken: list[dict[str, dict[str, Any]]] = []
    for turn in range(turns):
        order = list(SIDES)[:: -1 if turn % 2 else 1]
        taken.append({side: measure(engine, side, case, steps) for side in order})
    return {
        "engine": engine,
        **asdict(case),
        "tokens": {side: taken[0][side]["tokens"] for side in SIDES},
        "seconds": {side: statistics.median(turn[side]["seconds"] for turn in taken) for side in SIDES},
        "speedups": {side: [turn["stock"]["seconds"] / turn[side]["seconds"] for turn in taken] for side in SIDES},
    }


def in_two_processes(engine: str, args: argparse.Namespace, output: Path) -> list[dict[str, Any]]:
    """`compare` on all lengths, in processes that accelerate starts."""
    config = Path(__file__).resolve().parents[1] / "recipes" / "accelerate" / f"{CONFIGS[engine]}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(PROCESSES), "--main_process_port", "0", __file__]
    command += ["--json", str(output), "--engines", engine]
    command += ["--rows", str(args.rows), "--steps", str(args.steps), "--turns", str(args.turns)]
    # without a GPU, DeepSpeed and accelerate have to be told
    subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}, check=True)
    return json.loads(output.read_text(encoding="utf-8"))


def speedup(row: dict[str, Any], side: str) -> str:
    """The median over turns, and the turns in brackets."""
    turns = row["speedups"][side]
    return f"{statistics.median(turns):.2f} ({', '.join(f'{ratio:.2f}' for ratio in turns)})"


COLUMNS: dict[str, Callable[[dict], Any]] = {
    "engine": lambda r: NAMES[r["engine"]],
    "lengths": lambda r: r["lengths"],
    **{f"processed / real tokens, {side}": lambda r, side=side: f"{r['tokens'][side]:.2f}" for side in SIDES},
    "training phase, stock": lambda r: f"{r['seconds']['stock']:.1f} s",
    **{f"stock / {side}": lambda r, side=side: speedup(r, side) for side in list(SIDES)[1:]},
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A bar for every engine, kind of lengths and side."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for number, side in enumerate(list(SIDES)[1:]):
        heights = [statistics.median(row["speedups"][side]) for row in rows]
        bars = axes.bar(places + 0.36 * (number - 0.5), heights, width=0.34, label=side)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.margins(y=0.12)
    axes.set_xticks(places, [f"{NAMES[row['engine']]}\n{row['lengths']}" for row in rows])
    axes.set_ylabel("stock / ours, seconds")
    axes.set_title("Training phase in two processes: times faster than stock TRL", loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rows", type=int, default=256, help="of an optimizer step, over both processes")
    parser.add_argument("--steps", type=int, default=3, help="counted in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--update_results", action="store_true", help="write benchmarks/RESULTS.md and its figure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/two-processes"))
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:  # started by accelerate
        found = [compare(args.engines[0], lengths, args.rows, args.steps, args.turns) for lengths in LENGTHS]
        if PartialState().is_main_process:
            args.json.write_text(json.dumps(found), encoding="utf-8")
        PartialState().destroy_process_group()
        return
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for engine in args.engines:
            rows += in_two_processes(engine, args, Path(folder) / f"{engine}.json")
    publish("two_processes", rows, markdown_table(COLUMNS, rows), draw(rows), args)


if __name__ == "__main__":
    main()
