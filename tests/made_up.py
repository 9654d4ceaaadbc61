"""Evaluations that are made up, for the pages of results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from hgpo_trl.evaluation.samples import write_samples


def write_evaluation(
    folder: Path,
    model: str,
    ratios: Sequence[float],
    seeds: Iterable[int] = (0, 1),
    think_tokens: int = 5,
    domains: Sequence[str] = ("chain_sum",),
) -> None:
    """SEED/eval/MODEL with a given probability of thinking at each level, two prompts per level; all answers are right.

    A no-think response has 5 tokens. The prompts of a level are of the domains in turn.
    """
    levels = [level for level in range(1, len(ratios) + 1) for _ in range(2)]
    prompts = [[{"role": "user", "content": f"query {row}"}] for row in range(len(levels))]
    of_prompts = [domains[row % len(domains)] for row in range(len(levels))]
    data = folder / f"{'-'.join(domains)}.parquet"
    pd.DataFrame({"prompt": prompts, "level": levels, "domain": of_prompts}).to_parquet(data)
    rows = [
        {
            "prompt_id": prompt, "mode": mode, "sample": sample, "completion": "",
            "num_tokens": think_tokens if mode == "think" else 5, "truncated": False, "faults": [],
            "prob_think": ratios[level - 1], "prob_no_think": 1 - ratios[level - 1],
            "picked": int(ratios[level - 1] <= 0.5), "reward": 1.0,
        }
        for prompt, level in enumerate(levels) for mode in ("no_think", "think") for sample in range(2)
    ]  # fmt: skip
    for seed in seeds:
        output = folder / str(seed) / "eval" / model
        write_samples(output / "samples.parquet", pd.DataFrame(rows))
        (output / "report.json").write_text(json.dumps({"dataset": str(data)}))
