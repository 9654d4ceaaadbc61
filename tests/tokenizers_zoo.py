"""Small tokenizers of the families that users bring, each built from the real class in a moment, and tiny models.

None has the mode tags; a chat template only those of instruct models.
"""

import json
import re
from collections.abc import Callable
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    SmolLM3Config,
    set_seed,
)

CORPUS = (
    "What is 2 + 3? The answer is 5.",
    "Let me think: 12 * 4 = 48, so the answer is 48.",
    "You are a helpful assistant. Be brief.",
    "def add(a, b):\n    return a + b\n",
    "Thanks! Now double it. I think no more than < 10 > is needed.",
)


def _byte_level_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE over CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.get_vocab(), _merges(tokenizer)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def word_level() -> PreTrainedTokenizerBase:
    """Whole words between blanks, `<unk>` for all others, no beginning-of-sequence token: the embedded task's kind."""
    words = sorted({word for line in CORPUS for word in line.split()})
    words += ["System:", "User:", "Assistant:"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def qwen2() -> PreTrainedTokenizerBase:
    """Qwen2's class, pre-tokenizer and decoder; `<|endoftext|>` both ends and pads, as in the base models."""
    vocab, merges = _byte_level_bpe()
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def llama3() -> PreTrainedTokenizerBase:
    """Llama 3's: byte-level BPE whose post-processor puts `<|begin_of_text|>` first, header tokens, no pad token."""
    vocab, merges = _byte_level_bpe()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens(list(special))
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end_of_text|>")


def sentencepiece() -> PreTrainedTokenizerBase:
    """Llama 2's class: SentencePiece BPE with Metaspace, byte fallback, `<s>` put first, no pad token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    )
    return LlamaTokenizer(vocab=tokenizer.get_vocab(), merges=_merges(tokenizer))


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "word_level": word_level,
    "qwen2": qwen2,
    "llama3": llama3,
    "sentencepiece": sentencepiece,
}


_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_qwen2(vocab_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 of one layer; input and output embedding are one matrix."""
    set_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocab_size, num_key_value_heads=2, tie_word_embeddings=True, **_TINY)
    )


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of one layer; input and output embedding are two matrices."""
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=False, **_TINY))


# --- instruct models ------------------------------------------------------------------------------------------

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_MARKS = re.compile(r"<[|｜][^|｜<>'\"]+[|｜]>|<\|turn>|<turn\|>|<(?:start|end)_of_turn>|\[/?INST\]|\[gMASK\]|<sop>")


def shipped_templates() -> dict[str, str]:
    """The chat templates of instruct models that TRL ships, by their file's name."""
    folder = resources.files("trl").joinpath("chat_templates")
    files = (file for file in folder.iterdir() if file.name.endswith(".jinja"))
    return {file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8") for file in sorted(files, key=str)}


def instruct(template: str, *more: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template, whose marks (`<|user|>`, `[INST]`, ...) and `more` are special tokens."""
    vocab, merges = _byte_level_bpe()
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    marks = sorted({*_MARKS.findall(template), *more} - {"<think>", "</think>"})
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.chat_template = template
    return tokenizer


# --- models that already think --------------------------------------------------------------------------------

DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)  # as DeepSeek V3.1 ends its prompts
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') }}{% endif %}"
)  # as SmolLM3 begins and ends its prompts


def thinking(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with the two tags of a model that thinks, and a chat template that TRL ships."""
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    if template is not None:
        tokenizer.chat_template = shipped_templates()[template]
    return tokenizer


def save_thinker(mode_format: str, folder: str, **sizes: int) -> None:
    """Save an untrained model of the architecture that has a format, with a tokenizer and a chat template of its kind.

    The model has spare rows, and two newlines are one token, as in the real ones.
    """
    template = {"qwen3": "qwen3", "smollm3": None, "r1": "deepseek_r1_distill"}[mode_format]
    tokenizer = thinking(instruct(SMOLLM3 if template is None else shipped_templates()[template], "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    tokenizer.eos_token = "<｜end▁of▁sentence｜>" if mode_format == "r1" else "<|im_end|>"
    config = {"qwen3": Qwen3Config, "smollm3": SmolLM3Config, "r1": Qwen2Config}[mode_format]
    sizes = _TINY | {"num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id} | sizes
    if mode_format == "qwen3":
        sizes["head_dim"] = 32  # not hidden_size / num_attention_heads, as in Qwen3; the fewest for vLLM on a CPU
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=(len(tokenizer) // 64 + 1) * 64, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
