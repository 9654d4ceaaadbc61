"""Recipes: every one in the repository loads through its stage and trains; a wrong one is explained in one message."""

import copy
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import settings
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_zoo import save_thinker
from transformers import Trainer

from hgpo_trl.cli import STAGES
from hgpo_trl.common.environment import set_env
from hgpo_trl.modes import PRESETS, split_response
from hgpo_trl.scripts import data, data_hgpo
from hgpo_trl.scripts.recipe import RecipeParser, _Loader, _of_type
from hgpo_trl.tasks.embedded import draw, hft_dataset, load_task

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import rule_run

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate")
TRAINING = [path for path in RECIPES if path.stem.startswith(("hft", "hgpo"))]
THINKERS = [path.parent for path in ROOT.glob("recipes/*/hgpo.yaml") if "mode_format" in path.read_text("utf-8")]
ACCELERATE = sorted(ROOT.glob("recipes/accelerate/*.yaml"))
BASE = {"model_name_or_path": "m", "train_data": "d.parquet", "output_dir": "out", "bf16": False}

Parse = Callable[..., tuple[Any, ...]]


class Parsed(Exception):  # noqa: N818 (no error: it ends a stage's main once its arguments are parsed)
    """Carries what a stage has parsed."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Run a stage's own main up to the point where its recipe is parsed."""
    parse_recipe = RecipeParser.parse_recipe

    def stop(self: RecipeParser, args: list[str]) -> None:
        raise Parsed(parse_recipe(self, args))

    monkeypatch.setattr(RecipeParser, "parse_recipe", stop)

    def run(stage: str, *argv: str) -> tuple[Any, ...]:
        with pytest.raises(Parsed) as caught:
            importlib.import_module(f"hgpo_trl.scripts.{stage}").main(argv)
        return caught.value.args[0]

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    """Write a recipe: keyword arguments as YAML, or text as it is."""

    def write(text: str | None = None, **fields: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields) if text is None else text, encoding="utf-8")
        return str(path)

    return write


def hgpo(recipe: Callable[..., str], text: str = "") -> str:
    """An HGPO recipe: what it needs, and further lines of YAML."""
    return recipe(yaml.safe_dump(BASE) + text)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a stage says of bad arguments; it has to leave with status 2 and a single message."""

    def run(stage: str, *argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(f"hgpo_trl.scripts.{stage}").main(argv)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith(f"hgpo-trl {stage}: error: ")
        return error

    return run


# --- the repository's own recipes -----------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def stage_of(path: Path) -> str:
    """The part of a recipe's name before the first underscore: hgpo_server.yaml is one for hgpo."""
    stage = path.stem.partition("_")[0]
    assert stage in STAGES, f"{path.name} is named after none of the stages {', '.join(STAGES)}"
    return stage


def command_of(path: Path) -> tuple[str, ...]:
    """`hgpo-trl data` tells the kind by the recipe's name; baselines_rft.yaml is one for `hgpo-trl baselines rft`."""
    stage, kind = stage_of(path), path.stem.partition("_")[2]
    return (stage, kind) if stage == "baselines" else (stage,)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def set_its_env(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the entry point does, which comes before the libraries that these tests have imported."""
    for name, value in read(path).get("env", {}).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads_through_its_stage(path: Path, parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(path)
    set_its_env(path, monkeypatch)
    on_cpu = ["--use_cpu", "true"] if stage in ("hft", "hgpo", "baselines") else []  # else bf16 asks for a GPU
    parsed = parse(*command_of(path), "--config", str(path), *on_cpu)
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for key, value in read(path).items():
        if isinstance(value, (int, float)) and key in values:
            assert values[key] == value
            assert type(values[key]) in (type(value), float)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runs/x/data.yaml", "task"), ("x/data", "task"), ("mine.yaml", "task"), ("hft.yaml", "task"),
        ("x/data_hft", "hft"), ("a/b/data_hgpo.yaml", "hgpo"), ("data_eval.yaml", "hgpo"),
        ("recipes/data/data_classifier.yaml", "classifier"), ("data_hgpo_hard.yaml", "task"), ("eval.yaml", "task"),
    ],
)  # fmt: skip
def test_the_kind_of_data_of_a_recipes_name(name: str, kind: str) -> None:
    assert data.kind_of(name) == kind


def test_data_runs_the_kind_that_its_recipes_name_tells(tmp_path: Path, parse: Parse) -> None:
    recipe = tmp_path / "data_eval.yaml"
    recipe.write_text(
        "output_dir: out\nsources: [{path: x.jsonl, fields: {prompt: q}}]\nmax_rows: 7\n", encoding="utf-8"
    )
    for argv in (["--config", str(recipe)], [f"--config={recipe}"], ["hgpo", "--config", str(recipe)]):
        (args,) = parse("data", *argv)
        assert isinstance(args, data_hgpo.HGPODataArguments)
        assert args.max_rows == 7


def plan(makefile: str, *variables: str) -> list[list[str]]:
    """The words of every command of a make file of benchmarks/, in order."""
    listing = subprocess.run(
        ["make", "-n", "-f", f"benchmarks/{makefile}", "BIN=bin", "R=nowhere", *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [shlex.split(line) for line in re.findall(r"bin/((?:hgpo-trl|python) .*?) >>? ", listing)]


def check_stages(commands: list[list[str]], parse: Parse) -> None:
    """Every command parses, and reads only what an earlier one writes."""
    written: list[str] = []
    for command in commands:
        if command[0] == "python":
            run = rule_run.read_arguments(command[2:])
            reads = [run.runs / "data", run.runs / "hft", *([run.runs / "samples"] if run.rule == "adaptthink" else [])]
            fields = [("output_dir", run.output_dir), *((path.name, path) for path in reads)]
        else:
            _, stage, *argv = command
            kind = [argv.pop(0)] if stage == "baselines" else []
            on_cpu = ["--use_cpu", "true"] if stage in ("hft", "hgpo", "baselines") else []
            config = [str(ROOT / word) if word.startswith("recipes/") else word for word in argv]
            fields = [pair for part in parse(stage, *kind, *config, *on_cpu) for pair in vars(part).items()]
        for key, value in fields:
            if str(value).startswith("nowhere/"):
                if key == "output_dir":
                    assert str(value) not in written
                    written.append(str(value))
                elif key != "logging_dir":
                    assert any(str(value).startswith(folder) for folder in written), f"{command}: {key}={value}"


@pytest.mark.processes
def test_make_reproduce_runs_what_there_is(parse: Parse) -> None:
    commands = plan("reproduce.mk", "SEEDS=3")
    assert len(commands) == 48  # data, HFT, samples, baselines, HGPO, evaluations
    check_stages(commands, parse)


@pytest.mark.processes
def test_the_formats_run_what_there_is(parse: Parse) -> None:
    commands = plan("formats.mk", "HGPO_TRL=bin/hgpo-trl", "FORMATS=qwen3 r1", "SEEDS=3 4")
    assert len(commands) == 16  # data, HFT, HGPO, evaluation
    check_stages(commands, parse)


@pytest.mark.processes
def test_make_compare_rules_has_all_runs(parse: Parse) -> None:
    """The same search for every rule, before the rule's runs on every seed, which all have the same tokens."""
    commands = plan("compare_rules.mk", "SEEDS=4 5", "SEARCH_SEED=7", "LEARNING_RATES=1e-3 5e-4")
    check_stages(commands, parse)
    runs = [rule_run.read_arguments(command[2:]) for command in commands if command[0] == "python"]
    for rule in rule_run.RULES:
        search = [run for run in runs if run.rule == rule and run.best_of is None]
        assert sorted((run.learning_rate, run.weight) for run in search) == [
            (rate, weight) for rate in (5e-4, 1e-3) for weight in ("high", "low")
        ]
        assert {(run.seed, run.runs.name) for run in search} == {(7, "7")}
        final = [run for run in runs if run.rule == rule and run.best_of is not None]
        assert [(run.seed, run.runs.name) for run in final] == [(4, "4"), (5, "5")]
        assert {run.output_dir.parent for run in search} == {run.best_of for run in final}
        places = [runs.index(run) for run in (*search, *final)]
        assert places == sorted(places)
        evaluated = [command for command in commands if f"nowhere/4/{rule}" in command]
        assert len(evaluated) == 2  # the training writes it, the evaluation reads it
    assert len(runs) == len(rule_run.RULES) * (4 + 2)
    for tokens in ({run.tokens for run in runs if run.best_of is None}, {run.tokens for run in runs if run.best_of}):
        assert len(tokens) == 1


def test_every_folder_of_recipes_is_tested() -> None:
    assert {path.parent.name for path in RECIPES} >= {"chain-sum", "qwen2.5-math-1.5b", "qwen2.5-math-7b"}
    assert {path.stem for path in ACCELERATE} >= {"cpu", "gpu", "cpu_ddp", "ddp", "zero2", "zero3", "fsdp2"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_config_loads(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes >= 1
    assert config.num_machines == 1
    assert config.mixed_precision == "no", "the recipe's bf16 decides"
    options = launch_command_parser()
    known = {option.removeprefix("--") for action in options._actions for option in action.option_strings}
    assert known >= config.deepspeed_config.keys() | config.fsdp_config.keys(), "accelerate would ignore the others"
    if config.deepspeed_config.get("zero_stage") == 3:
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
    assert bool(config.deepspeed_config) == (config.distributed_type == "DEEPSPEED")
    assert bool(config.fsdp_config) == (config.distributed_type == "FSDP")


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_papers_settings(size: str) -> None:
    """Sections 2, 3 and 6; processes as in the recipes' launch lines."""
    folder = ROOT / "recipes" / f"qwen2.5-math-{size}"
    hft, hgpo, server, evaluate = (read(folder / f"{stem}.yaml") for stem in ("hft", "hgpo", "hgpo_server", "evaluate"))

    def rows(recipe: dict[str, Any], processes: int) -> int:
        return recipe["per_device_train_batch_size"] * processes * recipe["gradient_accumulation_steps"]

    assert hft["model_name_or_path"] == f"Qwen/Qwen2.5-Math-{size.upper()}"
    assert (hft["num_train_epochs"], hft["learning_rate"], hft["warmup_steps"]) == (3, 1e-4, 0.1)
    assert (hft["lr_scheduler_type"], hft["max_length"], rows(hft, 8)) == ("cosine", 32768, 128)
    for recipe, processes in ((hgpo, 8), (server, 4)):
        assert rows(recipe, processes) == 256 * recipe["num_generations"]
        assert (recipe["num_generations"], recipe["alpha"], recipe["margin"]) == (4, 1.0, 0.2)
        assert (recipe["beta"], recipe["epsilon"], recipe["learning_rate"]) == (0.001, 0.5, 1e-6)
        assert recipe["lr_scheduler_type"] == "constant"
        assert recipe["vllm_max_model_length"] == 2048 + recipe["max_completion_length"]
        assert recipe["vllm_max_model_length"] <= hft["model_init_kwargs"]["max_position_embeddings"]
    assert hgpo["reward_model"] == "allenai/Llama-3.1-Tulu-3-8B-RM"
    assert (evaluate["temperature"], evaluate["top_p"], evaluate["max_new_tokens"]) == (0.6, 0.95, 35000)
    assert evaluate["max_new_tokens"] + 2048 <= hft["model_init_kwargs"]["max_position_embeddings"]
    assert hgpo["model_name_or_path"] == hft["output_dir"]
    data_hft, data_hgpo = (read(folder / f"data_{stage}.yaml") for stage in ("hft", "hgpo"))
    assert hft["train_data"] == data_hft["output_dir"]
    assert hgpo["train_data"] == server["train_data"] == data_hgpo["output_dir"]
    assert data_hft["tokenizer"] == data_hgpo["tokenizer"] == hft["model_name_or_path"]
    assert data_hft["max_tokens"] == hft["max_length"]
    assert data_hgpo["max_tokens"] == hgpo["vllm_max_model_length"] - hgpo["max_completion_length"]
    traces_missing = 137_497 + 741  # AOPS and AIME come without
    caps = [source["rows"] for source in data_hft["sources"]]
    assert sum(sum(cap.values()) if isinstance(cap, dict) else cap for cap in caps) == 1_694_586 - traces_missing
    assert sum(source["rows"] for source in data_hgpo["sources"]) == 76_000
    assert len(data_hft["decontamination"]) == len(data_hgpo["decontamination"]) == 8
    assert evaluate["model"] == hgpo["output_dir"]

    differ = {key for key in hgpo.keys() | server.keys() if hgpo.get(key) != server.get(key)}
    assert {key for key in differ if not key.startswith("vllm_")} == {"gradient_accumulation_steps"}


@pytest.mark.parametrize(
    "recipe", sorted(ROOT.glob("recipes/*/hgpo*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_stage_two_trains_on_the_data_of_its_folder(recipe: Path) -> None:
    """What the rule alone scores has reference answers."""
    hgpo = read(recipe)
    if (recipe.parent / "data.yaml").is_file():  # of an embedded task: all stages at once
        assert hgpo["train_data"] == f"{read(recipe.parent / 'data.yaml')['output_dir']}/hgpo.parquet"
        return
    builder = read(recipe.parent / "data_hgpo.yaml")
    assert hgpo["train_data"] == builder["output_dir"]
    if "reward_model" not in hgpo:
        for source in builder["sources"]:
            assert "preference" not in source["path"], "pairs of responses have no reference answer"
    assert builder["max_tokens"] <= hgpo["vllm_max_model_length"] - hgpo["max_completion_length"]


SMALL = {  # a real run on a CPU: lengths, batch and whatever needs a GPU; everything else is the recipe's
    "max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "logging_steps": 1,
    "use_cpu": True, "bf16": False, "attn_implementation": "sdpa", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
SMALL_STAGE = {
    "hft": {"max_length": 64, "dataset_num_proc": 1},
    "hgpo": {"max_completion_length": 6, "use_vllm": False},
}


@pytest.fixture(scope="session")
def examples(prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data of both training stages; half of the rows of `mixed` have no answer."""
    folder = tmp_path_factory.mktemp("examples")
    queries = draw(load_task("hgpo_trl.tasks.chain_sum"), 32, held_out=False, fraction=0.2, seed=0)
    hft_dataset(queries, 0.6, 0).to_parquet(folder / "hft.parquet")
    prompts.to_parquet(folder / "hgpo.parquet")
    answers = [None if row % 2 else answer for row, answer in enumerate(prompts["answer"])]
    prompts.remove_columns("answer").add_column("answer", answers).to_parquet(folder / "mixed.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("hft", "hgpo", "mixed")}


def learning_rates(trainer: Trainer, steps: int) -> list[float]:
    """The learning rate of every step of a run of that many, and one beyond."""
    trainer.create_optimizer_and_scheduler(steps)
    (factor,) = set(trainer.lr_scheduler.lr_lambdas)
    rates = [trainer.args.learning_rate * factor(step) for step in range(steps + 1)]
    trainer.optimizer = trainer.lr_scheduler = None
    return rates


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_recipe_trains(
    path: Path,
    model_dir: str,
    thinkers: dict[str, str],
    reward_model_dir: str,
    examples: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stage's own main with the recipe, scaled down: one step, and the settings in force are the recipe's."""
    recipe, stage = read(path), stage_of(path)
    set_its_env(path, monkeypatch)
    module = importlib.import_module(f"hgpo_trl.scripts.{stage}")
    train_and_save, found = module.train_and_save, {}

    def look_and_train(trainer: Trainer, checkpoint: str | None) -> None:
        found["trainer"], found["rates"] = trainer, learning_rates(trainer, 20)
        found["args"] = copy.copy(trainer.args)  # as the recipe gives them: SealCheckpoints takes one field over
        train_and_save(trainer, checkpoint)

    monkeypatch.setattr(module, "train_and_save", look_and_train)
    model = thinkers[recipe["mode_format"]] if "mode_format" in recipe else model_dir
    paths = {"model_name_or_path": model, "train_data": examples[stage], "output_dir": str(tmp_path / "run")}
    if "num_generations" in recipe:  # a step of whole groups
        paths["per_device_train_batch_size"] = math.lcm(SMALL["per_device_train_batch_size"], recipe["num_generations"])
    if "reward_model" in recipe:
        paths |= {"reward_model": reward_model_dir, "train_data": examples["mixed"]}
    overrides = {**SMALL, **SMALL_STAGE[stage], **paths}
    argv = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    module.main(["--config", str(path), *argv])

    trainer, args = found["trainer"], found["args"]
    for key, value in recipe.items():
        if key in vars(args).keys() - overrides.keys() - {"report_to", "model_init_kwargs"}:
            assert getattr(args, key) == (float(value) if isinstance(getattr(args, key), float) else value), key
    assert args.report_to == []

    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    group = trainer.optimizer.param_groups[0]
    assert group["weight_decay"] == recipe.get("weight_decay", 0.0)
    assert group["betas"] == (0.9, recipe.get("adam_beta2", 0.999))
    rates, peak = found["rates"], recipe["learning_rate"]
    if recipe["lr_scheduler_type"] == "constant":
        assert rates == [peak] * 21
    elif recipe["lr_scheduler_type"] == "cosine":
        steps = round(20 * recipe["warmup_steps"])
        assert rates[: steps + 1] == [peak * step / steps for step in range(steps + 1)], "linear"
        falling = rates[steps:]
        assert [a + b for a, b in zip(falling, reversed(falling), strict=True)] == pytest.approx([peak] * len(falling))
        assert falling == sorted(falling, reverse=True)
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    assert trainer.model.is_gradient_checkpointing == recipe["gradient_checkpointing"]

    if stage == "hgpo":
        assert (trainer.loss_type, trainer.beta) == ("dr_grpo", recipe["beta"])
        assert (trainer.epsilon_low, trainer.epsilon_high) == (recipe.get("epsilon", 0.5),) * 2
        assert (trainer.ref_model is None) == (recipe["beta"] == 0)
        assert (args.alpha, args.margin, trainer.num_generations) == tuple(
            recipe[key] for key in ("alpha", "margin", "num_generations")
        )
        scorers = ["accuracy_reward", "reward_model"] if "reward_model" in recipe else ["accuracy_reward"]
        assert [function.__name__ for function in trainer.reward_funcs] == scorers
        assert all(f"rewards/{name}/mean" in trainer.state.log_history[0] for name in scorers)
    else:
        assert trainer.completion_only_loss
        assert trainer.padding_free == recipe.get("packing", False)

    log = trainer.state.log_history[0]
    assert trainer.state.global_step == 1
    assert log["loss"] == log["loss"], "not NaN"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for key, value in recipe.get("model_init_kwargs", {}).items():
        assert config[key] == value, "saved with the model, for Stage II, evaluation and vLLM"


@pytest.fixture(scope="session")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained model of the architecture and with a tokenizer of the kind of each recipe of a model that thinks."""
    folders = {read(folder / "hgpo.yaml")["mode_format"]: tmp_path_factory.mktemp("thinker") for folder in THINKERS}
    for mode_format, folder in folders.items():
        save_thinker(mode_format, str(folder))
    return {mode_format: str(folder) for mode_format, folder in folders.items()}


@pytest.mark.parametrize("folder", THINKERS, ids=lambda folder: folder.name)
def test_recipes_of_a_model_that_thinks(
    folder: Path, thinkers: dict[str, str], prompts: Dataset, tmp_path: Path
) -> None:
    """From the model as it is to the evaluation of the trained one, with the batch and the precision of the recipe."""
    mode_format = PRESETS[read(folder / "hgpo.yaml")["mode_format"]]

    def run(stage: str, fields: dict[str, Any]) -> None:
        config = ["--config", str(folder / f"{stage}.yaml")]
        importlib.import_module(f"hgpo_trl.scripts.{stage}").main([*config, *settings.argv(fields)])

    concatenate_datasets([prompts] * 2).to_parquet(tmp_path / "train.parquet")
    training = {
        "model_name_or_path": thinkers[mode_format.name], "train_data": tmp_path / "train.parquet",
        "output_dir": tmp_path / "hgpo", "use_cpu": True, "use_vllm": False, "max_steps": 1, "max_completion_length": 9,
    }  # fmt: skip
    run("hgpo", training)
    log = json.loads((tmp_path / "hgpo" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert 0 <= log[0]["hgpo/off_mode_mass"] <= 1

    problems = [
        {"problem": prompt[0]["content"], "answer": answer}
        for prompt, answer in zip(prompts["prompt"][:4], prompts["answer"][:4], strict=True)
    ]
    (tmp_path / "math500.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in problems), encoding="utf-8")
    own = {"model": tmp_path / "hgpo", "output_dir": tmp_path / "eval", "data_dir": tmp_path, "max_new_tokens": 9}
    run("evaluate", own)
    report = json.loads((tmp_path / "eval" / "report.json").read_text(encoding="utf-8"))
    assert report["mode_format"] == mode_format.name
    samples = pd.read_parquet(tmp_path / "eval" / "samples.parquet")
    assert len(samples) == 2 * 4 * read(folder / "evaluate.yaml")["samples_per_mode"]
    for text, mode in zip(samples["completion"], samples["mode"], strict=True):
        assert split_response(text, mode_format).mode == mode


@pytest.mark.parametrize("folder", THINKERS, ids=lambda folder: folder.name)
def test_the_batch_that_a_recipe_states(folder: Path) -> None:
    recipe, text = read(folder / "hgpo.yaml"), (folder / "hgpo.yaml").read_text(encoding="utf-8")
    launch = re.search(r"--config_file (\S+)", text)
    sides = r"(\d+) rows (?:per process x (\d+) processes )?x (\d+) micro-batches = (\d+) rows = (\d+) prompts x (\d+) "
    stated = re.search(f"Batch: {sides}responses a step", text)
    assert launch
    assert stated
    rows, processes, micro_batches, batch, queries, group = (int(number or 1) for number in stated.groups())
    assert processes == read(ROOT / launch[1])["num_processes"]
    assert rows == recipe["per_device_train_batch_size"]
    assert micro_batches == recipe["gradient_accumulation_steps"]
    assert group == recipe["num_generations"]
    assert batch == rows * processes * micro_batches == queries * group
    assert recipe["vllm_max_model_length"] == 2048 + recipe["max_completion_length"]
    assert read(folder / "evaluate.yaml")["model"] == recipe["output_dir"]
    assert read(folder / "evaluate.yaml")["mode_format"] == recipe["mode_format"]
    assert read(folder / "evaluate.yaml")["margin"] == recipe["margin"]


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001", "+1E-4"])
def test_learning_rate_reaches_the_dataclass_as_a_float(text: str, recipe: Callable, parse: Parse) -> None:
    """PyYAML alone reads 1e-4 as text."""
    _, training_args, *_ = parse("hgpo", "--config", hgpo(recipe, f"learning_rate: {text}\n"))
    assert type(training_args.learning_rate) is float
    assert training_args.learning_rate == 1e-4


def test_numbers_inside_lists_and_mappings_are_numbers(recipe: Callable, parse: Parse) -> None:
    text = "reward_weights: [1e-1, 2]\nlr_scheduler_kwargs: {min_lr: 1e-7, power: 2}\n"
    _, training_args, *_ = parse("hgpo", "--config", hgpo(recipe, text))
    assert training_args.reward_weights == [0.1, 2.0]
    assert all(type(weight) is float for weight in training_args.reward_weights)
    assert training_args.lr_scheduler_kwargs == {"min_lr": 1e-7, "power": 2}


def test_values_take_the_type_of_their_field(recipe: Callable, parse: Parse) -> None:
    text = "num_generations: 8.0\nmax_steps: '12'\ngradient_checkpointing: 'false'\nnum_generations_eval: null\n"
    _, training_args, *_ = parse("hgpo", "--config", hgpo(recipe, text))
    assert (training_args.num_generations, type(training_args.num_generations)) == (8, int)
    assert (training_args.max_steps, type(training_args.max_steps)) == (12, int)
    assert training_args.gradient_checkpointing is False
    assert training_args.num_generations_eval is None


def test_names_that_look_like_numbers_stay_names(recipe: Callable, parse: Parse) -> None:
    (args,) = parse("data", "--config", recipe("output_dir: run-1e-4\ntasks: [1e4x]\n"))
    assert (args.output_dir, args.tasks) == ("run-1e-4", ["1e4x"])


def test_mapping_field_from_yaml_and_from_the_command_line(recipe: Callable, parse: Parse) -> None:
    path = hgpo(recipe, "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 3}\n")
    assert parse("hgpo", "--config", path)[1].lr_scheduler_kwargs == {"num_decay_steps": 3}
    for text in ('{"num_decay_steps": 5, "min_lr_ratio": 0.1}', "{num_decay_steps: 5, min_lr_ratio: 1e-1}"):
        changed = parse("hgpo", "--config", path, "--lr_scheduler_kwargs", text)[1].lr_scheduler_kwargs
        assert changed == {"num_decay_steps": 5, "min_lr_ratio": 0.1}


MAPPINGS = ["lr_scheduler_kwargs", "model_init_kwargs", "generation_kwargs", "mode_rule_kwargs", "mode_format"]


@pytest.mark.parametrize("field", MAPPINGS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: 1", r"'\{a: 1' is not a mapping; write it as in a recipe: '\{key: value\}'"),
        ('{"a": 1, "a": 2}', "is not a mapping"),
        ("{a:1}", "write a space behind the colon of 'a:1'"),
    ],
)
def test_mapping_on_the_command_line_with_a_fault(
    field: str, text: str, words: str, recipe: Callable, refused: Callable[..., str]
) -> None:
    message = refused("hgpo", "--config", hgpo(recipe), f"--{field}", text)
    assert f"--{field}" in message
    assert re.search(words, message)


def test_command_line_overrides_the_recipe(recipe: Callable, parse: Parse) -> None:
    path = hgpo(recipe, "margin: 0.4\nalpha: 2\nseed: 3\nreward_funcs: [a.b]\n")
    argv = ("--margin", "-0.1", "--config", path, "--seed=7", "--reward_funcs", "c.d", "e.f")
    _, training_args, model_args, reward_args = parse("hgpo", *argv)
    assert (training_args.margin, training_args.alpha, training_args.seed) == (-0.1, 2.0, 7)
    assert reward_args.reward_funcs == ["c.d", "e.f"]
    assert model_args.model_name_or_path == "m"


def test_config_with_an_equals_sign(recipe: Callable, parse: Parse) -> None:
    assert parse("hgpo", f"--config={hgpo(recipe, 'margin: 0.3')}")[1].margin == 0.3


def test_no_recipe_at_all(parse: Parse) -> None:
    assert parse("data", "--output_dir", "out", "--seed", "5")[0].seed == 5


# --- a person's values --------------------------------------------------------------------------------------------


def number_of(text: str, field: str = "learning_rate") -> Any:
    """What a number in a recipe becomes."""
    return _of_type(yaml.load(text, _Loader), {"learning_rate": float, "seed": int}[field])


@given(st.integers(min_value=0, max_value=10**18), st.integers(0, 3), st.sampled_from(["", "+", "-"]))
def test_whole_numbers_in_every_way_of_writing_them(number: int, zeros: int, sign: str) -> None:
    """Zeros in front are no octal, and underscores part thousands, as in Python."""
    for text in (f"{'0' * zeros}{number}", f"{number:_}", f"'{number}'", hex(number), oct(number), bin(number)):
        if text.startswith("'") and sign:
            continue
        assert number_of(f"{sign}{text}", "seed") == (-number if sign == "-" else number)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_fractions_in_every_way_of_writing_them(number: float) -> None:
    for text in (repr(number), f"{number:e}", f"{number:E}", f"'{number}'", repr(number).removeprefix("0")):
        assert number_of(text) == float(text.strip("'"))


@pytest.mark.parametrize(
    ("text", "value"), [(".inf", float("inf")), ("-.INF", float("-inf")), (".5", 0.5), ("1.", 1.0)]
)
def test_unusual_numbers(text: str, value: float) -> None:
    assert number_of(text) == value
    assert number_of(".NaN") != number_of(".nan")


@given(st.text(alphabet="0123456789eE_:.,%+- ", max_size=8).map(str.strip), st.sampled_from(["learning_rate", "seed"]))
def test_what_is_no_number_for_python_is_none_in_a_recipe(text: str, field: str) -> None:
    """5e_6 is not 5,000,000, 1:30 is not 90."""
    quoted = json.dumps(text)
    try:
        expected = float(text)
    except ValueError:
        with pytest.raises(ValueError):
            number_of(quoted, field)
    else:
        try:
            assert number_of(quoted, field) == expected
        except ValueError:  # a fraction where a whole number belongs
            assert field == "seed"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("learning_rate: 5e_6", "is 5e-6 meant?"),
        ("learning_rate: 10%", "write 10% as 0.1"),
        ("learning_rate: 1:30", "unable to parse string as a number"),
        ("max_steps: 1,000", "write 1,000 as 1_000"),
        ("max_steps: 1__000", "unable to parse"),
        ("train_data: ~", "YAML reads ~ and nothing at all as null"),
        ("train_data:", "YAML reads ~ and nothing at all as null"),
        ("run_name: 2e3", "text needs quotes"),
        ("lora_target_modules: q_proj,v_proj", "several values are written [q_proj, v_proj]"),
        ("reward_funcs: a.b, c.d", "several values are written [a.b, c.d]"),
    ],
)
def test_a_value_that_may_mean_several_things_is_refused(
    text: str, hint: str, recipe: Callable, refused: Callable[..., str]
) -> None:
    key = text.partition(":")[0]
    path = recipe(yaml.safe_dump({name: value for name, value in BASE.items() if name != key}) + f"{text}\n")
    error = refused("hgpo", "--config", path)
    assert f"{key}=" in error
    assert hint in error


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("max_steps: 010", "max_steps", 10),
        ("save_strategy: no", "save_strategy", "no"),
        ("gradient_checkpointing: no", "gradient_checkpointing", False),
        ("gradient_checkpointing: On", "gradient_checkpointing", True),
        ("trackio_static_space_id: no", "trackio_static_space_id", False),
        ("run_name: 2026-11-25", "run_name", "2026-11-25"),
        ("run_name: 1:30", "run_name", "1:30"),
        ("run_name: off", "run_name", "off"),
        ("run_name: None", "run_name", None),
        ("run_name: none", "run_name", None),
        ("run_name: 'null'", "run_name", None),
        ("report_to: none", "report_to", []),
        ("report_to: None", "report_to", []),
        ("report_to: null", "report_to", []),
        ("lr_scheduler_kwargs: None", "lr_scheduler_kwargs", None),
        ("lr_scheduler_kwargs: {a: None, b: yes, c: 'yes', d: 010}", "lr_scheduler_kwargs",
         {"a": None, "b": True, "c": "yes", "d": 10}),
        ("reward_weights: 2", "reward_weights", [2.0]),
        ("num_generations_eval: None", "num_generations_eval", None),
    ],
)  # fmt: skip
def test_a_value_is_what_a_person_means(text: str, field: str, value: Any, recipe: Callable, parse: Parse) -> None:
    parsed = parse("hgpo", "--config", hgpo(recipe, f"{text}\n"))
    found = next(getattr(part, field) for part in parsed if hasattr(part, field))
    assert (found, type(found)) == (value, type(value)) or found == value


@pytest.mark.parametrize("word", ["None", "none", "null"])
def test_null_on_the_command_line(word: str, recipe: Callable, parse: Parse) -> None:
    argv = ("--reward_model", word, "--lr_scheduler_kwargs", word, "--eval_prompts", word)
    script, training, _, rewards = parse("hgpo", "--config", hgpo(recipe, "reward_model: m\n"), *argv)
    assert (rewards.reward_model, training.lr_scheduler_kwargs, script.eval_prompts) == (None, None, None)
    (args,) = parse("data", "--output_dir", "o", "--hgpo_tasks", word)
    assert args.hgpo_tasks is None


def test_one_word_where_one_or_many_are_taken(recipe: Callable, parse: Parse) -> None:
    text = "lora_target_modules: all-linear\nreward_funcs: hgpo_trl.rewards.accuracy_reward\n"
    _, _, model_args, reward_args = parse("hgpo", "--config", hgpo(recipe, text))
    assert model_args.lora_target_modules == "all-linear"  # as TRL has it: of a list of one it takes the one
    assert reward_args.reward_funcs == ["hgpo_trl.rewards.accuracy_reward"]


def test_norwegian_is_a_language(recipe: Callable, parse: Parse) -> None:
    (args,) = parse("data", "hft", "--config", recipe("sources: {path: d.jsonl}\noutput_dir: o\nlanguages: [no, en]\n"))
    assert args.languages == ["no", "en"]
    assert args.sources == [{"path": "d.jsonl"}]


# --- paths and environment ------------------------------------------------------------------------------------


def test_home_and_variables_in_paths(
    recipe: Callable, parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever a path may stand: single fields, lists, mappings, NAME=PATH, recipe and command line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}', encoding="utf-8")
    text = "model_name_or_path: ~/m\noutput_dir: $SCRATCH/${HOME}\nreward_funcs: [~/r.py:f]\n"
    path = recipe(f"{text}train_data: d\nbf16: false\nmodel_init_kwargs: {{cache_dir: ~/c}}\n")
    parsed = parse("hgpo", f"--config={path.replace(str(tmp_path), '~')}", "--eval_data=~/e")
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert values["model_name_or_path"] == f"{tmp_path}/m"
    assert values["output_dir"] == f"/scratch/{tmp_path}"
    assert values["reward_funcs"] == [f"{tmp_path}/r.py:f"]
    assert values["model_init_kwargs"] == {"cache_dir": f"{tmp_path}/c"}
    assert values["eval_data"] == f"{tmp_path}/e"
    (args,) = parse(
        "data", "classifier", "--output", "o.safetensors", "--reasoning", "~/q.jsonl=text", "--other", "$SCRATCH/x=y"
    )
    assert (args.reasoning, args.other) == ([f"{tmp_path}/q.jsonl=text"], ["/scratch/x=y"])
    (args,) = parse("report", "--evaluations", "a=~/eval", "--output_dir", "~")
    assert (args.evaluations, args.output_dir) == ([f"a={tmp_path}/eval"], str(tmp_path))
    (args,) = parse("data", "hft", "--config", recipe("sources: [{path: ~/d.jsonl}]\noutput_dir: $SCRATCH\n"))
    assert (args.sources, args.output_dir) == ([{"path": f"{tmp_path}/d.jsonl"}], "/scratch")


def test_a_variable_that_is_not_set(recipe: Callable, refused: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    error = refused("data", "--config", recipe("output_dir: $NOWHERE/x\n"))
    assert "output_dir='$NOWHERE/x': the environment variable NOWHERE is not set" in error


@pytest.mark.parametrize("text", ["a ~ b", "$5 and $HOME/x", "~ 3", "cost: $HOME", "x^2$", "a/b$"])
def test_text_that_is_no_path_stays(text: str, recipe: Callable, parse: Parse) -> None:
    (args,) = parse("chat", "--config", recipe(model="m", system=text))
    assert args.system == text


def test_env_sets_environment_variables(recipe: Callable, parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written: no number, no boolean and no date is made of them."""
    values = {"ONE": "1", "RATE": "1e-4", "SWITCH": "yes", "OCTAL": "010", "FOLDER": "$HOME/x"}
    for name in values:
        monkeypatch.setenv(f"HGPO_TEST_{name}", "before")
    env = "".join(f"  HGPO_TEST_{name}: {value}\n" for name, value in values.items())
    parse("data", "--config", recipe(f"output_dir: out\nenv:\n{env}"))
    values["FOLDER"] = f"{os.environ['HOME']}/x"
    assert {name: os.environ[f"HGPO_TEST_{name}"] for name in values} == values


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("PYTHONHASHSEED: 1", "env: PYTHONHASHSEED is read before a recipe is"),
        ("LD_PRELOAD: x.so", "env: LD_PRELOAD is read before a recipe is"),
        ("HF_HOME: elsewhere", "env: HF_HOME is read when libraries are imported, and they are already"),
        ("OMP_NUM_THREADS: 77", "env: OMP_NUM_THREADS is read when libraries are imported"),
        ("HGPO_TEST_LIST: [1]", "env: HGPO_TEST_LIST=['1'] must be a single value"),
    ],
)
def test_variables_that_come_too_late_are_refused(
    env: str, words: str, recipe: Callable, refused: Callable[..., str]
) -> None:
    assert words in refused("data", "--config", recipe(f"output_dir: out\nenv: {{{env}}}\n"))


PROBE = """
import json, os, torch
from huggingface_hub import constants

threads, devices = torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]
print(json.dumps([constants.HF_HOME, constants.HF_HUB_OFFLINE, threads, devices]))
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]


@pytest.mark.processes
@pytest.mark.parametrize(
    "entry",
    [
        ["-m", "hgpo_trl.cli", "data"],
        ["-m", "hgpo_trl.scripts.data_task"],
        [*LAUNCH, "-m", "hgpo_trl.scripts.data_task"],
    ],
    ids=["hgpo-trl", "python -m", "accelerate launch"],
)
def test_libraries_see_the_recipes_environment(entry: list[str], recipe: Callable, tmp_path: Path) -> None:
    """Each entry in a process of its own; a user's task shows what the libraries have read."""
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    env = {"HF_HOME": "~/cache", "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "7"}
    path = recipe(output_dir=str(tmp_path / "out"), tasks=[str(tmp_path / "probe.py")], env=env)
    # vLLM, in a test before this one, may have asked for a preloaded libgomp, which reads its settings before Python.
    before = {name: value for name, value in os.environ.items() if name not in {*env, "LD_PRELOAD"}}
    done = subprocess.run(
        [sys.executable, *entry, "--config", path],
        cwd=ROOT, env=before | {"HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout) == [f"{tmp_path}/cache", True, 1, "7"]


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "key", "nearest"),
    [
        ("data", "num_hftt", "num_hft"),
        ("hft", "lerning_rate", "learning_rate"),
        ("hgpo", "num_generation", "num_generations"),
        ("hgpo", "margins", "margin"),
        ("hgpo", "torch_dtype", "dtype"),
        ("hgpo", "evaluation_strategy", "eval_strategy"),
        ("hgpo", "model", "model_name_or_path"),
        ("hft", "max_seq_length", "max_length"),
        ("evaluate", "sample_per_mode", "samples_per_mode"),
        ("report", "evaluation", "evaluations"),
    ],
)
def test_unknown_key_names_the_nearest(
    stage: str, key: str, nearest: str, recipe: Callable, refused: Callable[..., str]
) -> None:
    path = recipe(**{key: 1})
    assert f"{path}: unknown key {key!r}; did you mean {nearest!r}?" in refused(stage, "--config", path)
    required = {"evaluate": ("--model", "m", "--data", "d"), "report": ("--evaluations", "a=b")}
    needed = required.get(stage, ("--train_data", "d", "--model_name_or_path", "m", "--use_cpu", "true"))
    argv = () if stage == "data" else needed
    error = refused(stage, "--output_dir", "out", *argv, f"--{key}", "1")
    assert f"unknown argument '--{key}'; did you mean '--{nearest}'?" in error


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("num_generations: four", "num_generations"),
        ("num_generations: true", "num_generations"),
        ("num_generations: 4.5", "num_generations"),
        ("learning_rate: [1]", "learning_rate"),
        ("learning_rate: true", "learning_rate"),
        ("learning_rate: fast", "learning_rate"),
        ("max_steps: 1.5", "max_steps"),
        ("max_steps: true", "max_steps"),
        ("per_device_train_batch_size: {a: 1}", "per_device_train_batch_size"),
        ("reward_funcs: 5", "reward_funcs"),
        ("reward_weights: true", "reward_weights"),
        ("reward_weights: [much]", "reward_weights"),
        ("gradient_checkpointing: 2", "gradient_checkpointing"),
        ("estimator: 3", "estimator"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs"),
        ("output_dir: 7", "output_dir"),
    ],
)
def test_value_of_the_wrong_type(text: str, key: str, recipe: Callable, refused: Callable[..., str]) -> None:
    path = recipe(f"{text}\n")
    assert f"{path}: {key}=" in (error := refused("hgpo", "--config", path))
    assert "has the wrong type: " in error


@pytest.mark.parametrize("text", ["save_strategy: true", "run_name: 7", "output_dir: 1_000"])
def test_number_or_boolean_where_text_belongs_needs_quotes(
    text: str, recipe: Callable, refused: Callable[..., str]
) -> None:
    error = refused("hgpo", "--config", recipe(f"{text}\n"))
    assert "has the wrong type" in error
    assert "text needs quotes" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("margin: .nan", "margin must be a finite number; got nan"),
        ("alpha: .inf", "alpha must be a finite number; got inf"),
        ("num_generations: 5", "num_generations must be even and at least 4"),
        ("num_generations: 2", "num_generations must be even and at least 4"),
        ("estimator: ppo", "estimator must be one of grpo, rloo"),
        ("dtype: torch.bfloat16", "dtype must be one of auto, bfloat16, float16, float32; got 'torch.bfloat16'"),
        ("discount: 1.5", "discount must lie in (0, 1]"),
        ("per_device_train_batch_size: 6", "must be divisible by num_generations"),
    ],
)
def test_value_that_hgpo_refuses(text: str, words: str, recipe: Callable, refused: Callable[..., str]) -> None:
    assert words in refused("hgpo", "--config", hgpo(recipe, f"{text}\n"))


@pytest.mark.parametrize(
    ("stage", "argv", "words"),
    [
        ("data", ("--output_dir", "o", "--num_hft", "0"), "num_hft must be at least 1; got 0"),
        ("data", ("--output_dir", "o", "--think_share", "1"), "think_share must lie between 0 and 1; got 1.0"),
        ("data", ("--output_dir", "o", "--hidden_size", "30"), "hidden_size=30 must be divisible by num_heads=4"),
        ("evaluate", ("--reward_model_batch_size", "0"), "reward_model_batch_size must be at least 1; got 0"),
        ("evaluate", ("--reward_model_scale", "0"), "reward_model_scale must be a finite number above 0; got 0.0"),
        ("evaluate", ("--reward_model_center", "nan"), "reward_model_center must be a finite number; got nan"),
        ("evaluate", ("--samples_per_mode", "0"), "samples_per_mode must be at least 1; got 0"),
        ("evaluate", ("--max_new_tokens", "1"), "max_new_tokens must be at least 2"),
        ("evaluate", ("--max_new_tokens", "9", "--think_budget", "7"), "think_budget=7 leaves no token for the answer"),
        ("evaluate", ("--margin", "nan"), "margin must be a finite number of at least 0; got nan"),
        ("evaluate", ("--temperature", "-1"), "temperature must be a finite number of at least 0"),
        ("evaluate", ("--top_p", "0"), "top_p must lie in (0, 1]; got 0.0"),
        ("report", ("--evaluations", "runs/eval"), "evaluations: 'runs/eval' is not NAME=FOLDER"),
        ("report", ("--evaluations", "a=b", "a=c"), "evaluations: the name 'a' is given twice"),
        ("report", ("--margin_sweep", "a=b"), "margin_sweep: every entry must be DELTA=FOLDER with a number"),
        ("report", ("--report_to", "tensorboard"), "report_to must be none or wandb; got 'tensorboard'"),
    ],
)
def test_value_that_another_stage_refuses(
    stage: str, argv: tuple[str, ...], words: str, refused: Callable[..., str]
) -> None:
    required = {
        "data": (),
        "evaluate": ("--model", "m", "--data", "d", "--output_dir", "o"),
        "report": ("--evaluations", "x=y", "--output_dir", "o"),
    }
    assert words in refused(stage, *required[stage], *argv)


def test_wrong_type_and_missing_field_on_the_command_line(recipe: Callable, refused: Callable[..., str]) -> None:
    assert "argument --num_generations" in refused("hgpo", "--config", hgpo(recipe), "--num_generations", "four")
    assert "the following arguments are required: --output_dir" in refused("data", "task")


def test_shortened_option_is_not_guessed(refused: Callable[..., str]) -> None:
    assert "unknown argument '--num_hf'; did you mean '--num_hft'?" in refused(
        "data", "--output_dir=o", "--num_hf", "3"
    )


def test_missing_recipe_names_the_nearest(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    error = refused("data", "--config", "recipes/chainsum/data.yaml")
    assert "--config recipes/chainsum/data.yaml: there is no such recipe" in error
    assert f"did you mean '{Path('recipes/chain-sum/data.yaml')}'?" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a mapping of keys to values; it is NoneType"),
        ("- output_dir\n", "must be a mapping of keys to values; it is list"),
        ("output_dir\n", "must be a mapping of keys to values; it is str"),
        ("output_dir: [a\n", "is not valid YAML"),
        ("output_dir: a\nseed: 1\noutput_dir: b\n", "the key 'output_dir' is there twice"),
        ("1: 2\n", "unknown key 1"),
        ("env: [A]\n", "env=['A'] must be a mapping"),
    ],
)
def test_what_is_not_a_recipe(text: str, words: str, recipe: Callable, refused: Callable[..., str]) -> None:
    assert words in refused("data", "--config", recipe(text))


def test_config_without_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("hgpo_trl.scripts.data").main(["--config"])
    assert caught.value.code == 2
    assert "--config: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"serve", "demo", "recipes"}))  # these take no recipe
def test_help_lists_the_fields(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"data": ["task"], "baselines": ["dpo"]}.get(stage, [])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"hgpo_trl.scripts.{stage}").main([*kind, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--config RECIPE.yaml" in text
    assert ("--model " if stage in ("card", "chat") else "--output_dir") in text


def test_env_that_names_itself_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point and the stage's parser both read a recipe's `env`."""
    monkeypatch.setenv("SOME_FOLDERS", "/usr/share")
    for _ in range(2):
        set_env("r.yaml", {"SOME_FOLDERS": "/opt/share:$SOME_FOLDERS"})
    assert os.environ["SOME_FOLDERS"] == "/opt/share:/usr/share"
