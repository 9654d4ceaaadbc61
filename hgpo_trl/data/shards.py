"""From chunks to shards: write the rows of the data set in their final order, and apply a final step."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hgpo_trl.common.files import make_folder
from hgpo_trl.data.build import Build
from hgpo_trl.data.chunks import Chunk, Rows, naming, write_table
from hgpo_trl.data.example import Drop

if TYPE_CHECKING:
    from datasets import Dataset

_OPEN_SHARDS = 500  # files written at a time: a process may have 1,024 open by default
Finish = Callable[["Dataset", Path], tuple[list[Drop | None], dict[str, NDArray[np.float64]]]]
"""Final step on the mixed rows: a verdict for each, as of a `Step`, and new columns (name -> `[R]`, NaN: null)."""


def write_shards(build: Build, work: Path, target: Path, rows: Rows, by_rank: NDArray[np.int64]) -> list[Path]:
    """Write rows in the given order to `target/shard-*.parquet`; a shard that exists stays as it is."""
    rank = np.full(int(rows.offsets[-1]), -1, dtype=np.int64)
    rank[by_rank] = np.arange(len(by_rank))
    paths = _shard_paths(target, len(by_rank), build.rows_per_shard)
    make_folder(target)
    schema = build.schema.append(pa.field("_rank", pa.int64()))
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    for begin in range(0, len(missing), _OPEN_SHARDS):
        some = {i: paths[i] for i in missing[begin : begin + _OPEN_SHARDS]}
        _write_some(work, rows, rank, some, build.rows_per_shard, schema)
    return paths


def _write_some(
    work: Path, rows: Rows, rank: NDArray[np.int64], paths: dict[int, Path], rows_per_shard: int, schema: pa.Schema
) -> None:
    """Write the shards of these numbers in one pass over the chunks."""
    buckets = {i: work / f"bucket-{i:05}.arrow" for i in paths}
    with ExitStack() as stack:
        writers = {}
        for i, bucket in buckets.items():
            with naming(bucket):
                writers[i] = stack.enter_context(pa.ipc.new_stream(str(bucket), schema))
        for number, start, stop in tqdm(list(rows.chunks()), desc="shuffling", unit="chunk"):
            ranks = rank[start:stop]
            order = np.argsort(ranks, kind="stable")
            order = order[np.searchsorted(ranks[order], 0) :]  # without the rows left out
            shards, begins = np.unique(ranks[order] // rows_per_shard, return_index=True)
            if not buckets.keys() & set(shards.tolist()):
                continue
            table = pq.read_table(Chunk(work, number).rows).append_column(schema.field("_rank"), pa.array(ranks))
            table = table.take(pa.array(order))
            for i, begin, end in zip(shards.tolist(), begins, [*begins[1:], len(order)], strict=True):
                if i in buckets:
                    with naming(buckets[i]):
                        writers[i].write_table(table.slice(begin, end - begin))
    for i, bucket in tqdm(buckets.items(), desc="writing", unit="shard"):
        with pa.memory_map(str(bucket)) as file:
            table = pa.ipc.open_stream(file).read_all().sort_by("_rank").drop_columns("_rank")
            write_table(paths[i], table.combine_chunks())
        bucket.unlink()


def _shard_paths(folder: Path, rows: int, rows_per_shard: int) -> list[Path]:
    shards = math.ceil(rows / rows_per_shard)
    return [folder / f"shard-{i:05}-of-{shards:05}.parquet" for i in range(shards)]


def finish_shards(finish: Finish, paths: Sequence[Path], work: Path, target: Path) -> list[Drop | None]:
    """Apply the final step to these shards, and write the rows that stay, with their new columns, to `target`."""
    from datasets import load_dataset

    dataset = load_dataset("parquet", data_files=list(map(str, paths)), split="train", cache_dir=str(work / "cache"))
    verdicts, columns = finish(dataset, work)
    stays = np.array([verdict is None for verdict in verdicts])
    target.mkdir(exist_ok=True)
    start = 0
    for path in paths:
        table = pq.read_table(path)
        rows = slice(start, start + len(table))
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values[rows], from_pandas=True))
        write_table(target / path.name, table.filter(pa.array(stays[rows])))
        start += len(table)
    return verdicts
