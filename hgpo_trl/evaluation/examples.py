"""Examples of an evaluation: what the model wrote in both modes on some of its prompts, and which mode it chose.

Nobody picks them: within each domain and level they are the first prompts in the order of a hash, and the responses are
the first of each mode. So models evaluated on the same prompts show the same ones. Further prompts, marked as such, are
the first in that order on which the model chose the worse mode. A prompt that the data set repeats is shown once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from hgpo_trl.evaluation.metrics import by_prompt
from hgpo_trl.evaluation.samples import PROMPT_ID, prompts_hash
from hgpo_trl.modes import LHRM, MODES, Mode, ModeFormat, split_response
from hgpo_trl.modes.decision import OFF_MODE
from hgpo_trl.modes.hybrid_accuracy import better_mode, biased_choice, valid_mean

PER_GROUP = 2  # prompts of each domain and level
LIMIT = 40  # of these prompts, in all
WRONG_CHOICES = 8  # prompts with a wrong choice besides
LONGEST = 4000  # characters of a text


def examples_of(
    samples: pd.DataFrame,
    dataset: Dataset,
    groups: Mapping[str, Sequence[Any]],
    margin: float = 0.0,
    decision_bias: float = 0.0,
    mode_format: ModeFormat = LHRM,
) -> list[dict[str, Any]]:
    """Choose prompts as the module's docstring says, and show the first response of either mode to each.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode.
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
    better = better_mode(mean_scores, mean_lengths, margin)
    labels = {name: groups.get(name) or [None] * len(dataset) for name in ("domain", "level")}
    keys = [tuple(values[row] for values in labels.values()) for row in ids]
    prompts = list(dataset["prompt"])  # a Column is decoded at every access
    answers = list(dataset["answer"]) if "answer" in dataset.column_names else [None] * len(dataset)
    places: dict[str, int] = {}  # of distinct prompts
    for place, row in enumerate(ids):
        places.setdefault(prompts_hash([prompts[row]]), place)
    order = [places[key] for key in sorted(places)]

    shown = list(_first_of_each(order, keys))
    wrong = [place for place in order if better[place] >= 0 and picked[place] != better[place]]
    chosen = [(place, False) for place in sorted(shown, key=lambda place: _sortable(keys[place]))]
    chosen += [(place, True) for place in wrong if place not in shown][:WRONG_CHOICES]
    first = samples[samples["sample"] == samples.groupby([PROMPT_ID, "mode"], observed=True)["sample"].transform("min")]
    responses: dict[Any, Any] = {(row[PROMPT_ID], row["mode"]): row for row in first.to_dict("records")}
    found = []
    for place, is_wrong in chosen:
        row = int(ids[place])
        found.append(
            {
                PROMPT_ID: row,
                **dict(zip(labels, keys[place], strict=True)),
                "prompt": shortened(_prompt_text(prompts[row])),
                "reference": None if answers[row] is None else shortened(str(answers[row])),
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
