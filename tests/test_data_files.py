"""Reading data sets: what `datasets` cannot read is explained by the row that differs."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
TRACED = [{"role": "assistant", "content": "5", "reasoning_content": "2 + 3"}]
COUNT = 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def late(path: Path, row: Any, odd: Any) -> Path:
    """JSON lines whose last row differs from all before it, beyond the bytes by which columns are typed."""
    long = row | {"padding": "x" * (11 * 2**20 // COUNT)}
    path.write_text("".join(f"{json.dumps(r)}\n" for r in [*[long] * COUNT, odd]))
    return path


@pytest.mark.parametrize(
    ("row", "odd", "words"),
    [
        ({"prompt": CHAT}, {"prompt": "2 + 3?"}, "`prompt` is text in row 4 of .*, and a list in row 0"),
        ({"prompt": CHAT}, {"prompt": CHAT, "answer": "5"}, "`answer` is text in row 4 of .*, and missing in row 0"),
        ({"answer": 5}, {"answer": "five"}, "`answer` is text in row 4 of .*, and a number in row 0"),
        (
            {"completion": [{"role": "assistant", "content": "5"}]},
            {"completion": TRACED},
            r"`completion\[\]\.reasoning_content` is text in row 4 of .*, and missing in row 0",
        ),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_late_row_of_another_kind(row: Any, odd: Any, words: str, folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    late(path, row, odd)
    with pytest.raises(UserError, match=f"train_data='.*' cannot be read: {words}.*mend the file"):
        load_data("train_data", str(path.parent if folder else path))


def test_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"row 1 of .*rows\.jsonl is not JSON: "):
        load_data("data", str(path))


def test_other_files_are_explained_in_the_words_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"data='.*rows\.parquet' cannot be read: \w+"):
        load_data("data", str(path))


def test_kinds_that_differ_early_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": CHAT}, {"prompt": "2 + 3?"}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert load_data("data", str(path))["prompt"][:] == [row["prompt"] for row in rows]
