"""A real vLLM server with a model that keeps the marks of Qwen3, its chat template and a tokenizer of bytes.

Every byte lands in its field: what is expected comes from `HybridModel`, greedily on the same prompts, and from vLLM's
own parser of that format.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from openai import OpenAI
from settings import ON_CPU, argv
from test_splitter import without_blanks
from test_vllm_plugins import whole
from test_vllm_serving import Choice, ask, biased, served
from tokenizers_zoo import save_thinker

from hgpo_trl.inference.generate import Generation, HybridModel
from hgpo_trl.modes import PRESETS, Mode, format_response
from hgpo_trl.scripts import hft

pytestmark = pytest.mark.engine

LONGEST = 192
QWEN3 = PRESETS["qwen3"]
SUMS = [(a, b) for a in (2, 3) for b in (4, 5, 6)]
QUERIES = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in SUMS]
SWITCHED_OFF = {"chat_template_kwargs": {"enable_thinking": False}}

# How a request asks for a mode, and the same of `HybridModel`. Qwen3's template writes an opening for no think alone.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auto": ({}, {}),
    "on": ({"chat_template_kwargs": {"enable_thinking": True}}, {}),
    "off": (SWITCHED_OFF, {"mode": "no_think"}),
    "effort": ({"reasoning_effort": "none"}, {"mode": "no_think"}),
    "more": (biased(50.0), {"decision_bias": 50.0}),
    "less": (biased(-50.0), {"decision_bias": -50.0}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows a few sums by heart, in both modes; it prefers to think about those of 3."""
    folder = tmp_path_factory.mktemp("formats")
    save_thinker("qwen3", str(folder / "base"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    rows = []
    for (a, b), query in zip(SUMS, QUERIES, strict=True):
        for mode in (Mode.THINK, Mode.NO_THINK):
            reasoning = f"{a} + {b} → {a + b} ✓\n\nThe answer is 二." if mode is Mode.THINK else ""
            text = format_response(mode, f"Ça fait {a + b} 🙂\n\n  - {a + b}", reasoning, QWEN3)
            row = {"prompt": query, "completion": [{"role": "assistant", "content": text}]}
            rows += [row] * (3 if (mode is Mode.THINK) == (a == 3) else 1)
    Dataset.from_list(rows).to_parquet(folder / "hft.parquet")
    fields = ON_CPU | {
        "model_name_or_path": folder / "base", "train_data": folder / "hft.parquet", "output_dir": folder / "model",
        "mode_format": "qwen3", "max_steps": 150, "per_device_train_batch_size": 24, "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "warmup_steps": 10, "max_length": LONGEST, "logging_steps": 150,
    }  # fmt: skip
    hft.main(argv(fields))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[OpenAI]:
    with served(folder, LONGEST) as client:
        yield client


@pytest.fixture(scope="module")
def offline(folder: Path) -> dict[str, list[Generation]]:
    """Every query in every way, greedily, with Transformers."""
    hybrid = HybridModel.from_pretrained(str(folder / "model"), dtype="float32", device_map="cpu")
    settings = {"temperature": 0, "max_new_tokens": 100}
    return {way: hybrid(QUERIES, **settings, **how) for way, (_, how) in WAYS.items()}


@pytest.fixture(scope="module")
def online(client: OpenAI) -> dict[str, list[tuple[Choice, Choice]]]:
    """Every query in every way, all at once: at once and as a stream."""
    jobs = [(query, how, stream) for how, _ in WAYS.values() for query in QUERIES for stream in (False, True)]

    def answer(job: tuple[Any, dict[str, Any], bool]) -> Choice:
        query, how, stream = job
        return ask(client, query, how, stream=stream, max_tokens=100)[0]

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(answer, jobs))
    pairs = list(zip(found[::2], found[1::2], strict=True))
    return {way: pairs[row * len(QUERIES) :][: len(QUERIES)] for row, way in enumerate(WAYS)}


@pytest.mark.parametrize("way", WAYS)
def test_every_byte_is_in_its_field(
    way: str, online: dict[str, list[tuple[Choice, Choice]]], offline: dict[str, list[Generation]]
) -> None:
    for pair, expected in zip(online[way], offline[way], strict=True):
        for choice in pair:
            reasoning = expected.reasoning if expected.mode is Mode.THINK else None
            assert (choice.reasoning, choice.content, choice.finish) == (reasoning, expected.answer, "stop")
        assert pair[0].ids == pair[1].ids
    modes = [answer.mode for answer in offline[way]]
    both = [Mode.NO_THINK] * 3 + [Mode.THINK] * 3
    assert modes == {"auto": both, "on": both, "more": [Mode.THINK] * 6}.get(way, [Mode.NO_THINK] * 6)
    assert all("🙂" in answer.answer for answer in offline[way]), "letters of several tokens"


def test_vllms_own_parser_agrees(folder: Path, online: dict[str, list[tuple[Choice, Choice]]]) -> None:
    """On the parts, blanks around them apart; it has no word for a response that did not think."""
    from transformers import AutoTokenizer
    from vllm.parser.parser_manager import ParserManager

    parser = ParserManager.get_parser(reasoning_parser_name="qwen3")
    assert parser is not None
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for way, (how, _) in WAYS.items():
        variables = {"enable_thinking": False} if way == "effort" else how.get("chat_template_kwargs", {})
        for choice, _ in online[way]:
            text = tokenizer.decode(choice.ids, skip_special_tokens=True)
            found = whole(parser(tokenizer, None, chat_template_kwargs=variables, model_config=None), text)
            for field, ours in (("reasoning", choice.reasoning), ("content", choice.content)):
                assert without_blanks(found.get(field) or "") == without_blanks(ours or "")


@pytest.mark.parametrize("how", [{}, SWITCHED_OFF], ids=["auto", "off"])
def test_cut_off_after_every_token(client: OpenAI, how: dict[str, Any]) -> None:
    """Also within a letter: what is there by then is a beginning of the whole."""
    for query in (QUERIES[0], QUERIES[-1]):
        (complete,) = ask(client, query, how)
        for size in range(1, len(complete.ids)):
            (choice,) = ask(client, query, how, max_tokens=size)
            (streamed,) = ask(client, query, how, max_tokens=size, stream=True)
            assert (choice.reasoning, choice.content) == (streamed.reasoning, streamed.content)
            assert choice.ids == complete.ids[:size]
            for part, all_of_it in ((choice.reasoning, complete.reasoning), (choice.content, complete.content)):
                assert all_of_it is not None or part is None or size < 4  # before the openings part it is content
                assert size < 4 or (all_of_it or "").startswith(part or "")


def test_usage_counts_the_reasoning(client: OpenAI, online: dict[str, list[tuple[Choice, Choice]]]) -> None:
    for query, (choice, _) in zip(QUERIES, online["auto"], strict=True):
        response = client.chat.completions.create(model="lhrm", messages=query, temperature=0)  # type: ignore[arg-type]
        counted = response.usage.completion_tokens_details.reasoning_tokens  # type: ignore[union-attr]
        assert (counted > 5) == (choice.reasoning is not None)
        assert counted < len(choice.ids)
