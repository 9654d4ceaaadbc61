"""Fields that the two data builders share, and the way from a recipe to a data set."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hgpo_trl.common.cores import available_cores
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import looks_like_path
from hgpo_trl.common.fingerprints import data_fingerprint
from hgpo_trl.data.benchmarks import Benchmark, find_benchmarks, questions_by_name
from hgpo_trl.data.build import DECONTAMINATION, Build, Deduplication
from hgpo_trl.data.decontamination import Decontaminator
from hgpo_trl.data.example import Step
from hgpo_trl.data.filters import language, opened, quality, token_limit
from hgpo_trl.data.manifest import Manifest
from hgpo_trl.data.mixing import check_shares
from hgpo_trl.data.pipeline import build_dataset, claim
from hgpo_trl.data.planning import plan, resolve, settle
from hgpo_trl.data.shards import Finish
from hgpo_trl.data.sources import Unit
from hgpo_trl.modes import LHRM, ModeFormat

DEDUPLICATIONS = ("near", "exact", "none")
_NOT_PART_OF_THE_BUILD = ("output_dir", "num_processes", "push_to_hub", "difficulty_batch_size")


@dataclass
class BuilderArguments:
    """Sources, and how their rows are filtered and mixed. docs/data.md explains every step."""

    sources: list[dict[str, Any]] = field(
        metadata={"help": "Mappings: path, and perhaps name, adapter, fields, mode, domain, rows, ..."}
    )
    output_dir: str = field(metadata={"help": "Folder to write to."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Of the model to be trained, to count tokens: path or hub id. Stage II: or difficulty_model."
        },
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


def _tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    if looks_like_path(name) and not Path(name).is_dir():
        raise UserError(f"tokenizer={name!r}: there is no such folder. Fix the path.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer={name!r} cannot be loaded: {error}") from error


def _common_steps(
    args: BuilderArguments, benchmarks: Sequence[tuple[Benchmark, list[str]]], mode_format: ModeFormat
) -> list[tuple[str, Step]]:
    """The steps of both builders up to decontamination, cheap ones first.

    Raises:
        UserError: a benchmark or the tokenizer cannot be read.
    """
    steps: list[tuple[str, Step]] = []
    if args.quality_filter:
        steps.append(("quality", quality()))
    if args.languages:
        steps.append(("language", language(args.languages)))
    tokenizer = _tokenizer(args.tokenizer)
    steps.append(("length", token_limit(tokenizer, args.max_tokens)))
    if tokenizer is not None:
        steps.append(("rendering", opened(tokenizer, mode_format)))
    if benchmarks:
        decontaminator = Decontaminator(
            questions_by_name(benchmarks),
            n=args.decontamination_ngram,
            threshold=args.decontamination_threshold,
            exact={benchmark.label for benchmark, _ in benchmarks if benchmark.match == "exact"},
        )
        steps.append((DECONTAMINATION, decontaminator))
    return steps


def _fingerprints(benchmarks: Sequence[tuple[Benchmark, list[str]]], units: Sequence[Unit]) -> dict[str, str | None]:
    """Fingerprints, by path, of the local files of sources and benchmarks: a path stays when its file is made anew.

    None: a file on the hub, or a generator, whose path has its version.
    """
    files = {file for _, files in benchmarks for file in files}
    return {path: data_fingerprint(path) for path in sorted({*files, *(unit.path for unit in units)})}


def run(
    stage: str,
    args: BuilderArguments,
    steps: Sequence[tuple[str, Step]] = (),
    *,
    across_modes: bool = True,
    finish: Finish | None = None,
    mode_format: ModeFormat = LHRM,
) -> Manifest:
    """Plan, claim the folder, build, upload if asked, and print a summary.

    Args:
        stage: "hft" or "hgpo".
        steps: of this stage, after the common ones.
        across_modes: whether a query that is there in both modes is a duplicate.
        finish: measures the rows that are left, and drops some.
        mode_format: marks to write responses with.
    """
    sources = resolve(args.sources, stage, args.seed)
    labels = [source.label for source, _ in sources]
    if unknown := [label for label in args.source_shares or () if label not in labels]:
        raise UserError(f"source_shares names {unknown[0]!r}; the sources are {', '.join(labels)}.")
    benchmarks = find_benchmarks(args.decontamination)
    steps = [*_common_steps(args, benchmarks, mode_format), *steps]
    units = plan(sources, args.max_row_bytes)
    sources, not_read = settle(sources, units, args.max_row_bytes)
    recipe = {key: value for key, value in asdict(args).items() if key not in _NOT_PART_OF_THE_BUILD}
    input_files = _fingerprints(benchmarks, units)
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
            shares=args.shares(),
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
