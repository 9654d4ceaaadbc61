"""A recipe's `sources`: their adapters and units of work. Faults are named here, before any long work."""

from dataclasses import replace
from itertools import islice
from typing import Any

from hgpo_trl.common.errors import UserError, did_you_mean
from hgpo_trl.data.adapter import Adapter, adapt
from hgpo_trl.data.adapters import ADAPTERS
from hgpo_trl.data.example import Drop
from hgpo_trl.data.generators import (
    GENERATOR_KEYS,
    REASONING_GYM,
    TASK,
    is_generated,
    list_units,
    resolve_generated,
)
from hgpo_trl.data.own_files import columns_of, generic, unread
from hgpo_trl.data.sources import Source, Unit, list_files, parse_entries, read_unit, split_into_units

_SAMPLE_ROWS = 20  # of each source, looked at before any long work
_HABIT_ROWS = 1_000  # of a source of any schema, from which its habits are read
_HABIT = 0.9  # share of them that makes a habit


def resolve(sources: list[dict[str, Any]], stage: str, seed: int = 0) -> list[tuple[Source, Adapter]]:
    """Find the adapter of every source.

    Args:
        stage: "hft" or "hgpo".
        seed: of the recipe, from which generated sources derive theirs.

    Raises:
        UserError: an entry is malformed, an adapter is unknown, or two sources have the same name.
    """
    resolved = []
    for index, source in enumerate(parse_entries("sources", sources, Source)):
        where = f"sources[{index}] ({source.label})"
        name = source.adapter or (source.path if source.path in ADAPTERS else "generic")
        if is_generated(source):
            adapter = resolve_generated(where, source, stage, seed)
            resolved.append((source, replace(adapter, licence=source.licence or adapter.licence)))
            continue
        if given := [key for key in GENERATOR_KEYS if getattr(source, key) is not None]:
            raise UserError(
                f"{where} has `{given[0]}`, which only generated sources take. Drop it, or set adapter: {TASK}, or "
                f"path: {REASONING_GYM}NAME."
            )
        if name == "generic":
            if not source.fields:
                raise UserError(
                    f"{where} needs `fields`, our names to its columns, as {{prompt: question, answer: text}}: there "
                    f"is no adapter for it. Adapters: {', '.join(sorted(ADAPTERS))}."
                )
            try:
                adapter = generic(source.fields, mode=source.mode, domain=source.domain or "general")
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
        elif name in ADAPTERS:
            adapter = ADAPTERS[name]
            if given := [key for key in ("fields", "mode", "domain") if getattr(source, key) is not None]:
                raise UserError(
                    f"{where} has both an adapter and `{given[0]}`, which the adapter knows. Drop it, or set adapter: "
                    "generic. (Only some domains: rows, as {maths: 1000}.)"
                )
        else:
            known = [TASK, *sorted(ADAPTERS)]
            raise UserError(
                f"{where}: there is no adapter {name!r}{did_you_mean(name, known)} They are {', '.join(known)}."
            )
        if stage == "hft" and adapter.stage == "hgpo":
            raise UserError(
                f"{where} has prompts alone, and Stage I needs responses. {adapter.note} Use it in `data hgpo`, or add "
                "responses of a model and read them as generic."
            )
        if (
            stage == "hft"
            and name == "generic"
            and not (source.fields or {}).keys() & {"answer", "response", "messages"}
        ):
            raise UserError(
                f"{where}: fields={source.fields!r} give prompts alone, and Stage I needs responses. Add answer (and "
                "reasoning), response or messages."
            )
        if isinstance(source.rows, dict) and name == "generic" and "domain" not in (source.fields or {}):
            unknown = next((domain for domain in source.rows if domain != adapter.domain), None)
            if unknown is not None:
                raise UserError(f"{where}: rows names the domain {unknown!r}; all its rows are {adapter.domain!r}.")
        resolved.append((source, replace(adapter, licence=source.licence or adapter.licence)))
    return resolved


def plan(sources: list[tuple[Source, Adapter]], max_row_bytes: int) -> list[Unit]:
    """List the units of all sources, in order, and check each source's first rows.

    Raises:
        UserError: a source has no file that can be read, no rows, or rows without what its adapter needs.
    """
    units: list[Unit] = []
    for index, (source, adapter) in enumerate(sources):
        where = f"sources[{index}].path"
        if adapter.generator is not None:
            units += list_units(index, source, adapter.generator)
            continue
        subset, split = source.subset or adapter.subset, source.split or adapter.split
        files = list_files(where, source.path, subset, split, source.files or adapter.files)
        mine = [unit for file in files for unit in split_into_units(index, file)]
        if not mine:
            raise UserError(f"{where}={source.path!r} has no rows. Give it at least one, or drop it.")
        _look_at(f"sources[{index}]", source, adapter, mine[0], max_row_bytes)
        units += mine
    return units


def _look_at(where: str, source: Source, adapter: Adapter, unit: Unit, max_row_bytes: int) -> None:
    """Raise UserError if none of the first rows has a column that is needed."""
    rows = [row for _, row in islice(read_unit(unit, max_row_bytes), _SAMPLE_ROWS) if isinstance(row, dict)]
    if not rows:
        return  # broken lines are counted; if all are, no row is left in the end
    verdicts = [adapt(adapter, row, source.label) for row in rows]
    missing = [v for v in verdicts if isinstance(v, Drop) and v.reason == "missing_field"]
    wanted = str(missing[0].detail.get("field")) if len(missing) == len(verdicts) else None
    if wanted is None:
        unseen = dict.fromkeys(columns_of(source.fields))  # references that nobody finds would not be missed
        for _, row in read_unit(unit, max_row_bytes) if unseen else ():
            unseen = {column: None for column in unseen if isinstance(row, Drop) or column not in row}
            if not unseen:
                return
        wanted = next(iter(unseen), None)
    if wanted is None:
        return
    columns = sorted({column for row in rows for column in row})
    raise UserError(
        f"{where} ({source.path}): none of the first rows has {wanted!r}{did_you_mean(wanted, columns)} The columns "
        f"are {columns}. Set `fields` to the columns that there are."
    )


def settle(
    sources: list[tuple[Source, Adapter]], units: list[Unit], max_row_bytes: int
) -> tuple[list[tuple[Source, Adapter]], dict[str, list[str]]]:
    """Read the habits of sources of any schema from their first rows.

    Returns:
        The sources, with an adapter that opens the reasoning trace where nearly all responses only close one; and for
        each source the columns that look like content but are not read.
    """
    settled: list[tuple[Source, Adapter]] = []
    not_read: dict[str, list[str]] = {}
    for index, (source, adapter) in enumerate(sources):
        if source.fields is not None:
            first = next(unit for unit in units if unit.source == index)
            sample = (row for _, row in islice(read_unit(first, max_row_bytes), _HABIT_ROWS))
            rows = [row for row in sample if isinstance(row, dict)]
            if found := unread(source.fields, rows):
                not_read[source.label] = found
            verdicts = [adapt(adapter, row, source.label) for row in rows]
            unopened = sum(isinstance(v, Drop) and v.reason == "unopened_trace" for v in verdicts)
            if rows and unopened >= _HABIT * len(rows):
                opened = generic(source.fields, source.mode, adapter.domain, opened_in_prompt=True)
                adapter = replace(opened, licence=adapter.licence)
                print(f"  {source.label}: responses end a trace that their prompts have begun; they are think examples")
        settled.append((source, adapter))
    return settled, not_read
