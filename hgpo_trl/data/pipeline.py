"""Build a mixed, shuffled data set with its manifest from sources, in memory that does not grow with the data.

    units -> rows -> adapter -> steps -> chunks        in worker processes; a finished chunk is never made again
    keys of all chunks -> duplicates -> mix -> ranks   a few numbers per row
    chunks -> shards                                   each sorted in memory, written atomically

Units, their order and a row's random numbers depend on the sources and the seed alone, so the result is the same, byte
for byte, for any number of processes and after any interruption.
"""

import errno
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hgpo_trl.common.differences import differences
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import make_folder, whole_file, write_json
from hgpo_trl.data.adapter import Adapter, adapt
from hgpo_trl.data.deduplication import dedup_keys, first_of_each
from hgpo_trl.data.example import Drop, Example, Step
from hgpo_trl.data.generators import ReasoningGymGenerator, rows_of
from hgpo_trl.data.manifest import Manifest, SourceManifest, TokenStatistics
from hgpo_trl.data.mixing import AXES, Cell, quotas, smallest
from hgpo_trl.data.sources import Source, Unit
from hgpo_trl.modes import LHRM, ModeFormat

if TYPE_CHECKING:
    from datasets import Dataset

WORK = ".work"  # within the output folder, until the build is complete
MANIFEST = "manifest.json"
REMOVED = "removed.parquet"
DUPLICATES, MIX, DIFFICULTY, DECONTAMINATION = "duplicates", "mix", "difficulty", "decontamination"  # steps
_VERSIONS = ("hgpo-trl", "datasets", "pyarrow", "datasketch", "scikit-learn", "math-verify")
_BLOCK = 1_000  # rows that go through a step at a time
_ID_BYTES = 96
_HISTOGRAM_BINS = 40
_OPEN_SHARDS = 500  # files written at a time: a process may have 1,024 open by default

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMAS = {
    "hft": pa.schema(
        [("prompt", _MESSAGES), ("completion", _MESSAGES)]
        + [(name, pa.string()) for name in ("mode", "source", "domain", "id")]
    ),
    "hgpo": pa.schema(
        [("prompt", _MESSAGES)] + [(name, pa.string()) for name in ("answer", "domain", "level", "source", "id")]
    ),
}
_REASONING_GYM = pa.field("reasoning_gym", pa.string())
_REMOVED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "step", "reason", "detail")])

InputFiles = Mapping[str, str | None]  # path -> fingerprint; None: of the hub, or generated


@dataclass(frozen=True, slots=True)
class Deduplication:
    """Which queries are duplicates (`hgpo_trl.data.deduplication`)."""

    near: bool = True
    threshold: float = 0.7
    num_perm: int = 128
    across_modes: bool = False


@dataclass(frozen=True, slots=True)
class Build:
    """All settings that decide the rows of the data set. Picklable: workers get a copy.

    Args:
        stage: "hft" or "hgpo".
        sources: with the adapter of each, in order of precedence: of two duplicates the first is kept.
        steps: name -> step, in order.
        deduplication: None: every row is kept.
        shares: axis of `mixing.AXES` -> value -> share.
        max_rows: of the data set.
        rows_per_shard: of the files written; a shard is sorted in memory.
        max_row_bytes: longer rows are dropped unread.
        seed: decides which rows a cap keeps, and their order.
        not_read: source -> columns that look like content and are not read, for the manifest.
        input_files: path -> fingerprint of the local files that are read, for the manifest.
        mode_format: the marks that Stage I's responses are written with.
    """

    stage: str
    sources: Sequence[tuple[Source, Adapter]]
    steps: Sequence[tuple[str, Step]] = ()
    deduplication: Deduplication | None = None
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    max_rows: int | None = None
    rows_per_shard: int = 10_000
    max_row_bytes: int = 4 * 2**20
    seed: int = 0
    not_read: Mapping[str, Sequence[str]] = field(default_factory=dict)
    input_files: InputFiles = field(default_factory=dict)
    mode_format: ModeFormat = LHRM

    @property
    def schema(self) -> pa.Schema:
        """Columns of the data set; with that of reasoning-gym's verifiers if prompts are of there."""
        schema = _SCHEMAS[self.stage]
        verified = any(isinstance(adapter.generator, ReasoningGymGenerator) for _, adapter in self.sources)
        return schema.append(_REASONING_GYM) if verified and self.stage == "hgpo" else schema


# --- a unit, in a worker --------------------------------------------------------------------------------------


def _row(stage: str, example: Example) -> dict[str, Any]:
    row = {"prompt": example.prompt, "source": example.source, "domain": example.domain, "id": example.id}
    if stage == "hgpo":
        return row | {"answer": example.reference, "level": example.level, "reasoning_gym": example.reasoning_gym}
    assert example.mode is not None  # or it would have been dropped
    return row | {"mode": str(example.mode), "completion": example.completion()}


def _for_stage(build: Build, example: Example) -> Example | Drop:
    """The example as its stage has it: a prompt alone, or with a response in the format of the build."""
    if build.stage == "hgpo":
        example.mode, example.reasoning, example.answer = None, "", ""
        return example
    if example.mode is None:
        return Drop("no_response")
    example.mode_format = build.mode_format
    try:
        example.completion()
    except UserError as error:
        return Drop("not_in_format", {"detail": str(error)})
    return example


def _examples(build: Build, unit: Unit, counts: Counter, removed: list[dict[str, Any]]) -> Iterator[list[Example]]:
    """Yield the examples of a unit that pass its adapter and every step, block by block."""
    source, adapter = build.sources[unit.source]
    rows = rows_of(unit, source, adapter, build.max_row_bytes)
    while block := list(islice(rows, _BLOCK)):
        examples: list[Example] = []
        for place, row in block:
            counts["", "read"] += 1
            found = row if isinstance(row, Drop) else adapt(adapter, row, source.label)
            if isinstance(found, Example):
                found = _for_stage(build, found)
            if isinstance(found, Drop):
                counts["schema", found.reason] += 1
                removed.append(_removed_row(place, source.label, "schema", found))
            else:
                examples.append(found)
        for name, step in build.steps:
            verdicts = step(examples)
            for example, verdict in zip(examples, verdicts, strict=True):
                if verdict is not None:
                    counts[name, verdict.reason] += 1
                    removed.append(_removed_row(example.id, source.label, name, verdict))
            examples = [example for example, verdict in zip(examples, verdicts, strict=True) if verdict is None]
        yield examples


def _removed_row(id_: str, source: str, step: str, drop: Drop) -> dict[str, Any]:
    detail = json.dumps(drop.detail, sort_keys=True, ensure_ascii=False, default=str)
    row = {"id": id_, "source": source, "step": step, "reason": drop.reason, "detail": detail}
    # parquet cannot hold half of a surrogate pair, which a text or a file's name may have
    return {name: text.encode(errors="backslashreplace").decode() for name, text in row.items()}


def make_chunk(build: Build, work: Path, number: int, unit: Unit) -> int:
    """Take a unit's rows through the adapter and all steps, and write a chunk. Returns the number of rows read."""
    counts: Counter = Counter()
    removed: list[dict[str, Any]] = []
    tables, keys, row_info = [], [], []
    for examples in _examples(build, unit, counts, removed):
        tables.append(pa.Table.from_pylist([_row(build.stage, e) for e in examples], schema=build.schema))
        row_info += [(*_random(build.seed, e), e.num_tokens) for e in examples]
        if build.deduplication is not None:
            keys.append(dedup_keys(examples, **asdict(build.deduplication)))
    chunk = _Chunk(work, number)
    _write_table(chunk.rows, pa.concat_tables(tables) if tables else build.schema.empty_table())
    _write_table(chunk.removed, pa.Table.from_pylist(removed, schema=_REMOVED_SCHEMA))
    _write_array(chunk.row_info, np.array(row_info, dtype=_ROW_INFO))
    if keys:
        _write_array(chunk.keys, np.concatenate(keys))
    dropped = [[step, reason, n] for (step, reason), n in sorted(counts.items()) if step]
    write_json(chunk.done, {"read": counts["", "read"], "dropped": dropped})  # last: it marks the chunk as complete
    return counts["", "read"]


_ROW_INFO = np.dtype([("draw_key", np.uint64), ("shuffle_key", np.uint64), ("num_tokens", np.int64)])


def _random(seed: int, example: Example) -> tuple[int, int]:
    """A row's fixed random numbers, `draw_key` and `shuffle_key`.

    With a single one, the rows of a source of which few are drawn would come first.
    """
    name = f"{seed}\0{example.source}\0{example.mode}\0{example.id}"
    return divmod(xxhash.xxh3_128_intdigest(name.encode()), 2**64)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The files of a finished unit."""

    work: Path
    number: int

    def _file(self, name: str) -> Path:
        return self.work / f"chunk-{self.number:06}.{name}"

    @property
    def rows(self) -> Path:
        return self._file("parquet")

    @property
    def removed(self) -> Path:
        return self._file("removed.parquet")

    @property
    def row_info(self) -> Path:
        return self._file("row_info.npy")

    @property
    def keys(self) -> Path:
        return self._file("keys.npy")

    @property
    def done(self) -> Path:
        return self._file("json")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that could not be written, and the remedy, in OSErrors."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OSError(
            error.errno,
            f"{error.strerror or error} while writing {path}. {'Make room' if full else 'Mend that'} and start the "
            "same command again: it goes on from the finished chunks",
        ) from error


def _write_table(path: Path, table: pa.Table) -> None:
    with _naming(path), whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with _naming(path), whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


# --- all units ------------------------------------------------------------------------------------------------

_worker: Callable[[int, Unit], int]


def _start_worker(build: Build, work: Path) -> None:
    global _worker
    _worker = partial(make_chunk, build, work)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(number: int, unit: Unit) -> int:
    return _worker(number, unit)


def make_chunks(build: Build, work: Path, units: Sequence[Unit], num_processes: int) -> None:
    """Make every missing chunk.

    Raises:
        UserError: a file cannot be read; OSError: it cannot be written; RuntimeError: a worker was killed.
    """
    missing = [(number, unit) for number, unit in enumerate(units) if not _Chunk(work, number).done.is_file()]
    done = len(units) - len(missing)
    with tqdm(total=len(units), initial=done, desc="reading", unit="unit") as progress:
        read = 0
        for rows in _run(build, work, missing, min(num_processes, len(missing))):
            read += rows
            progress.set_postfix(rows=f"{read:,}", refresh=False)
            progress.update()


def _run(build: Build, work: Path, todo: Sequence[tuple[int, Unit]], num_processes: int) -> Iterator[int]:
    if num_processes <= 1:
        for number, unit in todo:
            yield make_chunk(build, work, number, unit)
        return
    context = multiprocessing.get_context("forkserver")  # imports once, and forks from a process without threads
    context.set_forkserver_preload(["__main__", __name__])
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker, initargs=(build, work))
    try:
        waiting = iter(todo)
        running: set[Future] = {pool.submit(_work, *task) for task in islice(waiting, 2 * num_processes)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                running |= {pool.submit(_work, *task) for task in islice(waiting, 1)}
                yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "A worker process was killed, perhaps for lack of memory. Lower num_processes and start the same command "
            "again: it goes on from the finished chunks."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- all rows -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rows:
    """A few numbers per row of all chunks, in order; arrays of `[N]`."""

    offsets: NDArray[np.int64]  # [chunks + 1], of each chunk's first row
    draw_key: NDArray[np.uint64]
    shuffle_key: NDArray[np.uint64]
    num_tokens: NDArray[np.int64]
    cell: NDArray[np.int32]  # index in `cells`
    cells: list[Cell]

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first row and end of every chunk with rows."""
        for number, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if start < stop:
                yield number, int(start), int(stop)


def _gather(build: Build, work: Path, units: Sequence[Unit]) -> _Rows:
    row_info, cells = [], []
    numbers: dict[Cell, int] = {}
    for number in range(len(units)):
        chunk = _Chunk(work, number)
        row_info.append(np.load(chunk.row_info))
        columns = ("mode", "domain", "source") if build.stage == "hft" else ("domain", "source")
        table = pq.read_table(chunk.rows, columns=list(columns)).to_pydict()
        modes = table.get("mode", ["prompt"] * len(table["source"]))
        keys = zip(modes, table["domain"], table["source"], strict=True)
        cells.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int32))
    joined = np.concatenate([*row_info, np.empty(0, dtype=_ROW_INFO)])
    return _Rows(
        offsets=np.cumsum([0, *map(len, row_info)]),
        draw_key=np.ascontiguousarray(joined["draw_key"]),
        shuffle_key=np.ascontiguousarray(joined["shuffle_key"]),
        num_tokens=np.ascontiguousarray(joined["num_tokens"]),
        cell=np.concatenate([*cells, np.empty(0, dtype=np.int32)]),
        cells=list(numbers),
    )


def _first(build: Build, work: Path, rows: _Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find the first row with the same query for every row, and whether a row repeats an earlier prompt exactly.

    Returns:
        `[N]` row numbers, a row's own where it is the first; `[N]` truth values.
    """
    total = int(rows.offsets[-1])
    if build.deduplication is None or not total:
        return np.arange(total), np.zeros(total, dtype=bool)
    path = work / "keys.bin"
    keys: NDArray[np.uint64] | None = None
    for number, start, stop in rows.chunks():
        part = np.load(_Chunk(work, number).keys)
        if keys is None:
            with _naming(path):
                keys = np.memmap(path, dtype=np.uint64, mode="w+", shape=(part.shape[1], total))
        keys[:, start:stop] = part.T
    assert keys is not None
    first = first_of_each(keys.T)
    exact = np.ones(total, dtype=bool)
    exact[np.unique(keys[0], return_index=True)[1]] = False
    del keys
    path.unlink()
    return first, exact


def _mix(build: Build, rows: _Rows, unique: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which unique rows stay under the sources' caps and the shares, `[N]`."""
    by_label = {source.label: source for source, _ in build.sources}
    kept = unique.copy()
    for label, source in by_label.items():
        if source.rows is None:
            continue
        mine = [i for i, cell in enumerate(rows.cells) if cell[2] == label]
        if isinstance(source.rows, int):
            groups = np.where(kept & np.isin(rows.cell, mine), 0, -1).astype(np.int32)
            chosen = smallest(rows.draw_key, groups, np.array([source.rows]))
        else:
            places = {domain: place for place, domain in enumerate(source.rows)}
            place_of = np.full(len(rows.cells), -1, dtype=np.int32)
            for i in mine:
                place_of[i] = places.get(rows.cells[i][1], -1)
            groups = np.where(kept, place_of[rows.cell], -1)
            chosen = smallest(rows.draw_key, groups, np.array(list(source.rows.values())))
        kept &= chosen | ~np.isin(rows.cell, mine)
    shares = {axis: wanted for axis, wanted in build.shares.items() if wanted}
    if not shares and build.max_rows is None:
        return kept
    counts = np.bincount(rows.cell[kept], minlength=len(rows.cells))
    if not shares and build.max_rows is not None and kept.sum() > build.max_rows:
        return smallest(rows.draw_key, np.where(kept, 0, -1).astype(np.int32), np.array([build.max_rows]))
    quota = quotas(rows.cells, counts, shares, build.max_rows)
    return smallest(rows.draw_key, np.where(kept, rows.cell, -1).astype(np.int32), quota)


# --- shards ---------------------------------------------------------------------------------------------------

Finish = Callable[["Dataset", Path], tuple[list[Drop | None], dict[str, NDArray[np.float64]]]]
"""Final step on the mixed rows: a verdict for each, as of a `Step`, and new columns (name -> `[R]`, NaN: null)."""


def _write_shards(build: Build, work: Path, target: Path, rows: _Rows, by_rank: NDArray[np.int64]) -> list[Path]:
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
    work: Path, rows: _Rows, rank: NDArray[np.int64], paths: dict[int, Path], rows_per_shard: int, schema: pa.Schema
) -> None:
    """Write the shards of these numbers in one pass over the chunks."""
    buckets = {i: work / f"bucket-{i:05}.arrow" for i in paths}
    with ExitStack() as stack:
        writers = {}
        for i, bucket in buckets.items():
            with _naming(bucket):
                writers[i] = stack.enter_context(pa.ipc.new_stream(str(bucket), schema))
        for number, start, stop in tqdm(list(rows.chunks()), desc="shuffling", unit="chunk"):
            ranks = rank[start:stop]
            order = np.argsort(ranks, kind="stable")
            order = order[np.searchsorted(ranks[order], 0) :]  # without the rows left out
            shards, begins = np.unique(ranks[order] // rows_per_shard, return_index=True)
            if not buckets.keys() & set(shards.tolist()):
                continue
            table = pq.read_table(_Chunk(work, number).rows).append_column(schema.field("_rank"), pa.array(ranks))
            table = table.take(pa.array(order))
            for i, begin, end in zip(shards.tolist(), begins, [*begins[1:], len(order)], strict=True):
                if i in buckets:
                    with _naming(buckets[i]):
                        writers[i].write_table(table.slice(begin, end - begin))
    for i, bucket in tqdm(buckets.items(), desc="writing", unit="shard"):
        with pa.memory_map(str(bucket)) as file:
            table = pa.ipc.open_stream(file).read_all().sort_by("_rank").drop_columns("_rank")
            _write_table(paths[i], table.combine_chunks())
        bucket.unlink()


def _shard_paths(folder: Path, rows: int, rows_per_shard: int) -> list[Path]:
    shards = math.ceil(rows / rows_per_shard)
    return [folder / f"shard-{i:05}-of-{shards:05}.parquet" for i in range(shards)]


def _finish(finish: Finish, paths: Sequence[Path], work: Path, target: Path) -> list[Drop | None]:
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
        _write_table(target / path.name, table.filter(pa.array(stays[rows])))
        start += len(table)
    return verdicts


# --- removed rows and counts ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Removals:
    """Why rows that passed every step were removed, each `[N]`; the first reason that applies counts."""

    duplicate: NDArray[np.bool_]
    not_drawn: NDArray[np.bool_]
    by_finish: dict[int, Drop]  # row -> verdict of the final step

    @property
    def kept(self) -> NDArray[np.bool_]:
        kept = ~(self.duplicate | self.not_drawn)
        kept[list(self.by_finish)] = False
        return kept


def _write_removed(
    work: Path, path: Path, rows: _Rows, first: NDArray[np.int64], exact: NDArray[np.bool_], removals: _Removals
) -> None:
    """Write every removed row with its reason, in the order of the sources."""
    total, left_out = len(first), ~removals.kept
    ids_path = work / "ids.bin"  # to name the first row of a duplicate
    with _naming(ids_path):
        ids = np.memmap(ids_path, dtype=f"S{_ID_BYTES}", mode="w+", shape=(max(total, 1),))
    with _naming(path), whole_file(path) as temporary, pq.ParquetWriter(temporary, _REMOVED_SCHEMA) as writer:
        for number, (start, stop) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
            chunk = _Chunk(work, number)
            writer.write_table(pq.read_table(chunk.removed))
            table = pq.read_table(chunk.rows, columns=["id", "source"]).to_pydict()
            names = zip(table["id"], table["source"], strict=True)
            ids[start:stop] = [f"{id_} of {source}".encode()[:_ID_BYTES] for id_, source in names]
            removed: list[dict[str, Any]] = []
            for i in np.flatnonzero(left_out[start:stop]):
                row = start + i
                if removals.duplicate[row]:
                    original = bytes(ids[first[row]]).decode(errors="ignore")
                    step, drop = DUPLICATES, Drop("exact" if exact[row] else "near", {"first": original})
                elif removals.not_drawn[row]:
                    step, drop = MIX, Drop("not_drawn")
                else:
                    step, drop = DIFFICULTY, removals.by_finish[row]
                removed.append(_removed_row(table["id"][i], table["source"][i], step, drop))
            writer.write_table(pa.Table.from_pylist(removed, schema=_REMOVED_SCHEMA))
    del ids
    ids_path.unlink()


def _statistics(num_tokens: NDArray[np.int64]) -> TokenStatistics:
    longest = int(num_tokens.max())
    edges = np.geomspace(1, longest + 1, _HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(num_tokens, edges)
    return {
        "mean": float(num_tokens.mean()),
        "median": float(np.median(num_tokens)),
        "p95": float(np.quantile(num_tokens, 0.95)),
        "max": longest,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _hits(path: Path) -> dict[str, int]:
    """Number of rows that decontamination dropped, by benchmark."""
    hits: Counter = Counter()
    for batch in pq.ParquetFile(path).iter_batches(columns=["step", "detail"]):
        for row in batch.to_pylist():
            if row["step"] == DECONTAMINATION:
                hits[json.loads(row["detail"])["benchmark"]] += 1
    return dict(sorted(hits.items()))


def _source_manifests(
    build: Build, work: Path, units: Sequence[Unit], rows: _Rows, exact: NDArray[np.bool_], removals: _Removals
) -> dict[str, SourceManifest]:
    names = ["schema", *(name for name, _ in build.steps)]
    after_steps = {
        (DUPLICATES, "exact"): removals.duplicate & exact,
        (DUPLICATES, "near"): removals.duplicate & ~exact,
        (MIX, "not_drawn"): removals.not_drawn,
    }
    for reason in {drop.reason for drop in removals.by_finish.values()}:
        after_steps[DIFFICULTY, reason] = np.zeros_like(removals.duplicate)
        after_steps[DIFFICULTY, reason][[row for row, drop in removals.by_finish.items() if drop.reason == reason]] = (
            True
        )
    manifests: dict[str, SourceManifest] = {}
    for place, (source, adapter) in enumerate(build.sources):
        mine = [number for number, unit in enumerate(units) if unit.source == place]
        done = [json.loads(_Chunk(work, number).done.read_text(encoding="utf-8")) for number in mine]
        dropped: dict[str, Counter] = {name: Counter() for name in [*names, DUPLICATES, MIX, DIFFICULTY]}
        for chunk in done:
            for step, reason, count in chunk["dropped"]:
                dropped[step][reason] += count
        cells = [i for i, cell in enumerate(rows.cells) if cell[2] == source.label]
        of_source = np.isin(rows.cell, cells)
        for (step, reason), which in after_steps.items():
            if count := int((which & of_source).sum()):
                dropped[step][reason] = count
        ran = [*names, *(name for name in (DUPLICATES, MIX, DIFFICULTY) if dropped[name])]
        modes = {rows.cells[i][0] for i in cells}
        manifests[source.label] = {
            "path": source.path,
            "licence": None if adapter.licence == "not stated" else adapter.licence,
            "mode": None if build.stage == "hgpo" else ", ".join(sorted(modes)) or str(adapter.mode),
            "domain": ", ".join(sorted({rows.cells[i][1] for i in cells})) or adapter.domain,
            "rows_read": sum(chunk["read"] for chunk in done),
            "steps": [{"name": name, "dropped": dict(sorted(dropped[name].items()))} for name in ran],
            "kept": int((removals.kept & of_source).sum()),
            "not_read": list(build.not_read.get(source.label, ())),
        }
    return manifests


def _explain_nothing_left(sources: dict[str, SourceManifest]) -> str:
    lines = []
    for name, source in sources.items():
        worst = Counter(
            {f"{step['name']}: {reason}": n for step in source["steps"] for reason, n in step["dropped"].items()}
        )
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in worst.most_common(3)) or "it is empty"
        lines.append(f"{name}: {source['rows_read']:,} rows read; {reasons}")
    return "No row is left. " + "; ".join(lines) + ". Loosen the step that dropped them, or fix the source."


# --- the whole build ------------------------------------------------------------------------------------------


def claim(
    output_dir: Path, recipe: dict[str, Any], units: Sequence[Unit], input_files: InputFiles | None = None
) -> Manifest | None:
    """Take a folder for this build. Returns the manifest if the build is complete already.

    Args:
        recipe: all settings that decide the rows of the data set.
        input_files: fingerprints of the local files that it is built from.

    Raises:
        UserError: the folder holds other data, or a build, complete or not, of another recipe or of other files.
    """
    remedy = "Choose another output_dir, or remove this one."
    manifest, plan = output_dir / MANIFEST, output_dir / WORK / "plan.json"
    inputs = recipe | {"input_files": dict(input_files or {})}
    if manifest.is_file():
        content: Any = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "recipe" not in content:
            raise UserError(f"output_dir={str(output_dir)!r} has a {MANIFEST} that is not of a build. {remedy}")
        before = content["recipe"] | {"input_files": content.get("input_files")}
        _check_same(f"output_dir={str(output_dir)!r} holds another data set", before, inputs, remedy)
        shutil.rmtree(output_dir / WORK, ignore_errors=True)  # if it was killed at the very end
        return cast(Manifest, content)
    wanted = json.loads(json.dumps({"inputs": inputs, "units": [asdict(unit) for unit in units]}))
    if plan.is_file():
        before = json.loads(plan.read_text(encoding="utf-8"))
        problem = f"output_dir={str(output_dir)!r} holds the beginning of another build"
        _check_same(problem, before["inputs"], inputs, remedy)
        if before["units"] != wanted["units"]:
            raise UserError(f"{problem}: the sources' files have changed since. {remedy}")
    elif (output_dir / "data").exists():
        raise UserError(f"output_dir={str(output_dir)!r} has a folder `data` that is not of a build. {remedy}")
    try:
        write_json(plan, wanted)
    except OSError as error:
        raise UserError(
            f"output_dir={str(output_dir)!r} cannot be written: {error.strerror}. Choose another."
        ) from error
    return None


def _check_same(problem: str, before: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    if changed := differences(before, now):
        raise UserError(f"{problem}. Changed: {changed}. {remedy}")


def build_dataset(
    build: Build,
    units: Sequence[Unit],
    output_dir: Path,
    recipe: dict[str, Any],
    num_processes: int = 1,
    finish: Finish | None = None,
) -> Manifest:
    """Build a data set into a folder that `claim` has taken: `data/*.parquet`, `removed.parquet`, `manifest.json`.

    A killed build goes on from its finished chunks. `manifest.json` is written last.

    Args:
        units: of all sources, in order.
        recipe: for the manifest.
        num_processes: processes that read and filter.
        finish: final step on the mixed rows.

    Raises:
        UserError: a file cannot be read, the shares are impossible, no row is left, or another process builds here.
        OSError: a file cannot be written; RuntimeError: a worker was killed. Finished chunks stay, in both cases.
    """
    work = output_dir / WORK
    try:
        with FileLock(work / "lock", timeout=0):
            manifest = _build(build, units, output_dir, work, recipe, num_processes, finish)
    except Timeout:
        raise UserError(
            f"output_dir={str(output_dir)!r}: another process builds there. Wait for it, or choose another output_dir."
        ) from None
    shutil.rmtree(work)
    return manifest


def _build(
    build: Build,
    units: Sequence[Unit],
    output_dir: Path,
    work: Path,
    recipe: dict[str, Any],
    num_processes: int,
    finish: Finish | None,
) -> Manifest:
    from hgpo_trl.data.card import write_card  # workers import this module, and need no matplotlib

    make_chunks(build, work, units, num_processes)
    rows = _gather(build, work, units)
    first, exact = _first(build, work, rows)
    duplicate = first != np.arange(len(first))
    removals = _Removals(duplicate, np.zeros_like(duplicate), {})
    if removals.kept.any():
        removals.not_drawn = ~duplicate & ~_mix(build, rows, ~duplicate)
    chosen = np.flatnonzero(removals.kept)
    by_rank = chosen[np.argsort(rows.shuffle_key[chosen], kind="stable")]
    if finish is None or not len(by_rank):
        _write_shards(build, work, output_dir / "data", rows, by_rank)
    else:
        paths = _write_shards(build, work, work / "data", rows, by_rank)
        verdicts = _finish(finish, paths, work, output_dir / "data")
        removals.by_finish = {int(row): drop for row, drop in zip(by_rank, verdicts, strict=True) if drop is not None}
    kept = removals.kept
    sources = _source_manifests(build, work, units, rows, exact, removals)
    if not kept.any():
        raise UserError(_explain_nothing_left(sources))
    _write_removed(work, output_dir / REMOVED, rows, first, exact, removals)
    values = {axis: [cell[place] for cell in rows.cells] for place, axis in enumerate(AXES)}
    per_cell = np.bincount(rows.cell[kept], minlength=len(rows.cells))
    counts = {
        axis: {value: int(per_cell[[v == value for v in names]].sum()) for value in sorted(set(names))}
        for axis, names in values.items()
    }
    modes = {
        mode: np.isin(rows.cell, [i for i, cell in enumerate(rows.cells) if cell[0] == mode]) for mode in counts["mode"]
    }
    manifest: Manifest = {
        "stage": build.stage,
        "recipe": recipe,
        "input_files": dict(build.input_files),
        "seed": build.seed,
        "versions": {name: version(name) for name in _VERSIONS},
        "sources": sources,
        "bytes": sum(path.stat().st_size for path in (output_dir / "data").iterdir()),
        "rows": counts,
        "tokens": {
            mode: _statistics(rows.num_tokens[kept & which]) for mode, which in modes.items() if counts["mode"][mode]
        },
        "duplicates": {
            "exact": int((removals.duplicate & exact).sum()),
            "near": int((removals.duplicate & ~exact).sum()),
        },
        "decontamination": _hits(output_dir / REMOVED),
    }
    write_card(output_dir, manifest)
    write_json(output_dir / MANIFEST, manifest)
    return manifest
