"""Real processes: one and two of them, DDP, DeepSpeed ZeRO and FSDP2 take the same steps on the same rollouts.

What has to agree: rollouts and advantages exactly, loss and gradient norm up to fp32 rounding. What need not: with
`decision_weighting: saturating` the advantage of the decision token depends on probabilities that a forward pass of
another batch rounds differently; the KL, the entropy and the clip ratios that TRL logs are means over micro-batches,
which hold other rows; sampled completions follow each process's own random numbers.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from fork_server import ForkServer
from run_logs import log_of
from safetensors.torch import load_file
from settings import ON_CPU, argv
from tokenizers_zoo import word_level

from hgpo_trl.modes import Mode, format_response
from hgpo_trl.tasks.embedded import build_model
from hgpo_trl.training.advantages import compute_advantages, decided_without_think

pytestmark = pytest.mark.processes

ACCELERATE = "-m accelerate.commands.launch --num_processes 2 --main_process_port 0 --config_file".split()
# DeepSpeed and FSDP on gloo where accelerate would look for GPUs. What DeepSpeed compiles stays with this environment:
# in the user's cache another environment's build, or the lock of one that was killed, would be in the way.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
}

Result = dict[str, Any]
Launch = Callable[..., str]
Stage = Callable[..., Path]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Run a script in one process, or in two with one of the repository's accelerate configs; what it printed."""
    servers: dict[str | None, ForkServer] = {}

    def run(config: str | None, *words: str | Path) -> str:
        if config not in servers:
            launcher = (
                [sys.executable]
                if config is None
                else [sys.executable, *ACCELERATE, f"recipes/accelerate/{config}.yaml"]
            )
            folder = tmp_path_factory.mktemp(config or "alone")
            servers[config] = ForkServer(launcher, 1 if config is None else 2, ENVIRONMENT, folder)
        done = servers[config].run(*words)
        assert done.returncode == 0, done.stdout
        return done.stdout

    yield run
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def data(prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "prompts.parquet"
    prompts.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def parity(launch: Launch, model_dir: str, data: Path) -> Callable[..., Result]:
    """Three steps of tests/parity_worker.py; each way of running it is run once."""
    results: dict[tuple, Result] = {}

    def run(config: str | None, rows: int, micro_batches: int, *fields: str) -> Result:
        key = (config, rows, micro_batches, *fields)
        if key not in results:
            output = data.with_name("-".join(map(str, key)) + ".json")
            launch(config, "tests/parity_worker.py", model_dir, data, output, str(rows), str(micro_batches), *fields)
            results[key] = json.loads(output.read_text(encoding="utf-8"))
        return results[key]

    return run


def fixed(result: Result) -> list[Result]:
    """The rows of the steps on fixed rollouts, in one order for all."""
    rows = [row for row in result["rows"] if row["step"] < 2]
    return sorted(rows, key=lambda row: json.dumps([row["step"], row["query"], row["completion"]]))


ENGINES = {
    "cpu_ddp": ("DistributedType.MULTI_CPU", ["cpu"]),
    "zero2": ("DistributedType.DEEPSPEED", []),
    "zero3": ("DistributedType.DEEPSPEED", []),
    "fsdp2": ("DistributedType.FSDP", ["fsdp"]),
}


@pytest.mark.parametrize(
    ("config", "one", "two", "weighting"),
    [
        ("cpu_ddp", (8, 2), (8, 1), "uniform"),
        ("cpu_ddp", (6, 4), (6, 2), "uniform"),  # N = 4: every other group straddles the two processes
        ("zero2", (8, 2), (4, 2), "uniform"),
        ("zero3", (6, 4), (6, 2), "uniform"),
        ("zero3", (6, 4), (6, 2), "saturating"),
        ("fsdp2", (8, 2), (8, 1), "uniform"),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_two_processes_take_the_steps_of_one(
    config: str, one: tuple[int, int], two: tuple[int, int], weighting: str, parity: Callable[..., Result]
) -> None:
    engine, fields = ENGINES[config]
    alone, together = parity(None, *one, "cpu", weighting), parity(config, *two, weighting, *fields)
    assert (together["engine"], together["processes"]) == (engine, 2)
    assert len(alone["rows"]) == len(together["rows"])
    for row, other in zip(fixed(alone), fixed(together), strict=True):
        assert (row["query"], row["completion"]) == (other["query"], other["completion"])
        if weighting != "saturating":
            assert row["advantages"] == other["advantages"]
        else:
            assert row["advantages"] == pytest.approx(other["advantages"], abs=1e-5)
    for step in range(2):
        for name in ("loss", "grad_norm"):
            assert together["log"][step][name] == pytest.approx(alone["log"][step][name], rel=2e-5, abs=1e-6), name
        for name in (key for key in alone["log"][step] if key.startswith("hgpo/faults/")):
            assert together["log"][step][name] == pytest.approx(alone["log"][step][name]), name
    assert together["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5, abs=1e-6)
    assert None not in alone["evaluation"].values()
    assert 0 < alone["evaluation"]["eval_hgpo/accuracy_at_budget"] != alone["evaluation"]["eval_hgpo/accuracy/auto"]
    capped = [entry["hgpo/faults/overlong"] for entry in alone["log"][:2]]
    assert 0 < sum(capped) < 1, "some no-think answers are longer than their query's think answers, others are not"
    assert len({max(row["advantages"][1:], default=0.0) > 0 for row in fixed(alone)}) == 2
    sampled = together["log"][2]
    assert all(value == value for value in sampled.values())  # none is NaN
    assert {row["completion"][0] for row in together["rows"] if row["step"] == 2} == {
        row["completion"][0] for row in fixed(alone)
    }


NORMALISERS = ("dr_grpo", "grpo", "bnpo", "dapo", "luspo")  # the others divide as one of these does


@pytest.mark.parametrize("config", ["cpu_ddp", "zero3", "fsdp2"])
def test_gradient_of_regrouped_micro_batches(
    config: str, launch: Launch, model_dir: str, data: Path, tmp_path: Path
) -> None:
    """As in tests/test_micro_batches.py for one process: the gradient is that of TRL's padded micro-batches.

    Trimmed, the two processes have in every micro-batch the one that is as long among their own as the other's. By
    tokens, rows move between them, and they have as many micro-batches as each other.
    """
    words = {"cpu_ddp": ["cpu"], "fsdp2": ["fsdp"]}.get(config, [])
    launch(config, "tests/gradient_worker.py", model_dir, data, tmp_path / "out.pt", *words, *NORMALISERS)
    before = load_file(Path(model_dir) / "model.safetensors")
    result = torch.load(tmp_path / "out.pt")
    assert result.keys() == set(NORMALISERS)
    for loss_type, steps in result.items():
        padded = steps.pop("padded")
        assert padded["engine"] == ENGINES[config][0]
        if loss_type != "bnpo":  # rows stay in the micro-batches that TRL has put them in
            first, second = ([longest for _, longest, _ in process] for process in steps["trimmed"]["computed"])
            assert len(set(first)) > 1 < len(set(second))
            assert sorted(zip(first, second, strict=True)) == [*zip(sorted(first), sorted(second), strict=True)]
            first, second = steps["by tokens"]["computed"]
            assert len(first) == len(second) > 4, "more than TRL's"
            assert all(tokens <= 40 or rows == 1 for tokens, _, rows in first + second)
            assert [rows for _, _, rows in first] != [rows for _, _, rows in second]
        moved = 0.0
        for way, step in steps.items():
            tokens, all_tokens = (
                sum(tokens for process in of["computed"] for tokens, _, _ in process) for of in (step, padded)
            )
            assert tokens < all_tokens
            assert sum(rows for process in step["computed"] for _, _, rows in process) == 16
            assert step["log"]["loss"] == pytest.approx(padded["log"]["loss"], rel=1e-5, abs=1e-7)
            assert step["log"].keys() == padded["log"].keys()
            for name, weight in before.items():
                gradient, expected = weight - step["weights"][name], weight - padded["weights"][name]
                tolerance = 1e-7 + 1e-5 * expected.abs().max().item()
                assert torch.allclose(gradient, expected, rtol=1e-4, atol=tolerance), (loss_type, way, name)
                moved = max(moved, expected.abs().max().item())
        assert moved > 1e-3, loss_type


@pytest.mark.parametrize("config", ["cpu_ddp", "zero3", "fsdp2"])
def test_lazy_thinking_decides_groups_that_straddle(
    config: str, launch: Launch, model_dir: str, data: Path, tmp_path: Path
) -> None:
    """The decision is of the whole group's no-think responses; a process without undecided queries takes part."""
    fields = {"cpu_ddp": ["cpu"], "fsdp2": ["fsdp"]}.get(config, [])
    launch(config, "tests/lazy_worker.py", model_dir, data, tmp_path / "out.json", *fields)
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    idle = []
    for step, entry in enumerate(result["log"]):
        rows = sorted((row for row in result["rows"] if row["step"] == step), key=lambda row: row["place"])
        assert [row["place"] for row in rows] == list(range(12))
        assert all(rows[i]["query"] == rows[i + j]["query"] for i in range(0, 12, 4) for j in range(4))
        rewards = torch.tensor([row["reward"] for row in rows]).view(3, 2, 2)
        decided = decided_without_think(rewards[:, 1], 0.2)
        assert entry["hgpo/lazy_decided"] == pytest.approx(decided.float().mean().item())
        thinks = [place % 4 < 2 for place in range(12)]
        unsampled = [think and bool(decided[place // 4]) for place, think in enumerate(thinks)]
        assert [len(row["completion"]) == 1 for row in rows] == unsampled
        assert rewards.isnan().flatten().tolist() == unsampled
        lengths = torch.tensor([len(row["completion"]) for row in rows])
        expected = compute_advantages(rewards, lengths, decided=decided)
        for row, advantages in zip(rows, expected, strict=True):
            assert row["advantages"] == pytest.approx(advantages[: len(row["advantages"])].tolist(), abs=1e-6)
        idle.append([all(unsampled[i] for i in places if thinks[i]) for places in (range(6), range(6, 12))])
    assert [False, True] in idle or [True, False] in idle, "one process had think rows to sample, the other none"
    assert len(idle) == 5


# --- the stages themselves --------------------------------------------------------------------------------------


SETTINGS = ON_CPU | {
    "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(launch: Launch) -> Stage:
    """Run a stage to its end; the folder that it leaves."""

    def run(config: str | None, name: str, output_dir: Path, **fields: Any) -> Path:
        settings = SETTINGS | {"output_dir": output_dir, "use_cpu": config in (None, "cpu_ddp")}
        backend = {} if config is None else {"ddp_backend": "gloo"}
        words = argv(settings | backend | fields)
        launch(config, "tests/workers.py", *(["--fsdp"] if config == "fsdp2" else []), name, *words)
        return output_dir

    return run


@pytest.fixture(scope="module")
def hft_fields(prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose tokenizer and embeddings lack the tags, and examples of both modes."""
    folder = tmp_path_factory.mktemp("hft")
    tokenizer = word_level()
    tokenizer.save_pretrained(folder / "bare")
    build_model(tokenizer, hidden_size=16, num_heads=2).save_pretrained(folder / "bare")

    def answered(row: dict[str, Any], index: int) -> dict[str, Any]:
        mode = list(Mode)[index % 2]
        response = format_response(mode, row["answer"], "one step" if mode is Mode.THINK else "")
        return {"completion": [{"role": "assistant", "content": response}]}

    prompts.map(answered, with_indices=True).select_columns(["prompt", "completion"]).to_parquet(folder / "hft.parquet")
    return {"model_name_or_path": folder / "bare", "train_data": folder / "hft.parquet", "max_length": 64}


@pytest.fixture(scope="module")
def hft_alone(stage: Stage, hft_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(None, "hft", tmp_path_factory.mktemp("alone") / "hft", per_device_train_batch_size=8, **hft_fields)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_hft_adds_the_tags_and_takes_the_steps_of_one_process(
    config: str, stage: Stage, hft_fields: dict[str, Any], hft_alone: Path, tmp_path: Path
) -> None:
    folder = stage(config, "hft", tmp_path / "hft", per_device_train_batch_size=4, **hft_fields)
    for mine, alone in zip(log_of(folder), log_of(hft_alone), strict=True):
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    weights, expected = load_file(folder / "model.safetensors"), load_file(hft_alone / "model.safetensors")
    shared = weights.keys() & expected.keys()  # one may name the tied embedding twice
    assert len(shared) == len(expected)
    for name in shared:  # Adam turns rounding of a gradient near 0 into a step of up to the learning rate
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", ["cpu_ddp", "zero3"])
def test_steps_sorted_by_length_are_those_of_one_process(
    config: str, stage: Stage, hft_fields: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes share the rows of a step, in micro-batches of unequal size; every token weighs alike."""
    fields = hft_fields | {"train_sampling_strategy": "batch_rebalance", "max_steps": 3}
    alone = stage(None, "hft", tmp_path / "alone", per_device_train_batch_size=8, **fields)
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    both = stage(config, "hft", tmp_path / "both", **fields)
    for mine, expected in zip(log_of(both), log_of(alone), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("config", ["cpu_ddp", "zero2", "zero3", "fsdp2"])
def test_hgpo_resumes_under_sharding(config: str, stage: Stage, model_dir: str, data: Path, tmp_path: Path) -> None:
    """Plain generation in every process; groups straddle the two. An epoch is one step under DDP, five elsewhere."""
    fields = {"model_name_or_path": model_dir, "train_data": data, "per_device_train_batch_size": 6}
    fields |= {"gradient_accumulation_steps": 2, "num_generations": 4, "max_completion_length": 8, "beta": 0.04}
    fields |= {"train_split": "train[:8]" if config == "cpu_ddp" else "train"}
    whole = stage(config, "hgpo", tmp_path / "whole", **fields)
    resumed = stage(config, "hgpo", tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-1", **fields)
    assert log_of(resumed) == log_of(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_hgpo_resumes_within_a_later_epoch(stage: Stage, model_dir: str, data: Path, tmp_path: Path) -> None:
    """Three steps an epoch, in two processes; the fourth of six is within the second."""
    fields = {"model_name_or_path": model_dir, "train_data": data, "train_split": "train[:6]", "max_steps": 6}
    fields |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}
    whole = stage("cpu_ddp", "hgpo", tmp_path / "whole", **fields)
    resumed = stage("cpu_ddp", "hgpo", tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-4", **fields)
    assert log_of(resumed) == log_of(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
def test_hft_resumes_within_a_later_epoch(
    strategy: str, stage: Stage, hft_fields: dict[str, Any], tmp_path: Path
) -> None:
    """Two steps an epoch; the third of five is the middle of the second."""
    fields = hft_fields | {"per_device_train_batch_size": 2, "train_split": "train[:8]", "max_steps": 5}
    fields |= {"train_sampling_strategy": strategy}
    whole = stage("cpu_ddp", "hft", tmp_path / "whole", **fields)
    resumed = stage("cpu_ddp", "hft", tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-3", **fields)
    assert log_of(resumed) == log_of(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_processes_with_folders_of_their_own_resume_from_the_same_checkpoint(
    launch: Launch, hft_fields: dict[str, Any], tmp_path: Path
) -> None:
    """Each process stands for a node. Process 0 alone writes weights, so the other has no whole checkpoint at first."""
    fields = SETTINGS | hft_fields | {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    printed = launch("cpu_ddp", "tests/node_local_worker.py", tmp_path, *argv(fields))
    first, second = (json.loads((tmp_path / f"{process}.json").read_text(encoding="utf-8")) for process in range(2))
    assert first["refused"] == second["refused"]
    assert "checkpoint-3 is for process 0, and is not for process 1 (it has no complete.json" in first["refused"]
    assert "copy checkpoint-3 of process 0 into the others' output_dir" in first["refused"]
    assert "Resuming from run/checkpoint-2" in printed
    assert first["same"], "the same log and weights as without the interruption"


def test_groups_straddle_two_processes(stage: Stage, model_dir: str, data: Path, tmp_path: Path) -> None:
    """N = 4 and 6 rows per process and micro-batch: every other group begins on one process and ends on the next."""
    fields = {"model_name_or_path": model_dir, "train_data": data, "max_completion_length": 8, "save_strategy": "no"}
    fields |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_generations": 4}
    fields |= {"eval_data": data, "eval_prompts": 5, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    folder = stage("cpu_ddp", "hgpo", tmp_path / "run", per_device_eval_batch_size=2, log_completions=True, **fields)
    assert any("eval_hgpo/hybrid_accuracy" in entry for entry in log_of(folder))

    table = pd.read_parquet(folder / "completions" / "completions_00001.parquet")
    assert len(table) == 24, "6 rows x 2 micro-batches x 2 processes"
    assert table["mode"].tolist() == ["think", "think", "no_think", "no_think"] * 6
    for mode, completion in zip(table["mode"], table["completion"], strict=True):
        assert completion[0]["content"].startswith(f"<{mode}>")
    for _, group in table.groupby(table.index // 4):
        assert len({prompt[0]["content"] for prompt in group["prompt"]}) == 1


def test_a_reward_model_is_whole_in_every_process(
    stage: Stage, model_dir: str, reward_model_dir: str, prompts: Dataset, tmp_path: Path
) -> None:
    """Under ZeRO-3, which shards what is loaded: a sharded model cannot score the rows of one process."""
    answers = [None if row % 2 else answer for row, answer in enumerate(prompts["answer"])]
    prompts.remove_columns("answer").add_column("answer", answers).to_parquet(tmp_path / "mixed.parquet")
    fields = {"model_name_or_path": model_dir, "train_data": tmp_path / "mixed.parquet", "max_completion_length": 8}
    fields |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_generations": 4}
    folder = stage("zero3", "hgpo", tmp_path / "run", reward_model=reward_model_dir, save_strategy="no", **fields)
    assert all("rewards/reward_model/mean" in entry for entry in log_of(folder) if "loss" in entry)


def test_processes_that_do_not_divide_the_groups(stage: Stage, model_dir: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"per_device_train_batch_size=3 x 2 processes x steps_per_generation=1 = 6"
    ):
        stage("cpu_ddp", "hgpo", tmp_path, model_name_or_path=model_dir, train_data=data, per_device_train_batch_size=3)
