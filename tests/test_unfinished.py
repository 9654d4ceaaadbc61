"""Every stage that takes a model, on the folder of a stage that has not finished: what it is, and how to go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import ON_CPU, argv
from transformers import AutoModelForCausalLM, PreTrainedModel

from hgpo_trl.common.errors import UserError
from hgpo_trl.scripts import baselines, card, chat, evaluate, export, hft, hgpo, merge, serve
from hgpo_trl.training.checkpoints import seal
from hgpo_trl.training.model_dir import check_model_path

Break = Callable[[Path], Any]


@pytest.fixture
def stage_folder(model_dir: str, tmp_path: Path) -> Path:
    """What a finished stage leaves, and a sealed checkpoint, and a torn one."""
    folder = tmp_path / "hft"
    shutil.copytree(model_dir, folder)
    (folder / "run.json").write_text('{"stage": "hft", "model_name_or_path": "base", "train_data": "d"}')
    for step in (20, 40):
        shutil.copytree(model_dir, folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    seal(folder / "checkpoint-20")
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


BREAKS: dict[str, tuple[Break, str]] = {
    "still running": (lambda folder: remove(folder, "*.json", "*.safetensors", "*.jinja"), "no config.json"),
    "config alone": (lambda folder: remove(folder, "*.safetensors", "tokenizer*"), "no weights"),
    "weights cut off": (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors is cut off"),
    "no tokenizer": (lambda folder: remove(folder, "tokenizer*"), "no tokenizer"),
}


def break_it(folder: Path, kind: str) -> str:
    """Take away what a killed stage has not written; the pattern of what is said of it."""
    run = (folder / "run.json").read_text()
    action, words = BREAKS[kind]
    action(folder)
    (folder / "run.json").write_text(run)  # the stage writes it first
    return words


@pytest.mark.parametrize("kind", BREAKS)
def test_a_stage_that_was_killed_at_any_moment(kind: str, stage_folder: Path) -> None:
    check_model_path("model", str(stage_folder))
    words = break_it(stage_folder, kind)
    with pytest.raises(UserError, match=words) as caught:
        check_model_path("model", str(stage_folder))
    message = str(caught.value)
    assert f"model='{stage_folder}': `hgpo-trl hft` has not finished there" in message
    assert "run the same command again" in message
    assert message.endswith(
        f"goes on from {stage_folder}/checkpoint-20. For the model as it was there, name that checkpoint."
    )
    check_model_path("model", str(stage_folder / "checkpoint-20"))


def test_without_a_whole_checkpoint(stage_folder: Path) -> None:
    break_it(stage_folder, "still running")
    shutil.rmtree(stage_folder / "checkpoint-20")
    with pytest.raises(UserError, match="starts afresh, because there is no whole checkpoint"):
        check_model_path("model", str(stage_folder))


def test_a_missing_shard(stage_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stage_folder, dtype=torch.float32)
    remove(stage_folder, "*.safetensors")
    model.save_pretrained(stage_folder, max_shard_size="5KB")
    check_model_path("model", str(stage_folder))
    next(stage_folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors is missing"):
        check_model_path("model", str(stage_folder))


def test_adapters_and_baselines_say_their_own_command(stage_folder: Path) -> None:
    break_it(stage_folder, "still running")
    (stage_folder / "run.json").write_text('{"stage": "dpo"}')
    (stage_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(
        UserError, match=r"`hgpo-trl baselines dpo` has not finished there \(there are no weights in it"
    ):
        merge.main(["--model", str(stage_folder), "--output_dir", f"{stage_folder}-merged"])


def test_other_folders(model_dir: str, tmp_path: Path) -> None:
    """Of what other tools write, nothing but the configuration is asked for."""
    with pytest.raises(UserError, match=r"is not a model's folder: there is no config\.json in it"):
        check_model_path("model", str(tmp_path))
    shutil.copy(f"{model_dir}/config.json", tmp_path)
    check_model_path("model", str(tmp_path))
    check_model_path("model", "org/name-on-the-hub")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("stage", ["hft", "hgpo", "evaluate", "baselines", "merge", "card", "chat", "export", "serve"])
def test_every_stage_says_it(
    stage: str,
    stage_folder: Path,
    hft_samples: dict[str, str],
    tmp_path: Path,
    prompts: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(stage_folder, "still running")
    data, out, model = str(tmp_path / "data.parquet"), str(tmp_path / "out"), str(stage_folder)
    prompts.add_column("completion", prompts["prompt"]).to_parquet(data)
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": "Hi", "output": "", "dataset": "x"}]))
    training = argv(ON_CPU | {"model_name_or_path": model, "train_data": data, "output_dir": out})
    baseline = argv(ON_CPU | hft_samples | {"model_name_or_path": model})
    prompts_file = str(tmp_path / "prompts.json")
    export_words = ["--tool", "alpaca_eval", "--prompts", prompts_file, "--model", model, "--output_dir", out]
    commands: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
        "hft": (hft.main, training),
        "hgpo": (hgpo.main, training),
        "evaluate": (evaluate.main, ["--model", model, "--data", data, "--output_dir", out]),
        "baselines": (baselines.main, ["dpo", *baseline]),
        "merge": (merge.main, ["--model", model, "--output_dir", out]),
        "card": (card.main, ["--model", model]),
        "chat": (chat.main, ["--model", model]),
        "export": (export.main, export_words),
        "serve": (serve.main, ["--model", model]),
    }
    monkeypatch.setattr(serve, "check_vllm_installed", lambda name: None)
    main, words = commands[stage]
    with pytest.raises(UserError, match=r"`hgpo-trl hft` has not finished there.*checkpoint-20"):
        main(words)
