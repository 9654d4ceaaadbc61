"""Sources whose rows are generated: a task module, or a data set of reasoning-gym.

A generator is a picklable function of a row's index. A row depends on its index, the generator's settings and its seed
alone, so any split into units gives the same rows, in any process and after any interruption.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_module
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.data.adapters import Adapter, Generator, generated
from hgpo_trl.data.example import Drop
from hgpo_trl.data.sources import Row, Source, Unit, characters, read_unit
from hgpo_trl.modes import Mode
from hgpo_trl.tasks.embedded import Query, check_levels, domain_of

UNIT_ROWS = 1_000  # that one worker generates
TASK = "task"
_ALL = ("path", "name", "adapter", "licence", "mode", "domain", "rows", "config", "seed")  # keys of every such entry


def is_generated(source: Source) -> bool:
    """Whether an entry of `sources` names a generator, not files."""
    return source.adapter == TASK


def resolve_generated(where: str, source: Source, stage: str, seed: int) -> Adapter:
    """Build the adapter of an entry whose rows are generated.

    Args:
        where: the entry in the recipe, for messages.
        source: the entry.
        stage: "hft" or "hgpo".
        seed: of the recipe. The entry's own seed derives from it, the stage, the entry's label and its `seed`, so that
            no two entries of a recipe, and no two stages, ask the same questions.

    Raises:
        UserError: a key or a value of the entry does not fit.
    """
    given = [field.name for field in fields(source) if getattr(source, field.name) is not None]
    if wrong := [name for name in given if name not in _ALL]:
        raise UserError(f"{where}: a generated source takes no `{wrong[0]}`. Its keys are {', '.join(_ALL)}.")
    if not isinstance(source.rows, int) or source.rows < 1:
        raise UserError(f"{where} needs `rows`, how many to generate, as a number of at least 1; got {source.rows!r}.")
    if stage == "hft" and source.mode is None:
        raise UserError(
            f"{where} needs `mode`: think or no_think. Use two entries for both: each asks its own questions."
        )
    if source.mode not in (None, *Mode):
        raise UserError(f"{where}: mode must be {' or '.join(Mode)}; got {source.mode!r}.")
    own_seed = derived_seed(seed, f"{stage} {source.label} {source.seed}")
    task = _task(where, source, own_seed)
    return generated(task, Mode(source.mode) if source.mode and stage == "hft" else None)


def list_units(index: int, source: Source, generator: Generator) -> list[Unit]:
    """Split a generated source into ranges of indices."""
    assert isinstance(source.rows, int)
    path = f"{source.path} {generator.version}"
    starts = range(0, source.rows, UNIT_ROWS)
    return [Unit(index, path, start, min(start + UNIT_ROWS, source.rows)) for start in starts]


def rows_of(unit: Unit, source: Source, adapter: Adapter, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    """Yield a unit's rows with their places: of a file as `read_unit` does, else generated, such as "legs:118"."""
    if adapter.generator is None:
        return read_unit(unit, max_row_bytes)
    return _generate(adapter.generator, unit, source.label, max_row_bytes)


def _generate(generator: Generator, unit: Unit, label: str, max_row_bytes: int) -> Iterator[tuple[str, Row | Drop]]:
    assert unit.stop is not None
    for index in range(unit.start, unit.stop):
        try:
            row = generator(index)
        except Exception as error:
            error.add_note(f"Raised while row {index} of the source {label!r} was generated.")
            raise
        yield f"{label}:{index}", Drop("row_too_large") if characters(row) > max_row_bytes else row | {"id": str(index)}


# --- task modules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskGenerator:
    """Rows of a task module (`hgpo_trl.tasks.embedded`).

    Args:
        name: dotted module name, or path that ends in .py.
        domain: of queries that do not give it.
        seed: of the random numbers.
        levels: level -> weight; rows have them in exact proportion.
        config: keyword arguments of the task's `sample`.
    """

    name: str
    domain: str
    seed: int
    levels: Mapping[Any, int]
    config: Mapping[str, Any]
    licence: str = "not stated"

    def __call__(self, index: int) -> Row:
        level = self._cycle[index % len(self._cycle)]
        query = self._sample(level, random.Random(f"{self.seed}/{index}"), **self.config)
        row = {"prompt": query.prompt, "reasoning": query.reasoning, "answer": query.answer}
        return row | {"level": str(query.level), "domain": query.domain or None}

    @cached_property
    def _cycle(self) -> list[Any]:
        return [level for level, weight in self.levels.items() for _ in range(weight)]

    @property
    def _sample(self) -> Callable[..., Query]:
        return load_module(self.name).sample

    @property
    def version(self) -> str:
        """Digest of the task's file."""
        return sha256(Path(inspect.getfile(load_module(self.name))).read_bytes()).hexdigest()[:16]


def _task(where: str, source: Source, seed: int) -> TaskGenerator:
    """Check a task module and the entry's `config`, with one query of each level."""
    try:
        task = load_module(source.path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if missing := [name for name in ("LEVELS", "sample") if not hasattr(task, name)]:
        raise UserError(f"{where} lacks {', '.join(missing)}; hgpo_trl/tasks/embedded.py says what a task needs.")
    config = dict(source.config or {})
    levels = config.pop("levels", task.LEVELS)
    check_levels(f"{where}: config.levels" if "levels" in (source.config or {}) else f"{where}: LEVELS", levels)
    _check_arguments(where, task.sample, config)
    for level in levels:
        try:
            query = task.sample(level, random.Random(0), **config)
        except Exception as error:
            call = f"sample({level!r}, rng{''.join(f', {name}={value!r}' for name, value in config.items())})"
            raise UserError(
                f"{where}: {call} failed: {type(error).__name__}: {error}. Mend `config` or the task."
            ) from error
        if not isinstance(query, Query):
            raise UserError(f"{where}: sample must return a hgpo_trl.tasks.embedded.Query; it returned {query!r:.80}.")
    return TaskGenerator(source.path, source.domain or domain_of(task), seed, dict(levels), config)


def _check_arguments(where: str, sample: Callable[..., Any], config: Mapping[str, Any]) -> None:
    """UserError unless `sample(level, rng, **config)` can be called."""
    parameters = inspect.signature(sample).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = ["levels", *(parameter.name for parameter in list(parameters)[2:])]
    for name in config:
        if name not in names:
            nearest = get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise UserError(f"{where}: config has the unknown key {name!r}{hint} The keys are {', '.join(names)}.")
