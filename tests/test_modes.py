"""modes: responses as text, tags in four families of tokenizers, embedding rows in tied and untied models."""

import re
import sys
import time
import types

import pytest
import torch
import transformers.integrations
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_zoo import FAMILIES, llama3, qwen2, tiny_llama, tiny_qwen2, word_level
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hgpo_trl.modes import (
    MODES,
    TAGS,
    Fault,
    Mode,
    Response,
    add_mode_tokens,
    check_embeddings,
    format_response,
    mode_tokens,
    split_response,
)

# --- text -----------------------------------------------------------------------------------------------------------


def test_the_tags_and_their_order():
    assert MODES == (Mode.THINK, Mode.NO_THINK) == ("think", "no_think")
    assert TAGS == ("<think>", "</think>", "<no_think>", "</no_think>")


@pytest.mark.parametrize(
    ("text", "mode", "reasoning", "answer", "faults"),
    [
        ("<think>\n1 + 1\n</think>\n\n2", "think", "1 + 1", "2", ""),
        ("<no_think>\n2\n</no_think>", "no_think", "", "2", ""),
        (" \n<think>a</think>b\n", "think", "a", "b", ""),
        ("\t<no_think>2</no_think> \n", "no_think", "", "2", ""),
        ("<think></think>2", "think", "", "2", ""),
        (
            "<no_think>a < b, <b>c</b>, [think], I think</no_think>",
            "no_think",
            "",
            "a < b, <b>c</b>, [think], I think",
            "think_in_no_think",
        ),
        ("<think><thinking>a</thinking></think>b", "think", "<thinking>a</thinking>", "b", ""),
        ("", None, "", "", "no_mode"),
        (" 2 ", None, "", "2", "no_mode"),
        ("So: <think>a</think>b", None, "", "So: <think>a</think>b", "no_mode"),
        ("a</think>b", None, "", "a</think>b", "no_mode"),
        ("</no_think>", None, "", "</no_think>", "no_mode"),
        ("<THINK>a</THINK>b", None, "", "<THINK>a</THINK>b", "no_mode"),
        ("<think>a b", "think", "a b", "", "unclosed"),
        ("<think>", "think", "", "", "unclosed"),
        ("<no_think>2", "no_think", "", "2", "unclosed"),
        ("<no_think>", "no_think", "", "", "unclosed"),
        ("<think>a</no_think>b", "think", "a</no_think>b", "", "unclosed nested"),
        ("<think>a<think>b</think>c", "think", "a<think>b", "c", "nested"),
        ("<think>a<no_think>b</think>c", "think", "a<no_think>b", "c", "nested"),
        ("<think>a</think>b</think>c", "think", "a", "b</think>c", "nested"),
        ("<think>a</think><no_think>b</no_think>", "think", "a", "<no_think>b</no_think>", "nested"),
        ("<no_think><no_think>2</no_think>", "no_think", "", "<no_think>2", "nested"),
        ("<no_think>2</no_think></no_think>", "no_think", "", "2", "nested trailing_text"),
        ("<no_think><think>a</think>2</no_think>", "no_think", "", "<think>a</think>2", "think_in_no_think"),
        ("<no_think>2</think>", "no_think", "", "2</think>", "unclosed think_in_no_think"),
        ("<no_think><no_think></think>2", "no_think", "", "<no_think></think>2", "unclosed nested think_in_no_think"),
        ("<no_think>2</no_think> Wait, 3.", "no_think", "", "2", "trailing_text"),
        ("<no_think>2</no_think><think>a</think>3", "no_think", "", "2", "nested trailing_text"),
        ("<think>a</think> \n", "think", "a", "", "empty_answer"),
        ("<no_think> </no_think>", "no_think", "", "", "empty_answer"),
        ("<no_think></no_think>2", "no_think", "", "", "trailing_text empty_answer"),
    ],
)
def test_split_response(text, mode, reasoning, answer, faults):
    response = split_response(text)
    assert response == Response(mode and Mode(mode), reasoning, answer, tuple(Fault(name) for name in faults.split()))
    assert response.well_formed == (not faults)


anything = st.lists(st.sampled_from([*TAGS, " ", "\n", "2", "<", "think>"]) | st.text(), max_size=12).map("".join)
tag_free = anything.filter(lambda text: not any(tag in text for tag in TAGS))

FREE = rf"((?:(?!{'|'.join(TAGS)}).)*)"
WELL_FORMED = re.compile(rf"\s*(?:<think>{FREE}</think>{FREE}|<no_think>{FREE}</no_think>\s*)", re.DOTALL)


@given(anything)
def test_every_text_can_be_split_and_only_the_two_formats_are_well_formed(text):
    response = split_response(text)
    assert response.reasoning in text
    assert response.answer in text
    assert (response.mode is None) == (Fault.NO_MODE in response.faults)
    assert response.mode is not None or response.answer == text.strip()
    match = WELL_FORMED.fullmatch(text)
    assert response.well_formed == bool(match and (match[2] or match[3] or "").strip())


@given(st.sampled_from(MODES), tag_free.filter(str.strip), tag_free)
def test_what_was_formatted_splits_into_the_same_parts(mode, answer, reasoning):
    reasoning = reasoning if mode is Mode.THINK else ""
    text = format_response(mode, answer, reasoning)
    assert split_response(text) == Response(mode, reasoning.strip(), answer.strip(), ())
    assert format_response(mode, split_response(text).answer, split_response(text).reasoning) == text


TRACES = [
    "<thinking>a</thinking>", "<Thinking>", "</thinking>", "a</thinking>b", "<THINK>a</THINK>", "<think/>", "<thought>",
    "</thoughts>", "<reasoning>a", "<reflection>", "<scratchpad>\n1 + 1\n</scratchpad>", "<|begin_of_thought|>",
    "a<|end_of_thought|>", "<|think|>", "[THINK]a[/THINK]", "◁think▷a◁/think▷", "◁/THINK▷",
]  # fmt: skip
NO_TRACES = [
    "I think, on reflection, that this reasoning is a thought.", "a < thinking > b", "[thinking] or [a thought]",
    "<b>think</b>", "<reason>x</reason>", "<thinkpad>", "<div class='thinking'>a</div>", "<rethink>",
    "<p>reasoning</p>",
    "List<Thought> thoughts = new ArrayList<Reflection>();", "vector<thinking>", "array[thinking]", "|think|",
    "▷think◁",
]  # fmt: skip


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_in_other_marks_is_a_fault_of_no_think_alone(trace):
    for answer in (trace, f"So.\n{trace} 2"):
        assert split_response(f"<no_think>{answer}</no_think>").faults == (Fault.THINK_IN_NO_THINK,)
        assert split_response(f"<think>{answer}</think>{answer}").well_formed
        with pytest.raises(ValueError, match="a reasoning trace, in mode no_think: use mode think"):
            format_response("no_think", answer)
        assert split_response(format_response("think", answer, answer)).answer == answer


@pytest.mark.parametrize("answer", NO_TRACES)
def test_prose_and_code_about_thinking_are_no_trace(answer):
    assert split_response(format_response("no_think", answer)) == Response(Mode.NO_THINK, "", answer, ())


def test_splitting_takes_linear_time():
    near = "<no_think>" + "<thinking" * 100_000 + "<|/think" * 100_000
    start = time.process_time()  # of this process alone, whatever else the machine does
    for text in ("<" * 1_000_000, "<think>" * 100_000, "<no_think>" + "</think" * 100_000, " " * 1_000_000, near):
        split_response(text)
    assert time.process_time() - start < 60, "a second, where it is linear; hours, where it is not"


def test_the_formats_to_the_letter():
    assert format_response(Mode.THINK, " 2\n", "1 + 1") == "<think>\n1 + 1\n</think>\n\n2"
    assert format_response("think", "2") == "<think>\n\n</think>\n\n2"
    assert format_response("no_think", "2") == "<no_think>\n2\n</no_think>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_think", "2", "because"), "reasoning was given for mode no_think"),
        (("think", " \n", "because"), "answer is blank"),
        (("no_think", ""), "answer is blank"),
        (("think", "a</think>b", "because"), "answer contains the tag </think>"),
        (("think", "2", "<no_think>"), "reasoning contains the tag <no_think>"),
        (("auto", "2"), "'auto' is not a valid Mode"),
    ],
)
def test_what_cannot_be_formatted(arguments, message):
    with pytest.raises(ValueError, match=message):
        format_response(*arguments)


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


def test_tags_are_added_once_as_ordinary_tokens(tokenizer, tmp_path):
    size = len(tokenizer)
    special = set(tokenizer.all_special_tokens)
    assert add_mode_tokens(tokenizer) == 4
    tokens = mode_tokens(tokenizer)
    assert tokens.ids == tuple(range(size, size + 4))
    assert tokens.decision == (tokens.think, tokens.no_think)
    assert set(tokenizer.all_special_tokens) == special
    assert add_mode_tokens(tokenizer) == 0
    assert len(tokenizer) == size + 4

    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert mode_tokens(reloaded) == tokens
    assert add_mode_tokens(reloaded) == 0


def test_a_response_survives_encoding_and_decoding(tokenizer):
    add_mode_tokens(tokenizer)
    words = "the answer is 5."
    for mode, reasoning in ((Mode.THINK, "12 * 4"), (Mode.NO_THINK, "")):
        ids = tokenizer.encode(format_response(mode, words, reasoning), add_special_tokens=False)
        assert ids[0] == mode_tokens(tokenizer).decision[MODES.index(mode)]
        text = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True)
        response = split_response(text)
        assert response.well_formed
        assert response.mode is mode
        assert response.reasoning.split() == reasoning.split()
        assert words.split()[:3] == response.answer.split()[:3]


def test_a_missing_tag_is_refused_with_the_remedy(tokenizer):
    with pytest.raises(ValueError, match=r"The tag <think> is not a token.*hgpo_trl\.modes\.add_mode_tokens"):
        mode_tokens(tokenizer)


def test_a_special_tag_is_refused_and_nothing_is_changed(tokenizer):
    tokenizer.add_tokens([AddedToken(tag, special=tag == "</no_think>") for tag in TAGS[1:]])
    size = len(tokenizer)
    with pytest.raises(ValueError, match=r"The tag </no_think> is a special token.*re-register it as an ordinary"):
        add_mode_tokens(tokenizer)
    assert len(tokenizer) == size
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    with pytest.raises(ValueError, match="The tag </no_think> is a special token"):
        mode_tokens(tokenizer)


def test_a_tag_among_extra_special_tokens_is_refused():
    tokenizer = qwen2()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    with pytest.raises(ValueError, match="The tag <think> is a special token"):
        add_mode_tokens(tokenizer)


def test_tags_that_were_there_before_are_kept():
    tokenizer = qwen2()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS[:2]])  # as Qwen3 has them
    before = tokenizer.get_vocab()
    assert add_mode_tokens(tokenizer) == 2
    tokens = mode_tokens(tokenizer)
    assert (tokens.think, tokens.end_think) == (before["<think>"], before["</think>"])


def _word_tokenizer(vocab, pre_tokenizer=None, decoder=None, unk_token="<unk>"):
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk_token)


WORDS = {"<unk>": 0, "a": 1, "b": 2, **{tag: i + 3 for i, tag in enumerate(TAGS)}}


def test_a_tag_that_is_only_a_word_is_refused_and_can_be_made_a_token():
    tokenizer = _word_tokenizer(WORDS)
    with pytest.raises(ValueError, match=r"The tag <think> is not one token in 'a<think>b'.*add_mode_tokens"):
        mode_tokens(tokenizer)
    model = tiny_llama(len(WORDS))
    rows = model.lm_head.weight.clone()
    assert add_mode_tokens(tokenizer, model) == 4
    assert mode_tokens(tokenizer).ids == (3, 4, 5, 6)  # the ids, and what the model knows about them, stay
    assert torch.equal(model.lm_head.weight, rows)


def test_a_tag_that_is_split_even_alone_is_refused():
    tokenizer = _word_tokenizer(WORDS, pre_tokenizers.Whitespace())
    with pytest.raises(ValueError, match=r"The tag <think> is not one token in '<think>'"):
        mode_tokens(tokenizer)


def test_the_unknown_token_is_no_tag():
    vocab = {token: i for token, i in WORDS.items() if token != "<unk>"}
    with pytest.raises(ValueError, match="The tag <think> is not a token"):
        mode_tokens(_word_tokenizer(vocab, unk_token="<think>"))


def test_tags_with_one_id_are_refused(monkeypatch):
    tokenizer = _word_tokenizer(WORDS)
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: WORDS | {"<no_think>": 3})
    with pytest.raises(ValueError, match="The tags <think> and <no_think> share the token id 3"):
        mode_tokens(tokenizer)


def test_a_tag_that_decoding_loses_is_refused():
    tokenizer = _word_tokenizer(WORDS, decoder=decoders.Replace(Regex("</?no_think>"), ""))
    with pytest.raises(ValueError, match=r"The tag <no_think> does not survive decoding.*decoder"):
        add_mode_tokens(tokenizer)


# --- models ---------------------------------------------------------------------------------------------------------

SPARE = 40
MODELS = {"tied, spare rows": lambda size: tiny_qwen2(size + SPARE), "untied, no spare rows": tiny_llama}


@pytest.fixture(params=MODELS)
def make_model(request):
    return MODELS[request.param]


def _per_token(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def _expected_rows(tokenizer, tensor):
    """Per tag the mean of its pieces' rows, or of all used rows where one of the pieces is unknown."""
    rows = []
    for tag in TAGS:
        ids = [i for part in ("<", tag[1:]) for i in tokenizer.encode(part, add_special_tokens=False)]
        known = list(range(len(tokenizer))) if tokenizer.unk_token_id in ids else ids
        rows.append(torch.stack([tensor[i] for i in known]).mean(0))
    return torch.stack(rows)


def test_new_rows_are_the_mean_of_their_pieces(tokenizer, make_model):
    size = len(tokenizer)
    model = make_model(size)
    old_size = model.config.vocab_size
    old = [tensor.detach().clone() for tensor in _per_token(model)]
    expected = [_expected_rows(tokenizer, tensor) for tensor in old]

    assert add_mode_tokens(tokenizer, model) == 4

    ids = list(mode_tokens(tokenizer).ids)
    check_embeddings(model, mode_tokens(tokenizer))
    for tensor, before, rows in zip(_per_token(model), old, expected, strict=True):
        torch.testing.assert_close(tensor[ids], rows)
        assert torch.equal(tensor[:size], before[:size])
        assert 0 < tensor[ids].norm(dim=1).min() <= tensor[ids].norm(dim=1).max() <= before.norm(dim=1).max()
        if old_size > size:
            assert torch.equal(tensor[size + 4 :], before[size + 4 :])
        else:  # padding: nothing that would draw probability
            torch.testing.assert_close(tensor[size + 4 :], before.mean(0).expand(len(tensor) - size - 4, -1))

    spare = old_size >= size + 4
    assert model.config.vocab_size == len(_per_token(model)[0]) == (old_size if spare else -(-(size + 4) // 64) * 64)
    assert model.config.tie_word_embeddings == (_per_token(model)[0] is _per_token(model)[1])


def test_rows_are_initialised_once(tokenizer, make_model):
    model = make_model(len(tokenizer))
    add_mode_tokens(tokenizer, model)
    with torch.no_grad():
        for tensor in _per_token(model):
            tensor[list(mode_tokens(tokenizer).ids)] = 1.0  # as if trained
    rows = [tensor.detach().clone() for tensor in _per_token(model)]
    assert add_mode_tokens(tokenizer, model) == 0
    assert all(torch.equal(*pair) for pair in zip(rows, _per_token(model), strict=True))


def test_a_model_with_new_tags_trains_and_reloads(tokenizer, make_model, tmp_path):
    model = make_model(len(tokenizer))
    add_mode_tokens(tokenizer, model)
    ids = tokenizer(format_response("think", "is 5.", "2 + 3"), return_tensors="pt")["input_ids"]
    output = model(input_ids=ids, labels=ids)
    assert output.loss.isfinite()
    output.loss.backward()
    assert _per_token(model)[0].grad[mode_tokens(tokenizer).end_think].abs().sum() > 0

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert add_mode_tokens(AutoTokenizer.from_pretrained(tmp_path), reloaded) == 0
    torch.testing.assert_close(reloaded(input_ids=ids).logits, output.logits)
    assert model.config.tie_word_embeddings == (_per_token(reloaded)[0] is _per_token(reloaded)[1])


def test_rows_of_tags_that_were_there_before_are_not_touched():
    tokenizer = qwen2()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS[:2]])
    model = tiny_qwen2(len(tokenizer))
    before = _per_token(model)[0].detach().clone()
    assert add_mode_tokens(tokenizer, model) == 2
    assert torch.equal(_per_token(model)[0][: len(before)], before)


def test_a_tokenizer_with_tags_and_a_model_without():
    tokenizer, plain = llama3(), llama3()
    model = tiny_llama(len(plain))
    add_mode_tokens(tokenizer)
    expected = _expected_rows(plain, _per_token(model)[0].detach().clone())
    tokens = mode_tokens(tokenizer)
    rows = len(plain)
    with pytest.raises(
        ValueError, match=rf"<think> has id {rows},.*input embedding has only {rows} rows.*add_mode_tok"
    ):
        check_embeddings(model, tokens)
    assert add_mode_tokens(tokenizer, model) == 0
    check_embeddings(model, tokens)
    torch.testing.assert_close(_per_token(model)[0][list(tokens.ids)], expected)


def test_a_missing_output_row_is_found():
    tokenizer = llama3()
    model = tiny_llama(len(tokenizer) + 4)
    add_mode_tokens(tokenizer)
    rows = len(tokenizer) - 1
    model.lm_head = nn.Linear(16, rows)
    with pytest.raises(ValueError, match=f"</no_think> has id {rows}, but the model's output .* has only {rows} rows"):
        check_embeddings(model, mode_tokens(tokenizer))


def test_a_model_without_output_embedding():
    tokenizer = llama3()
    model = tiny_llama(len(tokenizer)).model
    add_mode_tokens(tokenizer, model)
    check_embeddings(model, mode_tokens(tokenizer))


@pytest.mark.parametrize("spare", [0, 10])
def test_an_output_bias_gets_entries_too(spare):
    tokenizer = llama3()
    model = tiny_llama(len(tokenizer) + spare)
    model.lm_head = nn.Linear(16, len(tokenizer) + spare, bias=True)
    expected = _expected_rows(tokenizer, model.lm_head.bias.detach().clone())
    add_mode_tokens(tokenizer, model)
    torch.testing.assert_close(model.lm_head.bias[list(mode_tokens(tokenizer).ids)], expected)


def test_half_precision_is_kept():
    tokenizer = word_level()
    model = tiny_llama(len(tokenizer)).to(torch.bfloat16)
    mean = model.lm_head.weight.float().mean(0)
    add_mode_tokens(tokenizer, model)
    assert model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.lm_head.weight[mode_tokens(tokenizer).think], mean.to(torch.bfloat16))


def test_zero3_gathers_the_weights_and_rank_0_spreads_them(monkeypatch):
    """A stand-in for DeepSpeed: outside of GatheredParameters a partitioned weight is empty and has a `ds_shape`."""

    class GatheredParameters:
        def __init__(self, params, modifier_rank=None):
            self.params, self.modifier_rank = params, modifier_rank

        def __enter__(self):
            for param in self.params:
                param.data = param.whole

        def __exit__(self, *_):
            for param in self.params:
                if self.modifier_rank == 0:
                    param.whole = param.data
                param.data = torch.empty(0)

    zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)

    tokenizer = qwen2()
    model = tiny_qwen2(len(tokenizer) + SPARE)
    weight = model.lm_head.weight
    weight.whole, weight.ds_shape, weight.data = weight.data.clone(), weight.shape, torch.empty(0)
    expected = _expected_rows(tokenizer, weight.whole)
    add_mode_tokens(tokenizer, model)
    check_embeddings(model, mode_tokens(tokenizer))
    torch.testing.assert_close(weight.whole[list(mode_tokens(tokenizer).ids)], expected)
