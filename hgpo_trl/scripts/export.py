"""Answer a benchmark's prompts, and write the file that the benchmark's own tool reads.

    hgpo-trl export --tool evalplus --prompts HumanEvalPlus.jsonl --model runs/hgpo --output_dir runs/humaneval
    hgpo-trl export --tool arena_hard --prompts question.jsonl --model my-model --base_url http://127.0.0.1:8000/v1 ...

One response per prompt, in the mode that the model picks or in a given one; only its answer part is handed over.
The same command resumes after an interruption. docs/harnesses.md says how each tool reads the file.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.fingerprints import model_fingerprint
from hgpo_trl.evaluation.harnesses import (
    HARNESSES,
    Answer,
    answer_all,
    check_chat_server,
    closing_message,
    local_answers,
    read_prompts,
    served_answers,
    write_for,
)
from hgpo_trl.inference.generate import AUTO, HybridModel, check_settings
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.model_dir import check_model_path
from hgpo_trl.training.run_dir import RESPONSES, claim_results, describe_run


@dataclass
class ExportArguments:
    """Prompts, model and tool."""

    tool: str = field(metadata={"help": f"Tool that reads the file: {', '.join(HARNESSES)}."})
    prompts: str = field(metadata={"help": "The tool's own file of prompts."})
    model: str = field(metadata={"help": "Hybrid-reasoning model: path or hub id; with base_url its name there."})
    output_dir: str = field(metadata={"help": "Folder for the tool's file and for responses.jsonl."})
    name: str | None = field(default=None, metadata={"help": "Model's name in the tool; null: the end of model."})
    mode: str = field(default=AUTO, metadata={"help": "auto: the model picks; think, no_think: for every response."})
    base_url: str | None = field(
        default=None, metadata={"help": "Ask the server of `hgpo-trl serve` there (…/v1) instead of Transformers."}
    )
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature (paper: 0.6); 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling (paper: 0.95)."})
    max_new_tokens: int = field(default=35_000, metadata={"help": "Tokens per response (paper: 35,000)."})
    batch_size: int = field(default=64, metadata={"help": "Responses generated, or requests sent, at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32, bfloat16; not with base_url."})

    def __post_init__(self) -> None:
        if self.tool not in HARNESSES:
            raise UserError(
                f"tool must be one of {', '.join(HARNESSES)}; got {self.tool!r}. lighteval asks the model itself: see "
                "docs/harnesses.md."
            )
        check_settings(self.mode, 0.0, self.max_new_tokens, self.temperature, self.top_p)
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {self.batch_size}.")
        if not self.model_name or "/" in self.model_name:
            raise UserError(f"name={self.model_name!r} becomes a file's name: give one without a slash.")
        if self.base_url is not None and find_spec("openai") is None:
            raise UserError("base_url needs the package openai: pip install openai, or leave base_url out.")

    @property
    def model_name(self) -> str:
        """The model's name in the tool."""
        return Path(self.model).name if self.name is None else self.name


def _run(args: ExportArguments, messages: Mapping[str, str]) -> dict[str, Any]:
    """Fields that decide the responses; server, batch size and the name in the tool do not."""
    free = ("base_url", "batch_size", "name", "output_dir")
    run = {key: value for key, value in describe_run("export", args).items() if key not in free}
    run["messages"] = xxhash.xxh3_128_hexdigest(json.dumps(messages, sort_keys=True).encode())
    if args.base_url is None:
        run["model_files"] = model_fingerprint(args.model)
    return run


def _respond(args: ExportArguments, total: int, pending: Mapping[str, str]) -> Iterator[Answer]:
    """Load the model, or find it on its server, and answer the pending ones of `total` prompts."""
    settings: dict[str, Any] = {
        "mode": args.mode,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    if args.base_url is None:
        model = HybridModel.from_pretrained(args.model, dtype=args.dtype)
        return local_answers(model, pending, total=total, **settings)
    from openai import OpenAI

    client = OpenAI(base_url=args.base_url, api_key="none", timeout=None)  # a long response takes as long as it takes
    check_chat_server(client, args.base_url, args.model)
    return served_answers(client, args.model, pending, **settings)


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(ExportArguments, prog="hgpo-trl export").parse_recipe(argv)
    prompts = read_prompts(args.tool, Path(args.prompts))
    if args.base_url is None:
        check_model_path("model", args.model)
    output_dir = Path(args.output_dir)
    messages = {key: HARNESSES[args.tool].message(row) for key, row in prompts.items()}
    claim_results(output_dir, _run(args, messages))
    answers = answer_all(messages, output_dir / RESPONSES, partial(_respond, args, len(messages)))
    path = write_for(args.tool, prompts, answers, args.model_name, output_dir)
    print(closing_message(args.tool, answers.values(), path, args.mode))


if __name__ == "__main__":
    run_stage(main, "export", sys.argv[1:])
