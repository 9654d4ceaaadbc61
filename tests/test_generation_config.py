"""A base model's generation config changes nothing: not rollouts, evaluation, `generate`, nor what is saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU, argv
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.evaluation import vllm_backend
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.inference.decoding import SAMPLING, set_generation_config
from hgpo_trl.inference.generate import generate, stream
from hgpo_trl.modes import mode_tokens
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.scripts import baselines, hft, merge
from hgpo_trl.tasks.embedded import draw, hft_dataset, load_task
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.trainer import HGPOTrainer

CHANGES = {
    "top_k": 2,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "suppress_tokens": list(range(4, 12)),
    "begin_suppress_tokens": list(range(12, 20)),
    "bad_words_ids": [[20], [21]],
    "forced_eos_token_id": 22,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "num_beams": 2,
}


@pytest.fixture(scope="module")
def changed_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a generation config that changes everything that is sampled."""
    path = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(model_dir, path)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CHANGES), encoding="utf-8")
    return str(path)


def both(function: Callable[[Any], Any], model_dir: str, changed_dir: str) -> list[Any]:
    return [function(AutoModelForCausalLM.from_pretrained(path)) for path in (model_dir, changed_dir)]


def test_the_config_would_change_what_is_sampled(
    model_dir: str, changed_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset
) -> None:
    """What the tests below rely on."""
    inputs = tokenizer.apply_chat_template(prompts["prompt"][0], return_tensors="pt", return_dict=True)
    clean, changed = both(
        lambda model: model.generate(**inputs, max_new_tokens=16, do_sample=False).tolist(), model_dir, changed_dir
    )
    assert clean != changed


@pytest.mark.parametrize("mode", ["auto", "think"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_and_stream(
    mode: str,
    temperature: float,
    model_dir: str,
    changed_dir: str,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Dataset,
) -> None:
    settings: dict[str, Any] = {"mode": mode, "temperature": temperature, "max_new_tokens": 16, "seed": 1}

    def answers(model: Any) -> Any:
        streamed = "".join(stream(model, tokenizer, prompts["prompt"][0], **settings))
        kept = model.generation_config.to_dict()
        return generate(model, tokenizer, prompts["prompt"][:6], **settings), streamed, kept

    clean, changed = both(answers, model_dir, changed_dir)
    assert clean[:2] == changed[:2]
    assert changed[2]["repetition_penalty"] == 3.0, "a user's model comes back as it was"


def test_evaluation(model_dir: str, changed_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset) -> None:
    def table(model: Any) -> Any:
        return sample_both_modes(model, tokenizer, prompts["prompt"][:6], samples_per_mode=2, max_new_tokens=12)

    clean, changed = both(table, model_dir, changed_dir)
    assert clean.equals(changed)


def test_evaluation_with_vllm_names_every_setting(tokenizer: PreTrainedTokenizerFast, prompts: Dataset) -> None:
    """vLLM reads a model's generation config for requests without parameters alone, and for the end tokens."""
    vllm = pytest.importorskip("vllm")
    asked: list[Any] = []

    class Engine:
        """Stops where the engine would begin."""

        def generate(self, requests: list[Any], params: list[Any], **kwargs: Any) -> list[Any]:
            asked.extend(params)
            return []

    tokens = mode_tokens(tokenizer)
    ids = [tokenizer.apply_chat_template(prompts["prompt"][0], return_dict=False)]
    with pytest.raises(ValueError, match="shorter"):  # there are no responses
        list(vllm_backend._generate(Engine(), ids, tokens, [3], 2, [7, 7], None, 0.6, 0.95, [0], False))  # type: ignore[arg-type]
    defaults = vllm.SamplingParams()
    assert len(asked) == 2
    for params in asked:
        before = repr(params)
        params.update_from_generation_config(CHANGES, eos_token_id=3)
        assert repr(params) == before
        for name in ("top_k", "min_p", "repetition_penalty", "presence_penalty", "min_tokens", "bad_words"):
            assert getattr(params, name) == getattr(defaults, name)
        assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.95, 7)


# --- training -------------------------------------------------------------------------------------------------


def trainer_of(path: str, tokenizer: Any, prompts: Dataset, folder: Path, **settings: Any) -> HGPOTrainer:
    args = HGPOConfig(
        str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=12, max_steps=1, beta=0.0,
        **ON_CPU, **settings,
    )  # fmt: skip
    return HGPOTrainer(path, accuracy_reward, args, prompts, processing_class=tokenizer)


def test_rollouts(
    model_dir: str, changed_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path
) -> None:
    """Both of Transformers' ways to generate take from the model's own config what the trainer leaves unset."""
    drawn = []
    for path in (model_dir, changed_dir):
        trainer = trainer_of(path, tokenizer, prompts, tmp_path)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(0)
        drawn.append(trainer._generate_and_score_completions(batch)["completion_ids"].tolist())
        check_saved(trainer.model.generation_config.to_diff_dict(), tokenizer)
    assert drawn[0] == drawn[1]


def check_saved(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    ends = config.pop("eos_token_id")
    assert ends == [tokenizer.eos_token_id] or ends == tokenizer.eos_token_id
    assert config.pop("pad_token_id") == tokenizer.pad_token_id
    assert config.pop("bos_token_id") == tokenizer.bos_token_id
    config.pop("transformers_version", None)
    config.pop("_from_model_config", None)
    assert config == SAMPLING


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "merged"])
def test_what_hft_saves(lora: bool, changed_dir: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    queries = draw(load_task("hgpo_trl.tasks.chain_sum"), 16, held_out=False, fraction=0.2, seed=0)
    hft_dataset(queries, 0.6, 0).to_parquet(tmp_path / "hft.parquet")
    fields = {
        "model_name_or_path": changed_dir, "train_data": tmp_path / "hft.parquet", "output_dir": tmp_path / "run",
        "max_steps": 1, "use_peft": lora,
    }  # fmt: skip
    hft.main(argv(ON_CPU | fields))
    saved = tmp_path / "run"
    if lora:
        saved = tmp_path / "merged"
        merge.main(["--model", str(tmp_path / "run"), "--output_dir", str(saved)])
    check_saved(json.loads((saved / "generation_config.json").read_text(encoding="utf-8")), tokenizer)


def test_dpo_takes_it_out_as_well(
    changed_dir: str, tokenizer: PreTrainedTokenizerFast, hft_samples: dict[str, str], tmp_path: Path
) -> None:
    baselines.main(["dpo", *argv(ON_CPU | hft_samples | {"model_name_or_path": changed_dir, "max_steps": 1})])
    check_saved(json.loads((tmp_path / "run" / "generation_config.json").read_text(encoding="utf-8")), tokenizer)


def test_end_tokens_stay(model_dir: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rollouts end with each of them, and so does what is saved."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    set_generation_config(model, tokenizer)
    assert model.generation_config.eos_token_id == sorted([7, tokenizer.eos_token_id])
