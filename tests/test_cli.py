"""The commands that users type: the whole method in miniature, and what each stage says of bad input."""

import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import wandb
import yaml
from datasets import Dataset
from refusals import refused
from tokenizers_zoo import word_level
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from wandb.proto.wandb_internal_pb2 import Record

from hgpo_trl.cli import STAGES, main
from hgpo_trl.scripts import card, data
from hgpo_trl.tasks import chain_sum

ROOT = Path(__file__).parents[1]
PARTS = ("hft", "hgpo", "eval")
TINY = {"num_hft": 64, "num_hgpo": 18, "num_eval": 18, "hidden_size": 16, "num_heads": 2, "num_layers": 1}
TRAINING = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}

Config = dict[str, Any]


def run(stage: str, config: Config, *argv: str) -> None:
    """`hgpo-trl STAGE --config recipe.yaml ...` in this process."""
    recipe = Path(config["output_dir"]).parent / f"{stage}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hgpo-trl", stage, "--config", str(recipe), *argv])
        main()


@pytest.fixture(scope="module", autouse=True)
def no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep data sets and Weights & Biases out of the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))  # for subprocesses
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.teardown()


# --- hgpo-trl -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_stages(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hgpo-trl", *argv])
    main()
    text = capsys.readouterr().out
    for stage, summary in STAGES.items():
        assert f"  {stage} " in text
        assert summary in text


def test_unknown_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hgpo-trl", "train"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("hgpo-trl: error: unknown stage 'train'\n")
    assert "stages:" in error


@pytest.mark.processes
def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from hgpo_trl.cli import main; main(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- data -----------------------------------------------------------------------------------------------------


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def prompts_of(path: Path) -> list[str]:
    return [prompt[0]["content"] for prompt in pd.read_parquet(path)["prompt"]]


def test_data_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("data", TINY | {"output_dir": str(tmp_path / name / "data"), "seed": seed})
    first, second, other = (files(tmp_path / name / "data") for name in "abc")
    assert first == second
    assert {f"{part}.parquet" for part in PARTS} < first.keys()
    assert {name for name in first if first[name] == other[name]} == {
        name for name in first if name.startswith("base/") and not name.endswith(".safetensors")
    }


def test_data_is_held_out_by_its_text_and_in_exact_proportion(tmp_path: Path) -> None:
    sizes = {"num_hft": 900, "num_hgpo": 360, "num_eval": 270}
    run("data", TINY | sizes | {"output_dir": str(tmp_path / "data"), "held_out_fraction": 0.3, "think_share": 0.25})
    paths = {part: tmp_path / "data" / f"{part}.parquet" for part in PARTS}
    queries = {part: prompts_of(path) for part, path in paths.items()}
    assert not set(queries["eval"]) & {*queries["hft"], *queries["hgpo"]}

    total = sum(chain_sum.LEVELS.values())
    for part, size in zip(PARTS, sizes.values(), strict=True):
        levels = Counter(pd.read_parquet(paths[part])["level"])
        assert levels == {level: size * weight // total for level, weight in chain_sum.LEVELS.items()}
        for query, answer in zip(queries["eval"], pd.read_parquet(paths["eval"])["answer"], strict=True):
            assert sum(int(word) for word in query.split(" sum ")[0].split() if word.isdigit()) % 10 == int(answer)
    modes = Counter(pd.read_parquet(paths["hft"])["mode"])
    assert 0.2 < modes["think"] / modes.total() < 0.3


def test_saved_tokenizer_reads_the_task_as_it_was_written(tmp_path: Path) -> None:
    """Through AutoTokenizer, which for some architectures puts its own class in place of the saved one."""
    run("data", TINY | {"output_dir": str(tmp_path / "data")})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "base")
    for row in datasets.Dataset.from_parquet(str(tmp_path / "data" / "hft.parquet")):
        for message in (*row["prompt"], *row["completion"]):
            words = message["content"].split()
            ids = tokenizer.encode(message["content"], add_special_tokens=False)
            assert tokenizer.convert_ids_to_tokens(ids) == words
            assert tokenizer.decode(ids).split() == words


TASK = """
from __future__ import annotations

from dataclasses import dataclass

from hgpo_trl.tasks.embedded import Query

LEVELS = {"easy": 2, "hard": 1}
VOCABULARY = [*"double ? is then".split(), *map(str, range(200))]


@dataclass
class Number:
    value: int


def sample(level, rng):
    number = Number(rng.randrange(50 if level == "easy" else 100)).value
    return Query(f"double {number} ?", f"then is {2 * number}", str(2 * number), 1 if level == "easy" else 2)
"""


def test_task_of_a_users_own(tmp_path: Path) -> None:
    path = tmp_path / "doubling.py"
    path.write_text(TASK, encoding="utf-8")
    run("data", TINY | {"output_dir": str(tmp_path / "data"), "tasks": [str(path)]})
    evaluation = pd.read_parquet(tmp_path / "data" / "eval.parquet")
    assert Counter(evaluation["level"]) == {1: 12, 2: 6}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "base")
    for row in pd.read_parquet(tmp_path / "data" / "hft.parquet").itertuples():
        text = f"{row.prompt[0]['content']} {row.completion[0]['content']}"
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("VOCABULARY =", "WORDS ="), "lacks VOCABULARY; hgpo_trl/tasks/embedded.py says what a task needs"),
        (('{"easy": 2, "hard": 1}', "{}"), "LEVELS must map at least one level to a whole number above 0; got {}"),
        (('"hard": 1', '"hard": 0'), "LEVELS must map at least one level to a whole number above 0"),
        (('"hard": 1', '"hard": 0.5'), "LEVELS must map at least one level to a whole number above 0"),
        (("range(200)", "range(20)"), "VOCABULARY lacks ["),
        (("rng.randrange(50 if", "rng.randrange(1 if"), "held_out_fraction=0.2: level easy has no held-out query"),
        (('str(2 * number), 1', '" ", 1'), "answer is blank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_task(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "task.py"
    path.write_text(TASK.replace(*change), encoding="utf-8")
    with refused(re.escape(words)):
        run("data", TINY | {"output_dir": str(tmp_path / "data"), "tasks": [str(path)]})


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("nowhere/task.py", "There is no file nowhere/task.py"),
        ("hgpo_trl.tasks.nothing", "There is no module 'hgpo_trl.tasks.nothing'"),
        ("no.such.package", "There is no module 'no.such.package'"),
        ("json", "tasks: 'json' lacks LEVELS, VOCABULARY, sample"),
    ],
)
def test_task_that_is_not_there(tmp_path: Path, task: str, words: str) -> None:
    with refused(re.escape(words)):
        run("data", TINY | {"output_dir": str(tmp_path / "data"), "tasks": [task]})


def test_error_inside_a_task_is_shown_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("import a_package_that_is_not_installed", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        run("data", TINY | {"output_dir": str(tmp_path / "data"), "tasks": [str(path)]})


@pytest.mark.parametrize("line", ["raise ValueError('from a task')", "raise UnicodeError('from a task')"])
def test_other_errors_keep_their_traceback(line: str, tmp_path: Path) -> None:
    """A ValueError that is not the library's own may come from anywhere."""
    path = tmp_path / "task.py"
    path.write_text(TASK.replace("    number =", f"    {line}\n    number ="), encoding="utf-8")
    with pytest.raises(ValueError, match="from a task"):
        run("data", TINY | {"output_dir": str(tmp_path / "data"), "tasks": [str(path)]})


# --- the whole method -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, HFT, HGPO (logged to an offline W&B run), evaluation, report (the same): the folder of all of it."""
    root = tmp_path_factory.mktemp("whole")
    data, models = root / "data", {stage: root / stage for stage in ("hft", "hgpo")}
    with pytest.MonkeyPatch.context() as patch:
        run("data", TINY | {"output_dir": str(data)})
        run("hft", hft_config(root))
        patch.setenv("WANDB_DIR", str(root))
        wandb.teardown()  # a run of another test has read the environment once for all
        run("hgpo", hgpo_config(root) | {"report_to": "wandb", "run_name": "mini", "log_completions": True})
        wandb.finish()
        evaluation = {
            "model": str(models["hgpo"]),
            "data": str(data / "eval.parquet"),
            "num_prompts": 6,
            "samples_per_mode": 2,
            "max_new_tokens": 12,
        }
        run("evaluate", evaluation | {"output_dir": str(root / "eval-hgpo")})
        run("evaluate", evaluation | {"output_dir": str(root / "eval-hft"), "model": str(models["hft"])})
        report = {
            "evaluations": [f"{stage}={root}/eval-{stage}" for stage in models],
            "training_runs": [f"{stage}={path}" for stage, path in models.items()],
            "margin_sweep": [f"0.2={root}/eval-hgpo", f"0={root}/eval-hft"],
            "output_dir": str(root / "report"),
        }
        run("report", report, "--report_to", "wandb", "--title", "Miniature")
    return root


def hft_config(root: Path) -> Config:
    return TRAINING | {
        "model_name_or_path": f"{root}/data/base",
        "train_data": f"{root}/data/hft.parquet",
        "eval_data": f"{root}/data/hft.parquet",
        "output_dir": f"{root}/hft",
        "eval_strategy": "steps",
        "max_steps": 3,
    }


def hgpo_config(root: Path) -> Config:
    return TRAINING | {
        "model_name_or_path": f"{root}/hft",
        "train_data": f"{root}/data/hgpo.parquet",
        "eval_data": f"{root}/data/eval.parquet",
        "output_dir": f"{root}/hgpo",
        "eval_prompts": 4,
        "eval_strategy": "steps",
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "margin": 0.25,
        "max_completion_length": 8,
        "max_steps": 2,
    }


def wandb_records(path: Path) -> list[Record]:
    """An offline run's file is a log in LevelDB's format: records in pieces, in blocks of 32 KiB; before each piece its
    checksum, length and kind."""
    content, position, record, records = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while position + 7 < len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or its last piece
            records.append(Record.FromString(record))
            record = b""
    return records


def wandb_run(root: Path, job_type: str) -> tuple[list[Record], Path]:
    """The records of the one run of a job type, and the folder of its files."""
    found = []
    for path in root.glob("wandb/offline-run-*/run-*.wandb"):
        records = wandb_records(path)
        if next(record.run.job_type for record in records if record.HasField("run")) == job_type:
            found.append((records, path.with_name("files")))
    (run,) = found
    return run


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_training_leaves_models_that_load(whole_run: Path) -> None:
    for stage, steps in (("hft", 3), ("hgpo", 2)):
        model = AutoModelForCausalLM.from_pretrained(whole_run / stage)
        assert model.num_parameters() > 0
        assert "<think>" in AutoTokenizer.from_pretrained(whole_run / stage).get_vocab()
        state = json.loads((whole_run / stage / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["global_step"] == steps
        assert json.loads((whole_run / stage / "run.json").read_text(encoding="utf-8"))["stage"] == stage


WITHOUT_US = """
import json, sys
sys.modules["hgpo_trl"] = None  # an import of it fails
from transformers import AutoTokenizer, GenerationConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = GenerationConfig.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": "a = 1 ?"}, {"role": "assistant", "content": "<think> b </think> 1"}]
messages += [{"role": "user", "content": "a = 2 ?"}]
render = dict(add_generation_prompt=True, tokenize=False)
prompts = {
    mode: tokenizer.apply_chat_template(messages, thinking_mode=mode, **render)
    for mode in ("auto", "think", "no_think")
}
ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
sampling = config.do_sample, config.temperature, config.top_p
print(json.dumps([prompts, tokenizer.eos_token_id in ends, config.pad_token_id == tokenizer.pad_token_id, sampling]))
snippet = open(sys.argv[1] + "/README.md", encoding="utf-8").read().split("```python")[1].split("```")[0]
exec(snippet.replace('"' + sys.argv[1].split("/")[-1] + '"', repr(sys.argv[1])))
"""


@pytest.mark.processes
@pytest.mark.parametrize("stage", ["hft", "hgpo"])
def test_a_trained_model_needs_none_of_our_code(stage: str, whole_run: Path) -> None:
    """Tags, template, generation config; and the example on its card runs."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, str(whole_run / stage)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    facts, _, response = done.stdout.partition("\n")
    prompts, ends, pads, sampling = json.loads(facts)
    assert prompts["auto"] == "<bos>User: a = 1 ?\nAssistant: 1<eos>\nUser: a = 2 ?\nAssistant:"
    assert prompts["think"] == f"{prompts['auto']}<think>"
    assert prompts["no_think"] == f"{prompts['auto']}<no_think>"
    assert (ends, pads, sampling) == (True, True, [True, 0.6, 0.95])
    assert response


def test_a_trained_model_has_a_card(whole_run: Path, tmp_path: Path) -> None:
    texts = {stage: (whole_run / stage / "README.md").read_text(encoding="utf-8") for stage in ("hft", "hgpo")}
    assert "### Hybrid Fine-Tuning" in texts["hft"]
    assert "### Hybrid Group" not in texts["hft"]
    assert texts["hgpo"].index("### Hybrid Fine-Tuning") < texts["hgpo"].index("### Hybrid Group Policy Optimization")
    assert "margin: 0.25" in texts["hgpo"]
    assert "## Evaluation" not in texts["hgpo"]
    assert not any(str(whole_run) in text for text in texts.values())

    shutil.copytree(whole_run / "hgpo", tmp_path / "hgpo")
    card.main(["--model", str(tmp_path / "hgpo"), "--report", str(whole_run / "report")])
    text = (tmp_path / "hgpo" / "README.md").read_text(encoding="utf-8")
    assert "| Hybrid accuracy |" in text
    assert "(figures/accuracy_vs_tokens.png)" in text
    assert str(whole_run) not in text


def test_evaluation_leaves_figures_and_samples(whole_run: Path) -> None:
    report = json.loads((whole_run / "eval-hgpo" / "report.json").read_text(encoding="utf-8"))
    assert (report["num_prompts"], report["samples_per_mode"]) == (6, 2)
    assert report["dataset"].endswith("eval.parquet")
    assert 0 <= report["hybrid_accuracy"] <= 1
    samples = pd.read_parquet(whole_run / "eval-hgpo" / "samples.parquet")
    assert len(samples) == 6 * 2 * 2
    assert set(samples["mode"]) == {"think", "no_think"}
    assert samples["num_tokens"].max() <= 12


def test_report_names_every_evaluation(whole_run: Path) -> None:
    text = (whole_run / "report" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Miniature")
    assert "`hft`" in text
    assert "`hgpo`" in text
    assert len(list((whole_run / "report").glob("*.png"))) >= 3


def test_training_is_logged_to_wandb(whole_run: Path) -> None:
    records, _ = wandb_run(whole_run, job_type="")
    runs = [record.run for record in records if record.HasField("run")]
    assert (runs[-1].display_name, runs[-1].project) == ("mini", "huggingface")
    updates = [run.config.update for run in runs] + [r.config.update for r in records if r.HasField("config")]
    config = values(itertools.chain(*updates))
    assert (config["margin"], config["num_generations"], config["estimator"]) == (0.25, 4, "grpo")
    assert config["hidden_size"] == 16

    history = [values(record.history.item) for record in records if record.HasField("history")]
    for mode in ("think", "no_think"):
        for name in ("reward", "length", "prob", "format_faults", "truncated"):
            series = [row[key] for row in history if (key := f"train/hgpo/{name}/{mode}") in row]
            assert len(series) == 2, key
            assert all(math.isfinite(value) for value in series), key
    steps = [row["train/global_step"] for row in history if "train/hgpo/off_mode_mass" in row]
    assert steps == [1, 2]
    assert sum("eval/hgpo/hybrid_accuracy" in row for row in history) == 2
    assert any("completions" in key for row in history for key in row)


def test_report_is_logged_to_wandb(whole_run: Path) -> None:
    records, run_files = wandb_run(whole_run, job_type="report")
    report_run = next(record.run for record in records if record.HasField("run"))
    assert (report_run.display_name, report_run.project) == ("Miniature", "huggingface")
    history = values(item for record in records for item in record.history.item)
    pictures = {f"report/{path.stem}" for path in (whole_run / "report").glob("*.png")}
    kinds = dict.fromkeys(pictures, "image-file") | {"report/html": "html-file", "report/hgpo/by_level": "table-file"}
    assert len(pictures) == 4
    for name, kind in kinds.items():
        assert history[f"{name}/_type"] == kind
        assert (run_files / history[f"{name}/path"]).stat().st_size == history[f"{name}/size"] > 0

    summary: dict[str, Any] = values(item for record in records for item in record.summary.update)
    for stage in ("hft", "hgpo"):
        report = json.loads((whole_run / f"eval-{stage}" / "report.json").read_text(encoding="utf-8"))
        logged = summary[f"report/{stage}"]
        assert logged["hybrid_accuracy"] == report["hybrid_accuracy"]
        assert logged["accuracy"] == report["accuracy"]


@pytest.mark.parametrize(("stage", "last"), [("hft", 3), ("hgpo", 2)])
def test_training_resumes_to_the_same_model(
    stage: str, last: int, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the run had died while it wrote its last checkpoint."""
    finished = whole_run / stage
    config = (hft_config if stage == "hft" else hgpo_config)(whole_run) | {"output_dir": str(tmp_path / stage)}
    shutil.copytree(finished, tmp_path / stage)
    (tmp_path / stage / "model.safetensors").unlink()
    (tmp_path / stage / f"checkpoint-{last}" / "trainer_state.json").unlink()
    run(stage, config)
    assert f"Resuming from {tmp_path / stage / f'checkpoint-{last - 1}'}" in capsys.readouterr().out
    assert (tmp_path / stage / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.processes
def test_accelerate_launch(whole_run: Path, tmp_path: Path) -> None:
    config = hgpo_config(whole_run) | {"output_dir": str(tmp_path / "hgpo"), "eval_strategy": "no"}
    recipe = tmp_path / "hgpo.yaml"
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml")]
    script = ["-m", "hgpo_trl.scripts.hgpo", "--config", str(recipe), "--max_steps", "1"]
    done = subprocess.run([sys.executable, *launch, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'hgpo'}" in done.stdout
    assert (tmp_path / "hgpo" / "model.safetensors").is_file()


# --- bad input, before a model is loaded ----------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)


@pytest.fixture
def config(whole_run: Path, tmp_path: Path) -> Config:
    return hgpo_config(whole_run) | {"output_dir": str(tmp_path / "out")}


@pytest.mark.parametrize("stage", ["hft", "hgpo", "evaluate"])
@pytest.mark.usefixtures("no_model")
def test_good_input_would_load_a_model(stage: str, whole_run: Path, tmp_path: Path) -> None:
    """What the tests below rely on."""
    configs = {
        "hft": hft_config(whole_run),
        "hgpo": hgpo_config(whole_run),
        "evaluate": {"model": f"{whole_run}/hft", "data": f"{whole_run}/data/eval.parquet"},
    }
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(stage, configs[stage] | {"output_dir": str(tmp_path / "out")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_generations": 5}, "num_generations must be even and at least 4"),
        ({"num_generations": 2}, "num_generations must be even and at least 4"),
        ({"estimator": "ppo"}, "estimator must be one of grpo, rloo"),
        ({"per_device_eval_batch_size": 6}, "must be divisible by the number of generations used for evaluation"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' has no effect under HGPO"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("no_model")
def test_bad_argument(change: Config, words: str, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("hgpo", config | change)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path(config["output_dir"]).exists()


CONVERSATION = [{"role": "user", "content": "a = 1 sum mod 10 ?"}]
EMPTY_PROMPT = r": 1 of 2 rows are faulty\.\n  empty_prompt: 1 row.*The first is row 1.*drop_faulty_rows"


@pytest.mark.parametrize("field", ["train_data", "eval_data"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"question": ["a"], "answer": ["1"]}, r"has no column `prompt`; its columns are \['answer', 'question'\]"),
        ({"prompt": [], "answer": []}, r"=.*has no rows\. Give it at least one"),
        (
            {"prompt": ["a", " "], "answer": ["1", "2"]},
            EMPTY_PROMPT,
        ),
        (
            {"prompt": [CONVERSATION, []], "answer": ["1", "2"]},
            EMPTY_PROMPT,
        ),
        ({"prompt": [CONVERSATION], "response": ["1"]}, r"has a column `response`.*Rename or remove it"),
        (
            {"prompt": [CONVERSATION] * 3, "answer": ["1", None, " "]},
            ": 2 of 3 rows have no `answer`.* Name a reward_model",
        ),
        ({"prompt": [CONVERSATION] * 3}, ": 3 of 3 rows have no `answer`.* Name a reward_model"),
    ],
    ids=["no prompt", "empty", "blank prompt", "no messages", "response", "answers missing", "no answers"],
)
@pytest.mark.usefixtures("no_model")
def test_bad_data(field: str, rows: dict[str, list], words: str, config: Config, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    Dataset.from_dict(rows).to_parquet(path)
    with refused(rf"(?s)^{field}\S* ?{words}"):
        run("hgpo", config | {field: str(path)})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/nowhere/train.parquet", "there is no such file or folder"),
        ("data.xlsx", "file type '.xlsx' is not one of .parquet, .jsonl, .json, .csv"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_data_that_is_not_there(
    name: str, words: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.xlsx").touch()
    for stage, field in (("hgpo", "train_data"), ("hgpo", "eval_data")):
        with refused(rf"{field}='{name}': .*{words}"):
            run(stage, config | {field: name})


@pytest.mark.usefixtures("no_model")
def test_hft_data_without_a_completion(whole_run: Path, tmp_path: Path) -> None:
    config = hft_config(whole_run) | {"train_data": f"{whole_run}/data/eval.parquet", "output_dir": f"{tmp_path}/out"}
    with refused(r"train_data='.*' lacks the column completion; its columns are"):
        run("hft", config)


@pytest.mark.usefixtures("no_model")
def test_output_dir_of_another_run(whole_run: Path, config: Config) -> None:
    before = files(whole_run / "hgpo")
    with refused(r"holds another run's results\. Changed: margin: 0\.25 -> 0\.5"):
        run("hgpo", config | {"output_dir": str(whole_run / "hgpo"), "margin": 0.5})
    assert files(whole_run / "hgpo") == before


@pytest.mark.parametrize("stage", ["hft", "hgpo", "evaluate"])
@pytest.mark.parametrize("name", ["runs/chain-sum/not-trained-yet", None])
@pytest.mark.usefixtures("no_model")
def test_model_that_is_not_there(
    stage: str, name: str | None, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    field = "model" if stage == "evaluate" else "model_name_or_path"
    configs = {"hft": hft_config(whole_run), "hgpo": hgpo_config(whole_run)}
    config = configs.get(stage, {"data": f"{whole_run}/data/eval.parquet"}) | {"output_dir": f"{tmp_path}/out"}
    config.pop(field, None)
    if stage == "evaluate" and name is None:
        with pytest.raises(SystemExit):
            run(stage, config)
        assert "the following arguments are required: --model" in capsys.readouterr().err
        return
    words = f"{field}={name!r}: there is no such folder" if name else f"{field} is missing: name a model"
    with refused(words):
        run(stage, config | ({field: name} if name else {}))


@pytest.mark.parametrize("stage", ["hgpo", "evaluate"])
@pytest.mark.usefixtures("no_model")
def test_tokenizer_without_tags(stage: str, whole_run: Path, config: Config, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tokenizer = word_level()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model)
    shutil.copy(whole_run / "hft" / "config.json", model)
    changed = {"hgpo": config | {"model_name_or_path": str(model)}}
    changed["evaluate"] = {"model": str(model), "data": config["train_data"], "output_dir": config["output_dir"]}
    with refused(r"The tag <think> is not a token of the tokenizer.*add_mode_tokens"):
        run(stage, changed[stage])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hgpo_trl.rewards.nothing", "hgpo_trl.rewards has no function 'nothing'"),
        ("nowhere.py:reward", "There is no file nowhere.py"),
        ("reward", "neither a function"),
    ],
)
@pytest.mark.parametrize("stage", ["hgpo", "evaluate"])
@pytest.mark.usefixtures("no_model")
def test_bad_reward_function(stage: str, name: str, words: str, config: Config) -> None:
    configs = {"hgpo": config, "evaluate": {"model": "m", "data": "d", "output_dir": config["output_dir"]}}
    with refused(words):
        run(stage, configs[stage] | {"reward_funcs": [name]})


@pytest.mark.usefixtures("no_model")
def test_evaluation_refuses_a_reward_model(config: Config) -> None:
    arguments = {"model": "m", "data": "d", "output_dir": config["output_dir"], "reward_funcs": ["org/reward-model"]}
    with refused("'org/reward-model' is a reward model; evaluation takes functions only"):
        run("evaluate", arguments)


def test_report_of_an_evaluation_that_is_not_there(tmp_path: Path) -> None:
    arguments = {"evaluations": [f"a={tmp_path}/nowhere"], "output_dir": str(tmp_path / "report")}
    with refused(r"evaluations: there is no .*report\.json\. Run `hgpo-trl evaluate"):
        run("report", arguments)


def test_parameter_types(whole_run: Path) -> None:
    """A miniature run trains in float32 throughout."""
    model = AutoModelForCausalLM.from_pretrained(whole_run / "hgpo")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


TASKS = [path for path in sorted(ROOT.glob("examples/*.py")) if "LEVELS =" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_example_tasks_build(path: Path, tmp_path: Path) -> None:
    """Each task in examples/ is whole: data sets, tokenizer and model follow from it."""
    sizes = ["--num_hft", "70", "--num_hgpo", "35", "--num_eval", "35", "--hidden_size", "16"]
    data.main(["--tasks", str(path), "--output_dir", str(tmp_path), *sizes])
    assert {"hft.parquet", "hgpo.parquet", "eval.parquet", "base"} <= {entry.name for entry in tmp_path.iterdir()}
