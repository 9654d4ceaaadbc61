"""Checks of data before any long work."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational


def check_dataset(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check prompts before any long work.

    Args:
        name: of the argument, for the messages.
        dataset: map-style data sets are read through once; of a stream only the columns and the first row.
        tokenizer: must have a chat template if the prompts are conversations.

    Raises:
        ValueError: not a data set, no `prompt` column, no rows, an empty prompt, a column `response`, images, or no
            chat template.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"{name} must be a datasets.Dataset or IterableDataset; got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty. Give it at least one row with a `prompt`.")
    if "prompt" not in first:
        raise ValueError(
            f"{name} has no column `prompt`; its columns are {sorted(first)}. Rename the one that holds it."
        )
    if "response" in first:
        raise ValueError(
            f"{name} has a column `response`, the name under which reward functions get the parts of a response. "
            "Rename or remove it."
        )
    if "image" in first or "images" in first:
        raise NotImplementedError(f"{name} has images; HGPOTrainer trains text-only models. Remove the column.")
    prompts = dataset["prompt"] if isinstance(dataset, Dataset) else [first["prompt"]]
    for row, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else (prompt[-1].get("content") if prompt else None)
        if not text or (isinstance(text, str) and not text.strip()):
            raise ValueError(f"{name} has an empty `prompt` in row {row}. Remove the row.")
    if is_conversational({"prompt": first["prompt"]}) and tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer has no chat template, but the prompts of {name} are conversations. Install one with "
            "hgpo_trl.chat_template.set_chat_template(tokenizer), or give prompts as plain text."
        )
