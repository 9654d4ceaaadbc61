"""The paper's two baselines (appendix A), from the HFT model and offline samples of both modes:

    hgpo-trl evaluate --config recipes/chain-sum/evaluate_baselines.yaml
    hgpo-trl baselines rft --config recipes/chain-sum/baselines_rft.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m hgpo_trl.scripts.baselines dpo --config recipe.yaml

`rft` fine-tunes on the best response to every query (TRL's SFTTrainer), `dpo` on the best response of the better mode
over the worst of the other (TRL's DPOTrainer). The training set is kept in `output_dir/train.parquet`.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, get_quantization_config

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.files import whole_file
from hgpo_trl.evaluation.baselines import COLUMNS, as_dataset, best_responses, preference_pairs
from hgpo_trl.evaluation.samples import PROMPT_ID, RECORD, SAMPLES, prompts_hash
from hgpo_trl.inference.decoding import set_generation_config
from hgpo_trl.modes import format_of, mode_tokens
from hgpo_trl.modes.chat_template import settle_format
from hgpo_trl.rewards import has_answer
from hgpo_trl.scripts.hft import check as check_for_hft
from hgpo_trl.scripts.hft import fine_tune
from hgpo_trl.scripts.stages import load_tokenizer, lora_config, model_init_kwargs, parse_training, train_and_save
from hgpo_trl.training.checks import DROP_HELP, check_examples, dropped_rows_file, without_dropped
from hgpo_trl.training.lora import prepare_wrapped
from hgpo_trl.training.rows import Renderer
from hgpo_trl.training.run_dir import claim_run_dir


@dataclass
class BaselineArguments:
    """Data of a baseline."""

    samples: str = field(metadata={"help": "Folder of `hgpo-trl evaluate` on train_data: samples of both modes."})
    train_data: str = field(metadata={"help": "Data set that was sampled, with `prompt`: path or hub id."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data."})
    margin: float = field(
        default=0.0, metadata={"help": "δ: bonus of no-think, as in Eq. 8; the paper's baselines: 0."}
    )

    drop_faulty_rows: bool = field(default=False, metadata={"help": DROP_HELP})

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise UserError(f"margin must be a finite number; got {self.margin}.")


def _load_samples(args: BaselineArguments) -> tuple[pd.DataFrame, Dataset]:
    """Load the scored samples, and train_data, whose first rows are their prompts.

    Raises:
        UserError: there are none, they have no scores, or they are of another data set.
    """
    folder = Path(args.samples)
    remedy = f"Run `hgpo-trl evaluate --data {args.train_data} --output_dir {args.samples}` with the HFT model."
    for name in ("report.json", RECORD, SAMPLES):
        if not (folder / name).is_file():
            raise UserError(f"samples={args.samples!r}: there is no {name} in it. {remedy}")
    sampled = json.loads((folder / "report.json").read_text(encoding="utf-8"))["dataset"]
    if sampled != args.train_data:
        raise UserError(f"samples={args.samples!r} are of {sampled!r}, not of train_data={args.train_data!r}. {remedy}")
    samples = pd.read_parquet(folder / SAMPLES)
    if missing := [name for name in COLUMNS if name not in samples]:
        raise UserError(f"samples={args.samples!r}: {SAMPLES} lacks the column {missing[0]}. {remedy}")
    queries = load_data("train_data", args.train_data, args.train_split)
    queries = without_dropped(queries, dropped_rows_file(folder, "data"))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record["num_prompts"] > len(queries):
        raise UserError(
            f"samples={args.samples!r} are of {record['num_prompts']} prompts, but train_data has only "
            f"{len(queries)} rows. Name the data set and the split that were sampled."
        )
    if record["prompts"] != prompts_hash(queries["prompt"][: record["num_prompts"]]):
        raise UserError(
            f"samples={args.samples!r} are not of the prompts that train_data={args.train_data!r} has in "
            f"train_split={args.train_split!r}: another split was sampled, or the data has been built anew. {remedy}"
        )
    return samples, queries


def _build(
    args: BaselineArguments, training_args: SFTConfig | DPOConfig, choose: Callable[..., pd.DataFrame]
) -> Dataset:
    """Build a baseline's training set; the first process keeps a copy in `output_dir`."""
    samples, queries = _load_samples(args)
    answers: Sequence[Any] = queries["answer"] if "answer" in queries.column_names else [None] * len(queries)
    chosen = choose(samples, [has_answer(answer) for answer in answers], args.margin, training_args.seed)
    if not len(chosen):
        raise UserError(
            f"samples={args.samples!r}: no query has a response that is well-formed and not wrong. Train the model "
            "further in Stage I, or draw more samples (samples_per_mode)."
        )
    dataset = as_dataset(chosen, queries)
    if training_args.process_index == 0:
        with whole_file(Path(str(training_args.output_dir)) / "train.parquet") as temporary:
            dataset.to_parquet(temporary)
        print(f"{len(dataset):,} of {samples[PROMPT_ID].nunique():,} sampled queries give an example")
    return dataset


def rft(argv: Sequence[str]) -> None:
    """HFT-RFT: rejection fine-tuning (Eq. 20, 21)."""
    args, training_args, model_args = parse_training(
        argv, "hgpo-trl baselines rft", BaselineArguments, SFTConfig, ModelConfig
    )
    checkpoint = claim_run_dir("rft", training_args, args, model_args)
    dataset = _build(args, training_args, best_responses)
    dropped = dropped_rows_file(training_args.output_dir, "samples") if args.drop_faulty_rows else None
    mode_format = format_of(load_tokenizer(training_args, model_args))
    dataset = check_for_hft(f"samples={args.samples!r}", dataset, training_args, model_args, dropped, mode_format)
    fine_tune(dataset, None, training_args, model_args, checkpoint, mode_format)


def dpo(argv: Sequence[str]) -> None:
    """HFT-DPO: direct preference optimization of one mode over the other (Eq. 17 to 19)."""
    args, training_args, model_args = parse_training(
        argv, "hgpo-trl baselines dpo", BaselineArguments, DPOConfig, ModelConfig
    )
    checkpoint = claim_run_dir("dpo", training_args, args, model_args)
    tokenizer = load_tokenizer(training_args, model_args)
    settle_format(tokenizer)
    tokens = mode_tokens(tokenizer)
    dataset = _build(args, training_args, preference_pairs)
    dataset = check_examples(  # a rejected response may be malformed
        f"samples={args.samples!r}",
        dataset.rename_column("chosen", "completion"),
        Renderer(tokenizer),
        max_length=None,
        dropped=dropped_rows_file(training_args.output_dir, "samples") if args.drop_faulty_rows else None,
        is_main_process=training_args.process_index == 0,
    ).rename_column("completion", "chosen")
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=lora_config(training_args, model_args, tokens),
    )
    set_generation_config(trainer.model, tokenizer)
    if model_args.use_peft:
        prepare_wrapped(trainer.model)
    train_and_save(trainer, checkpoint)


KINDS = {"rft": rft, "dpo": dpo}


def main(argv: Sequence[str]) -> None:
    """Train one baseline in this process."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n`hgpo-trl baselines KIND --help` lists the fields of {' and '.join(KINDS)}.")
        return
    if argv[0] not in KINDS:
        print(f"hgpo-trl baselines: error: unknown kind {argv[0]!r}; there are {', '.join(KINDS)}", file=sys.stderr)
        sys.exit(2)
    KINDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_stage(main, "baselines", sys.argv[1:])
