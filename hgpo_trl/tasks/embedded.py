"""Embedded tasks: made-up problems and a model small enough to train on a laptop, to see the whole method at work.

A task is one small Python file with three names (`hgpo_trl/tasks/chain_sum.py` is one, `examples/` has another):

    LEVELS      {level: weight}, the difficulty levels and how often each is drawn (whole numbers)
    VOCABULARY  every word of its texts, separated by blanks
    sample      sample(level, random.Random) -> Query
"""

import hashlib
import inspect
import json
import random
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_module
from hgpo_trl.modes import LHRM, Mode, ModeFormat, add_mode_tokens, format_response
from hgpo_trl.modes.chat_template import set_chat_template

_TURN_WORDS = ("System:", "User:", "Assistant:")  # of the plain-text chat template


@dataclass(frozen=True, slots=True)
class Query:
    """One problem: what is asked, a reasoning trace that solves it, the answer, and its difficulty.

    `draw` fills in the domain, which is the task's name.
    """

    prompt: str
    reasoning: str
    answer: str
    level: int
    domain: str = ""


def load_task(name: str) -> ModuleType:
    """Import a task by module name ("hgpo_trl.tasks.chain_sum") or by path ("examples/my_task.py").

    Raises:
        UserError: there is no such module or file, it lacks one of the three names, or a level's weight is invalid.
    """
    task = load_module(name)
    missing = [attribute for attribute in ("LEVELS", "VOCABULARY", "sample") if not hasattr(task, attribute)]
    if missing:
        raise UserError(
            f"tasks: {name!r} lacks {', '.join(missing)}; hgpo_trl/tasks/embedded.py says what a task needs."
        )
    check_levels(f"tasks: {name!r}: LEVELS", task.LEVELS)
    return task


def check_levels(field: str, levels: Any) -> None:
    """UserError, with the name of the field, unless levels have weights as a task's LEVELS has."""
    if not isinstance(levels, dict) or not levels or not all(isinstance(w, int) and w > 0 for w in levels.values()):
        raise UserError(f"{field} must map at least one level to a whole number above 0; got {levels!r}.")


def domain_of(task: ModuleType) -> str:
    """The short name of a task: "chain_sum" for `hgpo_trl.tasks.chain_sum`, "my_task" for `examples/my_task.py`."""
    return Path(inspect.getfile(task)).stem


def load_tasks(names: Sequence[str]) -> list[ModuleType]:
    """Import tasks.

    Raises:
        UserError: there is none, `load_task` refuses one, or two have the same domain.
    """
    if not names:
        raise UserError("tasks is empty; name at least one task.")
    tasks = [load_task(name) for name in names]
    domains = [domain_of(task) for task in tasks]
    if twice := [domain for domain in domains if domains.count(domain) > 1]:
        raise UserError(
            f"tasks={list(names)}: two have the domain {twice[0]!r}. Name each task once; a domain is called after the "
            "task's file, so of two files with one name rename one."
        )
    return tasks


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a query belongs to the held-out part: decided by its text alone, so no run can mix the two parts."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _check_words(query: Query, vocabulary: Set[str]) -> None:
    """UserError if a query uses a word that would become `<unk>`."""
    if unknown := set(f"{query.prompt} {query.reasoning} {query.answer}".split()) - vocabulary:
        raise UserError(
            f"VOCABULARY lacks {sorted(unknown)}, of the query {query.prompt!r}. Add every word of prompt, reasoning "
            "and answer, as blanks separate them."
        )


def draw(task: ModuleType, num_queries: int, *, held_out: bool, fraction: float, seed: int) -> Iterator[Query]:
    """Draw queries in exact proportion to the task's level weights, from the held-out part or from the rest.

    Raises:
        UserError: a level has no query in the wanted part (its space is too small for `fraction`), or a query uses a
            word that is not in the task's vocabulary.
    """
    rng = random.Random(f"{seed}/{held_out}")
    domain = domain_of(task)
    levels = [level for level, weight in task.LEVELS.items() for _ in range(weight)]
    vocabulary = set(task.VOCABULARY)
    for index in range(num_queries):
        level = levels[index % len(levels)]
        for _ in range(10_000):
            query = task.sample(level, rng)
            if is_held_out(query.prompt, fraction) == held_out:
                _check_words(query, vocabulary)
                yield replace(query, domain=domain)
                break
        else:
            part = "held-out" if held_out else "training"
            raise UserError(
                f"held_out_fraction={fraction}: level {level} has no {part} query. Choose another fraction, or give "
                "the level more distinct queries."
            )


def draw_equally(
    tasks: Sequence[ModuleType], num_queries: int, *, held_out: bool, fraction: float, seed: int
) -> Iterator[Query]:
    """Draw queries from the tasks in turn, each with `draw`.

    Raises:
        UserError: as `draw`.
    """
    drawn = [draw(task, num_queries, held_out=held_out, fraction=fraction, seed=seed) for task in tasks]
    return (next(queries) for queries in islice(cycle(drawn), num_queries))


def _messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def hft_dataset(queries: Iterator[Query], think_share: float, seed: int, mode_format: ModeFormat = LHRM) -> Dataset:
    """Stage I rows in TRL's conversational prompt/completion format, each query in one mode, drawn randomly."""
    rng = random.Random(f"{seed}/modes")
    rows = []
    for query in queries:
        mode = Mode.THINK if rng.random() < think_share else Mode.NO_THINK
        reasoning = query.reasoning if mode is Mode.THINK else ""
        rows.append(
            {
                "prompt": _messages("user", query.prompt),
                "completion": _messages("assistant", format_response(mode, query.answer, reasoning, mode_format)),
                "mode": mode.value,
                "level": query.level,
                "domain": query.domain,
            }
        )
    return Dataset.from_list(rows)


def prompt_dataset(queries: Iterator[Query]) -> Dataset:
    """Stage II and evaluation rows: prompt, answer, level, domain."""
    return Dataset.from_list(
        [
            {"prompt": _messages("user", query.prompt), "answer": query.answer}
            | {"level": query.level, "domain": query.domain}
            for query in queries
        ]
    )


def build_tokenizer(*tasks: ModuleType, mode_format: ModeFormat = LHRM) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the tasks' vocabularies, with the marks of a format and a chat template."""
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *_TURN_WORDS, *(word for task in tasks for word in task.VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if mode_format == LHRM:
        add_mode_tokens(fast)
        set_chat_template(fast)
        return fast
    texts = f"{_begun(mode_format)}{mode_format.think}{mode_format.no_think}{mode_format.end_reasoning}"
    marks = dict.fromkeys((*re.findall(r"<[^>]*>", texts + mode_format.end_no_think), "\n", "\n\n"))
    fast.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    fast.chat_template = embedded_template(mode_format)
    return fast


def embedded_template(mode_format: ModeFormat) -> str:
    """A chat template such as a model with a format of its own brings.

    It is told the mode by `enable_thinking`, if it ends generation prompts before the decision, and writes responses as
    they are.
    """
    begun = _begun(mode_format)
    texts = {"begun": begun, "no_think": "" if begun else mode_format.no_think}
    variables = "".join(f"{{%- set {name} = {json.dumps(text)} %}}\n" for name, text in texts.items())
    return variables + resources.files("hgpo_trl").joinpath("templates/embedded.jinja").read_text(encoding="utf-8")


def _begun(mode_format: ModeFormat) -> str:
    """The beginning of a reasoning trace that the prompt writes, whatever the mode."""
    return "" if mode_format.think else "<think>\n"


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings and a feed-forward of 4 x `hidden_size`.

    Llama, because AutoTokenizer loads its tokenizer as it was saved; beside a Qwen2 model it uses Qwen2's own class,
    which splits these words differently.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        attention_bias=True,  # as in Qwen2; without it some seeds do not learn to think in Stage I
        initializer_range=0.1,  # with the usual 0.02 a model this small learns nothing
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)
