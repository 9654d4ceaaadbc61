"""`RewardModel`: what it reads, in several chat templates, and what its scores depend on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_zoo import llama3, qwen2, sentencepiece
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from hgpo_trl.modes import split_response
from hgpo_trl.rewards.model import RewardModel

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
)
TULU = (  # a system turn of its own, the answer closed by the end token
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content + '\n' }}{% endif %}{% endfor %}"
)
ALTERNATING = (  # Mistral's and Gemma's way: no system role, and user and assistant have to take turns
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str]] = {
    "chatml": (qwen2, CHATML),
    "llama3": (llama3, LLAMA3),
    "tulu": (llama3, TULU),
    "alternating": (sentencepiece, ALTERNATING),
}

Messages = list[dict[str, str]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CONVERSATIONS: list[tuple[Messages, str]] = [
    ([user("What is 2 + 3?")], "The answer is 5."),
    ([user("What is 12 * 4?")], "48"),
    ([{"role": "system", "content": "Be brief."}, user("Double it.")], "10, so the answer is 10. Thanks!" * 3),
    ([user("Hello"), {"role": "assistant", "content": "Thanks!"}, user("def add?")], "return a + b"),
    ([user("One."), user("Two.")], "12"),
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDouble it.<|im_end|>\n"
    "<|im_start|>assistant\n{answer}<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nDouble it.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>",
    "tulu": "<|system|>\nBe brief.\n<|user|>\nDouble it.\n<|assistant|>\n{answer}<|end_of_text|>",
    "alternating": "<s>[INST] Be brief.\n\nDouble it. [/INST] {answer}</s>",
}


def save(
    path: Path, tokenizer: PreTrainedTokenizerBase, template: str | None = CHATML, **config: Any
) -> PreTrainedTokenizerBase:
    """A tiny random Llama reward model."""
    set_seed(0)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_labels": 1, "max_position_embeddings": 512, "initializer_range": 0.5,
    }  # fmt: skip
    tokenizer.chat_template = template
    LlamaForSequenceClassification(LlamaConfig(**(settings | config))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def alone(path: Path, ids: list[int]) -> float:
    """The score of one row without padding: the last token's."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).item()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_conversation_is_in_the_models_own_template(name: str, tmp_path: Path) -> None:
    build, template = TEMPLATES[name]
    save(tmp_path, build(), template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt, answer = CONVERSATIONS[2]
    text = RENDERED[name].format(answer=answer)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = RewardModel(str(tmp_path))
    assert model.encode(prompt, answer) == expected
    assert model.scores([prompt], [answer]).item() == pytest.approx(alone(tmp_path, expected), abs=1e-5)
    assert expected.count(tokenizer.bos_token_id) == (1 if name in ("llama3", "alternating") else 0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_scores_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """In none of these families is there a pad token in the model's config, and in two none in the tokenizer."""
    build, template = TEMPLATES[name]
    save(tmp_path, build(), template)
    prompts, answers = zip(*CONVERSATIONS, strict=True)
    scores = [RewardModel(str(tmp_path), batch_size=size).scores(prompts, answers) for size in (1, 2, 3, 8)]
    assert scores[0].unique().numel() == len(CONVERSATIONS)
    model = RewardModel(str(tmp_path))
    expected = [alone(tmp_path, model.encode(*row)) for row in CONVERSATIONS]
    for found in scores:
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_pad_token_in_the_models_config_is_the_one_it_pools_by(tmp_path: Path) -> None:
    """Here it is also the end token, as in many models: such a model scores the token before it."""
    tokenizer = llama3()
    save(tmp_path, tokenizer, TULU, pad_token_id=tokenizer.eos_token_id)
    prompts, answers = zip(*CONVERSATIONS, strict=True)
    model = RewardModel(str(tmp_path), batch_size=8)
    ids = [model.encode(*row) for row in CONVERSATIONS]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    published = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [published(torch.tensor([row])).logits.item() for row in ids]
    assert model.scores(prompts, answers).tolist() == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx([alone(tmp_path, row[:-1]) for row in ids], abs=1e-5)


def test_an_encoder_scores_too(tmp_path: Path) -> None:
    tokenizer = qwen2()
    tokenizer.chat_template = CHATML
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, max_position_embeddings=256, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts, answers = zip(*CONVERSATIONS, strict=True)
    one, many = (RewardModel(str(tmp_path), batch_size=size).scores(prompts, answers) for size in (1, 8))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0.0)
    assert one.unique().numel() == len(CONVERSATIONS)


def test_plain_text_prompts(tmp_path: Path) -> None:
    """One user message where there is a template; else prompt and answer as they are, special tokens included."""
    tokenizer = save(tmp_path / "chat", llama3(), LLAMA3)
    model = RewardModel(str(tmp_path / "chat"))
    assert model.encode("What is 2 + 3? ", "5") == model.encode([user("What is 2 + 3? ")], "5")
    save(tmp_path / "plain", tokenizer, None)
    model = RewardModel(str(tmp_path / "plain"))
    assert model.encode("What is 2 + 3? ", "5") == tokenizer("What is 2 + 3? 5")["input_ids"]
    with pytest.raises(ValueError, match=r"plain' has no chat template, but the prompts are conversations"):
        model.encode([user("What is 2 + 3?")], "5")


@pytest.mark.parametrize(("positions", "model_max_length"), [(20, 10**30), (512, 20), (20, 512)])
def test_what_is_too_long_loses_its_beginning(positions: int, model_max_length: int, tmp_path: Path) -> None:
    tokenizer = llama3()
    tokenizer.model_max_length = model_max_length
    save(tmp_path, tokenizer, LLAMA3, max_position_embeddings=positions)
    prompt, answer = CONVERSATIONS[2]
    ids = RewardModel(str(tmp_path)).encode(prompt, answer)
    text = RENDERED["llama3"].format(answer=answer)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"][-20:]


def test_a_template_that_refuses_the_conversation(tmp_path: Path) -> None:
    save(tmp_path, sentencepiece(), ALTERNATING)
    model = RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match=r"refuses a conversation of assistant, user, assistant: Roles must alternate"):
        model.encode([{"role": "assistant", "content": "Hello"}, user("2 + 3?")], "5")


# --- as a reward function -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reward_model")
    save(path, qwen2(), initializer_range=1.0)
    return str(path)


def test_it_is_in_charge_of_rows_without_an_answer(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(saved, squash=False)
    seen: list[str] = []
    scores = model.scores

    def look(prompts: list, answers: list[str]) -> torch.Tensor:
        seen.extend(answers)
        return scores(prompts, answers)

    monkeypatch.setattr(model, "scores", look)
    responses = [split_response(text) for text in ["<no_think>1</no_think>", "<no_think>2", "<think>a</think>3"]] * 2
    prompts = [[user("What is 2 + 3?")]] * 6
    answers = [response.answer for response in responses]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    references = ["5", "5", "5", None, "", " "]
    rewards = model(prompts=prompts, completions=completions, answer=references, response=responses, level=[1] * 6)
    assert seen == ["1", "3"], "the malformed one is not scored"
    assert rewards[:3] == [None] * 3
    assert rewards[4] == 0.0
    assert [rewards[3], rewards[5]] == pytest.approx(scores(prompts[:2], ["1", "3"]).tolist(), abs=1e-5)
    assert model(prompts=prompts, completions=answers)[0] == pytest.approx(rewards[3], abs=1e-5)
    assert model(prompts=prompts[:2], completions=answers[:2], answer=["5", "5"]) == [None, None]
    assert model.__name__ == "reward_model"


def test_squash_keeps_the_order_between_0_and_1(saved: str) -> None:
    prompts, answers = (list(column) for column in zip(*CONVERSATIONS, strict=True))
    raw = RewardModel(saved, squash=False)(prompts=prompts, completions=answers)
    assert max(map(abs, raw)) > 1
    for center, scale in ((0.0, 1.0), (-3.0, 1.0), (0.5, 7.0)):
        rewards = RewardModel(saved, center=center, scale=scale)(prompts=prompts, completions=answers)
        assert rewards == pytest.approx([1 / (1 + math.exp(-(score - center) / scale)) for score in raw])
        assert all(0 < reward < 1 for reward in rewards)
        assert sorted(range(5), key=lambda i: rewards[i]) == sorted(range(5), key=lambda i: raw[i])


# --- loading --------------------------------------------------------------------------------------------------------


def test_two_labels_are_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    save(tmp_path, qwen2(), num_labels=2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reward_model='.*' has num_labels=2; a reward model has 1"):
        RewardModel(str(tmp_path))


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """Transformers would make one up."""
    tokenizer = qwen2()
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has num_labels=2"):
        RewardModel(str(tmp_path))
    config.num_labels = 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights, score\.weight, which would be random"):
        RewardModel(str(tmp_path)).scores(["a"], ["b"])


def test_weights_are_whole_under_zero3(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' switch for ZeRO-3 is off while the reward model loads, and on again afterwards."""
    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    load, during = AutoModelForSequenceClassification.from_pretrained, []

    def look(*args: Any, **kwargs: Any) -> Any:
        during.append(is_deepspeed_zero3_enabled())
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", look)
    assert is_deepspeed_zero3_enabled()
    assert RewardModel(saved).model.dtype == torch.float32
    assert is_deepspeed_zero3_enabled()
    assert during == [False]
    del config
    assert not is_deepspeed_zero3_enabled()
