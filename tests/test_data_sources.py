"""Sources: every row of every kind of file once, whatever the units; broken rows are counted, broken files refused."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hgpo_trl.data import sources
from hgpo_trl.data.example import Drop
from hgpo_trl.data.sources import Source, list_files, parse_entries, read_unit, split_into_units

LIMIT = 4 * 2**20


def read(path: Path | str, limit: int = LIMIT) -> list[Any]:
    """Rows, or reasons, of all units."""
    units = split_into_units(0, str(path))
    return [row.reason if isinstance(row, Drop) else row for unit in units for _, row in read_unit(unit, limit)]


def places(path: Path) -> list[str]:
    return [place for unit in split_into_units(0, str(path)) for place, _ in read_unit(unit, LIMIT)]


@pytest.fixture
def units_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_size(size: int) -> None:
        monkeypatch.setattr(sources, "UNIT_BYTES", size)
        monkeypatch.setattr(sources, "UNIT_ROWS", size)

    return set_size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 80), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_are_read_once_whatever_the_units(
    tmp_path: Path, units_of: Any, texts: list[str], size: int, ends: bool, newline: str
) -> None:
    rows = [{"text": text, "i": i} for i, text in enumerate(texts)]
    content = newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + (newline if ends and rows else "")
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    units_of(size)
    assert read(path) == rows
    assert len(set(places(path))) == len(rows)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 50))
def test_row_groups_are_read_once_whatever_the_units(
    tmp_path: Path, units_of: Any, rows: int, group: int, size: int
) -> None:
    table = pa.table({"i": list(range(rows)), "text": [f"row {i}" for i in range(rows)]})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=group)
    units_of(size)
    assert read(tmp_path / "data.parquet") == table.to_pylist()
    assert len(set(places(tmp_path / "data.parquet"))) == rows


def test_a_list_a_compressed_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"i": 1}, {"i": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "list.json").write_text(f"  \n{json.dumps(rows, indent=1)}")
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    for path in tmp_path.iterdir():
        assert read(path) == rows, path


def test_broken_rows_are_counted_and_their_neighbours_read(tmp_path: Path, units_of: Any) -> None:
    good = b'{"i": 1}\n'
    bad = {
        "invalid_json": b'{"i": \n',
        "not_utf8": b'{"i": "\xff\xfe"}\n',
        "row_too_large": b'{"i": "' + b"x" * 10_000_000 + b'"}\n',
        "not_an_object": b"[1, 2]\n",
        "invalid_json ": b'{"i": ' + b"9" * 5_000 + b"}\n",  # more digits than Python converts
        "invalid_json  ": b'{"i": ' + b"[" * 100_000 + b"\n",
    }
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + b"\n" + b"".join(line + good for line in bad.values()))
    expected = [{"i": 1}, *(part for reason in bad for part in (reason.strip(), {"i": 1}))]
    assert read(path) == expected
    units_of(100_000)  # the long row spans a hundred units
    assert read(path) == expected


def test_rows_of_other_files_can_be_too_large(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"text": "x" * 5_000}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    for name in ("data.parquet", "data.json"):
        assert read(tmp_path / name, limit=1_000) == [rows[0], "row_too_large"]


def test_a_row_as_long_as_the_limit_is_read(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100}).encode()
    (tmp_path / "data.jsonl").write_bytes(line + b"\n" + line)
    assert read(tmp_path / "data.jsonl", limit=len(line)) == [{"text": "x" * 100}] * 2
    assert read(tmp_path / "data.jsonl", limit=len(line) - 1) == ["row_too_large"] * 2


def _damaged(compress: Any) -> bytes:
    content = bytearray(compress(b"".join(b'{"i": %d}\n' % i for i in range(1_000))))
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", b'[{"i": 1}, '),
        ("data.json", b'[{"i": "\xff"}]'),
        ("data.json", b"[" * 100_000),
        ("data.jsonl.gz", b"not compressed"),
        ("data.jsonl.gz", _damaged(gzip.compress)),
        ("data.jsonl.xz", _damaged(lzma.compress)),
        ("data.jsonl.gz", gzip.compress(b'{"i": 1}\n' * 1000, mtime=0)[:-20]),
        ("data.parquet", b"PAR1 and then nothing"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"i": pa.array([], pa.int64())}), tmp_path / "data.parquet")
    assert read(tmp_path / "data.jsonl") == []
    assert read(tmp_path / "data.parquet") == []


def test_files_elsewhere_are_read_in_place(units_of: Any) -> None:
    rows = [{"i": i} for i in range(100)]
    with fsspec.open("memory://repository/data.jsonl", "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    units_of(64)
    assert read("memory://repository/data.jsonl") == rows


def test_a_folder_is_resolved_by_its_splits(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"i": 1}\n')
    names = [Path(file).name for file in list_files("sources[0].path", str(tmp_path), None, "train")]
    assert names == ["train-0.jsonl", "train-1.jsonl"]
    assert [Path(f).name for f in list_files("x", str(tmp_path), None, "train", "te*.jsonl")] == ["test.jsonl"]
    with pytest.raises(ValueError, match=r"x=.* has no split 'validation'; its splits are \['test', 'train'\]"):
        list_files("x", str(tmp_path), None, "validation")
    with pytest.raises(ValueError, match=r"no file there matches '\*.parquet'"):
        list_files("x", str(tmp_path), None, "train", "*.parquet")


def test_what_is_not_there_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"sources\[2\].path='./nowhere/data.jsonl': there is no such file or folder"):
        list_files("sources[2].path", "./nowhere/data.jsonl", None, "train")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for pattern in (None, "*.jsonl"):
        with pytest.raises(
            ValueError, match=r"x='some/thing': there is no such .* and the hub cannot be read: .*network"
        ):
            list_files("x", "some/thing", None, "train", pattern)
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"data.csv is not of a type that can be read: .jsonl, .json, .parquet"):
        list_files("x", str(tmp_path / "data.csv"), None, "train")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("data.jsonl", r"sources\[0\]='data.jsonl' must be a mapping with the keys path, name"),
        ({"path": "x", "feilds": {}}, r"sources\[0\] has the unknown key 'feilds'; did you mean 'fields'\?"),
        ({"mode": "think"}, r"sources\[0\]=.* lacks `path`"),
        ({"path": "x", "rows": "many"}, r"sources\[0\] \(x\): rows"),
        ({"path": "x", "fields": {"prompt": 1}}, r"fields.prompt.str: Input should be a valid string"),
    ],
)
def test_malformed_entries(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_entries("sources", [entry], Source)


def test_caps_of_a_source() -> None:
    (by_domain, in_all) = parse_entries(
        "sources", [{"path": "x", "rows": {"maths": 3}}, {"path": "y", "name": "z", "rows": 5}], Source
    )
    assert (by_domain.label, by_domain.rows) == ("x", {"maths": 3})
    assert (in_all.label, in_all.rows) == ("z", 5)
