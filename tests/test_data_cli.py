"""`hgpo-trl data`: its kinds, both builders from a recipe, and what they say of a bad one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml
from refusals import refused
from tokenizers_zoo import qwen2, save_thinker
from transformers import AutoTokenizer

from hgpo_trl.cli import main
from hgpo_trl.common.data_files import load_data
from hgpo_trl.modes import PRESETS, Mode, split_response
from hgpo_trl.scripts.data import KINDS
from hgpo_trl.training.checks import inspect_rows
from hgpo_trl.training.rows import EXAMPLES, Renderer, as_trained

ROOT = Path(__file__).parents[1]
TOPICS = "rivers bread chess glaciers violins bees castles comets tea maps".split()

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep data sets out of the user's own folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def data(*argv: str) -> None:
    """`hgpo-trl data ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hgpo-trl", "data", *argv])
        main()


def in_a_process(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hgpo_trl.cli", "data", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, Path]:
    """A recipe of each builder, on small files with known faults."""
    sums = [
        {"q": f"What is {i} + {i}?", "trace": f"We add {i} to itself, and count in tens and ones.", "a": str(2 * i)}
        for i in range(10, 30)
    ]
    for row in sums:
        row["solution"] = f"The answer is \\boxed{{{row['a']}}}."
    wrong, empty = {**sums[0], "q": "What is 7 + 8?", "a": "15"}, {**sums[1], "q": "What is 1 + 2?", "solution": " "}
    write_lines(tmp_path / "maths.jsonl", [*sums, dict(sums[3]), wrong, empty])
    chat = [{"q": f"Tell me a nice thing about {topic}.", "a": f"People all over like {topic}."} for topic in TOPICS]
    write_lines(tmp_path / "chat.jsonl", [*chat, {"q": "Write a Python program that sorts a list.", "a": "sorted(x)"}])
    write_lines(tmp_path / "benchmark.jsonl", [{"problem": sums[5]["q"]}])

    maths_fields = {"prompt": "q", "reference": "a"}
    common = {"num_processes": 1, "decontamination": [{"path": str(tmp_path / "benchmark.jsonl"), "field": "problem"}]}
    maths = {"path": str(tmp_path / "maths.jsonl"), "name": "sums", "domain": "maths"}
    contents = {
        "hft": {
            "sources": [
                maths | {"fields": maths_fields | {"reasoning": "trace", "answer": "solution"}},
                {"path": str(tmp_path / "chat.jsonl"), "name": "chat", "fields": {"prompt": "q", "answer": "a"}},
            ]
        },
        "hgpo": {"sources": [maths | {"fields": maths_fields}]},
    }
    paths = {}
    for kind, content in contents.items():
        paths[kind] = tmp_path / f"data_{kind}.yaml"
        paths[kind].write_text(yaml.safe_dump(common | content | {"output_dir": str(tmp_path / kind)}))
    return paths


def change(recipe: Path, **fields: Any) -> list[str]:
    """The arguments for a recipe with other fields."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    changed = recipe.with_name(f"changed-{recipe.name}")
    changed.write_text(yaml.safe_dump(content | fields), encoding="utf-8")
    return ["--config", str(changed)]


# --- kinds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage_lists_the_kinds(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data(*argv)
    text = capsys.readouterr().out
    assert text.startswith("usage: hgpo-trl data [KIND]")
    for kind, summary in KINDS.items():
        assert f"  {kind} " in text
        assert summary in text


def test_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        data("sft", "--config", "x.yaml")
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("hgpo-trl data: error: unknown kind 'sft'\n")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("task", ["--output_dir", "--num_hft"]),
        ("hft", ["--sources", "--dedup_threshold", "--reasoning_threshold"]),
        ("hgpo", ["--sources", "--dedup_threshold", "--difficulty_model"]),
        ("classifier", ["--reasoning", "--other"]),
    ],
)
def test_help_of_a_kind_lists_its_fields(kind: str, fields: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        data(kind, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hgpo-trl data {kind if kind != 'task' else '['}")
    assert all(f"{field} " in text for field in fields)


def test_without_a_kind_it_is_the_embedded_task(tmp_path: Path) -> None:
    sizes = {"num_hft": 18, "num_hgpo": 9, "num_eval": 9, "hidden_size": 8, "num_heads": 2, "num_layers": 1}
    for name, kind in (("plain", []), ("task", ["task"])):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(sizes | {"output_dir": str(tmp_path / name)}), encoding="utf-8")
        data(*kind, "--config", str(recipe))
    plain, task = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "plain", tmp_path / "task")
    )
    assert Path("hft.parquet") in plain
    assert plain == task


# --- builds ---------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_hft_from_a_recipe(recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_a_process("hft", "--config", str(recipes["hft"]), "--max_rows", "1000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sums: 19 of 23 rows" in done.stdout
    assert "chat: 10 of 11 rows" in done.stdout
    removed = pd.read_parquet(tmp_path / "hft" / "removed.parquet")
    assert sorted(zip(removed["source"], removed["step"], strict=True)) == [
        ("chat", "reasoning_queries"),
        ("sums", "decontamination"),
        ("sums", "duplicates"),
        ("sums", "schema"),
        ("sums", "verification"),
    ]
    dataset = load_data("train_data", str(tmp_path / "hft"))
    assert len(dataset) == 29
    for row in dataset:
        response = split_response(row["completion"][0]["content"])
        assert response.well_formed
        thinks = row["source"] == "sums"
        assert row["mode"] == response.mode == (Mode.THINK if thinks else Mode.NO_THINK)

    data("hft", "--config", str(recipes["hft"]), "--max_rows", "1000")
    assert "is complete already" in capsys.readouterr().out
    with refused("^output_dir=.* holds another data set. Changed: max_rows: 1000 -> 5. Choose another output_dir"):
        data("hft", "--config", str(recipes["hft"]), "--max_rows", "5")


def test_files_made_anew_under_the_same_names_are_another_data_set(recipes: dict[str, Path], tmp_path: Path) -> None:
    """Neither a source nor a benchmark that has changed may pass for the one that the data set was built from."""
    command = ("hft", "--config", str(recipes["hft"]))
    data(*command)
    recipe = yaml.safe_load(recipes["hft"].read_text(encoding="utf-8"))
    for entries in (recipe["sources"], recipe["decontamination"]):
        file = Path(entries[0]["path"])
        before = file.read_bytes()
        file.write_bytes(before + before.splitlines(keepends=True)[0])
        with refused(
            rf"holds another data set\. Changed: input_files\.{re.escape(str(file))}: '\w+' -> '\w+'\. Choose"
        ):
            data(*command)
        file.write_bytes(before)
    data(*command)


def build_from(tmp_path: Path, kind: str, rows: list[Any], fields: dict[str, Any], **more: Any) -> Path:
    """A data set from one file, without filters on its texts."""
    write_lines(tmp_path / "rows.jsonl", rows)
    content = {
        "sources": [{"path": str(tmp_path / "rows.jsonl"), "name": "mine", "fields": fields}],
        "output_dir": str(tmp_path / "out"),
        "num_processes": 1,
        "quality_filter": False,
        "deduplicate": "none",
        **({"remove_reasoning_queries": False} if kind == "hft" else {}),
        **more,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    data(kind, "--config", str(tmp_path / "recipe.yaml"))
    return tmp_path / "out"


@pytest.mark.parametrize(("complete", "kept"), [(1, 20), (6, 6)])
def test_traces_begun_in_the_prompt_are_a_habit_of_nearly_all_rows(complete: int, kept: int, tmp_path: Path) -> None:
    rows = [{"q": f"What is {i} + {i}?", "r": f"{i} twice.\n</think>\n\n{2 * i}"} for i in range(20)]
    for row in rows[:complete]:
        row["r"] = f"<think>\n{row['r']}"
    out = build_from(tmp_path, "hft", rows, {"prompt": "q", "response": "r"})
    dataset, removed = load_data("train_data", str(out)), pd.read_parquet(out / "removed.parquet")
    assert len(dataset) == kept
    assert set(dataset["mode"]) == {"think"}
    responses = [split_response(completion[0]["content"]) for completion in dataset["completion"]]
    assert all(response.reasoning.endswith("twice.") and response.answer.isdigit() for response in responses)
    assert removed["reason"].tolist() == ["unopened_trace"] * (20 - kept)
    assert all("mode: think" in json.loads(detail)["hint"] for detail in removed["detail"])


def test_content_that_is_not_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"instruction": f"Sort by {topic}:", "input": f"all the {topic}", "output": topic, "id": i}
        for i, topic in enumerate(TOPICS)
    ]
    out = build_from(tmp_path, "hft", rows, {"prompt": "instruction", "answer": "output"})
    assert "not read, though it looks like content: input\n" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["sources"]["mine"]["not_read"] == ["input"]
    assert "not read:\n\n- mine: `input`" in (out / "README.md").read_text()
    (tmp_path / "both").mkdir()
    out = build_from(tmp_path / "both", "hft", rows, {"prompt": ["instruction", "input"], "answer": "output"})
    assert "not read" not in capsys.readouterr().out
    assert "not read" not in (out / "README.md").read_text()
    prompts = {prompt[0]["content"] for prompt in load_data("train_data", str(out))["prompt"]}
    assert prompts == {f"Sort by {topic}:\n\nall the {topic}" for topic in TOPICS}


def test_responses_in_the_marks_of_a_model_that_thinks(recipes: dict[str, Path], tmp_path: Path) -> None:
    """Built for Qwen3, the rows are those of the chat template itself, and Stage I in that format opens all of them."""
    save_thinker("qwen3", str(tmp_path / "model"))
    fields = ["--mode_format", "qwen3", "--tokenizer", str(tmp_path / "model")]
    data("hft", "--config", str(recipes["hft"]), *fields)
    dataset = load_data("train_data", str(tmp_path / "hft"))
    assert set(dataset["mode"]) == set(Mode)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in dataset:
        (message,) = row["completion"]
        response = split_response(message["content"], PRESETS["qwen3"])
        assert (response.mode, response.faults) == (row["mode"], ())
        parts = {"role": "assistant", "content": response.answer, "reasoning_content": response.reasoning}
        by_template = [
            tokenizer.apply_chat_template([*row["prompt"], answer], tokenize=False) for answer in (parts, message)
        ]
        assert by_template[0] == by_template[1]
        assert f"<|im_start|>assistant\n{message['content']}<|im_end|>" in by_template[0]
    renderer = Renderer(as_trained(tokenizer, "qwen3"))
    faults, _ = inspect_rows(dataset, renderer, EXAMPLES)
    assert faults == []
    (message,) = next(row["completion"] for row in dataset if row["mode"] == Mode.NO_THINK)
    answer = split_response(message["content"], PRESETS["qwen3"]).answer
    own = {"prompt": dataset[0]["prompt"], "completion": [message | {"content": f"<no_think>{answer}</no_think>"}]}
    (fault,), _ = inspect_rows(datasets.Dataset.from_list([own]), renderer, EXAMPLES)
    assert fault.kind == "nested", "the template writes an empty trace before it"
    assert "in the marks of lhrm, but mode_format is qwen3. Set mode_format: lhrm, or write" in fault.detail
    card = (tmp_path / "hft" / "README.md").read_text(encoding="utf-8")
    assert "in the marks of the format qwen3" in card
    with refused(r"Changed: mode_format: 'qwen3' -> None"):
        data("hft", "--config", str(recipes["hft"]), *fields[2:])


def test_a_response_that_holds_the_marks_of_its_format_is_left_out(tmp_path: Path) -> None:
    rows = [{"q": f"Tell me of {topic}.", "a": f"I like {topic}."} for topic in TOPICS]
    rows[2]["a"] = "At once: yes."
    spoken = {"think": "Let me think.", "no_think": "At once:", "end_reasoning": "So"}
    out = build_from(tmp_path, "hft", rows, {"prompt": "q", "answer": "a"}, mode_format=spoken)
    removed = pd.read_parquet(out / "removed.parquet")
    assert removed[["step", "reason"]].to_numpy().tolist() == [["schema", "not_in_format"]]
    assert "At once:" in removed["detail"][0]
    (written,) = load_data("train_data", str(out))[0]["completion"]
    assert written["content"].startswith("At once:I like ")


@pytest.mark.parametrize("kind", ["hft", "hgpo"])
def test_rows_that_the_chat_template_refuses_are_left_out(kind: str, tmp_path: Path) -> None:
    """With the template of a model that knows the modes and takes no system message."""
    tokenizer = as_trained(qwen2())
    template = str(tokenizer.chat_template)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system message, please.') }}{% endif %}"
    tokenizer.chat_template = refusal + template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"q": f"Tell me of {topic}.", "a": f"I like {topic}.", "s": None} for topic in TOPICS]
    rows[3]["s"] = "Be brief."
    fields = {"prompt": "q", "system": "s"} | ({"answer": "a"} if kind == "hft" else {})
    out = build_from(tmp_path, kind, rows, fields, tokenizer=str(tmp_path / "tokenizer"))
    removed = pd.read_parquet(out / "removed.parquet")
    assert removed[["step", "reason"]].to_numpy().tolist() == [["rendering", "chat_template"]]
    assert json.loads(removed["detail"][0]) == {"detail": "No system message, please."}
    assert len(load_data("train_data", str(out))) == len(TOPICS) - 1


@pytest.mark.processes
def test_hgpo_from_a_recipe(recipes: dict[str, Path], tmp_path: Path) -> None:
    done = in_a_process("hgpo", "--config", str(recipes["hgpo"]))
    assert done.returncode == 0, done.stderr[-2000:]
    dataset = load_data("train_data", str(tmp_path / "hgpo"))
    answers = {row["prompt"][0]["content"]: row["answer"] for row in dataset}
    expected = {f"What is {i} + {i}?": str(2 * i) for i in range(10, 30) if i != 15}
    assert answers == expected | {"What is 7 + 8?": "15", "What is 1 + 2?": "22"}
    assert not {"completion", "mode"} & set(dataset.column_names)


def test_command_line_overrides_the_recipe(recipes: dict[str, Path], tmp_path: Path) -> None:
    data("hgpo", "--config", str(recipes["hgpo"]), "--max_rows", "5", "--output_dir", str(tmp_path / "five"))
    assert len(load_data("train_data", str(tmp_path / "five"))) == 5
    assert not (tmp_path / "hgpo").exists()


def test_mappings_on_the_command_line(recipes: dict[str, Path], tmp_path: Path) -> None:
    shares = ["--mode_shares", '{"think": 0.5, "no_think": 0.5}']
    data("hft", "--config", str(recipes["hft"]), *shares, "--output_dir", str(tmp_path / "half"))
    assert sorted(load_data("train_data", str(tmp_path / "half"))["mode"]) == ["no_think"] * 10 + ["think"] * 10
    source = json.dumps({"path": str(tmp_path / "chat.jsonl"), "fields": {"prompt": "q", "answer": "a"}})
    data("hft", "--sources", source, source[:-1] + ', "name": "b"}', "--output_dir", str(tmp_path / "chat"))
    assert set(load_data("train_data", str(tmp_path / "chat"))["source"]) == {str(tmp_path / "chat.jsonl")}
    for text in ("think=0.5", "[0.5]", "0.5"):
        with refused(re.escape(f"--mode_shares/--mode-shares: {text!r} is not a mapping; write it as in a recipe")):
            data("hft", "--config", str(recipes["hft"]), "--mode_shares", text)


# --- bad recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hft", "hgpo"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"feilds": {"prompt": "q"}}, r"sources\[0\] has the unknown key 'feilds'; did you mean 'fields'\?"),
        ({"path": "nowhere/at/all.jsonl"}, r"sources\[0\]\.path='nowhere/at/all\.jsonl': there is no such file"),
        ({"path": None}, r"sources\[0\]=.* lacks `path`: a file, a folder, or an id on the hub"),
        ({"fields": None}, r"sources\[0\] \(sums\) needs `fields`.* there is no adapter for it"),
        ({"fields": {"prompt": "question", "answer": "a"}}, r"none of the first rows has 'question'"),
        ({"fields": {"query": "q"}}, r"sources\[0\] \(sums\): fields: unknown name 'query'; the names are prompt,"),
        ({"adapter": "open-r1/OpenR1-Math"}, r"there is no adapter 'open-r1/OpenR1-Math'; did you mean 'open-r1/Open"),
        ({"rows": "many"}, r"sources\[0\] \(.*\): rows.*valid integer"),
        ({"mode": "fast"}, r"sources\[0\] \(.*fast"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_source(
    kind: str, source: Config, words: str, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = yaml.safe_load(recipes[kind].read_text(encoding="utf-8"))["sources"]
    with refused(words):
        data(kind, *change(recipes[kind], sources=[sources[0] | source]))
    assert not (tmp_path / kind).exists()


@pytest.mark.parametrize("kind", ["hft", "hgpo"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sources": []}, "sources is empty. Name at least one"),
        ({"sources": ["maths.jsonl"]}, "sources=.* has the wrong type"),
        ({"source": []}, "unknown key 'source'; did you mean 'sources'"),
        ({"deduplicate": "fuzzy"}, "deduplicate.*fuzzy"),
        ({"dedup_threshold": 1.5}, r"dedup_threshold must lie between 0 and 1; got 1\.5"),
        ({"max_rows": 0}, "max_rows must be at least 1; got 0"),
        ({"max_tokens": 5}, "max_tokens=5 needs a tokenizer to count with"),
        ({"domain_shares": {"maths": 0.4}}, r"domain_shares=.*must sum to 1"),
        ({"source_shares": {"summs": 1.0}}, r"source_shares names 'summs'; the sources are sums"),
        ({"decontamination": [{"path": "nowhere/at/all.jsonl", "field": "q"}]}, r"decontamination\[0\].*no such file"),
        ({"decontamination": [{"path": "chat.jsonl", "field": "x"}]}, r"decontamination\[0\].*has no text in 'x'"),
        (
            {"decontamination": [{"path": "a", "field": "q"}] * 2},
            "decontamination: 'a' is there twice. Give each its own",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_field(
    kind: str, fields: Config, words: str, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(words):
        data(kind, *change(recipes[kind], **fields))
    assert not (tmp_path / kind / "manifest.json").exists()


@pytest.mark.processes
def test_a_refusal_is_one_message_with_status_2(recipes: dict[str, Path]) -> None:
    done = in_a_process("hgpo", "--config", str(recipes["hgpo"]), "--decontamination", '{"path": "no/such/a.jsonl"}')
    assert done.returncode == 2
    assert done.stderr.startswith("hgpo-trl data hgpo: error: decontamination")
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("kind", [*KINDS])
def test_recipe_that_is_not_there(kind: str) -> None:
    with refused("--config nowhere.yaml: there is no such recipe"):
        data(kind, "--config", "nowhere.yaml")


def test_prompts_alone_are_no_stage_one(recipes: dict[str, Path], tmp_path: Path) -> None:
    sources = yaml.safe_load(recipes["hgpo"].read_text(encoding="utf-8"))["sources"]
    with refused("give prompts alone, and Stage I needs responses. Add answer"):
        data("hft", *change(recipes["hft"], sources=sources))


def test_difficulty_model_that_is_not_there(recipes: dict[str, Path], tmp_path: Path) -> None:
    with refused("difficulty_model='.*': there is no such folder"):
        data("hgpo", *change(recipes["hgpo"], difficulty_model=str(tmp_path / "no" / "model")))
    assert not (tmp_path / "hgpo").exists()
