"""A real engine takes the weights of a model with LoRA and trained tag rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def lottery(completions: list, **kwargs: Any) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def train_and_compare(root: Path) -> None:
    """Train with vLLM colocated; after the last step the engine holds the merged model, rounded to its own type."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from hgpo_trl.config import HGPOConfig
    from hgpo_trl.lora import load_merged, train_tag_rows
    from hgpo_trl.modes import mode_tokens
    from hgpo_trl.tasks.embedded import build_model, build_tokenizer, load_task
    from hgpo_trl.trainer import HGPOTrainer
    from hgpo_trl.vllm_support import keep_cpu_weights_replaceable

    tokenizer = build_tokenizer(load_task("hgpo_trl.tasks.chain_sum"))
    model = build_model(tokenizer, num_heads=2)  # vLLM's attention on CPUs takes heads of 32 and more
    base = root / "base"
    for part in (tokenizer, model):
        part.save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM")
    train_tag_rows(lora, mode_tokens(tokenizer), model)
    keep_cpu_weights_replaceable()
    trainer = HGPOTrainer(
        model=str(base),
        reward_funcs=lottery,
        args=HGPOConfig(
            str(root / "adapter"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=2,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a = 1 sum mod 10 ?"}]] * 8}),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trainer.vllm_generation.sync_weights()  # TRL does it before the next rollout
    trainer.save_model()

    worker = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker
    engine = dict(worker.model_runner.model.named_parameters())
    merged = load_merged(str(root / "adapter"), str(base), None)[0].state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()

    def stacked(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([state[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])

    rows = len(tokenizer)
    embedding = engine["model.embed_tokens.weight"][:rows]
    attention = engine["model.layers.1.self_attn.qkv_proj.weight"]
    assert (attention.float() - stacked(before)).abs().max() > 1e-3
    # one unit in the last place of bfloat16: the engine's came from a model that is merged and unmerged every time
    for name, held, expected in (
        ("embed_tokens", embedding, merged["model.embed_tokens.weight"]),
        ("qkv_proj", attention, stacked(merged)),
    ):
        torch.testing.assert_close(
            held.float(), expected, rtol=2**-7, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    tags = list(mode_tokens(tokenizer).decision)
    assert (merged["model.embed_tokens.weight"][tags] - before["model.embed_tokens.weight"][tags]).abs().max() > 1e-3
    print("the engine holds the merged model")


def test_engine_takes_the_merged_weights(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the engine holds the merged model" in done.stdout


if __name__ == "__main__":  # the engine may start processes that import this file
    train_and_compare(Path(sys.argv[1]))
