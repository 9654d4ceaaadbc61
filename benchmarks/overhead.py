"""What HGPO's own code costs, as a share of the whole step.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--quick] [--update_results] [--repeats 5]

Own code is everything that `HGPOTrainer` does and `GRPOTrainer` does not: the time inside its methods less the time
inside the methods that it inherits and calls. That is the decision pass (a forward pass over the prompts), forcing the
modes, taking responses apart and checking their format, advantages, metrics, and sorting and trimming micro-batches.
The step is all of it: data, generation, scoring, loss and backward pass, optimizer, logging. Generation is real, token
by token with transformers; only what it samples is fixed. Reward functions are the task's and not counted as own.

Seconds are this process's CPU seconds, of one thread: on a CPU they are the wall time of a machine that does nothing
else. Writes results.json, table.md and overhead.png, and with --update_results the section of benchmarks/RESULTS.md.
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
from fixed_rollouts import CASE_COLUMNS, Case, build, markdown_table, publish
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
    "_log_rollout": "metrics",
    "_prepare_inputs": "sort and trim",
}


class Clock:
    """Seconds by the method that is responsible for them.

    Args:
        now: what the seconds are read from; by default CPU seconds of this process.
    """

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.seconds: Counter[str] = Counter()
        self.owner, self.since = INHERITED, now()

    def turn_to(self, owner: str) -> None:
        moment = self.now()
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
    own_classes = HGPOTrainer.__mro__[: HGPOTrainer.__mro__.index(GRPOTrainer)]
    own = [(owner, *item) for owner in own_classes for item in vars(owner).items() if inspect.isfunction(item[1])]
    names = {name for _, name, _ in own} & vars(GRPOTrainer).keys()
    inherited = [(GRPOTrainer, name, vars(GRPOTrainer)[name]) for name in sorted(names)]
    for owner, name, function in own:
        setattr(owner, name, clock.charging(function, name))
    for owner, name, function in inherited:
        setattr(owner, name, clock.charging(function, INHERITED))
    try:
        yield
    finally:
        for owner, name, function in own + inherited:
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
        trainer.model.generate = clock.charging(trainer.model.generate, "generate")
        trainer.train()
    steps = times.steps[1:]

    def median(seconds: Callable[[Counter], float]) -> float:
        return statistics.median(map(seconds, steps))

    def own(step: Counter) -> float:
        return step.total() - step[INHERITED] - step["generate"]

    return {
        **asdict(case),
        "mean_length": sum(map(len, trainer.completions)) / case.rows,
        "parameters": trainer.model.num_parameters(),
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


CASES = [
    EMBEDDED,
    replace(EMBEDDED, rows=512),
    replace(EMBEDDED, group=16),
    *(replace(LOG_NORMAL, rows=rows) for rows in (16, 64)),
    LOG_NORMAL,
    replace(LOG_NORMAL, rows=64, scale=80.0),
    replace(LOG_NORMAL, rows=64, scale=20.0),
    replace(LOG_NORMAL, rows=64, group=4),
    replace(LOG_NORMAL, rows=64, group=16),
    replace(LOG_NORMAL, rows=64, hidden_size=256),
]
COLUMNS = {
    **CASE_COLUMNS,
    "step": lambda r: f"{r['step_s']:.2f} s",
    "of that generation": lambda r: f"{100 * r['generation_s'] / r['step_s']:.0f} %",
    "own code": lambda r: f"{1000 * r['own_s']:.1f} ms",
    "share of the step": lambda r: f"{100 * r['own_share']:.2f} %",
    "share without generation": lambda r: f"{100 * r['own_share_without_generation']:.2f} %",
    "of own code, decision pass": lambda r: f"{100 * r['parts_s']['_read_decision'] / r['own_s']:.0f} %",
}


def draw(results: list[dict[str, Any]]) -> Figure:
    """Own code by part, per row of the generation batch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(results))
    bottom = [0.0] * len(results)
    named = {label: (name,) for name, label in PARTS.items()}
    others = sorted(set().union(*(r["parts_s"] for r in results)) - PARTS.keys())
    for label, names in (named | {"the rest": tuple(others)}).items():
        heights = [1e6 * sum(r["parts_s"].get(name, 0.0) for name in names) / r["rows"] for r in results]
        axes.bar(places, heights, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    labels = [f"{r['lengths']}\n{r['rows']} rows, N {r['group']}\n{r['mean_length']:.0f} tokens" for r in results]
    axes.set_xticks(places, labels, fontsize=6.5)
    axes.set_ylabel("µs per row")
    axes.set_title("HGPO's own code by part", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 steps, no more than 128 rows, short responses")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each case")
    parser.add_argument("--update_results", action="store_true", help="write benchmarks/RESULTS.md and its figure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/overhead"))
    args = parser.parse_args()

    small = [case for case in CASES if case.rows <= 128 and case.scale >= LOG_NORMAL.scale]
    results = []
    for case in tqdm(small if args.quick else CASES, desc="cases"):
        repeats = args.repeats * 4 if case.lengths == "embedded" else args.repeats  # short steps vary more
        results.append(measure(case, 3 if args.quick else repeats))
        tqdm.write(json.dumps(results[-1]))
    publish("overhead", results, markdown_table(COLUMNS, results), draw(results), args)


if __name__ == "__main__":
    main()
