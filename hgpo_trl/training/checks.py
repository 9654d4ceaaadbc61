"""Checks of all rows of a data set before a model is loaded: faults by kind, lengths, and rows left out.

    faults, lengths = inspect_rows(dataset, renderer, EXAMPLES)    # of every row: at most one fault, and its length
    dataset, lengths = check_rows("train_data", dataset, renderer, EXAMPLES)    # refuses the faulty, or drops them

`hgpo_trl.training.rows` opens a row and defines the kinds of faults.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import GRPOConfig

from hgpo_trl.common.errors import UnsupportedError, UserError
from hgpo_trl.common.files import whole_file
from hgpo_trl.training.rows import EXAMPLES, KINDS, PROMPTS, FaultyRow, Renderer, excerpt, open_row

logger = logging.get_logger(__name__)

BATCH_ROWS = 1_000
SAMPLE_ROWS = 2_000  # rows whose tokens are counted for a share


class RowFault(NamedTuple):
    """The fault of one row."""

    row: int
    kind: str  # of KINDS
    detail: str  # an excerpt, or the chat template's message


class Lengths(NamedTuple):
    """How long the rows of a data set are, and which of them think. Both `[N]`.

    `most` is an upper bound of a row's tokens: the bytes of its rendering, of which every token has at least one.
    """

    most: NDArray[np.int64]
    think: NDArray[np.bool_]


def inspect_rows(dataset: Dataset, renderer: Renderer, columns: Sequence[str]) -> tuple[list[RowFault], Lengths]:
    """Open every row as its stage will.

    Args:
        columns: `PROMPTS` or `EXAMPLES`.

    Returns:
        The faults, in the order of the rows, and the rows' lengths; a faulty row has none.
    """
    names = [name for name in columns if name in dataset.column_names]
    faults: list[RowFault] = []
    most, think = np.zeros(len(dataset), dtype=np.int64), np.zeros(len(dataset), dtype=bool)
    is_text = np.zeros(len(dataset), dtype=bool)
    batches = dataset.with_format(None).select_columns(names).iter(BATCH_ROWS)
    rows = (dict(zip(names, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
    for number, row in enumerate(rows):
        is_text[number] = isinstance(row["prompt"], str)
        try:
            most[number], think[number] = open_row(row, renderer)
        except FaultyRow as fault:
            faults.append(RowFault(number, fault.kind, fault.detail))
    rest = np.ones(len(dataset), dtype=bool)
    rest[[fault.row for fault in faults]] = False
    texts, conversations = np.flatnonzero(rest & is_text), np.flatnonzero(rest & ~is_text)
    for number in min(texts, conversations, key=len).tolist() if len(texts) and len(conversations) else ():
        faults.append(RowFault(number, "mixed_kinds", f"prompt: {excerpt(dataset[number]['prompt'])}"))
        most[number] = 0
    return sorted(faults), Lengths(most, think)


def count_tokens(dataset: Dataset, rows: Sequence[int] | NDArray[np.int64], renderer: Renderer) -> NDArray[np.int64]:
    """Tokens of some rows, prompt and completion together. As many as `rows`."""
    names = [name for name in EXAMPLES if name in dataset.column_names]
    counts: list[int] = []
    for batch in dataset.with_format(None).select_columns(names).select(rows).iter(BATCH_ROWS):
        values = cast(dict[str, list[Any]], batch)
        texts = [renderer.text(dict(zip(names, row, strict=True))) for row in zip(*values.values(), strict=True)]
        encoded = renderer.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts += map(len, encoded["input_ids"])
    return np.array(counts, dtype=np.int64)


class Share(NamedTuple):
    """Shares of the rows, and of those that think, that are longer than a limit."""

    rows: float
    think: float
    exact: bool  # else estimated from `SAMPLE_ROWS` rows


def share_beyond(dataset: Dataset, lengths: Lengths, limit: int, renderer: Renderer) -> Share:
    """Find the share of rows with more than `limit` tokens.

    Tokens are counted only for rows that may have more, and for at most `SAMPLE_ROWS` of these, evenly spread.
    """
    candidates = np.flatnonzero(lengths.most > limit)
    if not len(candidates):
        return Share(0.0, 0.0, True)
    sample = candidates[np.linspace(0, len(candidates) - 1, min(len(candidates), SAMPLE_ROWS)).astype(int)]
    beyond = count_tokens(dataset, sample, renderer) > limit
    weight = len(candidates) / len(sample)  # rows that one of the sample stands for
    of_think = beyond[lengths.think[sample]].sum() * weight / max(1, lengths.think.sum())
    return Share(beyond.sum() * weight / len(dataset), of_think, len(sample) == len(candidates))


def check_rows(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    columns: Sequence[str],
    *,
    positions: int | None = None,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> tuple[Dataset, Lengths]:
    """Refuse a data set with faulty rows, or leave them out: the same rows in every call and every process.

    Args:
        name: the field of the recipe, or the argument, that holds the data set.
        columns: `PROMPTS` or `EXAMPLES`.
        positions: tokens that a row may have at most; None: any number.
        dropped: JSON lines to list the faulty rows in, which are then left out; None refuses them.
        is_main_process: this one writes the list.

    Returns:
        The rows without a fault, and their lengths.

    Raises:
        UserError: rows are faulty, or all are. The message counts them by kind and shows the first of each.
    """
    faults, lengths = inspect_rows(dataset, renderer, columns)
    if positions is not None:
        candidates = np.flatnonzero(lengths.most > positions)
        tokens = count_tokens(dataset, candidates, renderer)
        beyond = tokens > positions
        faults += [
            RowFault(int(row), "too_long", f"{count:,} tokens of at most {positions:,}")
            for row, count in zip(candidates[beyond], tokens[beyond], strict=True)
        ]
        faults.sort()
    if not faults:
        if dropped is not None and is_main_process:
            dropped.unlink(missing_ok=True)  # of an earlier run on rows that have been mended since
        return dataset, lengths
    report = f"{name}: {len(faults):,} of {len(dataset):,} rows are faulty.\n{explain(faults)}"
    if dropped is None or len(faults) == len(dataset):
        raise UserError(f"{report}\nMend or remove them; with drop_faulty_rows: true a command leaves them out.")
    if is_main_process:
        with whole_file(dropped) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(fault._asdict(), ensure_ascii=False)}\n" for fault in faults)
        counts = Counter(fault.kind for fault in faults)
        listing = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
        print(f"{name}: left out {len(faults):,} of {len(dataset):,} rows ({listing}); see {dropped}", flush=True)
    kept = np.setdiff1d(np.arange(len(dataset)), [fault.row for fault in faults])
    return dataset.select(kept), Lengths(*(values[kept] for values in lengths))


DROP_HELP = "Leave faulty rows out, and list them in output_dir/dropped_FIELD.jsonl, instead of refusing the data."


def dropped_rows_file(output_dir: str | Path | None, field: str) -> Path:
    """The file in which a stage lists the rows of a data set that it leaves out."""
    return Path(str(output_dir)) / f"dropped_{field}.jsonl"


def without_dropped(dataset: Dataset, path: Path) -> Dataset:
    """Leave out the rows that `check_rows` has listed in a file; none if there is no such file."""
    if not path.is_file():
        return dataset
    dropped = [json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines()]
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), dropped))


def explain(faults: Iterable[RowFault]) -> str:
    """Describe faults by kind, most frequent first: number of rows, description and first row of each kind."""
    by_kind: dict[str, list[RowFault]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        first, rows = found[0], "row" if len(found) == 1 else "rows"
        lines.append(f"  {kind}: {len(found):,} {rows}, {KINDS[kind]}. The first is row {first.row}: {first.detail}")
    return "\n".join(lines)


# --- a stage's data ---------------------------------------------------------------------------------------------


def model_positions(
    model: str | PretrainedConfig, overrides: Mapping[str, Any] | None = None, **kwargs: Any
) -> int | None:
    """Find how many tokens a model has positions for (`max_position_embeddings`); None if its configuration has none.

    Args:
        model: path, hub id, or the configuration of a model that is loaded.
        overrides: of the configuration, from a recipe's `model_init_kwargs`.
        kwargs: for `AutoConfig.from_pretrained`: `revision`, `trust_remote_code`.
    """
    if overrides and (given := overrides.get("max_position_embeddings")) is not None:
        return int(given)
    config = AutoConfig.from_pretrained(model, **kwargs) if isinstance(model, str) else model
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def rollout_positions(args: GRPOConfig, positions: int | None) -> int | None:
    """Positions for prompt and completion in a rollout: those of the model, or fewer if vLLM is given fewer."""
    given = args.vllm_max_model_length if args.use_vllm and args.vllm_mode == "colocate" else None
    return min((limit for limit in (positions, given) if limit is not None), default=None)


def check_prompts(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    *,
    positions: int | None = None,
    max_new_tokens: int = 0,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> Dataset:
    """Check the rows of a stage that samples responses.

    Args:
        positions: of the model. A longer prompt is a fault; a prompt that leaves fewer than `max_new_tokens` of them to
            the response causes a warning.
        dropped: see `check_rows`.
        is_main_process: this one writes the list, and the warnings.

    Returns:
        The rows without a fault.

    Raises:
        UserError: see `check_columns` and `check_rows`.
    """
    check_columns(name, dataset)
    dataset, lengths = check_rows(
        name, dataset, renderer, PROMPTS, positions=positions, dropped=dropped, is_main_process=is_main_process
    )
    if positions is not None and max_new_tokens:
        share = share_beyond(dataset, lengths, positions - max_new_tokens, renderer)
        if share.rows and is_main_process:
            logger.warning_once(
                f"{name}: {_percent(share.rows, share.exact)} of the prompts, with a response of {max_new_tokens:,} "
                f"tokens, are longer than the {positions:,} positions of the model (max_position_embeddings). "
                "Responses beyond them are of no use: lower the length of responses, or raise the positions."
            )
    return dataset


def check_examples(
    name: str,
    dataset: Dataset,
    renderer: Renderer,
    *,
    max_length: int | None,
    positions: int | None = None,
    dropped: Path | None = None,
    is_main_process: bool = True,
) -> Dataset:
    """Check the rows of Stage I.

    Args:
        max_length: tokens after which a row is cut off, with a warning; None cuts none.
        positions: of the model. A longer row is a fault, unless it is cut off.
        dropped: see `check_rows`.
        is_main_process: this one writes the list, and the warnings.

    Returns:
        The rows without a fault.

    Raises:
        UserError: a column is missing; or see `check_rows`.
    """
    if missing := {"prompt", "completion"}.difference(dataset.column_names):
        raise UserError(
            f"{name} lacks the column {' and '.join(sorted(missing))}; its columns are {dataset.column_names}. "
            "Rename or add what is missing: the loss is on the completion only."
        )
    cut = max_length is not None and (positions is None or max_length <= positions)
    dataset, lengths = check_rows(
        name,
        dataset,
        renderer,
        EXAMPLES,
        positions=None if cut else positions,
        dropped=dropped,
        is_main_process=is_main_process,
    )
    if max_length is not None:
        share = share_beyond(dataset, lengths, max_length, renderer)
        if share.rows and is_main_process:
            logger.warning_once(
                f"{name}: {_percent(share.rows, share.exact)} of the rows and {_percent(share.think, share.exact)} of "
                f"those that think are longer than max_length={max_length:,} tokens and are cut off there. A think "
                "example that is cut has no answer. Raise max_length (TRL's default is 1,024, the paper's 32,768), or "
                "build the data with max_tokens."
            )
    return dataset


def _percent(share: float, exact: bool) -> str:
    return f"{'' if exact else 'about '}{share:.1%}"


def check_columns(name: str, dataset: Any) -> None:
    """Check that a data set can serve as a data set of prompts.

    Raises:
        UserError: not a data set, no `prompt` column, no rows, or a column `response`.
        UnsupportedError: it has images.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserError(f"{name} must be a datasets.Dataset or IterableDataset; got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"{name} is empty. Give it at least one row with a `prompt`.")
    if "prompt" not in first:
        raise UserError(
            f"{name} has no column `prompt`; its columns are {sorted(first)}. Rename the one that holds it."
        )
    if "response" in first:
        raise UserError(
            f"{name} has a column `response`, the name under which reward functions get the parts of a response. "
            "Rename or remove it."
        )
    if "image" in first or "images" in first:
        raise UnsupportedError(f"{name} has images; HGPOTrainer trains text-only models. Remove the column.")


def check_dataset(
    name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig | None = None, model: Any = None
) -> None:
    """Check prompts before any long work, without leaving any out.

    Args:
        name: of the argument, for the messages.
        dataset: only columns and first row of a stream are checked.
        tokenizer: as the stage will use it.
        args, model: of a trainer whose rollouts need positions for prompt and completion; None: any length will do.

    Raises:
        UserError: see `check_columns` and `check_rows`.
        UnsupportedError: the data has images.
    """
    check_columns(name, dataset)
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list([{"prompt": next(iter(dataset))["prompt"]}], on_mixed_types="use_json")
    if args is None:
        check_prompts(name, dataset, Renderer(tokenizer))
        return
    extra: Any = args.model_init_kwargs if isinstance(model, str) else None
    positions = model_positions(
        model if isinstance(model, str) else model.config,
        extra,
        revision=(extra or {}).get("revision"),
        trust_remote_code=args.trust_remote_code,
    )
    check_prompts(
        name,
        dataset,
        Renderer(tokenizer, cast(dict[str, Any] | None, args.chat_template_kwargs)),
        positions=rollout_positions(args, positions),
        max_new_tokens=args.max_completion_length or 0,
        is_main_process=args.process_index == 0,
    )
