"""The dataset card: what the hub and `load_dataset` read of it, what it says, and its figures."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard

from hgpo_trl.common.data_files import load_data
from hgpo_trl.data.card import write_card

PNG = b"\x89PNG\r\n\x1a\n"
NO_BREAK = "\u00a0"


def statistics(seed: int, mean: float, rows: int) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).lognormal(np.log(mean), 0.8, rows).round() + 1
    edges = np.geomspace(1, tokens.max() + 1, 33)
    counts, _ = np.histogram(tokens, edges)
    return {
        "mean": float(tokens.mean()), "median": float(np.median(tokens)), "p95": float(np.quantile(tokens, 0.95)),
        "max": int(tokens.max()), "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }  # fmt: skip


def source(path: str, licence: str | None, mode: str, domain: str, read: int, **dropped: dict[str, int]) -> Any:
    return {
        "path": path, "licence": licence, "mode": mode, "domain": domain, "rows_read": read,
        "steps": [{"name": name, "dropped": reasons} for name, reasons in dropped.items()],
        "kept": read - sum(sum(reasons.values()) for reasons in dropped.values()),
    }  # fmt: skip


SOURCES = {
    "chat": source(
        "allenai/WildChat-1M", "odc-by", "no_think", "general", 5000,
        schema={"null_messages": 12}, language={"not_english": 1988}, deduplication={"exact": 700, "near": 300},
    ),
    "maths": source(
        "open-r1/OpenR1-Math-220k", "apache-2.0", "think", "maths", 4000,
        schema={}, language={}, deduplication={"exact": 500}, decontamination={"contaminated": 60},
    ),
    "code": source(
        "KodCode/KodCode-V1", "cc-by-nc-4.0", "think", "code", 1000, schema={}, answers={"wrong_answer": 140}
    ),
    "ours": source("/home/somebody/private/ours.jsonl", None, "think", "maths", 10, schema={"no_trace": 10}),
}  # fmt: skip
MANIFEST = {
    "stage": "hft",
    "recipe": {"output_dir": "out", "max_tokens": 32768, "sources": [{"name": "chat", "rows": 5000}]},
    "seed": 0,
    "versions": {"hgpo-trl": "0.1.0", "datasets": "5.2.0"},
    "sources": SOURCES,
    "bytes": 12_345,
    "rows": {
        "mode": {"think": 4300, "no_think": 2000},
        "domain": {"general": 2000, "maths": 3440, "code": 860},
        "source": {name: entry["kept"] for name, entry in SOURCES.items()},
    },
    "tokens": {"think": statistics(0, 3000, 4300), "no_think": statistics(1, 300, 2000)},
    "duplicates": {"exact": 1200, "near": 300},
    "decontamination": {"MATH-500": 41, "AIME24": 19},
}


@pytest.fixture
def manifest() -> Any:
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def card(manifest: Any, tmp_path: Path) -> str:
    write_card(tmp_path / "out", manifest)
    return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def rows_of(card: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its header."""
    lines = card.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_the_hub_reads_it(card: str, tmp_path: Path) -> None:
    data = DatasetCard.load(tmp_path / "out" / "README.md").data
    assert data.license == ["apache-2.0", "cc-by-nc-4.0", "odc-by"], "of sources of which rows are left"
    assert data.language == ["en"]
    assert data.size_categories == ["1K<n<10K"]
    assert {"hft", "maths", "code", "general"} <= set(data.tags)


@pytest.mark.parametrize(
    ("rows", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (1_694_586, "1M<n<10M"), (10**7, "10M<n<100M")]
)
def test_size_category(rows: int, size: str, manifest: Any, tmp_path: Path) -> None:
    manifest["rows"]["source"] = {"chat": rows}
    write_card(tmp_path, manifest)
    assert DatasetCard.load(tmp_path / "README.md").data.size_categories == [size]


def test_the_folder_loads_without_what_was_removed(card: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "data").mkdir()
    ids = ["0"] * 3150 + ["1"] * 3150  # as many as the card says
    for shard in range(2):
        part = Dataset.from_dict({"id": ids[3150 * shard : 3150 * (shard + 1)]})
        part.to_parquet(folder / "data" / f"train-{shard:05}-of-00002.parquet")
    Dataset.from_dict({"id": ["gone"], "reason": ["too_long"]}).to_parquet(folder / "removed.parquet")
    assert load_dataset(str(folder), split="train")["id"][:] == ids
    assert load_data("train_data", str(folder))["id"][:] == ids


def test_every_row_is_accounted_for(card: str) -> None:
    assert f"> {sum(entry['kept'] for entry in SOURCES.values()):,} rows of 10,010 read from 4 sources." in card
    sources = {row[0]: row for row in rows_of(card, "Sources")}
    for name, entry in SOURCES.items():
        assert sources[name][2:] == [
            entry["licence"] or "unknown", entry["mode"].replace("_", " "), entry["domain"],
            f"{entry['rows_read']:,}", f"{entry['kept']:,}",
        ]  # fmt: skip
    assert sources["chat"][1] == "[allenai/WildChat-1M](https://huggingface.co/datasets/allenai/WildChat-1M)"
    removed = [(step, reason, rows) for step, reason, rows, _ in rows_of(card, "What was removed")]
    assert removed == [
        ("schema", "`no_trace`", "10"), ("schema", "`null_messages`", "12"), ("language", "`not_english`", "1,988"),
        ("deduplication", "`exact`", "1,200"), ("deduplication", "`near`", "300"),
        ("decontamination", "`contaminated`", "60"), ("answers", "`wrong_answer`", "140"),
    ]  # fmt: skip
    kept = sum(int(row[-1].replace(",", "")) for row in sources.values())
    assert kept + sum(int(rows.replace(",", "")) for *_, rows in removed) == 10_010


def test_lengths_and_benchmarks(card: str) -> None:
    think, no_think = rows_of(card, "Length")
    for row, mode in ((think, "think"), (no_think, "no_think")):
        expected = [f"{MANIFEST['tokens'][mode][key]:,.0f}" for key in ("mean", "median", "p95", "max")]
        assert row == [mode.replace("_", " "), *expected]
    assert "- MATH-500: 41\n- AIME24: 19" in card
    assert f"think 4,300 (68.3{NO_BREAK}%)" in card


def test_no_path_of_the_machine(card: str) -> None:
    assert "/home/somebody" not in card
    assert "`ours.jsonl`" in card


def test_the_recipe_is_there(card: str) -> None:
    block = card.rpartition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block) == MANIFEST["recipe"]


def test_licences(manifest: Any, tmp_path: Path) -> None:
    def text() -> str:
        write_card(tmp_path, manifest)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    warning = text()
    assert "licences differ: apache-2.0, cc-by-nc-4.0, odc-by" in warning
    assert "Not for commercial use: cc-by-nc-4.0." in warning
    assert "unknown" not in warning.partition("licences differ")[2].partition("\n")[0], "nothing is left of that source"
    manifest["sources"]["ours"]["kept"] = 3
    assert "Where the licence is unknown" in text()
    manifest["sources"] = {"maths": manifest["sources"]["maths"]}
    assert "licences differ" not in text()
    assert "Licence of the source: apache-2.0." in text()


def test_figures(card: str, manifest: Any, tmp_path: Path) -> None:
    for name in ("rows_by_source", "token_lengths"):
        assert f"]({name}.png)" in card
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)


def test_the_same_manifest_gives_the_same_bytes(card: str, manifest: Any, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_card(tmp_path / "out", manifest)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    manifest["sources"]["chat"]["kept"] -= 500
    manifest["sources"]["chat"]["steps"][0]["dropped"]["null_messages"] += 500
    write_card(tmp_path / "out", manifest)
    assert (tmp_path / "out" / "rows_by_source.png").read_bytes() != before["rows_by_source.png"]
    assert (tmp_path / "out" / "token_lengths.png").read_bytes() == before["token_lengths.png"]


def test_prompts_without_a_tokenizer(manifest: Any, tmp_path: Path) -> None:
    """Stage II, and nothing was counted: no length, no picture of it, no mode."""
    manifest |= {"stage": "hgpo", "tokens": {}, "decontamination": {}}
    manifest["rows"]["mode"] = {}
    for entry in manifest["sources"].values():
        entry["mode"] = None
    write_card(tmp_path, manifest)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Length" not in text
    assert "## Overlap" not in text
    assert "By mode" not in text
    assert not (tmp_path / "token_lengths.png").exists()
    assert "Group Policy Optimization" in text
