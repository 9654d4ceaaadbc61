"""Checks of all rows: what is wrong with them by kind, how long they are, and what becomes of them in the stages."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import ON_CPU, argv
from tokenizers_zoo import FAMILIES, qwen2, tiny_qwen2
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import TAGS, TRACE_FIELDS, add_mode_tokens, format_response
from hgpo_trl.scripts import baselines, evaluate, hft, hgpo
from hgpo_trl.training import checks
from hgpo_trl.training.checks import (
    check_columns,
    check_dataset,
    check_examples,
    check_prompts,
    check_rows,
    count_tokens,
    dropped_rows_file,
    inspect_rows,
    model_positions,
    share_beyond,
    without_dropped,
)
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.rows import EXAMPLES, KINDS, PROMPTS, FaultyRow, Renderer, as_trained, open_row, texts_looked_for
from hgpo_trl.training.trainer import HGPOTrainer

Row = dict[str, Any]

THINK, NO_THINK = format_response("think", "5", "2 + 3 = 5"), format_response("no_think", "5")
TEXT_PART, IMAGE_PART = {"type": "text", "text": "What is 2 + 3?"}, {"type": "image", "image": "sum.png"}


def user(content: Any = "What is 2 + 3?") -> list[Row]:
    return [{"role": "user", "content": content}]


def assistant(content: Any, **fields: Any) -> list[Row]:
    return [{"role": "assistant", "content": content, **fields}]


def example(completion: Any, prompt: Any = None) -> Row:
    return {"prompt": user() if prompt is None else prompt, "completion": completion}


def dataset(rows: list[Row]) -> Dataset:
    return Dataset.from_list(rows, on_mixed_types="use_json")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return as_trained(qwen2())


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer)


def kind_of(row: Row, renderer: Renderer) -> str | None:
    try:
        open_row(row, renderer)
    except FaultyRow as fault:
        return fault.kind
    return None


# --- a row ----------------------------------------------------------------------------------------------------

GOOD_EXAMPLES = [
    example(assistant(THINK)),
    example(assistant(NO_THINK)),
    example(assistant(THINK, reasoning_content=None)),
    example(assistant("5", reasoning_content="2 + 3 = 5")),  # the template writes the trace before the answer
    example(assistant(THINK, reasoning="2 + 3 = 5")),  # twice the same
    example(assistant(THINK), [{"role": "system", "content": ""}, *user()]),
    example(assistant(THINK), [*user(), *assistant(THINK), *user()]),
    example(assistant([{"type": "text", "text": THINK}]), user([TEXT_PART, TEXT_PART])),
    example(THINK, "What is 2 + 3? "),
    example(assistant(NO_THINK), user("What does </b> mean, or <|x|>?")),
]
FAULTY_PROMPTS = {
    "empty_prompt": [None, [], "", " \n", user(""), user(None), user([]), user([{"type": "text", "text": " "}])],
    "not_a_conversation": [[{"from": "human", "value": "Hi"}], [{"content": "Hi"}], ["Hi"], {"role": "user"}, 3],
    "not_text": [
        user([IMAGE_PART, TEXT_PART]),
        user([{"type": "audio"}]),
        user(["Hi"]),
        user(3),
        [*user([IMAGE_PART]), *assistant("A sum."), *user()],
        user(json.dumps([IMAGE_PART, TEXT_PART])),  # `datasets` makes text of what comes after the first rows
    ],
    "last_role": [[*user(), *assistant("Well")]],
    "opened_mode": [user("What is 2 + 3? <think>"), "2 + 3? <no_think>\n", [*user(), *assistant("<think>\n")]],
    "unknown_role": [
        [*user(), {"role": "tool", "content": "5"}, *user()],
        [{"role": "developer", "content": "Be brief."}, *user()],
    ],
}
FAULTY_COMPLETIONS = {
    "no_mode": [assistant("5"), assistant("It is <think>2 + 3</think>5"), assistant("5", reasoning_content=None)],
    "unclosed": [assistant("<think>2 + 3"), assistant("<no_think>5")],
    "nested": [assistant("<think>2 <think>+</think> 3</think>5"), assistant(f"{THINK}{THINK}")],
    "think_in_no_think": [assistant("<no_think><thinking>2 + 3</thinking>5</no_think>")],
    "trailing_text": [assistant(f"{NO_THINK} or 6")],
    "empty_answer": [assistant("<think>2 + 3 = 5</think> "), assistant("<no_think></no_think>")],
    "empty_completion": [None, [], assistant(""), assistant(None), assistant(" \n", reasoning_content="")],
    "completion_roles": [user(THINK), [*assistant(THINK), *user()], [*user(), *assistant(THINK)]],
    "lost_trace": [
        *(assistant("5", **{field: "Two and three."}) for field in TRACE_FIELDS if field != "reasoning_content"),
        assistant(NO_THINK, reasoning_content="Two and three."),
        assistant(THINK, reasoning_content="Two and three."),
    ],
    "not_text": [assistant([IMAGE_PART])],
    "mixed_kinds": [THINK],
}
FAULTY = [
    *(({"prompt": prompt}, kind) for kind, prompts in FAULTY_PROMPTS.items() for prompt in prompts),
    *((example(completion), kind) for kind, completions in FAULTY_COMPLETIONS.items() for completion in completions),
    (example(" ", "What is 2 + 3?"), "empty_completion"),
    (example("5", "What is 2 + 3?"), "no_mode"),
    (example(assistant(THINK), "What is 2 + 3?"), "mixed_kinds"),
    (example(assistant(THINK)) | {"chat_template_kwargs": {"thinking_mode": "think"}}, "opened_mode"),
    (example(assistant(THINK)) | {"tools": json.dumps([{"name": "add"}])}, "chat_template"),
]


@pytest.mark.parametrize("row", GOOD_EXAMPLES, ids=lambda row: str(row)[-60:])
def test_good_rows(row: Row, renderer: Renderer) -> None:
    assert kind_of(row, renderer) is None
    assert kind_of({"prompt": row["prompt"]}, renderer) is None


def test_a_text_may_be_json(renderer: Renderer) -> None:
    assert kind_of({"prompt": user('[{"type": "sum", "of": [2, 3]}]')}, renderer) is None


@pytest.mark.parametrize(("row", "kind"), FAULTY, ids=lambda value: str(value)[-60:])
def test_kinds_of_faults(row: Row, kind: str, renderer: Renderer) -> None:
    assert kind_of(row, renderer) == kind
    assert kind in KINDS


def test_a_template_that_opens_a_mode_itself_and_one_that_is_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    assert kind_of({"prompt": user()}, Renderer(tokenizer, {"enable_thinking": True})) == "opened_mode"
    with pytest.raises(UserError, match="no chat template"):
        open_row({"prompt": user()}, Renderer(qwen2()))
    assert kind_of({"prompt": "2 + 3?"}, Renderer(qwen2())) is None


@pytest.mark.parametrize(
    ("condition", "refused", "taken"),
    [
        ("message.content is string and '<|channel|>' in message.content", user("<|channel|>"), user("channel")),
        ("message.content.startswith('Never')", user("Never mind."), user("Mind.")),
        ("(message.role == 'user') != (loop.index0 % 2 == 0)", [*user(), *user()], user()),
        ("message['role'] == 'system'", [{"role": "system", "content": "x"}, *user()], user()),
        ("message.content is not string", user([TEXT_PART]), user()),
        ("messages[0].content.split(' ')[0] == word", user("word x"), user("x")),
        ("message.content == 'Hi'", user("Hi"), user("Hello")),
    ],
)
def test_what_a_template_refuses_is_found_among_rows_of_the_same_shape(
    condition: str, refused: list[Row], taken: list[Row]
) -> None:
    tokenizer = qwen2()
    tokenizer.chat_template = (
        "{% set word = 'word' %}{% for message in messages %}"
        f"{{% if {condition} %}}{{{{ raise_exception('No, thanks.') }}}}{{% endif %}}"
        "{{ message.role ~ ': ' ~ message.content }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    faults, _ = inspect_rows(dataset([{"prompt": p} for p in (taken, refused, taken)]), Renderer(tokenizer), PROMPTS)
    assert [(fault.row, fault.kind, fault.detail) for fault in faults] == [(1, "chat_template", "No, thanks.")]


def test_texts_that_a_template_looks_for(tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(TAGS) <= set(texts_looked_for(str(tokenizer.chat_template)) or ())
    assert texts_looked_for("{{ 'a' in m and m.b.split('c') and m.d | replace('e', 'f') and x in ['g'] }}") == (
        "a", "c", "e",
    )  # fmt: skip
    assert texts_looked_for("{% if messages[0].role in roles %}{{ m['role'] in roles }}{% endif %}") == ()
    for unclear in ("{{ x in messages[0].content }}", "{{ a.startswith(b) }}", "{% if %}"):
        assert texts_looked_for(unclear) is None


PIECES = st.sampled_from(
    ["2 + 3?", "<think>", "</think>", "<no_think>", "</no_think>", "é", "\n", " ", "five", "[THINK]"]
)
TEXT = st.lists(PIECES, max_size=6).map("".join)
CONTENT = TEXT | st.none() | st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=2)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "system", "tool"]), "content": CONTENT},
    optional={"reasoning_content": TEXT | st.none()},
)
PROMPT = st.lists(MESSAGE, max_size=2).map(lambda messages: [*messages, *user()]) | st.lists(MESSAGE, max_size=3)
WELL_FORMED = st.sampled_from([THINK, NO_THINK])
COMPLETION = st.tuples(WELL_FORMED | CONTENT, TEXT | st.none()).map(lambda x: assistant(x[0], reasoning_content=x[1]))
ROWS = st.lists(st.fixed_dictionaries({"prompt": PROMPT, "completion": COMPLETION}), min_size=1, max_size=8)


@given(rows=ROWS)
@settings(max_examples=150)
def test_one_rendering_for_all_of_a_shape_says_the_same_as_one_for_each(tokenizer: Any, rows: list[Row]) -> None:
    shared, alone = Renderer(tokenizer), Renderer(tokenizer, share=False)

    def found(row: Row, renderer: Renderer) -> tuple[Any, ...]:
        try:
            return open_row(row, renderer)
        except FaultyRow as fault:
            return fault.args

    for row in rows:
        assert found(row, shared) == found(row, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_has_more_tokens_than_its_bound(family: str) -> None:
    renderer = Renderer(as_trained(FAMILIES[family]()))
    rows = dataset([row for row in GOOD_EXAMPLES if not isinstance(row["prompt"], str)] * 2)
    faults, lengths = inspect_rows(rows, renderer, EXAMPLES)
    assert not faults
    tokens = count_tokens(rows, range(len(rows)), renderer)
    assert (tokens <= lengths.most).all()
    rendered = [
        renderer.tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
        for row in rows
    ]
    assert tokens.tolist() == [len(ids) for ids in rendered]


# --- all rows -------------------------------------------------------------------------------------------------

ROWS_OF_ALL_KINDS = [example(assistant(THINK)) for _ in range(20)] + [
    example(assistant("5")),
    example(assistant("6")),
    example(assistant("7")),
    example(assistant(THINK), user([IMAGE_PART])),
    example(NO_THINK, "What is 2 + 3?"),
    example(assistant(NO_THINK)),
]


def test_faults_are_counted_by_kind_with_the_first_row_of_each(renderer: Renderer) -> None:
    with pytest.raises(UserError) as caught:
        check_rows("train_data", dataset(ROWS_OF_ALL_KINDS), renderer, EXAMPLES)
    lines = str(caught.value).splitlines()
    assert lines[0] == "train_data: 5 of 26 rows are faulty."
    assert lines[1] == f"  no_mode: 3 rows, {KINDS['no_mode']}. The first is row 20: '5'"
    assert lines[2].startswith("  not_text: 1 row, ")
    assert lines[2].endswith("The first is row 23: a part of type image in the user's message")
    assert lines[3].endswith("The first is row 24: prompt: 'What is 2 + 3?'")
    assert "drop_faulty_rows" in lines[4]


def test_faulty_rows_are_left_out_and_listed(renderer: Renderer, tmp_path: Path, capsys: Any) -> None:
    rows, path = dataset(ROWS_OF_ALL_KINDS), tmp_path / "out" / "dropped_train_data.jsonl"
    kept, lengths = check_rows("train_data", rows, renderer, EXAMPLES, dropped=path)
    assert "left out 5 of 26 rows (3 no_mode, 1 not_text, 1 mixed_kinds)" in capsys.readouterr().out
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["row"] for entry in listed] == [20, 21, 22, 23, 24]
    assert listed[0] == {"row": 20, "kind": "no_mode", "detail": "'5'"}
    assert kept[:] == rows.select([*range(20), 25])[:] == without_dropped(rows, path)[:]
    assert len(lengths.most) == len(lengths.think) == 21
    assert lengths.think.sum() == 20
    again, _ = check_rows("train_data", rows, renderer, EXAMPLES, dropped=tmp_path / "no", is_main_process=False)
    assert again[:] == kept[:]
    assert not (tmp_path / "no").exists()
    assert check_rows("train_data", kept, renderer, EXAMPLES)[0][:] == kept[:]


def test_a_data_set_of_which_nothing_would_be_left_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 2 rows are faulty"):
        check_rows("data", dataset([{"prompt": ""}] * 2), renderer, PROMPTS, dropped=tmp_path / "list")


@pytest.mark.parametrize("texts", [1, 5])
def test_of_two_kinds_of_rows_the_rarer_one_is_faulty(texts: int, renderer: Renderer) -> None:
    rows = [{"prompt": "Hi"}] * texts + [{"prompt": user()}] * 3
    faults, _ = inspect_rows(dataset(rows), renderer, PROMPTS)
    assert [fault.row for fault in faults] == ([0] if texts == 1 else [5, 6, 7])
    assert {fault.kind for fault in faults} == {"mixed_kinds"}


def test_columns_of_another_format_and_other_columns_do_not_matter(renderer: Renderer) -> None:
    rows = Dataset.from_dict({"x": [1.0, 2.0], "prompt": [user(), user()], "completion": [assistant("5")] * 2})
    assert inspect_rows(rows.with_format("torch", columns=["x"]), renderer, PROMPTS)[0] == []


# --- lengths --------------------------------------------------------------------------------------------------


def long_examples(short: int, long: int) -> Dataset:
    trace = format_response("think", "5", "2 + 3 = 5. " * 40)
    return dataset([example(assistant(NO_THINK))] * short + [example(assistant(trace))] * long)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(checks.logger, "warning_once", found.append)
    return found


def test_a_share_is_counted_or_estimated(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = long_examples(30, 10)
    _, lengths = inspect_rows(rows, renderer, EXAMPLES)
    assert share_beyond(rows, lengths, 100, renderer) == (0.25, 1.0, True)
    assert share_beyond(rows, lengths, 10**6, renderer) == (0.0, 0.0, True)
    monkeypatch.setattr(checks, "SAMPLE_ROWS", 4)
    assert share_beyond(rows, lengths, 100, renderer) == (0.25, 1.0, False)


def test_rows_that_are_cut_off_are_warned_of(renderer: Renderer, warnings: list[str]) -> None:
    check_examples("train_data", long_examples(30, 10), renderer, max_length=100, positions=4096)
    (text,) = warnings
    assert "25.0% of the rows and 100.0% of those that think are longer than max_length=100 tokens" in text
    check_examples("train_data", long_examples(30, 10), renderer, max_length=10_000)
    assert len(warnings) == 1


def test_rows_beyond_the_positions_are_faulty_unless_they_are_cut_off(
    renderer: Renderer, warnings: list[str], tmp_path: Path
) -> None:
    rows = long_examples(3, 2)
    for max_length in (None, 512):
        with pytest.raises(UserError, match=r"too_long: 2 rows.*The first is row 3: .* tokens of at most 100"):
            check_examples("train_data", rows, renderer, max_length=max_length, positions=100)
    assert len(check_examples("train_data", rows, renderer, max_length=50, positions=100)) == 5
    kept = check_examples("train_data", rows, renderer, max_length=None, positions=100, dropped=tmp_path / "list")
    assert len(kept) == 3


def test_prompts_and_the_positions_that_are_left_to_responses(renderer: Renderer, warnings: list[str]) -> None:
    rows = dataset([{"prompt": user()}, {"prompt": user("2 + 3? " * 40)}])
    with pytest.raises(UserError, match=r"too_long: 1 row.*The first is row 1"):
        check_prompts("data", rows, renderer, positions=100)
    check_prompts("data", rows, renderer, positions=500, max_new_tokens=50)
    assert warnings == []
    check_prompts("data", rows, renderer, positions=500, max_new_tokens=400)
    assert "50.0% of the prompts, with a response of 400 tokens, are longer than the 500 positions" in warnings[0]


def test_positions_of_a_model(tmp_path: Path) -> None:
    model = tiny_qwen2(64)
    model.config.max_position_embeddings = 321
    model.config.save_pretrained(tmp_path)
    assert model_positions(model.config) == model_positions(str(tmp_path)) == 321
    assert model_positions(str(tmp_path), {"max_position_embeddings": 4096}) == 4096


# --- data sets ------------------------------------------------------------------------------------------------


def test_columns() -> None:
    for rows, words in (
        ([], "is empty"),
        ([{"q": "a"}], "no column `prompt`"),
        ([{"prompt": "a", "response": "b"}], "`response`"),
    ):
        with pytest.raises(UserError, match=words):
            check_columns("data", dataset(rows))
    with pytest.raises(UserError, match=r"data must be a datasets\.Dataset"):
        check_columns("data", ["a"])
    with pytest.raises(UserError, match=r"lacks the column completion.*\['prompt'\]"):
        check_examples("data", dataset([{"prompt": "a"}]), Renderer(qwen2()), max_length=None)


def test_of_a_stream_the_first_row_is_looked_at(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": user()}, {"prompt": ""}]
    check_dataset("data", IterableDataset.from_generator(lambda: iter(rows)), tokenizer)
    with pytest.raises(UserError, match="empty_prompt: 1 row"):
        check_dataset("data", IterableDataset.from_generator(lambda: iter(rows[::-1])), tokenizer)


# --- in the stages ----------------------------------------------------------------------------------------------

TRAINING = ON_CPU | {
    "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "attn_implementation": "sdpa",
}  # fmt: skip


STAGE_II = TRAINING | {"per_device_train_batch_size": 4, "max_steps": 1, "max_completion_length": 4, "beta": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without tags or template."""
    path, tokenizer = tmp_path_factory.mktemp("base"), qwen2()
    tokenizer.save_pretrained(path)
    tiny_qwen2(len(tokenizer)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hybrid(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with both, as Stage I leaves it."""
    path, tokenizer = tmp_path_factory.mktemp("hybrid"), as_trained(qwen2())
    model = AutoModelForCausalLM.from_pretrained(base)
    add_mode_tokens(tokenizer, model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is an error."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded before the data was checked")

    monkeypatch.setattr("hgpo_trl.scripts.hft.create_model_from_path", load)
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load)
    monkeypatch.setattr("hgpo_trl.scripts.evaluate.loaded_sampler", load)


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def words(**fields: Any) -> list[str]:
    return argv(fields)


def hft_words(base: Path, data: Path, out: Path, **fields: Any) -> list[str]:
    return words(model_name_or_path=base, train_data=data, output_dir=out, max_length=256, **{**TRAINING, **fields})


HALF_WITH_A_TRACE = [
    row
    for _ in range(4)
    for row in (example(assistant("5", reasoning_content="2 + 3 = 5")), example(assistant("5", reasoning_content=None)))
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("field", ["train_data", "eval_data"])
def test_hft_refuses_faulty_rows_before_the_model_is_loaded(base: Path, tmp_path: Path, field: str) -> None:
    good = write(tmp_path / "good.jsonl", [example(assistant(THINK))] * 4)
    bad = write(tmp_path / "bad.jsonl", HALF_WITH_A_TRACE)
    with pytest.raises(UserError, match=rf"{field}='.*': 4 of 8 rows are faulty\.\n  no_mode: 4 rows.*first is row 1"):
        hft.main([*hft_words(base, good, tmp_path / "out"), f"--{field}", str(bad)])


def test_hft_leaves_faulty_rows_out_and_resumes_the_same(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", HALF_WITH_A_TRACE)
    argv = hft_words(base, data, tmp_path / "out", drop_faulty_rows=True, save_strategy="steps", save_steps=1)
    hft.main(argv)
    listed = (tmp_path / "out" / "dropped_train_data.jsonl").read_text()
    assert [json.loads(line)["row"] for line in listed.splitlines()] == [1, 3, 5, 7]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0  # of four rows
    hft.main(argv)  # goes on from its last checkpoint
    assert (tmp_path / "out" / "dropped_train_data.jsonl").read_text() == listed


def test_hft_warns_of_trls_default_length(base: Path, tmp_path: Path, warnings: list[str]) -> None:
    trace = format_response("think", "5", "2 + 3 = 5. " * 400)
    data = write(tmp_path / "rows.jsonl", [example(assistant(trace)), example(assistant(NO_THINK))] * 2)
    argv = hft_words(base, data, tmp_path / "out", max_steps=1)
    place = argv.index("--max_length")
    hft.main(argv[:place] + argv[place + 2 :])
    assert "50.0% of the rows and 100.0% of those that think are longer than max_length=1,024" in warnings[0]


STAGE_II_FAULTS = [
    ([*user(), {"role": "tool", "content": "5"}], "unknown_role"),
    (user([IMAGE_PART, TEXT_PART]), "not_text"),
    ("What is 2 + 3?", "mixed_kinds"),
    (user("2 + 3? " * 40_000), "too_long"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("prompt", "kind"), STAGE_II_FAULTS, ids=[kind for _, kind in STAGE_II_FAULTS])
def test_stage_two_and_evaluation_refuse_one_faulty_prompt(
    prompt: Any, kind: str, hybrid: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": user(f"{i} + 3?"), "answer": str(i + 3)} for i in range(8)]
    data = write(tmp_path / "rows.jsonl", [*rows[:5], {"prompt": prompt, "answer": "5"}, *rows[5:]])
    refused = rf"1 of 9 rows are faulty\.\n  {kind}: 1 row.*The first is row 5"
    with pytest.raises(UserError, match=refused):
        hgpo.main(words(model_name_or_path=hybrid, train_data=data, output_dir=tmp_path / "out", **STAGE_II))
    with pytest.raises(UserError, match=refused):
        evaluate.main(words(model=hybrid, data=data, output_dir=tmp_path / "eval"))
    args = HGPOConfig(str(tmp_path / "library"), use_cpu=True, bf16=False, report_to="none")
    mixed = dataset([json.loads(line) for line in data.read_text().splitlines()])
    with pytest.raises(UserError, match=refused):
        HGPOTrainer(str(hybrid), [len], args, mixed)


def test_evaluation_and_baselines_leave_the_same_prompts_out(hybrid: Path, tmp_path: Path) -> None:
    rows = [{"prompt": user(f"{i} + 3?"), "answer": str(i + 3)} for i in range(4)]
    data = write(tmp_path / "rows.jsonl", [rows[0], {"prompt": user([IMAGE_PART]), "answer": "5"}, *rows[1:]])
    argv = words(
        model=hybrid, data=data, output_dir=tmp_path / "eval", samples_per_mode=2, max_new_tokens=4, dtype="float32",
        drop_faulty_rows=True,
    )  # fmt: skip
    evaluate.main(argv)
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["settings"]["num_prompts"] == 4
    assert dropped_rows_file(tmp_path / "eval", "data").is_file()
    evaluate.main([*argv, "--rescore", "true"])
    args = baselines.BaselineArguments(samples=str(tmp_path / "eval"), train_data=str(data))
    _, queries = baselines._load_samples(args)
    assert queries["answer"][:] == ["3", "4", "5", "6"]


def test_hgpo_leaves_faulty_prompts_out(hybrid: Path, tmp_path: Path) -> None:
    rows = [{"prompt": user(f"{i} + 3?"), "answer": str(i + 3)} for i in range(4)]
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": user([IMAGE_PART]), "answer": "5"}])
    argv = words(model_name_or_path=hybrid, train_data=data, output_dir=tmp_path / "out", **STAGE_II)
    hgpo.main([*argv, "--drop_faulty_rows", "true"])
    assert [json.loads(line)["row"] for line in (tmp_path / "out" / "dropped_train_data.jsonl").open()] == [4]
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- real rows ------------------------------------------------------------------------------------------------


def test_real_rows(shared_data: Path, renderer: Renderer, warnings: list[str]) -> None:
    """Traces, solutions and chats: what is wrong with them is what a plain look at them finds."""

    def load(name: str) -> list[Row]:
        return json.loads((shared_data / f"{name}.json").read_text())

    traces = [
        example(assistant(row["message_content"], reasoning_content=row["message_thinking"]), user(row["problem"]))
        for row in load("reasoning_traces")
    ]
    queries = load("general_queries")
    chats = [
        example(assistant(f"<no_think>\n{row['output']}\n</no_think>"), user(row["instruction"])) for row in queries
    ]
    untagged = [example(assistant(row["solution"]), user(row["problem"])) for row in load("aime_train")]
    rows = dataset([*traces, *chats, *untagged])
    faults, lengths = inspect_rows(rows, renderer, EXAMPLES)
    of_kind = {kind: [fault.row for fault in faults if fault.kind == kind] for kind in {f.kind for f in faults}}
    empty = [i for i, row in enumerate(queries, len(traces)) if not row["output"].strip()]
    assert of_kind.pop("empty_answer", []) == empty
    assert of_kind.pop("no_mode") == list(range(len(traces) + len(chats), len(rows)))
    assert not of_kind
    assert lengths.think[: len(traces)].all()
    assert not lengths.think[len(traces) :].any()
    tokens = count_tokens(rows, range(len(traces)), renderer)
    assert (tokens <= lengths.most[: len(traces)]).all()
    prompts = dataset([{"prompt": user(row["problem"])} for row in load("math_train")])
    assert inspect_rows(prompts, renderer, PROMPTS)[0] == []
