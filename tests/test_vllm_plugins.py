"""What is plugged into vLLM, without an engine: the reasoning parser inside vLLM's own, and the decision bias."""

import asyncio
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_splitter import TEXTS, without_blanks
from transformers import PreTrainedTokenizerFast

from hgpo_trl.modes import MODES, PRESETS, Fault, Mode, format_response, mode_tokens, split_response
from hgpo_trl.modes.chat_template import settle_format
from hgpo_trl.scripts import serve
from hgpo_trl.serving.splitter import split_whole
from hgpo_trl.serving.vllm_deltas import SplitDeltas
from hgpo_trl.tasks import chain_sum
from hgpo_trl.tasks.embedded import build_tokenizer

# Looked up, not imported: that takes seconds, also where these tests are not the ones to run.
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (the extra `vllm`)")

TOKENIZER = build_tokenizer(chain_sum)
TOKENS = mode_tokens(TOKENIZER)
WORDS = TOKENIZER.convert_tokens_to_ids("let 3 + = a".split())
MESSAGES = [{"role": "user", "content": "a = 3 </think> sum mod 10 ?"}]  # a tag in a prompt means nothing

IDS = st.lists(st.sampled_from([*TOKENS.ids, *TOKENS.ids, *WORDS]), max_size=12)
FORCED = st.sampled_from([None, *MODES])

Fields = dict[str, str]


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def request(**fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(model="model", messages=MESSAGES, **fields)


@pytest.fixture(scope="module")
def make_parser() -> Callable[[Mode | None], Any]:
    """The parser as vLLM's server builds it for a request, from the file that its command line names."""
    from vllm.parser.parser_manager import ParserManager
    from vllm.reasoning import ReasoningParserManager

    words = serve.command("model", [])
    ReasoningParserManager.import_reasoning_parser(words[words.index("--reasoning-parser-plugin") + 1])
    parser = ParserManager.get_parser(reasoning_parser_name=words[words.index("--reasoning-parser") + 1])
    assert parser is not None

    def make(forced: Mode | None, variables: dict[str, Any] | None = None) -> Any:
        if variables is None:
            variables = {} if forced is None else {"thinking_mode": str(forced)}
        return parser(TOKENIZER, None, chat_template_kwargs=variables, model_config=None)

    return make


def prompt(forced: Mode | None) -> list[int]:
    mode = "auto" if forced is None else str(forced)
    encoded = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, thinking_mode=mode, return_dict=True)
    return encoded["input_ids"]


def stream(parser: Any, deltas: list[tuple[str, list[int]]], forced: Mode | None, **fields: Any) -> Fields:
    """The fields of a response that arrives in these pieces, the last of which ends it."""
    found: Fields = {}
    for index, (text, ids) in enumerate(deltas):
        finished = index == len(deltas) - 1
        message = parser.parse_delta(text, ids, request(**fields), prompt_token_ids=prompt(forced), finished=finished)
        for field in ("reasoning", "content"):
            if message is not None and (piece := getattr(message, field)) is not None:
                found[field] = found.get(field, "") + piece
    return found


def whole(parser: Any, text: str) -> Fields:
    reasoning, content, calls = parser.parse(text, request())
    assert not calls
    return {field: value for field, value in (("reasoning", reasoning), ("content", content)) if value is not None}


# --- the reasoning parser ---------------------------------------------------------------------------------------


@given(IDS, FORCED, st.data())
def test_streamed_as_whole(
    make_parser: Callable[..., Any], ids: list[int], forced: Mode | None, data: st.DataObject
) -> None:
    """Deltas of whole tokens, one or several, as an engine gives them."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)}) if ids else [0, 0]
    deltas = [(text_of(ids[:end]).removeprefix(text_of(ids[:start])), ids[start:end]) for start, end in pairwise(cuts)]
    assert "".join(text for text, _ in deltas) == text_of(ids)
    fields = stream(make_parser(forced), deltas, forced)
    assert fields == whole(make_parser(forced), text_of(ids))

    expected = split_response((forced.open_tag if forced else "") + text_of(ids))
    assert fields.get("reasoning", "") == expected.reasoning
    assert ("reasoning" in fields) == (expected.mode is Mode.THINK)
    if Fault.TRAILING_TEXT not in expected.faults:
        assert fields.get("content", "") == expected.answer

    hidden = stream(make_parser(forced), deltas, forced, include_reasoning=False)
    assert hidden.get("content", "") == fields.get("content", "")
    assert "reasoning" not in hidden


@given(TEXTS, FORCED, st.lists(st.integers(0, 40), max_size=12))
def test_tags_cut_anywhere(make_parser: Callable[..., Any], text: str, forced: Mode | None, cuts: list[int]) -> None:
    """As a stop string has it: vLLM holds back as many letters as it may turn out to have."""
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    deltas = [(text[start:end], [WORDS[0]]) for start, end in pairwise([0, *ends])]
    assert stream(make_parser(forced), deltas, forced) == whole(make_parser(forced), text) == split_whole(text, forced)


@given(IDS, FORCED)
def test_token_ids_as_text(make_parser: Callable[..., Any], ids: list[int], forced: Mode | None) -> None:
    parser = make_parser(forced)
    fields = whole(parser, text_of(ids))
    content = parser.reasoning_parser.extract_content_ids(ids)
    assert without_blanks(text_of(content)) == without_blanks(fields.get("content", ""))
    # In this tokenizer a word is a token, tags included.
    assert parser.count_reasoning_tokens(ids) == len(fields.get("reasoning", "").split())


@pytest.mark.parametrize(
    ("variables", "forced"),
    [
        ({}, None),
        ({"thinking_mode": "auto"}, None),
        ({"thinking_mode": "auto", "enable_thinking": False}, None),
        ({"thinking_mode": "think"}, Mode.THINK),
        ({"thinking_mode": "no_think", "enable_thinking": True}, Mode.NO_THINK),
        ({"thinking_mode": None, "enable_thinking": True}, Mode.THINK),
        ({"enable_thinking": False}, Mode.NO_THINK),
        ({"enable_thinking": None}, None),
    ],
)
def test_the_mode_is_the_one_that_the_template_forces(
    make_parser: Callable[..., Any], variables: dict[str, Any], forced: Mode | None
) -> None:
    rendered = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **variables)
    last = rendered.rsplit("Assistant:")[-1]
    assert last == (forced.open_tag if forced else "")
    assert whole(make_parser(None, variables), " 3") == split_whole(" 3", forced)


def test_where_a_grammar_begins(make_parser: Callable[..., Any]) -> None:
    """Asked by the engine, whose parser sees token ids only."""
    for forced in (None, Mode.THINK):
        parser = make_parser(forced).reasoning_parser
        assert not parser.is_reasoning_end(prompt(forced))
        assert not parser.is_reasoning_end_streaming([TOKENS.think, *WORDS], WORDS)
        assert parser.is_reasoning_end_streaming([TOKENS.think, *WORDS, TOKENS.end_think], [TOKENS.end_think])
    assert make_parser(None).reasoning_parser.is_reasoning_end_streaming([TOKENS.no_think], [TOKENS.no_think])


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"choice": ["1", "2"]}}, True),
    ],
)
def test_a_grammar_begins_at_once_in_forced_no_think(
    make_parser: Callable[..., Any], fields: dict[str, Any], grammar: bool
) -> None:
    for forced in (None, *MODES):
        adjusted = make_parser(forced).adjust_request(request(**fields))
        assert adjusted.include_reasoning != (grammar and forced is Mode.NO_THINK)


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("<think>\n1 + 2\n</think>\n\n3", {}),
        ("<think>\n1 + 2\n</think>\n\n3", {"enable_thinking": True}),
        ("<think>\n\n</think>\n\n3 = 3", {}),
        ("3 = 3", {"enable_thinking": False}),
        ("<think>\n1 +", {}),  # cut off while thinking
    ],
)
def test_vllms_own_parser_of_qwen3_agrees(make_parser: Callable[..., Any], text: str, variables: dict) -> None:
    """On what both define; blanks around the parts and an empty trace are matters of taste."""
    from vllm.parser.parser_manager import ParserManager

    tokenizer = build_tokenizer(chain_sum, mode_format=PRESETS["qwen3"])
    fields = []
    for parser in (type(make_parser(None)), ParserManager.get_parser(reasoning_parser_name="qwen3")):
        assert parser is not None
        found = whole(parser(tokenizer, None, chat_template_kwargs=variables, model_config=None), text)
        fields.append({name: without_blanks(found.get(name, "")) for name in ("reasoning", "content")})
    assert fields[0] == fields[1]


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "lhrm"])
def test_responses_of_other_formats(make_parser: Callable[..., Any], name: str) -> None:
    tokenizer = build_tokenizer(chain_sum, mode_format=PRESETS[name])
    settle_format(tokenizer)
    for mode in MODES:
        reasoning = "1 + 2" if mode is Mode.THINK else ""
        text = format_response(mode, "3 = 3", reasoning, PRESETS[name])
        forced = {"enable_thinking": False} if mode is Mode.NO_THINK and PRESETS[name].think else {}
        for variables in ({}, forced):
            sent = text.removeprefix(PRESETS[name].no_think) if variables else text
            parser = type(make_parser(None))(tokenizer, None, chat_template_kwargs=variables, model_config=None)
            expected = {"reasoning": reasoning, "content": "3 = 3"} if reasoning else {"content": "3 = 3"}
            assert whole(parser, sent) == expected
            ids = tokenizer.encode(sent, add_special_tokens=False)
            content = tokenizer.decode(parser.reasoning_parser.extract_content_ids(ids))
            assert without_blanks(content) == without_blanks("3 = 3")
            words = tokenizer.convert_ids_to_tokens(ids)
            close = words.index("</think>") if reasoning else 0
            opening = len(mode_tokens(tokenizer).openings[0])
            assert parser.reasoning_parser.count_reasoning_tokens(ids) == max(0, close - opening)


@pytest.mark.parametrize("first_runner", [True, False])
def test_the_bias_stands_behind_a_shared_beginning(tmp_path: Any, first_runner: bool) -> None:
    tokenizer = build_tokenizer(chain_sum, mode_format=PRESETS["qwen3"])
    tokenizer.save_pretrained(tmp_path)
    tokens = mode_tokens(tokenizer)
    (begin,) = tokens.prefix
    rows = [[], [begin], [WORDS[0]], [begin, tokens.think]]  # generated so far; the bias belongs to the second
    logits = torch.zeros(len(rows), len(tokenizer))
    if first_runner:
        from vllm.v1.sample.logits_processor import BatchUpdate

        processor = build(str(tmp_path), torch.device("cpu"))
        added = [(row, params(3.0), WORDS, generated) for row, generated in enumerate(rows)]
        processor.update_state(BatchUpdate(len(rows), [], added, []))
        changed = processor.apply(logits.clone())
    else:
        lengths = torch.full((len(rows),), 5)
        state = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=4, prompt_len=SimpleNamespace(gpu=lengths))
        processor = build(str(tmp_path), state)
        for slot in range(len(rows)):
            processor.add_request(slot, params(3.0))
        context = SimpleNamespace(
            expanded_idx_mapping=torch.arange(len(rows)),
            pos=torch.tensor([4 + len(generated) for generated in rows]),
            input_ids=torch.tensor([[WORDS[0], *generated][-1] for generated in rows], dtype=torch.int32),
        )
        changed = processor.apply(logits.clone(), context)
    moved = changed[:, tokens.think] - changed[:, tokens.no_think]
    assert moved.tolist() == [0, 3, 0, 0]


def test_a_tokenizer_without_tags_is_refused(make_parser: Callable[..., Any]) -> None:
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match=r"The tag <think> is not a token of the tokenizer"):
        type(make_parser(None))(plain)


# --- streamed deltas --------------------------------------------------------------------------------------------


def served(parser: Any, deltas: list[tuple[str, list[int]]], forced: Mode | None, cuts: list[int]) -> list[Any]:
    """The chunks that a client gets: vLLM's events, in bodies that are cut anywhere, behind the middleware."""
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )
    from vllm.reasoning.basic_parsers import DeltaMessage

    sent = b""
    for index, (text, ids) in enumerate(deltas):
        end = index == len(deltas) - 1
        message = parser.parse_delta(text, ids, request(), prompt_token_ids=prompt(forced), finished=end)
        choice = ChatCompletionResponseStreamChoice(
            index=0, delta=message or DeltaMessage(), finish_reason="stop" if end else None, token_ids=ids
        )
        chunk = ChatCompletionStreamResponse(model="model", choices=[choice], usage={"total_tokens": index})
        sent += f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n".encode()
    sent += b"data: [DONE]\n\n"
    ends = [*sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    bodies = [sent[start:end] for start, end in pairwise([0, *ends])]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
        for index, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": index < len(bodies) - 1})

    received: list[bytes] = []

    async def send(message: Any) -> None:
        received.append(message.get("body", b""))

    asyncio.run(SplitDeltas(app)({"type": "http", "path": "/v1/chat/completions"}, None, send))
    *events, last, rest = b"".join(received).split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    return [ChatCompletionStreamResponse.model_validate_json(event.removeprefix(b"data: ")) for event in events]


@given(
    TEXTS,
    FORCED,
    st.lists(st.integers(0, 40), max_size=6),
    st.lists(st.integers(0, 2000), max_size=4),
)
def test_no_delta_has_both_fields_and_nothing_is_lost(
    make_parser: Callable[..., Any], text: str, forced: Mode | None, cuts: list[int], body_cuts: list[int]
) -> None:
    """As many pieces as there may be, one of them the last; a client that looks at one field or else the other."""
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    deltas = [(text[start:end], [start, end]) for start, end in pairwise([0, *ends])]
    chunks = served(make_parser(forced), deltas, forced, body_cuts)
    found: Fields = {}
    for chunk in chunks:
        delta = chunk.choices[0].delta
        assert delta.reasoning is None or delta.content is None
        if delta.reasoning is not None:
            assert "content" not in found, "no reasoning after content"
            found["reasoning"] = found.get("reasoning", "") + delta.reasoning
        elif delta.content is not None:
            found["content"] = found.get("content", "") + delta.content
    assert found == split_whole(text, forced)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [ids for chunk in chunks if (ids := chunk.choices[0].token_ids)] == [ids for _, ids in deltas]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == list(range(len(deltas)))


def test_other_answers_pass_untouched() -> None:
    both = b'data: {"choices": [{"index": 0, "delta": {"reasoning": "a", "content": "b"}}]}\n\n'
    for path, kind in (("/v1/chat/completions", b"application/json"), ("/v1/responses", b"text/event-stream")):
        received: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any, kind: bytes = kind) -> None:
            await send({"type": "http.response.start", "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": both})

        async def send(message: Any, received: list[Any] = received) -> None:
            received.append(message)

        asyncio.run(SplitDeltas(app)({"type": "http", "path": path}, None, send))
        assert received[1]["body"] == both


# --- the decision bias ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer"))
    TOKENIZER.save_pretrained(path)
    return path


def build(folder: str, state: Any, default: Any = None) -> Any:
    from hgpo_trl.serving.vllm_decision import DecisionBias

    model = SimpleNamespace(tokenizer=folder, tokenizer_revision=None, trust_remote_code=False)
    additional = {} if default is None else {"decision_bias": default}
    return DecisionBias(SimpleNamespace(model_config=model, additional_config=additional), state)


def params(bias: Any = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if bias is None else {"decision_bias": bias})


def shifts(logits: torch.Tensor, changed: torch.Tensor) -> list[float]:
    """By how much each row's log-odds of thinking moved; nothing else may have."""
    difference = changed - logits
    think, no_think = TOKENS.decision
    assert torch.equal(difference[:, think], -difference[:, no_think])
    difference[:, [think, no_think]] *= 0
    assert not difference.any()
    change = (changed - logits)[:, think] - (changed - logits)[:, no_think]
    return change.tolist()


@pytest.mark.parametrize("default", [None, 2.0])
def test_first_runner(folder: str, default: float | None) -> None:
    """Requests that come, go, are moved, are preempted and come back, at random, against the rule itself."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    rng = random.Random(0)
    processor = build(folder, torch.device("cpu"), default)
    assert not processor.is_argmax_invariant()
    rows: list[dict[str, Any]] = []
    preempted: list[dict[str, Any]] = []
    seen = set()
    for _ in range(300):
        removed, added, moved = [], [], []
        while rows and rng.random() < 0.4:  # as vLLM does it: the last row takes the freed one
            index = rng.randrange(len(rows))
            leaving, last = rows[index], rows.pop()
            removed.append(index)
            if index < len(rows):
                rows[index] = last
                moved.append((len(rows), index, MoveDirectionality.UNIDIRECTIONAL))
            if rng.random() < 0.5:
                preempted.append(leaving)
            break
        else:
            while len(rows) < 8 and rng.random() < 0.6:
                if preempted and rng.random() < 0.7:
                    row = preempted.pop()
                else:
                    end = rng.choice([*TOKENS.decision, TOKENS.end_think, *WORDS])
                    row = {"bias": rng.choice([None, 0, 1.5, -4]), "prompt": [*WORDS, end], "generated": []}
                rows.append(row)
                added.append((len(rows) - 1, params(row["bias"]), row["prompt"], row["generated"]))
        if len(rows) > 1 and rng.random() < 0.3:
            a, b = rng.sample(range(len(rows)), 2)
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        update = BatchUpdate(len(rows), removed, added, moved) if removed or added or moved else None
        processor.update_state(update)
        logits = torch.zeros(len(rows), len(TOKENIZER))
        changes = shifts(logits, processor.apply(logits.clone()))
        for row, change in zip(rows, changes, strict=True):
            bias = (default or 0.0) if row["bias"] is None else row["bias"]
            free = not row["generated"] and row["prompt"][-1] not in TOKENS.decision
            assert change == (bias if free else 0)
            seen.add((change, free))
            if rng.random() < 0.6:  # otherwise its prompt is not through yet
                row["generated"].append(WORDS[0])
    assert seen >= {(1.5, True), (-4, True), (0, False)}


def test_second_runner(folder: str) -> None:
    """Rows of a step as vLLM's second model runner describes them; slots are taken again."""
    lengths = torch.tensor([4, 4, 6, 6, 3])
    state = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=5, prompt_len=SimpleNamespace(gpu=lengths))
    processor = build(folder, state, default=1.0)
    assert [processor.add_request(slot, params(bias)) for slot, bias in enumerate([3, None, -2, 0, 5])] == [
        True, True, True, False, True,
    ]  # fmt: skip
    rows = [  # slot, position, token there -> change
        (4, 2, WORDS[0], 5),  # the prompt's last token
        (0, 3, WORDS[0], 3),
        (0, 4, WORDS[0], 0),  # a later position, a draft token's or after a preemption
        (1, 2, WORDS[0], 0),  # within the prompt
        (1, 3, TOKENS.no_think, 0),  # the prompt decides
        (2, 5, TOKENS.end_think, -2),
        (3, 5, WORDS[0], 0),
    ]
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([row[0] for row in rows]),
        pos=torch.tensor([row[1] for row in rows]),
        input_ids=torch.tensor([row[2] for row in rows], dtype=torch.int32),
    )
    logits = torch.zeros(len(rows), len(TOKENIZER))
    assert shifts(logits, processor.apply(logits.clone(), context)) == [row[3] for row in rows]
    processor.add_request(4, params())
    assert shifts(logits, processor.apply(logits.clone(), context))[0] == 1, "the slot's last request is forgotten"


@pytest.mark.parametrize("bias", ["1.5", True, float("nan"), float("inf"), [1.0]])
def test_bias_that_is_no_number(folder: str, bias: Any) -> None:
    from hgpo_trl.serving.vllm_decision import DecisionBias

    with pytest.raises(ValueError, match=r"decision_bias must be a finite number, in vllm_xargs; got"):
        DecisionBias.validate_params(params(bias))
    with pytest.raises(ValueError, match=r"decision_bias must be a finite number, in --additional-config; got"):
        build(folder, torch.device("cpu"), default=bias)


# --- hgpo-trl serve ---------------------------------------------------------------------------------------------


def test_serve_passes_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, words: executed.append([path, *words]))
    serve.main(["--port", "8001", "--model", "runs/hgpo", "--model-impl", "vllm"])
    ((path, *words),) = executed
    assert path == words[0] == sys.executable
    assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "runs/hgpo"]
    assert words[-4:] == ["--port", "8001", "--model-impl", "vllm"]


def test_serve_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--port", "8001"])
    assert "the following arguments are required: --model" in capsys.readouterr().err
