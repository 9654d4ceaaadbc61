"""HGPO with a real vLLM engine in the training process: what it samples from, what is corrected, what is computed once.

Each engine lives in a process of its own, which trains a few steps, keeps what it saw and leaves the checks to pytest.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU, argv
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from workers import end

from hgpo_trl.modes import LHRM, mode_tokens
from hgpo_trl.tasks.embedded import build_model

ROOT = Path(__file__).parents[1]
GROUP, STEPS, MAX_LENGTH = 4, 3, 10
LONG_PROMPT = 300  # tokens: two whole blocks of 128, vLLM's block on a CPU

pytestmark = pytest.mark.engine


def train(folder: Path, *argv: str) -> None:
    """Stage II through its own main; every rollout is written to folder/rollout_STEP.pt."""
    from hgpo_trl.scripts import hgpo
    from hgpo_trl.training.trainer import HGPOTrainer

    class Watched(HGPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            outputs: list[Any] = []
            engine = self.vllm_generation.llm
            generate = engine.generate
            engine.generate = lambda *args, **kwargs: outputs.extend(generate(*args, **kwargs)) or outputs
            try:
                rollout = super()._generate_and_score_completions(inputs)
            finally:
                engine.generate = generate
            model = engine.llm_engine.model_executor.driver_worker.model_runner.model
            with model.replacing_weights() if hasattr(model, "replacing_weights") else nullcontext():
                loaded = {name: value.detach().clone() for name, value in model.named_parameters()}
            seen = {
                "rollout": {key: value for key, value in rollout.items() if isinstance(value, torch.Tensor)},
                "engine": loaded,  # as it was before vLLM packed it
                "policy": {name: value.detach().clone() for name, value in self.model.named_parameters()},
                "cached": [output.num_cached_tokens for output in outputs],
            }
            torch.save(seen, folder / f"rollout_{self.state.global_step}.pt")
            return rollout

    hgpo.HGPOTrainer = Watched
    hgpo.main(argv)


@pytest.fixture(scope="module")
def words(tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Fields of a run, on a model with heads as wide as vLLM takes them on a CPU and prompts of 300 tokens."""
    folder = tmp_path_factory.mktemp("vllm")
    build_model(tokenizer, hidden_size=64, num_heads=2, max_length=512).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [" ".join([prompt[0]["content"]] * LONG_PROMPT).split()[:LONG_PROMPT] for prompt in prompts["prompt"]]
    long = {"prompt": [" ".join(text) for text in texts[:16]], "answer": prompts["answer"][:16]}
    Dataset.from_dict(long).to_parquet(folder / "prompts.parquet")
    (folder / "reward.py").write_text(
        "def ends(completion_ids, **kwargs):\n    return [float(sum(ids) % 3) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    fields = {
        "model_name_or_path": folder / "model", "train_data": folder / "prompts.parquet", "use_vllm": True,
        "vllm_max_model_length": 320, "reward_funcs": f"{folder}/reward.py:ends", "num_generations": GROUP,
        "per_device_train_batch_size": 8, "max_completion_length": MAX_LENGTH, "max_steps": STEPS,
        "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    return argv(ON_CPU | fields)


def run(folder: Path, *argv: str) -> Path:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, __file__, str(folder), *argv, "--output_dir", str(folder / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


def test_the_stage_ends_quietly(words: list[str], tmp_path: Path) -> None:
    """At exit, an engine in the training's process looks for its process groups."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "hgpo_trl.scripts.hgpo", *words, "--max_steps", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("trained"), *words)


def seen(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"rollout_{step}.pt", weights_only=True)


def same_weights(engine: dict[str, torch.Tensor], policy: dict[str, torch.Tensor]) -> bool:
    """Whether an engine holds a policy: vLLM stacks q, k, v and gate, up, and rounds to its own type."""
    policy = {name.removeprefix("model."): value for name, value in policy.items()}
    stacks = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    compared = 0
    for name, held in engine.items():
        name = name.removeprefix("model.")
        part = next((part for part in stacks if part in name), None)
        names = [name.replace(part, piece) for piece in stacks[part]] if part else [name]
        if names[0] not in policy:
            continue
        expected = torch.cat([policy[piece] for piece in names]).to(held.dtype)
        compared += 1
        if not torch.equal(held[: len(expected)], expected):
            return False
    assert compared >= 10
    return True


def test_every_rollout_is_sampled_from_the_policy_of_its_step(trained: Path) -> None:
    steps = [seen(trained, step) for step in range(STEPS)]
    for step, now in enumerate(steps):
        assert same_weights(now["engine"], now["policy"])
        if step:
            assert not same_weights(now["engine"], steps[step - 1]["policy"]), "the policy moves with each step"


def distance(rollout: dict[str, torch.Tensor], policy: PreTrainedModel) -> float:
    """Mean difference between the log-probabilities that vLLM sampled with and those of a policy."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    width = rollout["completion_ids"].shape[1]
    with torch.no_grad():
        logits = policy(ids, attention_mask=attention).logits[:, -width - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, rollout["completion_ids"][..., None])[..., 0]
    mask = rollout["completion_mask"].bool()
    mask[:, 0] = False  # forced
    return (logps - rollout["sampling_per_token_logps"])[mask].abs().mean().item()


def test_completions_follow_the_policy(trained: Path) -> None:
    """The kernels that sample have each step's weights, and not those of the step before."""
    steps = [seen(trained, step) for step in range(STEPS)]
    policy = AutoModelForCausalLM.from_pretrained(trained / "run", dtype="float32")
    distances = []  # [step of the rollout, step of the policy]
    for now in steps:
        distances.append([])
        for then in steps:
            policy.load_state_dict(then["policy"], strict=False)
            distances[-1].append(distance(now["rollout"], policy))
    for step in range(STEPS):
        assert distances[step][step] < 0.05, "bfloat16 against float32"
        assert all(distances[step][then] > 10 * distances[step][step] for then in range(step))


def test_the_forced_token_stays_out_of_the_importance_ratio(trained: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = mode_tokens(tokenizer)
    for step in range(STEPS):
        rollout = seen(trained, step)["rollout"]
        assert rollout["completion_ids"][:, 0].tolist() == [*[tokens.think] * 2, *[tokens.no_think] * 2] * 2
        assert rollout["completion_ids"].shape[1] <= MAX_LENGTH
        sampled, old = rollout["sampling_per_token_logps"], rollout["old_per_token_logps"]
        assert sampled[:, 0].isnan().all()
        rest = rollout["completion_mask"][:, 1:].bool()
        assert not sampled[:, 1:][rest].isnan().any()
        # stock TRL's ratio (sequence_mask): the product over all sampled tokens, 0 where it exceeds the maximum
        ratio = ((old - sampled)[:, 1:] * rest).nan_to_num(0.0).sum(dim=1, keepdim=True).exp()
        torch.testing.assert_close(
            rollout["importance_sampling_ratio"], ratio.masked_fill(ratio > 3.0, 0.0), rtol=1e-4, atol=1e-5
        )


def test_a_query_is_computed_once_for_its_samples(trained: Path) -> None:
    """By vLLM's own count: of a prompt's two whole blocks, all but a query's first sample take both from the cache."""
    for step in range(STEPS):
        cached = seen(trained, step)["cached"]
        assert len(cached) == 8
        for query in range(0, 8, GROUP):
            assert sorted(cached[query : query + GROUP]) == [0, 256, 256, 256]


def test_reasoning_is_closed_at_the_budget(
    words: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    budget = 4
    rollout = seen(run(tmp_path, *words, "--think_budget", str(budget), "--max_steps", "1"), 0)["rollout"]
    closing = tokenizer(LHRM.end_reasoning, add_special_tokens=False)["input_ids"]
    first, last = budget + 1, budget + 1 + len(closing)
    forced = rollout["tool_mask"] == 0
    assert forced.any()
    for row in range(8):
        if forced[row].any():
            assert row % GROUP < GROUP // 2, "only think responses"
            assert forced[row].nonzero()[:, 0].tolist() == list(range(first, last))
            assert rollout["completion_ids"][row, first:last].tolist() == closing
            assert rollout["completion_mask"][row].sum() > last, "the model answers"
    # no log-probability of vLLM where nothing was sampled, and one wherever the policy chose
    missing = rollout["sampling_per_token_logps"].isnan()[:, 1:]
    held = rollout["completion_mask"].bool()[:, 1:]
    assert torch.equal(missing & held, forced[:, 1:] & held)


def test_resumed_engine_starts_from_the_resumed_weights(trained: Path, words: list[str], tmp_path: Path) -> None:
    checkpoint = trained / "run" / "checkpoint-2"
    run(tmp_path, *words, "--resume_from_checkpoint", str(checkpoint))
    assert not (tmp_path / "rollout_0.pt").exists()
    first = seen(tmp_path, 2)
    saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    assert same_weights(first["engine"], dict(saved.named_parameters()))
    base = AutoModelForCausalLM.from_pretrained(words[words.index("--model_name_or_path") + 1], dtype="float32")
    assert 10 * distance(first["rollout"], saved) < distance(first["rollout"], base)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]


if __name__ == "__main__":  # the engine may start processes that import this file
    train(Path(sys.argv[1]), *sys.argv[2:])
    end()
