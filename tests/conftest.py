"""A tiny chain-sum model, untrained, and its prompts."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.tasks.embedded import build_model, build_tokenizer, draw, load_task, prompt_dataset

TASK = load_task("hgpo_trl.tasks.chain_sum")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TASK)


@pytest.fixture(scope="session")
def model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model of 16 dimensions, saved with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model: LlamaForCausalLM = build_model(tokenizer, hidden_size=16, num_heads=2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    """32 prompts of the training part, with answer and level."""
    return prompt_dataset(draw(TASK, 32, held_out=False, fraction=0.2, seed=0))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real problems and answers beside the checkout; the test is skipped where there are none."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data: ../shared/data is missing")
    return path
