"""What the benchmarks of training share: responses of given lengths, the same for every trainer, and a small model.

Distributions of response lengths, in tokens:

    log-normal   think: log-normal, mean 4,000, sigma 0.6, at most 16,000; no think: the same with mean 400; both
                 divided by `scale`
    embedded     the chain-sum task's own
    equal        every response as long as the others: 1,280 divided by `scale`

All responses are well formed, so that they are taken apart, scored and compared like real ones.
"""

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from hgpo_trl.modes import mode_tokens
from hgpo_trl.tasks.embedded import build_model, build_tokenizer, load_task

TASK = load_task("hgpo_trl.tasks.chain_sum")
SHORTEST = 5  # <think> word </think> answer <eos>


@dataclass(frozen=True)
class Case:
    """One setting: the lengths, the rows of a generation batch (= optimizer step), and the model."""

    lengths: str = "log-normal"
    rows: int = 64
    group: int = 8  # N
    scale: float = 40.0  # divides the log-normal and the equal lengths
    hidden_size: int = 128
    layers: int = 4
    vocabulary: int | None = None  # None: the tokenizer's few words
    micro_batch: int = 4


def log_normal(rng: np.random.Generator, think: bool, scale: float = 1.0, cap: int = 16_000) -> int:
    """Tokens of one response."""
    mean, sigma = (4000 if think else 400), 0.6
    return round(min(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), cap) / scale)


def _embedded(rng: np.random.Generator, think: bool, scale: float) -> int:
    levels = [level for level, weight in TASK.LEVELS.items() for _ in range(weight)]
    return 11 + 5 * int(rng.choice(levels)) if think else SHORTEST - 1


def _equal(rng: np.random.Generator, think: bool, scale: float) -> int:
    return round(1280 / scale)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, bool, float], int]] = {
    "log-normal": log_normal,
    "embedded": _embedded,
    "equal": _equal,
}


def completions(case: Case, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """One response per row, each group's think half first."""
    rng, tags = np.random.default_rng(0), mode_tokens(tokenizer)
    words = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows = []
    for row in range(case.rows):
        think = row % case.group < case.group // 2
        length = max(SHORTEST - (not think), DISTRIBUTIONS[case.lengths](rng, think, case.scale))
        filler = words[(row + np.arange(length)) % len(words)].tolist()
        if think:
            ids = [tags.think, *filler[: length - 4], tags.end_think, filler[0], tokenizer.eos_token_id]
        else:
            ids = [tags.no_think, *filler[: length - 3], tags.end_no_think, tokenizer.eos_token_id]
        rows.append(ids)
    return rows


def every_third(completions: list, **kwargs: Any) -> list[float]:
    """A reward that costs nothing and differs within every group."""
    return [float(row % 3 == 0) for row in range(len(completions))]


def untrained(case: Case, tokenizer: PreTrainedTokenizerFast, longest: int) -> LlamaForCausalLM:
    """The case's model, for responses of `longest` tokens at most."""
    model = build_model(
        tokenizer, hidden_size=case.hidden_size, num_layers=case.layers, max_length=longest + 64, num_heads=4
    )
    if case.vocabulary is not None:
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
    return model


def build(
    trainer: Callable[..., Any], config: type[GRPOConfig], case: Case, output_dir: str | Path, **settings: Any
) -> Any:
    """A trainer on an untrained Llama whose optimizer step covers one generation batch, with its `completions`."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(TASK)
    responses = completions(case, tokenizer)
    longest = max(map(len, responses))
    model = untrained(case, tokenizer, longest)
    common = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.rows // case.micro_batch,
        "num_generations": case.group,
        "max_completion_length": longest,
        "loss_type": "dr_grpo",
        "beta": 0.0,
        "learning_rate": 1e-6,
        "max_steps": 10_000,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    data = Dataset.from_dict({"prompt": [" ".join(["a", "=", "1"] * 2)] * max(case.rows, 8)})
    built = trainer(model, every_third, config(**(common | settings)), data, processing_class=tokenizer)
    built.completions = responses
    return built


CASE_COLUMNS: dict[str, Callable[[dict], Any]] = {  # of `markdown_table`: what says which case a row is
    "lengths": lambda r: r["lengths"],
    "rows": lambda r: r["rows"],
    "N": lambda r: r["group"],
    "tokens per response": lambda r: f"{r['mean_length']:.0f}",
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
}


def markdown_table(columns: dict[str, Callable[[dict], Any]], rows: Iterable[dict]) -> str:
    """Columns are `{header: cell of a row}`; the first one is text, the others are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "| :-- " + "| --: " * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine(precision: str = "fp32") -> str:
    """Processor and versions, for the table."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = found.group(1) if found else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers"))
    return f"{processor}, one thread, {precision}; {versions}."


def publish(
    name: str, rows: list[dict], table: str, figure: Figure, args: argparse.Namespace, precision: str = "fp32"
) -> None:
    """Write results.json, table.md and the figure; with `update_results` the part of RESULTS.md that is called so."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    text = f"{machine(precision)}\n\n{table}"
    (args.output_dir / "table.md").write_text(text, encoding="utf-8")
    figure.savefig(args.output_dir / f"{name}.png", dpi=160)
    print(text)
    if args.update_results:
        figure.savefig(Path(__file__).parent / "images" / f"{name}.png", dpi=160)
        update_results(name, text)


def update_results(name: str, text: str) -> None:
    """Replace the part of RESULTS.md that is called so."""
    path = Path(__file__).with_name("RESULTS.md")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}{text}{end}{rest.split(end)[1]}", encoding="utf-8")
