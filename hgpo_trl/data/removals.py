"""Write every removed row with its reason, and count them for the manifest."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hgpo_trl.common.files import whole_file
from hgpo_trl.data.build import DECONTAMINATION, DIFFICULTY, DUPLICATES, MIX, Build
from hgpo_trl.data.chunks import REMOVED_SCHEMA, Chunk, Rows, naming, removed_row
from hgpo_trl.data.example import Drop
from hgpo_trl.data.manifest import SourceManifest, TokenStatistics
from hgpo_trl.data.sources import Unit

_ID_BYTES = 96
_HISTOGRAM_BINS = 40


@dataclass(slots=True)
class Removals:
    """Why rows that passed every step were removed, each `[N]`; the first reason that applies counts."""

    duplicate: NDArray[np.bool_]
    not_drawn: NDArray[np.bool_]
    by_finish: dict[int, Drop]  # row -> verdict of the final step

    @property
    def kept(self) -> NDArray[np.bool_]:
        kept = ~(self.duplicate | self.not_drawn)
        kept[list(self.by_finish)] = False
        return kept


def write_removed(
    work: Path, path: Path, rows: Rows, first: NDArray[np.int64], exact: NDArray[np.bool_], removals: Removals
) -> None:
    """Write every removed row with its reason, in the order of the sources."""
    total, left_out = len(first), ~removals.kept
    ids_path = work / "ids.bin"  # to name the first row of a duplicate
    with naming(ids_path):
        ids = np.memmap(ids_path, dtype=f"S{_ID_BYTES}", mode="w+", shape=(max(total, 1),))
    with naming(path), whole_file(path) as temporary, pq.ParquetWriter(temporary, REMOVED_SCHEMA) as writer:
        for number, (start, stop) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
            chunk = Chunk(work, number)
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
                removed.append(removed_row(table["id"][i], table["source"][i], step, drop))
            writer.write_table(pa.Table.from_pylist(removed, schema=REMOVED_SCHEMA))
    del ids
    ids_path.unlink()


def statistics(num_tokens: NDArray[np.int64]) -> TokenStatistics:
    """Describe the lengths of rows, in tokens."""
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


def decontamination_hits(path: Path) -> dict[str, int]:
    """Number of rows that decontamination dropped, by benchmark."""
    hits: Counter = Counter()
    for batch in pq.ParquetFile(path).iter_batches(columns=["step", "detail"]):
        for row in batch.to_pylist():
            if row["step"] == DECONTAMINATION:
                hits[json.loads(row["detail"])["benchmark"]] += 1
    return dict(sorted(hits.items()))


def source_manifests(
    build: Build, work: Path, units: Sequence[Unit], rows: Rows, exact: NDArray[np.bool_], removals: Removals
) -> dict[str, SourceManifest]:
    """Count the rows that each source gives and loses, step by step."""
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
        done = [json.loads(Chunk(work, number).done.read_text(encoding="utf-8")) for number in mine]
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


def explain_nothing_left(sources: dict[str, SourceManifest]) -> str:
    """Name the steps that dropped the most rows of each source."""
    lines = []
    for name, source in sources.items():
        worst = Counter(
            {f"{step['name']}: {reason}": n for step in source["steps"] for reason, n in step["dropped"].items()}
        )
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in worst.most_common(3)) or "it is empty"
        lines.append(f"{name}: {source['rows_read']:,} rows read; {reasons}")
    return "No row is left. " + "; ".join(lines) + ". Loosen the step that dropped them, or fix the source."
