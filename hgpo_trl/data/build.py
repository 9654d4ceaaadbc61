"""All settings of a build."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from hgpo_trl.data.adapter import Adapter
from hgpo_trl.data.example import Step
from hgpo_trl.data.generators import ReasoningGymGenerator
from hgpo_trl.data.sources import Source
from hgpo_trl.modes import LHRM, ModeFormat

InputFiles = Mapping[str, str | None]  # path -> fingerprint; None: of the hub, or generated
DUPLICATES, MIX, DIFFICULTY, DECONTAMINATION = "duplicates", "mix", "difficulty", "decontamination"  # steps
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
