"""Samples drawn in parts: an interrupted run goes on where it stopped, and several processes share the parts.

A part's samples depend on its prompts and its seed, not on when, where and after which others it is drawn. So they are
the same with interruptions and without, and whatever the number of processes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.evaluation.processes import ALONE, Processes
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


def mixed_parts(folder: Path, lengths: Sequence[int], count: int, seed: int) -> list[Part]:
    """`count` parts, each with prompts of all lengths: they take about as long as each other.

    Parts that an earlier start has left in the folder decide their number. For samplers that give every prompt a seed
    of its own: the samples do not depend on that number.

    Args:
        lengths: of the prompts, in tokens.
        seed: of the run, and so of every part.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    if left := next(folder.glob("*-of-*.parquet"), None):
        count = int(left.stem.rpartition("-of-")[2])
    return [
        Part(folder / f"{number:05}-of-{count:05}.parquet", order[number::count], seed)
        for number in range(min(count, len(order)))
    ]


def draw_missing(
    parts: Sequence[Part],
    sampler: AbstractContextManager[Sampler],
    prompts: Sequence[Any],
    *,
    samples_per_mode: int,
    processes: Processes = ALONE,
    keep: Callable[[Part, pd.DataFrame], pd.DataFrame] = lambda _, samples: samples,
    **settings: Any,
) -> None:
    """Draw and write every part that is not drawn yet, and return when all are.

    Args:
        sampler: of `loaded_sampler`; it is entered only in a process that has a part to draw.
        prompts: all of them.
        processes: that share the parts. Which draws which is decided once, by their order.
        keep: what to write of a part's samples; their `prompt_id` counts within the part.
        settings: further ones of `sample_both_modes`.

    Raises:
        UserError: another process has ended, or writes where this one does not find it.
    """
    missing = processes.agree(lambda: [part for part in parts if not part.is_drawn()])
    if not missing:
        return
    shares = [missing[process :: processes.count] for process in range(processes.count)]
    own = shares.pop(processes.index)
    others = [deque(share) for share in shares]
    per_prompt = len(MODES) * samples_per_mode
    total, left = (per_prompt * sum(len(part.prompts) for part in some) for some in (parts, missing))
    bar = tqdm(total=total, initial=total - left, desc="sampling", unit="response", disable=not processes.is_main)

    def show_others() -> None:
        for share in others if processes.is_main else []:
            while share and share[0].is_drawn():  # a process draws its parts in order
                bar.update(per_prompt * len(share.popleft().prompts))

    with bar as progress:
        if own:
            with sampler as sample:
                for part in own:
                    samples = sample(
                        [prompts[number] for number in part.prompts],
                        numbers=part.prompts,
                        samples_per_mode=samples_per_mode,
                        seed=part.seed,
                        progress=progress,
                        **settings,
                    )
                    kept = keep(part, samples)
                    numbers = [part.prompts[row] for row in kept[PROMPT_ID]]
                    write_samples(part.path, kept.assign(**{PROMPT_ID: numbers}), part.key)
                    show_others()
        processes.wait(show_others)
    if processes.is_main and (lost := [part.path for part in missing if not part.path.is_file()]):
        raise UserError(
            f"Another process has drawn {len(lost)} parts that are not here, the first {lost[0]}. All machines need "
            "the same output_dir: name a folder that they share."
        )


def read_parts(parts: Sequence[Part]) -> pd.DataFrame:
    """The samples of all parts, by prompt, mode and number, as `sample_both_modes` returns them."""
    samples = pd.concat([pq.read_table(part.path).to_pandas() for part in parts])
    return samples.sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)
