"""Adapters: rows as the sources publish them, what is wrong with rows, and a user's own files."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgpo_trl.data.adapter import adapt
from hgpo_trl.data.adapters import ADAPTERS
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.own_files import generic, unread
from hgpo_trl.data.traces import CONVENTIONS
from hgpo_trl.modes import TAGS, TRACE_FIELDS, Mode, format_response, split_response

Row = dict[str, Any]

R1 = "<think>\nTwo and two.\n</think>\n\nIt is \\boxed{4}."
OPEN_THOUGHTS = (
    "<|begin_of_thought|>\n\nTwo and two.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>"
)
QUESTION = "What is 2 + 2?"


def user(text: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(
    *texts: str, keys: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ("user", "assistant")
) -> list:
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def oasst_message(text: str, role: str, *replies: Row, rank: int | None = None, **more: Any) -> Row:
    return {"message_id": text, "text": text, "role": role, "lang": "en", "rank": rank, "replies": list(replies)} | more


TREE = oasst_message(
    QUESTION,
    "prompter",
    oasst_message("Five.", "assistant", rank=1),
    oasst_message("Nothing.", "assistant", rank=0, deleted=True),
    oasst_message("Four.", "assistant", oasst_message("Sure?", "prompter", oasst_message("Yes.", "assistant")), rank=0),
)

ROWS: dict[str, Row] = {
    "allenai/WildChat-1M": {
        "conversation_hash": "w1",
        "model": "gpt-4",
        "conversation": [
            {"role": "user", "content": QUESTION, "language": "English", "toxic": False, "redacted": False},
            {"role": "assistant", "content": "Four.", "language": "English", "toxic": False, "redacted": False},
            {"role": "user", "content": "And 3 + 3?", "language": "English", "toxic": False, "redacted": False},
            {"role": "assistant", "content": "Six.", "language": "English", "toxic": False, "redacted": False},
        ],
        "turn": 2,
        "language": "English",
        "toxic": False,
        "redacted": False,
    },
    "OpenAssistant/oasst1": {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": TREE},
    "PrimeIntellect/SYNTHETIC-1": {
        "response_id": "s1",
        "problem_id": "p1",
        "task_type": "verifiable_math",
        "prompt": QUESTION,
        "gold_standard_solution": "2 + 2 = 4",
        "llm_response": R1,
        "verification_info": "{'ground_truth': '4'}",
        "score": 1.0,
    },
    "PrimeIntellect/SYNTHETIC-1-SFT-Data": {
        "response_id": "s2",
        "problem_id": "p1",
        "task_type": "verifiable_code",
        "score": 1.0,
        "messages": chat(QUESTION, R1),
    },
    "open-r1/OpenR1-Math-220k": {
        "problem": QUESTION,
        "solution": "Add.",
        "answer": "4",
        "problem_type": "Algebra",
        "uuid": "u1",
        "is_reasoning_complete": [False, True, True, True],
        "generations": ["<think>cut off", "<think>No.</think>5", R1, "<think>Later.</think>4"],
        "correctness_math_verify": [True, False, True, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 3,
        "messages": chat(QUESTION, "<think>cut off"),
    },
    "open-thoughts/OpenThoughts-114k": {
        "problem": QUESTION,
        "deepseek_reasoning": "Two and two.",
        "deepseek_solution": "It is \\boxed{4}.",
        "ground_truth_solution": "$\\boxed{4}$",
        "domain": "math",
        "source": "numina_math",
        "test_cases": None,
        "starter_code": None,
    },
    "open-r1/codeforces-cots": {
        "id": "1A",
        "title": "Sum",
        "prompt": QUESTION,
        "generation": R1,
        "finish_reason": "stop",
        "messages": chat(QUESTION, R1),
    },
    "KodCode/KodCode-V1-SFT-R1": {
        "style": "instruct",
        "subset": "Leetcode",
        "question_id": "k1",
        "question": QUESTION,
        "solution": "def f(): ...",
        "gpt_difficulty": "easy",
        "r1_solution": "def f(): ...",
        "conversations": chat(QUESTION, R1, keys=("from", "value"), roles=("human", "gpt")),
    },
    "di-zhang-fdu/AOPS": {"link": "a1", "problem": QUESTION},
    "di-zhang-fdu/AIME_1983_2024": {
        "ID": "1983-1",
        "Year": 1983,
        "Problem Number": 1,
        "Question": QUESTION,
        "Answer": 4,
        "Part": None,
    },
    "open-r1/codeforces": {
        "id": "1/A",
        "description": QUESTION,
        "input_format": None,
        "output_format": None,
        "note": None,
        "examples": None,
        "rating": 1000,
    },
    "KodCode/KodCode-V1": {
        "question_id": "k1",
        "question": QUESTION,
        "solution": "def f(): ...",
        "gpt_difficulty": "easy",
    },
    "agentica-org/DeepScaleR-Preview-Dataset": {"problem": QUESTION, "answer": "4", "solution": "Add."},
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": {
        "id": "l1",
        "prompt": QUESTION,
        "chosen": chat(QUESTION, "Four."),
        "rejected": chat(QUESTION, "Five."),
        "source": "tulu-3-sft-reused-off-policy",
    },
}


def kept(name: str, row: Row) -> Example:
    example = adapt(ADAPTERS[name], row, "s")
    assert isinstance(example, Example), example
    return example


def dropped(name: str, row: Row) -> Drop:
    drop = adapt(ADAPTERS[name], row, "s")
    assert isinstance(drop, Drop), drop
    return drop


def test_every_source_of_the_paper_has_an_adapter_and_a_row_here() -> None:
    assert ROWS.keys() == ADAPTERS.keys()
    assert pickle.loads(pickle.dumps(ADAPTERS)) == ADAPTERS  # it goes to worker processes


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_published(name: str) -> None:
    adapter, row = ADAPTERS[name], copy.deepcopy(ROWS[name])
    example = kept(name, row)
    assert row == ROWS[name]  # rows are not changed
    assert example.source == "s"
    assert example.query in (QUESTION, "Sure?")
    assert example.id
    assert example.mode == adapter.mode
    assert (adapter.stage == "hft") == (example.mode is not None)
    if example.mode is Mode.THINK:
        assert (example.reasoning, example.answer) == ("Two and two.", "It is \\boxed{4}.")
    if example.mode is not None:
        parts = split_response(format_response(example.mode, example.answer, example.reasoning))
        assert (parts.reasoning, parts.answer, parts.well_formed) == (example.reasoning, example.answer, True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("allenai/WildChat-1M", {"domain": "general", "id": "w1", "answer": "Four.", "prompt": user()}),
        ("OpenAssistant/oasst1", {"id": "t1", "answer": "Yes.", "prompt": chat(QUESTION, "Four.", "Sure?")}),
        ("PrimeIntellect/SYNTHETIC-1", {"domain": "maths", "id": "s1", "reference": "4"}),
        ("PrimeIntellect/SYNTHETIC-1-SFT-Data", {"domain": "code", "id": "s2", "reference": None}),
        ("open-r1/OpenR1-Math-220k", {"domain": "maths", "id": "u1", "reference": "4"}),
        ("open-thoughts/OpenThoughts-114k", {"domain": "maths", "reference": None}),
        ("KodCode/KodCode-V1-SFT-R1", {"domain": "code", "id": "k1", "level": "easy"}),
        ("di-zhang-fdu/AIME_1983_2024", {"id": "1983-1", "reference": "4", "level": "1", "mode": None}),
        ("open-r1/codeforces", {"id": "1/A", "level": "1000", "domain": "code"}),
        ("agentica-org/DeepScaleR-Preview-Dataset", {"reference": "4", "answer": "", "prompt": user()}),
        ("allenai/llama-3.1-tulu-3-8b-preference-mixture", {"id": "l1", "answer": "", "reference": None}),
    ],
)
def test_what_a_row_says(name: str, expected: Row) -> None:
    example = kept(name, ROWS[name])
    assert {field: getattr(example, field) for field in expected} == expected


def test_other_schemas_of_the_same_sources() -> None:
    conversations = chat(QUESTION, OPEN_THOUGHTS, keys=("from", "value"))
    example = kept("open-thoughts/OpenThoughts-114k", {"system": "Use marks.", "conversations": conversations})
    assert (example.prompt, example.answer, example.domain) == (user(), "It is \\boxed{4}.", "other")
    with_code = ROWS["open-thoughts/OpenThoughts-114k"] | {"domain": "code", "starter_code": "def f():"}
    assert kept("open-thoughts/OpenThoughts-114k", with_code).query == f"{QUESTION}\n\ndef f():"
    example = kept("open-r1/OpenR1-Math-220k", {"problem": QUESTION, "answer": "4", "messages": chat(QUESTION, R1)})
    assert (example.reasoning, len(example.id)) == ("Two and two.", 32)
    as_json = ROWS["PrimeIntellect/SYNTHETIC-1"] | {"verification_info": json.dumps({"ground_truth": "4"})}
    assert kept("PrimeIntellect/SYNTHETIC-1", as_json).reference == "4"
    statement = ROWS["open-r1/codeforces"] | {"input_format": "n", "examples": [{"input": "1", "output": "2"}]}
    assert kept("open-r1/codeforces", statement).query == f"{QUESTION}\n\nInput\nn\n\nExample\n1\n2"


def test_generations_of_one_problem_have_ids_of_their_own() -> None:
    row = ROWS["open-r1/codeforces-cots"]
    other = row | {"generation": "<think>Otherwise.</think>4"}
    ids = {kept("open-r1/codeforces-cots", r).id for r in (row, row, other)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("allenai/WildChat-1M", {"toxic": True}, "toxic"),
        ("allenai/WildChat-1M", {"redacted": True}, "redacted"),
        ("allenai/WildChat-1M", {"conversation": None}, "null_messages"),
        ("allenai/WildChat-1M", {"conversation": []}, "null_messages"),
        ("allenai/WildChat-1M", {"conversation": chat(QUESTION, "")}, "null_messages"),
        ("allenai/WildChat-1M", {"conversation": chat(QUESTION)}, "no_answer"),
        ("allenai/WildChat-1M", {"conversation": chat(QUESTION, "a", roles=("user", "tool"))}, "unknown_role"),
        ("allenai/WildChat-1M", {"conversation": [{"role": "user", "content": None}]}, "null_messages"),
        ("allenai/WildChat-1M", {"conversation": chat(QUESTION, "I say <think>.")}, "tag_in_text"),
        ("allenai/WildChat-1M", {"conversation": chat("What is </no_think>?", "A tag.")}, "tag_in_text"),
        ("allenai/WildChat-1M", {"conversation": chat(QUESTION, "\ud800")}, "invalid_unicode"),
        ("OpenAssistant/oasst1", {"prompt": None}, "missing_field"),
        ("OpenAssistant/oasst1", {"prompt": oasst_message(QUESTION, "prompter")}, "no_answer"),
        ("PrimeIntellect/SYNTHETIC-1", {"score": 0.0}, "not_verified"),
        ("PrimeIntellect/SYNTHETIC-1", {"score": None}, "not_verified"),
        ("PrimeIntellect/SYNTHETIC-1", {"score": float("nan")}, "not_verified"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": "Four."}, "unknown_format"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": "<think>Never closed."}, "unbalanced_tags"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": "Never opened.</think>4"}, "unbalanced_tags"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": "</think>4<think>"}, "unbalanced_tags"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": f"{R1}{R1}"}, "unbalanced_tags"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": f"Well: {R1}"}, "unbalanced_tags"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": "<think>Only this.</think> "}, "no_answer"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": f"{R1} <no_think>"}, "tag_in_text"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": None}, "missing_field"),
        ("PrimeIntellect/SYNTHETIC-1", {"llm_response": " "}, "empty_field"),
        ("PrimeIntellect/SYNTHETIC-1", {"prompt": ["a"]}, "not_text"),
        ("open-r1/OpenR1-Math-220k", {"correctness_math_verify": [False] * 4}, "not_verified"),
        ("open-r1/OpenR1-Math-220k", {"finish_reasons": ["length"] * 4}, "not_verified"),
        ("open-r1/OpenR1-Math-220k", {"generations": []}, "not_verified"),
        ("open-thoughts/OpenThoughts-114k", {"deepseek_reasoning": None}, "missing_field"),
        ("open-thoughts/OpenThoughts-114k", {"deepseek_reasoning": "I <think> so."}, "tag_in_text"),
        ("open-r1/codeforces-cots", {"finish_reason": "length"}, "truncated"),
        ("agentica-org/DeepScaleR-Preview-Dataset", {"answer": ""}, "empty_field"),
        ("allenai/llama-3.1-tulu-3-8b-preference-mixture", {"chosen": None}, "null_messages"),
    ],
)
def test_what_is_wrong_with_a_row(name: str, change: Row, reason: str) -> None:
    assert dropped(name, ROWS[name] | change).reason == reason


@pytest.mark.parametrize("name", ROWS)
def test_an_empty_row_is_no_exception(name: str) -> None:
    assert dropped(name, {}).reason in ("missing_field", "not_verified")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([QUESTION, R1, OPEN_THOUGHTS, "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "replies", "rank"]), inner)
    ),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(ROWS)), data=st.data())
@settings(max_examples=400, deadline=None)
def test_no_value_of_any_column_raises(name: str, data: st.DataObject) -> None:
    row = ROWS[name]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(row)), JSON, min_size=1, max_size=3))
    result = adapt(ADAPTERS[name], row | changed, "s")
    if isinstance(result, Example):
        assert result.prompt[-1]["role"] == "user"
        assert not any(tag in text for tag in TAGS for text in (result.query, result.reasoning, result.answer))
        json.dumps(result.prompt, ensure_ascii=False).encode()


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=30).map(str.strip)


@settings(deadline=None)
@given(reasoning=PLAIN, answer=PLAIN.filter(bool), convention=st.sampled_from(CONVENTIONS))
def test_a_trace_comes_back_as_it_was_marked(reasoning: str, answer: str, convention: Any) -> None:
    for opened, closed in {(convention.answer_open, convention.answer_close), ("", "")}:
        text = f"\n{convention.open}\n{reasoning}\n{convention.close}\n{opened}\n{answer}\n{closed}"
        example = adapt(generic({"prompt": "q", "response": "t"}), {"q": QUESTION, "t": text}, "s")
        assert isinstance(example, Example)
        assert (example.reasoning, example.answer) == (reasoning, answer)
        assert example.mode is (Mode.THINK if reasoning else Mode.NO_THINK)


# --- conversations --------------------------------------------------------------------------------------------


def test_turns_up_to_the_last_answer_without_earlier_traces() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("Hello", R1, QUESTION, R1, "Thanks")]
    example = adapt(generic({"messages": "m"}, mode="think"), {"m": messages}, "s")
    assert isinstance(example, Example)
    assert example.prompt == [messages[0], *chat("Hello", "It is \\boxed{4}.", QUESTION)]
    assert (example.mode, example.reasoning, example.answer) == (Mode.THINK, "Two and two.", "It is \\boxed{4}.")


def test_messages_that_end_with_the_user_are_a_prompt_alone() -> None:
    example = adapt(generic({"messages": "m"}), {"m": chat("Hello", R1, QUESTION)}, "s")
    assert isinstance(example, Example)
    assert (example.mode, example.answer, example.prompt) == (None, "", chat("Hello", "It is \\boxed{4}.", QUESTION))


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("user user assistant", "roles_out_of_order"),
        ("assistant user assistant", "roles_out_of_order"),
        ("user system user assistant", "roles_out_of_order"),
        ("assistant", "no_answer"),
        ("system assistant", "no_answer"),
    ],
)
def test_roles_out_of_order(roles: str, reason: str) -> None:
    messages = [{"role": role, "content": "text"} for role in roles.split()]
    result = adapt(generic({"messages": "m"}), {"m": messages}, "s")
    assert isinstance(result, Drop)
    assert result.reason == reason


# --- a user's own files ---------------------------------------------------------------------------------------

NO_THINK = format_response("no_think", "Four.")


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({"prompt": "q"}, {"q": QUESTION}, (None, "", "")),
        ({"prompt": "q", "answer": "a"}, {"q": QUESTION, "a": " Four.\n"}, (Mode.NO_THINK, "", "Four.")),
        (
            {"prompt": "q", "reasoning": "r", "answer": "a"},
            {"q": QUESTION, "r": "So.", "a": "4"},
            (Mode.THINK, "So.", "4"),
        ),
        ({"prompt": "q", "response": "t"}, {"q": QUESTION, "t": R1}, (Mode.THINK, "Two and two.", "It is \\boxed{4}.")),
        ({"prompt": "q", "response": "t"}, {"q": QUESTION, "t": NO_THINK}, (Mode.NO_THINK, "", "Four.")),
        ({"messages": "m"}, {"m": chat(QUESTION, "Four.")}, (Mode.NO_THINK, "", "Four.")),
        ({"messages": "m"}, {"m": chat(QUESTION, NO_THINK)}, (Mode.NO_THINK, "", "Four.")),
        ({"messages": "m"}, {"m": chat(QUESTION, OPEN_THOUGHTS)}, (Mode.THINK, "Two and two.", "It is \\boxed{4}.")),
    ],
)
def test_forms_of_a_response(fields: dict[str, str], row: Row, expected: tuple) -> None:
    example = adapt(generic(fields), row, "mine")
    assert isinstance(example, Example)
    assert (example.mode, example.reasoning, example.answer) == expected
    assert (example.prompt, example.source, example.domain) == (user(), "mine", "general")


def test_other_fields_and_stable_ids() -> None:
    fields = {"prompt": "q", "system": "s", "reference": "r", "level": "l", "domain": "d", "id": "i"}
    row = {"q": QUESTION, "s": "Be brief.", "r": 4, "l": 3, "d": "maths", "i": 17}
    adapter = pickle.loads(pickle.dumps(generic(fields)))
    example = adapt(adapter, row, "s")
    assert isinstance(example, Example)
    assert example.prompt == [{"role": "system", "content": "Be brief."}, *user()]
    assert (example.reference, example.level, example.domain, example.id) == ("4", "3", "maths", "17")

    def id_of(**change: Any) -> str:
        result = adapt(adapter, row | {"i": None} | change, "s")
        assert isinstance(result, Example)
        return result.id

    assert id_of() == "a28fbea9dd2c9af480f25cfd473e9998"  # in every build
    assert len({id_of(), id_of(q="Another?"), id_of(r=5)}) == 3


@pytest.mark.parametrize(
    ("fields", "row", "reason"),
    [
        ({"prompt": "q", "response": "t"}, {"q": QUESTION, "t": "Four."}, "unknown_format"),
        ({"prompt": "q", "response": "t"}, {"q": QUESTION, "t": "<no_think>Four."}, "unbalanced_tags"),
        ({"messages": "m"}, {"m": chat(QUESTION, "<think>Never closed.")}, "unbalanced_tags"),
        ({"messages": "m"}, {"m": chat(QUESTION, "Four.</no_think>")}, "unknown_format"),
        ({"prompt": "q", "reasoning": "r", "answer": "a"}, {"q": QUESTION, "r": "", "a": "4"}, "empty_field"),
        ({"prompt": "q", "answer": "a"}, {"q": QUESTION}, "missing_field"),
        ({"prompt": "q"}, {"x": QUESTION}, "missing_field"),
        ({"prompt": "q", "answer": "a"}, {"q": QUESTION, "a": {"text": "Four."}}, "not_text"),
    ],
)
def test_what_is_wrong_with_a_row_of_a_user(fields: dict[str, str], row: Row, reason: str) -> None:
    result = adapt(generic(fields), row, "s")
    assert isinstance(result, Drop)
    assert result.reason == reason


# --- traces that are empty, begun in the prompt, or in a field of the message -------------------------------------

QWEN3_AT_ONCE = "<think>\n\n</think>\n\nFour."
UNOPENED = (
    "Two and two.\n</think>\n\nFour.",
    "Two and two.<|end_of_thought|><|begin_of_solution|>Four.<|end_of_solution|>",
)


def both_ways(response: Any, mode: str | None = None) -> list[Example | Drop]:
    """A response read from a column, and from the last message of a conversation."""
    return [
        adapt(generic({"prompt": "q", "response": "t"}, mode=mode), {"q": QUESTION, "t": response}, "s"),
        adapt(generic({"messages": "m"}, mode=mode), {"m": chat(QUESTION, response)}, "s"),
    ]


def test_an_empty_trace_is_no_think() -> None:
    for text in (QWEN3_AT_ONCE, "<think></think>Four.", OPEN_THOUGHTS.replace("Two and two.", " ")):
        for example in both_ways(text):
            assert isinstance(example, Example)
            assert (example.mode, example.reasoning) == (Mode.NO_THINK, "")
            assert example.answer in ("Four.", "It is \\boxed{4}.")
        assert both_ways(text, "no_think") == both_ways(text)
        assert both_ways(text, "think") == [Drop("wrong_mode", {"mode": Mode.NO_THINK})] * 2
    row = ROWS["open-r1/codeforces-cots"] | {"generation": QWEN3_AT_ONCE}
    assert dropped("open-r1/codeforces-cots", row).reason == "wrong_mode"


@pytest.mark.parametrize("text", UNOPENED)
def test_a_trace_that_the_prompt_began(text: str) -> None:
    for drop in both_ways(text):
        assert isinstance(drop, Drop)
        assert drop.reason == "unopened_trace"
        assert "mode: think" in drop.detail["hint"]
    for example in both_ways(text, "think"):
        assert isinstance(example, Example)
        assert (example.mode, example.reasoning, example.answer) == (Mode.THINK, "Two and two.", "Four.")
    earlier = adapt(generic({"messages": "m"}, mode="think"), {"m": chat("Hello", text, QUESTION, text)}, "s")
    assert isinstance(earlier, Example)
    assert earlier.prompt == chat("Hello", "Four.", QUESTION)
    told = adapt(generic({"messages": "m"}, opened_in_prompt=True), {"m": chat(QUESTION, text)}, "s")
    assert isinstance(told, Example)
    assert told.mode is Mode.THINK


@pytest.mark.parametrize("field", TRACE_FIELDS)
@pytest.mark.parametrize("name", ["generic", "PrimeIntellect/SYNTHETIC-1-SFT-Data"])
def test_a_trace_in_a_field_of_the_message_is_kept(field: str, name: str) -> None:
    messages = [*user(), {"role": "assistant", "content": "It is \\boxed{4}.", field: " Two and two.\n"}]
    adapter = generic({"messages": "messages"}) if name == "generic" else ADAPTERS[name]
    row = ROWS["PrimeIntellect/SYNTHETIC-1-SFT-Data"] | {"messages": messages}
    example = adapt(adapter, row, "s")
    assert isinstance(example, Example)
    assert (example.mode, example.reasoning, example.answer) == (Mode.THINK, "Two and two.", "It is \\boxed{4}.")
    messages[1][field] = None
    untraced = adapt(generic({"messages": "messages"}), row, "s")
    assert isinstance(untraced, Example)
    assert untraced.mode is Mode.NO_THINK
    earlier = [*messages[:1], messages[1] | {field: "Once more."}, *user("Sure?"), *chat("", "Yes.")[1:]]
    later = adapt(generic({"messages": "m"}), {"m": earlier}, "s")
    assert isinstance(later, Example)
    assert later.prompt == chat(QUESTION, "It is \\boxed{4}.", "Sure?")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": R1, "thinking": "Two and two."}, None),
        ({"content": R1, "thinking": "Three and one."}, "two_traces"),
        ({"content": "Four.", "thinking": "Two and two.", "reasoning": "Three and one."}, "two_traces"),
        ({"content": "Four.", "thinking": "Two and two.", "reasoning": "Two and two."}, None),
        ({"content": format_response("no_think", "Four."), "thinking": "Two and two."}, "two_traces"),
        ({"content": None, "thinking": "Two and two."}, "null_messages"),
        ({"content": "Four.", "tool_calls": [{"name": "add"}]}, "not_text"),
    ],
)
def test_traces_in_two_places_and_other_fields(message: Row, reason: str | None) -> None:
    result = adapt(generic({"messages": "m"}), {"m": [*user(), {"role": "assistant", **message}]}, "s")
    assert (result.reason if isinstance(result, Drop) else None) == reason
    if isinstance(result, Example):
        assert (result.mode, result.reasoning) == (Mode.THINK, "Two and two.")


# --- several columns, system columns, parts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "query"),
    [({"input": "2 + 2"}, "Add:\n\n2 + 2"), ({"input": ""}, "Add:"), ({"input": None}, "Add:"), ({}, "Add:")],
)
def test_columns_of_one_field_are_joined(more: Row, query: str) -> None:
    fields = {"prompt": ["instruction", "input"], "answer": ["output", "note"], "system": ["role", "style"]}
    row = {
        "instruction": "Add:",
        "output": "Four.",
        "note": "Really.",
        "role": "You add.",
        "style": "Be brief.",
        **more,
    }
    example = adapt(pickle.loads(pickle.dumps(generic(fields))), row, "s")
    assert isinstance(example, Example)
    assert example.prompt == [{"role": "system", "content": "You add.\n\nBe brief."}, *user(query)]
    assert example.answer == "Four.\n\nReally."
    missing = adapt(generic(fields), {"output": "Four."}, "s")
    assert missing == Drop("missing_field", {"field": "instruction or input"})


def test_a_system_column_beside_a_conversation() -> None:
    adapter = generic({"messages": "conversations", "system": "system"})
    shared = chat(QUESTION, "Four.", keys=("from", "value"), roles=("human", "gpt"))
    example = adapt(adapter, {"conversations": shared, "system": "Be brief."}, "s")
    assert isinstance(example, Example)
    assert example.prompt == [{"role": "system", "content": "Be brief."}, *user()]
    for system, own, reason in (("", "x", None), ("x", "x", None), ("y", "x", "two_systems")):
        row = {"conversations": [{"from": "system", "value": own}, *shared], "system": system}
        result = adapt(adapter, row, "s")
        assert (result.reason if isinstance(result, Drop) else None) == reason
        if isinstance(result, Example):
            assert result.prompt == [{"role": "system", "content": "x"}, *user()]


def test_parts_of_text_are_joined_and_others_refused() -> None:
    adapter, first, second = (
        generic({"messages": "m"}),
        {"type": "text", "text": "What is "},
        {"type": "text", "text": "2 + 2?"},
    )
    example = adapt(adapter, {"m": [*user([first, second]), *chat("", "Four.")[1:]]}, "s")  # type: ignore[arg-type]
    assert isinstance(example, Example)
    assert example.query == QUESTION
    for part in ({"type": "image", "image": "a.png"}, {"type": "text", "text": None}, "text", None):
        drop = adapt(adapter, {"m": [*user([first, part]), *chat("", "Four.")[1:]]}, "s")  # type: ignore[arg-type]
        assert isinstance(drop, Drop)
        assert drop.reason == "not_text"


def test_what_looks_like_content_and_is_not_read() -> None:
    rows = [
        {"q": QUESTION, "input": "", "id": "a b c", "tools": [], "url": "http://a", "n": 3},
        {"q": QUESTION, "input": "a longer text", "tools": [{"name": "add"}], "context": {"page": 1}},
    ]
    assert unread({"prompt": "q", "id": "id"}, rows) == ["input", "tools", "context"]
    assert unread({"prompt": ["q", "input"], "id": "id"}, rows) == ["tools", "context"]
    messages = [{"role": "user", "content": QUESTION, "name": "me", "files": ["a.txt"], "thinking": "It is so."}]
    assert unread({"messages": "m"}, [{"m": messages}, {"m": None}, {"m": ["text"]}]) == ["m[].files"]


def test_rows_of_another_mode_than_the_only_one() -> None:
    result = adapt(generic({"prompt": "q", "response": "t"}, mode="think"), {"q": QUESTION, "t": NO_THINK}, "s")
    assert result == Drop("wrong_mode", {"mode": Mode.NO_THINK})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"query": "q"}, "unknown name 'query'; the names are prompt"),
        ({}, "must have either prompt or messages"),
        ({"prompt": "q", "messages": "m"}, "must have either prompt or messages"),
        ({"prompt": "q", "response": "t", "answer": "a"}, "give either response, or answer"),
        ({"prompt": "q", "reasoning": "r"}, "reasoning needs answer"),
        ({"messages": ["m", "n"]}, "messages must be one column"),
        ({"prompt": []}, "prompt names no column"),
    ],
)
def test_fields_that_make_no_adapter(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generic(fields)


def test_real_files(shared_data: Path) -> None:
    """Traces of a model, and general queries with a second column for what they are about."""
    rows = json.loads((shared_data / "reasoning_traces.json").read_text())
    fields = {
        "prompt": "problem",
        "reasoning": "message_thinking",
        "answer": "message_content",
        "reference": "gtruth_answer",
    }
    examples = [adapt(generic(fields, domain="maths"), row, "s") for row in rows]
    assert all(isinstance(example, Example) and example.mode is Mode.THINK for example in examples)
    queries = json.loads((shared_data / "general_queries.json").read_text())
    both = generic({"prompt": ["instruction", "input"], "answer": "output"})
    results = [adapt(both, row, "s") for row in queries]
    assert sum(isinstance(result, Example) for result in results) >= 990
    assert {result.reason for result in results if isinstance(result, Drop)} <= {"empty_field"}
    for row, result in zip(queries, results, strict=True):
        assert isinstance(result, Drop) or row["input"] in result.query
    assert unread({"prompt": "instruction", "answer": "output"}, queries) == ["input"]
    for row, example in zip(rows, examples, strict=True):
        answer = {"role": "assistant", "content": row["message_content"], "thinking": row["message_thinking"]}
        told = adapt(generic({"messages": "m"}), {"m": [*user(row["problem"]), answer]}, "s")
        assert isinstance(told, Example)
        assert isinstance(example, Example)
        assert (told.mode, told.reasoning, told.answer) == (Mode.THINK, example.reasoning, example.answer)
