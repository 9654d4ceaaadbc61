"""`hgpo_trl.inference.generate` against plain `model.generate`: modes, the bias, batches, streams, several turns."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_zoo import FAMILIES, qwen2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from hgpo_trl.inference.decoding import DecisionBias
from hgpo_trl.inference.generate import Generation, HybridModel, generate, stream
from hgpo_trl.modes import LHRM, MODES, Mode, ModeTokens, add_mode_tokens, mode_tokens, split_response
from hgpo_trl.modes.chat_template import set_chat_template

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
CONVERSATION = [
    {"role": "system", "content": "sum mod 10"},
    {"role": "user", "content": "a = 3 sum mod 10 ?"},
    {"role": "assistant", "content": "<think> let me add step by step : a + 3 = 3 </think> 3"},
    {"role": "user", "content": "b = 4 sum mod 10 ?"},
]


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerBase) -> ModeTokens:
    return mode_tokens(tokenizer)


@pytest.fixture(scope="module")
def conversations(prompts: Dataset) -> list[list[dict[str, str]]]:
    return [*prompts["prompt"][:18], CONVERSATION]


@pytest.fixture(scope="module")
def model(
    model_dir: str, tokenizer: PreTrainedTokenizerBase, tokens: ModeTokens, conversations: list
) -> LlamaForCausalLM:
    """A model that was taught to begin with <think>, <no_think> or neither, by turns."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    targets = torch.tensor([*tokens.decision, tokenizer.convert_tokens_to_ids("4")] * 7)[: len(conversations)]
    rows = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits[:, -1], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: list, **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False, **kwargs)


def plain(model: Any, tokenizer: Any, conversation: list, thinking_mode: str = "auto", length: int = 12) -> list[int]:
    """What plain `model.generate` makes of one conversation, greedily, with the template's own forced modes."""
    ids = prompt_ids(tokenizer, conversation, thinking_mode=thinking_mode)
    start = len(prompt_ids(tokenizer, conversation))
    output = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=length - (len(ids) - start), pad_token_id=0
    )
    return output[0, start:].tolist()


def first_logits(model: Any, tokenizer: Any, conversation: list) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt_ids(tokenizer, conversation)])).logits[0, -1].double()


# --- against plain generate ---------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
def test_greedy_responses_are_plain_generates(
    mode: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    found = generate(model, tokenizer, conversations, mode=mode, **GREEDY)
    expected = [plain(model, tokenizer, conversation, mode) for conversation in conversations]
    assert [generation.text for generation in found] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [generation.num_tokens for generation in found] == [len(ids) for ids in expected]
    assert [generation.truncated for generation in found] == [ids[-1] != tokenizer.eos_token_id for ids in expected]
    modes = {generation.mode for generation in found}
    assert modes == {*MODES, None} if mode == "auto" else modes == {Mode(mode)}
    for generation in found:
        response = split_response(generation.text)
        assert (generation.mode, generation.reasoning, generation.answer) == (
            response.mode,
            response.reasoning,
            response.answer,
        )


def with_budget(model: Any, tokenizer: Any, conversation: list, mode: str, budget: int, length: int = 12) -> list[int]:
    """What `plain` makes of it, with the reasoning closed after so many tokens: up to there, and on from there."""
    begun = plain(model, tokenizer, conversation, mode, length=budget + 1)
    tokens = mode_tokens(tokenizer)
    if begun[0] != tokens.think or tokenizer.eos_token_id in begun:
        return plain(model, tokenizer, conversation, mode, length)
    if tokens.end_think not in begun:
        begun += tokenizer(LHRM.end_reasoning, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt_ids(tokenizer, conversation), *begun]])
    output = model.generate(ids, do_sample=False, max_new_tokens=length - len(begun), pad_token_id=0)
    return [*begun, *output[0, ids.shape[1] :].tolist()]


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
@pytest.mark.parametrize("budget", [1, 4, 8])
def test_reasoning_is_closed_at_its_budget(
    mode: str, budget: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    found = generate(model, tokenizer, conversations, mode=mode, think_budget=budget, batch_size=5, **GREEDY)
    expected = [with_budget(model, tokenizer, conversation, mode, budget) for conversation in conversations]
    assert [generation.text for generation in found] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [generation.num_tokens for generation in found] == [len(ids) for ids in expected]
    assert all(generation.reasoning_tokens <= budget for generation in found if generation.mode is Mode.THINK)
    for conversation, generation in zip(conversations[:4], found, strict=False):
        assert "".join(stream(model, tokenizer, conversation, mode=mode, think_budget=budget, **GREEDY)) == (
            generation.text
        )


def test_each_mode_has_its_limit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    limits = {"max_think_tokens": 7, "max_no_think_tokens": 4}
    most = {Mode.THINK: 7, Mode.NO_THINK: 4, None: 12}
    found = generate(model, tokenizer, conversations, **limits, **GREEDY)
    free = generate(model, tokenizer, conversations, **GREEDY)
    for one, other in zip(found, free, strict=True):
        assert one.num_tokens == min(other.num_tokens, most[one.mode])
        assert one.truncated == (other.truncated or other.num_tokens > most[one.mode])
    assert {generation.mode for generation in found if generation.truncated} >= {*MODES}


def test_the_batch_size_changes_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    together, alone = (generate(model, tokenizer, conversations, batch_size=n, **GREEDY) for n in (64, 1))
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert one.prob_think == pytest.approx(other.prob_think, rel=1e-4)


def test_the_probability_is_the_models_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: ModeTokens, conversations: list
) -> None:
    expected = [
        float(torch.softmax(first_logits(model, tokenizer, conversation), dim=0)[tokens.think])
        for conversation in conversations
    ]
    for bias in (0.0, 2.0):
        found = generate(model, tokenizer, conversations, decision_bias=bias, temperature=0.5, max_new_tokens=2)
        assert [generation.prob_think for generation in found] == pytest.approx(expected, rel=1e-4)
    forced = generate(model, tokenizer, conversations, mode="think", **GREEDY)
    assert {generation.prob_think for generation in forced} == {None}


def test_no_batch_mixes_modes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokens: ModeTokens,
    conversations: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short responses do not wait for long ones."""
    batches: list[set[int]] = []
    original = model.generate

    def spy(input_ids: Tensor, **kwargs: Any) -> Any:
        if not kwargs["generation_config"].output_logits:
            batches.append({token if token in tokens.decision else -1 for token in input_ids[:, -1].tolist()})
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    generate(model, tokenizer, conversations, **GREEDY)
    assert sorted(map(tuple, batches)) == sorted([(-1,), (tokens.think,), (tokens.no_think,)])


def test_what_is_counted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: ModeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tags and the end token are of neither part; what comes after the end is padding."""
    texts = ["a + 3 = 3 </think> 4 4 <eos>", "a + 3 = 3 4 4 4 4", "a </think> <eos>"]

    def fake(input_ids: Tensor, **kwargs: Any) -> Tensor:
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        rows = [row + [tokenizer.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", fake)
    question = "a = 3 sum mod 10 ?"
    found = generate(model, tokenizer, [question] * 3, mode="think", max_new_tokens=10)
    counts = [(g.num_tokens, g.reasoning_tokens, g.answer_tokens, g.truncated) for g in found]
    assert counts == [(10, 5, 2, False), (10, 9, 0, True), (4, 1, 0, False)]
    assert found[0] == Generation(
        Mode.THINK, "a + 3 = 3", "4 4", "<think> a + 3 = 3 </think> 4 4", 10, 5, 2, False, None
    )
    texts = ["4 </no_think> 4 <eos>", "4 4 </no_think> <eos>"]
    found = generate(model, tokenizer, [question] * 2, mode="no_think", max_new_tokens=10)
    counts = [(g.num_tokens, g.reasoning_tokens, g.answer_tokens, g.answer) for g in found]
    assert counts == [(5, 0, 1, "4"), (5, 0, 2, "4 4")]


# --- the bias -----------------------------------------------------------------


@settings(max_examples=100)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=9),
    bias=st.floats(-20, 20, width=32),
    data=st.data(),
)
def test_the_bias_moves_the_log_odds_and_nothing_else(logits: list[float], bias: float, data: st.DataObject) -> None:
    tokens = ModeTokens.of_tags(*data.draw(st.permutations(range(len(logits))))[:4])
    scores = torch.tensor([logits], dtype=torch.float64)
    processor = DecisionBias(tokens, bias, prompt_length=3)
    moved = processor(torch.zeros(1, 3, dtype=torch.long), scores)
    log_odds = [float(x[0, tokens.think] - x[0, tokens.no_think]) for x in (scores, moved)]
    assert log_odds[1] - log_odds[0] == pytest.approx(bias, abs=1e-9)
    assert float(moved.sum()) == pytest.approx(float(scores.sum()), abs=1e-9)
    others = [token for token in range(len(logits)) if token not in tokens.decision]
    assert torch.equal(moved[:, others], scores[:, others])
    assert torch.equal(processor(torch.zeros(1, 4, dtype=torch.long), scores), scores)  # only the first token
    assert scores.tolist() == [logits]


@pytest.mark.parametrize(("bias", "temperature"), [(0.0, 1.0), (1.5, 1.0), (-2.0, 0.6)])
def test_the_first_token_is_drawn_from_the_biased_distribution(
    bias: float,
    temperature: float,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokens: ModeTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With bias 0 it is the model's own, neither mode included."""
    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x: torch.nn.functional.linear(x, head.weight) / 4)  # all three likely
    logits = first_logits(model, tokenizer, CONVERSATION)
    logits[tokens.think] += bias / 2
    logits[tokens.no_think] -= bias / 2
    probs = torch.softmax(logits / temperature, dim=0)
    expected = {mode: float(probs[token]) for mode, token in zip(MODES, tokens.decision, strict=True)}
    expected[None] = 1 - sum(expected.values())
    assert min(expected.values()) > 0.001

    number = 3000
    found = generate(
        model,
        tokenizer,
        [CONVERSATION] * number,
        decision_bias=bias,
        temperature=temperature,
        top_p=1.0,
        max_new_tokens=2,
        batch_size=number,
        seed=0,
    )
    counts = Counter(generation.mode for generation in found)
    for mode, prob in expected.items():
        assert abs(counts[mode] - number * prob) < 4 * math.sqrt(number * prob * (1 - prob)), mode


@pytest.mark.parametrize(("bias", "mode"), [(60.0, Mode.THINK), (-60.0, Mode.NO_THINK)])
def test_a_large_bias_forces_a_mode(
    bias: float, mode: Mode, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    biased = generate(model, tokenizer, conversations, decision_bias=bias, **GREEDY)
    forced = generate(model, tokenizer, conversations, mode=mode, **GREEDY)
    assert [generation.text for generation in biased] == [generation.text for generation in forced]
    ignored = generate(model, tokenizer, conversations, mode=mode, decision_bias=-bias, **GREEDY)
    assert ignored == forced


# --- settings and bad input ---------------------------------------------------


def test_the_seed_decides(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list) -> None:
    def run(seed: int | None) -> list[str]:
        found = generate(model, tokenizer, conversations, temperature=1.0, top_p=1.0, max_new_tokens=12, seed=seed)
        return [generation.text for generation in found]

    first = run(3)
    assert run(3) == first
    assert run(None) != first


def test_a_text_is_one_message_of_the_user(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    hybrid = HybridModel(model, tokenizer)
    text = "a = 3 sum mod 10 ?"
    one = hybrid(text, **GREEDY)
    assert isinstance(one, Generation)
    assert hybrid([{"role": "user", "content": text}], **GREEDY) == one
    batch = hybrid([text, CONVERSATION, text], **GREEDY)
    assert [batch[0].text, batch[2].text] == [one.text, one.text]
    assert batch[1].text == hybrid(CONVERSATION, **GREEDY).text
    assert hybrid([]) == []


def test_a_response_ends_with_the_models_positions(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    positions = model.config.max_position_embeddings
    length = len(prompt_ids(tokenizer, CONVERSATION))
    (generation,) = generate(model, tokenizer, [CONVERSATION], mode="think", temperature=0)
    assert generation.num_tokens <= positions - length
    longest = [{"role": "user", "content": "a " * positions}]
    with pytest.raises(ValueError, match=rf"the model {positions} positions.*Shorten the conversation"):
        generate(model, tokenizer, ["a", longest])
    with pytest.raises(ValueError, match="Shorten the conversation"):
        next(stream(model, tokenizer, longest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "fast"}, "mode must be one of auto, think, no_think; got 'fast'"),
        ({"decision_bias": math.inf}, "decision_bias must be a finite number; got inf. Force a mode"),
        ({"decision_bias": math.nan}, "decision_bias must be a finite number; got nan"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2"),
        (
            {"max_new_tokens": 8, "max_think_tokens": 9},
            "max_think_tokens must lie between 2, the decision token and one",
        ),
        ({"max_no_think_tokens": 1}, "and max_new_tokens=35000, or be null for no limit of the mode's own; got 1"),
        ({"think_budget": 0}, "think_budget must be at least 1 token, or null for no budget; got 0"),
        ({"think_budget": 8, "max_new_tokens": 10}, "think_budget=8 leaves no token for the answer within max_new_tok"),
        (
            {"think_budget": 8, "max_think_tokens": 9},
            "within max_think_tokens=9. Lower think_budget, or raise max_think_",
        ),
        ({"temperature": -1}, "temperature must be a finite number of at least 0"),
        ({"top_p": 0}, "top_p must lie in"),
    ],
)
def test_bad_settings(change: dict, words: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError) as caught:
        generate(model, tokenizer, ["a"], **change)
    assert words in str(caught.value)
    with pytest.raises(ValueError) as caught:
        next(stream(model, tokenizer, "a", **change))
    assert words in str(caught.value)


def test_a_model_that_is_not_hybrid() -> None:
    tokenizer = qwen2()
    model = tiny_llama(len(tokenizer))
    with pytest.raises(ValueError, match=r"The tag <think> is not a token.*add_mode_tokens"):
        generate(model, tokenizer, ["a"])
    add_mode_tokens(tokenizer)
    set_chat_template(tokenizer)
    with pytest.raises(ValueError, match=r"The tag <think> has id .* embedding has only"):
        generate(model, tokenizer, ["a"])
    add_mode_tokens(tokenizer, model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"chat template takes no thinking_mode.*hgpo-trl hft"):
        generate(model, tokenizer, ["a"])


# --- streams ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "think", "no_think"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_adds_up_to_the_response(family: str, mode: str) -> None:
    tokenizer = FAMILIES[family]()
    add_mode_tokens(tokenizer)
    set_chat_template(tokenizer)
    model = tiny_llama(len(tokenizer))
    arguments: dict[str, Any] = {"mode": mode, "max_new_tokens": 30, "temperature": 1.0, "decision_bias": 3.0}
    for seed in range(3):
        text = "".join(stream(model, tokenizer, "What is 2 + 3?", seed=seed, **arguments))
        expected = generate(model, tokenizer, ["What is 2 + 3?"], seed=seed, **arguments)[0].text
        assert expected.startswith("" if mode == "auto" else f"<{mode}>")
        if family == "sentencepiece":  # the streamer loses a blank at the beginning of a line
            text, expected = "".join(text.split()), "".join(expected.split())
        assert text == expected


def test_a_greedy_stream_is_the_response(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list
) -> None:
    hybrid = HybridModel(model, tokenizer)
    for mode in ("auto", "think", "no_think"):
        for bias in (0.0, 60.0):
            for conversation in conversations[:6]:
                text = "".join(hybrid.stream(conversation, mode=mode, decision_bias=bias, **GREEDY))
                expected = hybrid(conversation, mode=mode, decision_bias=bias, **GREEDY)
                assert text == expected.text


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hgpo_trl.stream")]


@pytest.mark.usefixtures("no_thread_is_left")
def test_closing_the_stream_ends_the_generation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, original = 0, model.forward
    closing = threading.Event()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 10:
            closing.wait()  # for the pool, which is left once the generation has been told to stop
        output = original(*args, **kwargs)
        output.logits[..., tokenizer.eos_token_id] = -math.inf  # it would go on to its last position
        return output

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args: Any, **kwargs: Any) -> None:
            closing.set()
            super().shutdown(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr("hgpo_trl.inference.generate.ThreadPoolExecutor", Pool)
    pieces = stream(model, tokenizer, "a", mode="think")
    assert next(pieces).startswith("<think>")
    pieces.close()
    assert steps <= 10


@pytest.mark.usefixtures("no_thread_is_left")
def test_what_goes_wrong_in_the_generation_is_raised(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(model, tokenizer, "a"))


# --- several turns ------------------------------------------------------------


@pytest.mark.parametrize("modes", [("think", "no_think", "auto"), ("no_think", "think", "think")])
def test_modes_change_from_turn_to_turn_and_reasoning_is_dropped(
    modes: tuple[str, ...], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt that the model sees has the system prompt and the earlier answers, and no earlier reasoning."""
    seen: list[str] = []
    original = model.generate

    def spy(input_ids: Tensor, **kwargs: Any) -> Any:
        seen.append(tokenizer.decode(input_ids[0]))
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    hybrid = HybridModel(model, tokenizer)
    messages = [{"role": "system", "content": "sum mod 10"}]
    written = {"think": "<think> let me add </think> 3", "no_think": "<no_think> 3 </no_think>"}
    for turn, mode in enumerate(modes):
        messages.append({"role": "user", "content": "a = 3 ?"})
        seen.clear()
        generation = hybrid(messages, mode=mode, **GREEDY)
        assert mode == "auto" or generation.mode == mode
        tag = "" if mode == "auto" else f" <{mode}>"
        earlier = "User: a = 3 ? Assistant: 3 <eos> " * turn
        assert seen[0] == f"<bos> System: sum mod 10 {earlier}User: a = 3 ? Assistant:{tag}"
        messages.append({"role": "assistant", "content": written["think" if mode == "auto" else mode]})


def test_a_response_given_back_as_it_came_is_its_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`text` and `answer` of a whole response make the same history."""
    for text in ("<think> let me add </think> 3", "<no_think> 3 </no_think>", "3"):
        answer = split_response(text).answer
        histories = [
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": content},
                {"role": "user", "content": "b"},
            ]
            for content in (text, answer)
        ]
        one, other = (prompt_ids(tokenizer, history) for history in histories)
        assert one == other
