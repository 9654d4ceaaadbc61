"""Fields that the two data builders share, and the way from a recipe to a data set."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hgpo_trl.common.cores import available_cores
from hgpo_trl.common.errors import UserError, did_you_mean
from hgpo_trl.common.files import looks_like_path
from hgpo_trl.common.fingerprints import data_fingerprint
from hgpo_trl.data.adapter import Adapter, adapt
from hgpo_trl.data.adapters import ADAPTERS
from hgpo_trl.data.build import DECONTAMINATION, Build, Deduplication
from hgpo_trl.data.decontamination import Decontaminator
from hgpo_trl.data.example import Drop, Step
from hgpo_trl.data.filters import language, opened, quality, token_limit
from hgpo_trl.data.generators import (
    GENERATOR_KEYS,
    REASONING_GYM,
    TASK,
    is_generated,
    list_units,
    resolve_generated,
)
from hgpo_trl.data.manifest import Manifest
from hgpo_trl.data.mixing import check_shares
from hgpo_trl.data.own_files import columns_of, generic, unread
from hgpo_trl.data.pipeline import build_dataset, claim
from hgpo_trl.data.shards import Finish
from hgpo_trl.data.sources import Source, Unit, list_files, parse_entries, read_unit, split_into_units
from hgpo_trl.modes import LHRM, ModeFormat

DEDUPLICATIONS = ("near", "exact", "none")
_SAMPLE_ROWS = 20  # of each source, looked at before any long work
_HABIT_ROWS = 1_000  # of a source of any schema, from which its habits are read
_HABIT = 0.9  # share of them that makes a habit
_NOT_PART_OF_THE_BUILD = ("output_dir", "num_processes", "push_to_hub", "difficulty_batch_size")


@dataclass
class BuilderArguments:
    """Sources, and how their rows are filtered and mixed. docs/data.md explains every step."""

    sources: list[dict[str, Any]] = field(
        metadata={"help": "Mappings: path, and perhaps name, adapter, fields, mode, domain, rows, ..."}
    )
    output_dir: str = field(metadata={"help": "Folder to write to."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Of the model to be trained, to count tokens: path or hub id."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "Drop rows with more tokens; needs tokenizer."})
    quality_filter: bool = field(default=True, metadata={"help": "Drop what is empty, cut off or repetitive."})
    languages: list[str] | None = field(
        default=None, metadata={"help": "Keep these only (ISO 639-1: en, de, ...); null: all."}
    )
    deduplicate: str = field(
        default="near", metadata={"help": f"Duplicate queries: {', '.join(DEDUPLICATIONS)}.", "choices": DEDUPLICATIONS}
    )
    dedup_threshold: float = field(
        default=0.7, metadata={"help": "Similarity (Jaccard) from which queries are near duplicates."}
    )
    decontamination: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "Benchmarks; mappings: path, field, and perhaps name, subset, split, files, match."},
    )
    decontamination_ngram: int = field(default=8, metadata={"help": "Words of an n-gram."})
    decontamination_threshold: float = field(
        default=0.5, metadata={"help": "Share of a benchmark question's n-grams that make a row contaminated."}
    )
    domain_shares: dict[str, float] | None = field(default=None, metadata={"help": "domain -> share; they sum to 1."})
    source_shares: dict[str, float] | None = field(default=None, metadata={"help": "source -> share; they sum to 1."})
    max_rows: int | None = field(default=None, metadata={"help": "At most so many rows in all."})
    rows_per_shard: int = field(default=10_000, metadata={"help": "Rows of a file; one is sorted in memory."})
    max_row_bytes: int = field(default=4 * 2**20, metadata={"help": "Drop longer rows unread."})
    num_processes: int = field(default_factory=available_cores, metadata={"help": "Processes that read and filter."})
    seed: int = field(default=0, metadata={"help": "Which rows a cap keeps, and the order."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Data set repository to upload the result to."})

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty. Name at least one: {path: data.jsonl, fields: {prompt: question}}.")
        for name in ("max_tokens", "max_rows", "rows_per_shard", "max_row_bytes", "num_processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}.")
        if self.max_tokens is not None and self.tokenizer is None:
            raise UserError(f"max_tokens={self.max_tokens} needs a tokenizer to count with: set `tokenizer`.")
        if self.deduplicate not in DEDUPLICATIONS:
            raise UserError(f"deduplicate must be one of {', '.join(DEDUPLICATIONS)}; got {self.deduplicate!r}.")
        if not 0.0 < self.dedup_threshold < 1.0:
            raise UserError(
                f"dedup_threshold must lie between 0 and 1; got {self.dedup_threshold}. For 1 set deduplicate: exact."
            )
        if not 0.0 < self.decontamination_threshold <= 1.0:
            raise UserError(f"decontamination_threshold must lie in (0, 1]; got {self.decontamination_threshold}.")
        if self.decontamination_ngram < 1:
            raise UserError(f"decontamination_ngram must be at least 1; got {self.decontamination_ngram}.")
        for axis, shares in self.shares().items():
            if shares:
                check_shares(f"{axis}_shares", shares)

    def shares(self) -> dict[str, dict[str, float]]:
        """Axis -> value -> share."""
        return {"domain": self.domain_shares or {}, "source": self.source_shares or {}}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry of `decontamination`.

    Args:
        path: file, folder, or id on the hub.
        field: its column of questions: texts, or prompts of a data set that is built already.
        name: in the report; default: `path`.
        subset, split: of a folder or on the hub.
        files: glob of files there, in place of both.
        match: "ngrams", or "exact" for templated questions, which differ from one another in a word or a number.
    """

    path: str
    field: str = "problem"
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    files: str | None = None
    match: Literal["ngrams", "exact"] = "ngrams"

    @property
    def label(self) -> str:
        return self.name or self.path


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
    labels = [source.label for source, _ in resolved]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"sources: {twice!r} is there twice. Give each its own `name`.")
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


def _named(index: int) -> str:
    return f"decontamination[{index}]"


def _questions(benchmark: Benchmark, where: str) -> Iterator[str]:
    for file in _files_of(benchmark, where):
        for unit in split_into_units(0, file):
            for place, row in read_unit(unit, max_row_bytes=2**26):
                question = _question(row.get(benchmark.field)) if isinstance(row, dict) else None
                if question is None:
                    columns = sorted(row) if isinstance(row, dict) else row.reason
                    raise UserError(
                        f"{where} ({benchmark.path}): row {place} has no text in {benchmark.field!r}; there is "
                        f"{columns}. Set `field` to its column of questions."
                    )
                yield question


def _files_of(benchmark: Benchmark, where: str) -> list[str]:
    return list_files(where, benchmark.path, benchmark.subset, benchmark.split, benchmark.files)


def _input_files(args: BuilderArguments, units: Sequence[Unit]) -> dict[str, str | None]:
    """Fingerprints, by path, of the local files of sources and benchmarks: a path stays when its file is made anew.

    None: a file on the hub, or a generator, whose path has its version.
    """
    benchmarks = parse_entries("decontamination", args.decontamination, Benchmark)
    files = [file for index, benchmark in enumerate(benchmarks) for file in _files_of(benchmark, _named(index))]
    return {path: data_fingerprint(path) for path in sorted({*files, *(unit.path for unit in units)})}


def _question(value: Any) -> str | None:
    """A text, or the last message of a prompt that is a conversation; None for anything else."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


def decontaminator(args: BuilderArguments) -> Decontaminator | None:
    """Build the decontamination step; None without benchmarks.

    Raises:
        UserError: a benchmark cannot be read, or two have the same name.
    """
    benchmarks = parse_entries("decontamination", args.decontamination, Benchmark)
    if not benchmarks:
        return None
    labels = [benchmark.label for benchmark in benchmarks]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"decontamination: {twice!r} is there twice. Give each its own `name`.")
    questions = {
        benchmark.label: list(_questions(benchmark, _named(index))) for index, benchmark in enumerate(benchmarks)
    }
    return Decontaminator(
        questions,
        n=args.decontamination_ngram,
        threshold=args.decontamination_threshold,
        exact={benchmark.label for benchmark in benchmarks if benchmark.match == "exact"},
    )


def _tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    if looks_like_path(name) and not Path(name).is_dir():
        raise UserError(f"tokenizer={name!r}: there is no such folder. Fix the path.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer={name!r} cannot be loaded: {error}") from error


def common_steps(args: BuilderArguments, mode_format: ModeFormat = LHRM) -> list[tuple[str, Step]]:
    """The steps of both builders up to decontamination, cheap ones first."""
    steps: list[tuple[str, Step]] = []
    if args.quality_filter:
        steps.append(("quality", quality()))
    if args.languages:
        steps.append(("language", language(args.languages)))
    tokenizer = _tokenizer(args.tokenizer)
    steps.append(("length", token_limit(tokenizer, args.max_tokens)))
    if tokenizer is not None:
        steps.append(("rendering", opened(tokenizer, mode_format)))
    if (step := decontaminator(args)) is not None:
        steps.append((DECONTAMINATION, step))
    return steps


def run(
    stage: str,
    args: BuilderArguments,
    steps: list[tuple[str, Step]],
    *,
    across_modes: bool = True,
    shares: dict[str, dict[str, float]] | None = None,
    finish: Finish | None = None,
    mode_format: ModeFormat = LHRM,
) -> Manifest:
    """Plan, claim the folder, build, upload if asked, and print a summary."""
    sources = resolve(args.sources, stage, args.seed)
    labels = [source.label for source, _ in sources]
    if unknown := [label for label in args.source_shares or () if label not in labels]:
        raise UserError(f"source_shares names {unknown[0]!r}; the sources are {', '.join(labels)}.")
    units = plan(sources, args.max_row_bytes)
    sources, not_read = settle(sources, units, args.max_row_bytes)
    recipe = {key: value for key, value in asdict(args).items() if key not in _NOT_PART_OF_THE_BUILD}
    input_files = _input_files(args, units)
    output_dir = Path(args.output_dir)
    manifest = claim(output_dir, recipe, units, input_files)
    if manifest is None:
        near, threshold = args.deduplicate == "near", args.dedup_threshold
        build = Build(
            stage=stage,
            sources=sources,
            steps=steps,
            deduplication=None
            if args.deduplicate == "none"
            else Deduplication(near=near, threshold=threshold, across_modes=across_modes),
            shares=shares or args.shares(),
            max_rows=args.max_rows,
            rows_per_shard=args.rows_per_shard,
            max_row_bytes=args.max_row_bytes,
            seed=args.seed,
            not_read=not_read,
            input_files=input_files,
            mode_format=mode_format,
        )
        manifest = build_dataset(build, units, output_dir, recipe, args.num_processes, finish)
    else:
        print(f"{output_dir} is complete already.")
    _summarise(output_dir, manifest)
    if args.push_to_hub:
        api = HfApi()
        api.create_repo(args.push_to_hub, repo_type="dataset", exist_ok=True)
        url = api.upload_folder(repo_id=args.push_to_hub, repo_type="dataset", folder_path=str(output_dir))
        print(f"Uploaded: {url}")
    return manifest


def _summarise(output_dir: Path, manifest: Manifest) -> None:
    for name, source in manifest["sources"].items():
        print(f"  {name}: {source['kept']:,} of {source['rows_read']:,} rows")
        if not_read := source.get("not_read"):
            print(f"    not read, though it looks like content: {', '.join(not_read)}")
        for step in source["steps"]:
            if step["dropped"]:
                print(f"    {step['name']}: " + ", ".join(f"{n:,} {reason}" for reason, n in step["dropped"].items()))
    rows = {axis: manifest["rows"][axis] for axis in ("mode", "domain")}
    print(f"{output_dir}: {sum(rows['mode'].values()):,} rows, {json.dumps(rows)}; see {output_dir / 'README.md'}")
