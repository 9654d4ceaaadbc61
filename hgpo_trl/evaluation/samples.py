"""The table of an evaluation's samples, one row per response, and its file.

Its columns: `prompt_id`, `mode`, `sample`, `completion` (text, tags included), `num_tokens`, `truncated`, `faults`, and
the prompt's `prob_think`, `prob_no_think`, `picked` (0 = think, 1 = no_think, -1 = neither).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hgpo_trl.common.files import whole_file, write_atomically
from hgpo_trl.inference.decoding import FirstToken, until_end
from hgpo_trl.modes import MODES, mode_tokens, split_response

PROMPT_ID = "prompt_id"
SAMPLES = "samples.parquet"
RECORD = "samples.json"  # the model, prompts and settings that the samples were drawn with

SCHEMA = pa.schema(
    {
        PROMPT_ID: pa.int64(),
        "mode": pa.string(),
        "sample": pa.int64(),
        "completion": pa.string(),
        "num_tokens": pa.int64(),
        "truncated": pa.bool_(),
        "faults": pa.list_(pa.string()),
        "prob_think": pa.float64(),
        "prob_no_think": pa.float64(),
        "picked": pa.int64(),
    }
)
REWARD = pa.field("reward", pa.float64())  # of scored samples
_KEY = b"hgpo_trl.part"
BLOCK = 1024  # responses in memory at a time, where their texts are needed

Sampler = Callable[..., pd.DataFrame]
"""`sampler(prompts, numbers=..., **settings)`: `sample_both_modes` of a backend, with its model and the length of its
responses, for prompts with these numbers among all."""


class Generated(NamedTuple):
    """One response as a backend generates it."""

    prompt: int  # number of the prompt
    mode: int  # position in MODES
    sample: int
    tokens: list[int]  # what follows the forced opening; anything after an end token is padding


def samples_table(
    tokenizer: PreTrainedTokenizerBase,
    decisions: Sequence[FirstToken],
    responses: Iterable[Generated],
    ends: Sequence[int],
) -> pd.DataFrame:
    """The table of samples that `sample_both_modes` returns.

    Args:
        decisions: one per prompt.
        responses: in any order.
        ends: of `end_tokens`; a response without one is truncated.
    """
    tokens = mode_tokens(tokenizer)
    records = []
    for prompt, mode, sample, generated in responses:
        generated, truncated = until_end(generated, ends)
        response = [*tokens.openings[mode], *generated]
        text = str(tokenizer.decode(response, skip_special_tokens=True))
        prob_think, prob_no_think, picked = decisions[prompt]
        records.append(
            {
                PROMPT_ID: prompt,
                "mode": MODES[mode].value,
                "sample": sample,
                "completion": text,
                "num_tokens": len(response),
                "truncated": truncated,
                "faults": [fault.value for fault in split_response(text, tokens.mode_format).faults],
                "prob_think": prob_think,
                "prob_no_think": prob_no_think,
                "picked": picked,
            }
        )
    return pd.DataFrame.from_records(records).sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)


def sorted_by_mode(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples by prompt, mode in the order of `MODES` and number, so that their columns reshape to `[K, 2, n]`."""
    mode = pd.Categorical(samples["mode"], [mode.value for mode in MODES], ordered=True)
    return samples.assign(mode=mode).sort_values([PROMPT_ID, "mode", "sample"])


# --- its file -------------------------------------------------------------------------------------------------


def write_samples(path: Path, samples: pd.DataFrame, key: str = "") -> None:
    """Write samples, scored or not, atomically: the same samples give the same bytes.

    Args:
        samples: with columns of `SCHEMA` and perhaps `reward`; others are left out.
        key: kept with them, for `key_of`.
    """
    schema = pa.schema([field for field in (*SCHEMA, REWARD) if field.name in samples])
    table = pa.Table.from_pandas(samples, schema, preserve_index=False)
    if key:
        table = table.replace_schema_metadata({**table.schema.metadata, _KEY: key})
    buffer = BytesIO()
    pq.write_table(table, buffer)
    write_atomically(path, buffer.getvalue())


def key_of(path: Path) -> str:
    """The key that a file of samples was written with; empty without one."""
    return (pq.read_schema(path).metadata or {}).get(_KEY, b"").decode()


@contextmanager
def samples_file(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Open a file of scored samples, and give the function that adds some to it; it appears, whole, on leaving."""
    schema = pa.schema([*SCHEMA, REWARD])
    with (
        whole_file(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        yield lambda samples: writer.write_table(pa.Table.from_pandas(samples, schema, preserve_index=False))


def samples_in_blocks(paths: Iterable[Path], scratch: Path, size: int = BLOCK) -> Iterator[pd.DataFrame]:
    """The samples of one or more files in the order of prompt, mode and number, some prompts at a time.

    Args:
        scratch: file to gather them in, in the order of the files; its rows are then read in theirs.
        size: responses of a block, whose prompts are whole; of a single prompt there may be more.

    Yields:
        Samples as `sample_both_modes` returns them; rewards are left out.
    """
    with pa.ipc.new_stream(str(scratch), SCHEMA) as stream:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(size, columns=SCHEMA.names):
                stream.write_batch(batch.cast(SCHEMA))
    rows = Dataset.from_file(str(scratch))  # on disk
    keys = rows.select_columns([PROMPT_ID, "mode", "sample"]).to_pandas()
    keys = keys.sort_values([PROMPT_ID, "mode", "sample"])
    ends = np.flatnonzero(np.diff(keys[PROMPT_ID].to_numpy(), append=-1)) + 1  # of the prompts
    blocks = rows.with_format("arrow")
    start = 0
    while start < len(keys):
        within = ends[(ends > start) & (ends <= start + size)]
        end = int(within[-1] if len(within) else ends[ends > start][0])
        yield blocks[keys.index[start:end].tolist()].to_pandas()
        start = end


def samples_of_prompts(path: Path, prompts: Sequence[int]) -> pd.DataFrame:
    """The samples of some prompts, scores included, from a file of many."""
    return pq.read_table(path, filters=[(PROMPT_ID, "in", list(prompts))]).to_pandas()


def prompts_hash(prompts: Sequence[Any]) -> str:
    """Hash of prompts, in their order: of them as one list in JSON."""
    found = xxhash.xxh3_128(b"[")
    for number, prompt in enumerate(prompts):
        found.update(f"{', ' if number else ''}{json.dumps(prompt, sort_keys=True)}".encode())
    found.update(b"]")
    return found.hexdigest()
