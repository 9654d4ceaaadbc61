"""Samples drawn in parts, so that an interrupted run goes on where it stopped.

A part holds the samples of some prompts, drawn with a seed of its own: drawing the missing parts gives the same samples
as a run without an interruption.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.evaluation.samples import PROMPT_ID, Sampler, key_of, write_samples
from hgpo_trl.modes import MODES

PARTS = "parts"  # folder of an evaluation's parts


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the prompts, and the file that keeps their samples.

    Args:
        prompts: their numbers among all prompts.
        seed: of their samples.
        key: hash of everything else that the samples depend on; a file with another key is drawn again. It is empty
            where all files in the folder belong to one run.
    """

    path: Path
    prompts: Sequence[int]
    seed: int
    key: str = ""

    def is_drawn(self) -> bool:
        return self.path.is_file() and key_of(self.path) == self.key


def parts_by_length(folder: Path, lengths: Sequence[int], size: int, seed: int) -> list[Part]:
    """Parts of `size` prompts, shorter prompts first: their batches are those that all prompts together give.

    Args:
        lengths: of the prompts, in tokens.
        seed: of the run.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        Part(folder / f"{number:05}.parquet", chunk, derived_seed(seed, number)) for number, chunk in enumerate(chunks)
    ]


def draw_missing(
    parts: Sequence[Part],
    sampler: AbstractContextManager[Sampler],
    prompts: Sequence[Any],
    *,
    samples_per_mode: int,
    keep: Callable[[Part, pd.DataFrame], pd.DataFrame] = lambda _, samples: samples,
    **settings: Any,
) -> None:
    """Draw and write every part that is not drawn yet.

    Args:
        sampler: of `loaded_sampler`; it is entered only if a part is missing.
        prompts: all of them.
        keep: what to write of a part's samples; their `prompt_id` counts within the part.
        settings: further ones of `sample_both_modes`.
    """
    missing = [part for part in parts if not part.is_drawn()]
    if not missing:
        return
    per_prompt = len(MODES) * samples_per_mode
    total, left = (per_prompt * sum(len(part.prompts) for part in some) for some in (parts, missing))
    with sampler as sample, tqdm(total=total, initial=total - left, desc="sampling", unit="response") as progress:
        for part in missing:
            samples = sample(
                [prompts[number] for number in part.prompts],
                samples_per_mode=samples_per_mode,
                seed=part.seed,
                progress=progress,
                **settings,
            )
            kept = keep(part, samples)
            numbers = [part.prompts[row] for row in kept[PROMPT_ID]]
            write_samples(part.path, kept.assign(**{PROMPT_ID: numbers}), part.key)


def read_parts(parts: Sequence[Part]) -> pd.DataFrame:
    """The samples of all parts, by prompt, mode and number, as `sample_both_modes` returns them."""
    samples = pd.concat([pq.read_table(part.path).to_pandas() for part in parts])
    return samples.sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)
