"""`hgpo-trl evaluate` interrupted, resumed, started again with other settings, and scored again."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from settings import argv

from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.evaluation import transformers_backend
from hgpo_trl.evaluation.parts import draw_missing, parts_by_length, read_parts
from hgpo_trl.evaluation.processes import Processes
from hgpo_trl.evaluation.samples import (
    SCHEMA,
    Sampler,
    samples_file,
    samples_in_blocks,
    samples_of_prompts,
    write_samples,
)
from hgpo_trl.inference.decoding import batches
from hgpo_trl.scripts import evaluate as evaluate_script
from hgpo_trl.scripts.evaluate import main

NUM_PROMPTS, PER_PART = 11, 2
PARTS = 6
RESULTS = ("report.json", "samples.parquet")


@pytest.fixture
def fields(model_dir: str, prompts: Dataset, tmp_path: Path) -> dict[str, Any]:
    """Of a run whose parts are of two prompts."""
    prompts.to_parquet(tmp_path / "eval.parquet")
    return {
        "model": model_dir,
        "data": tmp_path / "eval.parquet",
        "output_dir": tmp_path / "eval",
        "num_prompts": NUM_PROMPTS,
        "samples_per_mode": 3,
        "batch_size": 7,  # two whole prompts
        "max_new_tokens": 12,
        "temperature": 1.0,
        "dtype": "float32",
    }


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.fixture
def interrupt(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Run the command until it has drawn so many parts, or to its end; the prompts of each part drawn."""
    sample = transformers_backend.sample_both_modes

    def run(after: int | None = None, well_formed: bool = False, **changes: Any) -> list[int]:
        drawn: list[int] = []

        def watched(model: Any, tokenizer: Any, prompts: list, **settings: Any) -> pd.DataFrame:
            if len(drawn) == after:
                raise Interrupted
            drawn.append(len(prompts))
            samples = sample(model, tokenizer, prompts, **settings)
            if well_formed:  # which an untrained model's are not: whatever scores them, they are worth 0
                tokens = samples["num_tokens"]
                samples["completion"] = [f"<{mode}> {n}" for mode, n in zip(samples["mode"], tokens, strict=True)]
                samples["completion"] += samples["mode"].map({"think": " </think> 4", "no_think": " </no_think>"})
                samples["faults"] = [[] for _ in tokens]
            return samples

        with monkeypatch.context() as patch:
            patch.setattr(transformers_backend, "sample_both_modes", watched)
            try:
                main(argv(fields | changes))
            except Interrupted:
                assert after is not None
        return drawn

    return run


# --- Parts --------------------------------------------------------------------


@pytest.mark.processes
def test_killed_and_resumed_is_as_if_it_had_not_been(fields: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL while a part is begun, twice, while samples.parquet is, and while report.json is."""
    main(argv(fields | {"output_dir": tmp_path / "whole"}))
    deaths = "parts/:3,parts/:2,eval/.samples.parquet:1,eval/.report.json:1"
    command = [sys.executable, "-m", "tests.kill_evaluation", deaths, *argv(fields)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-3000:]
    left = [line for line in run.stdout.splitlines() if line.startswith("killed")]
    assert [line.count("parts/0") for line in left] == [2, 3, PARTS, PARTS]
    assert ["'samples.parquet'" in line for line in left] == [False, False, False, True]
    found = re.findall(r"(\d+) of 11 prompts have been sampled already", run.stdout)
    assert found == ["4", "6", "11"]
    assert run.stdout.count("All samples are there") == 1
    assert results(tmp_path / "eval") == results(tmp_path / "whole")
    assert not (tmp_path / "eval" / "parts").exists()


def test_only_what_is_missing_is_drawn(
    interrupt: Callable[..., list[int]], fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert interrupt(4) == [PER_PART] * 4
    assert not (tmp_path / "eval" / "report.json").exists()
    (tmp_path / "eval" / "parts" / "00001.parquet").unlink()
    capsys.readouterr()
    assert interrupt() == [2, 2, 1]
    assert "6 of 11 prompts have been sampled already" in capsys.readouterr().out
    assert interrupt(0) == []  # all is there
    assert "All samples are there" in capsys.readouterr().out
    again = results(tmp_path / "eval")
    main(argv(fields | {"output_dir": tmp_path / "whole"}))
    assert again == results(tmp_path / "whole")
    assert "already" not in capsys.readouterr().out


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_what_differs(
    interrupt: Callable[..., list[int]], finished: bool, prompts: Dataset, tmp_path: Path
) -> None:
    interrupt(None if finished else 1)
    before = {path: path.read_bytes() for path in (tmp_path / "eval").rglob("*.*")}
    for changes, listed in (
        ({"temperature": 0.5, "seed": 3}, r"Changed: seed: 0 -> 3, temperature: 1\.0 -> 0\.5\. "),
        ({"num_prompts": 5}, r"Changed: num_prompts: 11 -> 5, prompts: "),
        ({"samples_per_mode": 2}, r"Changed: samples_per_mode: 3 -> 2\. "),
        ({"batch_size": 64}, r"Changed: batch_size: 7 -> 64\. "),
        ({"max_new_tokens": 13}, r"Changed: max_new_tokens: 12 -> 13\. "),
        (
            {"max_think_tokens": 8, "think_budget": 4},
            r"Changed: max_think_tokens: None -> 8, think_budget: None -> 4\. ",
        ),
        ({"dtype": "bfloat16", "top_p": 0.5}, r"Changed: dtype: 'float32' -> 'bfloat16', top_p: 0\.95 -> 0\.5\. "),
    ):
        with pytest.raises(ValueError, match=rf"another run's results\. {listed}.*Choose another output_dir, remove"):
            interrupt(0, **changes)
    prompts.select(range(1, 20)).to_parquet(tmp_path / "eval.parquet")  # of the same name
    with pytest.raises(ValueError, match=r"Changed: prompts: "):
        interrupt(0)
    assert {path: path.read_bytes() for path in (tmp_path / "eval").rglob("*.*")} == before


def test_another_model_of_the_same_name_is_noticed(
    interrupt: Callable[..., list[int]], model_dir: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    interrupt(1, model=model)
    (model / "notes.txt").write_text("not part of it")
    assert len(interrupt(1, model=model)) == 1
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"Changed: model_files: '\w+' -> '\w+'\. "):
        interrupt(0, model=model)


def test_samples_of_unknown_origin_are_kept(interrupt: Callable[..., list[int]], tmp_path: Path) -> None:
    interrupt(1)
    (tmp_path / "eval" / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"results of an unknown run \(no samples\.json\)\. Choose another output_dir"):
        interrupt(0)


def test_a_claim_without_samples_can_be_changed(interrupt: Callable[..., list[int]]) -> None:
    interrupt(0)
    assert len(interrupt(None, seed=1)) == PARTS


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), size=st.integers(1, 8), factor=st.integers(1, 3))
def test_chunks_have_the_batches_of_all(lengths: list[int], size: int, factor: int) -> None:
    """Sampling in chunks pads no more than sampling all at once, if they are of whole batches."""
    rows = [[0] * length for length in lengths]
    chunks = [part.prompts for part in parts_by_length(Path(), lengths, size * factor, 0)]
    found = [[chunk[row] for row in batch] for chunk in chunks for batch in batches([rows[i] for i in chunk], size)]
    assert found == list(batches(rows, size))


class CountingSampler:
    """Samples that tell their prompt and seed; counts how often it was entered and which prompts were drawn."""

    def __init__(self) -> None:
        self.entered, self.drawn = 0, list[str]()

    @contextmanager
    def loaded(self) -> Iterator[Sampler]:
        self.entered += 1
        yield self.sample

    def sample(
        self, prompts: list[str], *, numbers: Sequence[int], samples_per_mode: int, seed: int, progress: Any
    ) -> pd.DataFrame:
        assert prompts == [f"prompt {number}" for number in numbers]
        self.drawn += prompts
        keys = itertools.product(range(len(prompts)), ("no_think", "think"), range(samples_per_mode))
        samples = pd.DataFrame(keys, columns=["prompt_id", "mode", "sample"])
        return samples.assign(completion=[f"{prompts[row]} {seed}" for row in samples["prompt_id"]])


@given(size=st.integers(1, 4), kept=st.sets(st.integers(0, 9)), stale=st.sets(st.integers(0, 9)))
def test_missing_parts_are_drawn_and_no_others(size: int, kept: set[int], stale: set[int]) -> None:
    """Whichever parts an earlier run has left, and whichever of them depend on other settings."""
    prompts = [f"prompt {number}" for number in range(9)]
    with TemporaryDirectory() as name:
        parts = parts_by_length(Path(name), [len(prompts) - row for row in range(len(prompts))], size, 0)
        parts = [replace(part, key="settings") for part in parts]
        first, second = CountingSampler(), CountingSampler()
        draw_missing(parts, first.loaded(), prompts, samples_per_mode=2)
        whole = read_parts(parts)
        for number, part in enumerate(parts):
            if number not in kept:
                part.path.unlink()
            elif number in stale:
                write_samples(part.path, whole.head(1), "other settings")
        draw_missing(parts, second.loaded(), prompts, samples_per_mode=2)
        missing = [part for number, part in enumerate(parts) if number not in kept - stale]
        assert second.drawn == [prompts[row] for part in missing for row in part.prompts]
        assert second.entered == bool(missing)
        pd.testing.assert_frame_equal(read_parts(parts), whole)
        assert whole["prompt_id"].tolist() == sorted(4 * [*range(9)])
        assert all(
            text.startswith(f"prompt {row} ") for row, text in zip(whole["prompt_id"], whole["completion"], strict=True)
        )


class FirstOfTwo(Processes):
    """Without the other."""

    def __init__(self) -> None:
        super().__init__(index=0, count=2)

    def agree(self, make: Callable[[], Any]) -> Any:
        return make()

    def wait(self, meanwhile: Callable[[], object]) -> None:
        meanwhile()


def test_parts_that_another_process_writes_elsewhere_are_missed(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(5)]
    parts, sampler = parts_by_length(tmp_path, [1, 2, 3, 4, 5], 1, 0), CountingSampler()
    with pytest.raises(ValueError, match=r"has drawn 2 parts that are not here, the first .*00001\.parquet\. All mach"):
        draw_missing(parts, sampler.loaded(), prompts, samples_per_mode=2, processes=FirstOfTwo())
    assert sampler.drawn == ["prompt 0", "prompt 2", "prompt 4"], "every other one"


def test_seeds_of_parts_differ() -> None:
    seeds = [derived_seed(seed, number) for seed in range(-3, 20) for number in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_samples_are_read_as_written(tmp_path: Path) -> None:
    samples = pd.DataFrame(
        {
            "prompt_id": [0, 0], "mode": ["no_think", "think"], "sample": [0, 0], "completion": ["<no_think> ½", ""],
            "num_tokens": [3, 1], "truncated": [False, True], "faults": [[], []], "prob_think": [0.1, 0.1],
            "prob_no_think": [0.3, 0.3], "picked": [-1, -1],
        }
    )  # fmt: skip
    path, scratch = tmp_path / "samples.parquet", tmp_path / "scratch.arrow"
    write_samples(path, samples)
    assert pq.read_schema(path).names == SCHEMA.names
    (found,) = samples_in_blocks([path], scratch)
    pd.testing.assert_frame_equal(found.assign(faults=[[], []]), samples, check_dtype=False)
    with samples_file(path) as write:
        for number, reward in enumerate((float("nan"), 1.0)):
            write(samples[number : number + 1].assign(reward=reward))
            assert pq.read_schema(path).names == SCHEMA.names, "the earlier file stays until the new one is whole"
    assert pd.read_parquet(path)["reward"].isna().tolist() == [True, False]
    (found,) = samples_in_blocks([path], scratch)
    assert list(found) == SCHEMA.names
    assert samples_of_prompts(path, [1, 2]).empty
    assert len(samples_of_prompts(path, [0, 2])) == 2


@given(
    files=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    per_mode=st.integers(1, 3),
    size=st.integers(1, 20),
    random=st.randoms(),
)
def test_blocks_are_whole_prompts_in_order(files: list[int], per_mode: int, size: int, random: Random) -> None:
    """Whichever files hold which samples: prompt i is in file `files[i]`."""
    keys = itertools.product(range(0, 2 * len(files), 2), ("no_think", "think"), range(per_mode))
    whole = pd.DataFrame(keys, columns=["prompt_id", "mode", "sample"])
    whole = whole.assign(
        completion=[f"{key}" for key in whole.itertuples(index=False)], num_tokens=1, truncated=False,
        faults=[["unclosed"]] * len(whole), prob_think=0.5, prob_no_think=0.25, picked=1,
    )  # fmt: skip
    shuffled = whole.sample(frac=1, random_state=random.randrange(9))
    with TemporaryDirectory() as name:
        paths = [Path(name) / f"{number}.parquet" for number in sorted({*files})]
        for path in paths:
            of_file = shuffled["prompt_id"].map(lambda prompt: files[prompt // 2]) == int(path.stem)
            write_samples(path, shuffled[of_file])
        blocks = list(samples_in_blocks(paths, Path(name) / "scratch.arrow", size))
    found = pd.concat(blocks, ignore_index=True)
    pd.testing.assert_frame_equal(found.assign(faults=found["faults"].map(list)), whole, check_dtype=False)
    prompts = [set(block["prompt_id"]) for block in blocks]
    assert sum(map(len, prompts)) == len(files), "no prompt is in two blocks"
    assert all(len(block) <= size or len(of_block) == 1 for block, of_block in zip(blocks, prompts, strict=True))
    nexts = blocks[1:]
    assert all(len(a) + 2 * per_mode > size for a, _ in zip(blocks, nexts, strict=False)), "as few as can be"


# --- Scoring again ------------------------------------------------------------


def test_rescoring_needs_no_model_and_is_what_a_new_run_reports(
    interrupt: Callable[..., list[int]], model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def length(completions, **kwargs):\n    return [len(c[0]['content']) / 9 for c in completions]\n"
    (tmp_path / "mine.py").write_text(source)
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    changes = {"margin": 0.25, "reward_funcs": f"{tmp_path / 'mine.py'}:length", "price_per_million_tokens": 2}
    changes |= {"decision_bias": "sweep"}
    interrupt(model=model, well_formed=True)
    first = results(tmp_path / "eval")
    interrupt(model=model, well_formed=True, output_dir=tmp_path / "other", **changes)
    expected = results(tmp_path / "other")
    shutil.rmtree(model)
    monkeypatch.setattr(evaluate_script, "loaded_sampler", None)
    for _ in range(2):
        assert interrupt(0, model=model, rescore=True, **changes) == []
        assert results(tmp_path / "eval") == expected
    assert expected[0] != first[0]
    assert expected[1] != first[1]
    interrupt(0, model=model, rescore=True)
    assert results(tmp_path / "eval") == first
    report = json.loads(expected[0])
    assert report["cost"]["auto"] == pytest.approx(report["mean_tokens"]["auto"] * 2e-3)
    assert "cost" not in json.loads(first[0])


def test_other_answers_are_scored_anew(interrupt: Callable[..., list[int]], prompts: Dataset, tmp_path: Path) -> None:
    for answer in ("4", "5"):
        changed = prompts.remove_columns("answer").add_column("answer", [answer] * len(prompts))
        changed.to_parquet(tmp_path / "eval.parquet")
        interrupt(well_formed=True, rescore=answer == "5")
        samples = pd.read_parquet(tmp_path / "eval" / "samples.parquet")
        thinks = samples["mode"] == "think"  # they answer 4
        assert samples.loc[thinks, "reward"].eq(float(answer == "4")).all()


def test_rescoring_without_samples_is_refused(interrupt: Callable[..., list[int]], tmp_path: Path) -> None:
    message = r"rescore: there is no .*samples\.parquet, so there is nothing to score again.*leave rescore out"
    with pytest.raises(ValueError, match=message):
        interrupt(0, rescore=True)
    assert not (tmp_path / "eval").exists()
    interrupt(2)  # interrupted
    with pytest.raises(ValueError, match=message):
        interrupt(0, rescore=True)
    interrupt()
    with pytest.raises(ValueError, match=r"Changed: temperature: 1\.0 -> 0\.1"):
        interrupt(0, rescore=True, temperature=0.1)
