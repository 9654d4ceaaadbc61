"""Examples of evaluations as blocks of a report: both modes' responses to a prompt side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hgpo_trl.modes import MODES, Mode
from hgpo_trl.reporting.documents import NO_BREAK, Block, Heading, Paragraph, Response, SideBySide
from hgpo_trl.reporting.evaluations import number

EXAMPLES = "examples.json"  # of `hgpo-trl evaluate`
Example = Mapping[str, Any]  # an entry of it

NAMES = {Mode.THINK.value: "Thinking", Mode.NO_THINK.value: "Not thinking"}
_CHOICES = {Mode.THINK.value: "to think", Mode.NO_THINK.value: "to answer at once", "neither": "neither mode"}


def example_blocks(examples: Mapping[str, Sequence[Example]]) -> list[Block]:
    """Show the examples of the last evaluation, with the choices of the others on the same prompts.

    Args:
        examples: name of an evaluation -> content of its `examples.json`.
    """
    if not examples:
        return []
    *others, (name, last) = examples.items()
    elsewhere = {other: {(e["prompt_id"], e["prompt"]): e for e in of} for other, of in others}
    by_chance = [example for example in last if not example["chosen_for_its_wrong_choice"]]
    wrong = [example for example in last if example["chosen_for_its_wrong_choice"]]
    blocks: list[Block] = [
        Heading(f"Responses of {name}"),
        Paragraph(
            "The first prompts of each domain and level in the order of a hash, and to each the first response of "
            "either mode: nobody picked them, and models that were evaluated on the same prompts show the same ones. "
            "Averages are over all responses in that mode."
        ),
        *(_side_by_side(example, elsewhere) for example in by_chance),
    ]
    if wrong:
        blocks += [
            Heading(f"Wrong choices of {name}"),
            Paragraph(
                "Further prompts, the first in that order on which the model chose the worse mode. They show how "
                "it errs, not how often."
            ),
            *(_side_by_side(example, elsewhere) for example in wrong),
        ]
    return blocks


def _side_by_side(example: Example, elsewhere: Mapping[str, Mapping[Any, Example]]) -> SideBySide:
    labels = [
        f"{key} {example[key]}" if key == "level" else str(example[key])
        for key in ("domain", "level")
        if example[key] is not None
    ]
    title = ", ".join([*labels, f"prompt {example['prompt_id']}"])
    facts = [] if example["reference"] is None else [f"Reference: {example['reference']}"]
    facts.append(_choice("The model", example))
    key = (example["prompt_id"], example["prompt"])
    facts += [_choice(f"“{name}”", of[key], brief=True) for name, of in elsewhere.items() if key in of]
    return SideBySide(
        title,
        example["prompt"],
        facts,
        [_response(example, mode.value) for mode in MODES],
    )


def _choice(who: str, example: Example, brief: bool = False) -> str:
    chosen, better = example["chosen"], example["better"]
    text = f"{who} thinks with probability {100 * example['prob_think']:.1f}{NO_BREAK}% and chooses {_CHOICES[chosen]}"
    if brief:
        return f"{text}."
    if better is None:
        return f"{text}. Which mode is better is not known, since one of them has no valid score."
    if chosen == better:
        return f"{text}. The choice is right."
    return f"{text}. The choice is wrong: it is better {_CHOICES[better]}."


def _response(example: Example, mode: str) -> Response:
    response = example["responses"][mode]
    score = number(response["score"])
    verdict = {1.0: "right", 0.0: "wrong"}.get(score, "" if math.isnan(score) else "graded")
    notes = [
        "not scored" if math.isnan(score) else verdict if verdict != "graded" else f"score {score:.2f}",
        f"{response['num_tokens']:,} tokens",
        *(["cut off at the length limit"] if response["truncated"] else []),
        *([f"malformed ({', '.join(response['faults'])})"] if response["faults"] else []),
        f"on average score {_shown(response['mean_score'], '.2f')}, {_shown(response['mean_tokens'], ',.1f')} tokens",
    ]
    badges = [label for label, key in (("chosen", "chosen"), ("better", "better")) if example[key] == mode]
    return Response(NAMES[mode], badges, verdict, notes, response["reasoning"], response["answer"])


def _shown(value: Any, form: str) -> str:
    return "–" if math.isnan(number(value)) else format(value, form)
