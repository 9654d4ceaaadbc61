"""Filters: quality, language, length and correctness, on made-up and on real texts."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hgpo_trl.data.example import Drop, Example, Step
from hgpo_trl.data.filters import identify, language, quality, repetition, token_limit, unfinished, verified_answers
from hgpo_trl.modes import Mode, add_mode_tokens, format_response
from hgpo_trl.modes.chat_template import set_chat_template

TRACE = "Let me see. Two and two make four, as one can count on one's fingers."


def example(query: str = "What is 2 + 2?", answer: str = "4", reasoning: str = "", **more: object) -> Example:
    mode = Mode.THINK if reasoning else Mode.NO_THINK
    fields: dict = {"source": "s", "domain": "maths", "id": "1", "mode": mode, "answer": answer, "reasoning": reasoning}
    return Example(prompt=[{"role": "user", "content": query}], **(fields | more))


def verdict(step: Step, one: Example) -> str | None:
    (drop,) = step([one])
    return drop.reason if drop else None


@pytest.mark.parametrize(
    "step",
    [quality(), language(["en"]), token_limit(None, None), verified_answers()],
    ids=["quality", "language", "token_limit", "verified_answers"],
)
def test_steps_go_to_worker_processes_and_take_nothing(step: Step) -> None:
    assert pickle.loads(pickle.dumps(step))([]) == []


# --- quality --------------------------------------------------------------------------------------------------

SENTENCE = "A sentence of some length that says something about the matter at hand and then it stops. "


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (example(), None),
        (example(answer="Yes."), None),
        (example(reasoning=TRACE), None),
        (example(mode=None, answer=""), None),
        (example(query="你好"), None),
        (example(query=" \n?! "), "empty_prompt"),
        (example(query="?", mode=None, answer=""), "empty_prompt"),
        (example(answer=" \n"), "empty_answer"),
        (example(mode=Mode.THINK, reasoning=" \n"), "empty_reasoning"),
        (example(reasoning="Easy."), "short_reasoning"),
        (example(answer="```python\nprint(1)"), "truncated"),
        (example(reasoning=TRACE, answer="So\n\\[\nx = "), "truncated"),
        (
            example(
                answer=SENTENCE * 20 + "Then we reverse the list and go on with the next element that we find in the"
            ),
            "truncated",
        ),
        (example(answer="".join(f"{i}: {SENTENCE}" for i in range(20))), None),
        (example(answer=SENTENCE * 20), "repetitive"),
        (example(reasoning=TRACE + "\nWait, let me check." * 60), "repetitive"),
        (example(answer="I do not know. " * 80), "repetitive"),
    ],
)
def test_quality(one: Example, reason: str | None) -> None:
    assert verdict(quality(), one) == reason


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("Here it is:\n```c\nint main() {\n", "code"),
        ("~~~\nopen", "code"),
        ("We get $$x = 1", "formula"),
        ("We get \\[x = 1\n", "formula"),
        ("\\begin{align}\nx &= 1\\\\", "environment"),
        (SENTENCE * 15 + "and so on,", "sentence"),
        ("```c\nint x[2];\n```\nDone", None),
        ("`$$` and then some.", None),
        ("It costs \\$$5$ and \\$$7", None),
        ("He paid \\$$30$.", None),
        ("\\begin{align}x\\end{align}", None),
        ("A matrix \\\\[2pt] row", None),
        ("Short and without an end", None),
        (SENTENCE * 15 + "\nBest regards,\nJane Doe", None),
        (
            SENTENCE * 15
            + "\n- a point that goes on for quite a while, longer than any line would, and ends without a stop",
            None,
        ),
        (
            SENTENCE * 15
            + "\n12. a point that goes on for quite a while, longer than any line would, and ends without stop",
            None,
        ),
        (SENTENCE * 15 + "\n因此我们可以得出结论" * 9, None),
        ("", None),
    ],
)
def test_signs_of_a_cut(text: str, sign: str | None) -> None:
    assert unfinished(text) == sign


def test_what_repeats_itself() -> None:
    assert repetition("\n".join(f"Line number {i} of the text" for i in range(200)), 20) is None
    assert repetition("\n".join(["}"] * 500), 20) is not None  # a loop at the end
    assert repetition("}\n" * 100 + SENTENCE * 2, 20) is None  # braces are code
    assert repetition("| --- | --- |\n" * 15, 20) is None
    assert repetition("The same line again.\n" * 21, 20) == "The same line again."
    assert repetition("The same line again.\n" * 21 + SENTENCE * 30 + "It ends here.", 20) is None  # a small part
    start = "".join(f"Item {i} is new. " for i in range(100))
    assert repetition(start + "And again and again. " * 30, 20)
    assert repetition(start + "And again and again. " * 3, 20) is None
    assert repetition("", 20) is None


@given(st.text(max_size=900), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_quality_takes_any_text(text: str, repeats: int) -> None:
    assert len(quality(max_line_repeats=repeats)([example(answer=text), example(query=text, reasoning=text)])) == 2


def test_quality_of_bad_numbers() -> None:
    with pytest.raises(ValueError, match="min_reasoning must be at least 0; got -1"):
        quality(min_reasoning=-1)


def test_quality_of_real_answers(shared_data: Path) -> None:
    """Human solutions are whole; of the general answers those that were cut off are found, and little else."""
    for name, cut_off in (("math500_test", []), ("olympiadbench_test", ["in the same way as"])):
        rows = json.loads((shared_data / f"{name}.json").read_text())
        solutions = [row["solution"] if isinstance(row["solution"], list) else [row["solution"]] for row in rows]
        drops = quality()([example(answer=answer) for several in solutions for answer in several])
        assert [drop.detail["ends"][-18:] for drop in drops if drop] == cut_off
    rows = json.loads((shared_data / "general_queries.json").read_text())
    drops = quality()([example(row["instruction"], row["output"]) for row in rows])
    ends = [drop.detail["ends"] for drop in drops if drop and drop.reason == "truncated"]
    assert len(ends) == 6
    assert any(end.endswith("reminder of the importance of") for end in ends)
    traces = json.loads((shared_data / "reasoning_traces.json").read_text())
    assert quality()([example(r["problem"], r["message_content"], r["message_thinking"]) for r in traces]) == [None] * 5


# --- language -------------------------------------------------------------------------------------------------

GERMAN = "Schreibe bitte ein kurzes Gedicht über den Herbst und seine bunten Blätter."
CHINESE = "请帮我写一篇关于秋天的短文，谢谢。"


@pytest.mark.parametrize(
    ("one", "part"),
    [
        (example(), None),
        (example("Please write a short poem about autumn and its leaves.", "Leaves fall."), None),
        (example("Ciao!", "Hallo"), None),  # too short to tell
        (example("$x^2 + y^2 = z^2$", "$\\text{Die Lösung dieser Gleichung ist nicht eindeutig bestimmt}$"), None),
        (example("Fix it:\n```python\n# Dieser Text ist ein langer Kommentar in der Datei\n```", "Fixed."), None),
        (example(GERMAN), "query"),
        (example(CHINESE), "query"),
        (example("Write a poem.", GERMAN), "answer"),
        (example("Add.", "4", "好的，我们先来看这个问题，然后一步一步地计算。"), "reasoning"),
    ],
)
def test_language(one: Example, part: str | None) -> None:
    (drop,) = language(["en"])([one])
    assert (drop.detail["part"] if drop else None) == part


def test_several_languages_are_wanted() -> None:
    assert language(["en", "de", "zh"])([example(GERMAN), example(CHINESE), example()]) == [None] * 3


@pytest.mark.parametrize(("wanted", "words"), [([], "give codes of"), (["en", "english"], r"languages=\['english'\]")])
def test_languages_that_are_none(wanted: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        language(wanted)


def test_mathematics_is_not_taken_for_another_language(shared_data: Path) -> None:
    rows = json.loads((shared_data / "math_train.json").read_text())[:2_000]
    rows += json.loads((shared_data / "olympiadbench_test.json").read_text())
    assert language(["en"])([example(row["problem"]) for row in rows]) == [None] * len(rows)


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_has_a_language_or_none(text: str) -> None:
    code, probability = identify(text)
    assert code
    assert 0.0 <= probability <= 1.0


# --- length ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", ["", TRACE])
def test_tokens_are_near_the_chat_templates(tokenizer: PreTrainedTokenizerFast, reasoning: str) -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    add_mode_tokens(tokenizer)
    set_chat_template(tokenizer)
    one = example("1 + 2 + 3 =", "6", reasoning and "1 + 2 = 3, 3 + 3 = 6, " * 10)
    assert token_limit(tokenizer, None)([one]) == [None]
    response = format_response(one.mode or "", one.answer, one.reasoning)
    ids = tokenizer.apply_chat_template([*one.prompt, {"role": "assistant", "content": response}], return_dict=False)
    assert abs(one.num_tokens - len(ids)) <= 12
    assert one.num_tokens > 10


def test_token_limit_is_the_last_length_that_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [example("1 + 2 =" * n, "3") for n in (1, 5, 9)]
    token_limit(tokenizer, None)(examples)
    lengths = [one.num_tokens for one in examples]
    assert lengths == sorted(set(lengths))
    kept = token_limit(tokenizer, lengths[1])(examples)
    assert kept == [None, None, Drop("too_long", {"tokens": lengths[2]})]
    prompt = example("1 + 2 =", "", mode=None)
    token_limit(tokenizer, None)([prompt])
    assert 0 < prompt.num_tokens < lengths[0]


def test_token_limit_without_tokenizer() -> None:
    one = example()
    assert token_limit(None, None)([one]) == [None]
    assert one.num_tokens == 0
    with pytest.raises(ValueError, match="max_tokens=10 needs a tokenizer"):
        token_limit(None, 10)


def test_token_limit_of_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        token_limit(tokenizer, 0)


# --- correctness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (example(answer="It is $\\boxed{4}$.", reference="4"), None),
        (example(answer="The answer is \\boxed{\\frac{1}{2}}.", reference="0.5"), None),
        (example(answer="It is $\\boxed{5}$.", reference="4"), "wrong_answer"),
        (example(answer="It is $\\boxed{5}$."), None),
        (example(answer="It is 5.", reference="4", domain="code"), None),
        (example(answer="", reference="4", mode=None), None),
    ],
)
def test_verified_answers(one: Example, reason: str | None) -> None:
    assert verdict(verified_answers(), one) == reason


def test_verified_answers_keep_the_order(shared_data: Path) -> None:
    rows = json.loads((shared_data / "reasoning_traces.json").read_text())
    make: Callable[[dict, str], Example] = lambda row, gold: example(  # noqa: E731
        row["problem"], row["message_content"], row["message_thinking"], reference=gold
    )
    right = [make(row, row["gtruth_answer"]) for row in rows]
    wrong = [make(row, "123456") for row in rows]
    mixed = [one for pair in zip(right, wrong, strict=True) for one in pair]
    assert [drop and drop.reason for drop in verified_answers()(mixed)] == [None, "wrong_answer"] * len(rows)
