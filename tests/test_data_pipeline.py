"""The builder: nothing lost, nothing twice, the same bytes however it got there."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_adapters import ROWS

from hgpo_trl.common.data_files import load_data
from hgpo_trl.data import chunks, pipeline, shards, sources
from hgpo_trl.data.adapters import ADAPTERS
from hgpo_trl.data.build import Build, Deduplication
from hgpo_trl.data.decontamination import Decontaminator
from hgpo_trl.data.example import Drop, Example
from hgpo_trl.data.filters import quality, verified_answers
from hgpo_trl.data.own_files import generic
from hgpo_trl.data.pipeline import build_dataset, claim
from hgpo_trl.data.planning import plan, resolve
from hgpo_trl.modes import split_response
from hgpo_trl.scripts import building
from hgpo_trl.scripts.data_hft import HFTDataArguments

WORDS = [f"{a}{b}" for a in ("ba", "ko", "lu", "mi", "ne", "ri", "su", "ta") for b in "bdfgklmnprst"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> list[dict[str, Any]]:
    """Two sources with a few hundred rows: 300 think in two domains, 200 no-think, each query once."""
    rng = random.Random(0)
    think = [
        {
            "q": f"{sentence(rng, 30)} number {i} ?",
            "trace": sentence(rng, 40),
            "a": f"The answer is {i} .",
            "d": "maths" if i % 3 else "code",
        }
        for i in range(300)
    ]
    chat = [{"q": f"{sentence(rng, 30)} chat {i} ?", "a": sentence(rng, 20) + " ."} for i in range(200)]
    return [
        {
            "path": write_lines(tmp_path / "think.jsonl", think),
            "name": "problems",
            "fields": {"prompt": "q", "reasoning": "trace", "answer": "a", "domain": "d"},
        },
        {
            "path": write_lines(tmp_path / "chat.jsonl", chat),
            "name": "chat",
            "domain": "general",
            "fields": {"prompt": "q", "answer": "a"},
        },
    ]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)


DEDUP = Deduplication()


def run(recipe: list[dict[str, Any]], out: Path, processes: int = 1, finish: Any = None, **settings: Any) -> Any:
    """A build as `scripts.building.run` makes it."""
    build = Build("hft", resolve(recipe, settings.get("stage", "hft")), rows_per_shard=120, deduplication=DEDUP)
    build = replace(build, **settings)
    units = plan(list(build.sources), build.max_row_bytes)
    description = {"sources": recipe, "seed": build.seed}
    return claim(out, description, units) or build_dataset(build, units, out, description, processes, finish)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def removed_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "removed.parquet").to_pylist()


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_rows_are_in_trl_format_and_shuffled(recipe: Any, tmp_path: Path) -> None:
    manifest = run(recipe, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 500
    assert manifest["rows"] == {
        "mode": {"no_think": 200, "think": 300},
        "domain": {"code": 100, "general": 200, "maths": 200},
        "source": {"chat": 200, "problems": 300},
    }
    for row in rows:
        assert list(row) == ["prompt", "completion", "mode", "source", "domain", "id"]
        (message,) = row["completion"]
        response = split_response(message["content"])
        assert (message["role"], response.mode, response.well_formed) == ("assistant", row["mode"], True)
        assert bool(response.reasoning) == (row["mode"] == "think")
    modes = [row["mode"] for row in rows]
    changes = sum(a != b for a, b in pairwise(modes))
    assert 180 < changes < 300  # 240 are expected of a shuffle, 1 without
    assert sorted(p.name for p in (tmp_path / "out" / "data").iterdir())[-1] == "shard-00004-of-00005.parquet"
    assert not (tmp_path / "out" / ".work").exists()


def test_the_folder_loads_as_a_data_set(recipe: Any, tmp_path: Path) -> None:
    """And as this one, not as another of the same name: `datasets` keeps what it has read."""
    for seed in (0, 1):
        out = tmp_path / str(seed) / "out"
        run(recipe, out, seed=seed)
        expected = [row["id"] for row in rows_of(out)]
        assert load_data("train_data", str(out))["id"][:] == expected
        cache = str(tmp_path / "cache")
        assert load_dataset(str(out), split="train", cache_dir=cache)["id"][:] == expected


def test_every_row_is_kept_or_removed_once(recipe: Any, tmp_path: Path) -> None:
    bad = [
        {"q": None, "trace": "x", "a": "y"},
        {"q": "Why ?", "trace": "because", "a": " "},
        {"other": 1},
        {"q": "Is this <think> one ?", "trace": "a trace of some length that is long enough", "a": "Yes ."},
    ]
    with Path(recipe[0]["path"]).open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in bad) + "{broken\n")
    steps = [("quality", quality())]
    manifest = run(recipe, tmp_path / "out", steps=steps, max_rows=100)
    kept, removed = rows_of(tmp_path / "out"), removed_of(tmp_path / "out")
    assert len(kept) == 100
    assert len(kept) + len(removed) == 505
    names = [(row["source"], row["id"]) for row in kept + removed]
    assert len(set(names)) == 505
    reasons = Counter((row["step"], row["reason"]) for row in removed)
    assert reasons.pop(("mix", "not_drawn")) == 400
    assert sum(reasons.values()) == 5
    assert reasons["schema", "tag_in_text"] == reasons["schema", "invalid_json"] == 1
    for name, source in manifest["sources"].items():
        dropped = sum(sum(step["dropped"].values()) for step in source["steps"])
        assert source["rows_read"] == source["kept"] + dropped
        assert source["kept"] == sum(row["source"] == name for row in kept)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == json.loads(json.dumps(manifest))


def test_duplicates_name_the_row_that_stays(tmp_path: Path) -> None:
    rng = random.Random(1)
    long = sentence(rng, 60)
    first = [
        {"id": "a", "q": f"{long} ?", "a": "One ."},
        {"id": "b", "q": f"{long.upper()}?!", "a": "Two ."},
        {"id": "c", "q": f"{long} please ?", "a": "Three ."},
        {"id": "d", "q": f"{long} 7 ?", "a": "Four ."},
    ]
    second = [{"id": "e", "q": f"{long} ?", "r": "Thinking about it for a while .", "a": "One ."}]
    recipe = [
        {"path": write_lines(tmp_path / "x.jsonl", first), "fields": {"prompt": "q", "answer": "a", "id": "id"}},
        {
            "path": write_lines(tmp_path / "y.jsonl", second),
            "fields": {"prompt": "q", "reasoning": "r", "answer": "a", "id": "id"},
        },
    ]
    manifest = run(recipe, tmp_path / "within")
    assert {row["id"] for row in rows_of(tmp_path / "within")} == {"a", "d", "e"}  # another number, another mode
    assert manifest["duplicates"] == {"exact": 1, "near": 1}
    removed = {
        row["id"]: (row["reason"], json.loads(row["detail"])["first"]) for row in removed_of(tmp_path / "within")
    }
    where = f"a of {tmp_path / 'x.jsonl'}"[:96]
    assert removed == {"b": ("exact", where), "c": ("near", where)}
    run(recipe, tmp_path / "across", deduplication=Deduplication(across_modes=True))
    assert {row["id"] for row in rows_of(tmp_path / "across")} == {"a", "d"}
    run(recipe, tmp_path / "exact", deduplication=Deduplication(near=False))
    assert {row["id"] for row in rows_of(tmp_path / "exact")} == {"a", "c", "d", "e"}
    run(recipe, tmp_path / "none", deduplication=None)
    assert len(rows_of(tmp_path / "none")) == 5


def test_contaminated_rows_name_their_benchmark(recipe: Any, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(recipe[0]["path"]).read_text().splitlines()]
    step = Decontaminator({"bench": ["what is one plus one ?", lines[17]["q"]]})
    manifest = run(recipe, tmp_path / "out", steps=[("decontamination", step)])
    (row,) = removed_of(tmp_path / "out")
    assert (row["source"], row["step"], row["reason"]) == ("problems", "decontamination", "contaminated")
    assert {"benchmark": "bench", "row": 1, "overlap": 1.0}.items() <= json.loads(row["detail"]).items()
    assert manifest["decontamination"] == {"bench": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_rows": 50}, {"total": 50}),
        ({"shares": {"mode": {"think": 0.5, "no_think": 0.5}}}, {"think": 200, "no_think": 200}),
        (
            {"shares": {"domain": {"maths": 0.5, "code": 0.5, "general": 0.0}}},
            {"maths": 100, "code": 100, "general": 0},
        ),
        ({"shares": {"mode": {"think": 0.2, "no_think": 0.8}}, "max_rows": 100}, {"think": 20, "no_think": 80}),
    ],
)
def test_shares(recipe: Any, tmp_path: Path, settings: Any, expected: dict[str, int]) -> None:
    run(recipe, tmp_path / "out", **settings)
    rows = rows_of(tmp_path / "out")
    counts = Counter([row["mode"] for row in rows] + [row["domain"] for row in rows])
    counts["total"] = len(rows)
    for name, count in expected.items():
        assert count - 1 <= counts[name] <= count  # each cell is rounded down


def test_caps_are_random_and_nested(recipe: Any, tmp_path: Path) -> None:
    kept = {}
    for cap in (20, 60):
        recipe[0]["rows"] = {"maths": cap, "code": 5}
        recipe[1]["rows"] = 30
        run(recipe, tmp_path / f"{cap}")
        rows = rows_of(tmp_path / f"{cap}")
        assert Counter(row["domain"] for row in rows) == {"maths": cap, "code": 5, "general": 30}
        kept[cap] = {row["prompt"][0]["content"] for row in rows if row["domain"] == "maths"}
    assert kept[20] < kept[60]
    numbers = sorted(int(text.split()[-2]) for text in kept[60])
    assert numbers[0] < 60 < 240 < numbers[-1]  # from all over the file
    places = [place for place, row in enumerate(rows) if row["domain"] == "general"]
    assert 25 < sum(places) / len(places) < 70  # 47 is expected of rows that are drawn and then shuffled


def test_prompts_alone(tmp_path: Path) -> None:
    rows = [{"q": f"How much is {i} + {i} ?", "a": str(2 * i) if i % 2 else None, "level": i % 3} for i in range(40)]
    fields = {"prompt": "q", "reference": "a", "level": "level"}
    recipe = [{"path": write_lines(tmp_path / "x.jsonl", rows), "domain": "maths", "fields": fields}]
    manifest = run(recipe, tmp_path / "out", stage="hgpo")
    built = rows_of(tmp_path / "out")
    assert list(built[0]) == ["prompt", "answer", "domain", "level", "source", "id"]
    assert {row["prompt"][0]["content"]: (row["answer"], row["level"]) for row in built} == {
        row["q"]: (row["a"], str(row["level"])) for row in rows
    }
    assert manifest["rows"]["mode"] == {"prompt": 40}
    with pytest.raises(ValueError, match="give prompts alone, and Stage I needs responses"):
        run(recipe, tmp_path / "hft")


def test_the_last_word(recipe: Any, tmp_path: Path) -> None:
    def finish(dataset: Any, work: Path) -> tuple[list[Drop | None], dict[str, np.ndarray]]:
        assert work.is_dir()
        rate = np.array([float("nan") if "7" in row["prompt"][0]["content"] else 0.5 for row in dataset])
        verdicts = [None if row["mode"] == "think" else Drop("too_short", {"of": row["id"]}) for row in dataset]
        return verdicts, {"rate": rate}

    manifest = run(recipe, tmp_path / "out", finish=finish)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 300
    for row in rows:
        assert row["rate"] == (None if "7" in row["prompt"][0]["content"] else 0.5)
    removed = removed_of(tmp_path / "out")
    assert Counter((row["step"], row["reason"]) for row in removed) == {("difficulty", "too_short"): 200}
    assert all(json.loads(row["detail"]) == {"of": row["id"]} for row in removed)
    assert manifest["sources"]["chat"]["steps"][-1] == {"name": "difficulty", "dropped": {"too_short": 200}}
    assert manifest["sources"]["chat"]["kept"] == 0
    assert manifest["rows"]["mode"] == {"no_think": 0, "think": 300}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(-(10**400))
    | st.floats()
    | st.sampled_from(
        ["", "user", "assistant", "\ud800", "\0", "<think>\ud800</think>b", "<think> </think> b", "<think>"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "replies", "rank", "\ud800"]), inner, max_size=4)
    ),
    max_leaves=6,
)
OWN = {"prompt": "q", "response": "r", "reference": "a", "level": "l", "id": "i", "domain": "d", "system": "s"}
READ = {name: (adapter, ROWS[name]) for name, adapter in ADAPTERS.items()}
READ["own"] = (generic(OWN), dict.fromkeys(OWN.values(), "x") | {"r": "<think>\na\n</think>\n\nb"})


@given(name=st.sampled_from(sorted(READ)), stage=st.sampled_from(["hft", "hgpo"]), data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_json_a_row_holds_it_is_kept_or_removed(
    tmp_path: Path, name: str, stage: str, data: st.DataObject
) -> None:
    adapter, row = READ[name]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(row)), JSON, min_size=1, max_size=3))
    path = write_lines(tmp_path / "x.jsonl", [row | changed, row])
    build = Build(
        stage, [(sources.Source("x"), adapter)], [("quality", quality()), ("maths", verified_answers())], DEDUP
    )
    chunks.make_chunk(build, tmp_path, 0, sources.Unit(0, path, 0, 10**9))
    rows, removed = (pq.read_table(tmp_path / f"chunk-000000.{kind}") for kind in ("parquet", "removed.parquet"))
    assert len(rows) + len(removed) == 2


# --- the same bytes -------------------------------------------------------------------------------------------


def test_processes_and_units_do_not_matter(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = {
        name: tmp_path / name / "out" for name in ("one", "two", "whole", "other")
    }  # the card says its folder's name
    run(recipe, out["one"])
    run(recipe, out["two"], processes=2)
    assert contents(out["one"]) == contents(out["two"])
    monkeypatch.setattr(sources, "UNIT_BYTES", 10**9)
    run(recipe, out["whole"])
    assert rows_of(out["one"]) == rows_of(out["whole"])
    run(recipe, out["other"], seed=1)
    assert rows_of(out["one"]) != rows_of(out["other"])


SCRIPT = """
import json, os, signal, sys
from fnmatch import fnmatch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_data_pipeline as t
from hgpo_trl.data import sources
sources.UNIT_BYTES = 20_000
replace = Path.replace
def replace_and_die(self, target):
    found = fnmatch(Path(target).name, {at!r})
    if found and {moment!r} == "while it is written":
        os.truncate(self, self.stat().st_size // 2)
    elif found and {moment!r} == "once it is there":
        replace(self, target)
    if found:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = replace_and_die
t.run(json.loads({recipe!r}), Path({out!r}))
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("at", "moment"),
    [
        ("chunk-*3.parquet", "while it is written"),
        ("chunk-*5.removed.parquet", "before it is moved"),
        ("chunk-*7.json", "once it is there"),
        ("shard-00002*", "while it is written"),
    ],
)
def test_a_killed_build_goes_on(recipe: Any, tmp_path: Path, at: str, moment: str) -> None:
    run(recipe, tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    tests, words = str(Path(__file__).parent), json.dumps(recipe)
    code = SCRIPT.format(tests=tests, recipe=words, out=str(out), at=at, moment=moment)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "manifest.json").exists()
    run(recipe, out)
    assert contents(out) == contents(tmp_path / "whole" / "out")


def chunks_of_both_starts(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupt a build at its third chunk and start it again; the numbers of the chunks that the two starts made."""
    made: list[int] = []
    make_chunk = chunks.make_chunk

    def fail_at_the_third(planned: Build, work: Path, number: int, unit: Any) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return make_chunk(planned, work, number, unit)

    monkeypatch.setattr(chunks, "make_chunk", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.setattr(chunks, "make_chunk", lambda *args: made.append(args[2]) or make_chunk(*args))
    build()
    return made


def test_what_is_done_is_not_done_again(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = chunks_of_both_starts(lambda: run(recipe, tmp_path / "out"), monkeypatch)
    assert made == list(range(len(made)))
    before = contents(tmp_path / "out")
    run(recipe, tmp_path / "out")  # complete: nothing to do
    assert contents(tmp_path / "out") == before


def test_a_folder_of_another_build_is_refused(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds another data set. Changed: seed: 0 -> 1. Choose another output_dir"):
        run(recipe, tmp_path / "out", seed=1)
    monkeypatch.setattr(pipeline, "build_dataset", None)
    units = plan(resolve(recipe, "hft"), 2**20)
    claim(tmp_path / "begun", {"seed": 0}, units)
    with pytest.raises(ValueError, match=r"the beginning of another build. Changed: seed: 0 -> 1"):
        claim(tmp_path / "begun", {"seed": 1}, units)
    with pytest.raises(ValueError, match="the sources' files have changed since"):
        claim(tmp_path / "begun", {"seed": 0}, units[:-1])
    claim(tmp_path / "files", {"seed": 0}, units, {"a.jsonl": "1"})
    with pytest.raises(ValueError, match=r"Changed: input_files\.a\.jsonl: '1' -> '2'\. Choose"):
        claim(tmp_path / "files", {"seed": 0}, units, {"a.jsonl": "2"})
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a folder `data` that is not of a build"):
        claim(tmp_path / "foreign", {"seed": 0}, units)


# --- no room, no worker ---------------------------------------------------------------------------------------


def test_no_room(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any file of a build: the error names it, what is there stays whole, and the same build goes on."""
    run(recipe, tmp_path / "whole" / "out")
    write_table = pq.write_table
    calls = 0

    def full(table: Any, path: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            Path(path).write_bytes(b"PAR1 half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_table(table, path, **kwargs)

    monkeypatch.setattr(pq, "write_table", full)
    chunks = len(plan(resolve(recipe, "hft"), 2**20))
    for limit in (1, 5, 2 * chunks + 2):  # a chunk's rows, another's, the second shard
        calls = 0
        out = tmp_path / f"full-{limit}" / "out"
        with pytest.raises(OSError, match=r"No space left on device while writing .*parquet\. Make room") as e:
            run(recipe, out)
        assert e.value.errno == errno.ENOSPC
        assert not list(out.rglob("*.part"))
        for path in out.rglob("*.parquet"):
            pq.read_table(path)
        run(recipe, out)
        assert contents(out) == contents(tmp_path / "whole" / "out")


@pytest.mark.processes
def test_a_limit_of_the_system(recipe: Any, tmp_path: Path) -> None:
    code = (
        f"import sys, json, resource, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport test_data_pipeline as t\nt.sources.UNIT_BYTES = 20_000\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        f"t.run(json.loads({json.dumps(recipe)!r}), Path({str(tmp_path / 'out')!r}))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "while writing" in done.stderr
    assert "start the same command again" in done.stderr
    run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def _dies(examples: list[Example]) -> list[Drop | None]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


@pytest.mark.processes
def test_a_killed_worker(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"A worker process was killed, perhaps for lack of memory\. Lower"):
        run(recipe, tmp_path / "out", processes=2, steps=[("dies", _dies)])


def test_one_process_builds_at_a_time(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / ".work" / "lock"),
        pytest.raises(ValueError, match=r"another process builds there\. Wait for it"),
    ):
        run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "out")


def test_more_shards_than_files_that_may_be_open(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, tmp_path / "one" / "out", rows_per_shard=20)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 3)
    run(recipe, tmp_path / "more" / "out", rows_per_shard=20)
    assert len(list((tmp_path / "more" / "out" / "data").iterdir())) == 25
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "more" / "out")


def test_what_a_kill_at_the_very_end_leaves_is_removed(recipe: Any, tmp_path: Path) -> None:
    run(recipe, tmp_path / "out")
    (tmp_path / "out" / ".work").mkdir()
    (tmp_path / "out" / ".work" / "plan.json").write_text("{}")
    run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / ".work").exists()


def _waits(examples: list[Example]) -> list[Drop | None]:
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    time.sleep(3600)
    return [None] * len(examples)


@pytest.mark.processes
def test_workers_end_with_their_parent(recipe: Any, tmp_path: Path) -> None:
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport test_data_pipeline as t\nt.sources.UNIT_BYTES = 20_000\n"
        f"t.run(json.loads({json.dumps(recipe)!r}), Path({str(tmp_path / 'out')!r}), 2, steps=[('waits', t._waits)])"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PIDS": str(pids)})
    while len(list(pids.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600  # long before they would end by themselves
    while any(Path("/proc", path.name).exists() for path in pids.iterdir()):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


# --- bad input ------------------------------------------------------------------------------------------------


def test_a_field_that_is_not_there(recipe: Any, tmp_path: Path) -> None:
    recipe[1]["fields"] = {"prompt": "q", "answer": "aa"}
    with pytest.raises(ValueError, match=r"sources\[1\] .*none of the first rows has 'aa'; did you mean 'a'\?"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_optional_field_that_is_nowhere(recipe: Any, tmp_path: Path) -> None:
    recipe[1]["fields"] |= {"reference": "aa"}
    with pytest.raises(ValueError, match=r"sources\[1\] .*none of the first rows has 'aa'; did you mean 'a'\?"):
        run(recipe, tmp_path / "out")
    rows = [{"q": f"Question {i} ?", "a": "Yes ."} | ({"s": "Be brief."} if i == 30 else {}) for i in range(40)]
    fields = {"prompt": "q", "answer": "a", "system": "s"}
    run([{"path": write_lines(tmp_path / "x.jsonl", rows), "fields": fields}], tmp_path / "out")


def test_folders_that_cannot_be_taken(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be a folder, since '.*file' is a file. Move it"):
        run(recipe, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has a manifest.json that is not of a build"):
        run(recipe, tmp_path / "other")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"domain_shares": {"maths": 0.6, "code": 0.6}}, "domain_shares=.* must sum to 1"),
        ({"dedup_threshold": 1.0}, "must lie between 0 and 1; got 1.0. For 1 set deduplicate: exact"),
        ({"mode_shares": {"think": 0.5, "nothink": 0.5}}, "mode_shares names 'nothink'; the modes are think, no_think"),
    ],
)
def test_fields_are_checked_before_any_work(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFTDataArguments(sources=[{"path": "x"}], output_dir="out", **field)


def test_what_the_recipe_names_is_checked_before_any_work(recipe: Any, tmp_path: Path) -> None:
    args = HFTDataArguments(sources=recipe, output_dir=str(tmp_path / "out"), source_shares={"talk": 1.0})
    with pytest.raises(ValueError, match="source_shares names 'talk'; the sources are problems, chat"):
        building.run("hft", args)
    args = replace(args, source_shares=None, tokenizer=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"tokenizer='.*nothing': there is no such folder"):
        building.run("hft", args)


def test_mixed_schemas_lose_the_rows_that_do_not_fit(tmp_path: Path) -> None:
    rows = [{"q": f"Question {i} ?", "a": "Yes ."} if i % 2 else {"question": f"Question {i} ?"} for i in range(40)]
    recipe = [{"path": write_lines(tmp_path / "x.jsonl", rows), "fields": {"prompt": "q", "answer": "a"}}]
    manifest = run(recipe, tmp_path / "out")
    (source,) = manifest["sources"].values()
    assert source["steps"][0] == {"name": "schema", "dropped": {"missing_field": 20}}
    assert source["kept"] == 20


def test_nothing_left_says_why(recipe: Any, tmp_path: Path) -> None:
    def nothing(examples: list[Example]) -> list[Drop | None]:
        return [Drop("never_good_enough") for _ in examples]

    with pytest.raises(ValueError, match=r"No row is left. problems: 300 rows read; picky: never_good_enough 300; ch"):
        run(recipe, tmp_path / "out", steps=[("picky", nothing)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "open-r1/OpenR1-Maths"}, r"there is no adapter .*; did you mean 'open-r1/OpenR1-Math-220k'\?"),
        ({"fields": None}, r"sources\[0\] \(problems\) needs `fields`"),
        ({"fields": {"prompt": "q", "anwser": "a"}}, r"sources\[0\] \(problems\): .*anwser"),
        ({"adapter": "open-r1/OpenR1-Math-220k"}, r"has both an adapter and `fields`, which the adapter knows"),
        ({"fields": {"prompt": "q"}}, "give prompts alone, and Stage I needs responses"),
        ({"mode": "no_think"}, "mode no_think needs answer without reasoning, or response, or messages"),
        ({"mode": "thinking"}, "mode must be think or no_think, or left out; got 'thinking'"),
        ({"rows": -1}, "greater than or equal to 0"),
        (
            {"fields": {"prompt": "q", "answer": "a"}, "rows": {"math": 3}},
            "rows names the domain 'math'; all its rows are",
        ),
        ({"name": "chat"}, r"'chat' is there twice. Give each its own `name`"),
    ],
)
def test_malformed_sources(recipe: Any, change: dict[str, Any], message: str) -> None:
    recipe[0] |= change
    with pytest.raises(ValueError, match=message):
        resolve(recipe, "hft")


def test_prompts_alone_are_no_source_of_stage_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has prompts alone, and Stage I needs responses"):
        resolve([{"path": "di-zhang-fdu/AIME_1983_2024"}], "hft")
    ((_, adapter),) = resolve([{"path": "di-zhang-fdu/AIME_1983_2024"}], "hgpo")
    assert adapter.mode is None
