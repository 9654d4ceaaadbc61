"""`hgpo-trl export`: its files, read as the tools read them, by small readers that follow the tools' own code."""

import gzip
import http.server
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from openai import OpenAI
from refusals import refused
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.cli import main
from hgpo_trl.evaluation import harnesses
from hgpo_trl.evaluation.harnesses import (
    HARNESSES,
    Answer,
    answer_all,
    check_chat_server,
    closing_message,
    load_answers,
    local_answers,
    read_prompts,
    served_answers,
    write_for,
)
from hgpo_trl.inference.generate import Generation, HybridModel
from hgpo_trl.modes import TAGS, Mode, format_response

SUMS = [f"{letter} = {digit} sum mod 10 ?" for letter, digit in zip("abcdefgh", "12345678", strict=True)]
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "evalplus": [
        {"task_id": f"Mbpp/{i}", "prompt": f'"""\n{text}\n"""\n', "entry_point": "f"} for i, text in enumerate(SUMS)
    ],
    "alpaca_eval": [{"instruction": text, "output": "?", "generator": "gpt4", "dataset": "koala"} for text in SUMS],
    "arena_hard": [{"uid": f"u{i}", "category": "hard_prompt", "prompt": text} for i, text in enumerate(SUMS)],
}
NASTY = 'def f():\n\treturn "é\u2028\\n"\r\n\n```'  # line ends of every kind, within one answer


def write_prompts(tool: str, path: Path) -> Path:
    rows = PROMPTS[tool]
    text = json.dumps(rows) if tool == "alpaca_eval" else "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


# --- readers --------------------------------------------------------------------------------------------------


def read_evalplus(path: Path, problems: list[dict[str, Any]]) -> list[str]:
    """evalplus/data/utils.py: stream_jsonl, load_solutions; evalplus/evaluate.py: evaluate."""
    samples = []
    with path.open() as file:
        for line in file:
            if any(not character.isspace() for character in line):
                samples.append(json.loads(line))
    completions = Counter(sample["task_id"] for sample in samples)
    assert len(completions) == len(problems), "Missing problems in samples"
    assert all("solution" in sample for sample in samples)  # else it would be taken to continue the prompt
    by_task = {sample["task_id"]: sample["solution"] for sample in samples}
    return [by_task[problem["task_id"]] for problem in problems]


def read_alpaca_eval(path: Path, problems: list[dict[str, Any]]) -> list[str]:
    """src/alpaca_eval: load_or_convert_to_dataframe in utils.py, evaluate in main.py, annotate_head2head."""
    assert path.suffix == ".json"
    outputs, reference = pd.read_json(path), pd.DataFrame.from_records(problems)
    assert outputs["generator"].unique().tolist() == ["tiny"]
    keys = ["instruction"]
    merged = reference[[*keys, "output"]].merge(outputs[[*keys, "output"]], on=keys, suffixes=("_1", "_2"))
    assert len(merged) == len(reference) == len(outputs)
    return merged["output_2"].astype(str).tolist()  # annotators/base.py: read_json makes numbers of "7"


def read_arena_hard(path: Path, problems: list[dict[str, Any]]) -> list[str]:
    """utils/completion.py: load_model_answers; gen_judgment.py: pairwise_judgment; utils/add_markdown_info.py."""
    answers: dict[str, dict[str, Any]] = {}
    for file in path.parent.glob("*.jsonl"):
        with file.open() as lines:
            answers[file.name[:-6]] = {answer["uid"]: answer for answer in map(json.loads, lines)}
    assert {answer["model"] for answer in answers["tiny"].values()} == {"tiny"}  # the judgments' name, and the file's
    for answer in answers["tiny"].values():
        assert answer["messages"][0]["role"] == "user"
        assert answer["tstamp"] > 1e9
    assert len({answer["ans_id"] for answer in answers["tiny"].values()}) == len(problems)
    for_metadata = pd.read_json(path, lines=True)["messages"].map(lambda messages: messages[-1]["content"]["answer"])
    judged = [answers["tiny"][problem["uid"]]["messages"][-1]["content"]["answer"] for problem in problems]
    assert for_metadata.tolist() == judged
    return judged


READERS: dict[str, Callable[[Path, list[dict[str, Any]]], list[str]]] = {
    "evalplus": read_evalplus,
    "alpaca_eval": read_alpaca_eval,
    "arena_hard": read_arena_hard,
}
TOOLS = pytest.mark.parametrize("tool", HARNESSES)


@TOOLS
def test_the_tool_reads_what_is_written(tool: str, tmp_path: Path) -> None:
    prompts = read_prompts(tool, write_prompts(tool, tmp_path / "prompts.json"))
    texts = [NASTY, "", *(f"answer {i}" for i in range(len(prompts) - 2))]
    answers = {
        key: Answer(key, True, "a secret", text, 5, False, 1.7e9) for key, text in zip(prompts, texts, strict=True)
    }
    path = write_for(tool, prompts, answers, "tiny", tmp_path / "out")
    assert READERS[tool](path, PROMPTS[tool]) == texts
    assert "secret" not in path.read_text(encoding="utf-8")


def test_prompts_as_the_tools_send_them(tmp_path: Path) -> None:
    """EvalPlus's to chat models (evalplus/provider/openai.py); the judged tools' as they are. `.gz` as EvalPlus has."""
    path = tmp_path / "MbppPlus.jsonl.gz"
    path.write_bytes(gzip.compress(write_prompts("evalplus", tmp_path / "plain").read_bytes()))
    rows = read_prompts("evalplus", path)
    assert list(rows) == [f"Mbpp/{i}" for i in range(8)]
    message = HARNESSES["evalplus"].message(rows["Mbpp/0"])
    instruction, _, rest = message.partition("\n")
    assert instruction.startswith("Please provide a self-contained Python script")
    assert rest == f'```python\n"""\n{SUMS[0]}\n"""\n```'
    for tool in ("alpaca_eval", "arena_hard"):
        rows = read_prompts(tool, write_prompts(tool, tmp_path / tool))
        assert [HARNESSES[tool].message(row) for row in rows.values()] == SUMS


# --- with a model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model_dir: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model named `tiny` that thinks about every other sum, and whose responses are well-formed."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    texts = {
        Mode.THINK: format_response(Mode.THINK, "7", "let me add step by step"),
        Mode.NO_THINK: format_response(Mode.NO_THINK, "4"),
    }
    rows, labels = [], []
    for index, text in enumerate(SUMS):
        for message, modes in (
            (text, [list(Mode)[index % 2]]),
            (HARNESSES["evalplus"].message({"prompt": text}), Mode),
        ):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
            )
            for mode in modes:
                response = [*tokenizer(texts[mode], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                rows.append([*prompt, *response])
                labels.append([*[-100] * len(prompt), *response])
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(input_ids=ids, attention_mask=mask, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["hgpo-trl", "export", *words])
    main()


@TOOLS
def test_only_the_answer_is_handed_over(
    tool: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tool, tmp_path / "prompts.json")
    options = {"tool": tool, "prompts": prompts, "model": folder, "temperature": 0, "max_new_tokens": 16}
    handed: dict[str, list[str]] = {}
    for mode in ("auto", "think", "no_think"):
        run(monkeypatch, **options, output_dir=tmp_path / mode, mode=mode)
        said = capsys.readouterr().out
        path = tmp_path / mode / HARNESSES[tool].file.format(name="tiny")
        handed[mode] = READERS[tool](path, PROMPTS[tool])
        text = path.read_text(encoding="utf-8")
        assert not any(tag in text for tag in (*TAGS, "step by step"))
        whole = load_answers(tmp_path / mode / "responses.jsonl").values()
        thought = sum(answer.thought for answer in whole)
        assert {answer.reasoning for answer in whole if answer.thought} <= {"let me add step by step"}
        assert f"8 responses (mode {mode}), {thought} of them with thinking; 0 cut off, 0 without an answer" in said
        assert f"-> {path}\nNext: " in said
    assert handed["think"] == ["7"] * 8
    assert handed["no_think"] == ["4"] * 8
    if tool != "evalplus":  # of whose prompts it has seen both modes
        assert handed["auto"] == ["7", "4"] * 4


def test_a_response_that_is_cut_off_is_exported_empty(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts("alpaca_eval", tmp_path / "prompts.json")
    options = {"tool": "alpaca_eval", "prompts": prompts, "model": folder, "temperature": 0, "max_new_tokens": 3}
    run(monkeypatch, **options, output_dir=tmp_path / "out", mode="think")
    assert "8 of them with thinking; 8 cut off, 8 without an answer" in capsys.readouterr().out
    assert read_alpaca_eval(tmp_path / "out" / "model_outputs.json", PROMPTS["alpaca_eval"]) == [""] * 8


def test_an_interrupted_export_goes_on_as_if_it_had_not_been(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts("arena_hard", tmp_path / "prompts.jsonl")
    options = {
        "tool": "arena_hard",
        "prompts": prompts,
        "model": folder,
        "batch_size": 2,
        "temperature": 2.0,
        "top_p": 1.0,
    }
    run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "whole")
    whole = (tmp_path / "whole" / "responses.jsonl").read_bytes().split(b"\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
    (tmp_path / "torn" / "responses.jsonl").write_bytes(b"\n".join(whole[:4]) + b"\n" + whole[4][:20])
    asked = []
    call = HybridModel.__call__
    monkeypatch.setattr(
        HybridModel, "__call__", lambda self, texts, **rest: asked.extend(texts) or call(self, texts, **rest)
    )
    run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "torn")
    assert asked == SUMS[4:]
    found, expected = (
        {key: replace(answer, time=0.0) for key, answer in load_answers(tmp_path / name / "responses.jsonl").items()}
        for name in ("torn", "whole")
    )
    assert found == expected
    assert len({answer.answer for answer in found.values()}) > 2  # or the seeds would not matter

    before = (tmp_path / "torn" / "model_answer" / "tiny.jsonl").read_bytes()
    run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "torn")  # nothing is left
    assert asked == SUMS[4:]
    assert (tmp_path / "torn" / "model_answer" / "tiny.jsonl").read_bytes() == before
    with refused("holds another run's results. Changed: mode: 'auto' -> 'think'"):
        run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "torn", mode="think")

    run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "torn", name="other")  # written anew
    assert asked == SUMS[4:]
    assert (tmp_path / "torn" / "model_answer" / "other.jsonl").is_file()
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("a =", "b ="), encoding="utf-8")  # names stay
    with refused("holds another run's results. Changed: messages: "):
        run(monkeypatch, **options, max_new_tokens=16, output_dir=tmp_path / "torn")


def test_another_model_of_the_same_name_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts("alpaca_eval", tmp_path / "prompts.json")
    model = shutil.copytree(folder, tmp_path / "tiny")
    options = {"tool": "alpaca_eval", "prompts": prompts, "model": model, "max_new_tokens": 3}
    run(monkeypatch, **options, output_dir=tmp_path / "out")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with refused("holds another run's results. Changed: model_files: "):
        run(monkeypatch, **options, output_dir=tmp_path / "out")


def test_answers_are_kept_as_they_come(tmp_path: Path) -> None:
    """What was answered before an error is not asked again."""
    path = tmp_path / "responses.jsonl"
    prompts = {str(i): text for i, text in enumerate(SUMS)}

    def failing(pending: Mapping[str, str], after: int) -> Iterator[Answer]:
        for count, key in enumerate(pending):
            if count == after:
                raise RuntimeError("out of memory")
            yield Answer(key, False, "", f"{NASTY}{key}", 1, False, 0.0)

    with pytest.raises(RuntimeError, match="out of memory"):
        answer_all(prompts, path, partial(failing, after=3))
    assert list(load_answers(path)) == ["0", "1", "2"]
    assert list(answer_all(prompts, path, partial(failing, after=9))) == list(prompts)
    assert answer_all(prompts, path, partial(failing, after=0))["7"].answer == f"{NASTY}7"


def test_every_batch_has_a_seed_of_its_own(folder: Path) -> None:
    model = HybridModel.from_pretrained(str(folder))
    settings = {"temperature": 5.0, "top_p": 1.0, "max_new_tokens": 12, "mode": "no_think", "seed": 0, "batch_size": 1}
    same = {str(i): SUMS[0] for i in range(4)}
    assert len({answer.answer for answer in local_answers(model, same, total=4, **settings)}) > 1


def test_no_batch_has_the_seed_of_another_runs_batch() -> None:
    seen: list[int] = []

    def model(messages: list[str], seed: int, **settings: Any) -> list[Generation]:
        seen.append(seed)
        return [Generation(None, "", text, text, 1, 0, 1, True, None) for text in messages]

    prompts = {str(number): "?" for number in range(12)}
    for seed in range(10):
        list(local_answers(model, prompts, batch_size=1, seed=seed, total=12))
    assert len(set(seen)) == len(seen) == 120


# --- with a server --------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the server of `hgpo-trl serve` does (docs/serving.md): reasoning and content apart."""

    requests: list[dict[str, Any]] = []
    apart = True

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send_error(404)
            return
        self.reply({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        thinks = "a =" in request["messages"][0]["content"]
        cut_off = "b =" in request["messages"][0]["content"] or request["max_tokens"] == 1
        if self.apart:
            message = {"reasoning": "let me add" if thinks or cut_off else None, "content": None if cut_off else "7"}
        else:
            message = {"content": "<think>" if cut_off else "<think> let me add </think> 7"}
        self.reply(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", **message},
                        "finish_reason": "length" if cut_off else "stop",
                    }
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12},
            }
        )

    def reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def base_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Server, "requests", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@TOOLS
def test_responses_of_a_server(
    tool: str, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tool, tmp_path / "prompts.json")
    options = {"tool": tool, "prompts": prompts, "model": "tiny", "base_url": base_url, "output_dir": tmp_path / "out"}
    run(monkeypatch, **options, mode="think", max_new_tokens=50, batch_size=3)
    assert "2 of them with thinking; 1 cut off, 1 without an answer" in capsys.readouterr().out
    path = tmp_path / "out" / HARNESSES[tool].file.format(name="tiny")
    assert READERS[tool](path, PROMPTS[tool]) == ["7", "", *["7"] * 6]
    probe, *requests = Server.requests
    assert probe["max_tokens"] == 1
    sent = sorted(request["messages"][0]["content"] for request in requests)
    assert sent == sorted(HARNESSES[tool].message(row) for row in PROMPTS[tool])
    for request in requests:
        variables = request["chat_template_kwargs"]
        assert variables == {"thinking_mode": "think", "enable_thinking": True, "thinking": True}
        sampling = [request[key] for key in ("model", "temperature", "top_p", "max_tokens")]
        assert sampling == ["tiny", 0.6, 0.95, 50]
    assert len({request["seed"] for request in requests}) == 8  # with the same random numbers all would pick one mode


def test_an_error_of_a_request_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way when one fails is waited for and kept; what has not begun is not asked."""
    noticed, asked, cancel = threading.Event(), [], harnesses._cancel

    def cancel_and_tell(futures: Any) -> None:
        cancel(futures)
        noticed.set()

    monkeypatch.setattr(harnesses, "_cancel", cancel_and_tell)

    def create(messages: list[dict[str, str]], **request: Any) -> Any:
        (message,) = messages
        asked.append(message["content"])
        if message["content"] == "1":
            raise RuntimeError("of request 1")
        noticed.wait()  # under way until then
        choice = SimpleNamespace(message=SimpleNamespace(content="7"), finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage=SimpleNamespace(completion_tokens=1))

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    settings = {"mode": "auto", "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 3, "batch_size": 3}
    path, prompts = tmp_path / "responses.jsonl", {str(number): str(number) for number in range(100)}
    with pytest.raises(RuntimeError, match="of request 1"):
        answer_all(prompts, path, lambda pending: served_answers(client, "tiny", pending, **settings))
    assert {"0", "2"} <= set(load_answers(path)) == set(asked) - {"1"}
    assert len(asked) <= 4, "the first three, and the one that took the failed one's place"


def test_servers_that_will_not_do(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
    check_chat_server(client, base_url, "tiny")
    with pytest.raises(ValueError, match=r"model='other': the server at .* has tiny"):
        check_chat_server(client, base_url, "other")
    monkeypatch.setattr(Server, "apart", False)
    with pytest.raises(ValueError, match=r"leaves reasoning and answer in one text.*hgpo-trl serve --model tiny"):
        check_chat_server(client, base_url, "tiny")
    for nowhere in ("http://127.0.0.1:9/v1", base_url.removesuffix("/v1")):
        with pytest.raises(ValueError, match=r"no such server answers there.*ends with /v1"):
            check_chat_server(OpenAI(base_url=nowhere, api_key="none", max_retries=0), nowhere, "tiny")


# --- bad input ------------------------------------------------------------------------------------------------


def test_bad_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = write_prompts("arena_hard", tmp_path / "question.jsonl")
    good = {"tool": "arena_hard", "prompts": prompts, "model": folder, "output_dir": tmp_path / "out"}
    for pattern, change in {
        "tool must be one of evalplus, alpaca_eval, arena_hard; got 'lighteval'. lighteval asks": {"tool": "lighteval"},
        "no field 'task_id', which evalplus has; it has uid, category, prompt": {"tool": "evalplus"},
        "no field 'instruction', which alpaca_eval has": {"tool": "alpaca_eval"},
        "prompts=.*: there is no such file": {"prompts": tmp_path / "nothing.jsonl"},
        "model=.*: there is no such folder": {"model": tmp_path / "nothing"},
        "mode must be one of auto, think, no_think": {"mode": "both"},
        "batch_size must be at least 1": {"batch_size": 0},
        "max_new_tokens must be at least 2": {"max_new_tokens": 1},
        "name='a/b' becomes a file's name": {"name": "a/b"},
    }.items():
        with refused(pattern):
            run(monkeypatch, **{**good, **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ('{"question_id": "1", "turns": []}', "entry 0 has no field 'uid'.*it has question_id, turns"),
        ('{"uid": "1", "prompt": "x"}\n{"uid": "1", "prompt": "y"}', "uid '1' is there twice"),
        ('{"uid": "1", "prompt": " "}', "entry 0: prompt must be a text; got ' '"),
        ('{"uid": "1", "prompt": ["x"]}', "entry 0: prompt must be a text"),
        ('{"uid": ', "is neither a JSON list nor JSON lines"),
        ("[1]", "every entry must be an object"),
        ("[]", "has no entries"),
        ("\n", "has no entries"),
    ],
)
def test_wrong_files_of_prompts(content: str, pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=pattern):
        read_prompts("arena_hard", path)


def test_the_closing_message_counts() -> None:
    one = Answer("0", True, "r", "", 9, True, 0.0)
    answers = [one, replace(one, answer="4", truncated=False), replace(one, thought=False, answer="4", truncated=True)]
    assert closing_message("evalplus", answers, Path("x/samples.jsonl"), "auto").splitlines() == [
        "3 responses (mode auto), 2 of them with thinking; 2 cut off, 1 without an answer (exported as an empty text) "
        "-> x/samples.jsonl",
        "Next: evalplus.sanitize --samples x/samples.jsonl, then evalplus.evaluate on the sanitized file "
        "(docs/harnesses.md)",
    ]
