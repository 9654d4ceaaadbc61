"""A real engine takes the weights of a model with LoRA and trained tag rows."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from settings import ON_CPU, lottery
from workers import end

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]


def train_and_compare(root: Path) -> None:
    """Train with vLLM colocated; after the last step the engine holds the merged model, rounded to its own type."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams, TokensPrompt

    from hgpo_trl.modes import mode_tokens
    from hgpo_trl.tasks.embedded import build_model, build_tokenizer, load_task
    from hgpo_trl.training.config import HGPOConfig
    from hgpo_trl.training.lora import load_merged, train_tag_rows
    from hgpo_trl.training.trainer import HGPOTrainer

    tokenizer = build_tokenizer(load_task("hgpo_trl.tasks.chain_sum"))
    model = build_model(tokenizer, num_heads=2)  # vLLM's attention on CPUs takes heads of 32 and more
    base = root / "base"
    for part in (tokenizer, model):
        part.save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM")
    train_tag_rows(lora, mode_tokens(tokenizer), model)
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
            **ON_CPU,
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

    llm = trainer.vllm_generation.llm
    merged_model = load_merged(str(root / "adapter"), str(base), None)[0]
    base_model = AutoModelForCausalLM.from_pretrained(base)
    merged, before = merged_model.state_dict(), base_model.state_dict()

    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a = 1 sum mod 10 ?"}], return_dict=False)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)[0].outputs
    tokens = list(output.token_ids)
    sampled = torch.tensor([entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)])
    ids = torch.tensor([prompt + tokens])

    def distance(model: torch.nn.Module) -> float:
        """Mean difference between the log-probabilities that the engine sampled with and those of a model."""
        with torch.no_grad():
            logps = model(ids).logits.float()[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return (logps[-len(tokens) :] - sampled).abs().mean().item()

    assert 10 * distance(merged_model) < distance(base_model)

    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    with model.replacing_weights() if hasattr(model, "replacing_weights") else nullcontext():
        engine = {name: value.detach().clone() for name, value in model.named_parameters()}  # before they are packed

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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the engine holds the merged model" in done.stdout


if __name__ == "__main__":  # the engine may start processes that import this file
    train_and_compare(Path(sys.argv[1]))
    end()
