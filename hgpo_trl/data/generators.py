"""Sources whose rows are generated: a task module, or a data set of reasoning-gym.

A generator is a picklable function of a row's index. A row depends on its index, the generator's settings and its seed
alone, so any split into units gives the same rows, in any process and after any interruption.
"""

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hgpo_trl.common.errors import UserError, did_you_mean
from hgpo_trl.common.imports import load_function, load_module
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.data.adapter import Adapter, Generator, adapt
from hgpo_trl.data.example import Drop
from hgpo_trl.data.rows import Parts, optional_text, text_of, user_message
from hgpo_trl.data.sources import Row, Source, Unit, characters, read_unit
from hgpo_trl.modes import Mode
from hgpo_trl.tasks.embedded import Query, check_levels, domain_of
from hgpo_trl.verification import reasoning_gym

UNIT_ROWS = 1_000  # that one worker generates
TASK = "task"
REASONING_GYM = "reasoning_gym/"  # before the name of a data set
GENERATOR_KEYS = ("config", "seed", "reasoning", "level")  # that only these sources have
_KEYS = ("path", "name", "adapter", "licence", "mode", "domain", "rows", "config", "seed")  # of every generated source


def is_generated(source: Source) -> bool:
    """Whether an entry of `sources` names a generator, not files."""
    return source.adapter == TASK or (source.adapter is None and source.path.startswith(REASONING_GYM))


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
    is_task = source.adapter == TASK
    keys = _KEYS if is_task else tuple(dict.fromkeys((*_KEYS, *GENERATOR_KEYS)))
    given = [field.name for field in fields(source) if getattr(source, field.name) is not None]
    if wrong := [name for name in given if name not in keys]:
        kind = "a task" if is_task else "a data set of reasoning-gym"
        raise UserError(f"{where}: {kind} takes no `{wrong[0]}`. Its keys are {', '.join(keys)}.")
    if not isinstance(source.rows, int) or source.rows < 1:
        raise UserError(f"{where} needs `rows`, how many to generate, as a number of at least 1; got {source.rows!r}.")
    if stage == "hft" and source.mode is None:
        raise UserError(
            f"{where} needs `mode`: think or no_think. Use two entries for both: each asks its own questions."
        )
    if source.mode not in (None, *Mode):
        raise UserError(f"{where}: mode must be {' or '.join(Mode)}; got {source.mode!r}.")
    if stage == "hgpo" and source.mode is not None:
        raise UserError(f"{where} has mode={source.mode!r}, but Stage II samples every prompt in both modes. Drop it.")
    own_seed = derived_seed(seed, f"{stage} {source.label} {source.seed}")
    mode = Mode(source.mode) if source.mode else None
    found = (_task if is_task else _reasoning_gym)(where, source, mode, own_seed)
    adapter = _adapter(found, mode)
    verdict = adapt(adapter, found(0), source.label)
    if isinstance(verdict, Drop) and verdict.reason in ("missing_field", "empty_field", "no_answer"):
        part = verdict.detail.get("field", "answer")
        raise UserError(f"{where}: its rows have no {part}, without which no {mode or 'prompt'} example can be made.")
    return adapter


def _adapter(generator: Generator, mode: Mode | None) -> Adapter:
    """An adapter for rows that a program generates.

    Args:
        mode: of the responses; None for prompts alone.
    """
    read = partial(_read, mode)
    return Adapter("generated", generator.licence, "hft", generator.domain, mode, read, generator=generator)


def _read(mode: Mode | None, row: Mapping[str, Any]) -> Parts:
    answer = optional_text(row, "answer")
    parts: Parts = {"prompt": user_message(text_of(row, "prompt")), "reference": answer, "generated": True}
    if mode is not None:
        parts |= {"mode": mode, "answer": (answer or "").strip()}
    if mode is Mode.THINK:
        parts["reasoning"] = text_of(row, "reasoning").strip()
    for name in ("level", "domain", "id", "reasoning_gym"):
        if (value := optional_text(row, name)) is not None:
            parts[name] = value
    return parts


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


def _task(where: str, source: Source, mode: Mode | None, seed: int) -> TaskGenerator:
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
            raise UserError(
                f"{where}: config has the unknown key {name!r}{did_you_mean(name, names)} The keys are "
                f"{', '.join(names)}."
            )


# --- reasoning-gym --------------------------------------------------------------------------------------------

_UNORDERED = (  # they iterate over sets of texts
    "isomorphic_strings",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
_METADATA = "metadata."  # before a field, in a part's name


@dataclass(frozen=True)
class ReasoningGymGenerator:
    """Rows of a data set of reasoning-gym.

    Args:
        name: of the data set.
        domain: of the rows.
        config: of the data set.
        seed: of the data set.
        rows: its size; some data sets are generated as a whole.
        reasoning, level: "metadata.FIELD", dotted where it is nested, or a user's function of the entry; None: no such
            part.
    """

    name: str
    domain: str
    config: Mapping[str, Any]
    seed: int
    rows: int
    reasoning: str | None
    level: str | None
    licence: str = "apache-2.0"

    def __call__(self, index: int) -> Row:
        dataset = reasoning_gym.open_dataset(self.name, self.config, size=self.rows, seed=self.seed)
        entry = dataset[index]
        return {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "reasoning": _part("reasoning", self.reasoning, entry),
            "level": _part("level", self.level, entry),
            "reasoning_gym": reasoning_gym.to_column(self.name, self.config, entry),
        }

    @property
    def version(self) -> str:
        """Release of the package, and digests of the files of the user's functions."""
        functions = [name for name in (self.reasoning, self.level) if name and not name.startswith(_METADATA)]
        files = [Path(inspect.getfile(load_function("", name))).read_bytes() for name in functions]
        return " ".join([version("reasoning-gym"), *(sha256(file).hexdigest()[:16] for file in files)])


def gsm_reasoning(entry: Mapping[str, Any]) -> str:
    """The worked solution of an entry of `gsm_symbolic`, without the answer at its end."""
    return entry["metadata"]["answer_cot"].rpartition("####")[0].strip()


def gsm_level(entry: Mapping[str, Any]) -> int:
    """Number of lines with a calculation in the worked solution of an entry of `gsm_symbolic`."""
    return sum("=" in line for line in entry["metadata"]["answer_cot"].splitlines())


_PARTS = {  # data set -> functions, where the source names none
    "gsm_symbolic": {"reasoning": f"{__name__}.gsm_reasoning", "level": f"{__name__}.gsm_level"},
}


def _part(key: str, name: str | None, entry: Mapping[str, Any]) -> str | None:
    """A part of an entry; None where it has none."""
    if name is None:
        return None
    value: Any
    if name.startswith(_METADATA):
        value = entry["metadata"]
        for field in name.removeprefix(_METADATA).split("."):
            value = value.get(field) if isinstance(value, Mapping) else None
    else:
        value = load_function(key, name)(entry)
    return None if value is None else str(value)


def _named(where: str, key: str, name: str, entry: Mapping[str, Any]) -> str:
    """A part's name as a recipe has it, in full: a field of the metadata, or a function that can be loaded and called.

    Raises:
        UserError: it is neither.
    """
    metadata = entry["metadata"]
    first = name.removeprefix(_METADATA).split(".")[0]
    if first in metadata:
        return _METADATA + name.removeprefix(_METADATA)
    if "." not in name or name.startswith(_METADATA):
        raise UserError(
            f"{where}: {key}: the metadata have no field {first!r}{did_you_mean(first, metadata)} The fields are "
            f"{', '.join(metadata)}; a function is written package.module.function or path/to/file.py:function."
        )
    function = load_function(f"{where}: {key}", name)
    try:
        function(entry)
    except Exception as error:
        error.add_note(f"Raised by {key}={name!r} of {where}, called with the entry {str(entry)[:500]}")
        raise
    return name


def _reasoning_gym(where: str, source: Source, mode: Mode | None, seed: int) -> ReasoningGymGenerator:
    """Check a source, with the first entry of its data set."""
    assert isinstance(source.rows, int)
    name, config, seed = source.path.removeprefix(REASONING_GYM), source.config or {}, seed % 2**31
    if name in _UNORDERED and "PYTHONHASHSEED" not in os.environ:
        raise UserError(
            f"{where}: {name} orders its texts by Python's hashes, which differ from process to process. Start the "
            "command with PYTHONHASHSEED=0 in its environment."
        )
    try:
        entry = reasoning_gym.open_dataset(name, config, size=source.rows, seed=seed)[0]
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error
    given = {key: getattr(source, key) or _PARTS.get(name, {}).get(key) for key in ("reasoning", "level")}
    if mode is Mode.THINK and given["reasoning"] is None:
        raise UserError(
            f"{where}: mode think needs `reasoning`: a field of the metadata that holds a trace, or a function of the "
            f"entry that writes one, as path/to/file.py:function. The metadata have {', '.join(entry['metadata'])}."
        )
    parts = {key: value and _named(where, key, value, entry) for key, value in given.items()}
    return ReasoningGymGenerator(
        name, source.domain or name, config, seed, source.rows, parts["reasoning"], parts["level"]
    )
