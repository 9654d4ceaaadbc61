"""What HGPO's own code costs, as a share of the whole step.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--quick] [--output_dir runs/benchmarks/overhead]

Own code is everything that `HGPOTrainer` does and `GRPOTrainer` does not: the time inside its methods less the time
inside the methods that it inherits and calls. That is the decision pass (a forward pass over the prompts), forcing the
modes, taking responses apart and checking their format, advantages, metrics, and sorting and trimming micro-batches.
The step is all of it: data, generation, scoring, loss and backward pass, optimizer, logging. Generation is real, token
by token with transformers; only what it samples is fixed. Reward functions are the task's and not counted as own.

Seconds are this process's CPU seconds, of one thread: on a CPU they are the wall time of a machine that does nothing
else. Writes results.json, table.md and overhead.png.
"""

import argparse
import inspect
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fixed_rollouts import Case, build
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOTrainer

from hgpo_trl import HGPOConfig, HGPOTrainer

# recipes/chain-sum/hgpo.yaml: its model, its batch
EMBEDDED = Case("embedded", rows=128, hidden_size=64, layers=2, micro_batch=32)
LOG_NORMAL = Case("log-normal", rows=256)
INHERITED = "inherited"
PARTS = {
    "_generate_single_turn": "forcing modes",
    "_calculate_rewards": "taking apart",
    "_read_decision": "decision pass",
    "_generate_and_score_completions": "advantages",
    "_log_group_metrics": "metrics",
    "_prepare_inputs": "sort and trim",
}


class Clock:
    """CPU seconds by the method that is responsible for them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.owner, self.since = INHERITED, time.process_time()

    def turn_to(self, owner: str) -> None:
        moment = time.process_time()
        self.seconds[self.owner] += moment - self.since
        self.owner, self.since = owner, moment

    def charging(self, function: Callable, owner: str) -> Callable:
        """The function, charged to `owner` except for what it calls that has another one."""

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            before = self.owner
            self.turn_to(owner)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn_to(before)

        return charged


@contextmanager
def own_code_timed(clock: Clock) -> Iterator[None]:
    """Charge HGPOTrainer's methods to themselves and those of GRPOTrainer that they override to `INHERITED`."""
    own = {name: value for name, value in vars(HGPOTrainer).items() if inspect.isfunction(value)}
    inherited = {name: vars(GRPOTrainer)[name] for name in own if name in vars(GRPOTrainer)}
    for name, function in own.items():
        setattr(HGPOTrainer, name, clock.charging(function, name))
    for name, function in inherited.items():
        setattr(GRPOTrainer, name, clock.charging(function, INHERITED))
    try:
        yield
    finally:
        for owner, originals in ((HGPOTrainer, own), (GRPOTrainer, inherited)):
            for name, function in originals.items():
                setattr(owner, name, function)


class Forced(LogitsProcessor):
    """Leaves one token at every step: the next one of the row's response."""

    def __init__(self, responses: torch.Tensor, prompt_width: int) -> None:
        self.responses, self.prompt_width = responses, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.prompt_width
        return torch.full_like(scores, -torch.inf).scatter_(1, self.responses[:, place, None], 0.0)


def force_completions(trainer: Any) -> None:
    """Let the model generate as always, and sample `trainer.completions`."""
    pad = trainer.processing_class.pad_token_id
    width = max(map(len, trainer.completions))
    padded = torch.tensor([ids + [pad] * (width - len(ids)) for ids in trainer.completions])
    generate = trainer.model.generate

    def generate_responses(*, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        responses = padded[padded[:, 0] == input_ids[0, -1], 1:]  # one call per mode; the tag ends the prompts
        forced = LogitsProcessorList([Forced(responses, input_ids.shape[1])])
        return generate(input_ids=input_ids, logits_processor=forced, **kwargs)

    trainer.model.generate = generate_responses


class StepTimes(TrainerCallback):
    """What every optimizer step took, from the end of one to the end of the next."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.steps = clock, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.turn_to(self.clock.owner)
        self.steps.append(Counter(self.clock.seconds))
        self.clock.seconds.clear()


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians over the steps but the first: the step, its parts, and the share of our own code."""
    clock = Clock()
    with TemporaryDirectory() as directory, own_code_timed(clock):
        trainer = build(HGPOTrainer, HGPOConfig, case, directory, max_steps=repeats + 1, logging_steps=1)
        force_completions(trainer)
        times = StepTimes(clock)
        trainer.add_callback(times)
        trainer.generate_seconds = 0.0
        trainer.model.generate = clock.charging(trainer.model.generate, "generate")
        trainer.train()
    steps = times.steps[1:]

    def median(seconds: Callable[[Counter], float]) -> float:
        return statistics.median(map(seconds, steps))

    def own(step: Counter) -> float:
        return step.total() - step[INHERITED] - step["generate"]

    return {
        **asdict(case),
        "step_s": median(lambda step: step.total()),
        "generation_s": median(lambda step: step["generate"]),
        "own_s": median(own),
        "own_share": median(lambda step: own(step) / step.total()),
        "own_share_without_generation": median(lambda step: own(step) / (step.total() - step["generate"])),
        "parts_s": {
            name: median(lambda step, name=name: step[name])
            for name in sorted(set().union(*steps) - {INHERITED, "generate"})
        },
    }


def main() -> None:
    for case in (EMBEDDED,):
        print(json.dumps(measure(case, 5), indent=1))


if __name__ == "__main__":
    main()
