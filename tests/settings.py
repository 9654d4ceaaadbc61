"""Settings that tests share: short trainings on a CPU, and a reward that needs no answer."""

from collections.abc import Mapping
from typing import Any

# Nothing is saved, reported or shown; a test that is about one of these overrides it.
ON_CPU: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip


def argv(fields: Mapping[str, Any]) -> list[str]:
    """Fields of a stage as the words of its command line."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def lottery(completions: list, **kwargs: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(row % 3) for row in range(len(completions))]


# Rollouts of two queries with eight responses each, and one step on them.
TWO_QUERIES = ON_CPU | {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8,
    "max_completion_length": 12, "beta": 0.0, "max_steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


def rollout_of_two_queries(trainer: Any, data: Any) -> dict[str, Any]:
    """The rollout of the first two queries of a data set, with the settings of `TWO_QUERIES`."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{**data[query]} for query in range(2) for _ in range(8)])


# Transformers' continuous batching takes 12 GB for its cache unless it is told how much it needs.
CONTINUOUS_BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 512},
}

VLLM_SERVER = {  # environment of a vLLM server in the tests
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # a loaded machine may pause for longer than its 5 seconds
}
