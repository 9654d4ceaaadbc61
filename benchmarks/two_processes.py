"""Training phase of two real processes: stock GRPOTrainer, HGPOTrainer by rows and by tokens, side by side.

    OMP_NUM_THREADS=1 ACCELERATE_TORCH_DEVICE=cpu DS_ACCELERATOR=cpu accelerate launch --num_processes 2 \
        --config_file recipes/accelerate/zero3.yaml benchmarks/two_processes.py OUTPUT.jsonl [--turns 2]

With recipes/accelerate/cpu_ddp.yaml for DDP. The same fixed completions (fixed_rollouts.py) are given to all trainers,
log-normal and equal ones; the trainers take turns, and ratios are medians over the turns. Each trainer takes two steps,
of which the second one counts.

Seconds are CPU seconds of each process, from the beginning of a micro-batch's loss to that of the next, so that they
are those of processes with a core each, whatever else runs. Communication that waits costs none. Under ZeRO-3 the
processes wait for each other in every micro-batch: a step is the sum over its micro-batches of the slower process.
Under DDP they wait once: a step is the slower process's sum.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from fixed_rollouts import Case, build
from trl import GRPOConfig, GRPOTrainer

from hgpo_trl import HGPOConfig, HGPOTrainer

TOKENS = 512  # of a micro-batch; 4 rows of a log-normal rollout at scale 40 have up to 1,600


class Timed:
    """Fixed completions in, seconds and tokens of each micro-batch out. Mixed into both trainers."""

    completions: list[list[int]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.begun: list[float] = []  # of the step's micro-batches
        self.seconds: list[float] = []
        self.tokens = self.real = 0
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        first = self.accelerator.process_index * len(prompt_ids)  # type: ignore[attr-defined]
        self.begun, self.seconds, self.tokens, self.real = [], [], 0, 0
        return [list(ids) for ids in self.completions[first : first + len(prompt_ids)]], None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._end_last()
        self.begun.append(time.process_time())
        self.tokens += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        self.real += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._end_last()
        return loss

    def _end_last(self) -> None:
        if len(self.seconds) < len(self.begun):
            self.seconds.append(time.process_time() - self.begun[-1])


class Stock(Timed, GRPOTrainer):
    """TRL as it is."""


class Ours(Timed, HGPOTrainer):
    """HGPOTrainer as it is."""


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "stock": (Stock, GRPOConfig, {}),
    "by rows": (Ours, HGPOConfig, {}),
    "by tokens": (Ours, HGPOConfig, {"micro_batch_tokens": TOKENS}),
}


def measure(kind: str, case: Case) -> dict[str, Any]:
    """Seconds, tokens and micro-batches of the second step, over all processes."""
    trainer, config, settings = KINDS[kind]
    processes = int(os.environ["WORLD_SIZE"])  # the trainer's arguments have to set up the process group
    with TemporaryDirectory() as directory:
        built = build(
            trainer,
            config,
            case,
            directory,
            gradient_accumulation_steps=case.rows // case.micro_batch // processes,
            max_steps=2,
            use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
            ddp_backend="gloo",
            logging_strategy="no",
            **settings,
        )
        built.train()
    seconds = np.array(gather_object([built.seconds]))  # [process, micro-batch]
    tokens, real = np.array(gather_object([(built.tokens, built.real)])).sum(axis=0)
    waits = built.accelerator.distributed_type == DistributedType.DEEPSPEED
    return {
        "engine": "ZeRO-3" if waits else "DDP",
        "seconds": float(seconds.max(axis=0).sum() if waits else seconds.sum(axis=1).max()),
        "micro_batches": seconds.shape[1],
        "tokens": float(tokens / real),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    for lengths in ("log-normal", "equal"):
        case = Case(lengths=lengths, rows=args.rows)
        turns = []
        for turn in range(args.turns):
            order = list(KINDS)[:: -1 if turn % 2 else 1]
            turns.append({kind: measure(kind, case) for kind in order})
        result = {
            **asdict(case),
            "engine": turns[0]["stock"]["engine"],
            "kinds": {kind: turns[0][kind] for kind in KINDS},
            "speedup": {
                kind: statistics.median(turn["stock"]["seconds"] / turn[kind]["seconds"] for turn in turns)
                for kind in KINDS
            },
            "speedups": {kind: [turn["stock"]["seconds"] / turn[kind]["seconds"] for turn in turns] for kind in KINDS},
        }
        if PartialState().is_main_process:
            print(json.dumps(result), flush=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
