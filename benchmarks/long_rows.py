"""Peak memory of an optimizer step on long rows with a large vocabulary, HGPO and HFT against stock TRL.

    python benchmarks/long_rows.py [--lengths 1024 2048 4096 8192] [--chunk 4096] [--update_results]
                                   [--output_dir runs/benchmarks/long-rows]

The logits of a row of 8,192 tokens are 1.5 GiB with 49,152 words in fp32, and a loss on whole logits needs them several
times. TRL computes log-probabilities in chunks of tokens instead, so that memory stops growing with the logits once a
row is longer than a chunk; this shows that HGPO and HFT do, too. Rows are all as long as each other, one to a
micro-batch. The model is as small as can be: what grows with the row is the loss. Memory is what a step's resident
memory rises to above that of the trainer before it, each in a process of its own (Linux). Writes results.json, table.md
and long_rows.png, and with --update_results the section of benchmarks/RESULTS.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from fixed_rollouts import TASK, Case, build_tokenizer, completions, markdown_table, publish, untrained
from matplotlib.figure import Figure
from micro_batches import one_step, peak_memory
from tqdm.auto import tqdm
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob

from hgpo_trl.training.hft import HFTTrainer

VOCABULARY = 49_152  # of SmolLM2
SUPERVISED = {"stock SFT": SFTTrainer, "HFT": HFTTrainer}
SAMPLED = {"stock GRPO": "stock", "HGPO": "ours"}


def long_case(length: int) -> Case:
    """Four rows of so many tokens, two in each mode."""
    return Case(
        "equal", rows=4, group=4, scale=1280 / length, hidden_size=32, layers=1, micro_batch=1, vocabulary=VOCABULARY
    )


def supervised_step(trainer_class: type[SFTTrainer], length: int) -> Callable[[str], Callable[[], Any]]:
    """What `peak_memory` measures of Stage I: an optimizer step of the same rows."""

    def prepare(directory: str) -> Callable[[], Any]:
        case, tokenizer = long_case(length), build_tokenizer(TASK)
        model = untrained(case, tokenizer, length)
        config = SFTConfig(
            output_dir=directory, per_device_train_batch_size=case.micro_batch, gradient_accumulation_steps=case.rows,
            max_length=None, max_steps=1, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in completions(case, tokenizer)]
        return trainer_class(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train

    return prepare


def measure(length: int) -> dict[str, Any]:
    """MiB of a step of each trainer, and of the logits of one row."""
    return {
        "length": length,
        "logits": length * VOCABULARY * 4 / 2**20,
        **{name: peak_memory(supervised_step(trainer, length)) for name, trainer in SUPERVISED.items()},
        **{name: peak_memory(one_step(kind, long_case(length))) for name, kind in SAMPLED.items()},
    }


TRAINERS = [*SUPERVISED, *SAMPLED]
COLUMNS: dict[str, Callable[[dict], Any]] = {
    "tokens of a row": lambda r: f"{r['length']:,}",
    "its logits": lambda r: f"{r['logits']:,.0f} MiB",
    **{name: lambda r, name=name: f"{r[name]:,.0f} MiB" for name in TRAINERS},
}


def draw(results: list[dict[str, Any]]) -> Figure:
    """Memory over the length of a row, beside that of whole logits."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    lengths = [row["length"] for row in results]
    axes.plot(lengths, [row["logits"] for row in results], color="#999999", linestyle="--", label="logits of one row")
    for name, marker in zip(TRAINERS, "osv^", strict=True):
        axes.plot(lengths, [row[name] for row in results], marker=marker, label=name)
    axes.set(xlabel="tokens of a row", ylabel="MiB", xticks=lengths, ylim=(0, None))
    axes.set_title("Peak memory of a step, 49,152 words", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of a row")
    parser.add_argument("--chunk", type=int, default=chunked_logprob.TOKEN_CHUNK_SIZE, help="tokens of TRL's chunks")
    parser.add_argument("--update_results", action="store_true", help="write benchmarks/RESULTS.md and its figure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/long-rows"))
    args = parser.parse_args()
    chunked_logprob.TOKEN_CHUNK_SIZE = args.chunk
    results = [measure(length) for length in tqdm(args.lengths, desc="lengths")]
    publish("long_rows", results, markdown_table(COLUMNS, results), draw(results), args)


if __name__ == "__main__":
    main()
