"""docs/scaling.md: every figure follows from the models' shapes, the recipes and the formulas that stand beside it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
GIB = 2**30
GPU = 79 * GIB  # what a card of 80 GB has
PROCESSES = (1, 8, 32)
SHAPES = {  # config.json of Qwen/Qwen2.5-Math-1.5B and -7B
    "1.5B": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip


TULU = LlamaConfig(  # config.json of allenai/Llama-3.1-Tulu-3-8B-RM
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128264, num_labels=1,
)  # fmt: skip


def build(shape: Qwen2Config) -> Qwen2ForCausalLM:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(shape)
    model.tie_weights()
    return model


MODELS = {name: build(shape) for name, shape in SHAPES.items()}
P = {name: model.num_parameters() for name, model in MODELS.items()}
L = {
    name: max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    for name, model in MODELS.items()
}


with torch.device("meta"):
    REWARD_MODEL = LlamaForSequenceClassification(TULU).num_parameters()


def table(*columns: str) -> list[list[str]]:
    """The cells of the table with these first columns."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {' | '.join(columns)} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    return rows


def evaluate(formula: str, model: str, processes: int) -> float:
    """16P, 4P + 12P/n, ... in bytes."""
    python = re.sub(r"(\d+)P", rf"\1 * {P[model]}", formula).replace("n", str(processes))
    assert re.fullmatch(r"[\d\s+*/.]+", python)
    return eval(python)


FORMULAS = {  # `config`: weights, gradients, optimizer, sum
    name: row[1:5] for row in table("config", "weights") for name in re.findall(r"`(\w+)`", row[0])
}


def gib(cell: str) -> float:
    return float(cell.removesuffix(" GiB").replace(",", ""))


def test_parameters() -> None:
    assert [[name, f"{P[name]:,}", f"{L[name]:,}"] for name in MODELS] == table("model", "P")


def test_sums_of_formulas() -> None:
    for name, (weights, gradients, optimizer, total) in FORMULAS.items():
        parts = [part for part in (weights, gradients, optimizer) if part != "host"]
        for processes in PROCESSES:
            one = sum(evaluate(part, "7B", processes) for part in parts)
            assert one == pytest.approx(evaluate(total, "7B", processes)), name


def test_model_states() -> None:
    rows = table("config", "1.5B, n = 1")
    assert {row[0].strip("`") for row in rows} == FORMULAS.keys() - {"gpu"}
    for name, *cells in rows:
        expected = [evaluate(FORMULAS[name.strip("`")][3], model, n) / GIB for model in MODELS for n in PROCESSES]
        assert cells == [f"{value:.1f}" for value in expected], name


def test_reference_model() -> None:
    for names, formula, *cells in table("config", "formula"):
        expected = [evaluate(formula, model, n) / GIB for model in MODELS for n in PROCESSES]
        assert cells == [f"{value:.1f}" for value in expected], names


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_deepspeed_agrees(model: str, processes: int) -> None:
    """Its estimators count the float32 gradients of the step and the gathered layer, too."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    estimate3 = stage3.estimate_zero3_model_states_mem_needs
    nodes = {"num_gpus_per_node": min(processes, 8), "num_nodes": max(processes // 8, 1)}
    p, layer = P[model], L[model]

    _, zero2 = estimate_zero2_model_states_mem_needs(p, cpu_offload=False, **nodes)
    assert zero2 == pytest.approx(evaluate(FORMULAS["zero2"][3], model, processes) + 4 * p / processes)
    _, zero3, gathered = estimate3(p, layer, cpu_offload=False, cpu_offload_params=False, **nodes)
    assert gathered == 4 * layer
    assert zero3 == pytest.approx(evaluate(FORMULAS["zero3"][3], model, processes) + 4 * layer + 2 * p / processes)
    host, offload, _ = estimate3(p, layer, cpu_offload=True, cpu_offload_params=False, zero_init=True, **nodes)
    assert offload == pytest.approx(evaluate(FORMULAS["zero3_offload"][3], model, processes) + 4 * layer)
    assert host == pytest.approx(24 * p / nodes["num_nodes"], abs=1)


def test_deepspeed_counts_the_untied_model_the_same() -> None:
    """Of the tied one on the meta device it counts one data pointer; 7B has no weight twice."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    assert stage3.model_to_params(MODELS["7B"])[1] == L["7B"]


def test_host_memory() -> None:
    assert f"{24 * P['1.5B'] / GIB:.1f} GiB (1.5B), {24 * P['7B'] / GIB:.1f} GiB (7B)" in TEXT
    assert f"{24 * P['7B'] / GIB:.0f} GiB of host memory" in TEXT


def per_token(model: str) -> tuple[int, int]:
    """Bytes of checkpointed activations and of KV cache."""
    shape = SHAPES[model]
    head = shape.hidden_size // shape.num_attention_heads
    assert head == 128
    layers = shape.num_hidden_layers
    return layers * shape.hidden_size * 2, 2 * layers * shape.num_key_value_heads * head * 2


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_tokens() -> None:
    for model, checkpoint, cache, row, sequence in table("model", "checkpoint per token"):
        activations, kv = per_token(model)
        assert (checkpoint, cache) == (f"{activations:,} B", f"{kv:,} B")
        name = f"qwen2.5-math-{model.lower()}"
        assert row == f"{activations * recipe(f'{name}/hft')['max_length'] / GIB:.1f} GiB"
        assert sequence == f"{kv * recipe(f'{name}/hgpo')['vllm_max_model_length'] / GIB:.2f} GiB"
    assert "32,768 tokens of a packed HFT row" in TEXT
    assert f"sequence of {recipe('qwen2.5-math-7b/hgpo')['vllm_max_model_length']:,} |" in TEXT


def test_evaluation_recipes_say_their_cache() -> None:
    for model in MODELS:
        path = ROOT / "recipes" / f"qwen2.5-math-{model.lower()}" / "evaluate.yaml"
        fields, kv = yaml.safe_load(path.read_text()), per_token(model)[1]
        total = fields["batch_size"] * fields["max_new_tokens"] * kv / GIB
        assert f"x {kv // 1024} KiB of KV cache = {total:.1f} GiB" in path.read_text(encoding="utf-8")


def test_where_it_adds_up() -> None:
    rows = table("recipe", "config", "n")
    assert len(rows) == 6
    for name, config, n, *cells in rows:
        name, config, n = name.strip("`"), config.strip("`"), int(n)
        model = "7B" if "7b" in name else "1.5B"
        fields, hgpo = recipe(name), not name.endswith("hft")
        length = fields["vllm_max_model_length"] if hgpo else fields["max_length"]
        sharded = config == "zero3"
        expected = {
            "states": evaluate(FORMULAS[config][3], model, n) / GIB,
            "reference": 2 * P[model] / (n if sharded else 1) / GIB if hgpo else 0.0,
            "step": (4 * P[model] / n + (4 * L[model] if sharded else 0)) / GIB,
            "activations": fields["per_device_train_batch_size"] * length * per_token(model)[0] / GIB,
            "vllm": fields.get("vllm_gpu_memory_utilization", 0.0) * GPU / GIB,
            "reward model": 2 * REWARD_MODEL / GIB if "reward_model" in fields else 0.0,
        }
        for cell, (what, value) in zip(cells, expected.items(), strict=False):
            assert (0.0 if cell == "–" else gib(cell)) == pytest.approx(value, abs=0.051), (name, what)
        assert gib(cells[-1]) == pytest.approx(sum(expected.values()), abs=0.11), name
        assert gib(cells[-1]) < 0.9 * GPU / GIB


def test_reward_model() -> None:
    assert f"{REWARD_MODEL:,} parameters of 2 bytes" in TEXT
    per_token = 2 * (3 * TULU.intermediate_size + 8 * TULU.hidden_size)
    assert "2 x (3 x 14,336 + 8 x 4,096) bytes" in TEXT
    for path in ROOT.glob("recipes/qwen2.5*/hgpo*.yaml"):
        text, batch = path.read_text(encoding="utf-8"), yaml.safe_load(path.read_text())["reward_model_batch_size"]
        assert f"{2 * REWARD_MODEL / GIB:.1f} GiB ({2 * REWARD_MODEL / 1e9:.0f} GB) in bfloat16 per process" in text
        took = f"a batch of {batch} conversations of 2,048 tokens takes {batch * 2048 * per_token / GIB:.1f} GiB"
        assert took in TEXT.replace("\n", " ")


def test_cache() -> None:
    for name, share, cache, tokens, sequences in table("recipe", "share"):
        name, model = name.strip("`"), "7B" if "7b" in name else "1.5B"
        fields = recipe(name)
        assert float(share) == fields.get("vllm_gpu_memory_utilization", 0.9)  # of a server: the launch scripts'
        free = float(share) * GPU - 2 * P[model]
        assert cache == f"{free / GIB:.1f} GiB"
        assert tokens == f"{free / per_token(model)[1] / 1e6:.2f} million"
        assert int(sequences) == int(free / per_token(model)[1] / fields["vllm_max_model_length"])
    assert '"${SERVER_MEMORY:-0.9}"' in (ROOT / "recipes" / "vllm_server.sh").read_text()
    assert "--gpu-memory-utilization 0.9 " in (ROOT / "recipes" / "slurm" / "hgpo_server.slurm").read_text()


def test_configs_links_and_recipes_exist() -> None:
    configs = {path.stem for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert configs >= FORMULAS.keys()
    for row in table("GPUs", "1.5B, HFT"):
        assert {name for cell in row[1:] for name in re.findall(r"`(\w+)`", cell)} <= configs
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (ROOT / "docs" / target).is_file(), target
    for path in re.findall(r"recipes/[\w./-]+(?:\.sh|\.slurm|/)", TEXT):
        assert (ROOT / path).exists(), path
