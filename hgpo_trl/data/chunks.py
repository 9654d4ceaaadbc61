"""From units to chunks: take rows through adapter and steps, in worker processes.

A finished chunk is never made again.
"""

import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import whole_file, write_json
from hgpo_trl.data.adapter import adapt
from hgpo_trl.data.build import Build
from hgpo_trl.data.deduplication import dedup_keys
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.generators import rows_of
from hgpo_trl.data.mixing import Cell
from hgpo_trl.data.sources import Unit

_BLOCK = 1_000  # rows that go through a step at a time
REMOVED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "step", "reason", "detail")])
_ROW_INFO = np.dtype([("draw_key", np.uint64), ("shuffle_key", np.uint64), ("num_tokens", np.int64)])


@dataclass(frozen=True, slots=True)
class Chunk:
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
                removed.append(removed_row(place, source.label, "schema", found))
            else:
                examples.append(found)
        for name, step in build.steps:
            verdicts = step(examples)
            for example, verdict in zip(examples, verdicts, strict=True):
                if verdict is not None:
                    counts[name, verdict.reason] += 1
                    removed.append(removed_row(example.id, source.label, name, verdict))
            examples = [example for example, verdict in zip(examples, verdicts, strict=True) if verdict is None]
        yield examples


def removed_row(id_: str, source: str, step: str, drop: Drop) -> dict[str, Any]:
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
    chunk = Chunk(work, number)
    write_table(chunk.rows, pa.concat_tables(tables) if tables else build.schema.empty_table())
    write_table(chunk.removed, pa.Table.from_pylist(removed, schema=REMOVED_SCHEMA))
    _write_array(chunk.row_info, np.array(row_info, dtype=_ROW_INFO))
    if keys:
        _write_array(chunk.keys, np.concatenate(keys))
    dropped = [[step, reason, n] for (step, reason), n in sorted(counts.items()) if step]
    write_json(chunk.done, {"read": counts["", "read"], "dropped": dropped})  # last: it marks the chunk as complete
    return counts["", "read"]


def _random(seed: int, example: Example) -> tuple[int, int]:
    """A row's fixed random numbers, `draw_key` and `shuffle_key`.

    With a single one, the rows of a source of which few are drawn would come first.
    """
    name = f"{seed}\0{example.source}\0{example.mode}\0{example.id}"
    return divmod(xxhash.xxh3_128_intdigest(name.encode()), 2**64)


@contextmanager
def naming(path: Path) -> Iterator[None]:
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


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file; nothing is there until it is whole."""
    with naming(path), whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with naming(path), whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


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
    missing = [(number, unit) for number, unit in enumerate(units) if not Chunk(work, number).done.is_file()]
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


@dataclass(slots=True)
class Rows:
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


def gather(build: Build, work: Path, units: Sequence[Unit]) -> Rows:
    """Read the numbers of all rows from the chunks."""
    row_info, cells = [], []
    numbers: dict[Cell, int] = {}
    for number in range(len(units)):
        chunk = Chunk(work, number)
        row_info.append(np.load(chunk.row_info))
        columns = ("mode", "domain", "source") if build.stage == "hft" else ("domain", "source")
        table = pq.read_table(chunk.rows, columns=list(columns)).to_pydict()
        modes = table.get("mode", ["prompt"] * len(table["source"]))
        keys = zip(modes, table["domain"], table["source"], strict=True)
        cells.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int32))
    joined = np.concatenate([*row_info, np.empty(0, dtype=_ROW_INFO)])
    return Rows(
        offsets=np.cumsum([0, *map(len, row_info)]),
        draw_key=np.ascontiguousarray(joined["draw_key"]),
        shuffle_key=np.ascontiguousarray(joined["shuffle_key"]),
        num_tokens=np.ascontiguousarray(joined["num_tokens"]),
        cell=np.concatenate([*cells, np.empty(0, dtype=np.int32)]),
        cells=list(numbers),
    )
