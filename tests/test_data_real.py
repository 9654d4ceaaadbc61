"""Both builders on real files, and Stage I on what came out; skipped where the files are not there."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from tokenizers_zoo import qwen2, tiny_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hgpo_trl.common.data_files import load_data
from hgpo_trl.modes import TAGS, split_response
from hgpo_trl.scripts import data, hft

BENCHMARKS = ("math500", "aime24", "amc", "olympiadbench", "gsm8k")


def recipe(root: Path, files: Path, kind: str, sources: dict[str, dict[str, Any]], **fields: Any) -> Path:
    """A recipe on real files; the tokenizer is byte level, so that it can count anything."""
    if not (root / "base").exists():
        tokenizer = qwen2()
        tokenizer.save_pretrained(root / "base")
        torch.manual_seed(0)
        tiny_qwen2(len(tokenizer)).save_pretrained(root / "base")
    content = {
        "sources": [{"path": str(files / f"{name}.json"), "name": name, **source} for name, source in sources.items()],
        "decontamination": [{"name": name, "path": str(files / f"{name}_test.json")} for name in BENCHMARKS],
        "tokenizer": str(root / "base"),
        "output_dir": str(root / kind),
        "num_processes": 2,
        **fields,
    }
    (root / f"data_{kind}.yaml").write_text(yaml.safe_dump(content))
    return root / f"data_{kind}.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def hft_data(root: Path, shared_data: Path) -> Path:
    """Human solutions and a model's traces as the think part, general instructions as the other."""
    sources: dict[str, dict[str, Any]] = {
        "aime_train": {
            "domain": "maths",
            "fields": {"prompt": "problem", "reasoning": "solution", "answer": "answer", "reference": "answer"},
        },
        "reasoning_traces": {
            "domain": "maths",
            "fields": {
                "prompt": "problem", "reasoning": "message_thinking", "answer": "message_content",
                "reference": "gtruth_answer",
            },
        },
        "general_queries": {"domain": "general", "fields": {"prompt": "instruction", "answer": "output"}},
    }  # fmt: skip
    data.main(["hft", "--config", str(recipe(root, shared_data, "hft", sources, max_tokens=4096))])
    return root / "hft"


def test_hft_data(hft_data: Path, shared_data: Path) -> None:
    rows = load_data("train_data", str(hft_data))
    manifest = json.loads((hft_data / "manifest.json").read_text())
    removed = pd.read_parquet(hft_data / "removed.parquet")
    read = sum(len(json.loads((shared_data / f"{name}.json").read_text())) for name in manifest["sources"])
    assert len(rows) + len(removed) == read == 975 + 5 + 999
    assert len(rows) > 1_700
    for row in rows:
        response = split_response(row["completion"][0]["content"])
        assert response.well_formed
        assert response.mode == row["mode"] == ("no_think" if row["source"] == "general_queries" else "think")
    hits = removed[removed["step"] == "decontamination"]
    assert Counter(json.loads(detail)["benchmark"] for detail in hits["detail"]) == manifest["decontamination"]
    benchmark = json.loads((shared_data / "math500_test.json").read_text())
    kept = {row["prompt"][-1]["content"] for row in rows}
    assert not kept & {row["problem"] for row in benchmark}
    assert {row["problem"] for row in benchmark} & {
        row["problem"] for row in json.loads((shared_data / "aime_train.json").read_text())
    }, "or nothing was there to be found"
    lengths = manifest["tokens"]
    assert lengths["think"]["max"] <= 4096
    assert sum(lengths["no_think"]["histogram"]["counts"]) == manifest["rows"]["mode"]["no_think"]
    assert (hft_data / "token_lengths.png").stat().st_size > 5_000


def test_stage_one_trains_on_it(hft_data: Path, root: Path) -> None:
    """From scratch, packed, with the chat template: both modes are learnt from, and all weights move."""
    before = AutoModelForCausalLM.from_pretrained(root / "base").state_dict()
    fields = {
        "model_name_or_path": root / "base", "train_data": hft_data, "output_dir": root / "run", "packing": True,
        "max_length": 512, "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "attn_implementation": "sdpa",
    }  # fmt: skip
    hft.main([word for key, value in fields.items() for word in (f"--{key}", str(value))])
    losses = [
        e["loss"] for e in json.loads((root / "run" / "trainer_state.json").read_text())["log_history"] if "loss" in e
    ]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    after = AutoModelForCausalLM.from_pretrained(root / "run").state_dict()
    assert not any(torch.equal(value, after[name][: len(value)]) for name, value in before.items() if value.ndim > 1)
    tokenizer = AutoTokenizer.from_pretrained(root / "run")
    assert all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in TAGS)


def test_hgpo_data(root: Path, shared_data: Path) -> None:
    """Problems with their answers for the rule, queries without for a reward model."""
    sources: dict[str, dict[str, Any]] = {
        "math_train": {
            "domain": "maths",
            "fields": {"prompt": "problem", "reference": "answer", "level": "difficulty"},
            "rows": 1_000,
        },
        "general_queries": {"domain": "general", "fields": {"prompt": "instruction"}, "rows": 500},
    }
    data.main(["hgpo", "--config", str(recipe(root, shared_data, "hgpo", sources))])
    rows = load_data("train_data", str(root / "hgpo"))
    assert Counter(rows["domain"]) == {"maths": 1_000, "general": 500}
    problems = {row["problem"]: row for row in json.loads((shared_data / "math_train.json").read_text())}
    for row in rows:
        if row["domain"] == "general":
            assert (row["answer"], row["level"]) == (None, None)
        else:
            problem = problems[row["prompt"][0]["content"]]
            assert (row["answer"], row["level"]) == (problem["answer"], str(problem["difficulty"]))
    manifest = json.loads((root / "hgpo" / "manifest.json").read_text())
    assert manifest["decontamination"]["math500"] > 0
    assert manifest["tokens"]["prompt"]["mean"] > 10
