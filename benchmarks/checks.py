"""What the check of all rows costs, against tokenising the same rows.

    TOKENIZERS_PARALLELISM=false python benchmarks/checks.py --data FOLDER [--rows 100000] [--output_dir FOLDER]

FOLDER holds aime_train.json, math_train.json, general_queries.json and reasoning_traces.json (lists of problems with
solutions, instructions with answers, and traces). Their texts are repeated, each time with a number of its own in the
prompt, until there are enough rows. The tokenizer is a byte-level BPE of 32,000 tokens with Qwen2's pre-tokenizer,
trained on these texts, with ChatML turns.

Measured in processor time, one after the other in one process with one thread: `check_rows` with the share of rows that
are cut off, as a
stage calls them; rendering; and the tokenizer on the rendered texts. The ratio is that of the first to the last; all
three grow linearly with the number of rows. Appends to results.jsonl and writes table.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from hgpo_trl.modes import add_mode_tokens, format_response
from hgpo_trl.modes.chat_template import set_chat_template
from hgpo_trl.training.checks import check_rows, share_beyond
from hgpo_trl.training.rows import EXAMPLES, PROMPTS, Renderer

VOCABULARY = 32_000
MAX_LENGTH = 1_024
Pair = tuple[str, str | None]  # prompt and completion


def load(folder: Path) -> dict[str, list[Pair]]:
    """Name of a kind of rows -> prompts with completions."""

    def rows(name: str) -> list[dict[str, Any]]:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    chats = [
        (f"{row['instruction']}\n\n{row['input']}".strip(), format_response("no_think", row["output"]))
        for row in rows("general_queries")
        if row["output"].strip()
    ]
    solutions = [
        (row["problem"], format_response("think", row["answer"], row["solution"])) for row in rows("aime_train")
    ]
    traces = [
        (row["problem"], format_response("think", row["message_content"], row["message_thinking"]))
        for row in rows("reasoning_traces")
    ]
    short = [pair for pairs in zip(solutions, chats, strict=False) for pair in pairs]
    # 60 % think, as in the paper's mix
    paper = [
        pair for i in range(200) for pair in (*(traces[(3 * i + j) % 5] for j in range(3)), *chats[2 * i : 2 * i + 2])
    ]
    return {
        "chats, no think": chats,
        "maths solutions, think": solutions,
        "half chats, half solutions": short,
        "60 % traces, 40 % chats": paper,
        "maths prompts alone": [(row["problem"], None) for row in rows("math_train")],
    }


def build_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE as Qwen2's, trained on the texts."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=trained.get_vocab(), merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    add_mode_tokens(tokenizer)
    set_chat_template(tokenizer)
    return tokenizer


def build_rows(pairs: list[Pair], count: int) -> Dataset:
    def row(number: int, prompt: str, completion: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt": [{"role": "user", "content": f"{prompt} (No. {number})"}]}
        return found if completion is None else found | {"completion": [{"role": "assistant", "content": completion}]}

    return Dataset.from_list([row(number, *pair) for number, pair in enumerate(islice(cycle(pairs), count))])


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Microseconds per row of the check, of rendering and of tokenising, and tokens per row."""
    columns = EXAMPLES if "completion" in dataset.column_names else PROMPTS

    def check() -> None:
        renderer = Renderer(tokenizer)
        _, lengths = check_rows("data", dataset, renderer, columns)
        share_beyond(dataset, lengths, MAX_LENGTH, renderer)

    checking, _ = seconds(check)
    renderer = Renderer(tokenizer)
    rendering, texts = seconds(lambda: [renderer.text(row) for row in dataset])
    tokenising, encoded = seconds(
        lambda: [tokenizer(texts[i : i + 1000])["input_ids"] for i in range(0, len(texts), 1000)]
    )
    tokens = sum(len(ids) for batch in encoded for ids in batch)
    found = {"check": checking, "rendering": rendering, "tokenising": tokenising}
    return {name: 1e6 * value / len(dataset) for name, value in found.items()} | {"tokens": tokens / len(dataset)}


def table(results: list[dict[str, Any]]) -> str:
    header = ["rows", "number", "tokens a row", "check, µs", "rendering, µs", "tokenising, µs", "check / tokenising"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for result in results:
        cells = [result["kind"], f"{result['rows']:,}", f"{result['tokens']:,.0f}"]
        cells += [f"{result[name]:,.0f}" for name in ("check", "rendering", "tokenising")]
        lines.append(" | ".join([*cells, f"{result['check'] / result['tokenising']:.3f}"]))
    return "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/checks"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kinds = load(args.data)
    tokenizer = build_tokenizer(text for pairs in kinds.values() for pair in pairs for text in pair if text)
    path = args.output_dir / "results.jsonl"
    for kind, pairs in kinds.items():
        result = {"kind": kind, "rows": args.rows, **measure(build_rows(pairs, args.rows), tokenizer)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(table([result]), flush=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    (args.output_dir / "table.md").write_text(table([json.loads(line) for line in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
