"""A real vLLM server with the plug-ins, on the CPU, and the `openai` client: every word lands in its field.

What is expected comes from the response's token ids, decoded and taken apart with `split_response`, and the token ids
from Transformers, greedily, on the same prompts.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from datasets import Dataset
from openai import BadRequestError, OpenAI
from settings import VLLM_SERVER
from test_splitter import without_blanks
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.inference.vllm_support import check_server
from hgpo_trl.modes import MODES, Fault, Mode, format_response, mode_tokens, split_response
from hgpo_trl.scripts import hft
from hgpo_trl.tasks import chain_sum
from hgpo_trl.tasks.embedded import build_model, build_tokenizer, draw

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
LONGEST = 128
EASY, HARD = 0, 8  # queries of one operand and of eight
VOCABULARY = len(build_tokenizer(chain_sum))
AUTO: dict[str, Any] = {}
FORCED = {mode: {"chat_template_kwargs": {"thinking_mode": str(mode)}} for mode in MODES}
BY_SWITCH = {mode: {"chat_template_kwargs": {"enable_thinking": mode is Mode.THINK}} for mode in MODES}

Messages = list[dict[str, str]]
Tokenizer = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def queries() -> list[Messages]:
    """32 of all levels, none of them in the training."""
    return [[{"role": "user", "content": q.prompt}] for q in draw(chain_sum, 32, held_out=True, fraction=0.2, seed=1)]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers one and two operands at once, and thinks about more: most of the time, so that it has
    learnt either mode for all."""
    folder = tmp_path_factory.mktemp("serving")
    build_model(tokenizer, hidden_size=64, num_heads=2).save_pretrained(folder / "base")  # heads as wide as vLLM needs
    tokenizer.save_pretrained(folder / "base")
    rows = []
    rng = random.Random(0)
    for query in draw(chain_sum, 4800, held_out=False, fraction=0.2, seed=0):
        thinks = (query.level >= 3) == (rng.random() < 0.8)
        mode = Mode.THINK if thinks else Mode.NO_THINK
        completion = format_response(mode, query.answer, query.reasoning if thinks else "")
        rows.append(
            {
                "prompt": [{"role": "user", "content": query.prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        )
    Dataset.from_list(rows).to_parquet(folder / "hft.parquet")
    hft.main(
        f"--model_name_or_path {folder}/base --train_data {folder}/hft.parquet --output_dir {folder}/model "
        "--max_steps 150 --per_device_train_batch_size 32 --learning_rate 3e-3 --warmup_steps 20 --adam_beta2 0.98 "
        "--bf16 false --use_cpu true --gradient_checkpointing false --save_strategy no --report_to none "
        f"--logging_steps 150 --max_length {LONGEST} --disable_tqdm true".split()
    )
    return folder


@contextlib.contextmanager
def served(folder: Path, longest: int, *arguments: str) -> Iterator[OpenAI]:
    """A client of `hgpo-trl serve` with the model of a folder, which is called lhrm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "hgpo_trl.cli", "serve", "--model", str(folder / "model")),
        *("--served-model-name", "lhrm", "--port", str(port), "--host", "127.0.0.1"),
        *("--max-model-len", str(longest), "--dtype", "float32", "--block-size", "32", "--enforce-eager"),
        *("--uvicorn-log-level", "warning", *arguments),
    ]
    environment = VLLM_SERVER | {"PYTHONPATH": str(ROOT)}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(ConnectionError):
                check_server(url, "lhrm", timeout=1)
                break
        else:
            pytest.fail((folder / "server.log").read_text()[-3000:])
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[OpenAI]:
    """Of a server with little room: prompts are prefilled in pieces, and requests preempted when many come at once."""
    room = ("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "24")
    with served(folder, LONGEST, *room, "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1") as client:
        yield client


@pytest.fixture(autouse=True)
def _log_on_failure(folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print((folder / "server.log").read_text()[-3000:])


@dataclass
class Choice:
    """One response as the client got it; None for a field that never came."""

    reasoning: str | None
    content: str | None
    ids: list[int]
    finish: str | None


def read(message: Any) -> tuple[str | None, str | None]:
    return getattr(message, "reasoning", None), message.content


def ask(
    client: OpenAI, messages: Messages, how: dict[str, Any], *, stream: bool = False, **fields: Any
) -> list[Choice]:
    """The choices of one request, greedy unless said otherwise."""
    fields = {"temperature": 0} | fields
    extra = {"return_token_ids": True} | how | fields.pop("extra_body", {})
    arguments: dict[str, Any] = {"model": "lhrm", "messages": messages, "extra_body": extra} | fields
    if not stream:
        choices = client.chat.completions.create(**arguments).choices
        return [Choice(*read(c.message), c.token_ids, c.finish_reason) for c in choices]
    found = [Choice(None, None, [], None) for _ in range(fields.get("n", 1))]
    for chunk in client.chat.completions.create(stream=True, **arguments):
        for part in chunk.choices:
            choice = found[part.index]
            reasoning, content = read(part.delta)
            if part.delta.role is not None:  # the first chunk, content "" whatever follows
                assert (reasoning, content) == (None, "")
                continue
            assert reasoning is None or content is None, "a client may look at one field or else the other"
            if reasoning is not None:
                assert choice.content is None, "no reasoning after content"
                choice.reasoning = (choice.reasoning or "") + reasoning
            if content is not None:
                choice.content = (choice.content or "") + content
            choice.ids += part.token_ids or []
            choice.finish = part.finish_reason
    return found


def check(tokenizer: Tokenizer, choice: Choice, forced: Mode | None, text: str | None = None) -> Mode | None:
    """Compare a choice's fields with its tokens, or its text where that ended earlier; returns the mode."""
    if text is None:
        text = tokenizer.decode(choice.ids, skip_special_tokens=True)
    expected = split_response((forced.open_tag if forced else "") + text)
    thinks = expected.mode is Mode.THINK
    assert (choice.reasoning is not None) == thinks
    assert (choice.reasoning or "") == expected.reasoning
    if Fault.TRAILING_TEXT in expected.faults:
        assert choice.content is not None
        assert choice.content.startswith(expected.answer)
        own_tags = (f"<{expected.mode}>", f"</{expected.mode}>")
        for tag in own_tags[1:] if forced else own_tags:
            text = text.replace(tag, "", 1)
        assert without_blanks(choice.content) == without_blanks(text)
    elif thinks and Fault.UNCLOSED in expected.faults:
        assert choice.content is None
    else:
        assert choice.content == expected.answer
    return expected.mode


# --- modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [None, *MODES])
def test_greedy_responses_are_those_of_transformers(
    client: OpenAI, folder: Path, queries: list[Messages], tokenizer: Tokenizer, forced: Mode | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    modes = []
    for messages in queries:
        mode = "auto" if forced is None else str(forced)
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, thinking_mode=mode, return_tensors="pt", return_dict=True
        )["input_ids"]
        length = LONGEST - prompt.shape[1]
        output = model.generate(
            prompt, max_new_tokens=length, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        expected = output.sequences[0, prompt.shape[1] :].tolist()
        (choice,) = ask(client, messages, AUTO if forced is None else FORCED[forced])
        for position, (ours, theirs) in enumerate(zip(choice.ids, expected, strict=False)):
            if ours != theirs:  # only between equals, which other kernels may order otherwise
                scores = output.scores[position][0]
                assert abs(scores[ours] - scores[theirs]) < 1e-3
                break
        else:
            assert choice.ids == expected
        modes.append(check(tokenizer, choice, forced))
    assert set(modes) == (set(MODES) if forced is None else {forced})


def test_32_at_once(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    """Streamed or not, forced one way, the other, or not at all, on a server with more to do than fits one step."""
    ways = [AUTO, *FORCED.values(), *BY_SWITCH.values()]
    forced_by = [None, *MODES, *MODES]
    jobs = [(messages, way, stream) for messages in queries for way in range(len(ways)) for stream in (False, True)]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda job: ask(client, job[0], ways[job[1]], stream=job[2])[0], jobs))
    for (_, way, _), choice in zip(jobs, got, strict=True):
        check(tokenizer, choice, forced_by[way])
    by_way = [got[2 * way :: 2 * len(ways)] for way in range(len(ways))]
    pairs = [*zip(got[::2], got[1::2], strict=True)]  # whole and streamed
    pairs += zip(by_way[1] + by_way[2], by_way[3] + by_way[4], strict=True)  # thinking_mode and enable_thinking
    same = [(one, other) for one, other in pairs if one.ids == other.ids]
    assert len(same) > 0.9 * len(pairs), "all but near-ties, which the sizes of batches may decide"
    for one, other in same:
        assert one == other


def test_reasoning_effort_is_heard(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    for effort, mode in (("none", Mode.NO_THINK), ("high", Mode.THINK)):
        (choice,) = ask(client, queries[EASY], AUTO, reasoning_effort=effort)
        assert check(tokenizer, choice, mode) is mode


def test_a_mode_that_does_not_exist(client: OpenAI, queries: list[Messages]) -> None:
    with pytest.raises(BadRequestError, match="thinking_mode must be one of auto, think, no_think; got maybe"):
        ask(client, queries[EASY], {"chat_template_kwargs": {"thinking_mode": "maybe"}})


# --- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [AUTO, FORCED[Mode.THINK], FORCED[Mode.NO_THINK]], ids=["auto", *MODES])
def test_cut_off_after_every_token(
    client: OpenAI, queries: list[Messages], tokenizer: Tokenizer, how: dict[str, Any]
) -> None:
    forced = next((mode for mode, way in FORCED.items() if way == how), None)
    for messages in (queries[EASY], queries[HARD]):
        (complete,) = ask(client, messages, how)
        for size in range(1, min(len(complete.ids), 60)):
            (choice,) = ask(client, messages, how, max_tokens=size)
            (streamed,) = ask(client, messages, how, max_tokens=size, stream=True)
            assert choice == streamed
            assert (choice.ids, choice.finish) == (complete.ids[:size], "length")
            check(tokenizer, choice, forced)


@pytest.mark.parametrize("stop", ["=", " by st", "</think>", "think> 3", "</no_think>", "never in the text", "<"])
@pytest.mark.parametrize("how", [AUTO, FORCED[Mode.THINK], FORCED[Mode.NO_THINK]], ids=["auto", *MODES])
def test_stop_strings(
    client: OpenAI, queries: list[Messages], tokenizer: Tokenizer, how: dict[str, Any], stop: str
) -> None:
    """vLLM holds back as much text as a stop string is long, so that tags arrive in pieces."""
    forced = next((mode for mode, way in FORCED.items() if way == how), None)
    for messages in (queries[EASY], queries[HARD]):
        (choice,) = ask(client, messages, how, stop=stop)
        assert choice == ask(client, messages, how, stop=stop, stream=True)[0]
        text = tokenizer.decode(choice.ids, skip_special_tokens=True)
        check(tokenizer, choice, forced, text.partition(stop)[0])


# --- sampling ---------------------------------------------------------------------------------------------------


def odds(client: OpenAI, messages: Messages, how: dict[str, Any]) -> list[float]:
    """log P(think) − log P(no_think) at each generated position."""
    response = client.chat.completions.create(
        model="lhrm",
        messages=messages,
        temperature=0,
        max_tokens=3,
        logprobs=True,
        top_logprobs=VOCABULARY,
        extra_body=how,  # type: ignore[arg-type]
    )
    found = []
    for position in response.choices[0].logprobs.content:  # type: ignore[union-attr]
        of = {entry.token: entry.logprob for entry in position.top_logprobs}
        found.append(of[Mode.THINK.open_tag] - of[Mode.NO_THINK.open_tag])
    return found


def metric(client: OpenAI, name: str) -> float:
    """One of vLLM's counters."""
    with urlopen(str(client.base_url.join("/metrics"))) as metrics:
        (value,) = re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", metrics.read().decode(), re.MULTILINE)
    return float(value)


def biased(bias: float) -> dict[str, Any]:
    return {"vllm_xargs": {"decision_bias": bias}}


def test_bias_moves_the_first_token_alone(client: OpenAI, queries: list[Messages]) -> None:
    """Twice each, so that the second time a long prompt's keys and values come from the cache."""
    hits = metric(client, "prefix_cache_hits")
    for messages in (
        queries[EASY],
        queries[HARD],
        [*queries[HARD], {"role": "assistant", "content": "3"}, *queries[1]],
    ):
        base = odds(client, messages, AUTO)
        for bias in (1.5, -0.75, 0) * 2:
            moved = odds(client, messages, biased(bias))
            assert moved[0] - base[0] == pytest.approx(bias, abs=1e-3)
            if (base[0] > 0) == (base[0] + bias > 0):  # the same mode is chosen, and so are the tokens after it
                assert moved[1:] == pytest.approx(base[1:], abs=1e-3)
        for mode in MODES:
            for bias in (8, -8):
                forced = odds(client, messages, FORCED[mode])
                assert odds(client, messages, FORCED[mode] | biased(bias)) == pytest.approx(forced, abs=1e-3)
    assert metric(client, "prefix_cache_hits") > hits


def test_bias_decides_each_of_n(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    for messages in (queries[EASY], queries[HARD]):
        for bias, expected in (
            (60, {Mode.THINK}),
            (-60, {Mode.NO_THINK}),
            (-odds(client, messages, AUTO)[0], set(MODES)),
        ):
            for stream in (False, True):
                choices = ask(client, messages, biased(bias), n=32, temperature=1, stream=stream)
                assert {check(tokenizer, choice, None) for choice in choices} - {None} == expected


def test_bias_of_many_requests_at_once(client: OpenAI, queries: list[Messages]) -> None:
    """Some of them are preempted, and go on with the tokens that they have."""
    jobs = [(messages, bias) for messages in queries for bias in (60, -60)]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda job: ask(client, job[0], biased(job[1]))[0].reasoning is not None, jobs))
    assert got == [bias > 0 for _, bias in jobs]
    assert metric(client, "num_preemptions") > 0


def test_bias_that_is_no_number(client: OpenAI, queries: list[Messages]) -> None:
    with pytest.raises(BadRequestError, match="decision_bias must be a finite number, in vllm_xargs; got 'much'"):
        ask(client, queries[EASY], {"vllm_xargs": {"decision_bias": "much"}})


def test_broken_responses(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    """So hot that every format fault turns up; the same seed gives the same responses, streamed or not.

    Four at a time: vLLM on a CPU fails where the prompt of a request with a seed is prefilled in pieces.
    """
    ids = {str(token_id): 3.0 for token_id in (*mode_tokens(tokenizer).decision, tokenizer.vocab["</no_think>"])}
    for forced, how in [(None, AUTO), *FORCED.items()]:
        modes = set()
        for seed in range(12):
            settings: dict[str, Any] = {"n": 4, "temperature": 2, "max_tokens": 16, "seed": seed, "logit_bias": ids}
            choices = ask(client, queries[EASY], how, **settings)
            assert choices == ask(client, queries[EASY], how, stream=True, **settings)
            assert len({tuple(choice.ids) for choice in choices}) > 1
            modes |= {check(tokenizer, choice, forced) for choice in choices}
        assert modes == ({None, *MODES} if forced is None else {forced})


# --- the rest of the interface ----------------------------------------------------------------------------------


def test_conversation_of_several_turns(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    """Earlier turns keep their answer alone, however they are given back; tags in what the user says mean nothing."""
    earlier = [
        {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": "<think>\na + 3 = 3\n</think>\n\n3"},
        {"role": "assistant", "content": "3", "reasoning": "a + 3 = 3"},
        {"role": "assistant", "content": "<no_think>\n3\n</no_think>"},
    ]
    for last in (queries[1], [{"role": "user", "content": f"{queries[1][0]['content']} </think> <no_think>"}]):
        for forced, how in [(None, AUTO), *FORCED.items()]:
            answers = []
            for turn in earlier:
                messages = [*queries[EASY], turn, *last]
                (choice,) = ask(client, messages, how)
                assert [choice] == ask(client, messages, how, stream=True)
                check(tokenizer, choice, forced)
                answers.append(choice)
            assert answers == answers[:1] * len(earlier)


def test_usage_counts_the_reasoning(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    for messages in (queries[EASY], queries[HARD]):
        for how in (AUTO, *FORCED.values()):
            response = client.chat.completions.create(model="lhrm", messages=messages, temperature=0, extra_body=how)  # type: ignore[arg-type]
            *_, last = client.chat.completions.create(
                model="lhrm", messages=messages, temperature=0, extra_body=how, stream=True,  # type: ignore[arg-type]
                stream_options={"include_usage": True},
            )  # fmt: skip
            words = (getattr(response.choices[0].message, "reasoning", None) or "").split()
            for usage in (response.usage, last.usage):
                assert usage.completion_tokens_details.reasoning_tokens == len(words)


def test_thinking_budget(client: OpenAI, queries: list[Messages], tokenizer: Tokenizer) -> None:
    """vLLM's own, which the parser tells where thinking begins and ends."""
    for forced, how in ((None, AUTO), (Mode.THINK, FORCED[Mode.THINK])):
        (choice,) = ask(client, queries[HARD], how, extra_body={"thinking_token_budget": 3})
        assert check(tokenizer, choice, forced) is Mode.THINK
        assert len((choice.reasoning or "").split()) == 3
        assert choice.content


@pytest.mark.parametrize("stream", [False, True])
def test_grammar_holds_for_the_content(
    client: OpenAI, queries: list[Messages], tokenizer: Tokenizer, stream: bool
) -> None:
    """Two words that the model would never answer with: its thinking is free, its content is one of them."""
    for messages in (queries[EASY], queries[HARD]):
        for way in (AUTO, *FORCED.values()):
            (free,) = ask(client, messages, way)
            extra = {"structured_outputs": {"choice": ["mod", "step"]}}
            (choice,) = ask(client, messages, way, stream=stream, extra_body=extra)
            assert choice.reasoning == free.reasoning
            assert choice.content in ("mod", "step")


def test_reasoning_that_is_not_wanted(client: OpenAI, queries: list[Messages]) -> None:
    for stream in (False, True):
        (choice,) = ask(client, queries[HARD], AUTO, stream=stream, extra_body={"include_reasoning": False})
        (whole,) = ask(client, queries[HARD], AUTO)
        assert (choice.reasoning, choice.content) == (None, whole.content)


@pytest.mark.parametrize("effort", [None, "none", "high"])
def test_responses_api(client: OpenAI, queries: list[Messages], effort: Any) -> None:
    """The other interface of the same server; `reasoning` forces a mode there, too."""
    how = {None: AUTO, "none": FORCED[Mode.NO_THINK], "high": FORCED[Mode.THINK]}[effort]
    reasoning: dict[str, Any] = {} if effort is None else {"reasoning": {"effort": effort}}
    for messages in (queries[EASY], queries[HARD]):
        (choice,) = ask(client, messages, how)
        arguments = {"model": "lhrm", "input": messages[0]["content"], "temperature": 0} | reasoning
        expected = [("reasoning", choice.reasoning), ("message", choice.content)][choice.reasoning is None :]
        items = client.responses.create(**arguments).output
        assert [(item.type, item.content[0].text) for item in items] == expected
        streamed = {"response.reasoning_text.delta": "", "response.output_text.delta": ""}
        for event in client.responses.create(stream=True, **arguments):
            if event.type in streamed:
                streamed[event.type] += event.delta
        assert tuple(streamed.values()) == (choice.reasoning or "", choice.content or "")


def test_the_example_of_a_client(client: OpenAI, queries: list[Messages]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "openai_client.py"), queries[EASY][0]["content"]]
    done = subprocess.run([*command, "--base-url", str(client.base_url)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nthink: think\n  reasoning: 'let me add" in done.stdout
    assert "\nno think: no think\n  reasoning: None\n  content:   '" in done.stdout
    assert "streamed:\n\n  " in done.stdout
