"""The samples of an evaluation on disk: in parts while they are drawn, in one file when they are scored.

A part holds the samples of one chunk of prompts, drawn with the chunk's own seed. So a run that was interrupted draws
the chunks that are missing, and the result is the same as without the interruption.
"""

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from tqdm.auto import tqdm
from transformers import AutoConfig

from hgpo_trl.common.files import write_atomically
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.evaluation.backends import Sampler
from hgpo_trl.evaluation.evaluate import PROMPT_ID
from hgpo_trl.modes import MODES

SAMPLES = "samples.parquet"
PARTS = "parts"
RECORD = "samples.json"  # what the samples were drawn from, and how

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


def write_samples(path: Path, samples: pd.DataFrame) -> None:
    """Write samples, scored or not, atomically: the same samples give the same bytes."""
    schema = SCHEMA.append(REWARD) if REWARD.name in samples else SCHEMA
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pandas(samples, schema, preserve_index=False), buffer)
    write_atomically(path, buffer.getvalue())


def read_samples(path: Path) -> pd.DataFrame:
    """Samples as `sample_both_modes` returns them; rewards are left out."""
    return pq.read_table(path, columns=SCHEMA.names).to_pandas()


def fingerprint(model: str) -> str | None:
    """What tells a model's weights, configuration and tokenizer from others of the same name: a hash of the files of a
    folder, the commit of a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    patterns = ("*.safetensors", "pytorch_model*.bin", "config.json", "generation_config.json", "tokenizer*", "chat_*")
    found = xxhash.xxh3_128()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        with path.open("rb") as file:
            found.update(f"{path.name}\0{hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}\0".encode())
    return found.hexdigest()


def prompts_hash(prompts: Sequence[Any]) -> str:
    """What tells prompts, in their order, from others."""
    return xxhash.xxh3_128_hexdigest(json.dumps(list(prompts), sort_keys=True).encode())


def chunks_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Prompts in chunks of `size`, shorter ones first: a chunk's batches are those that all prompts together give."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def part_paths(folder: Path, chunks: Sequence[Any]) -> list[Path]:
    """The file of each chunk."""
    return [folder / f"{number:05}.parquet" for number in range(len(chunks))]


def draw_missing(
    sample: Sampler,
    prompts: Sequence[Any],
    chunks: Sequence[Sequence[int]],
    folder: Path,
    *,
    samples_per_mode: int,
    seed: int,
    **settings: Any,
) -> None:
    """Draw the samples of every chunk that has no part in the folder, and write its part.

    Args:
        sample: of `loaded_sampler`.
        prompts: all of them.
        chunks: places in `prompts`.
        settings: further ones of `sample_both_modes`.
    """
    paths = part_paths(folder, chunks)
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    each = len(MODES) * samples_per_mode
    done = len(prompts) - sum(len(chunks[number]) for number in missing)
    bar = tqdm(total=len(prompts) * each, initial=done * each, desc="sampling", unit="response")
    with bar:
        for number in missing:
            rows = chunks[number]
            samples = sample(
                [prompts[row] for row in rows],
                samples_per_mode=samples_per_mode,
                seed=derived_seed(seed, number),
                progress=bar,
                **settings,
            )
            write_samples(paths[number], samples.assign(**{PROMPT_ID: [rows[row] for row in samples[PROMPT_ID]]}))


def read_parts(folder: Path, chunks: Sequence[Any]) -> pd.DataFrame:
    """All samples, in the order of `sample_both_modes`."""
    samples = pd.concat([read_samples(path) for path in part_paths(folder, chunks)])
    return samples.sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)
