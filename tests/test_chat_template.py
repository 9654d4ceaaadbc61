"""chat_template: what is rendered, in four families of tokenizers, and what TRL's SFT makes of it."""

import itertools
import re

import pytest
from datasets import Dataset
from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from settings import ON_CPU, argv
from tokenizers import processors
from tokenizers_zoo import (
    FAMILIES,
    MISTRAL,
    instruct,
    llama3,
    qwen2,
    sentencepiece,
    shipped_templates,
    tiny_qwen2,
    word_level,
)
from transformers import AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_stop_token_trained, qwen3_chat_template

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import MODES, add_mode_tokens, format_response, mode_tokens
from hgpo_trl.modes.chat_template import build_chat_template, has_thinking_modes, read_template, set_chat_template
from hgpo_trl.scripts import hft


def ready(build):
    tokenizer = build()
    add_mode_tokens(tokenizer)
    set_chat_template(tokenizer)
    return tokenizer


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return ready(FAMILIES[request.param])


@pytest.fixture
def chatml():
    return ready(qwen2)


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def text(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def prompt(tokenizer, messages, **kwargs):
    return text(tokenizer, messages, add_generation_prompt=True, **kwargs)


def ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)


THINK, NO_THINK = format_response("think", "5", "2 + 3 = 5"), format_response("no_think", "10")
PROMPT = [system("Be brief."), user("2 + 3?"), assistant(THINK), user("Now double it.")]

# --- what is rendered -------------------------------------------------------------------------------------------------

PLAIN = "System: Be brief.\nUser: 2 + 3?\nAssistant: 5{eos}\nUser: Now double it.\nAssistant:"
RENDERED = {  # PROMPT with a generation prompt, and the token that ends a response
    "word_level": (PLAIN.format(eos="<eos>"), "<eos>"),
    "qwen2": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\nNow double it.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nNow double it.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "sentencepiece": ("<s>" + PLAIN.format(eos="</s>"), "</s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_training_examples_to_the_letter(family):
    tokenizer = ready(FAMILIES[family])
    expected, stop = RENDERED[family]
    assert prompt(tokenizer, PROMPT) == expected
    assert prompt(tokenizer, PROMPT, thinking_mode="auto") == expected
    assert prompt(tokenizer, PROMPT, thinking_mode="think") == expected + "<think>"
    assert prompt(tokenizer, PROMPT, thinking_mode="no_think") == expected + "<no_think>"
    assert text(tokenizer, [*PROMPT, assistant(NO_THINK)]) == expected + NO_THINK + stop


def test_the_first_turn_needs_no_system_message(chatml):
    assert prompt(chatml, [user("Hi")]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_each_family_ends_turns_and_pads_with_its_own_tokens():
    tokens = {name: (t.eos_token, t.pad_token) for name, t in ((n, ready(build)) for n, build in FAMILIES.items())}
    assert tokens == {
        "word_level": ("<eos>", "<pad>"),
        "qwen2": ("<|im_end|>", "<|endoftext|>"),
        "llama3": ("<|eot_id|>", "<|end_of_text|>"),
        "sentencepiece": ("</s>", "<unk>"),
    }


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        ({"enable_thinking": True}, "<think>"),
        ({"enable_thinking": False}, "<no_think>"),
        ({"enable_thinking": None}, ""),
        ({"thinking_mode": None}, ""),
        ({"thinking_mode": None, "enable_thinking": False}, "<no_think>"),
        ({"thinking_mode": "think", "enable_thinking": False}, "<think>"),
        ({"thinking_mode": "auto", "enable_thinking": True}, ""),
        ({"thinking_mode": MODES[1]}, "<no_think>"),
    ],
)
def test_the_callers_choice_of_mode(tokenizer, arguments, tag):
    assert prompt(tokenizer, PROMPT, **arguments) == prompt(tokenizer, PROMPT) + tag


def test_a_training_example_carries_its_own_mode(chatml):
    messages = [user("Hi"), assistant(NO_THINK)]
    assert text(chatml, messages, thinking_mode="think") == text(chatml, messages)


@pytest.mark.parametrize(
    ("turn", "kept"),
    [
        (assistant(THINK), "5"),
        (assistant(NO_THINK), "10"),
        (assistant(" <think></think> a "), "a"),
        (assistant("a < b"), "a < b"),
        (assistant("<think>never ended"), ""),
        (assistant("<no_think>never ended"), "never ended"),
        (assistant("as R1's parser leaves it</think>\n\na"), "a"),
        (assistant("a", reasoning_content="because"), "a"),
        (assistant(None), ""),
    ],
)
def test_an_earlier_turn_keeps_only_its_answer(chatml, turn, kept):
    rendered = prompt(chatml, [user("1"), turn, user("2")])
    assert f"<|im_start|>assistant\n{kept}<|im_end|>\n<|im_start|>user\n2" in rendered
    assert "think>" not in rendered


@pytest.mark.parametrize(
    ("turn", "rendered"),
    [
        (assistant(THINK), THINK),
        (assistant(f"\n{NO_THINK}\n"), NO_THINK),
        (assistant("5", reasoning_content="2 + 3 = 5\n"), THINK),
        (assistant("5", reasoning_content=None), "5"),
        (assistant(NO_THINK, reasoning_content="ignored"), NO_THINK),
        (assistant("<think>a<think>b"), "<think>a<think>b"),
    ],
)
def test_the_final_turn_is_rendered_as_it_is(chatml, turn, rendered):
    assert text(chatml, [user("?"), turn]).endswith(f"<|im_start|>assistant\n{rendered}<|im_end|>")


@pytest.mark.parametrize("modes", itertools.product(("think", "no_think", "neither"), repeat=2), ids="-".join)
def test_a_history_is_its_answers_whatever_its_modes(tokenizer, modes):
    written = {"think": THINK, "no_think": format_response("no_think", "5"), "neither": "5"}
    turns = [(user("2 + 3?"), assistant(written[mode])) for mode in modes]
    answers = [(user("2 + 3?"), assistant("5"))] * len(modes)
    for mode in ("auto", *MODES):
        one, other = (
            prompt(tokenizer, [system("Be brief."), *itertools.chain(*history), user("And now?")], thinking_mode=mode)
            for history in (turns, answers)
        )
        assert one == other
        assert one.count("Be brief.") == 1


def test_an_answer_without_a_mode_has_its_blank_in_plain_text():
    assert text(ready(sentencepiece), [user("?"), assistant("5")]) == "<s>User: ?\nAssistant: 5</s>"


def test_content_in_parts_is_joined(tokenizer):
    parts = [{"type": "text", "text": "Now "}, {"type": "text", "text": "double it."}]
    answer = [{"type": "text", "text": NO_THINK}]
    assert text(tokenizer, [user(parts), assistant(answer)]) == text(
        tokenizer, [user("Now double it."), assistant(NO_THINK)]
    )


@pytest.mark.parametrize(
    ("messages", "arguments", "message"),
    [
        ([user("?")], {"thinking_mode": "fast"}, "thinking_mode must be one of auto, think, no_think; got fast"),
        ([user("?")], {"thinking_mode": True}, "must be one of auto, think, no_think; got True"),
        ([user("?")], {"tools": [{"type": "function"}]}, "tools were given.*leave tools out"),
        ([user("?"), {"role": "tool", "content": "5"}], {}, "role must be one of system, user, assistant; got tool"),
        ([user([{"type": "image"}])], {}, "content has a part of type image"),
    ],
)
def test_what_the_template_refuses(tokenizer, messages, arguments, message):
    with pytest.raises(TemplateError, match=message):
        prompt(tokenizer, messages, **arguments)


def test_a_response_can_be_continued(chatml):
    messages = [user("?"), assistant("<think>\nFirst")]
    assert text(chatml, messages, continue_final_message=True) == prompt(chatml, messages[:1]) + "<think>\nFirst"


# --- token ids --------------------------------------------------------------------------------------------------------

QUESTIONS = ["2 + 3?", "def add(a, b):\n    return a + b\n", "Héllo 漢字 🙂\n\n", " ", "", "a\tb:"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("history", [[], PROMPT], ids=["single turn", "several turns"])
def test_a_forced_mode_is_the_automatic_prompt_and_one_id(tokenizer, question, history):
    messages = [*history, user(question)]
    auto = ids(tokenizer, messages, add_generation_prompt=True)
    for mode, tag in zip(MODES, mode_tokens(tokenizer).decision, strict=True):
        assert ids(tokenizer, messages, add_generation_prompt=True, thinking_mode=mode) == [*auto, tag]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("history", [[], PROMPT], ids=["single turn", "several turns"])
@pytest.mark.parametrize(
    "response",
    [
        assistant(THINK),
        assistant(NO_THINK),
        assistant("<think>\n\n</think>\n\n漢"),
        assistant("5", reasoning_content="2 + 3"),
    ],
    ids=["think", "no_think", "no reasoning", "reasoning_content"],
)
def test_the_prompt_is_a_prefix_of_the_training_example(tokenizer, question, history, response):
    messages = [*history, user(question)]
    before = ids(tokenizer, messages, add_generation_prompt=True)
    whole = ids(tokenizer, [*messages, response])
    assert whole[: len(before)] == before
    assert whole[len(before)] in mode_tokens(tokenizer).decision
    assert whole[-1] == tokenizer.eos_token_id


def test_the_beginning_of_sequence_token_comes_once():
    for build in (llama3, sentencepiece):
        tokenizer = ready(build)
        assert ids(tokenizer, PROMPT).count(tokenizer.bos_token_id) == 1


def test_chatml_begins_with_the_token_with_which_the_tokenizer_begins():
    tokenizer = qwen2()
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2-Instruct names it, without ever putting it first
    set_chat_template(tokenizer)
    assert prompt(tokenizer, [user("Hi")]).startswith("<|im_start|>user")

    tokenizer = qwen2()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    set_chat_template(tokenizer)
    assert prompt(tokenizer, [user("Hi")]).startswith("<s><|im_start|>user")


def test_only_the_final_response_and_its_end_are_masked_in(tokenizer):
    messages = [*PROMPT, assistant(THINK)]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    before = ids(tokenizer, PROMPT, add_generation_prompt=True)
    mask = encoded["assistant_masks"]
    assert mask == [0] * len(before) + [1] * (len(mask) - len(before))
    assert encoded["input_ids"][len(before)] == mode_tokens(tokenizer).think
    assert encoded["input_ids"][-1] == tokenizer.eos_token_id


def test_trl_finds_that_the_end_of_turn_is_trained(tokenizer):
    assert is_chat_template_stop_token_trained(tokenizer)


# --- installing it ----------------------------------------------------------------------------------------------------


BROKEN = ("{{ raise_exception('no') }}", "{{ messages[0].missing.missing }}", "{% if %}")


def test_the_template_is_recognised_and_others_are_not():
    tokenizer = qwen2()
    assert not has_thinking_modes(tokenizer)
    for other in (
        qwen3_chat_template,  # knows enable_thinking, but not how not to decide
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        *BROKEN,
    ):
        tokenizer.chat_template = other
        assert not has_thinking_modes(tokenizer)
    tokenizer.chat_template = None
    set_chat_template(tokenizer)
    assert has_thinking_modes(tokenizer)
    tokenizer.chat_template = "Q:{% if thinking_mode in ['think', 'no_think'] %}<{{ thinking_mode }}>{% endif %}"
    assert has_thinking_modes(tokenizer)


def test_it_is_saved_and_can_be_set_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(2):
        assert has_thinking_modes(reloaded)
        assert prompt(reloaded, PROMPT) == prompt(tokenizer, PROMPT)
        assert (reloaded.eos_token, reloaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        set_chat_template(reloaded)


def test_the_pad_token_is_not_the_end_of_turn_where_that_can_be_avoided():
    tokenizer = qwen2()
    tokenizer.pad_token = "<|im_end|>"
    set_chat_template(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"

    tokenizer = word_level()
    tokenizer.pad_token = tokenizer.unk_token
    set_chat_template(tokenizer)
    assert tokenizer.pad_token == "<unk>"  # a choice of the user's that does no harm

    tokenizer = llama3()
    tokenizer.eos_token = "<|eot_id|>"  # as in the Instruct models
    set_chat_template(tokenizer)
    assert tokenizer.pad_token == "<|end_of_text|>"


def test_plain_text_needs_an_end_of_turn():
    tokenizer = word_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token is not set"):
        build_chat_template(tokenizer)
    with pytest.raises(ValueError, match="eos_token is not set"):
        set_chat_template(tokenizer)
    assert tokenizer.chat_template is None


def test_a_token_name_with_quotes_is_quoted():
    tokenizer = word_level()
    tokenizer.add_special_tokens({"eos_token": "<'\"\\é%}>"})
    set_chat_template(tokenizer)
    assert text(tokenizer, [user("?"), assistant(NO_THINK)]).endswith(NO_THINK + "<'\"\\é%}>")


# --- around a model's own template ------------------------------------------------------------------------------------

SHIPPED = shipped_templates()
# What TRL ships for models whose turns have no place for a mode's tag, and why.
REFUSED = {
    "glm4moe": "ends an assistant's turn with ''",
    **dict.fromkeys(("gptoss", "gptoss_training", "muse_glimmer", "muse_glimmer_training"), "has no place"),
    **dict.fromkeys(("idefics3", "idefics3_training", "smolvlm", "smolvlm_training"), "has no place"),
    **dict.fromkeys(("llava_next", "llava_next_training"), "fails at a question and an answer"),
}
OWN = {"mistral": MISTRAL} | {name: source for name, source in SHIPPED.items() if name not in REFUSED}


def hybrid(template, *more):
    return ready(lambda: instruct(template, *more))


R1 = SHIPPED["deepseek_r1_distill"]
TURNS = [user("2 + 3?"), assistant(THINK), user("Now double it.")]


@pytest.mark.parametrize(
    ("template", "expected", "stop"),
    [
        (
            SHIPPED["gemma"],
            "<bos><start_of_turn>user\n2 + 3?<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>\n"
            "<start_of_turn>user\nNow double it.<end_of_turn>\n<start_of_turn>model\n",
            "<end_of_turn>",
        ),
        (MISTRAL, "<bos>[INST] 2 + 3? [/INST] 5<eos>[INST] Now double it. [/INST]", "<eos>"),
        (
            R1,  # its own generation prompt goes on with <think>
            "<bos><｜User｜>2 + 3?<｜Assistant｜>5<｜end▁of▁sentence｜><｜User｜>Now double it.<｜Assistant｜>",
            "<｜end▁of▁sentence｜>",
        ),
        (
            SHIPPED["phi3"],
            "<|user|>\n2 + 3?<|end|>\n<|assistant|>\n5<|end|>\n<|user|>\nNow double it.<|end|>\n<|assistant|>\n",
            "<|end|>",
        ),
        (
            SHIPPED["llama3"],
            "<bos><|start_header_id|>user<|end_header_id|>\n\n2 + 3?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nNow double it.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ],
    ids=["gemma", "mistral", "r1-distill", "phi3", "llama3"],
)
def test_a_model_keeps_its_turns(template, expected, stop):
    tokenizer = hybrid(template)
    assert prompt(tokenizer, TURNS) == expected
    assert prompt(tokenizer, TURNS, thinking_mode="think") == f"{expected}<think>"
    assert prompt(tokenizer, TURNS, enable_thinking=False) == f"{expected}<no_think>"
    for response in (THINK, NO_THINK):
        assert text(tokenizer, [*TURNS, assistant(response)]) == f"{expected}{response}{stop}"
    assert tokenizer.eos_token == stop
    assert tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("name", OWN)
def test_prompts_are_those_of_the_models_own_template(name):
    """No earlier turn has a trace, and a default system prompt is left out where one of our dialects writes the turns.

    Every template that TRL ships for models whose turns have a place for the modes.
    """
    before, tokenizer = instruct(OWN[name]), hybrid(OWN[name])
    answers = [{**message, "content": "5"} if message["role"] == "assistant" else message for message in TURNS]
    for messages, plain in ((TURNS[:1], TURNS[:1]), (TURNS, answers)):
        own, ours = prompt(before, plain), prompt(tokenizer, messages)
        if "set headers" in tokenizer.chat_template:
            own = re.sub(r"<think>\s*</think>\s*", "", own)
            own = own[own.rindex(ours.removeprefix("<bos>")) :]
            ours = ours.removeprefix("<bos>")
        assert own.startswith(ours)
        assert own.removeprefix(ours).strip() in ("", "<think>", "</think>")
        assert "2 + 3 = 5" not in ours


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("history", [[], TURNS[:2]], ids=["single turn", "several turns"])
def test_modes_in_every_template(name, history):
    tokenizer = hybrid(OWN[name])
    assert has_thinking_modes(tokenizer)
    messages = [*history, user("Now double it.")]
    before = ids(tokenizer, messages, add_generation_prompt=True)
    for mode, tag in zip(MODES, mode_tokens(tokenizer).decision, strict=True):
        assert ids(tokenizer, messages, add_generation_prompt=True, thinking_mode=mode) == [*before, tag]
        assert ids(tokenizer, messages, add_generation_prompt=True, enable_thinking=mode == "think") == [*before, tag]
    for response in (assistant(THINK), assistant(NO_THINK), assistant("5", reasoning_content="2 + 3 = 5")):
        encoded = tokenizer.apply_chat_template(
            [*messages, response], return_dict=True, return_assistant_tokens_mask=True
        )
        whole = encoded["input_ids"]
        assert whole[: len(before)] == before
        written = tokenizer.decode(whole[len(before) :])
        assert written == (THINK if response["content"] != NO_THINK else NO_THINK) + tokenizer.eos_token
        assert whole[-1] == tokenizer.eos_token_id
        assert encoded["assistant_masks"] == [0] * len(before) + [1] * (len(whole) - len(before))


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_without_a_place_for_the_modes_is_refused(name):
    tokenizer = instruct(SHIPPED[name])
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        set_chat_template(tokenizer)
    assert "chat_template.jinja" in str(caught.value), "what to do"
    assert tokenizer.chat_template == SHIPPED[name]


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_is_refused(template):
    with pytest.raises(UserError, match="fails at a question and an answer"):
        set_chat_template(instruct(template))


def test_the_models_own_turns_count_not_the_tokens_that_it_happens_to_have():
    """R1-Distill-Llama has Llama 3's headers in its vocabulary, and has not been trained on them."""
    tokenizer = hybrid(R1, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
    assert prompt(tokenizer, [user("Hi")]) == "<bos><｜User｜>Hi<｜Assistant｜>"


def test_a_default_system_prompt_does_not_speak_for_a_mode():
    tokenizer = hybrid(SHIPPED["qwen2_5"])
    assert "You are Qwen" in prompt(instruct(SHIPPED["qwen2_5"]), [user("Hi")])
    assert prompt(tokenizer, [user("Hi")]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_system_prompt_stands_where_the_model_has_it():
    messages = [system("Be brief."), user("Hi")]
    assert prompt(hybrid(SHIPPED["gemma3"]), messages) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt(hybrid(R1), messages) == "<bos>Be brief.<｜User｜>Hi<｜Assistant｜>"
    for refusing in (SHIPPED["gemma"], MISTRAL):
        with pytest.raises(TemplateError, match=r"System role not supported|Only user and assistant"):
            prompt(hybrid(refusing), messages)


def test_parts_and_tools_reach_the_models_own_template():
    parts = [{"type": "text", "text": "Now "}, {"type": "text", "text": "double it."}]
    for template in (SHIPPED["gemma"], MISTRAL, R1):
        tokenizer = hybrid(template)
        assert prompt(tokenizer, [user(parts)]) == prompt(tokenizer, [user("Now double it.")])
        whole = text(tokenizer, [user("?"), assistant([{"type": "text", "text": NO_THINK}])])
        assert whole == text(tokenizer, [user("?"), assistant(NO_THINK)])
    tokenizer = hybrid("{% if tools %}{{ tools[0].name }}{% endif %}" + MISTRAL)
    assert prompt(tokenizer, [user("Hi")], tools=[{"name": "adder"}]).startswith("adder<bos>[INST]")


def test_an_answer_without_a_mode_stands_as_the_model_has_it():
    assert text(hybrid(MISTRAL), [user("?"), assistant("5")]) == "<bos>[INST] ? [/INST] 5<eos>"


def test_a_response_can_be_continued_in_the_models_own_turns():
    tokenizer, messages = hybrid(R1), [user("?"), assistant("<think>\nFirst")]
    assert text(tokenizer, messages, continue_final_message=True) == f"{prompt(tokenizer, messages[:1])}<think>\nFirst"


def test_own_turns_are_saved_and_can_be_set_again(tmp_path):
    tokenizer = hybrid(R1)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(2):
        assert has_thinking_modes(reloaded)
        assert prompt(reloaded, TURNS) == prompt(tokenizer, TURNS)
        assert (reloaded.eos_token, reloaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        set_chat_template(reloaded)
    assert reloaded.chat_template == tokenizer.chat_template


def test_servers_see_what_the_template_takes():
    """vLLM passes on only what a template reads and does not define (`chat_template_kwargs`)."""
    for template in (MISTRAL, SHIPPED["qwen3"]):
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        source = re.sub(r"\{%-? (end)?generation -?%\}", "", hybrid(template).chat_template)
        assert {"thinking_mode", "enable_thinking"} <= find_undeclared_variables(environment.parse(source))


# --- in TRL -----------------------------------------------------------------------------------------------------------


def _sft_batch(tokenizer, row, tmp_path, **config):
    """One training step, and the batch that it saw."""
    trainer = SFTTrainer(
        model=tiny_qwen2(len(tokenizer)),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            **ON_CPU,
            **config,
        ),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.train().training_loss > 0
    return batch


def test_sft_on_prompt_and_completion_trains_on_exactly_the_response(tokenizer, tmp_path):
    batch = _sft_batch(tokenizer, {"prompt": PROMPT, "completion": [assistant(THINK)]}, tmp_path)
    before = ids(tokenizer, PROMPT, add_generation_prompt=True)
    response = tokenizer.encode(THINK + tokenizer.eos_token, add_special_tokens=False)
    assert batch["input_ids"][0].tolist() == before + response
    assert batch["labels"][0].tolist() == [-100] * len(before) + response


def test_sft_in_a_models_own_turns_trains_on_exactly_the_response(tmp_path):
    tokenizer = hybrid(R1)
    batch = _sft_batch(tokenizer, {"prompt": TURNS, "completion": [assistant(THINK)]}, tmp_path)
    trained = [i for i in batch["labels"][0].tolist() if i != -100]
    assert tokenizer.decode(trained) == f"{THINK}<｜end▁of▁sentence｜>"
    before = ids(tokenizer, TURNS, add_generation_prompt=True)
    assert batch["input_ids"][0].tolist()[: len(before)] == before


@pytest.fixture
def r1_model(tmp_path):
    """An instruct model of one layer with turns of its own, without tags."""
    tokenizer = instruct(R1)
    tokenizer.save_pretrained(tmp_path / "r1")
    tiny_qwen2(len(tokenizer)).save_pretrained(tmp_path / "r1")
    return str(tmp_path / "r1")


def _hft(model, tmp_path, *more):
    rows = [{"prompt": TURNS, "completion": [assistant(response)]} for response in (THINK, NO_THINK)]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    fields = {"model_name_or_path": model, "train_data": f"{tmp_path}/data.parquet", "output_dir": f"{tmp_path}/hft"}
    hft.main([*argv(ON_CPU | fields | {"max_steps": 1}), *more])
    return AutoTokenizer.from_pretrained(tmp_path / "hft"), GenerationConfig.from_pretrained(tmp_path / "hft")


def test_hft_keeps_the_turns_of_an_instruct_model(r1_model, tmp_path):
    tokenizer, generation = _hft(r1_model, tmp_path)
    assert prompt(tokenizer, TURNS, thinking_mode="think") == prompt(hybrid(R1), TURNS, thinking_mode="think")
    assert tokenizer.eos_token == "<｜end▁of▁sentence｜>"
    assert tokenizer.eos_token_id in generation.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_hft_puts_the_modes_around_a_template_that_is_named(r1_model, tmp_path):
    (tmp_path / "mine.jinja").write_text(MISTRAL, encoding="utf-8")
    tokenizer, _ = _hft(r1_model, tmp_path, "--chat_template_path", f"{tmp_path}/mine.jinja")
    assert prompt(tokenizer, [user("Hi")], thinking_mode="no_think") == "<bos>[INST] Hi [/INST]<no_think>"


@pytest.mark.parametrize("path", ["nowhere.jinja", "org/another-model"])
def test_a_template_that_is_not_there(path):
    with pytest.raises(UserError, match=f"chat_template_path='{path}' is not a file"):
        read_template(path)


def test_sft_on_messages_trains_on_exactly_the_final_response(chatml, tmp_path):
    batch = _sft_batch(chatml, {"messages": [*PROMPT, assistant(NO_THINK)]}, tmp_path, assistant_only_loss=True)
    trained = [i for i in batch["labels"][0].tolist() if i != -100]
    assert chatml.decode(trained) == NO_THINK + "<|im_end|>"
