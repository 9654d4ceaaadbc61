"""Build a mixed, shuffled data set with its manifest from sources, in memory that does not grow with the data.

    units -> rows -> adapter -> steps -> chunks        in worker processes; a finished chunk is never made again
    keys of all chunks -> duplicates -> mix -> ranks   a few numbers per row
    chunks -> shards                                   each sorted in memory, written atomically

Units, their order and a row's random numbers depend on the sources and the seed alone, so the result is the same, byte
for byte, for any number of processes and after any interruption.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hgpo_trl.common.differences import differences
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_json
from hgpo_trl.data.build import Build, InputFiles
from hgpo_trl.data.chunks import Chunk, Rows, gather, make_chunks, naming
from hgpo_trl.data.deduplication import first_of_each
from hgpo_trl.data.manifest import Manifest
from hgpo_trl.data.mixing import AXES, quotas, smallest
from hgpo_trl.data.removals import (
    Removals,
    decontamination_hits,
    explain_nothing_left,
    source_manifests,
    statistics,
    write_removed,
)
from hgpo_trl.data.shards import Finish, finish_shards, write_shards
from hgpo_trl.data.sources import Unit

WORK = ".work"  # within the output folder, until the build is complete
MANIFEST = "manifest.json"
REMOVED = "removed.parquet"
_VERSIONS = ("hgpo-trl", "datasets", "pyarrow", "datasketch", "scikit-learn", "math-verify")


def _first(build: Build, work: Path, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
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
        part = np.load(Chunk(work, number).keys)
        if keys is None:
            with naming(path):
                keys = np.memmap(path, dtype=np.uint64, mode="w+", shape=(part.shape[1], total))
        keys[:, start:stop] = part.T
    assert keys is not None
    first = first_of_each(keys.T)
    exact = np.ones(total, dtype=bool)
    exact[np.unique(keys[0], return_index=True)[1]] = False
    del keys
    path.unlink()
    return first, exact


def _mix(build: Build, rows: Rows, unique: NDArray[np.bool_]) -> NDArray[np.bool_]:
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
    from hgpo_trl.data.card import write_card  # imports matplotlib, which the worker processes do not need

    make_chunks(build, work, units, num_processes)
    rows = gather(build, work, units)
    first, exact = _first(build, work, rows)
    duplicate = first != np.arange(len(first))
    removals = Removals(duplicate, np.zeros_like(duplicate), {})
    if removals.kept.any():
        removals.not_drawn = ~duplicate & ~_mix(build, rows, ~duplicate)
    chosen = np.flatnonzero(removals.kept)
    by_rank = chosen[np.argsort(rows.shuffle_key[chosen], kind="stable")]
    if finish is None or not len(by_rank):
        write_shards(build, work, output_dir / "data", rows, by_rank)
    else:
        paths = write_shards(build, work, work / "data", rows, by_rank)
        verdicts = finish_shards(finish, paths, work, output_dir / "data")
        removals.by_finish = {int(row): drop for row, drop in zip(by_rank, verdicts, strict=True) if drop is not None}
    kept = removals.kept
    sources = source_manifests(build, work, units, rows, exact, removals)
    if not kept.any():
        raise UserError(explain_nothing_left(sources))
    write_removed(work, output_dir / REMOVED, rows, first, exact, removals)
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
            mode: statistics(rows.num_tokens[kept & which]) for mode, which in modes.items() if counts["mode"][mode]
        },
        "duplicates": {
            "exact": int((removals.duplicate & exact).sum()),
            "near": int((removals.duplicate & ~exact).sum()),
        },
        "decontamination": decontamination_hits(output_dir / REMOVED),
    }
    write_card(output_dir, manifest)
    write_json(output_dir / MANIFEST, manifest)
    return manifest
