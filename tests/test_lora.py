"""LoRA with the tags' rows: what is trained and saved, what comes back, and what it becomes when it is merged."""

import dataclasses
import json
import shutil
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from refusals import refused
from safetensors.torch import load_file
from settings import ON_CPU
from tokenizers_zoo import qwen2, tiny_llama, tiny_qwen2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import ModelConfig, SFTConfig
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import use_adapter

from hgpo_trl.cli import main
from hgpo_trl.inference.vllm_support import sync_merged_weights
from hgpo_trl.modes import TAGS, ModeTokens, add_mode_tokens, mode_tokens
from hgpo_trl.scripts import hft, hgpo
from hgpo_trl.scripts import stages as training
from hgpo_trl.training.lora import load_merged, train_tag_rows

TOKENS = ModeTokens.of_tags(7, 8, 9, 10)
IDS = [7, 8, 9, 10]
TRAINING = ON_CPU | {
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "use_peft": True,
    "max_steps": 2,
}

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def no_traces(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep data sets out of the user's own folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def run(stage: str, config: Config) -> None:
    """`hgpo-trl STAGE --config recipe.yaml` in this process."""
    recipe = Path(config["output_dir"]).parent / f"{stage}.yaml"
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hgpo-trl", stage, "--config", str(recipe)])
        main()


def run_for_trainer(stage: str, config: Config) -> Any:
    """The same, for the trainer as it is at the end."""
    trainers: list[Any] = []

    def keep(trainer: Any, checkpoint: str | None) -> None:
        trainers.append(trainer)
        training.train_and_save(trainer, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr({"hft": hft, "hgpo": hgpo}[stage], "train_and_save", keep)
        run(stage, config)
    return trainers[0]


# --- which rows are trained -----------------------------------------------------------------------------------


def small(model_class: Any, config_class: Any, **config: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return model_class(config_class(**sizes, num_attention_heads=2, **config))


BOTH = {"embed_tokens": IDS, "lm_head": IDS}


@pytest.mark.parametrize(
    ("tied", "config", "rows"),
    [
        (True, {}, BOTH),
        (False, {}, BOTH),
        (False, {"target_modules": "all-linear"}, BOTH),
        (False, {"target_modules": ["q_proj"]}, BOTH),
        (True, {"modules_to_save": ["embed_tokens"]}, None),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, None),
        (True, {"modules_to_save": ["lm_head"]}, None),
        (False, {"modules_to_save": ["lm_head"]}, {"embed_tokens": IDS}),
        (False, {"modules_to_save": ["lm_head", "embed_tokens"]}, None),
        (False, {"target_modules": ["embed_tokens"]}, {"lm_head": IDS}),
        (False, {"target_modules": r".*\.(q_proj|embed_tokens)"}, {"lm_head": IDS}),
    ],
    ids=str,
)
def test_rows_that_nothing_else_trains(tied: bool, config: Config, rows: Config | None) -> None:
    lora = LoraConfig(**config)
    with torch.device("meta"):
        model = small(Qwen2ForCausalLM, Qwen2Config, num_key_value_heads=2, tie_word_embeddings=tied)
    train_tag_rows(lora, TOKENS, model)
    assert lora.trainable_token_indices == rows


def test_names_of_another_family() -> None:
    lora = LoraConfig()
    train_tag_rows(lora, TOKENS, small(GPTNeoXForCausalLM, GPTNeoXConfig, tie_word_embeddings=False))
    assert lora.trainable_token_indices == {"embed_in": IDS, "lm_head": IDS}


def test_output_embedding_with_a_bias() -> None:
    model = small(PhiForCausalLM, PhiConfig)
    with pytest.raises(ValueError, match=r"lm_head of phi has a bias.*lora_modules_to_save: \[lm_head\]"):
        train_tag_rows(LoraConfig(), TOKENS, model)
    lora = LoraConfig(modules_to_save=["lm_head"])
    train_tag_rows(lora, TOKENS, model)
    assert lora.trainable_token_indices == {"embed_tokens": IDS}


# --- Stage I: there and back ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """A base model of Stage I, its adapter, and the model in memory."""

    root: Path
    base: Path
    adapter: Path
    model: PeftModel
    tokenizer: Any

    def logits(self, model: Any) -> torch.Tensor:
        ids = self.tokenizer("What is <think> 2 </think> 3 <no_think> the </no_think>", return_tensors="pt")
        with torch.no_grad():
            return model.eval()(**ids).logits


@pytest.fixture(scope="module", params=["grown tied", "grown untied", "spare tied", "spare untied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return stage_one(request.param, tmp_path_factory.mktemp("lora"))


def stage_one(kind: str, root: Path, changes: Config | None = None, rows: bool = True) -> Trained:
    """Stage I on a model without tags, with and without spare rows for them, with and without tied embeddings."""
    space, tied = kind.split()
    tokenizer = qwen2()
    model = {"tied": tiny_qwen2, "untied": tiny_llama}[tied](len(tokenizer) + (13 if space == "spare" else 0))
    tokenizer.save_pretrained(root / "base")
    model.save_pretrained(root / "base")
    completions = ["<think>\n2 + 3\n</think>\n\n5", "<no_think>\n5\n</no_think>"] * 4
    Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "What is 2 + 3?"}]] * 8,
            "completion": [[{"role": "assistant", "content": text}] for text in completions],
        }
    ).to_parquet(root / "hft.parquet")
    config = {"model_name_or_path": f"{root}/base", "train_data": f"{root}/hft.parquet", "output_dir": f"{root}/hft"}
    with pytest.MonkeyPatch.context() as patch:
        if not rows:
            patch.setattr(training, "train_tag_rows", lambda *_: None)
        trainer = run_for_trainer("hft", TRAINING | config | (changes or {}))
    return Trained(root, root / "base", root / "hft", trainer.model, trainer.processing_class)


def base_with_tags(trained: Trained) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    add_mode_tokens(AutoTokenizer.from_pretrained(trained.base), model)
    return model


def test_only_lora_and_the_tags_rows_have_changed(trained: Trained) -> None:
    before, after = base_with_tags(trained).state_dict(), load_merged(str(trained.adapter), str(trained.base), None)[0]
    tags = trained.tokenizer.convert_tokens_to_ids(list(TAGS))
    others = [row for row in range(len(before["lm_head.weight"])) if row not in tags]
    for name, weight in after.state_dict().items():
        if "embed_tokens" in name or "lm_head" in name:
            assert (weight[tags] != before[name][tags]).any(dim=1).all(), name
            assert weight[others].equal(before[name][others]), name
        else:
            assert weight.equal(before[name]) != ("q_proj.weight" in name or "v_proj.weight" in name), name
    in_memory = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", ""): parameter
        for name, parameter in trained.model.named_parameters()
        if not parameter.requires_grad
    }
    for name, parameter in in_memory.items():
        assert parameter.equal(before[name]), name


def test_adapter_holds_lora_and_four_rows_per_matrix(trained: Trained) -> None:
    weights = load_file(trained.adapter / "adapter_model.safetensors")
    rows = {name: weight for name, weight in weights.items() if "lora_" not in name}
    tied = trained.model.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    assert all(name.endswith("token_adapter.trainable_tokens_delta") for name in rows)
    assert {tuple(weight.shape) for weight in rows.values()} == {(4, 16)}
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        assert load_file(trained.adapter / checkpoint / "adapter_model.safetensors").keys() == weights.keys()


def test_adapter_on_its_base_gives_the_trained_model(trained: Trained) -> None:
    loaded = PeftModel.from_pretrained(base_with_tags(trained), trained.adapter)
    torch.testing.assert_close(trained.logits(loaded), trained.logits(trained.model), rtol=0, atol=0)


def test_merged_model_is_the_trained_one(trained: Trained) -> None:
    output = trained.root / "merged"
    run("merge", {"model": str(trained.adapter), "output_dir": str(output)})
    merged = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    expected = trained.logits(trained.model)
    torch.testing.assert_close(trained.logits(merged), expected, rtol=1e-5, atol=1e-6)

    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert tied == merged.config.tie_word_embeddings == trained.model.config.tie_word_embeddings
    assert mode_tokens(tokenizer) == mode_tokens(trained.tokenizer)
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    assert tokenizer.eos_token_id in merged.generation_config.eos_token_id
    assert merged.dtype == torch.float32
    run("merge", {"model": str(trained.adapter), "output_dir": str(output)})  # again: the same run

    half = trained.root / "half"
    run("merge", {"model": str(trained.adapter / "checkpoint-2"), "output_dir": str(half), "dtype": "bfloat16"})
    merged = AutoModelForCausalLM.from_pretrained(half)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(trained.logits(merged.float()), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"lora_modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"lora_modules_to_save": ["embed_tokens"]}, False),
        ({"lora_target_modules": ["q_proj", "embed_tokens"]}, False),
        ({}, True),
    ],
    ids=str,
)
def test_merging_keeps_what_a_recipe_has_trained_apart(config: Config, tied: bool, tmp_path: Path) -> None:
    """Of tied embeddings; the adapter without any rows, too."""
    trained = stage_one("grown tied", tmp_path, config, rows=bool(config))
    run("merge", {"model": str(trained.adapter), "output_dir": f"{tmp_path}/merged"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(trained.logits(merged), trained.logits(trained.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpoint", ["", "checkpoint-2"])
def test_merging_keeps_a_changed_config(checkpoint: str, tmp_path: Path) -> None:
    """The longer positions and the base frequency that an adapter was trained with are the merged model's."""
    rope = {"rope_type": "default", "rope_theta": 300_000.0}
    changes = {"model_init_kwargs": {"max_position_embeddings": 4321, "rope_parameters": rope, "dtype": "float32"}}
    trained = stage_one("grown tied", tmp_path, changes)
    run("merge", {"model": str(trained.adapter / checkpoint), "output_dir": f"{tmp_path}/merged"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.max_position_embeddings == 4321
    assert merged.config.rope_parameters == rope
    torch.testing.assert_close(trained.logits(merged), trained.logits(trained.model), rtol=1e-5, atol=1e-6)


# --- Stage II ---------------------------------------------------------------------------------------------------


def hgpo_config(root: Path, model: str) -> Config:
    return TRAINING | {
        "model_name_or_path": model,
        "train_data": f"{root}/hgpo.parquet",
        "output_dir": f"{root}/hgpo",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "reward_funcs": [f"{Path(__file__).with_name('settings.py')}:lottery"],
    }


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def stage_two(request: pytest.FixtureRequest, model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("hgpo")
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    if not request.param:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    tokenizer.save_pretrained(root / "merged")
    model.save_pretrained(root / "merged")
    prompts = [[{"role": "user", "content": "a = 1 sum mod 10 ?"}]] * 8
    Dataset.from_dict({"prompt": prompts, "answer": ["1"] * 8}).to_parquet(root / "hgpo.parquet")
    return run_for_trainer("hgpo", hgpo_config(root, str(root / "merged"))), root


def test_reference_is_the_model_that_stage_two_began_with(stage_two: Any) -> None:
    """With its tag rows as they were, in TRL's fused head, too."""
    trainer, root = stage_two
    start = AutoModelForCausalLM.from_pretrained(root / "merged").eval()
    ids = torch.tensor([[*mode_tokens(trainer.processing_class).decision, 5, 6, *range(7, 12), *range(37, 41)]])
    mask = torch.ones_like(ids)
    model = trainer.model.eval()
    expected = start(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    with torch.no_grad(), use_adapter(model, adapter_name=None):
        reference, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1] - 1)
        plain = model(ids).logits
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, start(ids).logits, rtol=0, atol=0)
    with torch.no_grad():
        policy, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1] - 1)
        logits = model(ids).logits
    assert (policy - reference).abs().max() > 1e-3
    own = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policy, own, rtol=1e-5, atol=1e-5)
    assert any(entry.get("kl", 0) > 0 for entry in trainer.state.log_history)


@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_vllm_gets_the_merged_model(stage_two: Any, sharding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, root = stage_two
    merged, _ = load_merged(f"{root}/hgpo", f"{root}/merged", None)
    expected = dict(merged.named_parameters())

    generation = object.__new__(VLLMGeneration)
    generation.model, generation.accelerator = trainer.model, SimpleNamespace(device="cpu")
    distributed = {"is_fsdp": sharding is not None, "fsdp_version": 2, "gather_params": lambda _: nullcontext()}
    generation._dist = SimpleNamespace(**distributed)
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda tensor: tensor, raising=False)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    sync_merged_weights(generation)
    sent = [(name, tensor.detach().clone()) for name, tensor in generation._iter_named_params()]

    assert [name for name, _ in sent] == list(expected)
    for name, tensor in sent:
        torch.testing.assert_close(tensor, expected[name].data, rtol=1e-6, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():  # merged for a moment only
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["hft", "hgpo"])
def test_resumes_to_the_same_adapter(
    stage: str, stage_two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the run had died before its last step."""
    _, root = stage_two
    config = hgpo_config(root, str(root / "merged"))
    if stage == "hft":
        completion = [{"role": "assistant", "content": "<no_think>\n1\n</no_think>"}]
        rows = {"prompt": [[{"role": "user", "content": "a = 1 sum mod 10 ?"}]] * 8, "completion": [completion] * 8}
        Dataset.from_dict(rows).to_parquet(root / "hft.parquet")
        config = TRAINING | {"model_name_or_path": f"{root}/merged", "train_data": f"{root}/hft.parquet"}
        run("hft", config | {"output_dir": f"{root}/hft"})
    finished, resumed = root / stage, tmp_path / stage
    shutil.copytree(finished, resumed)
    (resumed / "adapter_model.safetensors").unlink()
    shutil.rmtree(resumed / "checkpoint-2")
    run(stage, config | {"output_dir": str(resumed)})
    assert f"Resuming from {resumed}/checkpoint-1" in capsys.readouterr().out
    weights = "adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (finished / weights).read_bytes()
    assert (finished / weights).read_bytes() != (finished / "checkpoint-1" / weights).read_bytes()


# --- the whole method -------------------------------------------------------------------------------------------


def test_both_stages_with_lora(tmp_path: Path) -> None:
    """data, HFT, merge, HGPO, merge, evaluate, by what a user sets and nothing else."""
    sizes = {"num_hft": 16, "num_hgpo": 9, "num_eval": 9, "hidden_size": 16, "num_heads": 2, "num_layers": 1}
    run("data", sizes | {"output_dir": f"{tmp_path}/data"})
    config = {"model_name_or_path": f"{tmp_path}/data/base", "train_data": f"{tmp_path}/data/hft.parquet"}
    run("hft", TRAINING | config | {"output_dir": f"{tmp_path}/hft-lora"})
    run("merge", {"model": f"{tmp_path}/hft-lora", "output_dir": f"{tmp_path}/hft"})
    config = {"train_data": f"{tmp_path}/data/hgpo.parquet", "output_dir": f"{tmp_path}/hgpo-lora"}
    run("hgpo", hgpo_config(tmp_path, f"{tmp_path}/hft") | config)
    run("merge", {"model": f"{tmp_path}/hgpo-lora", "output_dir": f"{tmp_path}/hgpo"})
    sampling = {"num_prompts": 2, "samples_per_mode": 2, "max_new_tokens": 8}
    config = {"model": f"{tmp_path}/hgpo", "data": f"{tmp_path}/data/eval.parquet", "output_dir": f"{tmp_path}/eval"}
    run("evaluate", config | sampling)
    assert json.loads((tmp_path / "eval" / "report.json").read_text(encoding="utf-8"))["num_prompts"] == 2
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("data/base", "hft", "hgpo")]
    embeddings = [model.get_input_embeddings().weight for model in models]
    changed = [(a != b).any(dim=1).nonzero().flatten().tolist() for a, b in pairwise(embeddings)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hgpo")
    assert changed == [tokenizer.convert_tokens_to_ids(list(TAGS))] * 2


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_single_rows_under_zero_3(whole: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "is_deepspeed_zero3_enabled", lambda: True)
    model = ModelConfig("m", use_peft=True, lora_modules_to_save=whole)
    arguments = SFTConfig("out", bf16=False, use_cpu=True)
    if whole:
        assert training.lora_config(arguments, model, TOKENS).trainable_token_indices is None
    else:
        with pytest.raises(ValueError, match=r"cannot be trained on their own under DeepSpeed ZeRO-3"):
            training.lora_config(arguments, model, TOKENS)


@pytest.mark.parametrize("stage", ["hft", "hgpo", "evaluate"])
def test_an_adapter_is_no_model(stage: str, stage_two: Any, tmp_path: Path) -> None:
    _, root = stage_two
    config = hgpo_config(root, f"{root}/hgpo") | {"output_dir": f"{tmp_path}/out"}
    if stage == "hft":
        Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).to_parquet(tmp_path / "hft.parquet")
        config = TRAINING | {"model_name_or_path": f"{root}/hgpo", "train_data": f"{tmp_path}/hft.parquet"}
    if stage == "evaluate":
        config = {"model": f"{root}/hgpo", "data": f"{root}/hgpo.parquet"}
    field = "model" if stage == "evaluate" else "model_name_or_path"
    remedy = f"merge it first: hgpo-trl merge --model {root}/hgpo --output_dir {root}/hgpo-merged"
    with refused(f"{field}='.*' is a LoRA adapter of {root}/merged; {remedy}"):
        run(stage, config | {"output_dir": f"{tmp_path}/out"})


def test_what_merge_refuses(stage_two: Any, tmp_path: Path) -> None:
    _, root = stage_two
    adapter, output = tmp_path / "adapter", str(tmp_path / "out")
    with refused(r"model='.*merged' is not the folder of a LoRA adapter"):
        run("merge", {"model": str(root / "merged"), "output_dir": output})
    shutil.copytree(root / "hgpo", adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    with refused("is the adapter's own folder"):
        run("merge", {"model": str(adapter), "output_dir": str(adapter)})
    with refused(r"base_model='.*' is a LoRA adapter of"):
        run("merge", {"model": str(adapter), "output_dir": output, "base_model": str(root / "hgpo")})
    with refused(r"holds results of an unknown run"):
        run("merge", {"model": str(adapter), "output_dir": str(root / "merged")})

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for base in (f"{tmp_path}/no/where", None):
        changed = json.dumps(config | {"base_model_name_or_path": base})
        (adapter / "adapter_config.json").write_text(changed, encoding="utf-8")
        with refused(r"(is not there|names no base model)\. Say with base_model where"):
            run("merge", {"model": str(adapter), "output_dir": output})
    assert not Path(output).exists()
    config = {"model": str(adapter), "output_dir": output, "base_model": str(root / "merged")}
    run("merge", config)
    with refused(r"holds another run's results\. Changed: dtype"):
        run("merge", config | {"dtype": "bfloat16"})


def test_base_model_with_other_ids(stage_two: Any, tmp_path: Path) -> None:
    _, root = stage_two
    other = qwen2()
    other.save_pretrained(tmp_path / "other")
    tiny_llama(len(other)).save_pretrained(tmp_path / "other")
    config = {"model": f"{root}/hgpo", "output_dir": f"{tmp_path}/out", "base_model": f"{tmp_path}/other"}
    with refused(r"was trained with the tags' ids \(37,.*but its base model"):
        run("merge", config)
