"""examples/local_data: built with the command, offline; what docs/data.md says of its faulty rows is so."""

import importlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from hgpo_trl.common.data_files import load_data
from hgpo_trl.modes import split_response

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "local_data"


def build(kind: str, output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, pd.DataFrame]:
    """The data set as training loads it, and what was removed."""
    monkeypatch.chdir(ROOT)  # the recipe's paths are the repository's
    main = importlib.import_module("hgpo_trl.scripts.data").main
    main([kind, "--config", str(EXAMPLE / f"{kind}.yaml"), "--output_dir", str(output_dir)])
    return load_data("train_data", str(output_dir)), pd.read_parquet(output_dir / "removed.parquet")


def documented() -> dict[str, str]:
    """Row of the example -> step (and reason) that docs/data.md gives for its removal."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([mc]\d\d)` \| .* \| (.*) \|$", text, re.MULTILINE)
    return dict(rows)


def test_hft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, removed = build("hft", tmp_path, monkeypatch)
    expected = documented()
    assert len(expected) == 8
    early = {"maths": ["empty_field", "invalid_json"], "chat": ["empty_field"]}
    schema = removed[removed["step"] == "schema"]  # no examples yet: they are named by file and place
    assert schema.groupby("source")["reason"].apply(list).to_dict() == early
    late = removed[removed["step"] != "schema"]
    found = {
        row: f"{step}: `{reason}`" for row, step, reason in zip(late["id"], late["step"], late["reason"], strict=True)
    }
    assert found == {row: said for row, said in expected.items() if not said.startswith("schema")}
    assert [row for row, said in expected.items() if said == "schema: `empty_field`"] == ["m13", "c13"]
    assert {"m03", "m04"} <= set(dataset["id"]), "they differ in a number"
    read = sum(len((EXAMPLE / name).read_text(encoding="utf-8").splitlines()) for name in ("maths.jsonl", "chat.jsonl"))
    assert len(dataset) + len(removed) == read
    for row in dataset:
        response = split_response(row["completion"][0]["content"])
        assert response.well_formed
        assert response.mode == ("think" if row["id"].startswith("m") else "no_think")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"> {len(dataset):,} rows of {read:,} read from 2 sources." in card
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["sources"].keys() == {"maths", "chat"}


def test_hgpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, removed = build("hgpo", tmp_path, monkeypatch)
    assert set(removed["id"]) == {"p10", "p11"}
    answers = dict(zip(dataset["id"], dataset["answer"], strict=True))
    assert answers["p06"] == "4/5"
    assert answers["p08"] is None, "a limerick has no reference answer"
