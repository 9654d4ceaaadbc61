"""Examples of an evaluation: what the model wrote in both modes on some of its prompts, and which mode it chose.

Nobody picks them: within each domain and level they are the first prompts in the order of a hash, and the responses are
the first of each mode. So models evaluated on the same prompts show the same ones. Further prompts, marked as such, are
the first in that order on which the model chose the worse mode. A prompt that the data set repeats is shown once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from numpy.typing import NDArray

from hgpo_trl.evaluation.metrics import SampleArrays, by_prompt
from hgpo_trl.evaluation.samples import PROMPT_ID, prompts_hash
from hgpo_trl.modes import LHRM, MODES, Mode, ModeFormat, split_response
from hgpo_trl.modes.decision import OFF_MODE
from hgpo_trl.modes.hybrid_accuracy import better_mode, biased_choice, valid_mean

LABELS = ("domain", "level")
PER_GROUP = 2  # prompts of each domain and level
LIMIT = 40  # of these prompts, in all
WRONG_CHOICES = 8  # prompts with a wrong choice besides
LONGEST = 4000  # characters of a text


class Chosen(NamedTuple):
    """A prompt to show."""

    prompt: int  # its `prompt_id`
    is_wrong: bool  # it is shown because the model chose the worse mode


def chosen_prompts(
    samples: pd.DataFrame,
    dataset: Dataset,
    groups: Mapping[str, Sequence[Any]],
    margin: float = 0.0,
    decision_bias: float = 0.0,
) -> list[Chosen]:
    """Choose prompts as the module's docstring says.

    Args:
        samples: with `reward`, but they need no `completion`; every prompt has as many samples in each mode.
        dataset, groups, margin, decision_bias: as in `examples_of`.
    """
    samples, arrays = by_prompt(samples)
    ids = samples[PROMPT_ID].unique()
    _, _, picked = biased_choice(arrays.prob_think, arrays.prob_no_think, arrays.picked, decision_bias)
    better = _better(arrays, margin)
    keys = _keys(ids, dataset, groups)
    batches = dataset.select_columns("prompt").iter(1_000)
    hashes = [prompts_hash([prompt]) for batch in batches for prompt in batch["prompt"]]
    places: dict[str, int] = {}  # of distinct prompts
    for place, row in enumerate(ids):
        places.setdefault(hashes[row], place)
    order = [places[key] for key in sorted(places)]

    shown = list(_first_of_each(order, keys))
    wrong = [place for place in order if better[place] >= 0 and picked[place] != better[place]]
    chosen = [(place, False) for place in sorted(shown, key=lambda place: _sortable(keys[place]))]
    chosen += [(place, True) for place in wrong if place not in shown][:WRONG_CHOICES]
    return [Chosen(int(ids[place]), is_wrong) for place, is_wrong in chosen]


def examples_of(
    chosen: Sequence[Chosen],
    samples: pd.DataFrame,
    dataset: Dataset,
    groups: Mapping[str, Sequence[Any]],
    margin: float = 0.0,
    decision_bias: float = 0.0,
    mode_format: ModeFormat = LHRM,
) -> list[dict[str, Any]]:
    """Show the first response of either mode to each prompt of `chosen_prompts`.

    Args:
        samples: of these prompts and perhaps of others, with `reward`.
        dataset: the rows with the prompts; their `answer`, if there is one, is shown as the reference.
        groups: `level` and `domain` of each row of `dataset`, where it has them.
        margin, decision_bias, mode_format: as in `report_on`.

    Returns:
        The content of `examples.json`: see docs/evaluation.md. Texts longer than `LONGEST` lose their middle.
    """
    samples, arrays = by_prompt(samples)
    ids = samples[PROMPT_ID].unique()
    think, _, picked = biased_choice(arrays.prob_think, arrays.prob_no_think, arrays.picked, decision_bias)
    mean_scores, mean_lengths = valid_mean(arrays.scores, axis=2), valid_mean(arrays.lengths, axis=2)
    better = _better(arrays, margin)
    keys = _keys(ids, dataset, groups)
    first = samples[samples["sample"] == samples.groupby([PROMPT_ID, "mode"], observed=True)["sample"].transform("min")]
    responses: dict[Any, Any] = {(row[PROMPT_ID], row["mode"]): row for row in first.to_dict("records")}
    places = {int(row): place for place, row in enumerate(ids)}
    found = []
    for row, is_wrong in chosen:
        place, asked = places[row], dataset[row]
        reference = asked.get("answer")
        found.append(
            {
                PROMPT_ID: row,
                **dict(zip(LABELS, keys[place], strict=True)),
                "prompt": shortened(_prompt_text(asked["prompt"])),
                "reference": None if reference is None else shortened(str(reference)),
                "prob_think": float(think[place]),
                "chosen": _mode_name(picked[place]),
                "better": None if better[place] < 0 else _mode_name(better[place]),
                "chosen_for_its_wrong_choice": is_wrong,
                "responses": {
                    mode.value: {
                        **_response(responses[row, mode.value], mode_format),
                        "mean_score": float(mean_scores[place, m]),
                        "mean_tokens": float(mean_lengths[place, m]),
                    }
                    for m, mode in enumerate(MODES)
                },
            }
        )
    return found


def _better(arrays: SampleArrays, margin: float) -> NDArray[np.int64]:
    """The better mode of each prompt."""
    return better_mode(valid_mean(arrays.scores, axis=2), valid_mean(arrays.lengths, axis=2), margin)


def _keys(ids: Iterable[int], dataset: Dataset, groups: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The labels of each prompt."""
    labels = [groups.get(name) or [None] * len(dataset) for name in LABELS]
    return [tuple(values[row] for values in labels) for row in ids]


def _first_of_each(order: Sequence[int], keys: Sequence[Any]) -> Iterator[int]:
    """The first `PER_GROUP` of each group, `LIMIT` in all: of every group the first before any group's second."""
    seen: Counter[Any] = Counter()
    ranked = []
    for place in order:
        ranked.append((seen[keys[place]], place))
        seen[keys[place]] += 1
    ranked.sort(key=lambda entry: entry[0])  # stable: by rank, and by hash within it
    yield from [place for rank, place in ranked if rank < PER_GROUP][:LIMIT]


def _sortable(labels: tuple[Any, ...]) -> list[tuple[bool, bool, Any]]:
    """Numbers before text, and both before no label."""
    return [(label is None, isinstance(label, str), 0 if label is None else label) for label in labels]


def _mode_name(mode: np.int64) -> str:
    return "neither" if mode == OFF_MODE else MODES[int(mode)].value


def _prompt_text(prompt: Any) -> str:
    """A prompt as text; of a conversation with several messages each begins with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _response(sample: Mapping[str, Any], mode_format: ModeFormat) -> dict[str, Any]:
    """A sampled response, taken apart. A malformed one is shown whole, as its answer."""
    text = sample["completion"]
    response = split_response(text, mode_format)
    parts = (response.reasoning, response.answer) if response.well_formed else ("", text)
    return {
        "reasoning": shortened(parts[0]) if sample["mode"] == Mode.THINK else "",
        "answer": shortened(parts[1]),
        "score": float(sample["reward"]),
        "num_tokens": int(sample["num_tokens"]),
        "truncated": bool(sample["truncated"]),
        "faults": list(sample["faults"]),
    }


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text of at most `longest` characters and a note: the middle of a longer one is left out, its end is kept."""
    if len(text) <= longest:
        return text
    end = longest // 4
    start = longest - end
    return f"{text[:start]}\n[… {len(text) - longest:,} characters left out …]\n{text[-end:]}"
