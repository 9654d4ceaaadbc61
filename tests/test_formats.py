"""Mode formats: splitting in any of them, tokens of the openings, the format that a tokenizer shows, the decision."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_zoo import DEEPSEEK, SMOLLM3, llama3, qwen2, thinking, tiny_qwen2, word_level
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import (
    LHRM,
    MODES,
    OTHER,
    PRESETS,
    Fault,
    Mode,
    ModeFormat,
    ModeTokens,
    Response,
    as_format,
    check_embeddings,
    declare_format,
    format_of,
    format_response,
    mode_tokens,
    prompt_end,
    split_response,
)
from hgpo_trl.modes.chat_template import let_model_decide, opened_mode
from hgpo_trl.modes.decision import OFF_MODE, draw_other, read_decision
from hgpo_trl.serving.splitter import ResponseSplitter, split_whole
from hgpo_trl.training.advantages import compute_advantages
from hgpo_trl.training.rollout import OwnTokens

NEMOTRON = ModeFormat("custom", "<think>\n", "<think></think>", end_reasoning="\n</think>\n\n")
SPOKEN = ModeFormat("custom", "Let me think.", "At once:", end_reasoning="So the answer is", end_no_think="Done.")
FORMATS = (*PRESETS.values(), NEMOTRON, SPOKEN)

in_format = pytest.mark.parametrize("mode_format", FORMATS, ids=lambda found: f"{found.name}-{found.no_think.strip()}")
pieces = st.sampled_from(
    (
        *(
            "<think>",
            "</think>",
            "<no_think>",
            "</no_think>",
            "<thin",
            "k>",
            "< think>",
            "a",
            "7 ",
            " ",
            "\n",
            "\n\n",
            "[THINK]",
        ),
        *("Let me think.", "At once:", "So the answer is", "Done."),
    )
)
texts = st.lists(pieces, max_size=9).map("".join)
parts = st.text("ab 7.\n", max_size=8)


# --- text -------------------------------------------------------------------------------------------------------


@in_format
@given(text=texts)
def test_splitting_is_total_and_loses_nothing(mode_format: ModeFormat, text: str) -> None:
    response = split_response(text, mode_format)
    assert response.reasoning in text
    assert response.answer in text
    assert (response.mode is None) == (Fault.NO_MODE in response.faults)
    if response.mode is None:
        assert response.answer == text.strip()
    elif response.well_formed:
        opening = mode_format.opened(text)
        assert opening is not None
        left = text[opening[1] :].replace(response.reasoning, "", 1).replace(response.answer, "", 1)
        assert "".join(left.split()) == "".join(mode_format.end(response.mode).split()), "all else is one mark"


@in_format
@given(mode=st.sampled_from(MODES), answer=parts.filter(str.strip), reasoning=parts.filter(str.strip))
def test_what_was_formatted_splits_into_the_same_parts(
    mode_format: ModeFormat, mode: Mode, answer: str, reasoning: str
) -> None:
    reasoning = reasoning if mode is Mode.THINK else ""
    text = format_response(mode, answer, reasoning, mode_format)
    assert text.startswith(mode_format.opening(mode))
    assert split_response(text, mode_format) == Response(mode, reasoning.strip(), answer.strip(), ())
    assert split_response(f"  {text} ", mode_format).well_formed, "blanks around it do not matter"


@pytest.mark.parametrize(
    ("name", "text", "mode", "reasoning", "answer", "faults"),
    [
        ("qwen3", "<think>\n1 + 1\n</think>\n\n2", "think", "1 + 1", "2", ()),
        ("qwen3", "<think>\n\n</think>\n\n2", "no_think", "", "2", ()),
        ("qwen3", "<think>\n</think>\n2", "no_think", "", "2", ()),  # an empty trace, however it is written
        ("qwen3", "<think>\n\n1 + 1\n</think>\n\n2", "think", "1 + 1", "2", ()),
        ("qwen3", "<think>\n1 + 1", "think", "1 + 1", "", ("unclosed",)),
        ("qwen3", "<think>\n\n</think>\n\n", "no_think", "", "", ("empty_answer",)),
        ("qwen3", "2", None, "", "2", ("no_mode",)),
        ("qwen3", "<think>\n\n</think>\n\n<think>1", "no_think", "", "<think>1", ("think_in_no_think",)),
        ("qwen3", "<think>\na\n</think>\n\nb</think>c", "think", "a", "b</think>c", ("nested",)),
        ("deepseek-v3.1", "<think>a</think>b", "think", "a", "b", ()),
        ("deepseek-v3.1", "<think></think>b", "think", "", "b", ()),
        ("deepseek-v3.1", "</think>b", "no_think", "", "b", ()),
        ("deepseek-v3.1", "b", None, "", "b", ("no_mode",)),
        ("r1", "Okay, a\n</think>\n\nb", "think", "Okay, a", "b", ()),
        ("r1", "</think>\n\nb", "no_think", "", "b", ()),
        ("r1", "Okay, a", "think", "Okay, a", "", ("unclosed",)),
        ("r1", "", "think", "", "", ("unclosed",)),
    ],
)  # fmt: skip
def test_presets(name: str, text: str, mode: str | None, reasoning: str, answer: str, faults: tuple[str, ...]) -> None:
    assert split_response(text, PRESETS[name]) == Response(mode, reasoning, answer, faults)  # type: ignore[arg-type]


@in_format
def test_a_format_is_declared_by_its_name_or_its_texts(mode_format: ModeFormat) -> None:
    assert as_format(mode_format.declaration()) == mode_format
    assert as_format(mode_format) is mode_format


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("qwen", r"mode_format='qwen' is none of lhrm, qwen3, .*Name one of these, or give the texts"),
        ({"think": "<a>", "no_think": "<b>"}, r"mode_format lacks end_reasoning\. Give"),
        ({"think": "<a>", "no_think": "<b>", "end": "c"}, r"mode_format: end='c' is not one of name, think,"),
        ({"think": "<a>", "no_think": None, "end_reasoning": "c"}, r"no_think=None is not one of .* with a text"),
        ({"think": "<a>", "no_think": " ", "end_reasoning": "c"}, r"no_think is blank\. Give the text"),
        ({"think": "<a>\n", "no_think": "<a>", "end_reasoning": "c"}, r"differ by blanks at most.*Give each"),
    ],
)  # fmt: skip
def test_what_is_no_format(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_format(value)


def test_a_blank_trace_is_refused_where_it_would_read_as_no_think() -> None:
    for name in ("qwen3", "smollm3", "r1"):
        with pytest.raises(UserError, match=rf"reasoning is blank: in the format {name} such"):
            format_response("think", "2", " ", PRESETS[name])
    assert format_response("think", "2", "", PRESETS["deepseek-v3.1"]) == "<think></think>2"


@in_format
@given(text=texts, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_a_response_that_arrives_in_pieces_is_split_as_a_whole(
    mode_format: ModeFormat, text: str, cuts: list[int]
) -> None:
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    splitter, fields = ResponseSplitter(mode_format=mode_format), dict[str, str]()
    for start, end in itertools.pairwise([0, *ends]):
        for field, piece in splitter.feed(text[start:end]).items():
            fields[field] = fields.get(field, "") + piece
    for field, piece in splitter.finish().items():
        fields[field] = fields.get(field, "") + piece
    assert fields == split_whole(text, mode_format=mode_format)
    response = split_response(text, mode_format)
    assert splitter.mode is response.mode
    assert fields.get("reasoning", "") == response.reasoning
    if Fault.TRAILING_TEXT not in response.faults:
        assert fields.get("content", "") == response.answer
    for mode in MODES:  # a response behind a prompt that forces the mode is the rest of one that begins with it
        opening = mode_format.opening(mode)
        opened = mode_format.opened(opening + text)
        if opened is not None and opened[0] is mode and not text[:1].isspace():
            assert split_whole(text, mode, mode_format) == split_whole(opening + text, mode_format=mode_format)


# --- tokenizer --------------------------------------------------------------------------------------------------


def test_openings_part_where_the_tokenizer_splits_them() -> None:
    for tokenizer in (qwen2(), llama3()):
        declare_format(thinking(tokenizer), PRESETS["qwen3"])
        tokens = mode_tokens(tokenizer)
        assert tokenizer.decode(tokens.openings[0]) == "<think>\n"
        assert tokenizer.decode(tokens.openings[1]) == "<think>\n\n</think>\n\n"
        assert tokens.prefix[0] == tokenizer.convert_tokens_to_ids("<think>")
        assert tokens.decision[0] != tokens.decision[1]
        assert tokens.end_think == tokenizer.convert_tokens_to_ids("</think>")
    # With a token for two newlines the openings part at the first of them; without, think's opening ends there.
    newlines = thinking(qwen2())
    newlines.add_tokens([AddedToken("\n\n", special=False)])
    declare_format(newlines, PRESETS["qwen3"])
    one, two = newlines.encode("\n")[0], newlines.convert_tokens_to_ids("\n\n")
    assert mode_tokens(newlines).decision == (one, two)
    assert mode_tokens(newlines).forced == (2, 4)
    single = thinking(qwen2())
    declare_format(single, PRESETS["qwen3"])
    assert mode_tokens(single).prefix == (single.convert_tokens_to_ids("<think>"), one)
    assert mode_tokens(single).decision == (OTHER, one)


def test_single_token_openings() -> None:
    tokenizer = thinking(qwen2())
    declare_format(tokenizer, PRESETS["deepseek-v3.1"])
    think, end = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
    assert mode_tokens(tokenizer) == ModeTokens(PRESETS["deepseek-v3.1"], ((think,), (end,)), end)
    assert mode_tokens(tokenizer).ids == (think, end)
    declare_format(tokenizer, PRESETS["r1"])
    assert mode_tokens(tokenizer).openings[0] == ()
    assert mode_tokens(tokenizer).decision == (OTHER, end)


def test_a_declared_format_is_saved_with_the_tokenizer(tmp_path: Any) -> None:
    for mode_format in (PRESETS["qwen3"], NEMOTRON):
        tokenizer = thinking(qwen2())
        declare_format(tokenizer, mode_format)
        tokenizer.save_pretrained(tmp_path)
        assert format_of(AutoTokenizer.from_pretrained(tmp_path)) == mode_format


def test_tokens_that_do_not_fit_a_format_are_refused() -> None:
    blind = word_level()  # <think> and newlines are unknown to it
    declare_format(blind, PRESETS["qwen3"])
    with pytest.raises(UserError, match=r"mode_format qwen3: .* is decoded as .*Name the format"):
        mode_tokens(blind)
    pieces = qwen2()
    declare_format(pieces, PRESETS["deepseek-v3.1"])
    with pytest.raises(UserError, match=r"deepseek-v3\.1: </think> is not one token.*Make it an ordinary"):
        mode_tokens(pieces)
    special = qwen2()
    special.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    declare_format(special, PRESETS["qwen3"])
    with pytest.raises(UserError, match=r"The tag <think> is a special token and would vanish"):
        mode_tokens(special)
    short = thinking(qwen2())
    declare_format(short, PRESETS["qwen3"])
    with pytest.raises(
        UserError, match=r"format qwen3 has id \d+, but the model's input embedding has only 10 rows.*model's own"
    ):
        check_embeddings(tiny_qwen2(10), mode_tokens(short))


def test_an_opening_that_joins_the_prompt_is_refused() -> None:
    tokenizer = thinking(qwen2(), "qwen3")
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    mode_tokens(tokenizer)
    declare_format(tokenizer, ModeFormat("custom", "\n<think>", "\n</think>", end_reasoning="</think>"))
    with pytest.raises(UserError, match=r"behind the chat template's .*the tokenizer encodes the opening"):
        mode_tokens(tokenizer)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        *((f"qwen3{kind}", "qwen3") for kind in ("", "_training", "_5_think", "_5_nothink", "_6", "_8")),
        *(("deepseek_r1_distill", "r1"), ("deepseekv3", "r1"), (DEEPSEEK, "deepseek-v3.1"), (SMOLLM3, "smollm3")),
        *(("qwen3_instruct_2507", "lhrm"), ("qwen2_5", "lhrm"), ("nemotron_3_nano", "lhrm")),
    ],
)  # fmt: skip
def test_the_format_that_a_chat_template_shows(template: str, name: str) -> None:
    if "{" in template:
        tokenizer = thinking(qwen2())
        tokenizer.chat_template = template
    else:
        tokenizer = thinking(qwen2(), template)
    assert format_of(tokenizer).name == name
    tokenizer.chat_template = None
    assert format_of(tokenizer) == LHRM, "without a template there is doubt"
    declare_format(tokenizer, NEMOTRON)
    assert format_of(tokenizer) == NEMOTRON, "what is declared holds"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "<think>\n2 + 3\n</think>\n\n5"},
        {"role": "user", "content": "Now double it."},
    ],
]


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "deepseekv3"])
def test_templates_that_trl_ships_leave_the_decision_to_the_model(
    template: str, conversation: list[dict[str, str]], with_tools: bool
) -> None:
    tokenizer, before = thinking(qwen2(), template), thinking(qwen2(), template)
    opening = let_model_decide(tokenizer)
    assert opening == {"qwen3_5_nothink": "<think>\n\n</think>\n\n", "qwen3": "", "deepseekv3": ""}.get(
        template, "<think>\n"
    )
    assert not opened_mode(tokenizer)
    assert (tokenizer.chat_template == before.chat_template) == (not opening), "a template that fits stays in place"
    assert let_model_decide(tokenizer) == "", "once is enough"

    mode_format = format_of(tokenizer)
    tools = {"tools": TOOLS} if with_tools and template != "deepseekv3" else {}

    def prompt(of: PreTrainedTokenizerBase, **settings: Any) -> str:
        return of.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **tools, **settings)

    auto = prompt(tokenizer)
    assert auto == prompt(before).removesuffix(opening)
    if template == "deepseekv3":
        return  # it knows no other mode, and the decision comes after the trace's beginning
    turn = auto[auto.rindex("<|im_start|>assistant") :]
    assert prompt(tokenizer, enable_thinking=False).endswith(turn + mode_format.no_think)
    assert prompt(tokenizer, enable_thinking=True).endswith((turn, turn + mode_format.think))
    if template != "qwen3_8":  # whose system prompt speaks of the effort
        assert prompt(tokenizer, enable_thinking=False) == auto + mode_format.no_think
        assert prompt(tokenizer, enable_thinking=True) in (auto, auto + mode_format.think)
    ids = tokenizer(auto)["input_ids"]
    for mode in MODES:  # the forced tokens are those of the forced prompt
        forced = [*ids, *mode_tokens(tokenizer).openings[MODES.index(mode)]]
        assert forced == tokenizer(auto + mode_format.opening(mode))["input_ids"]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_6"])
def test_a_response_follows_the_prompt_that_asks_for_it(template: str) -> None:
    tokenizer = thinking(qwen2(), template)
    let_model_decide(tokenizer)
    mode_format = format_of(tokenizer)
    for conversation, mode in itertools.product(CONVERSATIONS, MODES):
        response = format_response(mode, "5", "2 + 3" if mode is Mode.THINK else "", mode_format)
        prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(
            [*conversation, {"role": "assistant", "content": response}], tokenize=False
        )
        assert whole == f"{prompt}{response}<|im_end|>\n"


def test_a_template_that_opens_a_mode_is_found() -> None:
    tokenizer = thinking(qwen2())
    tokenizer.chat_template = DEEPSEEK
    assert opened_mode(tokenizer) == "</think>"
    assert let_model_decide(tokenizer) == "</think>"
    assert prompt_end(tokenizer) == "<|assistant|>"
    assert prompt_end(tokenizer, thinking=True) == "<|assistant|><think>"
    assert prompt_end(tokenizer, thinking=False) == "<|assistant|></think>"


# --- the decision -----------------------------------------------------------------------------------------------

SIZE = 7


class Chain(nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, probs: Tensor):
        super().__init__()
        self.logits = nn.Parameter(probs.log())  # [V, V]

    def forward(self, input_ids: Tensor, logits_to_keep: int, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids[:, -logits_to_keep:]])


def tokens_of(think: tuple[int, ...], no_think: tuple[int, ...]) -> ModeTokens:
    return ModeTokens(PRESETS["qwen3"], (think, no_think), end_think=5)


OPENINGS = [
    ((1,), (2,)),
    ((1, 3), (1, 4, 5, 4)),
    ((), (5,)),
    ((), (5, 4)),
    ((1, 3), (1, 3, 3, 5)),
    ((1, 2, 3), (1, 4, 5)),
]


@pytest.mark.parametrize(("think", "no_think"), OPENINGS)
@given(seed=st.integers(0, 999))
def test_a_modes_probability_is_that_of_its_whole_opening(
    think: tuple[int, ...], no_think: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(SIZE, SIZE, generator=generator).double().softmax(-1)
    tokens, model = tokens_of(think, no_think), Chain(probs)
    prompts = torch.tensor([[0, 0], [0, 6]])
    decision = read_decision(model, prompts, torch.ones_like(prompts), tokens)

    def follows(last: int, opening: tuple[int, ...]) -> float:
        return math.prod(float(probs[a, b]) for a, b in itertools.pairwise((last, *opening)))

    for row, last in enumerate(prompts[:, -1].tolist()):
        of_no_think = follows(last, no_think)
        if tokens.decision[0] == OTHER:  # any other token where no-think's opening goes on
            of_think = follows(last, think) - follows(last, no_think[: len(think) + 1])
        else:
            of_think = follows(last, think)
        assert float(decision.think[row]) == pytest.approx(of_think, rel=1e-5)
        assert float(decision.no_think[row]) == pytest.approx(of_no_think, rel=1e-5)
        assert float(decision.neither[row]) == pytest.approx(1 - of_think - of_no_think, abs=1e-6)

        written = [last]  # greedily
        for _ in range(6):
            written.append(int(probs[written[-1]].argmax()))
        greedy = tuple(written[1:])
        is_no_think = greedy[: len(no_think)] == no_think
        place = len(tokens.prefix)
        is_think = greedy[: len(think)] == think and (
            tokens.decision[0] != OTHER or greedy[place] != tokens.decision[1]
        )
        assert int(decision.picked[row]) == (0 if is_think else 1 if is_no_think else OFF_MODE)


def test_the_other_beginning_is_drawn_by_the_policy() -> None:
    probs = torch.full((SIZE, SIZE), 0.1)
    probs[0] = torch.tensor([0, 0.2, 0.0, 0.1, 0.0, 0.7, 0.0])  # 5 opens no-think; of the others 1 and 3
    prompts = [[0]] * 300 + [[6, 6, 0]] * 300
    drawn = draw_other(Chain(probs), 6, prompts, tokens_of((), (5,)), temperature=1.0, batch_rows=64)
    assert len(drawn) == 600
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 600 == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.parametrize(("think", "no_think"), OPENINGS)
def test_advantages_of_whole_responses(think: tuple[int, ...], no_think: tuple[int, ...]) -> None:
    tokens = tokens_of(think, no_think)
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    own_lengths = torch.tensor([3, 5, 2, 4, 1, 6, 3, 3])
    own = OwnTokens.of(tokens, 8, 4, torch.device("cpu"))
    forced = [len(think), len(think), len(no_think), len(no_think)] * 2
    drawn = [int(tokens.decision[mode] == OTHER) for mode in (0, 0, 1, 1)] * 2  # counted with the forced tokens
    lengths = own_lengths + torch.tensor(forced) - 1 + torch.tensor(drawn)
    assert own.lengths(lengths).tolist() == own_lengths.tolist()

    values = compute_advantages(rewards, own_lengths, mode_probs=torch.full((2, 2), 0.5))
    spread = own.spread(values)
    place = len(tokens.prefix)
    for row, length in enumerate(lengths.tolist()):
        whole = spread[row].tolist()
        rest = length - own_lengths[row] - place
        assert whole[: place + 1 + rest] == [values[row, 0]] * (place + 1 + rest), "the action is the whole opening"
        assert whole[place + 1 + rest : length] == values[row, 1 : own_lengths[row]].tolist()
        assert not any(whole[length:])
    if len(think) == len(no_think) == 1:
        assert spread is values, "openings of one token change nothing"
