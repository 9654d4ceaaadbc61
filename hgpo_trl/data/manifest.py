"""The content of `manifest.json`: enough to build a data set again, and to see where every row went."""

from typing import Any, NotRequired, TypedDict


class StepCount(TypedDict):
    """One step's work on one source's rows."""

    name: str
    dropped: dict[str, int]  # reason -> rows


class SourceManifest(TypedDict):
    """One source, from the rows read to the rows kept."""

    path: str  # hub id, file or folder
    licence: str | None
    mode: str | None  # None: prompts without responses
    domain: str
    rows_read: int
    steps: list[StepCount]  # in the order in which they ran
    kept: int
    not_read: NotRequired[list[str]]  # columns, and fields of messages, that look like content and are not read


class TokenHistogram(TypedDict):
    """Rows per bin of a logarithmic axis: one more edge than counts."""

    edges: list[float]
    counts: list[int]


class TokenStatistics(TypedDict):
    """Tokens of prompt and response."""

    mean: float
    median: float
    p95: float
    max: int
    histogram: TokenHistogram


class Manifest(TypedDict):
    """The whole file."""

    stage: str  # "hft" or "hgpo"
    recipe: dict[str, Any]
    input_files: dict[str, str | None]  # path -> fingerprint; None: a file of the hub, or a generator
    seed: int
    versions: dict[str, str]
    sources: dict[str, SourceManifest]
    bytes: int  # of the shards
    rows: dict[str, dict[str, int]]  # "mode", "domain", "source" -> name -> rows in the data set
    tokens: dict[str, TokenStatistics]  # by mode; "prompt" where there are no responses
    duplicates: dict[str, int]  # "exact", "near"
    decontamination: dict[str, int]  # benchmark -> rows dropped because of it
